//! Histograms of latencies, ns.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Decimal digits that a recorded value keeps.
const DIGITS: u8 = 3;

/// A histogram of nanoseconds. On the wire: pairs of a value and its count.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct Latencies(Histogram<u64>);

/// The reported percentiles of [`Latencies`], µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Maximum.
    pub max: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self(Histogram::new(DIGITS).expect("at most 5 digits"))
    }
}

impl Latencies {
    /// Records one latency.
    pub fn record(&mut self, ns: u64) {
        self.0.record(ns).expect("the histogram resizes itself");
    }

    /// Adds the counts of another histogram.
    pub fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("the histogram resizes itself");
    }

    /// The reported percentiles; 0 if nothing is recorded.
    pub fn percentiles(&self) -> Percentiles {
        let us = |quantile| self.0.value_at_quantile(quantile) as f64 / 1000.0;
        Percentiles { p50: us(0.5), p99: us(0.99), p999: us(0.999), max: us(1.0) }
    }
}

impl From<Vec<(u64, u64)>> for Latencies {
    fn from(counts: Vec<(u64, u64)>) -> Self {
        let mut latencies = Self::default();
        for (ns, count) in counts {
            latencies.0.record_n(ns, count).expect("the histogram resizes itself");
        }
        latencies
    }
}

impl From<Latencies> for Vec<(u64, u64)> {
    fn from(latencies: Latencies) -> Self {
        let recorded = latencies.0.iter_recorded();
        recorded.map(|step| (step.value_iterated_to(), step.count_since_last_iteration())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_of_two_processes_add_up_after_a_way_over_the_wire() {
        let (mut first, mut second, mut both) =
            (Latencies::default(), Latencies::default(), Latencies::default());
        for value in 1..=100_u64 {
            (if value % 3 == 0 { &mut first } else { &mut second }).record(value * value * 1000);
            both.record(value * value * 1000);
        }
        let line = serde_json::to_string(&second).unwrap();
        first.add(&serde_json::from_str(&line).unwrap());
        assert_eq!(first.percentiles(), both.percentiles());
    }
}
