//! What the session manager keeps of each connection: one small record per slot.

use std::net::{IpAddr, Ipv6Addr};

use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::domain::limits::CONNECTIONS_PER_SHARD_MAX;
use crate::service::members::directory::SessionIds;
use crate::service::sessions::auth::Identity;

/// Memory per connection, bytes.
pub const RECORD_BYTES: usize = size_of::<SessionRecord>();
/// [`SessionRecord::expires_s`] of a session whose identity does not expire.
const NEVER: u32 = u32::MAX;
/// Capacity kept even when all records are free, so that a small node does not reallocate all the
/// time.
const CAPACITY_KEPT: usize = 1024;

/// State of a connection as the session manager sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionState {
    /// The slot is not in use.
    Free,
    /// The token is being checked; the client waits for the answer to its handshake.
    Checking,
    /// Answered with an error; its end has not been reported yet.
    Refused,
    /// Admitted and in the directory.
    Live,
    /// Admitted, but has missed events: not in the directory any more, and its close is due.
    Missed,
    /// Being closed; its end has not been reported yet.
    Closing,
}

/// State of a session's catch-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CatchUpState {
    /// The first message has not come yet.
    Awaited,
    /// Catching up.
    Running,
    /// Caught up. Later requests are ignored (contract §3).
    Done,
    /// The session went live without a request. A request is now too late.
    TooLate,
}

/// One connection.
#[derive(Debug)]
pub(super) struct SessionRecord {
    /// Shared with the directory; set by the admission.
    pub(super) ids: Option<SessionIds>,
    pub(super) generation: u32,
    /// When the token expires, Unix time in seconds including the leeway, or [`NEVER`].
    pub(super) expires_s: u32,
    /// When the token was issued, Unix time in seconds; 0: it does not say.
    pub(super) issued_s: u32,
    /// When the session was admitted, Unix time in seconds.
    pub(super) since_s: u32,
    /// The client's address; IPv4 as a mapped one.
    pub(super) client: Ipv6Addr,
    pub(super) encoding: Encoding,
    pub(super) state: SessionState,
    pub(super) catch_up: CatchUpState,
    /// The shard may send it cursors.
    pub(super) cursors: bool,
    /// A fresh token of the session is being checked: one at a time.
    pub(super) token_in_check: bool,
    /// Presence had no room for the registration; the next sweep tries again.
    pub(super) registration_pending: bool,
    /// Refreshes of the registration, modulo 256.
    pub(super) refreshes: u8,
}

const FREE: SessionRecord = SessionRecord {
    ids: None,
    generation: 0,
    expires_s: NEVER,
    issued_s: 0,
    since_s: 0,
    client: Ipv6Addr::UNSPECIFIED,
    encoding: Encoding::Binary,
    state: SessionState::Free,
    catch_up: CatchUpState::Awaited,
    cursors: false,
    token_in_check: false,
    registration_pending: false,
    refreshes: 0,
};

impl SessionRecord {
    /// Whether the session was admitted and no close has been sent to it.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, SessionState::Live | SessionState::Missed)
    }

    /// When the token expires, including the leeway; `None`: never.
    pub(super) fn token_expires_s(&self) -> Option<u64> {
        (self.expires_s != NEVER).then_some(self.expires_s.into())
    }
}

/// [`SessionRecord::client`] of an address.
pub(super) fn client(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// [`SessionRecord::issued_s`] of an identity.
pub(super) fn issued(identity: &Identity) -> u32 {
    identity.issued_at_s.map_or(0, |at| u32::try_from(at).unwrap_or(u32::MAX))
}

/// [`SessionRecord::expires_s`] of an identity.
pub(super) fn expiry(identity: &Identity) -> u32 {
    identity.expires_at_s.map_or(NEVER, |at| u32::try_from(at).unwrap_or(NEVER))
}

/// The records of one shard, by slot. Grows to the highest slot in use; [`SessionRecords::shrink`]
/// returns memory.
#[derive(Debug)]
pub(super) struct SessionRecords {
    shard: ShardId,
    slots: Vec<SessionRecord>,
}

impl SessionRecords {
    pub(super) fn new(shard: ShardId) -> Self {
        Self { shard, slots: Vec::new() }
    }

    /// Slots that are or were in use.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The address of a connection, if it still holds its slot.
    pub(super) fn address(&mut self, connection: ConnectionKey) -> Option<SessionAddress> {
        let encoding = self.get(connection)?.encoding;
        Some(SessionAddress { shard: self.shard, encoding, connection })
    }

    /// The record of this connection, if it still holds its slot.
    pub(super) fn get(&mut self, connection: ConnectionKey) -> Option<&mut SessionRecord> {
        let record = self.slots.get_mut(connection.slot as usize)?;
        (record.generation == connection.generation && record.state != SessionState::Free)
            .then_some(record)
    }

    /// The connection that holds a slot now, with its address.
    pub(super) fn at(&mut self, slot: usize) -> Option<(SessionAddress, &mut SessionRecord)> {
        let record =
            self.slots.get_mut(slot).filter(|record| record.state != SessionState::Free)?;
        let connection =
            ConnectionKey { slot: u32::try_from(slot).ok()?, generation: record.generation };
        let address = SessionAddress { shard: self.shard, encoding: record.encoding, connection };
        Some((address, record))
    }

    /// Starts a record. `None`: the slot is taken or above the limit of a shard, so the report was
    /// wrong.
    pub(super) fn open(&mut self, address: SessionAddress) -> Option<&mut SessionRecord> {
        let SessionAddress { connection, encoding, .. } = address;
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

    /// Returns the memory above the highest slot in use. Shards fill the lowest slots first, so
    /// after a storm that is nearly everything.
    pub(super) fn shrink(&mut self) {
        let used = self.slots.iter().rposition(|record| record.state != SessionState::Free);
        self.slots.truncate(used.map_or(0, |last| last + 1));
        if self.slots.capacity() > CAPACITY_KEPT && self.slots.len() < self.slots.capacity() / 4 {
            self.slots.shrink_to((2 * self.slots.len()).max(CAPACITY_KEPT));
        }
    }

    /// Frees the slot of a connection and returns its record.
    pub(super) fn free(&mut self, connection: ConnectionKey) -> Option<SessionRecord> {
        self.get(connection).map(|record| std::mem::replace(record, FREE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u32, generation: u32) -> ConnectionKey {
        ConnectionKey { slot, generation }
    }

    fn at(connection: ConnectionKey, encoding: Encoding) -> SessionAddress {
        SessionAddress { shard: ShardId(0), encoding, connection }
    }

    /// 24 of them are what operators see or revoke by: the client's address, since when, when the token was issued.
    #[test]
    fn record_is_small() {
        assert!(size_of::<SessionRecord>() <= 56, "{}", size_of::<SessionRecord>());
    }

    #[test]
    fn reused_slot_does_not_match_its_earlier_connection() {
        let mut records = SessionRecords::new(ShardId(0));
        assert!(records.open(at(key(3, 1), Encoding::Json)).is_some());
        assert!(records.open(at(key(3, 2), Encoding::Json)).is_none(), "the slot is taken");
        assert!(records.free(key(3, 2)).is_none());
        assert_eq!(records.free(key(3, 1)).unwrap().encoding, Encoding::Json);
        assert!(records.open(at(key(3, 2), Encoding::Binary)).is_some());
        assert!(records.get(key(3, 1)).is_none());
        assert_eq!(records.at(3).unwrap().0.connection, key(3, 2));
        assert!(records.at(2).is_none());
    }

    #[test]
    fn memory_is_returned_after_a_storm_and_sessions_stay() {
        let mut records = SessionRecords::new(ShardId(0));
        for slot in 0..50_000 {
            records.open(at(key(slot, 1), Encoding::Binary)).unwrap();
        }
        for slot in (0..50_000).filter(|slot| *slot != 7) {
            records.free(key(slot, 1)).unwrap();
        }
        records.shrink();
        assert_eq!(records.len(), 8);
        assert!(records.slots.capacity() <= CAPACITY_KEPT, "{}", records.slots.capacity());
        assert!(records.get(key(7, 1)).is_some() && records.get(key(8, 1)).is_none());
        assert!(records.open(at(key(49_999, 2), Encoding::Binary)).is_some());
    }

    #[test]
    fn slot_above_the_limit_of_a_shard_is_refused() {
        let mut records = SessionRecords::new(ShardId(0));
        assert!(records.open(at(key(CONNECTIONS_PER_SHARD_MAX, 0), Encoding::Binary)).is_none());
    }
}
