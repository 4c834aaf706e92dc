//! Metrics of the requests to the admin port, by method, path and status (contract §6).

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use super::exposition::{MetricsPage, number};
use crate::domain::counters::MetricKind;

/// Paths with a label of their own. All others share one label, so that clients cannot make the
/// page grow.
const PATHS: [&str; 9] = [
    "/health/live",
    "/health/ready",
    "/metrics",
    "/admin/drain",
    "/admin/undrain",
    "/admin/sessions",
    "/admin/sessions/close",
    "/admin/tokens/revoke",
    "/try",
];
const METHODS: [&str; 3] = ["GET", "HEAD", "POST"];
const OTHER: &str = "other";

/// Upper bounds of the duration buckets, seconds.
const BOUNDS_S: [f64; 8] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0];

const COUNT_HELP: &str = "HTTP requests answered, including upgrades to WebSocket.";
const DURATION_HELP: &str = "Time to answer an HTTP request on the admin port, seconds.";

type Route = (&'static str, &'static str);

#[derive(Debug, Default)]
struct Durations {
    counts: [u64; BOUNDS_S.len() + 1],
    sum_s: f64,
}

#[derive(Debug, Default)]
struct RequestTable {
    answered: BTreeMap<(Route, u16), u64>,
    durations: BTreeMap<Route, Durations>,
}

/// Counts and durations of the requests.
#[derive(Debug, Default)]
pub struct RequestMetrics(Mutex<RequestTable>);

fn known(text: &str, all: &[&'static str]) -> &'static str {
    all.iter().find(|known| **known == text).copied().unwrap_or(OTHER)
}

impl RequestMetrics {
    /// Records one request.
    pub fn record(&self, method: &str, path: &str, status: u16, took: Duration) {
        let route = (known(method, &METHODS), known(path, &PATHS));
        let mut table = self.0.lock().expect("no holder panics");
        *table.answered.entry((route, status)).or_default() += 1;
        let durations = table.durations.entry(route).or_default();
        let seconds = took.as_secs_f64();
        durations.counts[BOUNDS_S.partition_point(|bound| *bound < seconds)] += 1;
        durations.sum_s += seconds;
    }

    /// Writes `http_requests_total` and `http_request_duration_seconds`.
    pub fn write(&self, page: &mut MetricsPage) {
        let table = self.0.lock().expect("no holder panics");
        for (((method, path), status), count) in &table.answered {
            answered(page, method, path, &status.to_string(), *count);
        }
        for ((method, path), durations) in &table.durations {
            let labels = [("method", *method), ("path", *path)];
            let Durations { counts, sum_s } = durations;
            let name = "http_request_duration_seconds";
            page.histogram(name, DURATION_HELP, &labels, &BOUNDS_S, counts, *sum_s);
        }
    }
}

/// Adds a sample of `http_requests_total`. Requests to the public port are counted by the shards.
pub fn answered(page: &mut MetricsPage, method: &str, path: &str, status: &str, count: u64) {
    let labels = [("method", method), ("path", path), ("status", status)];
    page.sample(MetricKind::Counter, "http_requests_total", COUNT_HELP, &labels, number(count));
}
