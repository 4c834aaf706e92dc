//! Slows the queue down while presence is unreachable.

use std::time::Duration;

use tokio::time::Instant;

use crate::service::runtime::backoff::Backoff;

/// Failures in a row that open the circuit breaker.
pub(super) const FAILURES_IN_ROW_MAX: u32 = 8;
/// Delays between probes while it is open.
pub(super) const PROBE_BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(200), Duration::from_secs(5));

/// Whether a call may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallPermit {
    Now,
    /// Only after the outcome of the probe in flight.
    AfterOutcome,
    NotBefore(Instant),
}

/// Circuit breaker. Opens after [`FAILURES_IN_ROW_MAX`] failures in a row, then permits one call at
/// a time as a probe. The first success closes it.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    failures_in_row: u32,
    probe_at: Option<Instant>,
}

impl CircuitBreaker {
    /// Takes the outcome of a call. `chance`: 0 to 1.
    pub(super) fn record(&mut self, failed: bool, chance: f64, now: Instant) {
        if !failed {
            *self = Self::default();
            return;
        }
        self.failures_in_row = self.failures_in_row.saturating_add(1);
        if let Some(retry) = self.failures_in_row.checked_sub(FAILURES_IN_ROW_MAX) {
            self.probe_at = Some(now + PROBE_BACKOFF.delay(retry, chance));
        }
    }

    /// Presence is known to be unreachable.
    pub(super) fn is_open(&self) -> bool {
        self.failures_in_row >= FAILURES_IN_ROW_MAX
    }

    /// Whether another call may start while `in_flight` calls are in flight.
    pub(super) fn permit(&self, in_flight: usize, now: Instant) -> CallPermit {
        match self.probe_at {
            _ if !self.is_open() => CallPermit::Now,
            _ if in_flight > 0 => CallPermit::AfterOutcome,
            Some(at) if at > now => CallPermit::NotBefore(at),
            Some(_) | None => CallPermit::Now,
        }
    }
}
