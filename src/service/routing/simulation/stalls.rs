//! The stall of a process: for a while it does nothing, and does not know it.

use super::GROUP_TIMEOUT_MS;

/// Since when a process stalls, and until when, ms; `None`: it runs.
#[derive(Debug, Default)]
pub(super) struct Stall(Option<(u64, u64)>);

impl Stall {
    pub(super) fn begin(&mut self, now_ms: u64, for_ms: u64) {
        self.0.get_or_insert((now_ms, now_ms + for_ms));
    }

    pub(super) fn end(&mut self) {
        self.0 = None;
    }

    pub(super) fn is_on(&self, now_ms: u64) -> bool {
        self.0.is_some_and(|(_, until_ms)| now_ms < until_ms)
    }

    /// For how long the process has stalled until now, ms.
    pub(super) fn so_far(&self, now_ms: u64) -> u64 {
        self.0.map_or(0, |(since_ms, until_ms)| now_ms.min(until_ms) - since_ms)
    }

    /// Whether the group has removed the node while it stalled.
    pub(super) fn was_removed(&self, now_ms: u64) -> bool {
        self.so_far(now_ms) > GROUP_TIMEOUT_MS
    }
}
