//! How a node goes: at once (`1001`), or by and by (`1012`) so that the others are not stormed.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::NodeState;
use super::records::SessionState;
use super::state::{Manager, TICK};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardCommand;

/// How all sessions are to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Close everything at once with 1001.
    Stop,
    /// Tell sessions to go with 1012, at a steady pace over this period; then close what is left.
    /// Clients that wait as told come to the other nodes at a steady pace too: in any second no
    /// more than the sessions there were, divided by the longer of this period and
    /// [`SessionConfig::reconnect_spread`](super::SessionConfig::reconnect_spread) in seconds.
    Drain(Duration),
}

/// What sessions are told that are closed at once.
const STOPPED: Close = Close::new(CloseCode::GOING_AWAY, "server stopping");
/// What sessions are told that a drain did not come to.
const DRAINED: Close = Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 0 ms");

/// The golden ratio less one: the parts behind the point of its multiples are spread over 0..1 more evenly
/// than chance would, however many there are.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// The state of a departure.
#[derive(Debug, Default)]
pub(super) struct Departure {
    /// Who waits for the last shard to stop.
    waiting: Vec<oneshot::Sender<()>>,
    drain: Option<Drain>,
}

#[derive(Debug)]
struct Drain {
    begun: Instant,
    period: Duration,
    /// Sessions there were when it began.
    total: usize,
    /// Sessions told to go.
    told: usize,
    /// The next slot to look at, in every shard at once so that they empty evenly.
    slot: usize,
}

impl Drain {
    /// How long the next session to go is to wait: for all of them together evenly spread, so that
    /// no second is worse than another for the nodes that they go to.
    fn wait_ms(&self, spread: Duration) -> u128 {
        #[allow(clippy::cast_precision_loss, reason = "exact to 2^53")]
        let part = (self.told as f64 * GOLDEN).fract();
        spread.mul_f64(part).as_millis()
    }
}

impl Manager {
    pub(super) fn on_end(&mut self, shutdown: Shutdown, ended: oneshot::Sender<()>, now: Instant) {
        self.departure.waiting.push(ended);
        match (self.state(), shutdown) {
            (NodeState::Serving | NodeState::Draining, Shutdown::Stop) => self.stop_shards(STOPPED),
            (NodeState::Serving, Shutdown::Drain(period)) => {
                self.set_state(NodeState::Draining);
                for link in &mut self.links {
                    link.send(ShardCommand::StopAccepting);
                }
                self.begin_drain(period, now);
            }
            (NodeState::Draining, Shutdown::Drain(period)) => self.begin_drain(period, now),
            (NodeState::Stopping | NodeState::Stopped, Shutdown::Stop | Shutdown::Drain(_)) => {}
        }
        self.after_stop();
    }

    fn begin_drain(&mut self, period: Duration, now: Instant) {
        let total = self.directory.len();
        self.departure.drain = Some(Drain { begun: now, period, total, told: 0, slot: 0 });
        self.depart(now);
    }

    /// Tells as many sessions to go as the pace asks for by now.
    pub(super) fn depart(&mut self, now: Instant) {
        let Some(mut drain) = self.departure.drain.take() else { return };
        let elapsed = now.saturating_duration_since(drain.begun);
        // The last of them go when the period is over, and have a tick to be gone.
        if elapsed >= drain.period + TICK || self.directory.is_empty() {
            return self.stop_shards(DRAINED);
        }
        let passed = (elapsed.as_secs_f64() / drain.period.as_secs_f64()).min(1.0);
        let due = (drain.total as f64 * passed) as usize;
        let last_slot = self.records.iter().map(|records| records.len()).max().unwrap_or(0);
        while drain.told < due && drain.slot < last_slot {
            self.tell_to_go(&mut drain);
            drain.slot += 1;
        }
        self.departure.drain = Some(drain);
    }

    /// Closes the sessions that have the slot whose turn it is, one in each shard at most.
    fn tell_to_go(&mut self, drain: &mut Drain) {
        for shard in 0..self.records.len() {
            let Some((address, record)) = self.records[shard].at(drain.slot) else { continue };
            if record.state == SessionState::Live {
                let wait_ms = drain.wait_ms(self.config.reconnect_spread);
                let reason = format!("draining; reconnect in {wait_ms} ms").into();
                let close = Close { code: CloseCode::SERVICE_RESTART, reason };
                self.close(address.shard, address.connection, close, EndReason::Draining);
                drain.told += 1;
            }
        }
    }

    fn stop_shards(&mut self, close: Close) {
        let accepting = self.state() == NodeState::Serving;
        self.set_state(NodeState::Stopping);
        self.departure.drain = None;
        for link in &mut self.links {
            if accepting {
                link.send(ShardCommand::StopAccepting);
            }
            link.send(ShardCommand::Stop { close: close.clone() });
        }
    }

    /// Ends the manager when it was told to and no shard is left.
    pub(super) fn after_stop(&mut self) {
        if self.state() == NodeState::Stopping && self.links.iter().all(|link| link.stopped) {
            self.set_state(NodeState::Stopped);
            for waiting in self.departure.waiting.drain(..) {
                let _ = waiting.send(()); // Who asked may have given up.
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most arrivals in any second, if everybody waits as told.
    fn busiest_second(total: usize, period: Duration, spread: Duration) -> usize {
        let begun = Instant::now();
        let mut drain = Drain { begun, period, total, told: 0, slot: 0 };
        let mut arrivals = Vec::new();
        for told in 0..total {
            drain.told = told;
            let left = (period / total as u32 * told as u32).as_millis();
            // Told at the tick after it.
            let tick = left.next_multiple_of(TICK.as_millis());
            arrivals.push(tick + drain.wait_ms(spread));
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
