//! Where users are, remembered for a short time.
//!
//! An entry goes when its time is up, when the presence service says that something changed for
//! the user, when an instance it names turned out to listen no more, and when room is needed. Room
//! is made by halves: a full young half becomes the old one, and what was the old half goes.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::time::Instant;

/// Locks are spread over this many parts.
const PARTS: usize = 64;
/// Instances remembered as gone; when more go at once, all is forgotten instead.
const GONE_MAX: usize = 1024;

/// Settings of the memory.
#[derive(Clone, Debug)]
pub struct LocationsConfig {
    /// How long an instance that holds a user is believed in.
    pub elsewhere_ttl: Duration,
    /// How long it is believed that no other instance holds a user.
    pub nowhere_ttl: Duration,
    /// Users remembered; some 100 bytes each.
    pub users_max: usize,
}

impl Default for LocationsConfig {
    /// One second for either, 200,000 users. Time and not memory is the limit: a session that
    /// moved to another node without going offline is announced by nobody.
    fn default() -> Self {
        Self {
            elsewhere_ttl: Duration::from_secs(1),
            nowhere_ttl: Duration::from_secs(1),
            users_max: 200_000,
        }
    }
}

impl LocationsConfig {
    /// How long an answer is believed at most, from when the registry was asked.
    pub fn lifetime(&self) -> Duration {
        self.elsewhere_ttl.max(self.nowhere_ttl)
    }
}

/// The other instances that hold a user, none twice; mostly none at all.
pub(super) type Instances = Arc<[Arc<str>]>;

#[derive(Debug)]
struct Entry {
    instances: Instances,
    since: Instant,
}

#[derive(Debug, Default)]
struct Part {
    young: HashMap<Arc<str>, Entry>,
    old: HashMap<Arc<str>, Entry>,
    /// Counts what was forgotten, so that an answer asked for before is not remembered after.
    forgotten: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Locations {
    config: LocationsConfig,
    hasher: RandomState,
    parts: Box<[RwLock<Part>]>,
    /// Instances that nobody listened for, and when.
    gone: RwLock<HashMap<Arc<str>, Instant>>,
    any_gone: AtomicBool,
}

/// From before a question is asked until its answer is remembered: an answer is as old as its
/// question, because nobody knows when in between it was true.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    at: Instant,
    forgotten: u64,
}

impl Locations {
    /// An empty one.
    pub fn new(config: LocationsConfig) -> Self {
        Self {
            config,
            hasher: RandomState::new(),
            parts: (0..PARTS).map(|_| RwLock::default()).collect(),
            gone: RwLock::default(),
            any_gone: AtomicBool::new(false),
        }
    }

    fn part(&self, user: &str) -> &RwLock<Part> {
        &self.parts[self.hasher.hash_one(user) as usize % PARTS]
    }

    /// The other instances that hold the user; `None`: not known now.
    pub(super) fn find(&self, user: &str, now: Instant) -> Option<Instances> {
        let part = self.part(user).read().expect("no holder panics");
        let entry = part.young.get(user).or_else(|| part.old.get(user))?;
        let ttl = if entry.instances.is_empty() {
            self.config.nowhere_ttl
        } else {
            self.config.elsewhere_ttl
        };
        let good = now.duration_since(entry.since) < ttl
            && !entry.instances.iter().any(|instance| self.is_gone(instance, entry.since));
        good.then(|| Arc::clone(&entry.instances))
    }

    /// Whether the instance was seen to be gone at `since` or later.
    fn is_gone(&self, instance: &str, since: Instant) -> bool {
        self.any_gone.load(Ordering::Relaxed)
            && self
                .gone
                .read()
                .expect("no holder panics")
                .get(instance)
                .is_some_and(|at| *at >= since)
    }

    /// To be called before the registry is asked for a user.
    pub(super) fn ask(&self, user: &str, now: Instant) -> Asked {
        let forgotten = self.part(user).read().expect("no holder panics").forgotten;
        Asked { at: now, forgotten }
    }

    /// Remembers an answer, unless something was forgotten since it was asked for.
    pub(super) fn remember(&self, user: Arc<str>, asked: Asked, instances: Instances) {
        let mut part = self.part(&user).write().expect("no holder panics");
        if part.forgotten != asked.forgotten {
            return;
        }
        part.young.insert(user, Entry { instances, since: asked.at });
        if part.young.len() > (self.config.users_max / PARTS / 2).max(1) {
            let capacity = part.young.len();
            part.old = std::mem::replace(&mut part.young, HashMap::with_capacity(capacity));
        }
    }

    /// Something changed for the user.
    pub fn forget(&self, user: &str) {
        let mut part = self.part(user).write().expect("no holder panics");
        part.forgotten += 1;
        part.young.remove(user);
        part.old.remove(user);
    }

    /// Changes may have been missed.
    pub fn forget_all(&self) {
        for part in &self.parts {
            let mut part = part.write().expect("no holder panics");
            let forgotten = part.forgotten + 1;
            *part = Part { forgotten, ..Part::default() };
        }
    }

    /// Nobody listens for this instance: whatever was known of its users is void.
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

    /// Users remembered, whether still good or not.
    pub fn len(&self) -> usize {
        let of = |part: &RwLock<Part>| {
            let part = part.read().expect("no holder panics");
            part.young.len() + part.old.len()
        };
        self.parts.iter().map(of).sum()
    }

    /// Whether nothing is remembered.
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

    fn learn(locations: &Locations, user: &str, instances: &[&str], now: Instant) {
        locations.remember(user.into(), locations.ask(user, now), at(instances));
    }

    #[test]
    fn answers_are_good_for_their_time() {
        let (locations, now) = (locations(), Instant::now());
        learn(&locations, "alice", &["n1"], now);
        learn(&locations, "bob", &[], now);
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
    fn instance_that_is_gone_takes_what_was_known_of_its_users_with_it() {
        let (locations, now) = (locations(), Instant::now());
        let later = now + Duration::from_secs(1);
        learn(&locations, "alice", &["n1", "n2"], now);
        learn(&locations, "bob", &["n2"], now);
        locations.instance_gone(&"n1".into(), later);
        assert_eq!(locations.find("alice", later), None);
        assert_eq!(locations.find("bob", later), Some(at(&["n2"])));
        // It is believed again when the registry says so again.
        let again = later + Duration::from_secs(1);
        learn(&locations, "alice", &["n1"], again);
        assert_eq!(locations.find("alice", again), Some(at(&["n1"])));
    }

    #[test]
    fn answer_from_before_a_change_is_not_remembered() {
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
    fn memory_is_bounded_and_keeps_the_newest() {
        let (locations, now) = (locations(), Instant::now());
        for n in 0..100_000 {
            learn(&locations, &format!("user-{n}"), &["n1"], now);
        }
        assert!(locations.len() <= 1_000 + PARTS, "{}", locations.len());
        assert!(locations.find("user-99999", now).is_some());
    }

    #[test]
    fn many_instances_gone_at_once_forget_everything() {
        let (locations, now) = (locations(), Instant::now());
        learn(&locations, "alice", &["kept"], now);
        for n in 0..=GONE_MAX {
            locations.instance_gone(&format!("n{n}").into(), now);
        }
        assert!(locations.is_empty());
        assert!(locations.gone.read().unwrap().len() <= GONE_MAX);
    }
}
