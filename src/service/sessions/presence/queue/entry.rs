//! What to do for one session, and how an outcome changes it.

use std::time::Duration;

use tokio::time::Instant;

use super::super::visibility::VisibilityNotifier;
use crate::service::backends::redis::Fence;
use crate::service::runtime::backoff::Backoff;

/// Delays before a failed call is retried.
pub(super) const RETRY_BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
/// A refresh that has waited longer than this becomes a registration, because the existing
/// registration (60 s, contract §4) may expire before the call is made.
pub(super) const REFRESH_AGE_MAX: Duration = Duration::from_secs(35);

/// A call for one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum PresenceOperation {
    Register,
    /// With `check`: first see whether it is still registered with this node.
    Refresh {
        check: bool,
    },
    Unregister,
}

/// Outcome of a [`PresenceOperation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum OperationOutcome {
    Done,
    /// Registered with another instance: the session was replaced on another node.
    Elsewhere,
    /// Not registered.
    Vanished,
    /// To be retried.
    Failed,
    /// A retry would not help.
    Rejected,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DesiredState {
    Online,
    Offline,
}

/// What presence holds for the session, as far as this node knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RegistrationState {
    /// No registration of this node.
    Absent,
    /// A call failed that may have been carried out.
    Unknown,
    Present,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryState {
    Waiting,
    Delayed,
    InFlight,
}

/// What to do after an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FollowUp {
    /// Nothing is left to do.
    Remove,
    /// Nothing is left to do, and the session must be closed: it was replaced on another node.
    RemoveReplaced,
    /// The desired state has changed since.
    Requeue,
    /// Try again after this time.
    Retry(Duration),
}

/// What orders the session among those of its user and device (`PRESENCE_MODE=redis`).
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct FenceStanding {
    pub(in super::super) admitted: Instant,
    /// Its number, once it has drawn one.
    pub(in super::super) fence: Option<Fence>,
    /// The number of its predecessor on this node, which may still be registered.
    pub(in super::super) previous: Option<Fence>,
}

impl FenceStanding {
    pub(super) fn new(admitted: Instant) -> Self {
        Self { admitted, fence: None, previous: None }
    }

    /// A session was admitted that replaces this one.
    fn replace(&mut self, admitted: Instant) {
        let previous = self.fence.or(self.previous);
        *self = Self { admitted, fence: None, previous };
    }
}

#[derive(Debug)]
pub(super) struct QueueEntry {
    pub(super) desired: DesiredState,
    pub(super) registration: RegistrationState,
    pub(super) state: EntryState,
    pub(super) check: bool,
    /// A session was admitted while a call for its predecessor was in flight. The outcome of that
    /// call says nothing about the new session.
    superseded: bool,
    attempts: u8,
    since: Instant,
    /// When a refresh became due; `None`: this entry began otherwise.
    refresh_since: Option<Instant>,
    /// Other nodes could not find the session for a time, although it was live.
    pub(super) lapsed: bool,
    pub(super) standing: FenceStanding,
    /// Notified when the session is registered.
    pub(super) notifier: Option<VisibilityNotifier>,
}

impl QueueEntry {
    pub(super) fn new(
        desired: DesiredState,
        registration: RegistrationState,
        check: bool,
        now: Instant,
    ) -> Self {
        Self {
            desired,
            registration,
            state: EntryState::Waiting,
            check,
            superseded: false,
            attempts: 0,
            since: now,
            refresh_since: (registration == RegistrationState::Present).then_some(now),
            lapsed: false,
            standing: FenceStanding::new(now),
            notifier: None,
        }
    }

    /// A session was admitted while this entry existed.
    pub(super) fn register(&mut self, now: Instant) {
        self.desired = DesiredState::Online;
        self.refresh_since = None;
        self.lapsed = false;
        self.standing.replace(now);
        if self.state == EntryState::InFlight {
            self.superseded = true;
        } else if self.registration == RegistrationState::Present {
            // The new session needs a registration, not a refresh of its predecessor's.
            self.registration = RegistrationState::Unknown;
        }
    }

    /// A call of this entry has drawn a number, for the session that was admitted when it began.
    pub(super) fn drawn(&mut self, fence: Fence) {
        let drawn_for =
            if self.superseded { &mut self.standing.previous } else { &mut self.standing.fence };
        *drawn_for = Some(fence);
    }

    /// The operation to carry out. `None`: nothing is left to do.
    pub(super) fn operation(&self, shutting_down: bool, now: Instant) -> Option<PresenceOperation> {
        match (self.desired, self.registration) {
            (DesiredState::Offline, RegistrationState::Absent) => None,
            (DesiredState::Offline, RegistrationState::Unknown | RegistrationState::Present) => {
                Some(PresenceOperation::Unregister)
            }
            (DesiredState::Online, _) if shutting_down => None,
            (DesiredState::Online, RegistrationState::Present)
                if now - self.since < REFRESH_AGE_MAX =>
            {
                Some(PresenceOperation::Refresh { check: self.check })
            }
            (
                DesiredState::Online,
                RegistrationState::Absent | RegistrationState::Unknown | RegistrationState::Present,
            ) => Some(PresenceOperation::Register),
        }
    }

    /// Whether presence may hold a registration that must be removed.
    pub(super) fn must_unregister(&self) -> bool {
        self.state == EntryState::InFlight
            || (self.desired == DesiredState::Offline
                && self.registration != RegistrationState::Absent)
    }

    pub(super) fn begin(&mut self) {
        self.state = EntryState::InFlight;
        self.check = false;
    }

    /// Whether this outcome shows that the session was not registered for a time.
    fn has_lapsed(
        &self,
        operation: PresenceOperation,
        outcome: OperationOutcome,
        now: Instant,
    ) -> bool {
        match (operation, outcome) {
            (PresenceOperation::Refresh { .. }, OperationOutcome::Vanished) => true,
            (PresenceOperation::Register, OperationOutcome::Done) => {
                let expired =
                    self.refresh_since.is_some_and(|since| now - since >= REFRESH_AGE_MAX);
                expired || self.notifier.as_ref().is_some_and(|notifier| notifier.is_late(now))
            }
            _ => false,
        }
    }

    /// Takes the outcome of its operation. `chance`: 0 to 1.
    pub(super) fn complete(
        &mut self,
        operation: PresenceOperation,
        outcome: OperationOutcome,
        chance: f64,
        now: Instant,
    ) -> FollowUp {
        use OperationOutcome::{Done, Elsewhere, Failed, Rejected, Vanished};
        use PresenceOperation::{Refresh, Register, Unregister};
        let superseded = std::mem::take(&mut self.superseded);
        if !superseded {
            self.lapsed |= self.has_lapsed(operation, outcome, now);
        }
        if (outcome, operation, superseded) == (Done, Register, false)
            && let Some(notifier) = self.notifier.take()
        {
            notifier.registered(now);
        }
        let is_complete = match (outcome, operation) {
            (Done, Register | Refresh { .. }) => {
                self.registration = if superseded {
                    RegistrationState::Unknown
                } else {
                    RegistrationState::Present
                };
                // A check that was requested during the call has not been made yet.
                self.desired == DesiredState::Online && !superseded && !self.check
            }
            (Done | Elsewhere | Vanished, Unregister) | (Vanished, Register | Refresh { .. }) => {
                self.registration = RegistrationState::Absent;
                self.desired == DesiredState::Offline
            }
            (Elsewhere, Register | Refresh { .. }) => {
                self.registration = RegistrationState::Absent;
                if self.desired == DesiredState::Online && !superseded {
                    return FollowUp::RemoveReplaced;
                }
                self.desired == DesiredState::Offline
            }
            (Rejected, _) => true,
            (Failed, _) => {
                if superseded || matches!(operation, Register | Unregister) {
                    self.registration = RegistrationState::Unknown;
                }
                self.check |= operation == Refresh { check: true };
                let wait = RETRY_BACKOFF.delay(u32::from(self.attempts), chance);
                self.attempts = self.attempts.saturating_add(1);
                self.state = EntryState::Delayed;
                return FollowUp::Retry(wait);
            }
        };
        if is_complete {
            return FollowUp::Remove;
        }
        self.state = EntryState::Waiting;
        self.attempts = 0;
        self.since = now;
        FollowUp::Requeue
    }
}
