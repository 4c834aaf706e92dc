//! Measured values by work, server and metric.

use std::collections::BTreeMap;

use crate::journey::{Part, Quantile};

/// A measured quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Processor time per message, µs: the process and `ksoftirqd` of its core.
    CpuUs,
    /// The same without generating the events.
    CpuServingUs,
    /// The part of `ksoftirqd`.
    SoftirqUs,
    /// Messages per second.
    PerSecond,
    /// Messages per send, where sends are counted.
    PerSend,
    /// Median latency, µs.
    P50Us,
    /// 99th percentile, µs.
    P99Us,
    /// 99.9th percentile, µs.
    P999Us,
    /// Quantile of a part of the path through Kafka, µs.
    PartUs(Part, Quantile),
    /// The quantiles of the path to the client on the owner and of a plain round trip, added, µs.
    ArrivedPlusRoundTripUs(Quantile),
    /// Messages lost, duplicated, out of order or without a stamp.
    Wrong,
}

/// The values by work, server and metric; one per round.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<(&'static str, String, Metric), Vec<f64>>);

/// Summary of the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Median.
    pub median: f64,
    /// Minimum.
    pub min: f64,
    /// Maximum.
    pub max: f64,
}

impl Samples {
    /// Adds a value.
    pub fn add(&mut self, work: &'static str, contender: &str, metric: Metric, value: f64) {
        self.0.entry((work, contender.to_owned(), metric)).or_default().push(value);
    }

    /// Summary over the rounds.
    pub fn summary(&self, work: &'static str, contender: &str, metric: Metric) -> Option<Summary> {
        Some(Summary::of(self.values(work, contender, metric)?))
    }

    /// The values by round.
    pub fn values(&self, work: &'static str, contender: &str, metric: Metric) -> Option<&[f64]> {
        Some(self.0.get(&(work, contender.to_owned(), metric))?)
    }
}

impl Summary {
    /// Summary of at least one value.
    pub fn of(values: &[f64]) -> Self {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Self { median, min: values[0], max: values[values.len() - 1] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_even_and_odd() {
        let mut samples = Samples::default();
        for value in [3.0, 1.0, 2.0, 10.0] {
            samples.add("push", "a", Metric::CpuUs, value);
        }
        let summary = samples.summary("push", "a", Metric::CpuUs).unwrap();
        assert_eq!(summary, Summary { median: 2.5, min: 1.0, max: 10.0 });
        samples.add("push", "a", Metric::CpuUs, 2.6);
        assert_eq!(samples.summary("push", "a", Metric::CpuUs).unwrap().median, 2.6);
        assert_eq!(samples.summary("push", "b", Metric::CpuUs), None);
    }
}
