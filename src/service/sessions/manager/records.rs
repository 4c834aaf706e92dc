//! What the service knows of each session: one small record per connection slot.

use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::domain::limits::CONNECTIONS_PER_SHARD_MAX;
use crate::service::members::directory::SessionIds;

/// [`SessionRecord::expires_s`] of a session whose identity does not expire.
pub(super) const NEVER: u32 = u32::MAX;

/// Where a connection stands with the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionState {
    /// The slot holds nothing.
    Free,
    /// Its token is being checked; the client waits for the answer to its handshake.
    Checking,
    /// Answered with an error; its end is still to be reported.
    Refused,
    /// Admitted and in the directory.
    Live,
    /// Told to close; its end is still to be reported.
    Closing,
}

/// Where a session stands with what it missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CatchUpState {
    /// Its first message may still come.
    Awaited,
    /// Catching up.
    Running,
    /// Caught up; later requests carry no meaning (contract §3).
    Done,
    /// It went live without asking: asking now is too late.
    TooLate,
}

/// One connection.
#[derive(Debug)]
pub(super) struct SessionRecord {
    /// Shared with the directory; there from the admission on.
    pub(super) ids: Option<SessionIds>,
    pub(super) generation: u32,
    /// When its token expires, Unix time in seconds with the leeway added, or [`NEVER`].
    pub(super) expires_s: u32,
    pub(super) encoding: Encoding,
    pub(super) state: SessionState,
    pub(super) catch_up: CatchUpState,
    /// A fresh token of its own is being checked: one at a time.
    pub(super) token_in_check: bool,
    /// Presence had no room for its registration: the next sweep offers it again.
    pub(super) registration_owed: bool,
    /// How often its registration was refreshed, modulo 256.
    pub(super) refreshes: u8,
}

/// Memory of one connection, bytes.
pub(super) const RECORD_BYTES: usize = size_of::<SessionRecord>();

const FREE: SessionRecord = SessionRecord {
    ids: None,
    generation: 0,
    expires_s: NEVER,
    encoding: Encoding::Binary,
    state: SessionState::Free,
    catch_up: CatchUpState::Awaited,
    token_in_check: false,
    registration_owed: false,
    refreshes: 0,
};

/// SessionRecords that are kept although all free, so that a small node does not allocate all the time.
const KEPT: usize = 1024;

/// The records of one shard, by slot. Grows to the highest slot in use, and goes back with
/// [`SessionRecords::shrink`].
#[derive(Debug)]
pub(super) struct SessionRecords {
    shard: ShardId,
    slots: Vec<SessionRecord>,
}

impl SessionRecords {
    pub(super) fn new(shard: ShardId) -> Self {
        Self { shard, slots: Vec::new() }
    }

    /// Slots in use or used before.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The record of a connection that is still this one.
    pub(super) fn get(&mut self, connection: ConnectionKey) -> Option<&mut SessionRecord> {
        let record = self.slots.get_mut(connection.slot as usize)?;
        (record.generation == connection.generation && record.state != SessionState::Free)
            .then_some(record)
    }

    /// Whatever holds a slot now, with its address.
    pub(super) fn at(&mut self, slot: usize) -> Option<(SessionAddress, &mut SessionRecord)> {
        let record =
            self.slots.get_mut(slot).filter(|record| record.state != SessionState::Free)?;
        let connection =
            ConnectionKey { slot: u32::try_from(slot).ok()?, generation: record.generation };
        let address = SessionAddress { shard: self.shard, encoding: record.encoding, connection };
        Some((address, record))
    }

    /// Begins a record. `None`: the slot is taken, or beyond what a shard has; the report that
    /// says so is at fault.
    pub(super) fn open(
        &mut self,
        connection: ConnectionKey,
        encoding: Encoding,
    ) -> Option<&mut SessionRecord> {
        if connection.slot >= CONNECTIONS_PER_SHARD_MAX {
            return None;
        }
        let slot = connection.slot as usize;
        if slot >= self.slots.len() {
            self.slots.resize_with(slot + 1, || FREE);
        }
        let record = &mut self.slots[slot];
        if record.state != SessionState::Free {
            return None;
        }
        *record = SessionRecord {
            generation: connection.generation,
            encoding,
            state: SessionState::Checking,
            ..FREE
        };
        Some(record)
    }

    /// Gives back what lies above the highest slot in use. Shards fill the lowest slots first, so
    /// after a storm that is nearly everything.
    pub(super) fn shrink(&mut self) {
        let used = self.slots.iter().rposition(|record| record.state != SessionState::Free);
        self.slots.truncate(used.map_or(0, |last| last + 1));
        if self.slots.capacity() > KEPT && self.slots.len() < self.slots.capacity() / 4 {
            self.slots.shrink_to((2 * self.slots.len()).max(KEPT));
        }
    }

    /// Ends a record and hands out what it held.
    pub(super) fn close(&mut self, connection: ConnectionKey) -> Option<SessionRecord> {
        self.get(connection).map(|record| std::mem::replace(record, FREE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u32, generation: u32) -> ConnectionKey {
        ConnectionKey { slot, generation }
    }

    #[test]
    fn record_is_small() {
        assert!(size_of::<SessionRecord>() <= 32, "{}", size_of::<SessionRecord>());
    }

    #[test]
    fn later_use_of_a_slot_is_not_the_earlier_one() {
        let mut records = SessionRecords::new(ShardId(0));
        assert!(records.open(key(3, 1), Encoding::Json).is_some());
        assert!(records.open(key(3, 2), Encoding::Json).is_none(), "the slot is taken");
        assert!(records.close(key(3, 2)).is_none());
        assert_eq!(records.close(key(3, 1)).unwrap().encoding, Encoding::Json);
        assert!(records.open(key(3, 2), Encoding::Binary).is_some());
        assert!(records.get(key(3, 1)).is_none());
        assert_eq!(records.at(3).unwrap().0.connection, key(3, 2));
        assert!(records.at(2).is_none());
    }

    #[test]
    fn memory_goes_back_after_a_storm_and_sessions_stay() {
        let mut records = SessionRecords::new(ShardId(0));
        for slot in 0..50_000 {
            records.open(key(slot, 1), Encoding::Binary).unwrap();
        }
        for slot in (0..50_000).filter(|slot| *slot != 7) {
            records.close(key(slot, 1)).unwrap();
        }
        records.shrink();
        assert_eq!(records.len(), 8);
        assert!(records.slots.capacity() <= KEPT, "{}", records.slots.capacity());
        assert!(records.get(key(7, 1)).is_some() && records.get(key(8, 1)).is_none());
        assert!(records.open(key(49_999, 2), Encoding::Binary).is_some());
    }

    #[test]
    fn slot_beyond_a_shard_is_refused() {
        let mut records = SessionRecords::new(ShardId(0));
        assert!(records.open(key(CONNECTIONS_PER_SHARD_MAX, 0), Encoding::Binary).is_none());
    }
}
