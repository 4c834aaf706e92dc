//! Holds sessions and counts what they get; see `delivery_bench::client`.

use clap::Parser;
use delivery_bench::client::{Client, ClientConfig};
use delivery_bench::usage;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    client: ClientConfig,
    /// Core to run on.
    #[arg(long)]
    core: Option<usize>,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    if let Some(core) = arguments.core {
        usage::pin(core)?;
    }
    Client::new(arguments.client)?.run()
}
