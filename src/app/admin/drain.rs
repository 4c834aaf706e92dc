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

use std::sync::Mutex;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DrainStage {
    Serving,
    Cancellable,
    Committed(NotCancelled),
}

/// Starts and cancels the drain.
#[derive(Debug)]
pub struct DrainSwitch {
    stage: Mutex<DrainStage>,
    is_on: watch::Sender<bool>,
}

impl Default for DrainSwitch {
    /// The node serves.
    fn default() -> Self {
        Self { stage: Mutex::new(DrainStage::Serving), is_on: watch::Sender::new(false) }
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

    /// Begins a drain. Returns false if there is one.
    pub fn begin(&self) -> bool {
        let begins = |stage| (stage == DrainStage::Serving).then_some(DrainStage::Cancellable);
        self.change(begins).is_some()
    }

    /// Cancels the drain.
    ///
    /// # Errors
    /// It goes on, or there is none.
    pub fn cancel(&self) -> Result<(), NotCancelled> {
        let mut why = NotCancelled::NotDraining;
        let cancels = |stage| match stage {
            DrainStage::Cancellable => Some(DrainStage::Serving),
            DrainStage::Serving => None,
            DrainStage::Committed(reason) => {
                why = reason;
                None
            }
        };
        self.change(cancels).map(|_| ()).ok_or(why)
    }

    /// The drain cannot be cancelled any more. Returns false, and does nothing, if it was cancelled.
    pub fn commit(&self) -> bool {
        let commits = |stage| match stage {
            DrainStage::Serving => None,
            DrainStage::Cancellable | DrainStage::Committed(_) => {
                Some(DrainStage::Committed(NotCancelled::SessionsClosing))
            }
        };
        self.change(commits).is_some()
    }

    /// The node stops, whatever was requested before.
    pub fn stop(&self, why: NotCancelled) {
        self.change(|_| Some(DrainStage::Committed(why)));
    }

    /// Tells the others while the lock is held, so that they see the changes in their order.
    fn change(&self, next: impl FnOnce(DrainStage) -> Option<DrainStage>) -> Option<DrainStage> {
        let mut stage = self.stage.lock().expect("no holder panics");
        let next = next(*stage)?;
        *stage = next;
        self.is_on.send_replace(next != DrainStage::Serving);
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drain_is_cancelled_until_it_is_committed() {
        let drain = DrainSwitch::default();
        let seen = drain.subscribe();
        assert_eq!(drain.cancel(), Err(NotCancelled::NotDraining));
        assert!(!drain.commit() && !drain.is_on());
        assert!(drain.begin() && !drain.begin());
        assert!(drain.is_on() && *seen.borrow());
        assert_eq!(drain.cancel(), Ok(()));
        assert!(!drain.is_on() && !*seen.borrow());
        assert!(!drain.commit(), "it was cancelled at the last moment");
        assert!(drain.begin() && drain.commit());
        assert_eq!(drain.cancel(), Err(NotCancelled::SessionsClosing));
        assert!(drain.is_on() && !drain.begin());
    }

    #[test]
    fn signal_cannot_be_taken_back() {
        for drains in [false, true] {
            let drain = DrainSwitch::default();
            assert!(!drains || drain.begin());
            drain.stop(NotCancelled::Signalled);
            assert_eq!(drain.cancel(), Err(NotCancelled::Signalled));
            assert!(drain.is_on() && !drain.begin());
            assert!(drain.commit());
            assert_eq!(drain.cancel(), Err(NotCancelled::SessionsClosing));
        }
    }
}
