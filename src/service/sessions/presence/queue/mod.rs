//! What presence has yet to be told, newest state only.
//!
//! An entry exists only while something is to be done for its session:
//!
//! ```text
//!   opened, ended, refresh
//!            │
//!            ▼        next            finish: done, and nothing newer is wanted
//!         waiting ─────────► under way ─────────────────────────────────────────► gone
//!            ▲                  │
//!            │ due              │ finish: failed, or something newer is wanted
//!            └──── delayed ◄────┘
//! ```
//!
//! Time and chance are arguments.

mod entry;
mod pace;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};

use tokio::time::Instant;

use self::entry::{DesiredState, EntryState, FollowUp, QueueEntry, RegistrationState};
pub(super) use self::entry::{OperationOutcome, PresenceOperation};
use self::pace::{CallPermit, CircuitBreaker};
use super::visibility::VisibilityNotifier;
use crate::service::members::directory::SessionIds;

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NextOperation {
    Start(SessionIds, PresenceOperation),
    /// Nothing before then.
    NotBefore(Instant),
    Idle,
}

/// How many sessions may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueLimits {
    /// Sessions that have begun or are to be refreshed; the latter take half of it.
    pub(super) sessions_max: usize,
    /// Ends. They have room of their own: a crowd that leaves does not keep the next one from being
    /// registered.
    pub(super) ends_max: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct OperationQueue {
    entries: HashMap<SessionIds, QueueEntry>,
    waiting: VecDeque<SessionIds>,
    delayed: BinaryHeap<Reverse<DelayedRetry>>,
    under_way: usize,
    /// Entries of sessions that have ended.
    ends: usize,
    limits: QueueLimits,
    pace: CircuitBreaker,
    /// Sessions found to be held by another node, until somebody asks.
    replaced: HashSet<SessionIds>,
    closing: bool,
}

impl OperationQueue {
    pub(super) fn new(limits: QueueLimits) -> Self {
        Self {
            entries: HashMap::new(),
            waiting: VecDeque::new(),
            delayed: BinaryHeap::new(),
            under_way: 0,
            ends: 0,
            limits,
            pace: CircuitBreaker::default(),
            replaced: HashSet::new(),
            closing: false,
        }
    }

    /// Sessions for which something is to be done.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Those among them that have not ended.
    fn others(&self) -> usize {
        self.entries.len() - self.ends
    }

    /// Entries change sides, so the whole is bounded too.
    fn has_room(&self) -> bool {
        self.entries.len() < self.limits.sessions_max + self.limits.ends_max
    }

    /// A session has been admitted. `registered`: presence holds it already, from a predecessor on
    /// this node. Returns false if there is no room.
    pub(super) fn opened(&mut self, ids: &SessionIds, registered: bool, now: Instant) -> bool {
        self.replaced.remove(ids);
        let room = self.has_room() && self.others() < self.limits.sessions_max && !self.closing;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                self.ends -= usize::from(entry.want == DesiredState::Offline);
                entry.opened();
                true
            }
            None if !room => false,
            None => {
                let held =
                    if registered { RegistrationState::Unknown } else { RegistrationState::Absent };
                self.insert(ids, QueueEntry::new(DesiredState::Online, held, false, now));
                true
            }
        }
    }

    /// To be kept when the session that was just [opened](OperationQueue::opened) is registered.
    pub(super) fn notifier(&mut self, ids: &SessionIds, notifier: VisibilityNotifier) {
        if let Some(entry) = self.entries.get_mut(ids) {
            if self.pace.is_away() {
                notifier.put_off();
            }
            entry.notifier = Some(notifier);
        }
    }

    /// A session has ended and nobody took its place here. Returns false if there is no room: the
    /// registration will end by itself.
    pub(super) fn ended(&mut self, ids: &SessionIds, now: Instant) -> bool {
        let room = self.has_room() && self.ends < self.limits.ends_max;
        match self.entries.get_mut(ids) {
            Some(entry) => {
                self.ends += usize::from(entry.want == DesiredState::Online);
                entry.want = DesiredState::Offline;
                true
            }
            None if !room => false,
            None => {
                self.insert(
                    ids,
                    QueueEntry::new(DesiredState::Offline, RegistrationState::Present, false, now),
                );
                true
            }
        }
    }

    /// A session is to be refreshed. Refreshes take no more than half of the room. Returns false
    /// if there is none.
    pub(super) fn refresh(&mut self, ids: &SessionIds, check: bool, now: Instant) -> bool {
        let room = self.has_room() && self.others() < self.limits.sessions_max / 2 && !self.closing;
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

    fn insert(&mut self, ids: &SessionIds, entry: QueueEntry) {
        self.ends += usize::from(entry.want == DesiredState::Offline);
        self.entries.insert(ids.clone(), entry);
        self.waiting.push_back(ids.clone());
    }

    /// The next thing to do, if one may be done now. Must be answered with [`OperationQueue::finish`].
    pub(super) fn next(&mut self, now: Instant) -> NextOperation {
        while let Some(Reverse(due)) = self.delayed.peek() {
            if due.at > now {
                break;
            }
            let Some(Reverse(DelayedRetry { ids, .. })) = self.delayed.pop() else { break };
            if let Some(entry) = self.entries.get_mut(&ids) {
                entry.place = EntryState::Waiting;
            }
            self.waiting.push_back(ids);
        }
        while let Some(ids) = self.waiting.front() {
            let Some(entry) = self.entries.get_mut(ids) else {
                self.waiting.pop_front();
                continue;
            };
            let Some(operation) = entry.operation(self.closing, now) else {
                let Some(ids) = self.waiting.pop_front() else { break };
                self.remove(&ids);
                continue;
            };
            match self.pace.leave(self.under_way, now) {
                CallPermit::Go => {}
                CallPermit::AfterOutcome => return NextOperation::Idle,
                CallPermit::At(at) => return NextOperation::NotBefore(at),
            }
            entry.begin();
            self.under_way += 1;
            let Some(ids) = self.waiting.pop_front() else { return NextOperation::Idle };
            return NextOperation::Start(ids, operation);
        }
        self.delayed
            .peek()
            .map_or(NextOperation::Idle, |Reverse(due)| NextOperation::NotBefore(due.at))
    }

    /// Takes the outcome of what [`OperationQueue::next`] gave out. `chance`: 0 to 1.
    pub(super) fn finish(
        &mut self,
        ids: SessionIds,
        operation: PresenceOperation,
        outcome: OperationOutcome,
        chance: f64,
        now: Instant,
    ) {
        self.under_way -= 1;
        self.pace.ended(outcome == OperationOutcome::Failed, chance, now);
        let Some(entry) = self.entries.get_mut(&ids) else {
            debug_assert!(false, "an entry stays while it is under way");
            return;
        };
        match entry.end(operation, outcome, chance, now) {
            FollowUp::Remove => self.remove(&ids),
            FollowUp::RemoveReplaced => {
                self.remove(&ids);
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
            self.ends -= usize::from(entry.want == DesiredState::Offline);
        }
        self.shrink();
    }

    /// The sessions found to be held by another node since the last time.
    pub(super) fn take_replaced(&mut self) -> Vec<SessionIds> {
        self.replaced.drain().collect()
    }

    /// From here on only ends are told, and what failed before is tried once more at once.
    pub(super) fn close(&mut self) {
        self.closing = true;
        for Reverse(DelayedRetry { ids, .. }) in std::mem::take(&mut self.delayed) {
            if let Some(entry) = self.entries.get_mut(&ids) {
                entry.place = EntryState::Waiting;
            }
            self.waiting.push_back(ids);
        }
    }

    /// Ends that presence has not been told of, and what is under way.
    pub(super) fn ends_untold(&self) -> usize {
        self.entries.values().filter(|entry| entry.is_untold()).count()
    }

    /// Whether there are any: asked after each outcome, so it does not count them all.
    pub(super) fn has_ends_untold(&self) -> bool {
        self.entries.values().any(QueueEntry::is_untold)
    }

    /// Gives back what a storm took.
    fn shrink(&mut self) {
        if self.entries.capacity() > 1024 && self.entries.len() < self.entries.capacity() / 8 {
            self.entries.shrink_to(self.entries.len() * 2);
            self.waiting.shrink_to(self.waiting.len() * 2);
            self.delayed.shrink_to(self.delayed.len() * 2);
        }
    }
}

#[derive(Debug)]
struct DelayedRetry {
    at: Instant,
    ids: SessionIds,
}

impl PartialEq for DelayedRetry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for DelayedRetry {}

impl PartialOrd for DelayedRetry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for DelayedRetry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}
