//! The contacts of a user: everybody who shares a conversation with them, cached for a short time.
//!
//! When a user is added to a conversation or removed from one, the entry of this user and all
//! entries that name them become invalid: a removed member receives nothing more. Entries are
//! checked when they are read, so a change adds only one note.
//!
//! Members of a conversation that was created, or that somebody has joined, are contacts at once. An entry
//! from before, and an answer of a replica that lags, do not have them. So the lists of such conversations are
//! kept as *groups* for longer than either can be used.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::DefaultHashBuilder;
use tokio::time::Instant;

use crate::domain::members::Members;
use crate::service::runtime::cache::{Bounds, Cache, Weigh};

/// Changes noted; beyond that, all entries are dropped.
const CHANGES_MAX: usize = 10_000;
/// Groups kept. Beyond that, the entries of the members of the oldest are dropped with it.
const GROUPS_MAX: usize = 256;
/// How far a replica of the conversation service may lag.
const REPLICA_LAG_MAX: Duration = Duration::from_secs(30);

/// Users, without duplicates.
pub(super) type Users = Arc<[Arc<str>]>;

#[derive(Debug)]
struct UserContacts {
    users: Users,
    /// When the request to the conversation service was made.
    since: Instant,
}

impl Weigh for UserContacts {
    /// One for the user and one for each contact.
    fn weight(&self) -> usize {
        1 + self.users.len()
    }
}

#[derive(Debug)]
pub(super) struct Contacts {
    lifetime: Duration,
    weight_max: usize,
    cache: Cache<UserContacts>,
    hasher: DefaultHashBuilder,
    /// Users whose conversations changed, and when last. Changes older than the lifetime are not
    /// needed.
    changes: HashMap<Arc<str>, Instant>,
    /// Answers to requests from before this time are not cached.
    dropped_at: Option<Instant>,
    /// The oldest first.
    groups: VecDeque<Group>,
}

/// The members of a conversation that was created, or that somebody has joined, lately.
#[derive(Debug)]
struct Group {
    conversation: Arc<str>,
    members: Members,
    since: Instant,
}

impl Contacts {
    pub(super) fn new(lifetime: Duration, weight_max: usize) -> Self {
        Self {
            lifetime,
            weight_max,
            cache: Cache::new(Bounds { entries_max: usize::MAX, weight_max }),
            hasher: DefaultHashBuilder::default(),
            changes: HashMap::new(),
            dropped_at: None,
            groups: VecDeque::new(),
        }
    }

    /// The conversation was created, or somebody has joined it: these are its members now.
    pub(super) fn joined(&mut self, conversation: &str, members: Members, now: Instant) {
        self.groups.retain(|group| *group.conversation != *conversation);
        while self.groups.len() >= GROUPS_MAX {
            let Some(oldest) = self.groups.pop_front() else { break };
            for member in oldest.members.iter() {
                self.cache.remove(self.hasher.hash_one(member), member);
            }
            self.dropped_at = Some(now);
        }
        self.groups.push_back(Group { conversation: conversation.into(), members, since: now });
    }

    /// The user has left the conversation.
    pub(super) fn left(&mut self, conversation: &str, user: &str) {
        for group in self.groups.iter_mut().filter(|it| *it.conversation == *conversation) {
            group.members = group.members.changed(user, false);
        }
    }

    /// The groups of the user: all their members are contacts too.
    pub(super) fn groups_of(&mut self, user: &str, now: Instant) -> Vec<Members> {
        let lifetime = self.lifetime + REPLICA_LAG_MAX;
        while self.groups.front().is_some_and(|it| now.duration_since(it.since) > lifetime) {
            self.groups.pop_front();
        }
        let theirs = self.groups.iter().filter(|group| group.members.contains(user));
        theirs.map(|group| group.members.clone()).collect()
    }

    /// The user was added to a conversation or removed from one.
    pub(super) fn changed(&mut self, user: &str, now: Instant) {
        if self.cache.is_empty() {
            // A request in flight may still return the old list.
            self.changes.clear();
            self.dropped_at = Some(now);
            return;
        }
        if self.changes.len() >= CHANGES_MAX {
            let lifetime = self.lifetime;
            self.changes.retain(|_, at| now.duration_since(*at) < lifetime);
        }
        if self.changes.len() >= CHANGES_MAX {
            let groups = std::mem::take(&mut self.groups);
            let empty = Self::new(self.lifetime, self.weight_max);
            *self = Self { dropped_at: Some(now), groups, ..empty };
        } else {
            self.changes.insert(user.into(), now);
        }
    }

    fn has_changed(&self, user: &str, since: Instant) -> bool {
        self.changes.get(user).is_some_and(|at| *at >= since)
    }

    pub(super) fn find(&self, user: &str, now: Instant) -> Option<Users> {
        let hash = self.hasher.hash_one(user);
        self.cache.read(hash, user, |UserContacts { users, since }| {
            let good = now.duration_since(*since) < self.lifetime
                && (self.changes.is_empty()
                    || !(self.has_changed(user, *since)
                        || users.iter().any(|named| self.has_changed(named, *since))));
            good.then(|| Arc::clone(users))
        })
    }

    /// Caches the answer to a request made at `since`, unless it alone exceeds the bound.
    pub(super) fn remember(&mut self, user: Arc<str>, users: Users, since: Instant, now: Instant) {
        if self.dropped_at.is_some_and(|at| at >= since) {
            return;
        }
        let hash = self.hasher.hash_one(&*user);
        let contacts = UserContacts { users, since };
        if contacts.weight() > self.weight_max {
            return self.cache.remove(hash, &user);
        }
        self.cache.insert(hash, Arc::clone(&user), contacts);
        self.cache.evict_stale(|contacts| now.duration_since(contacts.since) >= self.lifetime);
        self.cache.evict(&user);
    }

    pub(super) fn weight(&self) -> usize {
        self.cache.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(count: usize) -> Users {
        (0..count).map(|n| Arc::from(n.to_string())).collect()
    }

    #[test]
    fn old_entries_make_room_and_expire() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut contacts = Contacts::new(Duration::from_secs(10), 10);
        contacts.remember("a".into(), of(4), at(0), at(0));
        contacts.remember("b".into(), of(4), at(1), at(1));
        assert_eq!(contacts.weight(), 10);
        contacts.remember("c".into(), of(0), at(2), at(2));
        assert!(contacts.find("a", at(2)).is_none());
        assert!(contacts.find("b", at(10)).is_some());
        assert!(contacts.find("b", at(11)).is_none());
        contacts.remember("d".into(), of(0), at(11), at(11));
        assert_eq!((contacts.weight(), contacts.cache.len()), (2, 2));
    }

    #[test]
    fn replaced_entry_counts_once() {
        let now = Instant::now();
        let mut contacts = Contacts::new(Duration::from_secs(10), 100);
        for second in 0..50 {
            contacts.remember(
                "a".into(),
                of(3),
                now + Duration::from_secs(second) / 10,
                now + Duration::from_secs(second) / 10,
            );
        }
        assert_eq!(contacts.weight(), 4);
        assert_eq!(contacts.cache.len(), 1);
    }

    #[test]
    fn entry_larger_than_the_bound_is_not_kept() {
        let now = Instant::now();
        let mut contacts = Contacts::new(Duration::from_secs(10), 10);
        contacts.remember("a".into(), of(3), now, now);
        contacts.remember("a".into(), of(10), now, now);
        assert_eq!((contacts.weight(), contacts.find("a", now)), (0, None));
    }

    fn with(names: &[&str]) -> Users {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn change_voids_the_entries_of_a_user_and_those_that_name_them() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut contacts = Contacts::new(Duration::from_secs(10), 100);
        contacts.remember("a".into(), with(&["b", "c"]), at(0), at(0));
        contacts.remember("b".into(), with(&["a"]), at(0), at(0));
        contacts.remember("d".into(), with(&["e"]), at(0), at(0));
        contacts.changed("b", at(1));
        assert!(contacts.find("a", at(1)).is_none(), "names them");
        assert!(contacts.find("b", at(1)).is_none(), "is their own");
        assert!(contacts.find("d", at(1)).is_some());
        // An answer to a request from before the change is invalid too.
        contacts.remember("a".into(), with(&["b", "c"]), at(1), at(2));
        assert!(contacts.find("a", at(2)).is_none());
        contacts.remember("a".into(), with(&["c"]), at(2), at(2));
        contacts.remember("b".into(), with(&[]), at(2), at(2));
        assert_eq!(contacts.find("a", at(2)), Some(with(&["c"])));
        assert!(contacts.find("b", at(2)).is_some());
    }

    #[test]
    fn groups_are_bounded_and_expire() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut contacts = Contacts::new(Duration::from_secs(10), 100);
        contacts.joined("c", ["a", "b"].iter().collect(), at(0));
        contacts.joined("c", ["a", "b", "c"].iter().collect(), at(1));
        assert_eq!(contacts.groups_of("a", at(1)), [["a", "b", "c"].iter().collect()]);
        contacts.left("c", "b");
        assert_eq!(contacts.groups_of("b", at(1)), []);
        contacts.remember("a".into(), with(&["x"]), at(1), at(1));
        contacts.remember("x".into(), with(&["a"]), at(1), at(1));
        for other in 0..GROUPS_MAX {
            contacts.joined(&other.to_string(), ["y"].iter().collect(), at(2));
        }
        // The group of "c" is gone, and with it what would need it.
        assert!(contacts.find("a", at(2)).is_none() && contacts.find("x", at(2)).is_some());
        assert_eq!(contacts.groups_of("y", at(42)).len(), GROUPS_MAX);
        assert_eq!(contacts.groups_of("y", at(43)), []);
    }

    #[test]
    fn answer_under_way_is_void_too_while_the_cache_is_empty() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut contacts = Contacts::new(Duration::from_secs(10), 100);
        contacts.changed("b", later);
        contacts.remember("a".into(), with(&["b"]), start, later);
        assert!(contacts.find("a", later).is_none());
    }

    #[test]
    fn changes_are_bounded_and_too_many_drop_everything() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut contacts = Contacts::new(Duration::from_secs(10), 100);
        contacts.remember("a".into(), of(3), at(0), at(0));
        for user in 0..CHANGES_MAX {
            contacts.changed(&format!("stranger-{user}"), at(1));
        }
        assert!(contacts.find("a", at(1)).is_some());
        contacts.changed("one-more", at(2));
        assert!(contacts.find("a", at(2)).is_none());
        assert_eq!((contacts.weight(), contacts.changes.len()), (0, 0));
        contacts.remember("a".into(), of(3), at(2), at(3));
        assert!(contacts.find("a", at(3)).is_none(), "asked before");
        contacts.remember("a".into(), of(3), at(3), at(3));
        assert!(contacts.find("a", at(3)).is_some());
        // Changes older than the lifetime are dropped first.
        for user in 0..=CHANGES_MAX {
            let ages = if user < CHANGES_MAX { 4 } else { 14 };
            contacts.remember("a".into(), of(3), at(ages), at(ages));
            contacts.changed(&format!("stranger-{user}"), at(ages));
        }
        assert_eq!(contacts.changes.len(), 1);
        assert!(contacts.find("a", at(14)).is_some());
    }
}
