//! Who belongs to a conversation: complete, or unknown (design decision 8).
//!
//! Shared by all routers of the node. A list is cached only because every change of it reaches this
//! cache: the follower (`kafka::follower`) reads the membership topics on every node, whoever of a
//! group delivers their records. A router that comes upon a change first applies it too, so that
//! what it routes next obeys it. How answers and changes are reconciled is
//! told in `membership/state.rs`.

mod cache;
mod state;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use crate::counters;
use crate::handoff::Doorbell;
use crate::service::backends::ports::{ConversationSource, MembershipChanges, NeighbourError};
use crate::service::events::timestamp::unix_ms;
use crate::service::members::membership::cache::MemberLists;
use crate::service::members::membership::state::{Answered, Change, Marks, Rules, State};
use crate::service::runtime::backoff::Backoff;

pub use crate::service::members::membership::state::{LogPosition, Members};

/// How long "no such conversation" is believed, ms: a replica of the service may lag behind the
/// event that made the conversation.
const ABSENT_MS: u64 = 2_000;

/// Bounds and times. All have defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MembershipConfig {
    /// Conversations whose members are cached.
    pub conversations_max: usize,
    /// Cached members, summed over all conversations; 16 bytes each. One conversation may go
    /// beyond its share: it is then the only one of its part.
    pub members_max: usize,
    /// How long a list is used before it is asked for again, ms; each list's own is shorter by up to
    /// a quarter, so that they do not end together. Without a conversation service lists do not end.
    pub lifetime_ms: u64,
    /// Time for one answer of the conversation service, ms.
    pub fetch_deadline_ms: u64,
    /// Questions under way at a time.
    pub fetches_max: usize,
    /// Delays after failed questions.
    pub backoff: Backoff,
    /// How far apart the clocks of this node and of the publishers (or brokers) may be, ms. Too
    /// large costs questions, too small costs correctness.
    pub clock_skew_ms: u64,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        Self {
            conversations_max: 200_000,
            members_max: 4_000_000,
            lifetime_ms: 600_000,
            fetch_deadline_ms: 5_000,
            fetches_max: 64,
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
            clock_skew_ms: 5_000,
        }
    }
}

counters! {
    /// Counted by the membership cache; any thread.
    pub struct MembershipCounters of SharedCounter {
        Gauge conversations: "Conversations in the membership cache.",
        Gauge members: "Members in the membership cache, summed over its conversations.",
        Counter evictions: "Member lists dropped to stay within the bounds of the cache.",
        Counter invalidations: "Member lists dropped because a change might or might not be in them.",
        Counter fetches: "Questions to the conversation service for the members of a conversation.",
        Counter fetches_repeated: "Questions asked again because changes arrived meanwhile.",
        Counter fetches_failed: "Questions to the conversation service without an answer.",
        Gauge fetches_under_way: "Questions to the conversation service without an answer yet.",
        Counter conversations_absent: "Answers of the conversation service that there is no such conversation.",
    }
}

/// What is known when a record needs its recipients.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// All of them.
    Members(Members),
    /// Being asked for; the bells ring when that has changed.
    Pending,
    /// The service does not answer; it is asked again by the first look-up after `retry_at_ms`.
    Failing {
        /// Unix time, ms.
        retry_at_ms: u64,
    },
    /// The service knows of no such conversation.
    Absent,
    /// Not known, and there is no service to ask.
    Unknown,
}

/// See the module.
pub struct Membership {
    lists: MemberLists,
    source: Option<Arc<dyn ConversationSource>>,
    runtime: tokio::runtime::Handle,
    config: MembershipConfig,
    counters: Arc<MembershipCounters>,
    bells: RwLock<Vec<Arc<Doorbell>>>,
    watchers: RwLock<Vec<Arc<dyn MembershipChanges>>>,
    /// Held while a change is applied: whoever finds it read may rely on its having been applied.
    marks: Mutex<Marks>,
    following: AtomicBool,
    fetches: AtomicUsize,
    fetch_ids: AtomicU64,
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Membership {
    /// An empty cache in front of `source`. Nothing is asked for before [`Membership::follow`].
    pub fn new(
        config: MembershipConfig,
        source: Option<Arc<dyn ConversationSource>>,
        runtime: tokio::runtime::Handle,
        counters: Arc<MembershipCounters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            lists: MemberLists::new(config, source.is_some(), Arc::clone(&counters)),
            source,
            runtime,
            config,
            counters,
            bells: RwLock::default(),
            watchers: RwLock::default(),
            marks: Mutex::default(),
            following: AtomicBool::new(false),
            fetches: AtomicUsize::new(0),
            fetch_ids: AtomicU64::new(0),
        })
    }

    /// Adds one who is told of every change from now on.
    pub fn watch(&self, watcher: Arc<dyn MembershipChanges>) {
        self.watchers.write().expect("no holder panics").push(watcher);
    }

    /// Adds one who is woken when a list has arrived: a router.
    pub fn wake(&self, bell: Arc<Doorbell>) {
        self.bells.write().expect("no holder panics").push(bell);
    }

    /// A partition of the membership topics is read from `place` on; what stands before it is in
    /// every answer from now on.
    pub fn follow_from(&self, place: LogPosition) {
        let before = LogPosition { offset: place.offset - 1, ..place };
        self.marks.lock().expect("no holder panics").advance(before);
    }

    /// From now on every change reaches this cache. An answer asked for earlier could miss one that
    /// nobody would ever apply.
    pub fn follow(&self) {
        self.following.store(true, Ordering::Release);
        self.ring();
    }

    /// A part of the membership log was lost to this node (retention, truncation): nothing that is
    /// cached can be trusted, and nothing is cached before [`Membership::follow`].
    pub fn forget_all(&self) {
        self.following.store(false, Ordering::Release);
        *self.marks.lock().expect("no holder panics") = Marks::default();
        self.lists.clear();
    }

    /// Whether there is a conversation service to ask.
    pub fn can_ask(&self) -> bool {
        self.source.is_some()
    }

    fn rules(&self) -> Rules {
        Rules { clock_skew_ms: self.config.clock_skew_ms, can_ask: self.can_ask() }
    }

    /// The members of a conversation. If they are not known they are asked for, once for all who
    /// wait. `at` is the place of the record they are for, if it stands in a log that is followed:
    /// the follower may have read on, and what follows in the record's own partition does not
    /// concern it yet.
    pub fn lookup(
        self: &Arc<Self>,
        conversation: &str,
        at: Option<LogPosition>,
        now_ms: u64,
    ) -> Lookup {
        if let Some(members) = self.lists.members(conversation, at, now_ms) {
            return Lookup::Members(members);
        }
        if self.source.is_none() {
            return Lookup::Unknown;
        }
        if !self.following.load(Ordering::Acquire) {
            return Lookup::Pending;
        }
        self.lists.with(conversation, |key, state| self.ask_if_due(key, state, at, now_ms))
    }

    fn ask_if_due(
        self: &Arc<Self>,
        key: &Arc<str>,
        state: &mut State,
        at: Option<LogPosition>,
        now_ms: u64,
    ) -> Lookup {
        match state {
            State::Unknown => {}
            State::Fetching(_) => return found(state, at).unwrap_or(Lookup::Pending),
            State::Failing { retry_at_ms, .. } if now_ms < *retry_at_ms => {
                return Lookup::Failing { retry_at_ms: *retry_at_ms };
            }
            State::Failing { .. } => {}
            State::Absent { until_ms } if now_ms < *until_ms => return Lookup::Absent,
            State::Absent { .. } => {}
            State::Known(known) if self.lists.is_current(known, now_ms) => {
                return Lookup::Members(known.members(at));
            }
            State::Known(_) => {}
        }
        let meanwhile = found(state, at).unwrap_or(Lookup::Pending);
        if self.fetches.fetch_add(1, Ordering::Relaxed) >= self.config.fetches_max {
            self.fetches.fetch_sub(1, Ordering::Relaxed);
            return meanwhile;
        }
        self.counters.fetches_under_way.add(1);
        let id = self.fetch_ids.fetch_add(1, Ordering::Relaxed);
        state.ask(id, now_ms);
        self.runtime.spawn(Arc::clone(self).fetch(Arc::clone(key), id));
        meanwhile
    }

    /// Asks until there is an answer that nothing has overtaken.
    async fn fetch(self: Arc<Self>, key: Arc<str>, id: u64) {
        let source = self.source.as_ref().expect("asked only with a source");
        let deadline = Duration::from_millis(self.config.fetch_deadline_ms);
        loop {
            self.counters.fetches.add(1);
            let answer = tokio::time::timeout(deadline, source.members(Arc::clone(&key)))
                .await
                .unwrap_or_else(|_| Err(NeighbourError::Unavailable("no answer in time".into())));
            if self.settle(&key, id, answer) != Answered::AskAgain {
                break;
            }
            self.counters.fetches_repeated.add(1);
        }
        self.fetches.fetch_sub(1, Ordering::Relaxed);
        self.counters.fetches_under_way.sub(1);
        self.ring();
    }

    fn settle(
        &self,
        key: &Arc<str>,
        id: u64,
        answer: Result<Vec<Arc<str>>, NeighbourError>,
    ) -> Answered {
        let now_ms = unix_ms();
        match answer {
            Ok(members) => {
                let members = self.lists.intern(members.iter().map(|id| &**id));
                let rules = self.rules();
                self.lists.with(key, |_, state| state.answered(id, members, now_ms, rules))
            }
            Err(NeighbourError::NotFound) => {
                self.counters.conversations_absent.add(1);
                self.lists.with(key, |_, state| state.absent(id, now_ms + ABSENT_MS));
                Answered::Settled
            }
            Err(NeighbourError::Unavailable(reason)) => {
                self.counters.fetches_failed.add(1);
                let pause = |failures: u32| {
                    let pause = self.config.backoff.random_delay(failures.saturating_sub(1));
                    pause.as_micros().div_ceil(1_000) as u64
                };
                self.lists.with(key, |_, state| state.failed(id, now_ms, pause));
                tracing::debug!(conversation = %key, reason, "members not answered");
                Answered::Settled
            }
        }
    }

    /// A creation event with the complete list.
    pub fn created(
        &self,
        conversation: &str,
        members: &[&str],
        place: LogPosition,
        appended_at_ms: u64,
        now_ms: u64,
    ) {
        let mut marks = self.marks.lock().expect("no holder panics");
        if !marks.advance(place) {
            return;
        }
        let members = self.lists.intern(members.iter().copied());
        let rules = self.rules();
        self.lists.with(conversation, |_, state| {
            state.created(members, appended_at_ms, now_ms, rules);
        });
        drop(marks);
        self.ring();
    }

    /// A membership event: applied, ignored if the list has it already, or the list is dropped if
    /// that cannot be told. `place` is `None` if another node handed it over.
    pub fn changed(
        &self,
        conversation: &str,
        user: &str,
        added: bool,
        place: Option<LogPosition>,
        appended_at_ms: u64,
    ) {
        let mut marks = self.marks.lock().expect("no holder panics");
        if place.is_some_and(|place| !marks.advance(place)) {
            return;
        }
        for watcher in &*self.watchers.read().expect("no holder panics") {
            watcher.changed(user);
        }
        let user = self.lists.intern_one(user);
        let change = Change { user, added, place, appended_at_ms };
        let rules = self.rules();
        let dropped = self.lists.with_existing(conversation, |state| state.change(change, rules));
        if dropped == Some(true) {
            self.counters.invalidations.add(1);
        }
    }

    fn ring(&self) {
        for bell in &*self.bells.read().expect("no holder panics") {
            bell.ring();
        }
    }
}

fn found(state: &State, at: Option<LogPosition>) -> Option<Lookup> {
    state.members(at).map(Lookup::Members)
}

#[cfg(test)]
mod tests;
