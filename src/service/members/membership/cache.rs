//! The bounded map behind [`Membership`](super::Membership): spread over parts, each with a lock of
//! its own and the second-chance rule for what must go.

use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::service::members::membership::state::{Known, LogPosition, Members, State};
use crate::service::members::membership::{MembershipConfig, MembershipCounters};

/// Locks are spread over this many parts.
const PARTS: usize = 16;

#[derive(Debug)]
struct Entry {
    conversation: Arc<str>,
    /// Of the conversation: drawn once, used for the part and within it.
    hash: u64,
    state: State,
    /// Read since the hand of the clock passed.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Part {
    entries: HashTable<Entry>,
    /// Each conversation of `entries` once, with its hash: the clock.
    order: VecDeque<(u64, Arc<str>)>,
    members: usize,
}

impl Part {
    fn find(&self, hash: u64, conversation: &str) -> Option<&Entry> {
        self.entries.find(hash, |entry| *entry.conversation == *conversation)
    }
}

#[derive(Debug)]
pub(super) struct Cache {
    parts: Box<[RwLock<Part>]>,
    /// Seeded anew in each process; see [`Directory`](crate::service::members::directory::Directory).
    hasher: DefaultHashBuilder,
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
            hasher: DefaultHashBuilder::default(),
            users: Mutex::default(),
            config,
            counters,
            ends,
        }
    }

    /// The hash of a conversation, and its part.
    fn part(&self, conversation: &str) -> (u64, &RwLock<Part>) {
        let hash = self.hasher.hash_one(conversation);
        // The table uses the low bits for its groups and the high seven for its tags.
        (hash, &self.parts[(hash >> 48) as usize % PARTS])
    }

    /// The list, if it is known and current: the way of almost every record.
    pub(super) fn members(
        &self,
        conversation: &str,
        at: Option<LogPosition>,
        now_ms: u64,
    ) -> Option<Members> {
        let (hash, part) = self.part(conversation);
        let part = part.read().expect("no holder panics");
        let entry = part.find(hash, conversation)?;
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
        if !self.ends {
            return true;
        }
        let lifetime = self.config.lifetime_ms;
        let age = now_ms.saturating_sub(known.since_ms);
        // Nothing is taken off more than a quarter: the draw is for the last one only.
        if age < lifetime - lifetime / 4 {
            return true;
        }
        let spread = self.hasher.hash_one(known.since_ms) % (lifetime / 4).max(1);
        age < lifetime - spread
    }

    /// Lets `act` on the state of a conversation, made unknown if it was not here.
    pub(super) fn with<T>(
        &self,
        conversation: &str,
        act: impl FnOnce(&Arc<str>, &mut State) -> T,
    ) -> T {
        let (hash, part) = self.part(conversation);
        let mut guard = part.write().expect("no holder panics");
        let part = &mut *guard;
        if part.find(hash, conversation).is_none() {
            let conversation: Arc<str> = conversation.into();
            part.order.push_back((hash, Arc::clone(&conversation)));
            let entry =
                Entry { conversation, hash, state: State::Unknown, used: AtomicBool::new(false) };
            part.entries.insert_unique(hash, entry, |entry| entry.hash);
            self.counters.conversations.add(1);
        }
        let entry = part.entries.find_mut(hash, |entry| *entry.conversation == *conversation);
        let entry = entry.expect("just made sure");
        let key = Arc::clone(&entry.conversation);
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
        let (hash, part) = self.part(conversation);
        let mut guard = part.write().expect("no holder panics");
        let part = &mut *guard;
        let entry = part.entries.find_mut(hash, |entry| *entry.conversation == *conversation)?;
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
            let Some((hash, key)) = part.order.pop_front() else { break };
            let found = part.entries.find_entry(hash, |entry| *entry.conversation == *key);
            let found = found.unwrap_or_else(|_| unreachable!("the clock holds the keys"));
            let entry = found.get();
            let stays = key == *keep
                || matches!(entry.state, State::Fetching(_))
                || entry.used.swap(false, Ordering::Relaxed);
            if stays {
                part.order.push_back((hash, key));
                continue;
            }
            let (entry, _) = found.remove();
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
            for entry in part.entries.iter_mut() {
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
