//! Runs the shard on the simulated kernel, the hub of gRPC streams, the cluster on simulated logs, or clients that come
//! back: any number of seeds and steps (docs/simulation.md).

use std::time::Instant;

use clap::{Parser, ValueEnum};
use delivery::app::returning;
use delivery::domain::counted::Counted;
use delivery::reactor::simulation as shard;
use delivery::service::routing::simulation as cluster;
use delivery::service::streams::hub::simulation as hub;

/// Runs a part of the server in a simulated world with faults that depend on a seed. A failing seed
/// always fails in the same way.
#[derive(Debug, Parser)]
struct Arguments {
    /// What is simulated.
    #[arg(long, value_enum, default_value_t = World::Shard)]
    world: World,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps per seed; clients that come back have a fixed number.
    #[arg(long, default_value_t = 100_000)]
    steps: u64,
    /// Number of seeds, counted up from the first.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum World {
    /// The shard, on a simulated kernel.
    Shard,
    /// The hub of gRPC streams.
    Hub,
    /// The routers of several nodes, on simulated logs.
    Cluster,
    /// Clients that come back, with catch-up, session manager, shard and stream hub.
    Returning,
}

fn main() {
    let arguments = Arguments::parse();
    match arguments.world {
        World::Shard => run_shard(&arguments),
        World::Hub => run_hub(&arguments),
        World::Cluster => run_cluster(&arguments),
        World::Returning => run_returning(&arguments),
    }
}

impl Arguments {
    fn seeds(&self) -> std::ops::Range<u64> {
        self.seed..self.seed.saturating_add(self.seeds)
    }
}

fn run_shard(arguments: &Arguments) {
    shard::trace::print_on_panic();
    let started = Instant::now();
    let mut total = shard::Summary::default();
    for seed in arguments.seeds() {
        total.add(&shard::run(seed, arguments.steps));
    }
    for (name, count) in &total.counts {
        println!("{name:>32} {count}");
    }
    let shard::Summary { steps, clients, admitted, received, passed_ms, .. } = total;
    println!(
        "{} to bystanders, the slowest after {} ms and {}",
        Counted(total.to_bystanders, "event"),
        total.latest.0,
        Counted(total.latest.1, "turn"),
    );
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

fn run_hub(arguments: &Arguments) {
    hub::print_on_panic();
    let started = Instant::now();
    let mut total = hub::HubSummary::default();
    for seed in arguments.seeds() {
        total.add(&hub::run(seed, arguments.steps));
    }
    for (name, count) in &total.counts {
        println!("{name:>32} {count}");
    }
    println!("the slowest event for a bystander after {} ms", total.latest_ms);
    println!(
        "{} from {}: nothing found in {} s",
        Counted(arguments.seeds, "seed"),
        arguments.seed,
        started.elapsed().as_secs(),
    );
}

fn run_cluster(arguments: &Arguments) {
    cluster::trace::print_on_panic();
    let started = Instant::now();
    let mut total = cluster::ClusterSummary::default();
    for seed in arguments.seeds() {
        total.add(&cluster::run(seed, arguments.steps));
    }
    for (name, count) in &total.counts {
        println!("{name:>40} {count}");
    }
    println!(
        "{} from {}: nothing found in {} s",
        Counted(arguments.seeds, "seed"),
        arguments.seed,
        started.elapsed().as_secs(),
    );
}

fn run_returning(arguments: &Arguments) {
    returning::print_on_panic();
    let started = Instant::now();
    let mut total = returning::ReturningSummary::default();
    for seed in arguments.seeds() {
        total.add(&returning::run(seed));
    }
    println!("{total:?}");
    println!(
        "{} from {}: nothing found in {} s",
        Counted(arguments.seeds, "seed"),
        arguments.seed,
        started.elapsed().as_secs(),
    );
}
