//! Counters that one thread writes and the metrics page reads.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with a single writer: a plain load and store, no locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call it.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Subtracts `n` (gauges). Only the owning thread may call it.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(n), Ordering::Relaxed);
    }

    /// Sets it (gauges). Only the owning thread may call it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The last written value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter that any thread may add to.
#[derive(Debug, Default)]
pub struct SharedCounter(AtomicU64);

impl SharedCounter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Subtracts `n` (gauges).
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// Sets it (gauges).
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Declares a struct of counters whose metrics page cannot drift from its fields:
/// `counters! { /// doc \n pub struct Name of Counter { Counter records: "help", Gauge open: "help", } }`.
#[macro_export]
macro_rules! counters {
    ($(#[$outer:meta])* $vis:vis struct $name:ident of $of:ident { $($kind:ident $field:ident: $help:literal,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Default)]
        $vis struct $name { $(#[doc = $help] pub $field: $crate::domain::counters::$of,)* }

        impl $crate::domain::counters::CounterSet for $name {
            fn visit(&self, visit: $crate::domain::counters::Visit<'_>) {
                $(visit($crate::domain::counters::MetricKind::$kind, stringify!($field), $help, self.$field.get());)*
            }
        }
    };
}

/// Receives the kind, the name, the help text and the value of a counter.
pub type Visit<'a> = &'a mut dyn FnMut(MetricKind, &'static str, &'static str, u64);

/// A struct declared by [`counters!`](crate::counters).
pub trait CounterSet: Default + Send + Sync + 'static {
    /// Calls `visit` for each field.
    fn visit(&self, visit: Visit<'_>);
}

/// The Prometheus type of a field of [`counters!`](crate::counters).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only increases.
    Counter,
    /// Increases and decreases.
    Gauge,
}

/// Upper bounds of the latency buckets, ms. One more bucket takes the rest.
pub const LATENCY_BUCKETS_MS: [u64; 14] =
    [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 60_000];

/// Histogram of the time from the append to the log to the completed send. Single writer.
#[derive(Debug, Default)]
pub struct LatencyHistogram {
    buckets: [Counter; LATENCY_BUCKETS_MS.len() + 1],
    sum_ms: Counter,
}

impl LatencyHistogram {
    /// Records `count` deliveries of the same latency.
    pub fn record(&self, latency_ms: u64, count: u64) {
        let bucket = LATENCY_BUCKETS_MS.partition_point(|bound| *bound < latency_ms);
        self.buckets[bucket].add(count);
        self.sum_ms.add(latency_ms.saturating_mul(count));
    }

    /// Counts per bucket (not cumulative), and the sum of all latencies, ms.
    pub fn read(&self) -> ([u64; LATENCY_BUCKETS_MS.len() + 1], u64) {
        (std::array::from_fn(|i| self.buckets[i].get()), self.sum_ms.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_counted_in_the_first_bucket_that_holds_it() {
        let histogram = LatencyHistogram::default();
        histogram.record(1, 1);
        histogram.record(2, 2);
        histogram.record(60_001, 3);
        let (buckets, sum_ms) = histogram.read();
        assert_eq!((buckets[0], buckets[1], buckets[14]), (1, 2, 3));
        assert_eq!(sum_ms, 1 + 4 + 180_003);
    }
}
