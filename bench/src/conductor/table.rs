//! The table: ratios first, then what they are ratios of.

use std::fmt::Write as _;

use super::samples::{Metric, Samples, Summary};
use super::work::Work;

/// Markdown. Ratios are of medians, to the first of `contenders` that does the work.
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
    }
    text
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
    }
}
