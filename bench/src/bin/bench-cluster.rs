//! What the hand-off through the log costs: `delivery_bench::cluster`.

use clap::{Parser, Subcommand};
use delivery_bench::cluster::{HandOffPlan, LargePlan, ReadyPlan, RoutePlan, TablePlan, TailPlan};

/// As in `delivery`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    part: Part,
}

/// What is measured.
#[derive(Subcommand)]
enum Part {
    /// The table of sessions: memory, time to fill it, time to look users up.
    Table(TablePlan),
    /// How long a new node reads the sessions topic.
    Ready(ReadyPlan),
    /// What a hand-off costs to write, to read, and to skip.
    HandOff(HandOffPlan),
    /// What the router needs for a record, in both modes.
    Route(RoutePlan),
    /// The tail of a partition: memory, and CPU to keep a record.
    Tail(TailPlan),
    /// What the router needs for an event of a large conversation.
    Large(LargePlan),
}

fn main() -> std::io::Result<()> {
    match Arguments::parse().part {
        Part::Table(plan) => plan.run(),
        Part::Ready(plan) => plan.run(),
        Part::HandOff(plan) => plan.run(),
        Part::Route(plan) => plan.run(),
        Part::Tail(plan) => plan.run(),
        Part::Large(plan) => plan.run(),
    }
}
