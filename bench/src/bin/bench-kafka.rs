//! Delivery behind Kafka as a contender: see `delivery_bench::kafka`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::control::{self, OpenSessions, Passages, Prepared, Ready, Word};
use delivery_bench::kafka::{ServedConfig, ServedDelivery};

#[derive(Parser)]
struct Arguments {
    /// A broker.
    #[arg(long, env = "KAFKA_BROKERS")]
    brokers: String,
    /// The `delivery` program; by default the one in the folder of this one.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Core of the server.
    #[arg(long)]
    core: usize,
    /// Core of this process.
    #[arg(long)]
    own_core: usize,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let beside = std::env::current_exe()?.with_file_name("delivery");
    let words = control::commands(Word::parse, || {});
    let mut served = ServedDelivery::start(&ServedConfig {
        brokers: arguments.brokers,
        program: arguments.program.unwrap_or(beside),
        server_core: arguments.core,
        own_core: arguments.own_core,
    })?;
    control::answer(&Ready { ready: served.address.to_string(), pid: served.pid() });
    for word in words {
        match word {
            Word::Sessions => control::answer(&OpenSessions { sessions: served.sessions()? }),
            Word::Prepare(plan) => {
                served.prepare(plan)?;
                control::answer(&Prepared { prepared: true });
            }
            Word::Push(plan) => {
                control::answer(&served.push(plan)?);
                if plan.is_one_by_one() {
                    control::answer(&Passages { passages: served.passages() });
                }
            }
            Word::Presence | Word::Echo(_) => {}
            Word::Quit => break,
        }
    }
    Ok(())
}
