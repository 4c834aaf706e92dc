//! Rate limit for the log lines of an outage: one line when it begins, then lines at growing
//! intervals with a count of the failures, and one line at recovery.
//!
//! ```text
//!   failed  failed …            failed             failed                   succeeded
//!     │       ·  ·  · · · · · · · │ · · · · · · · · · │ · · · · · · · · · · · · │
//!   first                  next line: count,   next line: after twice      recovery line:
//!   line                   duration            the interval                duration
//! ```
//!
//! Flapping causes no more lines: an outage that begins and ends before the next line is due is
//! only counted. Time is an argument. Callers count failures in their own metrics.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

/// Interval between the first line and the second; doubles with each line.
const INTERVAL_MIN: Duration = Duration::from_secs(10);
/// Longest interval between two lines.
const INTERVAL_MAX: Duration = Duration::from_secs(600);

/// Content of a log line about an outage. `Display` writes the end of that line: nothing for the
/// first failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutageReport {
    /// Failures since the last line, this one included.
    pub failures: u64,
    /// Time since the first failure.
    pub duration: Duration,
}

impl fmt::Display for OutageReport {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.failures == 1 && self.duration.is_zero() {
            return Ok(());
        }
        let seconds = self.duration.as_secs();
        match self.failures {
            1 => write!(out, " (for {seconds} s)"),
            failures => {
                write!(out, " (for {seconds} s, {failures} failures since the last report)")
            }
        }
    }
}

/// Content of the log line about a recovery. `Display` writes the end of that line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Time from the first failure to the recovery.
    pub duration: Duration,
}

impl fmt::Display for Recovery {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.duration.as_secs() {
            0 => write!(out, "after {} ms", self.duration.as_millis()),
            seconds => write!(out, "after {seconds} s"),
        }
    }
}

#[derive(Debug, Default)]
struct OutageState {
    /// The first failure of the current outage.
    since: Option<Instant>,
    last_failure: Option<Instant>,
    /// Whether the current outage was reported.
    reported: bool,
    /// Failures since the last report.
    unreported: u64,
    /// No report before this time.
    report_due: Option<Instant>,
    /// Time until the next report. Set by the first failure.
    interval: Duration,
}

/// Decides which failures and recoveries of one dependency are logged. Threads may share it.
#[derive(Debug, Default)]
pub struct Outage {
    /// Lets the frequent successes skip the lock.
    is_failing: AtomicBool,
    state: Mutex<OutageState>,
}

impl Outage {
    fn state(&self) -> MutexGuard<'_, OutageState> {
        self.state.lock().expect("no holder panics")
    }

    /// An operation failed. `None`: do not log it now.
    pub fn failed(&self, now: Instant) -> Option<OutageReport> {
        let mut state = self.state();
        // Success is not always reported: no failure for an interval counts as recovery.
        if state.last_failure.is_some_and(|last| now >= last + state.interval) {
            state.since = None;
            state.reported = false;
        }
        let is_new = state.since.is_none();
        let since = *state.since.get_or_insert(now);
        self.is_failing.store(true, Ordering::Relaxed);
        state.last_failure = Some(now);
        state.unreported += 1;
        state.interval = match state.report_due {
            Some(due) if now < due => return None,
            // No failure for a whole interval: older failures no longer count.
            Some(due) if is_new && now >= due + state.interval => {
                state.unreported = 1;
                INTERVAL_MIN
            }
            Some(_) => (2 * state.interval).min(INTERVAL_MAX),
            None => INTERVAL_MIN,
        };
        state.report_due = Some(now + state.interval);
        state.reported = true;
        let failures = std::mem::take(&mut state.unreported);
        Some(OutageReport { failures, duration: now.duration_since(since) })
    }

    /// An operation succeeded. `None`: do not log it, the outage was not reported or there was
    /// none.
    pub fn succeeded(&self, now: Instant) -> Option<Recovery> {
        self.succeeded_after(Duration::ZERO, now)
    }

    /// An operation succeeded while others may still fail: counts as recovery once nothing has
    /// failed for `calm`.
    pub fn succeeded_after(&self, calm: Duration, now: Instant) -> Option<Recovery> {
        if !self.is_failing.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state();
        if state.last_failure.is_some_and(|last| now < last + calm) {
            return None;
        }
        self.is_failing.store(false, Ordering::Relaxed);
        let since = state.since.take()?;
        let reported = std::mem::take(&mut state.reported);
        reported.then(|| Recovery { duration: now.duration_since(since) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reports of `outage` while it fails every half second: second and failures.
    fn reports(outage: &Outage, from: Instant, seconds: u64) -> Vec<(u64, u64)> {
        (0..2 * seconds)
            .map(|half| from + Duration::from_millis(500 * half))
            .filter_map(|now| Some(((now - from).as_secs(), outage.failed(now)?.failures)))
            .collect()
    }

    #[test]
    fn outage_is_reported_at_once_then_less_often_and_its_end_once() {
        let (outage, start) = (Outage::default(), Instant::now());
        let seen = reports(&outage, start, 3_600);
        let expected = [(0, 1), (10, 20), (30, 40), (70, 80), (150, 160), (310, 320), (630, 640)];
        assert_eq!(seen[..7], expected);
        assert_eq!(seen[7..], [(1_230, 1_200), (1_830, 1_200), (2_430, 1_200), (3_030, 1_200)]);
        let end = start + Duration::from_secs(3_600);
        assert_eq!(outage.succeeded(end), Some(Recovery { duration: Duration::from_secs(3_600) }));
        assert_eq!(outage.succeeded(end), None);
    }

    #[test]
    fn next_outage_after_a_calm_time_is_reported_at_once() {
        let (outage, start) = (Outage::default(), Instant::now());
        assert_eq!(reports(&outage, start, 40).len(), 3);
        assert!(outage.succeeded(start + Duration::from_secs(40)).is_some());
        let later = start + Duration::from_secs(200);
        assert_eq!(reports(&outage, later, 40), [(0, 1), (10, 20), (30, 40)]);
    }

    #[test]
    fn flapping_causes_no_more_reports() {
        let (outage, start) = (Outage::default(), Instant::now());
        let mut reports = 0;
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            reports += usize::from(outage.failed(now).is_some());
            reports += usize::from(outage.succeeded(now + Duration::from_millis(500)).is_some());
        }
        assert_eq!(reports, 12, "six outages and six recoveries");
    }

    #[test]
    fn success_of_a_part_is_not_a_recovery() {
        let (outage, start, calm) = (Outage::default(), Instant::now(), Duration::from_secs(5));
        for second in 0..100 {
            let now = start + Duration::from_secs(second);
            let _ = outage.failed(now);
            assert_eq!(outage.succeeded_after(calm, now + Duration::from_millis(500)), None);
        }
        let end = start + Duration::from_secs(104);
        assert_eq!(outage.succeeded_after(calm, end), Some(Recovery { duration: end - start }));
    }

    #[test]
    fn failures_far_apart_are_separate_outages() {
        let (outage, start) = (Outage::default(), Instant::now());
        for hour in 0..5 {
            let report = outage.failed(start + Duration::from_secs(3_600 * hour)).unwrap();
            assert_eq!(report.to_string(), "");
        }
    }

    #[test]
    fn duration_and_count_are_added_from_the_second_report_on() {
        let (outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.failed(start).unwrap().to_string(), "");
        assert_eq!(outage.failed(start + Duration::from_secs(9)), None);
        let again = outage.failed(start + Duration::from_secs(12)).unwrap();
        assert_eq!(again.to_string(), " (for 12 s, 2 failures since the last report)");
        let recovery = outage.succeeded(start + Duration::from_secs(75)).unwrap();
        assert_eq!(recovery.to_string(), "after 75 s");
        let short = Recovery { duration: Duration::from_millis(40) };
        assert_eq!(short.to_string(), "after 40 ms");
    }
}
