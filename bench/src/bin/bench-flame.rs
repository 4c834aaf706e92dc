//! A flame graph and a table of layers from a recording of `bench-run --profile`.

use std::path::PathBuf;
use std::process::Command;

use clap::Parser;
use delivery_bench::flame;

#[derive(Parser)]
struct Arguments {
    /// Output of `perf record`.
    data: PathBuf,
    /// Where to write the SVG.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Title.
    #[arg(long, default_value = "")]
    title: String,
    /// Processor time of one message as measured without perf, µs; shares are multiplied by it.
    #[arg(long)]
    us: Option<f64>,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let script = Command::new("perf")
        .args(["script", "--no-inline", "-F", "comm,ip,sym", "-i"])
        .arg(&arguments.data)
        .output()?;
    let stacks = flame::fold(&String::from_utf8_lossy(&script.stdout));
    let total: u64 = stacks.values().sum();
    if total == 0 {
        return Err(std::io::Error::other(String::from_utf8_lossy(&script.stderr).into_owned()));
    }
    println!("| part | share | µs per message |\n| --- | --- | --- |");
    for (layer, count) in flame::layers(&stacks) {
        let share = count as f64 / total as f64;
        let us = arguments.us.map_or_else(|| "–".to_owned(), |us| format!("{:.2}", us * share));
        println!("| {layer} | {:.1} % | {us} |", share * 100.0);
    }
    println!("\n{total} samples");
    match arguments.svg {
        Some(path) => std::fs::write(path, flame::svg(&arguments.title, &stacks)?),
        None => Ok(()),
    }
}
