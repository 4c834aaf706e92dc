//! The bounded map behind [`Membership`](super::Membership): spread over parts, each with a lock of
//! its own and the second-chance rule for what must go.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::service::membership::state::{Known, LogPlace, Members, State};
use crate::service::membership::{MembershipConfig, MembershipCounters};

/// Locks are spread over this many parts.
const PARTS: usize = 16;

#[derive(Debug)]
struct Entry {
    state: State,
    /// Read since the hand of the clock passed.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Part {
    entries: HashMap<Arc<str>, Entry>,
    /// Each key of `entries` once: the clock.
    order: VecDeque<Arc<str>>,
    members: usize,
}

#[derive(Debug)]
pub(super) struct Cache {
    parts: Box<[RwLock<Part>]>,
    hasher: RandomState,
    /// One allocation for each user, however many conversations he is in.
    users: Mutex<Users>,
    config: MembershipConfig,
    counters: Arc<MembershipCounters>,
    /// Whether lists end after their lifetime.
    ends: bool,
}

#[derive(Debug, Default)]
struct Users {
    ids: HashSet<Arc<str>>,
    /// At this size those whom no list names any more are dropped.
    sweep_at: usize,
}

impl Cache {
    pub(super) fn new(
        config: MembershipConfig,
        ends: bool,
        counters: Arc<MembershipCounters>,
    ) -> Self {
        Self {
            parts: (0..PARTS).map(|_| RwLock::default()).collect(),
            hasher: RandomState::new(),
            users: Mutex::default(),
            config,
            counters,
            ends,
        }
    }

    fn part(&self, conversation: &str) -> &RwLock<Part> {
        &self.parts[self.hasher.hash_one(conversation) as usize % PARTS]
    }

    /// The list, if it is known and current: the way of almost every record.
    pub(super) fn members(
        &self,
        conversation: &str,
        at: Option<LogPlace>,
        now_ms: u64,
    ) -> Option<Members> {
        let part = self.part(conversation).read().expect("no holder panics");
        let entry = part.entries.get(conversation)?;
        match &entry.state {
            State::Known(known) if self.is_current(known, now_ms) => {
                // A store only if it changes something: the line stays shared between routers.
                if !entry.used.load(Ordering::Relaxed) {
                    entry.used.store(true, Ordering::Relaxed);
                }
                Some(known.members(at))
            }
            _ => None,
        }
    }

    /// Whether a list has not outlived its time. What is taken off the lifetime is drawn from the
    /// moment the list came, so it is the same at each look.
    pub(super) fn is_current(&self, known: &Known, now_ms: u64) -> bool {
        let lifetime = self.config.lifetime_ms;
        let spread = self.hasher.hash_one(known.since_ms) % (lifetime / 4).max(1);
        !self.ends || now_ms < known.since_ms.saturating_add(lifetime - spread)
    }

    /// Lets `act` on the state of a conversation, made unknown if it was not here.
    pub(super) fn with<T>(
        &self,
        conversation: &str,
        act: impl FnOnce(&Arc<str>, &mut State) -> T,
    ) -> T {
        let mut guard = self.part(conversation).write().expect("no holder panics");
        let part = &mut *guard;
        if !part.entries.contains_key(conversation) {
            let key: Arc<str> = conversation.into();
            part.order.push_back(Arc::clone(&key));
            let entry = Entry { state: State::Unknown, used: AtomicBool::new(false) };
            part.entries.insert(key, entry);
            self.counters.conversations.add(1);
        }
        let (key, _) = part.entries.get_key_value(conversation).expect("just made sure");
        let key = Arc::clone(key);
        let entry = part.entries.get_mut(conversation).expect("just made sure");
        let result = self.act(&mut part.members, entry, |state| act(&key, state));
        self.evict(part, &key);
        result
    }

    /// Lets `act` on the state of a conversation, if it is here.
    pub(super) fn with_existing<T>(
        &self,
        conversation: &str,
        act: impl FnOnce(&mut State) -> T,
    ) -> Option<T> {
        let mut guard = self.part(conversation).write().expect("no holder panics");
        let part = &mut *guard;
        let entry = part.entries.get_mut(conversation)?;
        Some(self.act(&mut part.members, entry, act))
    }

    fn act<T>(
        &self,
        members: &mut usize,
        entry: &mut Entry,
        act: impl FnOnce(&mut State) -> T,
    ) -> T {
        let before = entry.state.weight();
        let result = act(&mut entry.state);
        let after = entry.state.weight();
        *members = *members + after - before;
        self.counters.members.add(after as u64);
        self.counters.members.sub(before as u64);
        result
    }

    /// Drops what was not used lately until the part is within its share. `keep` stays, and so does
    /// what is being asked for (bounded by the questions under way).
    fn evict(&self, part: &mut Part, keep: &Arc<str>) {
        let conversations_max = (self.config.conversations_max / PARTS).max(1);
        let members_max = (self.config.members_max / PARTS).max(1);
        let mut looks = 2 * part.order.len();
        while (part.entries.len() > conversations_max || part.members > members_max) && looks > 0 {
            looks -= 1;
            let Some(key) = part.order.pop_front() else { break };
            let entry = &part.entries[&key];
            let stays = key == *keep
                || matches!(entry.state, State::Fetching(_))
                || entry.used.swap(false, Ordering::Relaxed);
            if stays {
                part.order.push_back(key);
                continue;
            }
            let entry = part.entries.remove(&key).expect("the clock holds the keys");
            part.members -= entry.state.weight();
            self.counters.members.sub(entry.state.weight() as u64);
            self.counters.conversations.sub(1);
            self.counters.evictions.add(1);
        }
    }

    /// Drops all lists. Questions under way go on, but as doubtful: whoever asks next asks anew.
    pub(super) fn clear(&self) {
        for part in &self.parts {
            let mut guard = part.write().expect("no holder panics");
            let part = &mut *guard;
            for entry in part.entries.values_mut() {
                self.act(&mut part.members, entry, |state| *state = State::Unknown);
            }
        }
    }

    /// The list in the form it is kept: sorted, each user once, ids shared.
    pub(super) fn intern<'a>(&self, ids: impl Iterator<Item = &'a str>) -> Members {
        let mut users = self.users.lock().expect("no holder panics");
        let mut members: Vec<_> =
            ids.filter(|id| !id.is_empty()).map(|id| users.intern(id)).collect();
        drop(users);
        members.sort_unstable();
        members.dedup();
        members.into()
    }

    pub(super) fn intern_one(&self, id: &str) -> Arc<str> {
        self.users.lock().expect("no holder panics").intern(id)
    }
}

impl Users {
    fn intern(&mut self, id: &str) -> Arc<str> {
        if let Some(known) = self.ids.get(id) {
            return Arc::clone(known);
        }
        if self.ids.len() >= self.sweep_at {
            self.ids.retain(|id| Arc::strong_count(id) > 1);
            self.ids.shrink_to(2 * self.ids.len());
            self.sweep_at = (2 * self.ids.len()).max(1024);
        }
        let id: Arc<str> = id.into();
        self.ids.insert(Arc::clone(&id));
        id
    }
}
