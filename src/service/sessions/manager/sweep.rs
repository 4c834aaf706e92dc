//! What is due for each session now and then, without a timer for any of them: a sweep over the
//! slots, a slice at each tick.

use std::ops::Range;
use std::time::Duration;

use tokio::time::Instant;

use super::records::SessionState;
use super::state::Manager;
use crate::domain::close::{Close, CloseCode, EndReason};

/// Goes over all slots once in each period, at an even pace.
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

    /// The slots that are due by now, of `len`. A slot that is added behind the place where the
    /// sweep is waits for the next round; none is left out of a round.
    fn advance(&mut self, len: usize, now: Instant) -> Range<usize> {
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

impl Manager {
    /// Refreshes the registrations that are due (contract §4), spread evenly over the interval.
    pub(super) fn sweep_presence(&mut self, now: Instant) {
        let len = self.slots_max();
        for slot in self.refreshing.advance(len, now) {
            for records in &mut self.records {
                let Some((_, record)) = records.at(slot) else { continue };
                let (SessionState::Live, Some(ids)) = (record.state, &record.ids) else { continue };
                if record.registration_owed {
                    record.registration_owed = !self.presence.opened(ids, true);
                } else {
                    record.registration_owed = !self.presence.refresh(ids, record.refreshes);
                    record.refreshes = record.refreshes.wrapping_add(1);
                }
            }
        }
    }

    /// Has presence look whether this node still holds the user's sessions.
    pub(super) fn recheck(&mut self, user: &str) {
        let mut here = Vec::new();
        self.directory.sessions_of(user, |address| here.push(address));
        for address in here {
            let record = self.records[address.shard.index()].get(address.connection);
            if let Some(ids) = record.and_then(|record| record.ids.as_ref()) {
                self.presence.recheck(ids);
            }
        }
    }

    /// Ends the sessions that presence found to be held by another node: the newer connection
    /// wins, wherever it is.
    pub(super) fn end_replaced_elsewhere(&mut self) {
        for ids in self.presence.take_replaced() {
            let Some(address) = self.directory.find(&ids) else { continue };
            // Out of the directory at once, so that its end unregisters nobody.
            self.directory.remove(&ids, address);
            let close = super::admission::REPLACED;
            let (shard, connection) = (address.shard, address.connection);
            if self.close(shard, connection, close, EndReason::ClosedByService) {
                self.counters.replaced_elsewhere.add(1);
            }
        }
    }

    /// Ends the sessions whose token has expired.
    pub(super) fn sweep_tokens(&mut self, unix_s: u64, now: Instant) {
        let len = self.slots_max();
        for slot in self.expiring.advance(len, now) {
            for shard in 0..self.records.len() {
                let Some((address, record)) = self.records[shard].at(slot) else { continue };
                // A fresh token that came in time may still be in check.
                if u64::from(record.expires_s) >= unix_s || record.token_in_check {
                    continue;
                }
                let close = Close::new(CloseCode::TOKEN_EXPIRED, "token expired");
                if self.close(address.shard, address.connection, close, EndReason::ClosedByService)
                {
                    self.counters.tokens_expired.add(1);
                }
            }
        }
    }

    pub(super) fn slots_max(&self) -> usize {
        self.records.iter().map(|records| records.len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_its_turn_once_a_round_at_an_even_pace() {
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
    fn slots_that_come_or_go_meanwhile_are_not_passed_over() {
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
