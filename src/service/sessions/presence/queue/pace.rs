//! Whether the other side is there at all, from how the last calls went.

use std::time::Duration;

use tokio::time::Instant;

use crate::service::runtime::backoff::Backoff;

/// Failures in a row after which the whole queue slows down to one call at a time.
pub(super) const FAILURES_IN_ROW_MAX: u32 = 8;
/// Delays between such single calls.
pub(super) const PROBE_BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(200), Duration::from_secs(5));

/// What may be begun now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallPermit {
    /// A call.
    Go,
    /// None before the outcome of the one under way.
    AfterOutcome,
    /// None before then.
    At(Instant),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    failures_in_row: u32,
    probe_at: Option<Instant>,
}

impl CircuitBreaker {
    /// Takes the outcome of a call in. `chance`: 0 to 1.
    pub(super) fn ended(&mut self, failed: bool, chance: f64, now: Instant) {
        if !failed {
            *self = Self::default();
            return;
        }
        self.failures_in_row = self.failures_in_row.saturating_add(1);
        if let Some(over) = self.failures_in_row.checked_sub(FAILURES_IN_ROW_MAX) {
            self.probe_at = Some(now + PROBE_BACKOFF.delay(over, chance));
        }
    }

    /// The other side is known to be away.
    pub(super) fn is_away(&self) -> bool {
        self.failures_in_row >= FAILURES_IN_ROW_MAX
    }

    /// Whether a call may begin beside so many that are under way.
    pub(super) fn leave(&self, under_way: usize, now: Instant) -> CallPermit {
        match self.probe_at {
            _ if !self.is_away() => CallPermit::Go,
            _ if under_way > 0 => CallPermit::AfterOutcome,
            Some(at) if at > now => CallPermit::At(at),
            Some(_) | None => CallPermit::Go,
        }
    }
}
