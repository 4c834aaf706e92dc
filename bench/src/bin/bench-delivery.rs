//! Delivery without Kafka as a contender: see `delivery_bench::ours`.

use clap::Parser;
use delivery_bench::control::{self, OpenSessions, Prepared, Ready, Word};
use delivery_bench::ours::{OurConfig, Ours};
use delivery_bench::usage;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    delivery: OurConfig,
    /// Core to run on.
    #[arg(long)]
    core: Option<usize>,
    /// Core of the thread that wakes the router when an event is due.
    #[arg(long)]
    own_core: Option<usize>,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    if let Some(core) = arguments.core {
        usage::pin(core)?;
    }
    let words = control::commands(Word::parse, || {});
    let mut ours = Ours::start(arguments.delivery)?;
    if let Some(core) = arguments.own_core {
        usage::pin(core)?;
    }
    control::answer(&Ready::here(&ours.address));
    for word in words {
        match word {
            Word::Sessions => control::answer(&OpenSessions { sessions: ours.sessions() }),
            Word::Prepare(plan) => {
                control::answer(&Prepared { prepared: ours.prepare(plan) });
            }
            Word::Push(plan) => control::answer(&ours.push(plan)),
            Word::Presence | Word::Calls | Word::Echo(_) => {}
            Word::Quit => break,
        }
    }
    std::process::exit(0)
}
