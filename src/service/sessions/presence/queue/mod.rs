//! The operations that presence still has to carry out, newest state only.
//!
//! An entry exists only while there is something to do for its session:
//!
//! ```text
//!   register, unregister, refresh
//!            │
//!            ▼        next            complete: done, and the desired state is reached
//!         waiting ─────────► in flight ───────────────────────────────────────────► removed
//!            ▲                  │
//!            │ due              │ complete: failed, or the desired state has changed
//!            └──── delayed ◄────┘
//! ```
//!
//! Time and randomness are arguments.

mod circuit_breaker;
mod entry;

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};

use tokio::time::Instant;

use self::circuit_breaker::{CallPermit, CircuitBreaker};
use self::entry::{DesiredState, EntryState, FollowUp, QueueEntry, RegistrationState};
pub(super) use self::entry::{FenceStanding, OperationOutcome, PresenceOperation};
use super::visibility::VisibilityNotifier;
use crate::service::backends::redis::Fence;
use crate::service::members::directory::SessionIds;

/// The next step of the task that carries operations out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NextOperation {
    Start(SessionIds, PresenceOperation),
    /// Nothing can start before then.
    NotBefore(Instant),
    /// Nothing can start before an outcome or a new request.
    Idle,
}

/// How many sessions may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueLimits {
    /// Registrations and refreshes; refreshes take at most half of it.
    pub(super) sessions_max: usize,
    /// Unregistrations. They have their own room, so that many sessions that end at once do not
    /// delay the registration of new ones.
    pub(super) ends_max: usize,
}

/// Pending operations, at most one per session.
#[derive(Debug)]
pub(super) struct OperationQueue {
    entries: HashMap<SessionIds, QueueEntry>,
    waiting: VecDeque<SessionIds>,
    delayed: BinaryHeap<Reverse<DelayedRetry>>,
    in_flight: usize,
    /// Entries whose desired state is offline.
    ends: usize,
    limits: QueueLimits,
    breaker: CircuitBreaker,
    /// Sessions found to be registered with another node, until they are taken.
    replaced: HashSet<SessionIds>,
    /// Live sessions that other nodes could not find for a time, until they are taken. `None`: other
    /// nodes do not look for them.
    lapsed: Option<HashSet<SessionIds>>,
    /// The numbers of the sessions that are registered and have no entry (`PRESENCE_MODE=redis`).
    fences: HashMap<SessionIds, Fence>,
    shutting_down: bool,
}

impl OperationQueue {
    pub(super) fn new(limits: QueueLimits) -> Self {
        Self {
            entries: HashMap::new(),
            waiting: VecDeque::new(),
            delayed: BinaryHeap::new(),
            in_flight: 0,
            ends: 0,
            limits,
            breaker: CircuitBreaker::default(),
            replaced: HashSet::new(),
            lapsed: None,
            fences: HashMap::new(),
            shutting_down: false,
        }
    }

    /// Other nodes look for the sessions: those that they could not find are noted from now on.
    pub(super) fn note_lapses(&mut self) {
        self.lapsed = Some(HashSet::new());
    }

    /// Sessions with a pending operation.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Entries whose desired state is online.
    fn online(&self) -> usize {
        self.entries.len() - self.ends
    }

    /// Entries change from one kind to the other, so the total is bounded too.
    fn has_room(&self) -> bool {
        self.entries.len() < self.limits.sessions_max + self.limits.ends_max
    }

    /// A session was admitted. `registered`: presence may hold a registration already, of its
    /// predecessor on this node. Returns false if there is no room.
    pub(super) fn register(&mut self, ids: &SessionIds, registered: bool, now: Instant) -> bool {
        self.replaced.remove(ids);
        if let Some(lapsed) = &mut self.lapsed {
            lapsed.remove(ids);
        }
        let room =
            self.has_room() && self.online() < self.limits.sessions_max && !self.shutting_down;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                self.ends -= usize::from(entry.desired == DesiredState::Offline);
                entry.register(now);
                true
            }
            None => {
                // The number is its predecessor's, which must not pass for that of the new session.
                let previous = self.fences.remove(ids);
                if room {
                    let registration = if registered {
                        RegistrationState::Unknown
                    } else {
                        RegistrationState::Absent
                    };
                    let mut entry = QueueEntry::new(DesiredState::Online, registration, false, now);
                    entry.standing.previous = previous;
                    self.insert(ids, entry);
                }
                room
            }
        }
    }

    /// There was no room for a session before. Returns false if there still is none.
    pub(super) fn register_again(&mut self, ids: &SessionIds, now: Instant) -> bool {
        // A session found to be replaced must not be registered as a new one before it is closed.
        if self.entries.contains_key(ids) || self.replaced.contains(ids) {
            return true;
        }
        let room =
            self.has_room() && self.online() < self.limits.sessions_max && !self.shutting_down;
        if room {
            let registration = RegistrationState::Unknown;
            let mut entry = QueueEntry::new(DesiredState::Online, registration, false, now);
            // It has been live without a registration.
            entry.lapsed = true;
            self.insert(ids, entry);
        }
        room
    }

    /// Notifies when presence has accepted the registration that was just
    /// [queued](OperationQueue::register).
    pub(super) fn notify_registered(&mut self, ids: &SessionIds, notifier: VisibilityNotifier) {
        if let Some(entry) = self.entries.get_mut(ids) {
            if self.breaker.is_open() {
                notifier.delayed();
            }
            entry.notifier = Some(notifier);
        }
    }

    /// A session has ended without a successor on this node. Returns false if there is no room: the
    /// registration then expires.
    pub(super) fn unregister(&mut self, ids: &SessionIds, now: Instant) -> bool {
        let room = self.has_room() && self.ends < self.limits.ends_max;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                self.ends += usize::from(entry.desired == DesiredState::Online);
                entry.desired = DesiredState::Offline;
                true
            }
            None if !room => {
                self.fences.remove(ids);
                false
            }
            None => {
                self.insert(
                    ids,
                    QueueEntry::new(DesiredState::Offline, RegistrationState::Present, false, now),
                );
                true
            }
        }
    }

    /// A registration is due for a refresh. Refreshes take at most half of the room. Returns false
    /// if there is none.
    pub(super) fn refresh(&mut self, ids: &SessionIds, check: bool, now: Instant) -> bool {
        if self.replaced.contains(ids) {
            return true;
        }
        let room =
            self.has_room() && self.online() < self.limits.sessions_max / 2 && !self.shutting_down;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                entry.check |= check;
                true
            }
            None if !room => false,
            None => {
                self.insert(
                    ids,
                    QueueEntry::new(DesiredState::Online, RegistrationState::Present, check, now),
                );
                true
            }
        }
    }

    fn insert(&mut self, ids: &SessionIds, mut entry: QueueEntry) {
        if let Some(fence) = self.fences.remove(ids) {
            entry.standing.fence = Some(fence);
        }
        self.ends += usize::from(entry.desired == DesiredState::Offline);
        self.entries.insert(ids.clone(), entry);
        self.waiting.push_back(ids.clone());
    }

    /// The next operation, if one may start now. Its outcome goes to [`OperationQueue::complete`].
    pub(super) fn next(&mut self, now: Instant) -> NextOperation {
        while let Some(Reverse(due)) = self.delayed.peek() {
            if due.at > now {
                break;
            }
            let Some(Reverse(DelayedRetry { ids, .. })) = self.delayed.pop() else { break };
            if let Some(entry) = self.entries.get_mut(&ids) {
                entry.state = EntryState::Waiting;
            }
            self.waiting.push_back(ids);
        }
        while let Some(ids) = self.waiting.front() {
            let Some(entry) = self.entries.get_mut(ids) else {
                self.waiting.pop_front();
                continue;
            };
            let Some(operation) = entry.operation(self.shutting_down, now) else {
                let Some(ids) = self.waiting.pop_front() else { break };
                self.remove(&ids);
                continue;
            };
            match self.breaker.permit(self.in_flight, now) {
                CallPermit::Now => {}
                CallPermit::AfterOutcome => return NextOperation::Idle,
                CallPermit::NotBefore(at) => return NextOperation::NotBefore(at),
            }
            entry.begin();
            self.in_flight += 1;
            let Some(ids) = self.waiting.pop_front() else { return NextOperation::Idle };
            return NextOperation::Start(ids, operation);
        }
        self.delayed
            .peek()
            .map_or(NextOperation::Idle, |Reverse(due)| NextOperation::NotBefore(due.at))
    }

    /// What orders the session of an entry.
    pub(super) fn standing(&self, ids: &SessionIds, now: Instant) -> FenceStanding {
        self.entries.get(ids).map_or_else(|| FenceStanding::new(now), |entry| entry.standing)
    }

    /// An operation in flight has drawn a number for its session.
    pub(super) fn drawn(&mut self, ids: &SessionIds, fence: Fence) {
        if let Some(entry) = self.entries.get_mut(ids) {
            entry.drawn(fence);
        }
    }

    /// Takes the outcome of an operation that [`OperationQueue::next`] returned. `chance`: 0 to 1.
    pub(super) fn complete(
        &mut self,
        ids: SessionIds,
        operation: PresenceOperation,
        outcome: OperationOutcome,
        chance: f64,
        now: Instant,
    ) {
        self.in_flight -= 1;
        self.breaker.record(outcome == OperationOutcome::Failed, chance, now);
        let Some(entry) = self.entries.get_mut(&ids) else {
            debug_assert!(false, "an entry stays while its call is in flight");
            return;
        };
        let follow_up = entry.complete(operation, outcome, chance, now);
        let is_registered = entry.registration == RegistrationState::Present;
        if entry.lapsed && is_registered && entry.desired == DesiredState::Online {
            entry.lapsed = false;
            if let Some(lapsed) = &mut self.lapsed {
                lapsed.insert(ids.clone());
            }
        }
        match follow_up {
            FollowUp::Remove => self.remove(&ids),
            FollowUp::RemoveReplaced => {
                self.remove(&ids);
                self.fences.remove(&ids);
                self.replaced.insert(ids);
            }
            FollowUp::Requeue => self.waiting.push_back(ids),
            FollowUp::Retry(wait) => {
                self.delayed.push(Reverse(DelayedRetry { at: now + wait, ids }))
            }
        }
    }

    fn remove(&mut self, ids: &SessionIds) {
        if let Some(entry) = self.entries.remove(ids) {
            self.ends -= usize::from(entry.desired == DesiredState::Offline);
            if let (DesiredState::Online, Some(fence)) = (entry.desired, entry.standing.fence) {
                self.fences.insert(ids.clone(), fence);
            }
        }
        self.shrink();
    }

    /// The sessions found to be registered with another node since the last call.
    pub(super) fn take_replaced(&mut self) -> Vec<SessionIds> {
        self.replaced.drain().collect()
    }

    /// The sessions that are registered again since the last call, after other nodes could not find them.
    pub(super) fn take_lapsed(&mut self) -> Vec<SessionIds> {
        self.lapsed.as_mut().map(|lapsed| lapsed.drain().collect()).unwrap_or_default()
    }

    /// From now on only unregistrations are carried out, and failed ones are retried at once.
    pub(super) fn shut_down(&mut self) {
        self.shutting_down = true;
        for Reverse(DelayedRetry { ids, .. }) in std::mem::take(&mut self.delayed) {
            if let Some(entry) = self.entries.get_mut(&ids) {
                entry.state = EntryState::Waiting;
            }
            self.waiting.push_back(ids);
        }
    }

    /// Unregistrations that are not done, and calls in flight.
    pub(super) fn pending_unregistrations(&self) -> usize {
        self.entries.values().filter(|entry| entry.must_unregister()).count()
    }

    /// Whether [`OperationQueue::pending_unregistrations`] is above 0. Called after each outcome,
    /// so it does not count them all.
    pub(super) fn has_pending_unregistrations(&self) -> bool {
        self.entries.values().any(QueueEntry::must_unregister)
    }

    /// Returns memory after a storm.
    fn shrink(&mut self) {
        if self.entries.capacity() > 1024 && self.entries.len() < self.entries.capacity() / 8 {
            self.entries.shrink_to(self.entries.len() * 2);
            self.waiting.shrink_to(self.waiting.len() * 2);
            self.delayed.shrink_to(self.delayed.len() * 2);
        }
        if self.fences.capacity() > 1024 && self.fences.len() < self.fences.capacity() / 8 {
            self.fences.shrink_to(self.fences.len() * 2);
        }
    }
}

/// Ordered by time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct DelayedRetry {
    at: Instant,
    ids: SessionIds,
}
