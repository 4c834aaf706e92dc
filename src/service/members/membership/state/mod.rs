//! What is known of one conversation's members: a pure state machine.
//!
//! ```text
//!            lookup                     answer
//! Unknown ──────────► Fetching ─────────────────────► Known ──┐ change known to be newer:
//!    ▲                 │  ▲  │ failed      lifetime    │  ▲   │ applied
//!    │                 │  │  │ ◄───────────────────────┤  └───┘
//!    │                 │  │  └──► Failing ──┐          │
//!    │                 │  └─────────────────┘ lookup   │
//!    │                 └─► Absent (the service knows of no such conversation)
//!    └──────────────────────────────── change that may or may not be in the list
//! ```
//!
//! **Why a list is never behind the log that was read.** Each change counts when it is read for the
//! first time on this node ([`Marks`]): it is applied to whatever is known then, and what is asked
//! for later includes it, because the service publishes a change after it has stored it. For the
//! same reason an answer includes every change that was published before the question, and none
//! that was made after the answer; of one that was appended between the two, or so near to them that
//! clocks cannot tell, it may or may not include: the list is dropped and asked for again. A change
//! that comes while a question is under way makes its answer doubtful in the same way, so the
//! question is asked once more; after [`FETCH_ROUNDS_MAX`] rounds of a conversation that
//! changes faster than it can be asked for, the changes are applied to the last answer, and from there
//! on the log decides.

use std::collections::HashMap;
use std::sync::Arc;

use crate::service::runtime::cache::Weigh;

/// Members of one conversation, sorted, each once.
pub type Members = Arc<[Arc<str>]>;

/// How often a question is repeated because changes arrived while it was under way.
pub(super) const FETCH_ROUNDS_MAX: u8 = 3;
/// Changes remembered while a question is under way. With more than that the answer is not used.
const CHANGES_MAX: usize = 256;

/// Changes remembered with a list, for records that stand before them; the oldest goes first.
const RECENT_MAX: usize = 16;

/// Where in the logs a record stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPosition {
    /// Index of the topic among those that this node reads.
    pub topic: u16,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

impl LogPosition {
    /// Whether this comes later than `other` in the same partition. Between partitions there is no
    /// order.
    fn is_after(self, other: LogPosition) -> bool {
        (self.topic, self.partition) == (other.topic, other.partition) && self.offset > other.offset
    }
}

/// How far each partition has been read on this node, by whichever reader was first.
#[derive(Debug, Default)]
pub(super) struct Marks(HashMap<(u16, i32), i64>);

impl Marks {
    /// Whether this is read for the first time; if so it counts as read from now on.
    pub(super) fn advance(&mut self, place: LogPosition) -> bool {
        let next = self.0.entry((place.topic, place.partition)).or_insert(0);
        let first = place.offset >= *next;
        *next = place.offset.saturating_add(1).max(*next);
        first
    }
}

/// One user joined or left.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Who.
    pub(super) user: Arc<str>,
    /// Joined, or left.
    pub(super) added: bool,
    /// Where it was read from the log, so in its order; `None` if another node handed it over.
    pub(super) place: Option<LogPosition>,
    /// When it was appended, Unix time in ms.
    pub(super) appended_at_ms: u64,
}

/// What a list rests on.
#[derive(Clone, Copy, Debug)]
enum Basis {
    /// What the log says up to a place, and each change after it.
    Log,
    /// An answer of the conversation service: asked at, answered at; and each change after it.
    Answer { asked_at_ms: u64, answered_at_ms: u64 },
}

#[derive(Debug)]
pub(super) enum State {
    Unknown,
    /// Boxed: few are being asked for at a time, and the known ones lie closer together without it.
    Fetching(Box<Fetching>),
    Failing {
        retry_at_ms: u64,
        failures: u32,
    },
    Absent {
        until_ms: u64,
    },
    Known(Known),
}

/// A question under way.
#[derive(Debug)]
pub(super) struct Fetching {
    id: u64,
    asked_at_ms: u64,
    round: u8,
    /// What arrived meanwhile.
    changes: Vec<Change>,
    /// Questions before this one that failed in a row.
    failures: u32,
    /// The list that has come to the end of its lifetime. It is as complete as it was, so it serves
    /// until the answer comes, and on if none comes.
    outlived: Option<Known>,
}

#[derive(Debug)]
pub(super) struct Known {
    members: Members,
    basis: Basis,
    pub(super) since_ms: u64,
    /// The last changes that made a difference, in the order of the log: a router may still be at
    /// records before them when the follower has read them.
    recent: Vec<(LogPosition, Change)>,
}

/// What a state machine needs to know of the node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// How far the clocks of this node and of whoever stamps records may be apart.
    pub(super) clock_skew_ms: u64,
    /// Whether there is a conversation service to ask.
    pub(super) can_ask: bool,
}

/// What became of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answered {
    /// The state holds it.
    Settled,
    /// Ask again: changes came meanwhile.
    AskAgain,
    /// Nobody waits for it any more.
    Stale,
}

impl Weigh for State {
    /// References to members held.
    fn weight(&self) -> usize {
        match self {
            Self::Known(known) => known.members.len(),
            Self::Fetching(fetching) => {
                fetching.outlived.as_ref().map_or(0, |known| known.members.len())
            }
            Self::Unknown | Self::Failing { .. } | Self::Absent { .. } => 0,
        }
    }

    /// The number of fetches at a time is bounded.
    fn is_pinned(&self) -> bool {
        matches!(self, Self::Fetching(_))
    }
}

impl State {
    /// The list to be used now: complete as far as the log has been followed, or as it was at a
    /// place of the log.
    pub(super) fn members(&self, at: Option<LogPosition>) -> Option<Members> {
        match self {
            Self::Known(known) => Some(known.members(at)),
            Self::Fetching(fetching) => fetching.outlived.as_ref().map(|known| known.members(at)),
            Self::Unknown | Self::Failing { .. } | Self::Absent { .. } => None,
        }
    }

    /// Question `id` is asked.
    pub(super) fn ask(&mut self, id: u64, now_ms: u64) {
        let (failures, outlived) = match std::mem::replace(self, Self::Unknown) {
            Self::Known(known) => (0, Some(known)),
            Self::Failing { failures, .. } => (failures, None),
            Self::Unknown | Self::Absent { .. } => (0, None),
            Self::Fetching(_) => unreachable!("one question at a time"),
        };
        *self = Self::Fetching(Box::new(Fetching {
            id,
            asked_at_ms: now_ms,
            round: 1,
            changes: Vec::new(),
            failures,
            outlived,
        }));
    }

    /// A creation event with everybody in it.
    pub(super) fn created(&mut self, members: Members, at_ms: u64, now_ms: u64, rules: Rules) {
        // What an old creation says may have been overtaken by changes that this node has not read
        // yet; who can ask does better.
        if rules.can_ask && at_ms.saturating_add(rules.clock_skew_ms) < now_ms {
            return;
        }
        // An answer is not older than the creation it knew of.
        if matches!(self, Self::Known(Known { basis: Basis::Answer { .. }, .. })) {
            return;
        }
        *self = Self::Known(Known::new(members, Basis::Log, now_ms));
    }

    /// A change. Returns whether the list was dropped because of it.
    pub(super) fn change(&mut self, change: Change, rules: Rules) -> bool {
        match self {
            Self::Unknown | Self::Failing { .. } => false,
            // Whoever changes it knows it: ask again at the next need.
            Self::Absent { .. } => {
                *self = Self::Unknown;
                false
            }
            Self::Fetching(fetching) => {
                let dropped = fetching
                    .outlived
                    .as_mut()
                    .is_some_and(|known| known.change(&change, rules) == Applied::Dropped);
                if dropped {
                    fetching.outlived = None;
                }
                // One more than can be used marks the overflow.
                if fetching.changes.len() <= CHANGES_MAX {
                    fetching.changes.push(change);
                }
                dropped
            }
            Self::Known(known) => {
                let dropped = known.change(&change, rules) == Applied::Dropped;
                if dropped {
                    *self = Self::Unknown;
                }
                dropped
            }
        }
    }

    /// The answer to question `id`.
    pub(super) fn answered(
        &mut self,
        id: u64,
        members: Members,
        now_ms: u64,
        rules: Rules,
    ) -> Answered {
        let Some(fetching) = self.question(id) else { return Answered::Stale };
        let asked_at_ms = fetching.asked_at_ms;
        let changes = &mut fetching.changes;
        let doubtful = changes.iter().any(|change| {
            change.place.is_none()
                || change.appended_at_ms.saturating_add(rules.clock_skew_ms) >= asked_at_ms
        });
        if doubtful && fetching.round < FETCH_ROUNDS_MAX {
            fetching.round += 1;
            fetching.asked_at_ms = now_ms;
            changes.clear();
            return Answered::AskAgain;
        }
        if !doubtful {
            let basis = Basis::Answer { asked_at_ms, answered_at_ms: now_ms };
            *self = Self::Known(Known::new(members, basis, now_ms));
            return Answered::Settled;
        }
        if changes.len() > CHANGES_MAX || changes.iter().any(|change| change.place.is_none()) {
            let failures = fetching.failures + 1;
            *self = Self::Failing { retry_at_ms: now_ms, failures };
            return Answered::Settled;
        }
        // All of them, those that are in the answer for certain too: one that is not may precede
        // them. What is undone thereby the log says again: from their place on it decides.
        let members = changes
            .iter()
            .fold(members, |members, change| with(&members, &change.user, change.added));
        *self = Self::Known(Known::new(members, Basis::Log, now_ms));
        Answered::Settled
    }

    /// Question `id` failed. A list that has only outlived its time is kept for another.
    pub(super) fn failed(&mut self, id: u64, now_ms: u64, pause_ms: impl FnOnce(u32) -> u64) {
        let Some(fetching) = self.question(id) else { return };
        let failures = fetching.failures + 1;
        *self = match fetching.outlived.take() {
            Some(known) => Self::Known(Known { since_ms: now_ms, ..known }),
            None => Self::Failing { retry_at_ms: now_ms + pause_ms(failures), failures },
        };
    }

    /// The service answered that there is no such conversation.
    pub(super) fn absent(&mut self, id: u64, until_ms: u64) {
        let Some(fetching) = self.question(id) else { return };
        // It was changed while it was asked for, so it exists by now.
        let exists = !fetching.changes.is_empty();
        *self = if exists { Self::Unknown } else { Self::Absent { until_ms } };
    }

    /// `None`: nobody waits for question `id` any more.
    fn question(&mut self, id: u64) -> Option<&mut Fetching> {
        match self {
            Self::Fetching(fetching) if fetching.id == id => Some(fetching),
            _ => None,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Applied {
    Kept,
    Dropped,
}

enum Verdict {
    Newer,
    Included,
    Unsure,
}

impl Known {
    fn new(members: Members, basis: Basis, since_ms: u64) -> Self {
        Self { members, basis, since_ms, recent: Vec::new() }
    }

    /// The newest list, or the one that held for a record at `at`: whoever left later in its
    /// partition was still there, whoever joined later was not yet.
    pub(super) fn members(&self, at: Option<LogPosition>) -> Members {
        let later = self
            .recent
            .iter()
            .rev()
            .take_while(|(place, _)| at.is_some_and(|at| place.is_after(at)));
        later.fold(Arc::clone(&self.members), |members, (_, change)| {
            with(&members, &change.user, !change.added)
        })
    }

    fn change(&mut self, change: &Change, rules: Rules) -> Applied {
        match self.judge(change, rules) {
            Verdict::Newer => {
                let members = with(&self.members, &change.user, change.added);
                let differs = !Arc::ptr_eq(&members, &self.members);
                if let (Some(place), true) = (change.place, differs) {
                    if self.recent.len() == RECENT_MAX {
                        self.recent.remove(0);
                    }
                    self.recent.push((place, change.clone()));
                }
                self.members = members;
                Applied::Kept
            }
            Verdict::Included => Applied::Kept,
            Verdict::Unsure => Applied::Dropped,
        }
    }

    fn judge(&self, change: &Change, rules: Rules) -> Verdict {
        if change.place.is_none() {
            // It stands in the log as well. Who can ask need not wait until it is read there.
            return if rules.can_ask { Verdict::Unsure } else { Verdict::Included };
        }
        match self.basis {
            Basis::Log => Verdict::Newer,
            Basis::Answer { asked_at_ms, answered_at_ms } => {
                let (at, skew) = (change.appended_at_ms, rules.clock_skew_ms);
                if at.saturating_add(skew) < asked_at_ms {
                    Verdict::Included
                } else if at > answered_at_ms.saturating_add(skew) {
                    Verdict::Newer
                } else {
                    Verdict::Unsure
                }
            }
        }
    }
}

/// The list with or without a user: a copy, because readers hold the old one.
fn with(members: &Members, user: &Arc<str>, is_member: bool) -> Members {
    match (members.binary_search(user), is_member) {
        (Ok(_), true) | (Err(_), false) => Arc::clone(members),
        (Err(at), true) => {
            let (before, after) = members.split_at(at);
            before.iter().chain([user]).chain(after).cloned().collect()
        }
        (Ok(at), false) => members[..at].iter().chain(&members[at + 1..]).cloned().collect(),
    }
}

#[cfg(test)]
mod tests;
