//! Closes sessions that have missed events (4409), at a steady pace.
//!
//! Nothing is sent to such a session any more besides its close frame: it has left the directory, its catch-up
//! is cancelled, and its messages are ignored.

use tokio::time::Instant;

use super::records::SessionState;
use super::state::SessionManager;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardCommand;
use crate::domain::ids::SessionAddress;
use crate::service::backends::ports::MissedEvents as _;
use crate::service::members::directory::SessionIds;

const EVENTS_MISSED: Close = Close::new(CloseCode::EVENTS_MISSED, "events missed");

impl SessionManager {
    /// Takes the sessions that other nodes could not find for a time. They have missed what those handed
    /// over meanwhile.
    pub(super) fn take_lapsed(&self) {
        for ids in self.presence.take_lapsed() {
            self.missed.missed_by_user(ids.user());
        }
    }

    /// Takes the sessions that have missed events since the last call.
    pub(super) fn take_missed(&mut self) {
        let batch = self.missed.take();
        for (ids, address) in batch.left {
            self.on_left(ids, address);
        }
        for address in batch.named {
            let Some(ids) = self.record(address).and_then(|record| record.ids.clone()) else {
                continue;
            };
            // Otherwise it has been replaced and is being closed.
            if self.directory.remove(&ids, address) {
                self.on_left(ids, address);
            }
        }
    }

    fn on_left(&mut self, ids: SessionIds, address: SessionAddress) {
        // Only the session manager inserts, so a successor is in the directory or will be taken later.
        let has_successor = self.directory.find(&ids).is_some();
        if let Some(announcer) = &self.announcer {
            match has_successor {
                false => announcer.ended(&ids, address),
                true => announcer.replaced(&ids, address),
            }
        }
        let Some(record) = self.record(address) else { return };
        let (is_live, had_cursors) = (record.state == SessionState::Live, record.cursors);
        if is_live {
            record.state = SessionState::Missed;
            self.catch_ups.cancel(address);
        }
        if is_live && had_cursors {
            let connection = address.connection;
            self.send(address.shard, ShardCommand::StopCursors { connection });
        }
        // Presence knows the successor, so the end of this one is not to be reported.
        self.missed_closes.add((!has_successor).then_some(ids), address, is_live);
    }

    /// Closes the sessions that are due. During a drain, they are closed at its pace.
    pub(super) fn close_missed(&mut self, now: Instant) {
        let mut allowed = self.missed_closes.allowed(now);
        if self.drain.is_some() {
            self.missed_closes.wait_no_longer();
        }
        while allowed > 0 {
            let Some(address) = self.missed_closes.next() else { break };
            let is_due =
                self.record(address).is_some_and(|record| record.state == SessionState::Missed);
            if is_due && self.close(address, EVENTS_MISSED, EndReason::ClosedByService) {
                self.counters.events_missed.add(1);
                allowed -= 1;
            }
        }
        self.counters.events_missed_waiting.set(self.missed_closes.waiting() as u64);
    }

    /// Sessions that have not ended, besides those that were replaced.
    pub(super) fn open_sessions(&self) -> usize {
        self.directory.len() + self.missed_closes.len()
    }
}
