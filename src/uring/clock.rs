//! The clocks of a ring, read once per [`Kernel::enter`](super::Kernel::enter).

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Added to the monotonic time, so that one day can be subtracted early in the process's life.
pub(super) const EPOCH_MS: u64 = 24 * 60 * 60 * 1000;

/// The epoch of all rings, less [`EPOCH_MS`]: the limits that shards share compare their times.
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Monotonic and Unix time as of the last [`Clock::read`].
#[derive(Debug)]
pub(super) struct Clock {
    pub(super) now_ms: u64,
    pub(super) unix_ms: u64,
}

impl Clock {
    pub(super) fn new() -> Self {
        let mut clock = Self { now_ms: 0, unix_ms: 0 };
        clock.read();
        clock
    }

    pub(super) fn read(&mut self) {
        self.now_ms = monotonic_ms();
        // A clock set before 1970 reads as 1970.
        self.unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis);
    }

    /// Time left until `until_ms`; `None` if that is past.
    pub(super) fn until(&self, until_ms: u64) -> Option<Duration> {
        let left_ms = until_ms.saturating_sub(monotonic_ms());
        (left_ms > 0).then(|| Duration::from_millis(left_ms))
    }
}

/// The present time of the clock that all rings read, ms. For limits that the shards share with others.
pub fn monotonic_ms() -> u64 {
    EPOCH_MS + millis(STARTED.elapsed())
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}
