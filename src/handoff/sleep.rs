//! Who sleeps, and who has to wake whom: the flag of a doorbell, without the bell.
//!
//! ```text
//! sleeper                         ringer
//! ───────                         ──────
//! sleeping = true                 push into a ring
//! fence(SeqCst)                   fence(SeqCst)
//! look into every ring again      sleeping?  → false, write the eventfd
//! wait on the eventfd
//! ```
//!
//! The two fences make it impossible that the sleeper misses the push *and* the ringer misses the
//! flag: one of them comes first in the single order of all SeqCst fences. `tests/loom` compiles
//! this very file against a model of the memory and tries every interleaving.

use super::atomic::{AtomicBool, Ordering, fence};

/// Whether the owner of a doorbell sleeps. One sleeper, any number of ringers.
#[derive(Debug)]
pub(super) struct SleepFlag {
    sleeping: AtomicBool,
    /// Written before `sleeping` is raised, and so seen by whoever sees that.
    soundly: AtomicBool,
}

impl SleepFlag {
    /// Of an owner that is awake.
    pub(super) fn new() -> Self {
        Self { sleeping: AtomicBool::new(false), soundly: AtomicBool::new(false) }
    }

    /// Sleeper: from here on, whoever has pushed will ring, or the push is seen by a look that
    /// follows; if it sleeps soundly, only whoever pushes what cannot wait.
    pub(super) fn about_to_sleep(&self, soundly: bool) {
        self.soundly.store(soundly, Ordering::Relaxed);
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Sleeper: awake again; ringers need not ring.
    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Ringer, after its push: whether to ring. Of several ringers one is told to.
    pub(super) fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.wakes()
    }

    /// Ringer, after a push that can wait: whether to ring.
    pub(super) fn must_nudge(&self) -> bool {
        fence(Ordering::SeqCst);
        !self.soundly.load(Ordering::Relaxed) && self.wakes()
    }

    fn wakes(&self) -> bool {
        self.sleeping.load(Ordering::Relaxed)
            && self
                .sleeping
                .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }
}
