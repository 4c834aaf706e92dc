//! The contacts of a user: everybody who shares a conversation with them, cached for a short time.
//!
//! When a user is added to a conversation or removed from one, the entry of this user and all
//! entries that name them become invalid: a removed member receives nothing more. Entries are
//! checked when they are read, so a change adds only one note.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::DefaultHashBuilder;
use tokio::time::Instant;

use crate::service::runtime::cache::{Bounds, Cache, Weigh};

/// Changes noted; beyond that, all entries are dropped.
const CHANGES_MAX: usize = 10_000;

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
        }
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
            *self = Self { dropped_at: Some(now), ..Self::new(self.lifetime, self.weight_max) };
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
