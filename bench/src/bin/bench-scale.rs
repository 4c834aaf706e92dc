//! Many sessions in one server: `delivery_bench::conductor::ScalePlan`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::conductor::{ScalePlan, scale};

#[derive(Parser)]
struct Arguments {
    /// Sessions in all.
    #[arg(long, default_value_t = 200_000)]
    sessions: usize,
    /// Connections of one shard: as many as RLIMIT_NOFILE lets its file table hold.
    #[arg(long, default_value_t = 19_700)]
    connections_per_shard: u32,
    /// Seconds of pushing while 1 % reconnect every ten seconds; 0: one event to each only.
    #[arg(long, default_value_t = 0)]
    push_s: u64,
    /// Events per second meanwhile.
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    /// Where the report goes.
    #[arg(long, default_value = "results")]
    output: PathBuf,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let here = std::env::current_exe()?;
    scale(&ScalePlan {
        sessions: arguments.sessions,
        connections_per_shard: arguments.connections_per_shard,
        push_s: arguments.push_s,
        rate: arguments.rate,
        server: here.with_file_name("bench-delivery"),
        client: here.with_file_name("bench-client"),
        output: arguments.output,
    })
}
