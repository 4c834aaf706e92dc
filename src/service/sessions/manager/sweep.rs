//! Periodic work for every session without a timer per session: a slice of the slots at each tick.

use std::ops::Range;
use std::time::Duration;

use tokio::time::Instant;

/// Visits all slots once per period, at an even pace.
#[derive(Debug)]
pub(super) struct Sweep {
    period: Duration,
    begun: Option<Instant>,
    /// The next slot.
    slot: usize,
}

impl Sweep {
    pub(super) fn new(period: Duration) -> Self {
        Self { period, begun: None, slot: 0 }
    }

    /// The slots, out of `len`, that are due by now. A slot that is added behind the sweep's
    /// position waits for the next round; no round skips a slot.
    pub(super) fn advance(&mut self, len: usize, now: Instant) -> Range<usize> {
        let begun = *self.begun.get_or_insert(now);
        let elapsed = now.saturating_duration_since(begun);
        let from = self.slot.min(len);
        if elapsed >= self.period {
            self.begun = Some(now);
            self.slot = 0;
            return from..len;
        }
        let due = len as f64 * elapsed.as_secs_f64() / self.period.as_secs_f64();
        self.slot = from.max(due as usize);
        from..self.slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_visited_once_per_round_at_an_even_pace() {
        let mut sweep = Sweep::new(Duration::from_secs(20));
        let begun = Instant::now();
        let mut seen = vec![0; 10_000];
        for tick in 0..=400 {
            let due = sweep.advance(seen.len(), begun + tick * Duration::from_millis(100));
            assert!(due.len() <= 51, "{} at once", due.len());
            due.for_each(|slot| seen[slot] += 1);
        }
        assert!(seen.iter().all(|times| *times == 2));
    }

    #[test]
    fn slots_that_appear_or_vanish_during_a_round_are_not_skipped() {
        let mut sweep = Sweep::new(Duration::from_secs(10));
        let begun = Instant::now();
        let at = |s| begun + Duration::from_secs(s);
        assert_eq!(sweep.advance(100, at(0)), 0..0);
        assert_eq!(sweep.advance(100, at(5)), 0..50);
        assert_eq!(sweep.advance(1000, at(6)), 50..600);
        assert_eq!(sweep.advance(300, at(7)), 300..300);
        assert_eq!(sweep.advance(1000, at(10)), 300..1000);
        assert_eq!(sweep.advance(1000, at(15)), 0..500);
    }
}
