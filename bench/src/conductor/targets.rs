//! What Delivery is to reach, and whether it did: ratios within one run.

use std::fmt::Write as _;

use super::samples::{Metric, Samples, Summary};
use crate::journey::{Part, Quantile};

/// A number of the table: work, server, metric.
type Figure = (&'static str, &'static str, Metric);

/// One target.
struct Target {
    title: &'static str,
    figure: Figure,
    /// What it is divided by; `None`: the figure itself is bounded.
    by: Option<Figure>,
    at_most: f64,
}

use Metric::{ArrivedPlusRoundTripUs, CpuServingUs, CpuUs, P99Us, PartUs};

const fn ratio(at_most: f64, figure: Figure, by: Figure, title: &'static str) -> Target {
    Target { title, figure, by: Some(by), at_most }
}

const fn bound(at_most: f64, figure: Figure, title: &'static str) -> Target {
    Target { title, figure, by: None, at_most }
}

const NO_TARGET: f64 = f64::INFINITY;
const ARRIVED_P99: Metric = PartUs(Part::AppendedToArrived, Quantile::P99);
const CONSUMED_P99: Metric = PartUs(Part::AppendedToConsumed, Quantile::P99);

/// From the append to the client on another node, in proportion to what it may be at most: to the client on the
/// owner, and a plain round trip.
const fn hand_off(work: &'static str, at: Quantile, title: &'static str) -> Target {
    let elsewhere = (work, "cluster", PartUs(Part::AppendedToElsewhere, at));
    ratio(1.00, elsewhere, (work, "cluster", ArrivedPlusRoundTripUs(at)), title)
}

/// Both servers of a ratio generate the events themselves, except behind Kafka. There the ratio is to
/// the cost without generating them.
#[rustfmt::skip]
const TARGETS: [Target; 24] = [
    ratio(1.10, ("push", "delivery", CpuUs), ("push", "bare", CpuUs), "push, one recipient each, to bare"),
    ratio(0.70, ("push", "delivery", CpuUs), ("push", "tokio-defaults", CpuUs), "push, one recipient each, to tungstenite as it comes"),
    ratio(0.70, ("push", "delivery", CpuUs), ("push", "tokio", CpuUs), "push, one recipient each, to tungstenite with small buffers"),
    ratio(1.35, ("push", "kafka", CpuUs), ("push", "bare", CpuServingUs), "the same from Kafka, to bare"),
    ratio(1.05, ("groups", "kafka", CpuUs), ("groups", "bare", CpuServingUs), "from Kafka, conversations of 100, to bare"),
    ratio(0.25, ("burst", "delivery", CpuUs), ("push", "delivery", CpuUs), "8 events waiting per session, to one"),
    ratio(1.15, ("echo", "delivery", CpuUs), ("echo", "bare", CpuUs), "echo, to bare"),
    ratio(0.50, ("echo", "delivery", CpuUs), ("echo", "tokio-defaults", CpuUs), "echo, to tungstenite as it comes"),
    ratio(0.50, ("echo", "delivery", CpuUs), ("echo", "tokio", CpuUs), "echo, to tungstenite with small buffers"),
    ratio(1.30, ("deflate", "delivery", CpuUs), ("kib", "delivery", CpuUs), "1 KiB of JSON, conversations of 100: deflate to none"),
    ratio(1.10, ("json", "delivery", CpuUs), ("groups", "delivery", CpuUs), "conversations of 100: JSON to binary"),
    ratio(NO_TARGET, ("groups", "delivery", CpuUs), ("groups", "bare", CpuUs), "conversations of 100, to bare (no target)"),
    bound(1_000.0, ("latency", "delivery", P99Us), "p99 from injection to the client's read, µs"),
    bound(10_000.0, ("latency", "kafka", ARRIVED_P99), "p99 from Kafka's append to the client's read, µs (25,000 a second)"),
    bound(NO_TARGET, ("latency", "kafka", CONSUMED_P99), "the same to a plain consumer's read, at the same time (no target)"),
    bound(10_000.0, ("slow", "kafka", ARRIVED_P99), "p99 from Kafka's append to the client's read, µs (5,000 a second)"),
    bound(NO_TARGET, ("slow", "kafka", CONSUMED_P99), "the same to a plain consumer's read, at the same time (no target)"),
    bound(NO_TARGET, ("slow", "kafka", P99Us), "the same from before the producer to the client's read (no target)"),
    hand_off("handoff-slow", Quantile::P50, "p50 from Kafka's append to a client on another node, to: a client on the owner + a plain round trip (400 a second)"),
    hand_off("handoff-slow", Quantile::P90, "p90 of the same"),
    hand_off("handoff-slow", Quantile::P99, "p99 of the same"),
    hand_off("handoff", Quantile::P50, "p50 of the same (1,000 a second)"),
    hand_off("handoff", Quantile::P90, "p90 of the same"),
    hand_off("handoff", Quantile::P99, "p99 of the same"),
];

/// The targets that have figures, in Markdown. The spread is that of the rounds' own ratios.
pub(super) fn markdown(samples: &Samples) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| target | at most | measured | by round | |\n| --- | --- | --- | --- | --- |"
    );
    for target in &TARGETS {
        let Some((measured, rounds)) = measure(target, samples) else { continue };
        let digits = if target.by.is_some() { 2 } else { 0 };
        let verdict = match measured / target.at_most {
            _ if target.at_most.is_infinite() => String::new(),
            share if share <= 1.0 => "met".to_owned(),
            share => format!("missed by {:.0} %", (share - 1.0) * 100.0),
        };
        let at_most = match target.at_most {
            limit if limit.is_infinite() => "–".to_owned(),
            limit => format!("{limit:.digits$}"),
        };
        let _ = writeln!(
            text,
            "| {} | {at_most} | **{measured:.digits$}** | {:.digits$} to {:.digits$} | {verdict} |",
            target.title, rounds.min, rounds.max
        );
    }
    text
}

/// The ratio of the medians, and the ratios of the rounds.
fn measure(target: &Target, samples: &Samples) -> Option<(f64, Summary)> {
    let values = |(work, server, metric): Figure| samples.values(work, server, metric);
    let of = values(target.figure)?;
    let Some(by) = target.by else {
        let summary = Summary::of(of);
        return Some((summary.median, summary));
    };
    let by = values(by)?;
    let ratios: Vec<f64> = of.iter().zip(by).map(|(of, by)| of / by).collect();
    Some((Summary::of(of).median / Summary::of(by).median, Summary::of(&ratios)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conductor::WORKS;

    #[test]
    fn figures_are_of_works_that_exist() {
        let figures = TARGETS.iter().flat_map(|target| [Some(target.figure), target.by]);
        for (work, ..) in figures.flatten() {
            assert!(WORKS.iter().any(|known| known.name == work), "{work}");
        }
    }

    #[test]
    fn verdicts() {
        let mut samples = Samples::default();
        for (ours, bare) in [(5.5, 5.0), (6.0, 6.0), (5.0, 5.5)] {
            samples.add("push", "delivery", CpuUs, ours);
            samples.add("push", "bare", CpuUs, bare);
            samples.add("latency", "delivery", P99Us, 1_500.0);
        }
        let text = markdown(&samples);
        assert!(text.contains("| 1.10 | **1.00** | 0.91 to 1.10 | met |"), "{text}");
        assert!(text.contains("| 1000 | **1500** | 1500 to 1500 | missed by 50 % |"), "{text}");
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn hand_off_may_take_what_an_owner_and_a_round_trip_take() {
        let mut samples = Samples::default();
        let elsewhere = PartUs(Part::AppendedToElsewhere, Quantile::P50);
        samples.add("handoff", "cluster", elsewhere, 3_300.0);
        samples.add("handoff", "cluster", ArrivedPlusRoundTripUs(Quantile::P50), 3_000.0);
        let text = markdown(&samples);
        assert!(text.contains("| 1.00 | **1.10** | 1.10 to 1.10 | missed by 10 % |"), "{text}");
    }
}
