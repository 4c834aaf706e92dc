//! Echo runs: a closed loop with a window of messages in flight.

use serde::Serialize;

use crate::clock::now_ns;
use crate::latency::{Latencies, Percentiles};
use crate::payload::Stamp;

/// An echo run.
#[derive(Debug)]
pub(super) struct Echo {
    bytes: usize,
    started_ns: u64,
    ends_ns: u64,
    /// The session that sends next.
    pub(super) turn: usize,
    pub(super) in_flight: usize,
    received: u64,
    latency: Latencies,
}

/// Result of an echo run.
#[derive(Debug, Serialize)]
pub(super) struct EchoReport {
    /// Echoes received.
    pub(super) echoed: u64,
    /// Duration of the run, ns.
    pub(super) elapsed_ns: u64,
    /// From send to read, µs.
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
            in_flight: 0,
            received: 0,
            latency: Latencies::default(),
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        now_ns() >= self.ends_ns
    }

    /// The next payload.
    pub(super) fn payload(&self) -> Vec<u8> {
        let mut payload = vec![b'x'; self.bytes];
        let text = Stamp { sequence: 1, intended_ns: now_ns() }.text();
        if let Some(at) = self.bytes.checked_sub(text.len()) {
            payload[at..].copy_from_slice(text.as_bytes());
        }
        payload
    }

    pub(super) fn receive(&mut self, payload: &[u8]) {
        self.in_flight -= 1;
        self.received += 1;
        if let Some(stamp) = Stamp::find(payload) {
            self.latency.record(now_ns() - stamp.intended_ns);
        }
    }

    pub(super) fn report(&self) -> EchoReport {
        EchoReport {
            echoed: self.received,
            elapsed_ns: now_ns() - self.started_ns,
            latency_us: self.latency.percentiles(),
        }
    }
}
