//! Runs servers and clients in turn, in several rounds, and writes the results.

mod child;
mod growth;
mod memory;
mod plot;
mod samples;
mod scale;
mod table;
mod targets;
mod trial;
mod work;

use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

pub(crate) use child::{Worker, number};
pub use growth::{GrowthPlan, GrowthServer, run as growth};
pub use memory::{MemoryPlan, run as memory};
pub use samples::{Metric, Samples, Summary};
pub use scale::{Presence, ScalePlan, ScaleWork, run as scale};
pub use work::{WORKS, Wire, Work};

use crate::program::beside;

/// Kind of a server: which works it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pushes given bytes, and echoes.
    Other,
    /// Delivery with events injected at its router: all works.
    Delivery,
    /// Delivery with events from Kafka: pushes only.
    Kafka,
    /// Two nodes of Delivery that share the partitions: hand-offs only.
    Cluster,
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

impl FromStr for Contender {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let program = |name: &str| beside(name).display().to_string();
        let (name, role, command) = match text.split_once('=') {
            Some((name, command)) => {
                (name, Role::Delivery, command.split_whitespace().map(str::to_owned).collect())
            }
            None if text == "delivery" => (text, Role::Delivery, vec![program("bench-delivery")]),
            None if text == "delivery-tls" => {
                (text, Role::Delivery, vec![program("bench-delivery"), "--tls".to_owned()])
            }
            None if text == "kafka" => (text, Role::Kafka, vec![program("bench-kafka")]),
            None if text == "cluster" => {
                (text, Role::Cluster, vec![program("bench-kafka"), "--nodes=2".to_owned()])
            }
            None => (text, Role::Other, vec![program("bench-server"), text.to_owned()]),
        };
        Ok(Self { name: name.to_owned(), role, command })
    }
}

/// Compares servers.
#[derive(Clone, Debug, clap::Parser)]
pub struct Comparison {
    /// Servers, in the order of the table: bare, epoll, tokio, tokio-defaults, tokio-uring, delivery,
    /// delivery-tls, kafka, cluster, or NAME=COMMAND, a build of bench-delivery. Ratios are to the first.
    #[arg(
        long = "servers",
        value_delimiter = ',',
        default_value = "bare,epoll,tokio,tokio-defaults,tokio-uring,delivery,kafka,cluster"
    )]
    pub contenders: Vec<Contender>,
    /// The works.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "push,groups,burst,flood,latency,slow,handoff,handoff-slow,json,kib,deflate,echo"
    )]
    pub works: Vec<Work>,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Sessions, of one client process. Each node has one.
    #[arg(long, default_value_t = 10_000)]
    pub sessions: usize,
    /// Core of the server.
    #[arg(long, default_value_t = 0)]
    pub server_core: usize,
    /// Core of the client.
    #[arg(long, default_value_t = 1)]
    pub client_core: usize,
    /// Let the client poll for messages, so that the server does not pay for waking it. Its core must
    /// not be used for anything else.
    #[arg(long)]
    pub client_never_sleeps: bool,
    /// Folder for the table and the plots.
    #[arg(long, default_value = "results")]
    pub output: PathBuf,
    /// Record the server's core with perf during each work, into this folder; see bench-flame.
    /// Recording distorts the figures.
    #[arg(long)]
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
