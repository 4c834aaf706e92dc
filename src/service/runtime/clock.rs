//! The clock of timers.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// When the process first asked, on both clocks.
static STARTED: LazyLock<(Instant, Duration)> = LazyLock::new(|| {
    (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
});

/// The current time for deadlines and ages within this process, ms: the Unix time at the start and what has passed
/// since. It neither jumps nor goes back when the clock of the machine is set.
pub fn steady_ms() -> u64 {
    let (instant, unix) = *STARTED;
    (unix + instant.elapsed()).as_millis() as u64
}
