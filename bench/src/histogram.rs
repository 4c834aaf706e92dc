//! Latencies in buckets of at most 1.6 % width: 64 for each power of two.

use serde::{Deserialize, Serialize};

const SUB_BITS: u32 = 6;
const SUB: u64 = 1 << SUB_BITS;

/// Counts of nanoseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max_ns: u64,
}

/// What is reported of a [`Histogram`], µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
    /// 999 of 1000 are at most this.
    pub p999: f64,
    /// The worst.
    pub max: f64,
}

fn bucket(value: u64) -> usize {
    if value < SUB {
        return value as usize;
    }
    let shift = value.ilog2() - SUB_BITS;
    (u64::from(shift + 1) * SUB + ((value >> shift) - SUB)) as usize
}

/// The greatest value of a bucket.
fn bucket_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < SUB {
        return bucket;
    }
    let shift = bucket / SUB - 1;
    (((SUB + bucket % SUB) << shift) - 1) + (1 << shift)
}

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, ns: u64) {
        let at = bucket(ns);
        if at >= self.counts.len() {
            self.counts.resize(at + 1, 0);
        }
        self.counts[at] += 1;
        self.total += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds the counts of another one.
    pub fn add(&mut self, other: &Self) {
        if other.counts.len() > self.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// How many were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The value that `share` of all are at most, ns.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && *count > 0 {
                return bucket_end(at).min(self.max_ns);
            }
        }
        self.max_ns
    }

    /// The usual ones.
    pub fn percentiles(&self) -> Percentiles {
        let us = |ns: u64| ns as f64 / 1000.0;
        Percentiles {
            p50: us(self.quantile(0.5)),
            p99: us(self.quantile(0.99)),
            p999: us(self.quantile(0.999)),
            max: us(self.max_ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        let mut last = None;
        for value in (0..5000).chain([1 << 20, (1 << 20) + 1, u64::MAX]) {
            let at = bucket(value);
            assert!(value <= bucket_end(at));
            assert!(at == 0 || value > bucket_end(at - 1), "{value}");
            assert!(last.is_none_or(|last| last <= at));
            last = Some(at);
        }
    }

    #[test]
    fn added_counts_are_as_if_counted_together() {
        let (mut first, mut second, mut both) =
            (Histogram::default(), Histogram::default(), Histogram::default());
        for value in 1..=100_u64 {
            (if value % 3 == 0 { &mut first } else { &mut second }).record(value * value);
            both.record(value * value);
        }
        first.add(&second);
        assert_eq!((first.percentiles(), first.total()), (both.percentiles(), 100));
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_values() {
        let mut histogram = Histogram::default();
        for value in 1..=1000_u64 {
            histogram.record(value * 1000);
        }
        for (share, exact) in [(0.5, 500_000.0), (0.99, 990_000.0), (1.0, 1_000_000.0)] {
            let error = histogram.quantile(share) as f64 / exact - 1.0;
            assert!((0.0..0.016).contains(&error), "{share}: {error}");
        }
    }
}
