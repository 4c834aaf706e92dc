//! Whether what waits for Redis gets on, so that waiting for it has an end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// A batch that takes longer stands still. It is also the longest time for which a Redis that stops
/// holds up a partition, once.
const BATCH_WITHIN: Duration = Duration::from_millis(250);

/// When something got on last. Written by the task that hands over, read by the routers.
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    /// Milliseconds after `since`.
    moved_ms: AtomicU64,
    /// How the last batch ended.
    went_well: AtomicBool,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, moved_ms: AtomicU64::new(0), went_well: AtomicBool::new(true) }
    }

    /// A batch is begun. After one that failed that is no progress yet.
    pub(super) fn begins(&self, now: Instant) {
        if self.went_well.load(Ordering::Relaxed) {
            self.moved(now);
        }
    }

    /// It has ended.
    pub(super) fn ends(&self, well: bool, now: Instant) {
        self.went_well.store(well, Ordering::Relaxed);
        if well {
            self.moved(now);
        }
    }

    /// Whether it is worth waiting for.
    pub(super) fn gets_on(&self, now: Instant) -> bool {
        let moved = Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
        self.went_well.load(Ordering::Relaxed)
            && now.duration_since(self.since) < moved + BATCH_WITHIN
    }

    fn moved(&self, now: Instant) {
        let ms = now.duration_since(self.since).as_millis();
        self.moved_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_waited_for_and_what_stands_still_or_fails_is_not() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let pace = Pace::new(start);
        pace.begins(after(10_000));
        assert!(pace.gets_on(after(10_249)), "a batch under way");
        assert!(!pace.gets_on(after(10_250)), "for too long");
        pace.ends(true, after(10_300));
        assert!(pace.gets_on(after(10_301)), "it went well");
        pace.begins(after(10_400));
        pace.ends(false, after(10_410));
        assert!(!pace.gets_on(after(10_411)), "it failed");
        pace.begins(after(10_420));
        assert!(!pace.gets_on(after(10_421)), "and the next is no better until it ends");
        pace.ends(true, after(10_430));
        assert!(pace.gets_on(after(10_431)));
    }
}
