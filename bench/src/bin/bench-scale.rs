//! Many sessions in one server: `delivery_bench::conductor::ScalePlan`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::conductor::{Presence, ScalePlan, ScaleWork, scale};

#[derive(Parser)]
struct Arguments {
    /// What is to be found out.
    #[arg(value_enum, default_value = "hold")]
    work: ScaleWork,
    /// Sessions in all.
    #[arg(long, default_value_t = 200_000)]
    sessions: usize,
    /// Memory growth is counted from here; the sessions that stay in a storm.
    #[arg(long, default_value_t = 20_000)]
    base: usize,
    /// Who is told of sessions.
    #[arg(long, value_enum, default_value = "redis")]
    presence: Presence,
    /// Sessions that come again are caught up, by a message and a conversation service.
    #[arg(long)]
    catch_up: bool,
    /// Connects and disconnects of a storm.
    #[arg(long, default_value_t = 1_000_000)]
    storm: usize,
    /// Seconds of pushing while 1 % come again every ten seconds; 0: one event to each only.
    #[arg(long, default_value_t = 0)]
    push_s: u64,
    /// Events per second meanwhile.
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    /// Sessions that get each event.
    #[arg(long, default_value_t = 1)]
    group: usize,
    /// Kafka brokers; without them one is started, from what `tests/run setup` has fetched.
    #[arg(long)]
    brokers: Option<String>,
    /// More settings of the node, NAME=VALUE.
    #[arg(long = "set")]
    settings: Vec<String>,
    /// The node's program; the one that was built with this one if left out.
    #[arg(long)]
    node: Option<PathBuf>,
    /// Where the report and the logs go.
    #[arg(long, default_value = "results")]
    output: PathBuf,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let programs = std::env::current_exe()?.with_file_name("");
    let node = arguments.node.unwrap_or_else(|| programs.join("delivery"));
    scale(&ScalePlan {
        work: arguments.work,
        sessions: arguments.sessions,
        base: arguments.base,
        presence: arguments.presence,
        catch_up: arguments.catch_up,
        storm: arguments.storm,
        push_s: arguments.push_s,
        rate: arguments.rate,
        group: arguments.group,
        brokers: arguments.brokers,
        settings: arguments.settings,
        programs,
        node,
        output: arguments.output,
    })
}
