//! Cost of a message against the number of sessions: `delivery_bench::conductor::GrowthPlan`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::conductor::{GrowthPlan, growth};

#[derive(Parser)]
struct Arguments {
    /// Numbers of sessions.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,50000,200000")]
    sessions: Vec<usize>,
    /// How often each.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Shards; otherwise as many as the sessions need.
    #[arg(long)]
    shards: Option<usize>,
    /// Core of the server.
    #[arg(long, default_value_t = 0)]
    server_core: usize,
    /// Core of the clients.
    #[arg(long, default_value_t = 1)]
    client_core: usize,
    /// Where the table goes.
    #[arg(long, default_value = "results")]
    output: PathBuf,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let here = std::env::current_exe()?;
    growth(&GrowthPlan {
        sessions: arguments.sessions,
        rounds: arguments.rounds,
        shards: arguments.shards,
        server: here.with_file_name("bench-delivery"),
        client: here.with_file_name("bench-client"),
        server_core: arguments.server_core,
        client_core: arguments.client_core,
        output: arguments.output,
    })
}
