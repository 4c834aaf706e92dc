//! What the client counts.

use serde::Serialize;

use crate::histogram::{Histogram, Percentiles};
use crate::journey::Arrival;

/// Counts since the last report.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) messages: u64,
    pub(super) gaps: u64,
    pub(super) duplicates: u64,
    pub(super) reordered: u64,
    pub(super) unstamped: u64,
    pub(super) pings: u64,
    pub(super) closed: u64,
    pub(super) refused: u64,
    pub(super) bytes: u64,
    pub(super) latency: Histogram,
    pub(super) first_ns: Option<u64>,
    pub(super) last_ns: u64,
    /// Each message, if that is wanted.
    pub(super) arrivals: Option<Vec<Arrival>>,
}

/// The same, to be printed.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Sessions that are open.
    pub(super) open: usize,
    /// Messages received.
    pub(super) messages: u64,
    /// Messages that never came although a later one of the same session did.
    pub(super) gaps: u64,
    /// Messages that came again at once.
    pub(super) duplicates: u64,
    /// Messages that came after a later one.
    pub(super) reordered: u64,
    /// Messages without a stamp.
    pub(super) unstamped: u64,
    /// Pings answered.
    pub(super) pings: u64,
    /// Sessions that the server ended.
    pub(super) closed: u64,
    /// Connections that did not become sessions.
    pub(super) refused: u64,
    /// Bytes read.
    pub(super) bytes: u64,
    /// From the first to the last message, ns.
    pub(super) span_ns: u64,
    /// From the intended moment of injection to the read, µs.
    pub(super) latency_us: Percentiles,
}

impl Tally {
    pub(super) fn report(&self, open: usize) -> Report {
        Report {
            open,
            messages: self.messages,
            gaps: self.gaps,
            duplicates: self.duplicates,
            reordered: self.reordered,
            unstamped: self.unstamped,
            pings: self.pings,
            closed: self.closed,
            refused: self.refused,
            bytes: self.bytes,
            span_ns: self.first_ns.map_or(0, |first| self.last_ns - first),
            latency_us: self.latency.percentiles(),
        }
    }

    /// Places a sequence number after the last one of its session (0: none known yet).
    pub(super) fn order(&mut self, last: &mut u32, sequence: u32) {
        if *last == 0 || sequence == *last + 1 {
            *last = sequence;
        } else if sequence > *last {
            self.gaps += u64::from(sequence - *last - 1);
            *last = sequence;
        } else if sequence == *last {
            self.duplicates += 1;
        } else {
            self.reordered += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_apart() {
        let mut tally = Tally::default();
        let mut last = 0;
        for sequence in [5, 6, 9, 9, 7, 10] {
            tally.order(&mut last, sequence);
        }
        assert_eq!((tally.gaps, tally.duplicates, tally.reordered, last), (2, 1, 1, 10));
    }
}
