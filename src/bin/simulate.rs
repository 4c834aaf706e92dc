//! Runs the shard on the simulated kernel: any number of seeds and steps (docs/simulation.md).

use std::time::Instant;

use clap::Parser;
use delivery::domain::counted::Counted;
use delivery::reactor::simulation::{self, Summary, trace};

/// Runs the shard on a simulated kernel with faults that depend on a seed. A failing seed always
/// fails in the same way.
#[derive(Debug, Parser)]
struct Arguments {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps per seed.
    #[arg(long, default_value_t = 100_000)]
    steps: u64,
    /// Number of seeds, counted up from the first.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
}

fn main() {
    trace::print_on_panic();
    let arguments = Arguments::parse();
    let started = Instant::now();
    let mut total = Summary::default();
    for seed in arguments.seed..arguments.seed.saturating_add(arguments.seeds) {
        total.add(&simulation::run(seed, arguments.steps));
    }
    for (name, count) in &total.counts {
        println!("{name:>32} {count}");
    }
    let Summary { steps, clients, admitted, received, passed_ms, .. } = total;
    println!(
        "{} from {}: {}, {}, {}, {} received, {}; nothing found in {} s",
        Counted(arguments.seeds, "seed"),
        arguments.seed,
        Counted(steps, "step"),
        Counted(clients, "client"),
        Counted(admitted, "session"),
        Counted(received, "event"),
        Counted(passed_ms / 3_600_000, "virtual hour"),
        started.elapsed().as_secs(),
    );
}
