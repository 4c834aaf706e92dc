//! Bars with their spread, as SVG that reads on light and dark pages.

use std::fmt::Write as _;

use super::samples::{Metric, Samples};
use super::work::Work;

pub(super) const WIDTH: f64 = 640.0;
const LABEL: f64 = 130.0;
const BAR: f64 = 26.0;
const GAP: f64 = 12.0;
pub(super) const TOP: f64 = 48.0;

/// Of every picture.
pub(super) const STYLE: &str = "<style>text{fill:#24292f}line{stroke:#24292f}@media(prefers-color-scheme:dark){text{fill:#e6edf3}line{stroke:#e6edf3}}</style>";

/// Processor time per message, one bar per server.
pub(super) fn bars(work: &Work, contenders: &[&str], samples: &Samples) -> String {
    let rows: Vec<_> = contenders
        .iter()
        .filter_map(|name| Some((*name, samples.summary(work.name, name, Metric::CpuUs)?)))
        .collect();
    let most = rows.iter().map(|(_, summary)| summary.max).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABEL - 80.0) / most;
    let height = TOP + rows.len() as f64 * (BAR + GAP) + 8.0;
    let mut svg = String::new();
    let out = &mut svg;
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">
{STYLE}
<text x="0" y="18" font-weight="bold">{}</text>
<text x="0" y="36" font-size="12">CPU µs per message, process and ksoftirqd; median, least to most</text>"##,
        work.title
    );
    for (at, (name, summary)) in rows.iter().enumerate() {
        let y = TOP + at as f64 * (BAR + GAP);
        let middle = y + BAR / 2.0;
        let end = LABEL + summary.median * scale;
        let (least, greatest) = (LABEL + summary.min * scale, LABEL + summary.max * scale);
        let colour = colour(name);
        let _ = writeln!(
            out,
            r##"<text x="0" y="{:.1}">{name}</text><rect x="{LABEL}" y="{y:.1}" width="{:.1}" height="{BAR}" fill="{colour}"/><line x1="{least:.1}" x2="{greatest:.1}" y1="{middle:.1}" y2="{middle:.1}" stroke-width="2"/><text x="{:.1}" y="{:.1}">{:.2}</text>"##,
            middle + 5.0,
            end - LABEL,
            greatest.max(end) + 8.0,
            middle + 5.0,
            summary.median,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Of what is drawn for a server.
pub(super) fn colour(name: &str) -> &'static str {
    if name.starts_with("delivery") { "#d1242f" } else { "#6e7781" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conductor::WORKS;

    #[test]
    fn every_server_with_numbers_has_a_bar() {
        let mut samples = Samples::default();
        samples.add("push", "bare", Metric::CpuUs, 2.0);
        samples.add("push", "delivery", Metric::CpuUs, 2.2);
        let svg = bars(&WORKS[0], &["bare", "delivery", "absent"], &samples);
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(svg.ends_with("</svg>\n"));
    }
}
