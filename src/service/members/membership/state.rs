//! The member list of one conversation: a pure state machine.
//!
//! ```text
//!            lookup                   answer, with changes
//! Unknown ──────────► Fetching ─────────────────────► Known ──┐
//!    ▲                 │  ▲  │ failed      lifetime    │  ▲   │ change: applied
//!    │                 │  │  │ ◄───────────────────────┤  └───┘
//!    │                 │  │  └──► Failing ──┐          │
//!    │                 │  └─────────────────┘ lookup   │
//!    │                 └─► Absent (the conversation does not exist)
//!    └──────────────────── change of unknown order, from another node
//! ```

use crate::domain::members::Members;
use crate::service::members::membership::changes::RequestTime;
use crate::service::runtime::cache::Weigh;

/// How many requests are made while something that an answer cannot be reconciled with happens during each
/// of them.
pub(super) const FETCH_ROUNDS_MAX: u8 = 3;

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
    pub(super) asked: RequestTime,
    round: u8,
    /// Another node has read a change whose order is not known: the answer may not contain it.
    is_doubtful: bool,
    /// A change of this conversation arrived during the request, so it exists.
    has_changed: bool,
    /// Failed requests in a row before this one.
    failures: u32,
    /// The list whose lifetime ended. It is still complete, so it is used until the answer arrives, and
    /// longer if the request fails.
    expired: Option<KnownList>,
}

/// A complete member list.
#[derive(Debug)]
pub(super) struct KnownList {
    pub(super) members: Members,
    /// Start of its lifetime, Unix time in ms.
    pub(super) since_ms: u64,
    /// Whether there may be recent changes, so that an earlier record needs another list.
    pub(super) has_changed: bool,
}

/// Result of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AnswerOutcome {
    /// The request is finished.
    Finished,
    /// Repeat the request, because the answer cannot be reconciled with what was read during it.
    Repeat,
    /// The answer is not expected any more.
    Stale,
}

impl Weigh for ListState {
    /// Number of members held, which the cache bounds.
    fn weight(&self) -> usize {
        self.known().map_or(0, |known| known.members.len())
    }

    /// The number of fetches at a time is bounded.
    fn is_pinned(&self) -> bool {
        matches!(self, Self::Fetching(_))
    }
}

impl ListState {
    /// The list to use: up to date with the log as far as it was read.
    pub(super) fn known(&self) -> Option<&KnownList> {
        match self {
            Self::Known(known) => Some(known),
            Self::Fetching(fetching) => fetching.expired.as_ref(),
            Self::Unknown | Self::Failing { .. } | Self::Absent { .. } => None,
        }
    }

    fn known_mut(&mut self) -> Option<&mut KnownList> {
        match self {
            Self::Known(known) => Some(known),
            Self::Fetching(fetching) => fetching.expired.as_mut(),
            Self::Unknown | Self::Failing { .. } | Self::Absent { .. } => None,
        }
    }

    /// Starts request `id`.
    pub(super) fn start_fetch(&mut self, id: u64, asked: RequestTime) {
        let (failures, expired) = match std::mem::replace(self, Self::Unknown) {
            Self::Known(known) => (0, Some(known)),
            Self::Failing { failures, .. } => (failures, None),
            Self::Unknown | Self::Absent { .. } => (0, None),
            Self::Fetching(_) => unreachable!("one request at a time"),
        };
        let (round, is_doubtful, has_changed) = (1, false, false);
        *self = Self::Fetching(Box::new(Fetching {
            id,
            asked,
            round,
            is_doubtful,
            has_changed,
            failures,
            expired,
        }));
    }

    /// A list that is complete at its place in the log.
    pub(super) fn set(&mut self, members: Members, now_ms: u64) {
        *self = Self::Known(KnownList { members, since_ms: now_ms, has_changed: true });
    }

    /// A change was read. `decides`: it is the last one of its user.
    pub(super) fn change(&mut self, user: &str, added: bool, decides: bool) {
        if let Some(known) = self.known_mut() {
            known.has_changed = true;
            if decides {
                known.members = known.members.changed(user, added);
            }
        }
        match self {
            // The conversation exists after all. The next look-up requests it.
            Self::Absent { .. } => *self = Self::Unknown,
            Self::Fetching(fetching) => fetching.has_changed = true,
            Self::Unknown | Self::Failing { .. } | Self::Known(_) => {}
        }
    }

    /// Another node has read a change that is not in the list, so that the order of the two is not known. The
    /// list is dropped, and the next answer decides. Returns whether there was a list.
    pub(super) fn doubt(&mut self) -> bool {
        match self {
            Self::Unknown | Self::Failing { .. } => false,
            Self::Absent { .. } => {
                *self = Self::Unknown;
                false
            }
            Self::Known(_) => {
                *self = Self::Unknown;
                true
            }
            Self::Fetching(fetching) => {
                fetching.is_doubtful = true;
                fetching.has_changed = true;
                fetching.expired.take().is_some()
            }
        }
    }

    /// Handles the answer to request `id`. `is_reconcilable`: every change that was read since the request is
    /// known. `complete` adds the changes to the list.
    pub(super) fn answered(
        &mut self,
        id: u64,
        (again, is_reconcilable): (RequestTime, bool),
        now_ms: u64,
        complete: impl FnOnce(RequestTime) -> Members,
    ) -> AnswerOutcome {
        let Some(fetching) = self.request(id) else { return AnswerOutcome::Stale };
        if !fetching.is_doubtful && is_reconcilable {
            let members = complete(fetching.asked);
            self.set(members, now_ms);
            return AnswerOutcome::Finished;
        }
        if fetching.round < FETCH_ROUNDS_MAX {
            fetching.round += 1;
            fetching.asked = again;
            fetching.is_doubtful = false;
            return AnswerOutcome::Repeat;
        }
        let failures = fetching.failures + 1;
        *self = Self::Failing { retry_at_ms: now_ms, failures };
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
        *self = if fetching.has_changed { Self::Unknown } else { Self::Absent { until_ms } };
    }

    /// Request `id`, if its answer is still expected.
    pub(super) fn request(&mut self, id: u64) -> Option<&mut Fetching> {
        match self {
            Self::Fetching(fetching) if fetching.id == id => Some(fetching),
            _ => None,
        }
    }
}
