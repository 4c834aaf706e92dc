//! What the log says of something that is away: once when it goes, then at growing intervals and with
//! a count, and once when it is back.
//!
//! ```text
//!   failed  failed …            failed             failed                     works
//!     │       ·  ·  · · · · · · · │ · · · · · · · · · │ · · · · · · · · · · · · │
//!   first                  again: how often,   again: twice as long        back: after
//!   line                   for how long        after the one before        how long
//! ```
//!
//! Something that comes and goes is told of no more often: what was away and back before the next line
//! is due is only counted. Time is an argument; the callers count in their metrics what fails.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

/// Between the first line and the second; doubles each time.
const QUIET_MIN: Duration = Duration::from_secs(10);
/// Longest time without a line.
const QUIET_MAX: Duration = Duration::from_secs(600);

/// What there is to say of a failure. Shown, it goes behind the words of the line: nothing for the
/// first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Away {
    /// Failures since the last line, this one included.
    pub failures: u64,
    /// How long it has been away.
    pub lasting: Duration,
}

impl fmt::Display for Away {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.failures == 1 && self.lasting.is_zero() {
            return Ok(());
        }
        let seconds = self.lasting.as_secs();
        match self.failures {
            1 => write!(out, " (for {seconds} s)"),
            failures => {
                write!(out, " (for {seconds} s; {failures} times since the last such line)")
            }
        }
    }
}

/// It is back. Shown, it says after how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Back {
    /// How long it was away.
    pub lasted: Duration,
}

impl fmt::Display for Back {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "after {} s", self.lasted.as_secs())
    }
}

#[derive(Debug)]
struct State {
    away_since: Option<Instant>,
    last: Option<Instant>,
    /// A line told of this time that it is away.
    told: bool,
    /// Failures that no line told of.
    untold: u64,
    /// Before then no further line.
    due: Option<Instant>,
    quiet: Duration,
}

/// See the module. Several threads may share one.
#[derive(Debug)]
pub struct Outage {
    /// What works is asked about often, so that costs no lock.
    is_away: AtomicBool,
    state: Mutex<State>,
}

impl Default for Outage {
    fn default() -> Self {
        let (away_since, last, due) = (None, None, None);
        let state = State { away_since, last, told: false, untold: 0, due, quiet: QUIET_MIN };
        Self { is_away: AtomicBool::new(false), state: Mutex::new(state) }
    }
}

impl Outage {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// It failed, or is still away. `None`: nothing is to be said now.
    pub fn failed(&self, now: Instant) -> Option<Away> {
        let mut state = self.state();
        // Nobody may be there to say that it works: what does not fail for so long does.
        if state.last.is_some_and(|last| now >= last + state.quiet) {
            state.away_since = None;
            state.told = false;
        }
        let is_new = state.away_since.is_none();
        let since = *state.away_since.get_or_insert(now);
        self.is_away.store(true, Ordering::Relaxed);
        state.last = Some(now);
        state.untold += 1;
        state.quiet = match state.due {
            Some(due) if now < due => return None,
            // It was well for as long as it was quiet: what was not told then is no news any more.
            Some(due) if is_new && now >= due + state.quiet => {
                state.untold = 1;
                QUIET_MIN
            }
            Some(_) => (2 * state.quiet).min(QUIET_MAX),
            None => QUIET_MIN,
        };
        state.due = Some(now + state.quiet);
        state.told = true;
        let failures = std::mem::take(&mut state.untold);
        Some(Away { failures, lasting: now.duration_since(since) })
    }

    /// It works. `None`: nothing is to be said, because no line said that it did not.
    pub fn works(&self, now: Instant) -> Option<Back> {
        self.works_after(Duration::ZERO, now)
    }

    /// Part of it works. That is believed when nothing has failed for `calm`.
    pub fn works_after(&self, calm: Duration, now: Instant) -> Option<Back> {
        if !self.is_away.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state();
        if state.last.is_some_and(|last| now < last + calm) {
            return None;
        }
        self.is_away.store(false, Ordering::Relaxed);
        let since = state.away_since.take()?;
        let told = std::mem::take(&mut state.told);
        told.then(|| Back { lasted: now.duration_since(since) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of `outage` while it fails every half second, as seconds and failures told.
    fn lines(outage: &Outage, from: Instant, seconds: u64) -> Vec<(u64, u64)> {
        (0..2 * seconds)
            .map(|half| from + Duration::from_millis(500 * half))
            .filter_map(|now| Some(((now - from).as_secs(), outage.failed(now)?.failures)))
            .collect()
    }

    #[test]
    fn outage_is_told_at_once_then_ever_less_often_and_its_end_once() {
        let (outage, start) = (Outage::default(), Instant::now());
        let told = lines(&outage, start, 3_600);
        let expected = [(0, 1), (10, 20), (30, 40), (70, 80), (150, 160), (310, 320), (630, 640)];
        assert_eq!(told[..7], expected);
        assert_eq!(told[7..], [(1_230, 1_200), (1_830, 1_200), (2_430, 1_200), (3_030, 1_200)]);
        let end = start + Duration::from_secs(3_600);
        assert_eq!(outage.works(end), Some(Back { lasted: Duration::from_secs(3_600) }));
        assert_eq!(outage.works(end), None);
    }

    #[test]
    fn next_outage_after_a_calm_time_is_told_at_once_again() {
        let (outage, start) = (Outage::default(), Instant::now());
        assert_eq!(lines(&outage, start, 40).len(), 3);
        assert!(outage.works(start + Duration::from_secs(40)).is_some());
        let later = start + Duration::from_secs(200);
        assert_eq!(lines(&outage, later, 40), [(0, 1), (10, 20), (30, 40)]);
    }

    #[test]
    fn what_comes_and_goes_is_told_of_no_more_often() {
        let (outage, start) = (Outage::default(), Instant::now());
        let mut told = 0;
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            told += usize::from(outage.failed(now).is_some());
            told += usize::from(outage.works(now + Duration::from_millis(500)).is_some());
        }
        assert_eq!(told, 12, "six times that it is away, and back");
    }

    #[test]
    fn part_that_works_is_not_taken_for_the_whole() {
        let (outage, start, calm) = (Outage::default(), Instant::now(), Duration::from_secs(5));
        for second in 0..100 {
            let now = start + Duration::from_secs(second);
            let _ = outage.failed(now);
            assert_eq!(outage.works_after(calm, now + Duration::from_millis(500)), None);
        }
        let end = start + Duration::from_secs(104);
        assert_eq!(outage.works_after(calm, end), Some(Back { lasted: end - start }));
    }

    #[test]
    fn failures_far_apart_are_no_outage() {
        let (outage, start) = (Outage::default(), Instant::now());
        for hour in 0..5 {
            let away = outage.failed(start + Duration::from_secs(3_600 * hour)).unwrap();
            assert_eq!(away.to_string(), "");
        }
    }

    #[test]
    fn words_are_added_from_the_second_line_on() {
        let (outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.failed(start).unwrap().to_string(), "");
        assert_eq!(outage.failed(start + Duration::from_secs(9)), None);
        let again = outage.failed(start + Duration::from_secs(12)).unwrap();
        assert_eq!(again.to_string(), " (for 12 s; 2 times since the last such line)");
        let back = outage.works(start + Duration::from_secs(75)).unwrap();
        assert_eq!(back.to_string(), "after 75 s");
    }
}
