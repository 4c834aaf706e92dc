//! One of the comparison servers; see `delivery_bench::servers`.

use clap::Parser;
use delivery_bench::servers::{Kind, run};
use delivery_bench::usage;

#[derive(Parser)]
struct Arguments {
    /// Which one.
    #[arg(value_enum)]
    kind: Kind,
    /// Sessions at most.
    #[arg(long, default_value_t = 16_384)]
    capacity: usize,
    /// Let `bare` keep its sockets in file tables, for more sessions than descriptors.
    #[arg(long)]
    park: bool,
    /// Core to run on.
    #[arg(long)]
    core: Option<usize>,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    if let Some(core) = arguments.core {
        usage::pin(core)?;
    }
    run(arguments.kind, arguments.capacity, arguments.park)
}
