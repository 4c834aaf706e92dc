//! The membership cache: every member list is either complete or unknown.
//!
//! All routers of the node share it. Every change reaches this cache, because the follower
//! (`kafka::follower`) reads the membership topics on every node, whichever node delivers their records.
//! A router that reads a change before the follower applies it too, so that its next record is routed
//! correctly. `membership/state` describes how answers and changes are reconciled.

mod cache;
mod state;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use crate::counters;
use crate::domain::members::Members;
use crate::handoff::Doorbell;
use crate::service::backends::ports::{
    ConversationSource, MembershipChanges, NOT_FOUND_RETRY, NeighbourError,
};
use crate::service::events::timestamp::unix_ms;
use crate::service::members::membership::cache::MemberLists;
use crate::service::members::membership::state::{
    AnswerOutcome, ListState, MemberChange, ReconcileRules, Watermarks,
};
use crate::service::runtime::backoff::Backoff;

pub use crate::service::members::membership::state::LogPosition;

/// How long "no such conversation" is cached, ms. Short, because a replica of the service may lag behind
/// the creation event.
const ABSENT_MS: u64 = 2_000;

/// Bounds and times of the membership cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MembershipConfig {
    /// Cached conversations.
    pub conversations_max: usize,
    /// Cached members, summed over all conversations; about 40 bytes each. One conversation may exceed the
    /// share of its part of the cache, and is then alone in it.
    pub members_max: usize,
    /// Lifetime of a list before it is fetched again, ms. Each list's own is up to a quarter shorter, so
    /// that they do not expire together. Without a conversation service lists do not expire.
    pub lifetime_ms: u64,
    /// Deadline of one request to the conversation service, ms.
    pub fetch_deadline_ms: u64,
    /// Requests in flight at a time.
    pub fetches_max: usize,
    /// Delays after failed requests.
    pub backoff: Backoff,
    /// Largest difference between the clocks of this node and of the publishers (or brokers), ms. Too
    /// large a value costs requests; too small a value costs correctness.
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
    /// Metrics of the membership cache.
    pub struct MembershipCounters of SharedCounter {
        Gauge conversations: "Conversations in the membership cache.",
        Gauge members: "Members in the membership cache, summed over its conversations.",
        Counter evictions: "Member lists evicted to stay within the bounds of the cache.",
        Counter invalidations: "Member lists dropped because a change may or may not be in them.",
        Counter fetches: "Requests to the conversation service for the members of a conversation.",
        Counter fetches_repeated: "Requests repeated because changes arrived during them.",
        Counter fetches_failed: "Requests to the conversation service that failed.",
        Gauge fetches_under_way: "Requests to the conversation service in flight.",
        Counter conversations_absent: "Answers of the conversation service that a conversation does not exist.",
    }
}

/// Result of a look-up.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// The complete list.
    Members(Members),
    /// Being fetched. The doorbells ring when the request has ended.
    Pending,
    /// The request failed. The first look-up after `retry_at_ms` repeats it.
    Failing {
        /// Unix time, ms.
        retry_at_ms: u64,
    },
    /// The service reports that the conversation does not exist.
    Absent,
    /// Not known, and no conversation service is configured.
    Unknown,
}

/// The membership cache of a node.
pub struct Membership {
    lists: MemberLists,
    source: Option<Arc<dyn ConversationSource>>,
    runtime: tokio::runtime::Handle,
    config: MembershipConfig,
    counters: Arc<MembershipCounters>,
    bells: RwLock<Vec<Arc<Doorbell>>>,
    watchers: RwLock<Vec<Arc<dyn MembershipChanges>>>,
    /// Held while a change is applied, so that a position marked as read implies that its change is
    /// applied.
    watermarks: Mutex<Watermarks>,
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
    /// An empty cache for the lists of `source`. It makes no request before [`Membership::follow`].
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
            watermarks: Mutex::default(),
            following: AtomicBool::new(false),
            fetches: AtomicUsize::new(0),
            fetch_ids: AtomicU64::new(0),
        })
    }

    /// Notifies `watcher` of every change from now on.
    pub fn watch(&self, watcher: Arc<dyn MembershipChanges>) {
        self.watchers.write().expect("no holder panics").push(watcher);
    }

    /// Rings `bell`, a router's, whenever a list has arrived.
    pub fn wake(&self, bell: Arc<Doorbell>) {
        self.bells.write().expect("no holder panics").push(bell);
    }

    /// States that a partition of the membership topics is read from `position` on. Every answer from now
    /// on includes the changes before it.
    pub fn follow_from(&self, position: LogPosition) {
        let before = LogPosition { offset: position.offset - 1, ..position };
        self.watermarks.lock().expect("no holder panics").advance(before);
    }

    /// States that every change reaches this cache from now on, and so allows requests. The answer to an
    /// earlier request could miss a change that is never applied.
    pub fn follow(&self) {
        self.following.store(true, Ordering::Release);
        self.ring();
    }

    /// Drops all lists, because changes were missed (retention, truncation). Nothing is cached until
    /// [`Membership::follow`].
    pub fn clear(&self) {
        self.following.store(false, Ordering::Release);
        *self.watermarks.lock().expect("no holder panics") = Watermarks::default();
        self.lists.clear();
    }

    /// Whether a conversation service is configured.
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    fn rules(&self) -> ReconcileRules {
        ReconcileRules { clock_skew_ms: self.config.clock_skew_ms, has_source: self.has_source() }
    }

    /// The members of a conversation. An unknown list is fetched, with one request for all callers. `at`
    /// is the position of the record being routed, if it is from a partition: later changes in that
    /// partition, which the follower may have read already, do not apply to it.
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
        self.lists.with(conversation, |key, state| self.fetch_if_due(key, state, at, now_ms))
    }

    fn fetch_if_due(
        self: &Arc<Self>,
        key: &Arc<str>,
        state: &mut ListState,
        at: Option<LogPosition>,
        now_ms: u64,
    ) -> Lookup {
        match state {
            ListState::Unknown => {}
            ListState::Fetching(_) => return found(state, at).unwrap_or(Lookup::Pending),
            ListState::Failing { retry_at_ms, .. } if now_ms < *retry_at_ms => {
                return Lookup::Failing { retry_at_ms: *retry_at_ms };
            }
            ListState::Failing { .. } => {}
            ListState::Absent { until_ms } if now_ms < *until_ms => return Lookup::Absent,
            ListState::Absent { .. } => {}
            ListState::Known(known) if self.lists.is_current(known, now_ms) => {
                return Lookup::Members(known.members(at));
            }
            ListState::Known(_) => {}
        }
        let meanwhile = found(state, at).unwrap_or(Lookup::Pending);
        if self.fetches.fetch_add(1, Ordering::Relaxed) >= self.config.fetches_max {
            self.fetches.fetch_sub(1, Ordering::Relaxed);
            return meanwhile;
        }
        self.counters.fetches_under_way.add(1);
        let id = self.fetch_ids.fetch_add(1, Ordering::Relaxed);
        state.start_fetch(id, now_ms);
        self.runtime.spawn(Arc::clone(self).fetch(Arc::clone(key), id));
        meanwhile
    }

    /// Requests the members until an answer is certain to be current.
    async fn fetch(self: Arc<Self>, key: Arc<str>, id: u64) {
        let source = self.source.as_ref().expect("fetched only with a source");
        let deadline = Duration::from_millis(self.config.fetch_deadline_ms);
        let mut was_found = true;
        loop {
            self.counters.fetches.add(1);
            let answer = tokio::time::timeout(deadline, source.members(Arc::clone(&key)))
                .await
                .unwrap_or_else(|_| Err(NeighbourError::Unavailable("no answer in time".into())));
            if std::mem::replace(&mut was_found, answer != Err(NeighbourError::NotFound))
                && !was_found
            {
                // Replicas lag: only the second such answer counts.
                tokio::time::sleep(NOT_FOUND_RETRY).await;
                continue;
            }
            if self.handle_answer(&key, id, answer) != AnswerOutcome::Repeat {
                break;
            }
            self.counters.fetches_repeated.add(1);
        }
        self.fetches.fetch_sub(1, Ordering::Relaxed);
        self.counters.fetches_under_way.sub(1);
        self.ring();
    }

    fn handle_answer(
        &self,
        key: &Arc<str>,
        id: u64,
        answer: Result<Members, NeighbourError>,
    ) -> AnswerOutcome {
        let now_ms = unix_ms();
        match answer {
            Ok(members) => {
                let rules = self.rules();
                self.lists.with(key, |_, state| state.answered(id, members, now_ms, rules))
            }
            Err(NeighbourError::NotFound) => {
                self.counters.conversations_absent.add(1);
                self.lists.with(key, |_, state| state.absent(id, now_ms + ABSENT_MS));
                AnswerOutcome::Finished
            }
            Err(
                reason @ (NeighbourError::Denied(_)
                | NeighbourError::Invalid(_)
                | NeighbourError::TooLarge(_)
                | NeighbourError::Unavailable(_)),
            ) => {
                self.counters.fetches_failed.add(1);
                let pause = |failures: u32| {
                    let pause = self.config.backoff.random_delay(failures.saturating_sub(1));
                    pause.as_micros().div_ceil(1_000) as u64
                };
                self.lists.with(key, |_, state| state.failed(id, now_ms, pause));
                tracing::debug!(conversation = %key, %reason, "cannot fetch members");
                AnswerOutcome::Finished
            }
        }
    }

    /// A creation event with the complete list.
    pub fn created(
        &self,
        conversation: &str,
        members: &[&str],
        position: LogPosition,
        appended_at_ms: u64,
        now_ms: u64,
    ) {
        let mut watermarks = self.watermarks.lock().expect("no holder panics");
        if !watermarks.advance(position) {
            return;
        }
        let members = members.iter().collect();
        let rules = self.rules();
        self.lists.with(conversation, |_, state| {
            state.created(members, appended_at_ms, now_ms, rules);
        });
        drop(watermarks);
        self.ring();
    }

    /// A membership event. It is applied, or ignored if the list includes it; if that is unknown, the list
    /// is dropped. `position` is `None` if another node handed it off.
    pub fn changed(
        &self,
        conversation: &str,
        user: &str,
        added: bool,
        position: Option<LogPosition>,
        appended_at_ms: u64,
    ) {
        let mut watermarks = self.watermarks.lock().expect("no holder panics");
        if position.is_some_and(|position| !watermarks.advance(position)) {
            return;
        }
        for watcher in &*self.watchers.read().expect("no holder panics") {
            watcher.changed(user);
        }
        let change = MemberChange { user: user.into(), added, position, appended_at_ms };
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

fn found(state: &ListState, at: Option<LogPosition>) -> Option<Lookup> {
    state.members(at).map(Lookup::Members)
}

#[cfg(test)]
mod tests;
