//! Cost of a message against the number of sessions: `delivery_bench::conductor::GrowthPlan`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::conductor::{GrowthPlan, GrowthServer, growth};

#[derive(Parser)]
struct Arguments {
    /// Servers: bare, bare:plain (with descriptors instead of file tables), delivery,
    /// delivery:SHARDS.
    #[arg(long, value_delimiter = ',', default_value = "bare,delivery")]
    servers: Vec<GrowthServer>,
    /// Numbers of sessions.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,50000,200000")]
    sessions: Vec<usize>,
    /// Rounds.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Client processes; by default as many as the largest number of sessions needs.
    #[arg(long)]
    clients: Option<usize>,
    /// Core of the server.
    #[arg(long, default_value_t = 0)]
    server_core: usize,
    /// Core of the clients.
    #[arg(long, default_value_t = 1)]
    client_core: usize,
    /// Folder for the tables and the plots.
    #[arg(long, default_value = "results")]
    output: PathBuf,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    growth(&GrowthPlan {
        servers: arguments.servers,
        sessions: arguments.sessions,
        rounds: arguments.rounds,
        clients: arguments.clients,
        programs: std::env::current_exe()?.with_file_name(""),
        server_core: arguments.server_core,
        client_core: arguments.client_core,
        output: arguments.output,
    })
}
