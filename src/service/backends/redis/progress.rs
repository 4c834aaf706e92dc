//! Detects whether the hand-off to Redis progresses. This bounds how long routers wait for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// A batch that takes longer counts as stalled. A Redis that hangs therefore holds up a partition
/// once, for at most this time.
const STALLED_AFTER: Duration = Duration::from_millis(250);

/// When the hand-off last progressed. Written by its task, read by the routers.
#[derive(Debug)]
pub(super) struct Progress {
    start: Instant,
    /// Last progress, milliseconds after `start`.
    progressed_ms: AtomicU64,
    /// Whether the last batch succeeded.
    succeeded: AtomicBool,
}

impl Progress {
    pub(super) fn new(now: Instant) -> Self {
        Self { start: now, progressed_ms: AtomicU64::new(0), succeeded: AtomicBool::new(true) }
    }

    /// A batch has started. After a failed batch, this is no progress yet.
    pub(super) fn batch_started(&self, now: Instant) {
        if self.succeeded.load(Ordering::Relaxed) {
            self.progressed(now);
        }
    }

    /// A batch has ended.
    pub(super) fn batch_ended(&self, succeeded: bool, now: Instant) {
        self.succeeded.store(succeeded, Ordering::Relaxed);
        if succeeded {
            self.progressed(now);
        }
    }

    /// Whether waiting for room makes sense.
    pub(super) fn is_progressing(&self, now: Instant) -> bool {
        let progressed = Duration::from_millis(self.progressed_ms.load(Ordering::Relaxed));
        self.succeeded.load(Ordering::Relaxed)
            && now.duration_since(self.start) < progressed + STALLED_AFTER
    }

    fn progressed(&self, now: Instant) {
        let ms = now.duration_since(self.start).as_millis();
        self.progressed_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalled_or_failed_batch_is_no_progress() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let progress = Progress::new(start);
        progress.batch_started(after(10_000));
        assert!(progress.is_progressing(after(10_249)), "a batch is in flight");
        assert!(!progress.is_progressing(after(10_250)), "it takes too long");
        progress.batch_ended(true, after(10_300));
        assert!(progress.is_progressing(after(10_301)), "it succeeded");
        progress.batch_started(after(10_400));
        progress.batch_ended(false, after(10_410));
        assert!(!progress.is_progressing(after(10_411)), "it failed");
        progress.batch_started(after(10_420));
        assert!(!progress.is_progressing(after(10_421)), "the next one counts when it has ended");
        progress.batch_ended(true, after(10_430));
        assert!(progress.is_progressing(after(10_431)));
    }
}
