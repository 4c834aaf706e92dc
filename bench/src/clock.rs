//! The monotonic clock, which is the same for all processes of a machine.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Difference between `CLOCK_REALTIME` and [`now_ns`], ns.
pub fn unix_offset_ns() -> u64 {
    let unix = clock_gettime(ClockId::Realtime);
    let unix_ns = unix.tv_sec as u64 * 1_000_000_000 + unix.tv_nsec as u64;
    unix_ns.saturating_sub(now_ns())
}
