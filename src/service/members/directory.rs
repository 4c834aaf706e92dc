//! The directory: the sessions of each user on this node.
//!
//! Every router reads it for every event; the session manager writes it. The interface is small, so
//! that another design (all sessions of a user on one shard) can replace it.

use std::hash::BuildHasher;
use std::sync::{Arc, RwLock};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::domain::ids::SessionAddress;
use crate::service::members::beginnings::Beginnings;

/// Parts, each with its own lock, so that a writer blocks few readers.
const PARTS: usize = 64;

/// The user id and device id of a session, in one shared allocation.
///
/// ```text
/// | user bytes: u16 | user | device |
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionIds(Arc<[u8]>);

impl SessionIds {
    /// Packs the ids. Both are shorter than 64 KiB, which the upgrade parser checks.
    pub fn new(user: &str, device: &str) -> Self {
        let user_len = u16::try_from(user.len()).expect("the upgrade parser bounds ids");
        let mut packed = Vec::with_capacity(2 + user.len() + device.len());
        packed.extend_from_slice(&user_len.to_le_bytes());
        packed.extend_from_slice(user.as_bytes());
        packed.extend_from_slice(device.as_bytes());
        Self(packed.into())
    }

    fn split(&self) -> (&[u8], &[u8]) {
        let user_len = usize::from(u16::from_le_bytes([self.0[0], self.0[1]]));
        self.0[2..].split_at(user_len)
    }

    /// The user.
    pub fn user(&self) -> &str {
        std::str::from_utf8(self.split().0).expect("packed from str")
    }

    /// The device.
    pub fn device(&self) -> &str {
        std::str::from_utf8(self.split().1).expect("packed from str")
    }
}

#[derive(Debug)]
struct DirectoryEntry {
    ids: SessionIds,
    address: SessionAddress,
}

/// The sessions of this node, by user.
#[derive(Debug)]
pub struct Directory {
    parts: Box<[RwLock<HashTable<DirectoryEntry>>]>,
    /// Seeded per process. Takes half the time of SipHash, which is not needed: only admitted users have
    /// entries, and a collision costs one comparison.
    hasher: DefaultHashBuilder,
    beginnings: Beginnings,
}

impl Default for Directory {
    fn default() -> Self {
        Self::new()
    }
}

impl Directory {
    /// Memory of one session besides its ids, bytes: an entry, its tag, and the eighth of the table that
    /// stays empty.
    pub const ENTRY_BYTES: usize = (size_of::<DirectoryEntry>() + 1) * 8 / 7;

    /// An empty directory.
    pub fn new() -> Self {
        Self::with_beginnings(Beginnings::default())
    }

    /// An empty directory with this log of beginnings.
    pub fn with_beginnings(beginnings: Beginnings) -> Self {
        let parts = (0..PARTS).map(|_| RwLock::new(HashTable::new())).collect();
        Self { parts, hasher: DefaultHashBuilder::default(), beginnings }
    }

    /// The users whose sessions were added lately.
    pub fn beginnings(&self) -> &Beginnings {
        &self.beginnings
    }

    fn part(&self, user: &[u8]) -> (u64, &RwLock<HashTable<DirectoryEntry>>) {
        let hash = self.hasher.hash_one(user);
        // The table uses the low bits for its groups and the high seven for its tags.
        (hash, &self.parts[(hash >> 48) as usize % PARTS])
    }

    /// Adds a session. It replaces the session of the same user and device, which is returned: the newer
    /// connection wins (contract §3).
    pub fn insert(&self, ids: SessionIds, address: SessionAddress) -> Option<SessionAddress> {
        let user = Arc::from(ids.user());
        let replaced = self.replace(ids, address);
        // Only now: see `Beginnings`.
        self.beginnings.push(user);
        replaced
    }

    fn replace(&self, ids: SessionIds, address: SessionAddress) -> Option<SessionAddress> {
        let (hash, part) = self.part(ids.split().0);
        let mut table = part.write().expect("no holder panics");
        if let Some(entry) = table.find_mut(hash, |entry| entry.ids == ids) {
            return Some(std::mem::replace(&mut entry.address, address));
        }
        table.insert_unique(hash, DirectoryEntry { ids, address }, |entry| {
            self.hasher.hash_one(entry.ids.split().0)
        });
        None
    }

    /// Removes a session, if the directory still has this one: the end of a replaced session does not
    /// remove its successor. Returns whether it was removed.
    pub fn remove(&self, ids: &SessionIds, address: SessionAddress) -> bool {
        let (hash, part) = self.part(ids.split().0);
        let mut table = part.write().expect("no holder panics");
        match table.find_entry(hash, |entry| entry.ids == *ids && entry.address == address) {
            Ok(entry) => {
                entry.remove();
                // Returns the memory after a mass disconnect. The slack avoids frequent resizing.
                if table.capacity() > 64 && table.len() < table.capacity() / 4 {
                    let target = table.len() * 2;
                    table.shrink_to(target, |entry| self.hasher.hash_one(entry.ids.split().0));
                }
                true
            }
            Err(_) => false,
        }
    }

    /// Moves all sessions of the user to `removed`.
    pub fn remove_user(&self, user: &str, removed: &mut Vec<(SessionIds, SessionAddress)>) {
        let (hash, part) = self.part(user.as_bytes());
        let mut table = part.write().expect("no holder panics");
        let is_theirs = |entry: &DirectoryEntry| entry.ids.split().0 == user.as_bytes();
        while let Ok(entry) = table.find_entry(hash, is_theirs) {
            let (entry, _) = entry.remove();
            removed.push((entry.ids, entry.address));
        }
    }

    /// Moves all sessions to `removed`, and returns the memory.
    pub fn remove_all(&self, removed: &mut Vec<(SessionIds, SessionAddress)>) {
        for part in &self.parts {
            let entries = std::mem::take(&mut *part.write().expect("no holder panics"));
            removed.extend(entries.into_iter().map(|entry| (entry.ids, entry.address)));
        }
    }

    /// Calls `visit` for each session of the user. Returns their number.
    pub fn sessions_of(&self, user: &str, mut visit: impl FnMut(SessionAddress)) -> usize {
        let (hash, part) = self.part(user.as_bytes());
        let table = part.read().expect("no holder panics");
        table
            .iter_hash(hash)
            .filter(|entry| entry.ids.split().0 == user.as_bytes())
            .map(|entry| visit(entry.address))
            .count()
    }

    /// The session of one user and device.
    pub fn find(&self, ids: &SessionIds) -> Option<SessionAddress> {
        let (hash, part) = self.part(ids.split().0);
        let table = part.read().expect("no holder panics");
        table.find(hash, |entry| entry.ids == *ids).map(|entry| entry.address)
    }

    /// Number of sessions.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.read().expect("no holder panics").len()).sum()
    }

    /// Whether there are no sessions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::encoding::Encoding;
    use crate::domain::ids::{ConnectionKey, ShardId};

    fn address(slot: u32) -> SessionAddress {
        SessionAddress {
            shard: ShardId(0),
            encoding: Encoding::Binary,
            connection: ConnectionKey { slot, generation: 0 },
        }
    }

    fn slots(directory: &Directory, user: &str) -> Vec<u32> {
        let mut slots = Vec::new();
        directory.sessions_of(user, |address| slots.push(address.connection.slot));
        slots.sort_unstable();
        slots
    }

    #[test]
    fn user_may_have_several_devices() {
        let directory = Directory::new();
        assert_eq!(directory.insert(SessionIds::new("alice", "phone"), address(1)), None);
        assert_eq!(directory.insert(SessionIds::new("alice", "desk"), address(2)), None);
        assert_eq!(directory.insert(SessionIds::new("bob", "phone"), address(3)), None);
        assert_eq!(slots(&directory, "alice"), [1, 2]);
        assert_eq!(slots(&directory, "carol"), [0; 0]);
        assert_eq!(directory.len(), 3);
    }

    #[test]
    fn end_of_a_replaced_session_leaves_its_successor() {
        let directory = Directory::new();
        let ids = SessionIds::new("alice", "phone");
        directory.insert(ids.clone(), address(1));
        assert_eq!(directory.insert(ids.clone(), address(2)), Some(address(1)));
        assert!(!directory.remove(&ids, address(1)));
        assert_eq!(directory.find(&ids), Some(address(2)));
        assert!(directory.remove(&ids, address(2)));
        assert!(directory.is_empty());
    }

    #[test]
    fn ids_with_the_same_concatenation_differ() {
        assert_ne!(SessionIds::new("ab", "c"), SessionIds::new("a", "bc"));
        let ids = SessionIds::new("ab", "c");
        assert_eq!((ids.user(), ids.device()), ("ab", "c"));
    }

    #[test]
    fn table_shrinks_after_a_mass_disconnect() {
        let directory = Directory::new();
        let all: Vec<_> =
            (0..50_000).map(|n| SessionIds::new(&format!("user-{n}"), "phone")).collect();
        for (slot, ids) in (0..).zip(&all) {
            directory.insert(ids.clone(), address(slot));
        }
        for (slot, ids) in (0..).zip(&all) {
            assert!(directory.remove(ids, address(slot)));
        }
        let capacity: usize = directory.parts.iter().map(|p| p.read().unwrap().capacity()).sum();
        assert!(capacity <= PARTS * 64, "{capacity}");
    }
}
