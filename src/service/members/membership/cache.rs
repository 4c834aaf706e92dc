//! The member lists behind [`Membership`](super::Membership): caches side by side, each with a lock
//! of its own and its share of the bounds.

use std::hash::BuildHasher;
use std::sync::{Arc, RwLock};

use hashbrown::DefaultHashBuilder;

use crate::domain::members::Members;
use crate::service::members::membership::state::{KnownList, ListState, LogPosition};
use crate::service::members::membership::{MembershipConfig, MembershipCounters};
use crate::service::runtime::cache::{Bounds, Cache};

/// Caches, each with its own lock.
const PARTS: usize = 16;

type Part = Cache<ListState>;

#[derive(Debug)]
pub(super) struct MemberLists {
    parts: Box<[RwLock<Part>]>,
    /// Each process has its own seed; see
    /// [`Directory`](crate::service::members::directory::Directory).
    hasher: DefaultHashBuilder,
    lifetime_ms: u64,
    counters: Arc<MembershipCounters>,
    /// Whether lists expire after their lifetime.
    expires: bool,
}

impl MemberLists {
    pub(super) fn new(
        config: MembershipConfig,
        expires: bool,
        counters: Arc<MembershipCounters>,
    ) -> Self {
        let bounds = Bounds {
            entries_max: (config.conversations_max / PARTS).max(1),
            weight_max: (config.members_max / PARTS).max(1),
        };
        Self {
            parts: (0..PARTS).map(|_| RwLock::new(Cache::new(bounds))).collect(),
            hasher: DefaultHashBuilder::default(),
            lifetime_ms: config.lifetime_ms,
            counters,
            expires,
        }
    }

    /// The hash of a conversation, and its part.
    fn part(&self, conversation: &str) -> (u64, &RwLock<Part>) {
        let hash = self.hasher.hash_one(conversation);
        // The table uses the low bits for its groups and the high seven for its tags.
        (hash, &self.parts[(hash >> 48) as usize % PARTS])
    }

    /// The list, if it is known and current: the path of almost every record.
    pub(super) fn members(
        &self,
        conversation: &str,
        at: Option<LogPosition>,
        now_ms: u64,
    ) -> Option<Members> {
        let (hash, part) = self.part(conversation);
        part.read().expect("no holder panics").read(hash, conversation, |state| match state {
            ListState::Known(known) if self.is_current(known, now_ms) => Some(known.members(at)),
            _ => None,
        })
    }

    /// Whether a list is within its lifetime. The lifetime is shortened by a share that is derived
    /// from the time the list arrived, so every call for the same list agrees.
    pub(super) fn is_current(&self, known: &KnownList, now_ms: u64) -> bool {
        if !self.expires {
            return true;
        }
        let lifetime = self.lifetime_ms;
        let age = now_ms.saturating_sub(known.since_ms);
        // At most a quarter is taken off, so only the last quarter needs the hash.
        if age < lifetime - lifetime / 4 {
            return true;
        }
        let spread = self.hasher.hash_one(known.since_ms) % (lifetime / 4).max(1);
        age < lifetime - spread
    }

    /// Calls `act` on the state of a conversation, which starts as unknown.
    pub(super) fn with<T>(
        &self,
        conversation: &str,
        act: impl FnOnce(&Arc<str>, &mut ListState) -> T,
    ) -> T {
        let (hash, part) = self.part(conversation);
        self.count(&mut part.write().expect("no holder panics"), |part| {
            if !part.contains(hash, conversation) {
                part.insert(hash, conversation.into(), ListState::Unknown);
            }
            let result = part.update(hash, conversation, act).expect("it was just inserted");
            self.counters.evictions.add(part.evict(conversation) as u64);
            result
        })
    }

    /// Calls `act` on the state of a conversation, if there is one.
    pub(super) fn with_existing<T>(
        &self,
        conversation: &str,
        act: impl FnOnce(&mut ListState) -> T,
    ) -> Option<T> {
        let (hash, part) = self.part(conversation);
        self.count(&mut part.write().expect("no holder panics"), |part| {
            part.update(hash, conversation, |_, state| act(state))
        })
    }

    /// Makes all lists unknown. The answer to a request in flight is stale when it arrives.
    pub(super) fn clear(&self) {
        for part in &self.parts {
            self.count(&mut part.write().expect("no holder panics"), |part| {
                part.update_all(|state| *state = ListState::Unknown);
            });
        }
    }

    /// Calls `act`, and corrects the gauges by what it changed.
    fn count<T>(&self, part: &mut Part, act: impl FnOnce(&mut Part) -> T) -> T {
        let MembershipCounters { conversations, members, .. } = &*self.counters;
        let (conversations_before, members_before) = (part.len(), part.weight());
        let result = act(part);
        // Only the difference: a scrape in between must not see a part twice.
        conversations.add(part.len().saturating_sub(conversations_before) as u64);
        conversations.sub(conversations_before.saturating_sub(part.len()) as u64);
        members.add(part.weight().saturating_sub(members_before) as u64);
        members.sub(members_before.saturating_sub(part.weight()) as u64);
        result
    }
}
