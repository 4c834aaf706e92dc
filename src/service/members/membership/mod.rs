//! The membership cache: every member list is either complete or unknown.
//!
//! All routers of the node share it. Every change reaches this cache, because the follower
//! (`kafka::follower`) reads the membership topics on every node, whichever node delivers their records.
//! A router that reads a change before the follower applies it too, so that its next record is routed
//! correctly.
//!
//! # The order of changes
//!
//! Positions in the log decide, never clocks: a producer's timestamp says nothing about what a list contains.
//!
//! 1. **Changes are applied in the order of their partition**, each once, whoever reads them first; the last
//!    one of each user wins (`changes`). A change that was read late takes its place before those that are
//!    already known.
//! 2. **An answer of the conversation service contains every change that was published before the request**,
//!    because the service stores a change before it publishes it. So the changes that are read from the
//!    request on are applied to the answer. This is idempotent: a change names the user and whether they are
//!    a member.
//! 3. **A replica may lag.** So the changes that this node has read within `REPLICA_LAG_MAX` before the
//!    request are applied to the answer again. If the answer is newer than the log, the log brings the newer
//!    change again: a list may be behind the service for a moment, never behind the log that was read.
//! 4. **A creation event is the complete list at its position.** The changes after it are applied. It is
//!    ignored if the list is known, because the record can be in the log twice.
//! 5. **A record is routed when every change before it in its partition was read** (`reading`), by the list
//!    as of its position: the follower may be ahead, or the list may have come after the changes behind the
//!    record. Those are undone: who joined later was no member, and who left later was one. What the list
//!    says does not count for that, because an answer may be newer than the log.
//! 6. **A change that another node has handed over has no position.** If the list does not agree with it, the
//!    list is dropped and requested again. What this node has read itself still counts (3).

mod cache;
mod changes;
mod creations;
mod reading;
mod state;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use crate::counters;
use crate::domain::members::Members;
use crate::handoff::Doorbell;
use crate::service::backends::ports::{
    ConversationSource, MembershipChanges, NOT_FOUND_RETRY, NeighbourError,
};
use crate::service::members::membership::cache::{MemberLists, ReadChange};
use crate::service::members::membership::creations::RecentCreations;
use crate::service::members::membership::reading::ReadPositions;
use crate::service::members::membership::state::{AnswerOutcome, ListState};
use crate::service::runtime::backoff::Backoff;
use crate::service::runtime::clock::steady_ms;

pub use crate::service::members::membership::cache::CHANGES_BYTES_MAX;
pub use crate::service::members::membership::changes::{RecordPosition, RequestTime};

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
    /// Requests in flight at a time. At most half of them repeat a failed one, so that conversations whose members
    /// cannot be fetched do not hold up the others.
    pub fetches_max: usize,
    /// Delays after failed requests.
    pub backoff: Backoff,
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
        }
    }
}

counters! {
    /// Metrics of the membership cache.
    pub struct MembershipCounters of SharedCounter {
        Gauge conversations: "Conversations in the membership cache.",
        Gauge members: "Members in the membership cache, summed over its conversations.",
        Counter evictions: "Member lists evicted to stay within the bounds of the cache.",
        Counter invalidations: "Member lists dropped because another node handed over a change whose order is not known.",
        Counter waits_for_follower: "Look-ups for records that this node has read before the changes that come before them.",
        Counter fetches: "Requests to the conversation service for the members of a conversation.",
        Counter fetches_repeated: "Requests repeated because their answer could not be reconciled with what was read during them, or because the conversation was not found.",
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

/// Who has read a membership event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadBy {
    /// The follower, which reads every partition of the membership topics on every node.
    Follower(RecordPosition),
    /// A router, as it routes the record.
    Router(RecordPosition),
    /// Another node, which has handed it over.
    OtherNode,
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
    reading: ReadPositions,
    /// A router waits for the follower.
    is_awaited: AtomicBool,
    following: AtomicBool,
    fetches: AtomicUsize,
    /// Those of them that repeat a failed one.
    retries: AtomicUsize,
    fetch_ids: AtomicU64,
    creations: Mutex<RecentCreations>,
    arrivals: AtomicU64,
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
            reading: ReadPositions::default(),
            is_awaited: AtomicBool::new(false),
            following: AtomicBool::new(false),
            fetches: AtomicUsize::new(0),
            retries: AtomicUsize::new(0),
            fetch_ids: AtomicU64::new(0),
            creations: Mutex::default(),
            arrivals: AtomicU64::new(0),
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

    /// States that the follower reads a partition of the membership topics from `position` on. Every answer
    /// from now on includes the changes before it.
    pub fn follow_from(&self, position: RecordPosition) {
        self.reading.follow_from(position);
    }

    /// States that the follower has read the record at this position, and has applied its change, if it is
    /// one.
    pub fn followed(&self, position: RecordPosition) {
        self.reading.followed(position);
        if self.is_awaited.load(Ordering::Relaxed) && self.is_awaited.swap(false, Ordering::AcqRel)
        {
            self.ring();
        }
    }

    /// States that a router reads a partition from `position` on.
    pub fn lane_starts(&self, position: RecordPosition) {
        self.reading.lane_starts(position);
    }

    /// States that every change reaches this cache from now on, and so allows requests. The answer to an
    /// earlier request could miss a change that is never applied.
    pub fn follow(&self) {
        self.following.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether every change reaches this cache.
    pub(in crate::service::members) fn is_following(&self) -> bool {
        self.following.load(Ordering::Acquire)
    }

    /// Drops all lists, because changes were missed (retention, truncation). Nothing is cached until
    /// [`Membership::follow`].
    pub fn clear(&self) {
        self.following.store(false, Ordering::Release);
        self.reading.clear();
        self.lists.clear();
    }

    /// Whether a conversation service is configured.
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    /// The members of a conversation. An unknown list is fetched, with one request for all callers. `at`
    /// is the position of the record being routed, if it is from a partition: later changes in that
    /// partition, which the follower may have read already, do not apply to it; earlier ones that nobody has
    /// read yet are waited for.
    pub fn lookup(
        self: &Arc<Self>,
        conversation: &str,
        at: Option<RecordPosition>,
        now_ms: u64,
    ) -> Lookup {
        if let Some(at) = at
            && !self.is_covered(at)
        {
            self.counters.waits_for_follower.add(1);
            return Lookup::Pending;
        }
        if let Some(members) = self.lists.members(conversation, at, now_ms) {
            return Lookup::Members(members);
        }
        if !self.following.load(Ordering::Acquire) {
            return Lookup::Pending;
        }
        if self.source.is_none() {
            return Lookup::Unknown;
        }
        match self.fetch_if_due(conversation, now_ms) {
            Lookup::Pending => {
                let expired = self.lists.expired(conversation, at);
                expired.map_or(Lookup::Pending, Lookup::Members)
            }
            found => found,
        }
    }

    fn is_covered(&self, at: RecordPosition) -> bool {
        if self.reading.is_covered(at) {
            return true;
        }
        self.is_awaited.store(true, Ordering::SeqCst);
        // The follower may have read it in between, without ringing.
        self.reading.is_covered(at)
    }

    /// Requests the list, unless a request is in flight. `Pending`: an expired list may be used meanwhile.
    fn fetch_if_due(self: &Arc<Self>, conversation: &str, now_ms: u64) -> Lookup {
        self.lists.with(conversation, |key, state, asked| {
            match state {
                ListState::Fetching(_) => return Lookup::Pending,
                ListState::Failing { retry_at_ms, .. } if now_ms < *retry_at_ms => {
                    return Lookup::Failing { retry_at_ms: *retry_at_ms };
                }
                ListState::Absent { until_ms } if now_ms < *until_ms => return Lookup::Absent,
                // It arrived meanwhile.
                ListState::Known(known) if self.lists.is_current(known, now_ms) => {
                    return Lookup::Pending;
                }
                ListState::Unknown
                | ListState::Failing { .. }
                | ListState::Absent { .. }
                | ListState::Known(_) => {}
            }
            let is_retry = matches!(state, ListState::Failing { .. });
            if !self.take_slot(is_retry) {
                return Lookup::Pending;
            }
            let id = self.fetch_ids.fetch_add(1, Ordering::Relaxed);
            state.start_fetch(id, asked);
            self.runtime.spawn(Arc::clone(self).fetch(Arc::clone(key), id, is_retry));
            Lookup::Pending
        })
    }

    /// Returns false if as many requests are in flight as may be.
    fn take_slot(&self, is_retry: bool) -> bool {
        let take = |slots: &AtomicUsize, max: usize| {
            let taken = slots.fetch_add(1, Ordering::Relaxed) < max;
            if !taken {
                slots.fetch_sub(1, Ordering::Relaxed);
            }
            taken
        };
        if is_retry && !take(&self.retries, (self.config.fetches_max / 2).max(1)) {
            return false;
        }
        let taken = take(&self.fetches, self.config.fetches_max);
        if taken {
            self.counters.fetches_under_way.add(1);
        } else if is_retry {
            self.retries.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn free_slot(&self, is_retry: bool) {
        if is_retry {
            self.retries.fetch_sub(1, Ordering::Relaxed);
        }
        self.fetches.fetch_sub(1, Ordering::Relaxed);
        self.counters.fetches_under_way.sub(1);
    }

    /// Requests the members until an answer is certain to be current.
    async fn fetch(self: Arc<Self>, key: Arc<str>, id: u64, is_retry: bool) {
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
                self.counters.fetches_repeated.add(1);
                tokio::time::sleep(NOT_FOUND_RETRY).await;
                continue;
            }
            if self.handle_answer(&key, id, answer) != AnswerOutcome::Repeat {
                break;
            }
            self.counters.fetches_repeated.add(1);
        }
        self.free_slot(is_retry);
        self.ring();
    }

    fn handle_answer(
        &self,
        key: &Arc<str>,
        id: u64,
        answer: Result<Members, NeighbourError>,
    ) -> AnswerOutcome {
        let now_ms = steady_ms();
        match answer {
            Ok(members) => {
                let time = (Instant::now(), now_ms);
                self.lists.change(key, |hash, part| part.answered((hash, key), id, &members, time))
            }
            // Its records are older than its end: they go to those who were members then.
            Err(NeighbourError::NotFound)
                if self.lists.change(key, |_, part| part.has_changes(key)) =>
            {
                let (nobody, time) = (Members::default(), (Instant::now(), now_ms));
                self.lists.change(key, |hash, part| part.answered((hash, key), id, &nobody, time))
            }
            Err(NeighbourError::NotFound) => {
                self.counters.conversations_absent.add(1);
                self.lists.with(key, |_, state, _| state.absent(id, now_ms + ABSENT_MS));
                AnswerOutcome::Finished
            }
            Err(
                reason @ (NeighbourError::Denied(_)
                | NeighbourError::Invalid(_)
                | NeighbourError::Unsupported(_)
                | NeighbourError::TooLarge(_)
                | NeighbourError::Unavailable(_)),
            ) => {
                self.counters.fetches_failed.add(1);
                let pause = |failures: u32| {
                    let pause = self.config.backoff.random_delay(failures.saturating_sub(1));
                    pause.as_micros().div_ceil(1_000) as u64
                };
                self.lists.with(key, |_, state, _| state.failed(id, now_ms, pause));
                tracing::debug!(conversation = %key, %reason, "cannot fetch members");
                AnswerOutcome::Finished
            }
        }
    }

    /// A creation event with the complete list.
    pub fn created(&self, conversation: &str, members: &[&str], by: ReadBy, now_ms: u64) {
        let position = match by {
            ReadBy::Follower(position) => position,
            ReadBy::Router(position) if !self.reading.is_followed(position) => position,
            // The follower has applied it, or will.
            ReadBy::Router(_) | ReadBy::OtherNode => return,
        };
        let members: Members = members.iter().collect();
        let must_be_first = self.has_source();
        let applied = self.lists.change(conversation, |hash, part| {
            part.created((hash, conversation), &members, position, must_be_first, now_ms)
        });
        if applied {
            let (id, now) = (Arc::from(conversation), Instant::now());
            self.creations().insert(id, members.clone(), now);
            self.ring();
        }
        let watchers = self.watchers.read().expect("no holder panics");
        if !watchers.is_empty()
            // Not that of a repeated event, which may be outdated.
            && let Some(members) = self.lists.expired(conversation, None)
        {
            watchers.iter().for_each(|watcher| watcher.created(conversation, &members));
        }
    }

    /// A membership event. One without a user changes nothing.
    pub fn changed(&self, conversation: &str, user: &str, added: bool, by: ReadBy) {
        if user.is_empty() {
            return;
        }
        let position = match by {
            ReadBy::Follower(position) => position,
            ReadBy::Router(position) if !self.reading.is_followed(position) => position,
            // The follower has applied it.
            ReadBy::Router(_) => return,
            ReadBy::OtherNode => {
                self.tell(conversation, user, added);
                // It is in the log too. Without a conversation service, there is nobody to ask.
                if self.has_source()
                    && self.lists.change(conversation, |hash, part| {
                        part.heard((hash, conversation), user, added)
                    })
                {
                    self.counters.invalidations.add(1);
                }
                return;
            }
        };
        let change = ReadChange { conversation, user, added, position };
        let is_new = self
            .lists
            .change(conversation, |hash, part| part.changed(hash, change, Instant::now()));
        if is_new {
            self.tell(conversation, user, added);
        }
    }

    /// Notifies the watchers that the user joined or left the conversation.
    fn tell(&self, conversation: &str, user: &str, added: bool) {
        let watchers = self.watchers.read().expect("no holder panics");
        if watchers.is_empty() {
            return;
        }
        let members = self.lists.expired(conversation, None);
        for watcher in &*watchers {
            watcher.changed(conversation, user, added, members.as_ref());
        }
    }

    /// The time of a request for the members of a conversation, to be made now. See [`Membership::corrected`].
    pub fn asked(&self, conversation: &str) -> RequestTime {
        self.lists.asked(conversation)
    }

    /// An answer of the conversation service with the changes that it may not contain. `None`: they are not
    /// known any more, because too many were read since the request.
    pub fn corrected(
        &self,
        conversation: &str,
        answer: &Members,
        asked: RequestTime,
    ) -> Option<Members> {
        self.lists.corrected(conversation, answer, asked)
    }

    /// The newest list of a conversation, if it is known.
    pub fn known(&self, conversation: &str) -> Option<Members> {
        self.lists.expired(conversation, None)
    }

    /// The conversations that this user joined or left since a request at this time, or so shortly before it that
    /// a replica of the conversation service may not know it yet, and whether the user is a member now.
    pub fn lately(&self, user: &str, asked_at: Instant) -> HashMap<Arc<str>, bool> {
        let mut lately: HashMap<_, _> = self.creations().of_user(user, asked_at).collect();
        self.lists.changes_of(user, asked_at, |conversation, added| {
            lately.insert(conversation, added);
        });
        lately
    }

    /// Whether this user may have joined or left any conversation since the follower began to read. Then the list of a
    /// record that this node has not routed itself is not certain to be that of its time: its topic and that of the
    /// change have no common order.
    pub fn may_have_changed(&self, user: &str) -> bool {
        self.lists.may_have_changed(user)
    }

    fn creations(&self) -> MutexGuard<'_, RecentCreations> {
        self.creations.lock().expect("no holder panics")
    }

    /// How often a list has arrived, or something else that a waiting record may have waited for.
    pub fn arrivals(&self) -> u64 {
        self.arrivals.load(Ordering::Acquire)
    }

    /// States that something has arrived that a record or a returning session may have waited for.
    pub(in crate::service::members) fn ring(&self) {
        self.arrivals.fetch_add(1, Ordering::AcqRel);
        for bell in &*self.bells.read().expect("no holder panics") {
            bell.ring();
        }
    }
}

#[cfg(test)]
mod history;
#[cfg(test)]
mod tests;
