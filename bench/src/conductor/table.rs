//! The results table: ratios, then the values.

use std::fmt::Write as _;

use super::samples::{Metric, Samples, Summary};
use super::work::Work;
use crate::journey::Part;

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
    let rows: Vec<_> = Part::ALL
        .into_iter()
        .filter_map(|part| {
            let of = |metric| samples.summary(work.name, name, metric);
            Some((part, of(Metric::PartP50Us(part))?, of(Metric::PartP99Us(part))?))
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "| {name}: part of the way | p50 µs (least to most) | p99 µs (least to most) |\n\
         | --- | --- | --- |"
    );
    let spread = |s: Summary| format!("{:.0} ({:.0} to {:.0})", s.median, s.min, s.max);
    for (part, p50, p99) in rows {
        let _ = writeln!(out, "| {} | {} | {} |", part.title(), spread(p50), spread(p99));
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
            samples.add("push", "kafka", Metric::PartP50Us(Part::AppendedToArrived), value);
            samples.add("push", "kafka", Metric::PartP99Us(Part::AppendedToArrived), 10.0 * value);
        }
        let text = markdown(&WORKS[..1], &["bare", "kafka"], &samples);
        let row = format!("| {} | 6 (5 to 7) | 60 (50 to 70) |", Part::AppendedToArrived.title());
        assert!(text.contains(&row), "{text}");
    }
}
