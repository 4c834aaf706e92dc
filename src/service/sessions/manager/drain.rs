//! The pace of a drain: how many sessions to close by when, and when each should reconnect.

use std::time::Duration;

use tokio::time::Instant;

use super::TICK;

/// The golden ratio minus one. The fractional parts of its multiples are spread over 0..1 more
/// evenly than random numbers, for any count of them.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// A drain under way.
#[derive(Debug)]
pub(super) struct Drain {
    begun: Instant,
    period: Duration,
    /// Sessions at the start.
    total: usize,
    /// Sessions closed so far.
    pub(super) closed: usize,
    /// The next slot, in every shard at once so that all shards empty evenly.
    pub(super) slot: usize,
}

impl Drain {
    pub(super) fn new(begun: Instant, period: Duration, total: usize) -> Self {
        Self { begun, period, total, closed: 0, slot: 0 }
    }

    /// The last sessions are closed when the period is over, and get one more tick.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begun) >= self.period + TICK
    }

    /// Sessions that should be closed by now.
    pub(super) fn due(&self, now: Instant) -> usize {
        let elapsed = now.saturating_duration_since(self.begun);
        let passed = (elapsed.as_secs_f64() / self.period.as_secs_f64()).min(1.0);
        (self.total as f64 * passed) as usize
    }

    /// How long the next closed session should wait before it reconnects. The waits of all sessions
    /// are evenly spread, so no second brings more reconnections to the other nodes than another.
    pub(super) fn reconnect_wait_ms(&self, spread: Duration) -> u128 {
        #[allow(clippy::cast_precision_loss, reason = "exact to 2^53")]
        let part = (self.closed as f64 * GOLDEN).fract();
        spread.mul_f64(part).as_millis()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most reconnections in any second, if every client keeps its wait.
    fn busiest_second(total: usize, period: Duration, spread: Duration) -> usize {
        let mut drain = Drain::new(Instant::now(), period, total);
        let mut arrivals = Vec::new();
        for closed in 0..total {
            drain.closed = closed;
            let due = (period / total as u32 * closed as u32).as_millis();
            // Closed at the next tick.
            let tick = due.next_multiple_of(TICK.as_millis());
            arrivals.push(tick + drain.reconnect_wait_ms(spread));
        }
        arrivals.sort_unstable();
        let within =
            |from: u128| arrivals.iter().filter(|at| (from..from + 1000).contains(*at)).count();
        arrivals.iter().map(|from| within(*from)).max().unwrap_or(0)
    }

    /// Promise: “No storm after a drain.”
    #[test]
    fn no_second_is_worse_for_the_other_nodes_than_the_pace() {
        for (total, period_s, spread_s) in
            [(1_000, 10, 5), (1_000, 2, 5), (3_000, 20, 5), (500, 5, 5)]
        {
            let longer = period_s.max(spread_s);
            let busiest =
                busiest_second(total, Duration::from_secs(period_s), Duration::from_secs(spread_s));
            let pace = total / longer as usize;
            assert!(busiest <= pace + pace / 10, "{busiest} in a second, {pace} on average");
            assert!(busiest >= pace - pace / 10, "{busiest} in a second, {pace} on average");
        }
    }
}
