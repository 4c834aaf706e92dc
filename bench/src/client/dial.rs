//! Connecting: at the start, after a churn, and repeatedly in a storm.

use std::collections::VecDeque;

use serde::Serialize;

use crate::clock::now_ns;
use crate::latency::{Latencies, Percentiles};

/// The queue of sessions to connect.
#[derive(Debug, Default)]
pub(super) struct Dialer {
    queue: VecDeque<u32>,
    in_flight: usize,
    run: Option<DialRun>,
}

/// A requested series of connects.
#[derive(Debug, Default)]
struct DialRun {
    word: &'static str,
    started_ns: u64,
    /// Connections per second; 0: as fast as the window allows.
    rate: u64,
    begun: u64,
    opened: u64,
    failed: u64,
    /// Connects of a storm that are not queued yet.
    again: u64,
    is_storm: bool,
    handshakes: Latencies,
}

/// Result of a [`DialRun`].
#[derive(Debug, Serialize)]
pub(super) struct DialReport {
    /// The word that requested it.
    pub(super) dialed: &'static str,
    /// Sessions opened.
    pub(super) opened: u64,
    /// Failed handshakes.
    pub(super) failed: u64,
    /// From the first connect to the last answer, ns.
    pub(super) elapsed_ns: u64,
    /// From connect to the complete answer, µs.
    pub(super) handshake_us: Percentiles,
}

impl Dialer {
    /// Requests connects of these sessions.
    pub(super) fn start(&mut self, word: &'static str, sessions: Vec<u32>, rate: u64) {
        self.queue = sessions.into();
        self.run = Some(DialRun { word, started_ns: now_ns(), rate, ..DialRun::default() });
    }

    /// Requests a storm: each session is closed once it is open, and connected again, until there were
    /// `total` connects.
    pub(super) fn storm(&mut self, sessions: Vec<u32>, total: u64) {
        let again = total.saturating_sub(sessions.len() as u64);
        self.start("storm", sessions, 0);
        if let Some(run) = &mut self.run {
            (run.again, run.is_storm) = (again, true);
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.run.is_some()
    }

    /// The next session to connect, if the rate and the window allow it.
    pub(super) fn next(&mut self, window: usize) -> Option<u32> {
        let run = self.run.as_mut()?;
        if self.in_flight >= window {
            return None;
        }
        if run.rate > 0 {
            let due = (now_ns() - run.started_ns) as u128 * u128::from(run.rate) / 1_000_000_000;
            if u128::from(run.begun) > due {
                return None;
            }
        }
        let next = self.queue.pop_front()?;
        run.begun += 1;
        self.in_flight += 1;
        Some(next)
    }

    /// A session is open. Returns whether it must be closed again.
    pub(super) fn opened(&mut self, index: u32, began_ns: u64) -> bool {
        self.in_flight -= 1;
        let Some(run) = &mut self.run else { return false };
        run.opened += 1;
        run.handshakes.record(now_ns() - began_ns);
        if run.is_storm && run.again > 0 {
            run.again -= 1;
            self.queue.push_back(index);
        }
        run.is_storm
    }

    /// A handshake failed.
    pub(super) fn failed(&mut self) {
        self.in_flight -= 1;
        if let Some(run) = &mut self.run {
            run.failed += 1;
        }
    }

    /// The result, once all have opened or failed.
    pub(super) fn finished(&mut self) -> Option<DialReport> {
        if !self.queue.is_empty() || self.in_flight > 0 {
            return None;
        }
        let run = self.run.take()?;
        Some(DialReport {
            dialed: run.word,
            opened: run.opened,
            failed: run.failed,
            elapsed_ns: now_ns() - run.started_ns,
            handshake_us: run.handshakes.percentiles(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storm_ends_at_its_total() {
        let mut dialer = Dialer::default();
        dialer.storm(vec![0, 1], 5);
        let mut seen = Vec::new();
        while let Some(index) = dialer.next(1) {
            seen.push(index);
            assert!(dialer.opened(index, now_ns()));
        }
        assert_eq!(seen, [0, 1, 0, 1, 0]);
        assert_eq!(dialer.finished().unwrap().opened, 5);
    }

    #[test]
    fn window_limits_the_handshakes_and_failures_are_counted() {
        let mut dialer = Dialer::default();
        dialer.start("connect", vec![3, 4], 0);
        assert_eq!((dialer.next(1), dialer.next(1)), (Some(3), None));
        dialer.failed();
        assert_eq!(dialer.next(1), Some(4));
        assert!(dialer.finished().is_none());
        assert!(!dialer.opened(4, now_ns()));
        let dialed = dialer.finished().unwrap();
        assert_eq!((dialed.opened, dialed.failed), (1, 1));
    }
}
