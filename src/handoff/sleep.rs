//! The sleep protocol of a doorbell: the flag that says whether the owner sleeps, without the
//! eventfd.
//!
//! ```text
//! sleeper                         ringer
//! ───────                         ──────
//! sleeping = true                 push into a ring
//! fence(SeqCst)                   fence(SeqCst)
//! check every ring again          sleeping?  → false, write the eventfd
//! wait on the eventfd
//! ```
//!
//! With the two fences it is impossible that the sleeper misses the push *and* the ringer misses
//! the flag: one fence comes first in the single order of all SeqCst fences. `tests/loom` compiles
//! this file against a memory model and tries every interleaving.

use super::atomic::{AtomicBool, Ordering, fence};

/// Whether the owner of a doorbell sleeps. One sleeper, any number of ringers.
#[derive(Debug)]
pub(super) struct SleepFlag {
    sleeping: AtomicBool,
    /// Written before `sleeping` is set, so a thread that sees `sleeping` also sees this.
    soundly: AtomicBool,
}

impl SleepFlag {
    /// The owner is awake.
    pub(super) fn new() -> Self {
        Self { sleeping: AtomicBool::new(false), soundly: AtomicBool::new(false) }
    }

    /// Sleeper: after this call, each pusher rings, or the sleeper's next check sees its push. If
    /// `soundly`, this holds only for pushes that cannot wait.
    pub(super) fn about_to_sleep(&self, soundly: bool) {
        self.soundly.store(soundly, Ordering::Relaxed);
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Sleeper: awake again; nobody needs to ring.
    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Ringer, after its push: whether to ring. Of several ringers, one gets `true`.
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
