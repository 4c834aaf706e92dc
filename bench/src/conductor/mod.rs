//! Runs servers and clients in turn, in several rounds, and writes the results.

mod child;
mod growth;
mod lines;
mod plot;
mod samples;
mod scale;
mod table;
mod targets;
mod trial;
mod work;

use std::fs;
use std::io;
use std::path::PathBuf;

pub use growth::{GrowthPlan, GrowthServer, run as growth};
pub use samples::{Metric, Samples, Summary};
pub use scale::{Presence, ScalePlan, ScaleWork, run as scale};
pub use work::{WORKS, Wire, Work};

/// Kind of a server: which works it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pushes given bytes, and echoes.
    Other,
    /// Delivery with events injected at its router: all works.
    Delivery,
    /// Delivery with events from Kafka: pushes only.
    Kafka,
}

/// A server in the comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its name in the table.
    pub name: String,
    /// Its kind.
    pub role: Role,
    /// Program and arguments, without the core.
    pub command: Vec<String>,
}

/// A run of `bench-run`.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The servers; ratios are to the first.
    pub contenders: Vec<Contender>,
    /// The works.
    pub works: Vec<Work>,
    /// Rounds.
    pub rounds: usize,
    /// Sessions, of one client process.
    pub sessions: usize,
    /// The client's program.
    pub client: PathBuf,
    /// Core of the servers.
    pub server_core: usize,
    /// Core of the client.
    pub client_core: usize,
    /// Whether the client polls for messages instead of sleeping.
    pub client_never_sleeps: bool,
    /// Folder for the table and the plots.
    pub output: PathBuf,
    /// Folder for a `perf` recording of each work. Recording distorts the figures.
    pub profile: Option<PathBuf>,
}

/// Runs everything: each round runs each server once; every second round in reverse order.
///
/// # Errors
/// A program cannot be started, or does not answer.
pub fn run(plan: &Comparison) -> io::Result<()> {
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        let mut order: Vec<&Contender> = plan.contenders.iter().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for contender in order {
            eprintln!("round {} of {}: {}", round + 1, plan.rounds, contender.name);
            trial::run(plan, contender, &mut samples)?;
        }
    }
    fs::create_dir_all(&plan.output)?;
    let names: Vec<&str> = plan.contenders.iter().map(|c| c.name.as_str()).collect();
    let text = format!(
        "{}\n{}",
        targets::markdown(&samples),
        table::markdown(&plan.works, &names, &samples)
    );
    println!("{text}");
    fs::write(plan.output.join("results.md"), &text)?;
    for work in &plan.works {
        let svg = plot::bars(work, &names, &samples);
        fs::write(plan.output.join(format!("{}.svg", work.name)), svg)?;
    }
    Ok(())
}
