//! Messages that come back: a closed loop with a window.

use serde::Serialize;

use crate::clock::now_ns;
use crate::histogram::{Histogram, Percentiles};
use crate::payload::Stamp;

/// An echo run.
#[derive(Debug)]
pub(super) struct Echo {
    bytes: usize,
    started_ns: u64,
    ends_ns: u64,
    /// The session whose turn is next.
    pub(super) turn: usize,
    pub(super) under_way: usize,
    received: u64,
    latency: Histogram,
}

/// How it went.
#[derive(Debug, Serialize)]
pub(super) struct Echoed {
    /// Messages that came back.
    pub(super) echoed: u64,
    /// Processor or wall time is measured over this, ns.
    pub(super) elapsed_ns: u64,
    /// From the send to the read, µs.
    pub(super) latency_us: Percentiles,
}

impl Echo {
    pub(super) fn new(bytes: usize, ms: u64) -> Self {
        let started_ns = now_ns();
        Self {
            bytes,
            started_ns,
            ends_ns: started_ns + ms * 1_000_000,
            turn: 0,
            under_way: 0,
            received: 0,
            latency: Histogram::default(),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        now_ns() >= self.ends_ns
    }

    /// What to send now.
    pub(super) fn payload(&self) -> Vec<u8> {
        let mut payload = vec![b'x'; self.bytes];
        let text = Stamp { sequence: 1, intended_ns: now_ns() }.text();
        if let Some(at) = self.bytes.checked_sub(text.len()) {
            payload[at..].copy_from_slice(text.as_bytes());
        }
        payload
    }

    pub(super) fn came_back(&mut self, payload: &[u8]) {
        self.under_way -= 1;
        self.received += 1;
        if let Some(stamp) = Stamp::find(payload) {
            self.latency.record(now_ns() - stamp.intended_ns);
        }
    }

    pub(super) fn report(&self) -> Echoed {
        Echoed {
            echoed: self.received,
            elapsed_ns: now_ns() - self.started_ns,
            latency_us: self.latency.percentiles(),
        }
    }
}
