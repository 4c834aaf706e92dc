//! Waiting for a condition instead of for a time.

use std::time::{Duration, Instant};

/// How long a test waits for what must happen. Reached only when it never happens: no test measures
/// time with it, so it is far longer than any machine needs.
pub const SOON: Duration = Duration::from_secs(120);
/// Between two looks at something that cannot wake us (a page, a file, another process).
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks until `condition` gives something; fails with `what` after `limit`.
#[track_caller]
pub fn until<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}
