//! The member lists behind [`Membership`](super::Membership), and the recent changes: parts side by side, each
//! with a lock of its own and its share of the bounds.

use std::hash::BuildHasher;
use std::sync::{Arc, RwLock};
use std::time::Instant;

use hashbrown::DefaultHashBuilder;

use crate::domain::members::Members;
use crate::service::members::membership::changes::{
    Inserted, RecentChanges, RecordPosition, RequestTime,
};
use crate::service::members::membership::state::{AnswerOutcome, KnownList, ListState};
use crate::service::members::membership::{MembershipConfig, MembershipCounters};
use crate::service::runtime::cache::{Bounds, Cache};

/// Parts, each with its own lock.
const PARTS: usize = 16;
/// Recent changes of one part. All parts together hold minutes at some hundred changes per second.
const CHANGES_MAX: usize = 8_192;

/// Memory of the recent changes, bytes.
pub const CHANGES_BYTES_MAX: usize = PARTS * CHANGES_MAX * RecentChanges::CHANGE_BYTES;

/// Some of the conversations: their lists and their recent changes.
#[derive(Debug)]
pub(super) struct Part {
    lists: Cache<ListState>,
    changes: RecentChanges,
}

/// A change of a conversation, as it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadChange<'a> {
    pub(super) conversation: &'a str,
    pub(super) user: &'a str,
    pub(super) added: bool,
    pub(super) position: RecordPosition,
}

/// The hash of a conversation, and its id.
type Key<'a> = (u64, &'a str);

impl Part {
    pub(super) fn new(bounds: Bounds, changes_max: usize) -> Self {
        Self { lists: Cache::new(bounds), changes: RecentChanges::new(changes_max) }
    }

    /// The list for a record at this position; without one, the newest list.
    fn list(&self, conversation: &str, known: &KnownList, at: Option<RecordPosition>) -> Members {
        match at {
            Some(at) if known.has_changed => self.changes.list_at(conversation, &known.members, at),
            Some(_) | None => known.members.clone(),
        }
    }

    /// The list, if it is known and `accept` takes it. Marks it as used.
    pub(super) fn read(
        &self,
        (hash, conversation): Key<'_>,
        at: Option<RecordPosition>,
        accept: impl FnOnce(&ListState) -> bool,
    ) -> Option<Members> {
        self.lists.read(hash, conversation, |state| {
            let known = state.known().filter(|_| accept(state))?;
            Some(self.list(conversation, known, at))
        })
    }

    /// Calls `act` on the state of a conversation, which starts as unknown, with the time of a request.
    pub(super) fn with<T>(
        &mut self,
        (hash, conversation): Key<'_>,
        now: Instant,
        act: impl FnOnce(&Arc<str>, &mut ListState, RequestTime) -> T,
    ) -> T {
        if !self.lists.contains(hash, conversation) {
            self.lists.insert(hash, conversation.into(), ListState::Unknown);
        }
        let asked = self.changes.request_time(now);
        let act = |key: &Arc<str>, state: &mut ListState| act(key, state, asked);
        self.lists.update(hash, conversation, act).expect("it was just inserted")
    }

    /// Handles the answer to request `id`.
    pub(super) fn answered(
        &mut self,
        (hash, conversation): Key<'_>,
        id: u64,
        answer: &Members,
        (now, now_ms): (Instant, u64),
    ) -> AnswerOutcome {
        let Self { lists, changes } = self;
        let answered = |_: &Arc<str>, state: &mut ListState| {
            let asked = state.request(id).map(|request| request.asked);
            let is_reconcilable = asked.is_some_and(|asked| changes.reaches_back_to(asked));
            let again = changes.request_time(now);
            state.answered(id, (again, is_reconcilable), now_ms, |asked| {
                changes.apply_to_answer(conversation, answer, asked)
            })
        };
        lists.update(hash, conversation, answered).unwrap_or(AnswerOutcome::Stale)
    }

    /// Whether changes of a conversation were read, so that it exists or has existed.
    pub(super) fn has_changes(&self, conversation: &str) -> bool {
        !self.changes.of(conversation).is_empty()
    }

    /// Applies a change. Returns whether it is read for the first time.
    pub(super) fn changed(&mut self, hash: u64, change: ReadChange<'_>, now: Instant) -> bool {
        let ReadChange { conversation, user, added, position } = change;
        let Self { lists, changes } = self;
        let inserted = changes.insert(conversation, (user, added), position, now);
        if inserted == Inserted::Known {
            return false;
        }
        lists.update(hash, conversation, |_, state| {
            state.change(user, added, inserted == Inserted::Last);
        });
        true
    }

    /// Applies a creation event, which has the complete list. Ignored if the list is known, or if the
    /// conversation is older: the record can be in the log twice. `must_be_first`: nothing is known of a
    /// conversation that changed before; a request will give the list. Returns whether it was applied.
    pub(super) fn created(
        &mut self,
        (hash, conversation): Key<'_>,
        list: &Members,
        position: RecordPosition,
        must_be_first: bool,
        now_ms: u64,
    ) -> bool {
        let known = self.lists.read(hash, conversation, |state| state.known().map(drop));
        if known.is_some() || (must_be_first && self.changes.has_before(conversation, position)) {
            return false;
        }
        let members = self.changes.apply_to_creation(conversation, list, position);
        self.with((hash, conversation), Instant::now(), |_, state, _| state.set(members, now_ms));
        true
    }

    /// Another node has read a change, and its order is not known. If the list agrees with it, nothing has to
    /// be done. Returns whether a list was dropped.
    pub(super) fn heard(&mut self, (hash, conversation): Key<'_>, user: &str, added: bool) -> bool {
        let doubted = self.lists.update(hash, conversation, |_, state| {
            let agrees = state.known().is_some_and(|it| it.members.contains(user) == added);
            !agrees && state.doubt()
        });
        doubted == Some(true)
    }

    /// The answer of the service for a conversation, as the log corrects it. `None`: the changes since the request
    /// are not known any more.
    fn corrected(
        &self,
        conversation: &str,
        answer: &Members,
        asked: RequestTime,
    ) -> Option<Members> {
        let is_reconcilable = self.changes.reaches_back_to(asked);
        is_reconcilable.then(|| self.changes.apply_to_answer(conversation, answer, asked))
    }

    fn clear(&mut self) {
        self.lists.update_all(|state| *state = ListState::Unknown);
        self.changes.clear();
    }
}

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
            parts: (0..PARTS).map(|_| RwLock::new(Part::new(bounds, CHANGES_MAX))).collect(),
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
        at: Option<RecordPosition>,
        now_ms: u64,
    ) -> Option<Members> {
        let (hash, part) = self.part(conversation);
        part.read().expect("no holder panics").read(
            (hash, conversation),
            at,
            |state| matches!(state, ListState::Known(known) if self.is_current(known, now_ms)),
        )
    }

    /// The list, also if its lifetime is over.
    pub(super) fn expired(
        &self,
        conversation: &str,
        at: Option<RecordPosition>,
    ) -> Option<Members> {
        let (hash, part) = self.part(conversation);
        part.read().expect("no holder panics").read((hash, conversation), at, |_| true)
    }

    /// The time of a request for a conversation that is made now.
    pub(super) fn asked(&self, conversation: &str) -> RequestTime {
        let (_, part) = self.part(conversation);
        part.read().expect("no holder panics").changes.request_time(Instant::now())
    }

    /// See [`Part::corrected`].
    pub(super) fn corrected(
        &self,
        conversation: &str,
        answer: &Members,
        asked: RequestTime,
    ) -> Option<Members> {
        let (_, part) = self.part(conversation);
        part.read().expect("no holder panics").corrected(conversation, answer, asked)
    }

    /// See [`RecentChanges::may_have_changed`].
    pub(super) fn may_have_changed(&self, user: &str) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|part| part.read().expect("no holder panics").changes.may_have_changed(user))
    }

    /// See [`RecentChanges::of_user`].
    pub(super) fn changes_of(
        &self,
        user: &str,
        asked_at: Instant,
        mut take: impl FnMut(Arc<str>, bool),
    ) {
        for part in &self.parts {
            let part = part.read().expect("no holder panics");
            part.changes.of_user(user, asked_at).for_each(|(of, added)| take(of, added));
        }
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

    /// Calls `act` on the state of a conversation, which starts as unknown, with the time of a request.
    pub(super) fn with<T>(
        &self,
        conversation: &str,
        act: impl FnOnce(&Arc<str>, &mut ListState, RequestTime) -> T,
    ) -> T {
        self.change(conversation, |hash, part| part.with((hash, conversation), Instant::now(), act))
    }

    /// Calls `act` on the part of a conversation, and then evicts what exceeds its bounds.
    pub(super) fn change<T>(&self, conversation: &str, act: impl FnOnce(u64, &mut Part) -> T) -> T {
        let (hash, part) = self.part(conversation);
        self.count(&mut part.write().expect("no holder panics"), |part| {
            let result = act(hash, part);
            self.counters.evictions.add(part.lists.evict(conversation) as u64);
            result
        })
    }

    /// Makes all lists unknown. The answer to a request in flight is stale when it arrives.
    pub(super) fn clear(&self) {
        for part in &self.parts {
            self.count(&mut part.write().expect("no holder panics"), Part::clear);
        }
    }

    /// Calls `act`, and corrects the gauges by what it changed.
    fn count<T>(&self, part: &mut Part, act: impl FnOnce(&mut Part) -> T) -> T {
        let MembershipCounters { conversations, members, .. } = &*self.counters;
        let (conversations_before, members_before) = (part.lists.len(), part.lists.weight());
        let result = act(part);
        // Only the difference: a scrape in between must not see a part twice.
        conversations.add(part.lists.len().saturating_sub(conversations_before) as u64);
        conversations.sub(conversations_before.saturating_sub(part.lists.len()) as u64);
        members.add(part.lists.weight().saturating_sub(members_before) as u64);
        members.sub(members_before.saturating_sub(part.lists.weight()) as u64);
        result
    }
}
