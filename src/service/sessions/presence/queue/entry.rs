//! What is to be done for one session, and what follows from how it went.

use std::time::Duration;

use tokio::time::Instant;

use super::super::reach::Pledge;
use super::pace::backoff;

/// First wait before a failed call is tried again; doubles each time.
pub(super) const RETRY_MIN: Duration = Duration::from_millis(500);
/// Longest such wait.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(15);
/// A refresh that waited this long is too late to count on: the registration (60 s, contract §4)
/// may be gone by the time it is carried out, so the session is registered again instead.
pub(super) const REFRESH_AGE_MAX: Duration = Duration::from_secs(35);

/// What is to be done for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Job {
    Register,
    /// With `check`: see whether it is still ours.
    Refresh {
        check: bool,
    },
    Unregister,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Outcome {
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
pub(super) enum Want {
    Online,
    Offline,
}

/// What presence holds for the session, as far as we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Certainly nothing of ours.
    Absent,
    /// A call failed that may have been carried out.
    Unknown,
    Present,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Waiting,
    Delayed,
    UnderWay,
}

/// What follows from an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Nothing more is to be done.
    Gone,
    /// The same, and the session has to end here: it was replaced on another node.
    GoneElsewhere,
    /// Something newer is wanted.
    Again,
    /// The same once more, after this time.
    Retry(Duration),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) want: Want,
    pub(super) held: Held,
    pub(super) place: Place,
    pub(super) check: bool,
    /// A session was admitted while a call for its predecessor was under way: whatever that found
    /// is no longer what is.
    anew: bool,
    attempts: u8,
    since: Instant,
    /// Who waits for the registration.
    pub(super) pledge: Option<Pledge>,
}

impl Entry {
    /// One that waits.
    pub(super) fn new(want: Want, held: Held, check: bool, now: Instant) -> Self {
        let place = Place::Waiting;
        Self { want, held, place, check, anew: false, attempts: 0, since: now, pledge: None }
    }

    /// A session was admitted for which something is to be done already.
    pub(super) fn opened(&mut self) {
        self.want = Want::Online;
        if self.place == Place::UnderWay {
            self.anew = true;
        } else if self.held == Held::Present {
            // Not a refresh of the predecessor: this one is to be registered.
            self.held = Held::Unknown;
        }
    }

    /// What it asks for; `None`: nothing any more.
    pub(super) fn job(&self, closing: bool, now: Instant) -> Option<Job> {
        match (self.want, self.held) {
            (Want::Offline, Held::Absent) => None,
            (Want::Offline, Held::Unknown | Held::Present) => Some(Job::Unregister),
            (Want::Online, _) if closing => None,
            (Want::Online, Held::Present) if now - self.since < REFRESH_AGE_MAX => {
                Some(Job::Refresh { check: self.check })
            }
            (Want::Online, Held::Absent | Held::Unknown | Held::Present) => Some(Job::Register),
        }
    }

    /// Whether presence may hold something that it must not.
    pub(super) fn is_untold(&self) -> bool {
        self.place == Place::UnderWay || (self.want == Want::Offline && self.held != Held::Absent)
    }

    /// Its job is given out.
    pub(super) fn begin(&mut self) {
        self.place = Place::UnderWay;
        self.check = false;
    }

    /// Its job has ended. `chance`: 0 to 1.
    pub(super) fn end(&mut self, job: Job, outcome: Outcome, chance: f64, now: Instant) -> Then {
        let anew = std::mem::take(&mut self.anew);
        if (outcome, job, anew) == (Outcome::Done, Job::Register, false)
            && let Some(pledge) = self.pledge.take()
        {
            pledge.keep(now);
        }
        let settled = match (outcome, job) {
            (Outcome::Done, Job::Register | Job::Refresh { .. }) => {
                self.held = if anew { Held::Unknown } else { Held::Present };
                // A check that was asked for meanwhile is still to be made.
                self.want == Want::Online && !anew && !self.check
            }
            (Outcome::Done | Outcome::Elsewhere | Outcome::Vanished, Job::Unregister)
            | (Outcome::Vanished, Job::Register | Job::Refresh { .. }) => {
                self.held = Held::Absent;
                self.want == Want::Offline
            }
            (Outcome::Elsewhere, Job::Register | Job::Refresh { .. }) => {
                self.held = Held::Absent;
                if self.want == Want::Online && !anew {
                    return Then::GoneElsewhere;
                }
                self.want == Want::Offline
            }
            (Outcome::Rejected, _) => true,
            (Outcome::Failed, _) => {
                if anew || matches!(job, Job::Register | Job::Unregister) {
                    self.held = Held::Unknown;
                }
                self.check |= job == Job::Refresh { check: true };
                let wait = backoff(RETRY_MIN, RETRY_MAX, u32::from(self.attempts), chance);
                self.attempts = self.attempts.saturating_add(1);
                self.place = Place::Delayed;
                return Then::Retry(wait);
            }
        };
        if settled {
            return Then::Gone;
        }
        self.place = Place::Waiting;
        self.attempts = 0;
        self.since = now;
        Then::Again
    }
}
