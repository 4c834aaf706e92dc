//! The results table: ratios, then the values.

use std::fmt::Write as _;

use super::samples::{Metric, Samples, Summary};
use super::work::Work;
use crate::journey::{Part, Quantile};

/// Renders Markdown. Ratios are of medians, to the first of `contenders` that does the work.
pub(super) fn markdown(works: &[Work], contenders: &[&str], samples: &Samples) -> String {
    let mut text = String::new();
    let out = &mut text;
    for work in works {
        let _ = writeln!(out, "### {}\n", work.title);
        let _ = writeln!(
            out,
            "| server | CPU per message, ratio | µs (least to most) | without making events | of it ksoftirqd | messages/s | per send | p50 µs | p99 µs | p99.9 µs | wrong |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
        let first =
            contenders.iter().find_map(|name| samples.summary(work.name, name, Metric::CpuUs));
        for name in contenders {
            let of = |metric| samples.summary(work.name, name, metric);
            let Some(cpu) = of(Metric::CpuUs) else { continue };
            let ratio = first.map_or(f64::NAN, |first| cpu.median / first.median);
            let median = |metric| of(metric).map_or(f64::NAN, |summary| summary.median);
            let _ = writeln!(
                out,
                "| {name} | **{ratio:.2}** | {} | {:.2} | {:.2} | {:.0} | {} | {:.0} | {:.0} | {:.0} | {:.0} |",
                spread(cpu),
                median(Metric::CpuServingUs),
                median(Metric::SoftirqUs),
                median(Metric::PerSecond),
                of(Metric::PerSend)
                    .map_or("–".to_owned(), |sends| format!("{:.1}", sends.median)),
                median(Metric::P50Us),
                median(Metric::P99Us),
                median(Metric::P999Us),
                of(Metric::Wrong).map_or(f64::NAN, |summary| summary.max),
            );
        }
        let _ = writeln!(out);
        contenders.iter().for_each(|name| parts(out, work, name, samples));
    }
    text
}

/// The parts of the path through Kafka, if they were recorded.
fn parts(out: &mut String, work: &Work, name: &str, samples: &Samples) {
    let row = |title: &'static str, metric: &dyn Fn(Quantile) -> Metric| {
        let of = |quantile| samples.summary(work.name, name, metric(quantile));
        let summaries: Vec<Summary> = Quantile::ALL.into_iter().map_while(of).collect();
        (summaries.len() == Quantile::ALL.len()).then_some((title, summaries))
    };
    let of_part = |part: Part| row(part.title(), &|at| Metric::PartUs(part, at));
    let mut rows: Vec<_> = Part::ALL.into_iter().filter_map(of_part).collect();
    rows.extend(row(
        "appended → client on the owner, and a round trip: their quantiles added",
        &Metric::ArrivedPlusRoundTripUs,
    ));
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "| {name}: part of the way | p50 µs (least to most) | p90 µs | p99 µs |\n\
         | --- | --- | --- | --- |"
    );
    let spread = |s: &Summary| format!("{:.0} ({:.0} to {:.0})", s.median, s.min, s.max);
    for (title, summaries) in rows {
        let values: Vec<_> = summaries.iter().map(spread).collect();
        let _ = writeln!(out, "| {title} | {} |", values.join(" | "));
    }
    let _ = writeln!(out);
}

fn spread(summary: Summary) -> String {
    format!("{:.2} ({:.2} to {:.2})", summary.median, summary.min, summary.max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conductor::WORKS;

    #[test]
    fn ratio_is_to_the_first() {
        let mut samples = Samples::default();
        samples.add("push", "bare", Metric::CpuUs, 2.0);
        samples.add("push", "ours", Metric::CpuUs, 2.2);
        let text = markdown(&WORKS[..1], &["bare", "ours"], &samples);
        assert!(text.contains("| ours | **1.10** | 2.20 (2.20 to 2.20) |"), "{text}");
        assert!(!text.contains("part of the way"), "{text}");
    }

    #[test]
    fn parts_of_the_way_have_a_table_of_their_own() {
        let mut samples = Samples::default();
        samples.add("push", "kafka", Metric::CpuUs, 2.0);
        for value in [5.0, 7.0, 6.0] {
            for (at, factor) in Quantile::ALL.into_iter().zip([1.0, 3.0, 10.0]) {
                let metric = Metric::PartUs(Part::AppendedToArrived, at);
                samples.add("push", "kafka", metric, factor * value);
            }
        }
        let text = markdown(&WORKS[..1], &["bare", "kafka"], &samples);
        let title = Part::AppendedToArrived.title();
        let row = format!("| {title} | 6 (5 to 7) | 18 (15 to 21) | 60 (50 to 70) |");
        assert!(text.contains(&row), "{text}");
    }
}
