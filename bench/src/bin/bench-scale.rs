//! Many sessions in one server: `delivery_bench::conductor::ScalePlan`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::conductor::{Presence, ScalePlan, ScaleWork, scale};

#[derive(Parser)]
struct Arguments {
    /// What to measure.
    #[arg(value_enum, default_value = "hold")]
    work: ScaleWork,
    /// Number of sessions.
    #[arg(long, default_value_t = 200_000)]
    sessions: usize,
    /// Sessions from which memory growth is counted; the idle sessions of a storm.
    #[arg(long, default_value_t = 20_000)]
    base: usize,
    /// Where sessions are registered.
    #[arg(long, value_enum, default_value = "redis")]
    presence: Presence,
    /// Reconnecting sessions catch up, from a message and a conversation service.
    #[arg(long)]
    catch_up: bool,
    /// Connects and disconnects of a storm.
    #[arg(long, default_value_t = 1_000_000)]
    storm: usize,
    /// Seconds of pushing while 1 % reconnect every ten seconds; 0: one event to each only.
    #[arg(long, default_value_t = 0)]
    push_s: u64,
    /// Events per second.
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    /// Recipients of each event.
    #[arg(long, default_value_t = 1)]
    group: usize,
    /// Kafka brokers; by default starts the Kafka that `tests/run setup` has fetched.
    #[arg(long)]
    brokers: Option<String>,
    /// More settings of the node, NAME=VALUE.
    #[arg(long = "set")]
    settings: Vec<String>,
    /// The node's program; by default the one in the folder of this program.
    #[arg(long)]
    node: Option<PathBuf>,
    /// Folder for the report and the logs.
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
