//! Periodic work: refreshes registrations, closes sessions that were replaced or whose token expired.

use tokio::time::Instant;

use super::admission::REPLACED;
use super::records::SessionState;
use super::state::SessionManager;
use crate::domain::close::{Close, CloseCode, EndReason};

const TOKEN_EXPIRED: Close = Close::new(CloseCode::TOKEN_EXPIRED, "token expired");

impl SessionManager {
    /// Refreshes the registrations that are due (contract §4), spread evenly over the interval.
    pub(super) fn refresh_registrations(&mut self, now: Instant) {
        let slots = self.slots_max();
        for slot in self.refresh_sweep.advance(slots, now) {
            for records in &mut self.records {
                let Some((_, record)) = records.at(slot) else { continue };
                let (SessionState::Live | SessionState::Missed, Some(ids)) =
                    (record.state, &record.ids)
                else {
                    continue;
                };
                if record.registration_pending {
                    record.registration_pending = !self.presence.register_again(ids);
                } else {
                    record.registration_pending = !self.presence.refresh(ids, record.refreshes);
                    record.refreshes = record.refreshes.wrapping_add(1);
                }
            }
        }
    }

    /// Checks whether the user's sessions are still registered with this node.
    pub(super) fn check_registrations(&mut self, user: &str) {
        let mut addresses = Vec::new();
        self.directory.sessions_of(user, |address| addresses.push(address));
        for address in addresses {
            if let Some(ids) = self.record(address).and_then(|record| record.ids.clone()) {
                self.presence.check(&ids);
            }
        }
    }

    /// Closes the sessions that are now registered with another node: the newest connection wins.
    pub(super) fn close_replaced_elsewhere(&mut self) {
        for ids in self.presence.take_replaced() {
            // Removed now, so that the end of the session does not unregister its successor.
            let missed = self.missed_closes.left(&ids);
            let Some(address) = self.directory.find(&ids).or(missed) else { continue };
            self.leave(&ids, address);
            if self.close(address, REPLACED, EndReason::ClosedByService) {
                self.counters.replaced_elsewhere.add(1);
            }
        }
    }

    /// Closes the sessions that a later one on another node has replaced, as the log says.
    pub(super) fn close_replaced_in_log(&mut self) {
        let Some(announcer) = self.announcer.clone() else { return };
        for (ids, up_to) in announcer.take_replaced() {
            let Some(address) = self.directory.find(&ids) else { continue };
            // Otherwise the one here is later in the log.
            if announcer.serial(address).is_some_and(|serial| serial <= up_to)
                && self.leave(&ids, address)
                && self.close(address, REPLACED, EndReason::ClosedByService)
            {
                self.counters.replaced_elsewhere.add(1);
            }
        }
    }

    /// Closes the sessions whose token has expired.
    pub(super) fn close_expired(&mut self, now: Instant, unix_s: u64) {
        let slots = self.slots_max();
        for slot in self.expiry_sweep.advance(slots, now) {
            for shard in 0..self.records.len() {
                let Some((address, record)) = self.records[shard].at(slot) else { continue };
                // A fresh token may still be in its check.
                if u64::from(record.expires_s) > unix_s || record.token_in_check {
                    continue;
                }
                if self.close(address, TOKEN_EXPIRED, EndReason::ClosedByService) {
                    self.counters.tokens_expired.add(1);
                }
            }
        }
    }
}
