//! A short-lived cache of users' locations: the other instances that hold sessions of a user.
//!
//! An entry expires after its lifetime. It is removed earlier when the presence service reports a
//! change of the user, when an instance that it names has stopped listening, and when room is
//! needed.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use hashbrown::DefaultHashBuilder;
use tokio::time::Instant;

use crate::service::runtime::cache::{Bounds, Cache, Weigh};

/// Caches, each with its own lock.
const PARTS: usize = 64;
/// Instances noted as gone; beyond that, all entries are dropped.
const GONE_MAX: usize = 1024;

/// Lifetimes and bound of the cache.
#[derive(Clone, Debug)]
pub struct LocationsConfig {
    /// Lifetime of an entry that names other instances.
    pub elsewhere_ttl: Duration,
    /// Lifetime of an entry that names none.
    pub nowhere_ttl: Duration,
    /// Users cached; some 100 bytes each.
    pub users_max: usize,
}

impl Default for LocationsConfig {
    /// One second for either, 200,000 users. The lifetimes are short because the announcement of a
    /// session that moved to another node may be lost.
    fn default() -> Self {
        Self {
            elsewhere_ttl: Duration::from_secs(1),
            nowhere_ttl: Duration::from_secs(1),
            users_max: 200_000,
        }
    }
}

impl LocationsConfig {
    /// The longest lifetime of an entry, counted from the request to the registry.
    pub fn lifetime(&self) -> Duration {
        self.elsewhere_ttl.max(self.nowhere_ttl)
    }
}

/// The other instances that hold sessions of a user, without duplicates. Usually empty.
pub(super) type Instances = Arc<[Arc<str>]>;

#[derive(Debug)]
struct Location {
    instances: Instances,
    since: Instant,
}

impl Weigh for Location {
    fn weight(&self) -> usize {
        1
    }
}

#[derive(Debug)]
struct Part {
    cache: Cache<Location>,
    /// Counts invalidations. An answer to a request from before the last one is not cached.
    invalidations: u64,
}

/// The cache of users' locations. Usable from any thread.
#[derive(Debug)]
pub struct Locations {
    config: LocationsConfig,
    hasher: DefaultHashBuilder,
    parts: Box<[RwLock<Part>]>,
    /// Instances that had no listener, and when.
    gone: RwLock<HashMap<Arc<str>, Instant>>,
    any_gone: AtomicBool,
}

/// Taken before a request to the registry. The answer counts as old as its request, because it may
/// describe any moment since then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    at: Instant,
    invalidations: u64,
}

impl Locations {
    /// An empty cache.
    pub fn new(config: LocationsConfig) -> Self {
        let users_max = (config.users_max / PARTS).max(1);
        let bounds = Bounds { entries_max: users_max, weight_max: usize::MAX };
        let part = |_| RwLock::new(Part { cache: Cache::new(bounds), invalidations: 0 });
        Self {
            config,
            hasher: DefaultHashBuilder::default(),
            parts: (0..PARTS).map(part).collect(),
            gone: RwLock::default(),
            any_gone: AtomicBool::new(false),
        }
    }

    /// The hash of a user, and its part.
    fn part(&self, user: &str) -> (u64, &RwLock<Part>) {
        let hash = self.hasher.hash_one(user);
        // The table uses the low bits for its groups and the high seven for its tags.
        (hash, &self.parts[(hash >> 48) as usize % PARTS])
    }

    /// The other instances that hold sessions of the user; `None`: not cached.
    pub(super) fn find(&self, user: &str, now: Instant) -> Option<Instances> {
        let (hash, part) = self.part(user);
        part.read().expect("no holder panics").cache.read(hash, user, |location| {
            let Location { instances, since } = location;
            let LocationsConfig { elsewhere_ttl, nowhere_ttl, .. } = self.config;
            let ttl = if instances.is_empty() { nowhere_ttl } else { elsewhere_ttl };
            let good = now.duration_since(*since) < ttl
                && !instances.iter().any(|instance| self.is_gone(instance, *since));
            good.then(|| Arc::clone(instances))
        })
    }

    /// Whether the instance was noted as gone at `since` or later.
    fn is_gone(&self, instance: &str, since: Instant) -> bool {
        self.any_gone.load(Ordering::Relaxed)
            && self
                .gone
                .read()
                .expect("no holder panics")
                .get(instance)
                .is_some_and(|at| *at >= since)
    }

    /// Call this before requesting a user from the registry.
    pub(super) fn ask(&self, user: &str, now: Instant) -> Asked {
        let (_, part) = self.part(user);
        let invalidations = part.read().expect("no holder panics").invalidations;
        Asked { at: now, invalidations }
    }

    /// Caches an answer, unless an entry was invalidated after the request.
    pub(super) fn remember(&self, user: Arc<str>, asked: Asked, instances: Instances) {
        let (hash, part) = self.part(&user);
        let mut part = part.write().expect("no holder panics");
        if part.invalidations == asked.invalidations {
            part.cache.insert(hash, Arc::clone(&user), Location { instances, since: asked.at });
            part.cache.evict(&user);
        }
    }

    /// Invalidates the entry of a user.
    pub fn forget(&self, user: &str) {
        let (hash, part) = self.part(user);
        let mut part = part.write().expect("no holder panics");
        part.invalidations += 1;
        part.cache.remove(hash, user);
    }

    /// Invalidates all entries: changes may have been missed.
    pub fn forget_all(&self) {
        for part in &self.parts {
            let mut part = part.write().expect("no holder panics");
            part.invalidations += 1;
            part.cache.clear();
        }
    }

    /// Invalidates the entries that name this instance: it has no listener.
    pub(super) fn instance_gone(&self, instance: &Arc<str>, now: Instant) {
        let mut gone = self.gone.write().expect("no holder panics");
        let lifetime = self.config.elsewhere_ttl;
        gone.retain(|_, at| now.duration_since(*at) <= lifetime);
        if gone.len() >= GONE_MAX {
            gone.clear();
            drop(gone);
            return self.forget_all();
        }
        gone.insert(Arc::clone(instance), now);
        self.any_gone.store(true, Ordering::Relaxed);
    }

    /// Users cached, expired entries included.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.read().expect("no holder panics").cache.len()).sum()
    }

    /// Whether no user is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locations() -> Locations {
        Locations::new(LocationsConfig {
            elsewhere_ttl: Duration::from_secs(10),
            nowhere_ttl: Duration::from_secs(2),
            users_max: 1_000,
        })
    }

    fn at(instances: &[&str]) -> Instances {
        instances.iter().map(|instance| Arc::from(*instance)).collect()
    }

    fn cache(locations: &Locations, user: &str, instances: &[&str], now: Instant) {
        locations.remember(user.into(), locations.ask(user, now), at(instances));
    }

    #[test]
    fn entries_expire_after_their_lifetime() {
        let (locations, now) = (locations(), Instant::now());
        cache(&locations, "alice", &["n1"], now);
        cache(&locations, "bob", &[], now);
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(locations.find("alice", later(9)), Some(at(&["n1"])));
        assert_eq!(locations.find("alice", later(10)), None);
        assert_eq!(locations.find("bob", later(1)), Some(at(&[])));
        assert_eq!(locations.find("bob", later(2)), None);
        assert_eq!(locations.find("carol", now), None);
    }

    #[test]
    fn answer_is_as_old_as_its_question() {
        let (locations, now) = (locations(), Instant::now());
        let asked = locations.ask("bob", now);
        let late = now + Duration::from_millis(1_999);
        locations.remember("bob".into(), asked, at(&[]));
        assert_eq!(locations.find("bob", late), Some(at(&[])));
        assert_eq!(locations.find("bob", now + Duration::from_secs(2)), None);
    }

    #[test]
    fn instance_that_is_gone_invalidates_the_entries_of_its_users() {
        let (locations, now) = (locations(), Instant::now());
        let later = now + Duration::from_secs(1);
        cache(&locations, "alice", &["n1", "n2"], now);
        cache(&locations, "bob", &["n2"], now);
        locations.instance_gone(&"n1".into(), later);
        assert_eq!(locations.find("alice", later), None);
        assert_eq!(locations.find("bob", later), Some(at(&["n2"])));
        // A newer answer of the registry counts again.
        let again = later + Duration::from_secs(1);
        cache(&locations, "alice", &["n1"], again);
        assert_eq!(locations.find("alice", again), Some(at(&["n1"])));
    }

    #[test]
    fn answer_from_before_a_change_is_not_cached() {
        let (locations, now) = (locations(), Instant::now());
        let asked = locations.ask("alice", now);
        locations.forget("alice");
        locations.remember("alice".into(), asked, at(&["n1"]));
        assert_eq!(locations.find("alice", now), None);
        let asked = locations.ask("alice", now);
        locations.forget_all();
        locations.remember("alice".into(), asked, at(&["n1"]));
        assert!(locations.is_empty());
    }

    #[test]
    fn cache_is_bounded_and_keeps_the_newest() {
        let (locations, now) = (locations(), Instant::now());
        for n in 0..100_000 {
            cache(&locations, &format!("user-{n}"), &["n1"], now);
        }
        assert!(locations.len() <= 1_000 + PARTS, "{}", locations.len());
        assert!(locations.find("user-99999", now).is_some());
    }

    #[test]
    fn many_instances_gone_at_once_invalidate_everything() {
        let (locations, now) = (locations(), Instant::now());
        cache(&locations, "alice", &["kept"], now);
        for n in 0..=GONE_MAX {
            locations.instance_gone(&format!("n{n}").into(), now);
        }
        assert!(locations.is_empty());
        assert!(locations.gone.read().unwrap().len() <= GONE_MAX);
    }
}
