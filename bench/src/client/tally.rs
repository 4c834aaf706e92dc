//! Counts of the client.

use serde::Serialize;

use crate::journey::Arrival;
use crate::latency::{Latencies, Percentiles};

/// Counts since the last reset. Printed as part of a [`TallyReport`].
#[derive(Debug, Default, Serialize)]
pub(super) struct Tally {
    /// Messages received.
    pub(super) messages: u64,
    /// Messages that did not arrive before a later one of the same session.
    pub(super) gaps: u64,
    /// Messages received twice in a row.
    pub(super) duplicates: u64,
    /// Messages received after a later one.
    pub(super) reordered: u64,
    /// Messages that continue their conversation; only of sessions with several conversations.
    pub(super) distinct: u64,
    /// Messages that such a session had already.
    pub(super) repeated: u64,
    /// Cursors received.
    pub(super) cursors: u64,
    /// Cursors that the server could not use.
    pub(super) expired: u64,
    /// Messages without a stamp.
    pub(super) unstamped: u64,
    /// Pings answered.
    pub(super) pings: u64,
    /// Sessions that the server closed.
    pub(super) closed: u64,
    /// Failed handshakes.
    pub(super) refused: u64,
    /// Bytes read.
    pub(super) bytes: u64,
    #[serde(skip)]
    pub(super) latency: Latencies,
    #[serde(skip)]
    pub(super) first_ns: Option<u64>,
    #[serde(skip)]
    pub(super) last_ns: u64,
    #[serde(skip)]
    pub(super) last_cursor_ns: u64,
    /// Every message, if tracing.
    #[serde(skip)]
    pub(super) arrivals: Option<Vec<Arrival>>,
}

/// A printed [`Tally`].
#[derive(Debug, Serialize)]
pub(super) struct TallyReport<'a> {
    /// Open sessions.
    open: usize,
    #[serde(flatten)]
    tally: &'a Tally,
    /// From the first to the last message, ns.
    span_ns: u64,
    /// The clock at the last message and the last cursor, ns.
    last_message_ns: u64,
    last_cursor_ns: u64,
    /// From the time at which the event was due to the read, µs.
    latency_us: Percentiles,
}

impl Tally {
    pub(super) fn report(&self, open: usize) -> TallyReport<'_> {
        TallyReport {
            open,
            tally: self,
            span_ns: self.first_ns.map_or(0, |first| self.last_ns - first),
            last_message_ns: self.last_ns,
            last_cursor_ns: self.last_cursor_ns,
            latency_us: self.latency.percentiles(),
        }
    }

    /// Counts a sequence number against the last one of its session (0: none yet).
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
    fn gaps_duplicates_and_disorder_are_counted_apart() {
        let mut tally = Tally::default();
        let mut last = 0;
        for sequence in [5, 6, 9, 9, 7, 10] {
            tally.order(&mut last, sequence);
        }
        assert_eq!((tally.gaps, tally.duplicates, tally.reordered, last), (2, 1, 1, 10));
    }
}
