//! The connected members of large conversations.
//!
//! A router looks up every member of a small conversation for each of its events. Of a large one mostly few members are
//! connected, so the router caches its **audience**: the list of members, those of them who are connected, and the
//! positions up to which it has read who began a session ([`Beginnings`]). The next event adds the members who began
//! one since, and applies what the list of members has changed. So its cost grows with the connected members, and not
//! with all of them.
//!
//! The users of an audience are a superset. Each of them is looked up for each event as every member of a small
//! conversation is, so whatever decides about a session (an end, a replacement, the end of a node, what the lane has
//! applied, the state of the holder) decides the same. Nobody may be missing:
//!
//! * A session that begins is found before its user is in the log of beginnings. The log is read before users are
//!   looked up.
//! * A user is forgotten only if there is no session of theirs at all, on the side concerned. One whose beginning the
//!   lane has not applied yet stays.
//! * If the log does not reach back to the position, every member is looked up.
//!
//! Who has left the conversation is not in it any more: they must not get its events.

use std::collections::BTreeSet;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hashbrown::DefaultHashBuilder;

use crate::domain::members::Members;
use crate::service::cluster::table::SessionTable;
use crate::service::members::beginnings::Beginnings;
use crate::service::members::directory::Directory;
use crate::service::routing::router::RouterCounters;
use crate::service::runtime::cache::{Bounds, Cache, Weigh};

/// A connected user of an audience, bytes: the pointer, and the shared id with its reference counts if nothing else
/// holds it.
const USER_BYTES: usize = size_of::<Arc<str>>() + 2 * size_of::<usize>();
/// An audience without its users and its list, bytes.
const AUDIENCE_BYTES: usize = 512;
/// A change costs about as much as three look-ups (`bench/cluster large`). With more changes than a third of the
/// members it is cheaper to look everybody up.
const LOOK_UPS_PER_CHANGE: u64 = 3;

/// Where the sessions of users are looked up.
pub(super) trait Whereabouts {
    /// Whether the user has any session there.
    fn has(&self, user: &str) -> bool;

    /// Who began a session there.
    fn beginnings(&self) -> &Beginnings;
}

/// On this node.
impl Whereabouts for Directory {
    fn has(&self, user: &str) -> bool {
        self.sessions_of(user, |_| {}) > 0
    }

    fn beginnings(&self) -> &Beginnings {
        self.beginnings()
    }
}

/// On any node, as the table says.
impl Whereabouts for SessionTable {
    fn has(&self, user: &str) -> bool {
        self.nodes_of(user, i64::MAX, |_| {}) > 0
    }

    fn beginnings(&self) -> &Beginnings {
        self.beginnings()
    }
}

/// Members who are connected to one side: at least all of them.
#[derive(Debug, Default)]
struct ConnectedMembers {
    /// Sorted.
    users: Vec<Arc<str>>,
    /// The bytes of their ids.
    id_bytes: usize,
    /// The position in the log of beginnings up to which they are complete.
    position: u64,
}

impl ConnectedMembers {
    /// Looks every member up.
    fn find(members: &Members, side: &impl Whereabouts) -> Self {
        // First: whoever connects meanwhile is in the log from here on.
        let position = side.beginnings().next();
        let users: Vec<_> = members.iter().filter(|user| side.has(user)).map(Arc::from).collect();
        let id_bytes = users.iter().map(|user: &Arc<str>| user.len()).sum();
        Self { users, id_bytes, position }
    }

    /// Applies the changes of the list: adds `joined`, whether they are connected or not, and removes `left`. Then adds
    /// the members who began a session since the position. Returns false if that is not known, or too much.
    fn catch_up(
        &mut self,
        members: &Members,
        (joined, left): (&[&str], &BTreeSet<&str>),
        side: &impl Whereabouts,
    ) -> bool {
        let beginnings = side.beginnings();
        let behind = beginnings.next() - self.position;
        if behind > members.len() as u64 / LOOK_UPS_PER_CHANGE {
            return false;
        }
        if !left.is_empty() {
            self.retain(|user| !left.contains(user));
        }
        let mut added: Vec<Arc<str>> = joined.iter().map(|user| Arc::from(*user)).collect();
        let is_complete = beginnings.read(&mut self.position, |user| {
            if members.contains(user) {
                added.push(Arc::clone(user));
            }
        });
        if !added.is_empty() {
            added.retain(|user| self.users.binary_search(user).is_err());
            self.users.append(&mut added);
            // Two sorted runs, of which the second one is short.
            self.users.sort();
            self.users.dedup();
            self.id_bytes = self.users.iter().map(|user| user.len()).sum();
        }
        is_complete
    }

    /// Keeps the users for whom `keep` returns true.
    fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        let id_bytes = &mut self.id_bytes;
        self.users.retain(|user| {
            let stays = keep(user);
            if !stays {
                *id_bytes -= user.len();
            }
            stays
        });
    }

    fn bytes(&self) -> usize {
        self.users.capacity() * USER_BYTES + self.id_bytes
    }
}

#[derive(Debug)]
struct Audience {
    members: Members,
    members_bytes: usize,
    here: ConnectedMembers,
    /// On any node. Empty without a table.
    anywhere: ConnectedMembers,
}

impl Weigh for Audience {
    /// Bytes.
    fn weight(&self) -> usize {
        AUDIENCE_BYTES + self.members_bytes + self.here.bytes() + self.anywhere.bytes()
    }
}

impl Audience {
    fn find(members: &Members, directory: &Directory, table: Option<&SessionTable>) -> Self {
        Self {
            members_bytes: members.bytes(),
            members: members.clone(),
            here: ConnectedMembers::find(members, directory),
            anywhere: table.map_or_else(Default::default, |it| ConnectedMembers::find(members, it)),
        }
    }

    /// Returns false if everybody has to be looked up.
    fn catch_up(
        &mut self,
        members: &Members,
        directory: &Directory,
        table: Option<&SessionTable>,
    ) -> bool {
        let before = std::mem::replace(&mut self.members, members.clone());
        let (mut joined, mut left) = (Vec::new(), BTreeSet::new());
        if !members.is_same(&before) {
            members.differences(&before, |user, has_joined| {
                if has_joined {
                    joined.push(user);
                } else {
                    left.insert(user);
                }
            });
            self.members_bytes = members.bytes();
        }
        let changes = (&*joined, &left);
        self.here.catch_up(members, changes, directory)
            && table.is_none_or(|table| self.anywhere.catch_up(members, changes, table))
    }
}

/// The audiences of the large conversations of one router, of which those that were not used lately are evicted.
pub(super) struct Audiences {
    cache: Cache<Audience>,
    hasher: DefaultHashBuilder,
    members_min: usize,
    bytes_max: usize,
}

impl Audiences {
    /// For conversations with at least `members_min` members. All together take at most `bytes_max`.
    pub(super) fn new(members_min: usize, bytes_max: usize) -> Self {
        let bounds = Bounds { entries_max: usize::MAX, weight_max: bytes_max };
        let hasher = DefaultHashBuilder::default();
        Self { cache: Cache::new(bounds), hasher, members_min, bytes_max }
    }

    /// Whether the audience of such a list is within the bound even if all members are connected.
    fn fits(&self, members: &Members) -> bool {
        let users = 2 * (members.bytes() + 2 * members.len() * USER_BYTES);
        AUDIENCE_BYTES + members.bytes() + users <= self.bytes_max
    }

    /// Brings the audience of a conversation up to date, if it is large. Returns whether it is: then
    /// [`Audiences::here`] and [`Audiences::anywhere`] have all members who are connected.
    pub(super) fn prepare(
        &mut self,
        conversation: &str,
        members: &Members,
        directory: &Directory,
        table: Option<&SessionTable>,
        counters: &RouterCounters,
    ) -> bool {
        if members.len() < self.members_min {
            return false;
        }
        let hash = self.hasher.hash_one(conversation);
        // Marks it as used.
        let is_known = self.cache.read(hash, conversation, |it| Some(it.members.is_same(members)));
        if is_known != Some(true) && !self.fits(members) {
            self.cache.remove(hash, conversation);
            self.count(counters);
            return false;
        }
        let is_complete = self
            .cache
            .update(hash, conversation, |_, audience| audience.catch_up(members, directory, table));
        if is_complete != Some(true) {
            counters.audience_look_ups.add(1);
            let audience = Audience::find(members, directory, table);
            self.cache.insert(hash, conversation.into(), audience);
        }
        counters.audience_evictions.add(self.cache.evict(conversation) as u64);
        self.count(counters);
        true
    }

    fn count(&self, counters: &RouterCounters) {
        counters.audiences.set(self.cache.len() as u64);
        counters.audience_bytes.set(self.cache.weight() as u64);
    }

    /// Calls `visit` for the members who are connected to this node, and forgets those for whom it returns that they
    /// have no session here.
    pub(super) fn here(&mut self, conversation: &str, visit: impl FnMut(&str) -> bool) {
        let hash = self.hasher.hash_one(conversation);
        self.cache.update(hash, conversation, |_, audience| audience.here.retain(visit));
    }

    /// The same for the members who are connected to any node.
    pub(super) fn anywhere(&mut self, conversation: &str, visit: impl FnMut(&str) -> bool) {
        let hash = self.hasher.hash_one(conversation);
        self.cache.update(hash, conversation, |_, audience| audience.anywhere.retain(visit));
    }
}

#[cfg(test)]
mod tests;
