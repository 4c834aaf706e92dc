//! The member list of one conversation: a pure state machine.
//!
//! ```text
//!            lookup                     answer
//! Unknown ──────────► Fetching ─────────────────────► Known ──┐ change that is newer than
//!    ▲                 │  ▲  │ failed      lifetime    │  ▲   │ the list: applied
//!    │                 │  │  │ ◄───────────────────────┤  └───┘
//!    │                 │  │  └──► Failing ──┐          │
//!    │                 │  └─────────────────┘ lookup   │
//!    │                 └─► Absent (the conversation does not exist)
//!    └──────────────────────────────── change that may or may not be in the list
//! ```
//!
//! **Why a list is never behind the log.** A change is applied when this node reads it for the first
//! time ([`Watermarks`]). A later request includes it, because the service stores a change before it
//! publishes it. So an answer includes every change published before the request, and none made after
//! the answer. A change appended between the two, or within the clock difference of either, may or may
//! not be included: the list is dropped and fetched again. A change that arrives during a request makes
//! the answer doubtful in the same way, so the request is repeated. If a conversation changes faster
//! than it can be fetched, then after [`FETCH_ROUNDS_MAX`] requests the changes are applied to the last
//! answer, and from then on only changes from the log are applied.

use std::collections::HashMap;
use std::sync::Arc;

use crate::domain::members::Members;
use crate::service::runtime::cache::Weigh;

/// How many requests are made while changes arrive during each of them.
pub(super) const FETCH_ROUNDS_MAX: u8 = 3;
/// Changes kept during a request. Beyond that the answer is discarded.
const CHANGES_MAX: usize = 256;

/// Recent changes kept with a list, for earlier records; the oldest is removed first.
const RECENT_MAX: usize = 16;

/// Position of a record in Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPosition {
    /// Index of the topic among the topics of this node.
    pub topic: u16,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

impl LogPosition {
    /// Whether this is later than `other` in the same partition. Partitions have no common order.
    fn is_after(self, other: LogPosition) -> bool {
        (self.topic, self.partition) == (other.topic, other.partition) && self.offset > other.offset
    }
}

/// The next unread offset of each partition on this node. The follower and the routers read the same
/// partitions; the first reader of a record counts.
#[derive(Debug, Default)]
pub(super) struct Watermarks(HashMap<(u16, i32), i64>);

impl Watermarks {
    /// Marks a position as read. Returns whether it is read for the first time.
    pub(super) fn advance(&mut self, position: LogPosition) -> bool {
        let next = self.0.entry((position.topic, position.partition)).or_insert(0);
        let first = position.offset >= *next;
        *next = position.offset.saturating_add(1).max(*next);
        first
    }
}

/// One user joined or left.
#[derive(Clone, Debug)]
pub(super) struct MemberChange {
    pub(super) user: Arc<str>,
    /// `true`: joined; `false`: left.
    pub(super) added: bool,
    /// Its position in the log. `None`: another node handed it off, so its order is unknown.
    pub(super) position: Option<LogPosition>,
    /// Time of its append, Unix time in ms.
    pub(super) appended_at_ms: u64,
}

/// What a list is based on.
#[derive(Clone, Copy, Debug)]
enum Basis {
    /// The log: a creation event, or an answer to which changes were applied; and each later change.
    Log,
    /// An answer of the conversation service, and each later change. Unix time, ms.
    Answer { asked_at_ms: u64, answered_at_ms: u64 },
}

/// What is known about the members of one conversation.
#[derive(Debug)]
pub(super) enum ListState {
    Unknown,
    /// Boxed, because few lists are fetched at a time, and this keeps the other states small.
    Fetching(Box<Fetching>),
    Failing {
        retry_at_ms: u64,
        failures: u32,
    },
    Absent {
        until_ms: u64,
    },
    Known(KnownList),
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Fetching {
    id: u64,
    asked_at_ms: u64,
    round: u8,
    /// Changes that arrived during the request.
    changes: Vec<MemberChange>,
    /// Failed requests in a row before this one.
    failures: u32,
    /// The list whose lifetime ended. It is still complete, so it is used until the answer arrives, and
    /// longer if the request fails.
    expired: Option<KnownList>,
}

/// A complete member list.
#[derive(Debug)]
pub(super) struct KnownList {
    members: Members,
    basis: Basis,
    /// Start of its lifetime, Unix time in ms.
    pub(super) since_ms: u64,
    /// The last changes that changed the list, in the order of the log. A router may still be at records
    /// before them.
    recent: Vec<(LogPosition, MemberChange)>,
}

/// The node's rules for reconciling answers and changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReconcileRules {
    /// Largest difference between the clocks of this node and of the publishers (or brokers), ms.
    pub(super) clock_skew_ms: u64,
    /// Whether a conversation service is configured.
    pub(super) has_source: bool,
}

/// Result of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AnswerOutcome {
    /// The request is finished.
    Finished,
    /// Repeat the request, because changes arrived during it.
    Repeat,
    /// The answer is not expected any more.
    Stale,
}

impl Weigh for ListState {
    /// Number of members held, which the cache bounds.
    fn weight(&self) -> usize {
        match self {
            Self::Known(known) => known.members.len(),
            Self::Fetching(fetching) => {
                fetching.expired.as_ref().map_or(0, |known| known.members.len())
            }
            Self::Unknown | Self::Failing { .. } | Self::Absent { .. } => 0,
        }
    }

    /// The number of fetches at a time is bounded.
    fn is_pinned(&self) -> bool {
        matches!(self, Self::Fetching(_))
    }
}

impl ListState {
    /// The list to use: up to date with the log as far as it was read, or as of the position `at`.
    pub(super) fn members(&self, at: Option<LogPosition>) -> Option<Members> {
        match self {
            Self::Known(known) => Some(known.members(at)),
            Self::Fetching(fetching) => fetching.expired.as_ref().map(|known| known.members(at)),
            Self::Unknown | Self::Failing { .. } | Self::Absent { .. } => None,
        }
    }

    /// Starts request `id`.
    pub(super) fn start_fetch(&mut self, id: u64, now_ms: u64) {
        let (failures, expired) = match std::mem::replace(self, Self::Unknown) {
            Self::Known(known) => (0, Some(known)),
            Self::Failing { failures, .. } => (failures, None),
            Self::Unknown | Self::Absent { .. } => (0, None),
            Self::Fetching(_) => unreachable!("one request at a time"),
        };
        *self = Self::Fetching(Box::new(Fetching {
            id,
            asked_at_ms: now_ms,
            round: 1,
            changes: Vec::new(),
            failures,
            expired,
        }));
    }

    /// Applies a creation event, which has the complete list.
    pub(super) fn created(
        &mut self,
        members: Members,
        at_ms: u64,
        now_ms: u64,
        rules: ReconcileRules,
    ) {
        // An old creation event may be outdated by changes that this node has not read yet. A request
        // to the service gives the current list.
        if rules.has_source && at_ms.saturating_add(rules.clock_skew_ms) < now_ms {
            return;
        }
        // An answer is at least as new as the creation event.
        if matches!(self, Self::Known(KnownList { basis: Basis::Answer { .. }, .. })) {
            return;
        }
        *self = Self::Known(KnownList::new(members, Basis::Log, now_ms));
    }

    /// Applies a change. Returns whether the list was dropped because of it.
    pub(super) fn change(&mut self, change: MemberChange, rules: ReconcileRules) -> bool {
        match self {
            Self::Unknown | Self::Failing { .. } => false,
            // The conversation exists after all. The next look-up requests it.
            Self::Absent { .. } => {
                *self = Self::Unknown;
                false
            }
            Self::Fetching(fetching) => {
                let expired = fetching.expired.as_mut();
                let dropped = expired.is_some_and(|known| known.change(&change, rules));
                if dropped {
                    fetching.expired = None;
                }
                // One change more than the maximum marks the overflow.
                if fetching.changes.len() <= CHANGES_MAX {
                    fetching.changes.push(change);
                }
                dropped
            }
            Self::Known(known) => {
                let dropped = known.change(&change, rules);
                if dropped {
                    *self = Self::Unknown;
                }
                dropped
            }
        }
    }

    /// Handles the answer to request `id`.
    pub(super) fn answered(
        &mut self,
        id: u64,
        members: Members,
        now_ms: u64,
        rules: ReconcileRules,
    ) -> AnswerOutcome {
        let Some(fetching) = self.request(id) else { return AnswerOutcome::Stale };
        let asked_at_ms = fetching.asked_at_ms;
        let changes = &mut fetching.changes;
        let doubtful = changes.iter().any(|change| {
            change.position.is_none()
                || change.appended_at_ms.saturating_add(rules.clock_skew_ms) >= asked_at_ms
        });
        if doubtful && fetching.round < FETCH_ROUNDS_MAX {
            fetching.round += 1;
            fetching.asked_at_ms = now_ms;
            changes.clear();
            return AnswerOutcome::Repeat;
        }
        if !doubtful {
            let basis = Basis::Answer { asked_at_ms, answered_at_ms: now_ms };
            *self = Self::Known(KnownList::new(members, basis, now_ms));
            return AnswerOutcome::Finished;
        }
        if changes.len() > CHANGES_MAX || changes.iter().any(|change| change.position.is_none()) {
            let failures = fetching.failures + 1;
            *self = Self::Failing { retry_at_ms: now_ms, failures };
            return AnswerOutcome::Finished;
        }
        // All changes are applied in order, also those that the answer certainly includes, because an
        // earlier one may be missing. If this undoes a newer change, the log brings that change again.
        let members = changes
            .iter()
            .fold(members, |members, change| members.changed(&change.user, change.added));
        *self = Self::Known(KnownList::new(members, Basis::Log, now_ms));
        AnswerOutcome::Finished
    }

    /// Handles the failure of request `id`. An expired list is kept for another lifetime.
    pub(super) fn failed(&mut self, id: u64, now_ms: u64, pause_ms: impl FnOnce(u32) -> u64) {
        let Some(fetching) = self.request(id) else { return };
        let failures = fetching.failures + 1;
        *self = match fetching.expired.take() {
            Some(known) => Self::Known(KnownList { since_ms: now_ms, ..known }),
            None => Self::Failing { retry_at_ms: now_ms + pause_ms(failures), failures },
        };
    }

    /// Handles the answer that the conversation does not exist.
    pub(super) fn absent(&mut self, id: u64, until_ms: u64) {
        let Some(fetching) = self.request(id) else { return };
        // It changed during the request, so it exists now.
        let exists = !fetching.changes.is_empty();
        *self = if exists { Self::Unknown } else { Self::Absent { until_ms } };
    }

    /// Request `id`, if its answer is still expected.
    fn request(&mut self, id: u64) -> Option<&mut Fetching> {
        match self {
            Self::Fetching(fetching) if fetching.id == id => Some(fetching),
            _ => None,
        }
    }
}

/// Whether a change is in a list.
enum Inclusion {
    /// The change is newer than the list.
    Newer,
    /// The list includes the change.
    Included,
    Unknown,
}

impl KnownList {
    fn new(members: Members, basis: Basis, since_ms: u64) -> Self {
        Self { members, basis, since_ms, recent: Vec::new() }
    }

    /// The newest list, or the list as of the position `at`: with users who left later in its partition,
    /// and without users who joined later.
    pub(super) fn members(&self, at: Option<LogPosition>) -> Members {
        let later = self
            .recent
            .iter()
            .rev()
            .take_while(|(position, _)| at.is_some_and(|at| position.is_after(at)));
        later.fold(self.members.clone(), |members, (_, change)| {
            members.changed(&change.user, !change.added)
        })
    }

    /// Applies a change. Returns whether the list has to be dropped.
    fn change(&mut self, change: &MemberChange, rules: ReconcileRules) -> bool {
        match self.inclusion(change, rules) {
            Inclusion::Newer => {
                let members = self.members.changed(&change.user, change.added);
                let differs = !members.is_same(&self.members);
                if let (Some(position), true) = (change.position, differs) {
                    if self.recent.len() == RECENT_MAX {
                        self.recent.remove(0);
                    }
                    self.recent.push((position, change.clone()));
                }
                self.members = members;
                false
            }
            Inclusion::Included => false,
            Inclusion::Unknown => true,
        }
    }

    fn inclusion(&self, change: &MemberChange, rules: ReconcileRules) -> Inclusion {
        if change.position.is_none() {
            // The change is in the log too. With a conversation service, drop the list and fetch it now.
            return if rules.has_source { Inclusion::Unknown } else { Inclusion::Included };
        }
        match self.basis {
            Basis::Log => Inclusion::Newer,
            Basis::Answer { asked_at_ms, answered_at_ms } => {
                let (at, skew) = (change.appended_at_ms, rules.clock_skew_ms);
                if at.saturating_add(skew) < asked_at_ms {
                    Inclusion::Included
                } else if at > answered_at_ms.saturating_add(skew) {
                    Inclusion::Newer
                } else {
                    Inclusion::Unknown
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
