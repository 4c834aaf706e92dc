//! What is to be done for one session, and what follows from how it went.

use std::time::Duration;

use tokio::time::Instant;

use super::super::visibility::VisibilityNotifier;
use crate::service::runtime::backoff::Backoff;

/// Delays before a failed call is retried.
pub(super) const RETRY_BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
/// A refresh that waited this long is too late to count on: the registration (60 s, contract §4)
/// may be gone by the time it is carried out, so the session is registered again instead.
pub(super) const REFRESH_AGE_MAX: Duration = Duration::from_secs(35);

/// What is to be done for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum PresenceOperation {
    Register,
    /// With `check`: see whether it is still ours.
    Refresh {
        check: bool,
    },
    Unregister,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum OperationOutcome {
    Done,
    /// The registration is another instance's: the session was replaced on another node.
    Elsewhere,
    /// There is no registration.
    Vanished,
    /// To be tried again.
    Failed,
    /// Trying again will not help.
    Rejected,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DesiredState {
    Online,
    Offline,
}

/// What presence holds for the session, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RegistrationState {
    /// Certainly nothing of ours.
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

/// What follows from an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FollowUp {
    /// Nothing more is to be done.
    Remove,
    /// The same, and the session has to end here: it was replaced on another node.
    RemoveReplaced,
    /// Something newer is wanted.
    Requeue,
    /// The same once more, after this time.
    Retry(Duration),
}

#[derive(Debug)]
pub(super) struct QueueEntry {
    pub(super) want: DesiredState,
    pub(super) held: RegistrationState,
    pub(super) place: EntryState,
    pub(super) check: bool,
    /// A session was admitted while a call for its predecessor was under way: whatever that found
    /// is no longer what is.
    anew: bool,
    attempts: u8,
    since: Instant,
    /// Who waits for the registration.
    pub(super) notifier: Option<VisibilityNotifier>,
}

impl QueueEntry {
    /// One that waits.
    pub(super) fn new(
        want: DesiredState,
        held: RegistrationState,
        check: bool,
        now: Instant,
    ) -> Self {
        let place = EntryState::Waiting;
        Self { want, held, place, check, anew: false, attempts: 0, since: now, notifier: None }
    }

    /// A session was admitted for which something is to be done already.
    pub(super) fn opened(&mut self) {
        self.want = DesiredState::Online;
        if self.place == EntryState::InFlight {
            self.anew = true;
        } else if self.held == RegistrationState::Present {
            // Not a refresh of the predecessor: this one is to be registered.
            self.held = RegistrationState::Unknown;
        }
    }

    /// What it asks for; `None`: nothing any more.
    pub(super) fn operation(&self, closing: bool, now: Instant) -> Option<PresenceOperation> {
        match (self.want, self.held) {
            (DesiredState::Offline, RegistrationState::Absent) => None,
            (DesiredState::Offline, RegistrationState::Unknown | RegistrationState::Present) => {
                Some(PresenceOperation::Unregister)
            }
            (DesiredState::Online, _) if closing => None,
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

    /// Whether presence may hold something that it must not.
    pub(super) fn is_untold(&self) -> bool {
        self.place == EntryState::InFlight
            || (self.want == DesiredState::Offline && self.held != RegistrationState::Absent)
    }

    /// Its operation is given out.
    pub(super) fn begin(&mut self) {
        self.place = EntryState::InFlight;
        self.check = false;
    }

    /// Its operation has ended. `chance`: 0 to 1.
    pub(super) fn end(
        &mut self,
        operation: PresenceOperation,
        outcome: OperationOutcome,
        chance: f64,
        now: Instant,
    ) -> FollowUp {
        let anew = std::mem::take(&mut self.anew);
        if (outcome, operation, anew)
            == (OperationOutcome::Done, PresenceOperation::Register, false)
            && let Some(notifier) = self.notifier.take()
        {
            notifier.keep(now);
        }
        let settled = match (outcome, operation) {
            (
                OperationOutcome::Done,
                PresenceOperation::Register | PresenceOperation::Refresh { .. },
            ) => {
                self.held =
                    if anew { RegistrationState::Unknown } else { RegistrationState::Present };
                // A check that was asked for meanwhile is still to be made.
                self.want == DesiredState::Online && !anew && !self.check
            }
            (
                OperationOutcome::Done | OperationOutcome::Elsewhere | OperationOutcome::Vanished,
                PresenceOperation::Unregister,
            )
            | (
                OperationOutcome::Vanished,
                PresenceOperation::Register | PresenceOperation::Refresh { .. },
            ) => {
                self.held = RegistrationState::Absent;
                self.want == DesiredState::Offline
            }
            (
                OperationOutcome::Elsewhere,
                PresenceOperation::Register | PresenceOperation::Refresh { .. },
            ) => {
                self.held = RegistrationState::Absent;
                if self.want == DesiredState::Online && !anew {
                    return FollowUp::RemoveReplaced;
                }
                self.want == DesiredState::Offline
            }
            (OperationOutcome::Rejected, _) => true,
            (OperationOutcome::Failed, _) => {
                if anew
                    || matches!(
                        operation,
                        PresenceOperation::Register | PresenceOperation::Unregister
                    )
                {
                    self.held = RegistrationState::Unknown;
                }
                self.check |= operation == PresenceOperation::Refresh { check: true };
                let wait = RETRY_BACKOFF.delay(u32::from(self.attempts), chance);
                self.attempts = self.attempts.saturating_add(1);
                self.place = EntryState::Delayed;
                return FollowUp::Retry(wait);
            }
        };
        if settled {
            return FollowUp::Remove;
        }
        self.place = EntryState::Waiting;
        self.attempts = 0;
        self.since = now;
        FollowUp::Requeue
    }
}
