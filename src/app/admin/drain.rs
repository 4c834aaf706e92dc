//! Whether the node drains, and whether that can still be cancelled.
//!
//! ```text
//!           begin                 commit: the delay is over
//!  Serving ───────► Cancellable ─────────────────────────────► Committed
//!     ▲ │   cancel      │                                         ▲
//!     └─┼───────────────┘                                         │
//!       └─────────────────────────────────────────────────────────┘
//!            stop, from every stage: a signal, or a part has failed
//! ```

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;

/// Why a drain goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotCancelled {
    /// There is none.
    #[error("the node does not drain")]
    NotDraining,
    /// Whatever sent the signal waits for the exit, and kills the process otherwise.
    #[error(
        "the node was told to stop by a signal, which cannot be taken back: start it again when it has exited"
    )]
    Signalled,
    /// The ports are closed.
    #[error("the sessions are being closed already: start the node again when it has exited")]
    SessionsClosing,
}

/// A drain that an operator has requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedDrain {
    /// Distinguishes it from one that was cancelled just before.
    number: u64,
    /// How long the node serves on, if not for `DRAIN_DELAY`.
    pub delay: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DrainStage {
    Serving,
    Cancellable(RequestedDrain),
    Committed(NotCancelled),
}

/// Starts and cancels the drain.
#[derive(Debug)]
pub struct DrainSwitch {
    /// With the last number that was given to a drain.
    stage: Mutex<(DrainStage, u64)>,
    is_on: watch::Sender<bool>,
}

impl Default for DrainSwitch {
    /// The node serves.
    fn default() -> Self {
        Self { stage: Mutex::new((DrainStage::Serving, 0)), is_on: watch::Sender::new(false) }
    }
}

impl DrainSwitch {
    /// Whether the node drains or stops.
    pub fn is_on(&self) -> bool {
        *self.is_on.borrow()
    }

    /// Follows [`DrainSwitch::is_on`].
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.is_on.subscribe()
    }

    /// Begins a drain. `delay`: how long the node serves on, if not for `DRAIN_DELAY`. Returns false if there is a drain.
    pub fn begin(&self, delay: Option<Duration>) -> bool {
        let number = {
            let mut stage = self.lock();
            stage.1 += 1;
            stage.1
        };
        let begun = DrainStage::Cancellable(RequestedDrain { number, delay });
        self.change(|stage| (stage == DrainStage::Serving).then_some(begun)).is_some()
    }

    /// The drain that can be cancelled.
    pub fn requested(&self) -> Option<RequestedDrain> {
        match self.lock().0 {
            DrainStage::Cancellable(requested) => Some(requested),
            DrainStage::Serving | DrainStage::Committed(_) => None,
        }
    }

    /// Whether this drain was cancelled. Another one may have begun since.
    pub fn was_cancelled(&self, requested: Option<RequestedDrain>) -> bool {
        match self.lock().0 {
            DrainStage::Serving => true,
            DrainStage::Cancellable(current) => requested != Some(current),
            DrainStage::Committed(_) => false,
        }
    }

    /// Cancels the drain.
    ///
    /// # Errors
    /// It goes on, or there is none.
    pub fn cancel(&self) -> Result<(), NotCancelled> {
        let mut why = NotCancelled::NotDraining;
        let cancels = |stage| match stage {
            DrainStage::Cancellable(_) => Some(DrainStage::Serving),
            DrainStage::Serving => None,
            DrainStage::Committed(reason) => {
                why = reason;
                None
            }
        };
        self.change(cancels).map(|_| ()).ok_or(why)
    }

    /// This drain cannot be cancelled any more. Returns false, and does nothing, if it was.
    pub fn commit(&self, requested: Option<RequestedDrain>) -> bool {
        let committed = Some(DrainStage::Committed(NotCancelled::SessionsClosing));
        let commits = |stage| match stage {
            DrainStage::Serving => None,
            DrainStage::Cancellable(current) if requested != Some(current) => None,
            DrainStage::Cancellable(_) | DrainStage::Committed(_) => committed,
        };
        self.change(commits).is_some()
    }

    /// The node stops, whatever was requested before.
    pub fn stop(&self, why: NotCancelled) {
        self.change(|_| Some(DrainStage::Committed(why)));
    }

    /// Tells the others while the lock is held, so that they see the changes in their order.
    fn change(&self, next: impl FnOnce(DrainStage) -> Option<DrainStage>) -> Option<DrainStage> {
        let mut stage = self.lock();
        let next = next(stage.0)?;
        stage.0 = next;
        self.is_on.send_replace(next != DrainStage::Serving);
        Some(next)
    }

    fn lock(&self) -> MutexGuard<'_, (DrainStage, u64)> {
        self.stage.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_secs(600);

    #[test]
    fn drain_is_cancelled_until_it_is_committed() {
        let drain = DrainSwitch::default();
        let seen = drain.subscribe();
        assert_eq!(drain.cancel(), Err(NotCancelled::NotDraining));
        assert!(!drain.commit(None) && !drain.is_on());
        assert!(drain.begin(Some(DELAY)) && !drain.begin(None));
        let first = drain.requested();
        assert!(drain.is_on() && *seen.borrow() && !drain.was_cancelled(first));
        assert_eq!(first.and_then(|requested| requested.delay), Some(DELAY));
        assert_eq!(drain.cancel(), Ok(()));
        assert!(!drain.is_on() && !*seen.borrow() && drain.was_cancelled(first));
        assert!(!drain.commit(first), "it was cancelled at the last moment");
        // The next one has a delay of its own, also if nobody has noticed that the first one was cancelled.
        assert!(drain.begin(Some(DELAY)));
        assert!(drain.was_cancelled(first) && !drain.commit(first));
        assert!(drain.commit(drain.requested()));
        assert_eq!(drain.cancel(), Err(NotCancelled::SessionsClosing));
        assert!(drain.is_on() && !drain.begin(None) && !drain.was_cancelled(None));
    }

    #[test]
    fn signal_cannot_be_taken_back() {
        for drains in [false, true] {
            let drain = DrainSwitch::default();
            assert!(!drains || drain.begin(Some(DELAY)));
            let requested = drain.requested();
            drain.stop(NotCancelled::Signalled);
            assert_eq!(drain.cancel(), Err(NotCancelled::Signalled));
            assert!(drain.is_on() && !drain.begin(None));
            assert_eq!(drain.requested(), None);
            assert!(!drain.was_cancelled(requested) && drain.commit(requested));
            assert_eq!(drain.cancel(), Err(NotCancelled::SessionsClosing));
        }
    }
}
