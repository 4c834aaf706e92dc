//! Connecting: at the start, again after a churn, and over and over in a storm.

use std::collections::VecDeque;

use serde::Serialize;

use crate::clock::now_ns;
use crate::histogram::{Histogram, Percentiles};

/// Connections that have been asked for.
#[derive(Debug, Default)]
pub(super) struct Dialer {
    queue: VecDeque<u32>,
    under_way: usize,
    job: Option<Job>,
}

#[derive(Debug)]
struct Job {
    word: &'static str,
    started_ns: u64,
    /// Connections per second; 0: as fast as the window allows.
    rate: u64,
    begun: u64,
    opened: u64,
    failed: u64,
    /// Connections of a storm that have not been asked for yet.
    again: u64,
    is_storm: bool,
    handshakes: Histogram,
}

/// How it went.
#[derive(Debug, Serialize)]
pub(super) struct Dialed {
    /// The word that asked for it.
    pub(super) dialed: &'static str,
    /// Sessions that came up.
    pub(super) opened: u64,
    /// Those that did not.
    pub(super) failed: u64,
    /// From the first to the last, ns.
    pub(super) elapsed_ns: u64,
    /// From the connect to the whole answer, µs.
    pub(super) handshake_us: Percentiles,
}

impl Dialer {
    /// Asks for connections of these sessions.
    pub(super) fn start(&mut self, word: &'static str, sessions: Vec<u32>, rate: u64) {
        self.queue = sessions.into();
        self.job = Some(Job {
            word,
            started_ns: now_ns(),
            rate,
            begun: 0,
            opened: 0,
            failed: 0,
            again: 0,
            is_storm: false,
            handshakes: Histogram::default(),
        });
    }

    /// The same, but each session is closed when it is up, and up and down again until there were
    /// `total` in all.
    pub(super) fn storm(&mut self, sessions: Vec<u32>, total: u64) {
        let again = total.saturating_sub(sessions.len() as u64);
        self.start("storm", sessions, 0);
        if let Some(job) = &mut self.job {
            (job.again, job.is_storm) = (again, true);
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.job.is_some()
    }

    /// The next session to connect, if it is time and the window has room.
    pub(super) fn next(&mut self, window: usize) -> Option<u32> {
        let job = self.job.as_mut()?;
        if self.under_way >= window {
            return None;
        }
        if job.rate > 0 {
            let due = (now_ns() - job.started_ns) as u128 * u128::from(job.rate) / 1_000_000_000;
            if u128::from(job.begun) > due {
                return None;
            }
        }
        let next = self.queue.pop_front()?;
        job.begun += 1;
        self.under_way += 1;
        Some(next)
    }

    /// A session is up. Returns whether it is to go down again.
    pub(super) fn opened(&mut self, index: u32, began_ns: u64) -> bool {
        self.under_way -= 1;
        let Some(job) = &mut self.job else { return false };
        job.opened += 1;
        job.handshakes.record(now_ns() - began_ns);
        if job.is_storm && job.again > 0 {
            job.again -= 1;
            self.queue.push_back(index);
        }
        job.is_storm
    }

    /// A session did not come up.
    pub(super) fn failed(&mut self) {
        self.under_way -= 1;
        if let Some(job) = &mut self.job {
            job.failed += 1;
        }
    }

    /// The outcome, once all have come up or failed.
    pub(super) fn finished(&mut self) -> Option<Dialed> {
        if !self.queue.is_empty() || self.under_way > 0 {
            return None;
        }
        let job = self.job.take()?;
        Some(Dialed {
            dialed: job.word,
            opened: job.opened,
            failed: job.failed,
            elapsed_ns: now_ns() - job.started_ns,
            handshake_us: job.handshakes.percentiles(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storm_goes_on_until_its_total() {
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
    fn window_and_failures() {
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
