//! The rows of the fault table, collected in the target folder for `docs/faults.md`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;

use super::scene::Outcome;

/// Counters of work, as opposed to errors.
const ORDINARY: [&str; 4] = ["_bucket", "_sum", "_count", "_bytes"];

/// Prints a row, and appends it to `faults.md` in the target folder.
pub(super) fn write(name: &str, outcome: &Outcome) {
    let Outcome { published, totals, missed_live, reconnects, .. } = outcome;
    let mut by_code = BTreeMap::<u16, u64>::new();
    for ((_, code), count) in &outcome.endings {
        *by_code.entry(*code).or_default() += count;
    }
    let endings = by_code.iter().map(|(code, count)| match code {
        0 => format!("{count} × no close frame"),
        _ => format!("{count} × {code}"),
    });
    let endings: Vec<_> = endings.collect();
    let mut row = format!(
        "| {name} | {published} | {} | {missed_live} | {} | {} | {} | {:.1} s | {reconnects} | {} |\n",
        totals.received,
        totals.lost,
        totals.duplicates,
        totals.out_of_order,
        outcome.longest_stall().as_secs_f32(),
        endings.join(", ")
    );
    let Outcome { stayed, stalls, .. } = outcome;
    writeln!(row, "    stayed: {stayed:?}; stalls by node: {stalls:.1?}")
        .expect("a string takes it");
    for line in outcome.timeline.lines() {
        writeln!(row, "    {line}").expect("a string takes it");
    }
    for drain in &outcome.drains {
        writeln!(row, "    {drain:?}").expect("a string takes it");
    }
    print!("{row}");
    for (series, value) in &outcome.grown {
        let metric = series.split('{').next().unwrap_or(series);
        if metric.starts_with("delivery_") && !ORDINARY.iter().any(|end| metric.ends_with(end)) {
            writeln!(row, "    {series} +{value}").expect("a string takes it");
        }
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faults.md");
    let mut file =
        OpenOptions::new().create(true).append(true).open(path).expect("the target folder");
    file.write_all(row.as_bytes()).expect("space left");
}
