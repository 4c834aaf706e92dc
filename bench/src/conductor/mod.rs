//! Runs servers and clients against each other, in turn and again, and writes down what came out.

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

/// What a server is able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// To push the bytes that it is given, and to echo.
    Other,
    /// All works: Delivery, events injected at its router.
    Delivery,
    /// Pushes: Delivery, events from Kafka.
    Kafka,
}

/// A server that takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its name in the table.
    pub name: String,
    /// Its kind.
    pub role: Role,
    /// Program and arguments; the core is added.
    pub command: Vec<String>,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The servers; ratios are to the first.
    pub contenders: Vec<Contender>,
    /// What they are to do.
    pub works: Vec<Work>,
    /// How often each.
    pub rounds: usize,
    /// Sessions, of one client process.
    pub sessions: usize,
    /// The client's program.
    pub client: PathBuf,
    /// Core of the servers.
    pub server_core: usize,
    /// Core of the client.
    pub client_core: usize,
    /// Whether the client looks for messages again and again instead of being woken for them.
    pub client_never_sleeps: bool,
    /// Where the table and the plots go.
    pub output: PathBuf,
    /// Where `perf` recordings of each work go: then it is not the figures that count.
    pub profile: Option<PathBuf>,
}

/// Runs everything, interleaved: each round runs each server once, every other round backwards.
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
