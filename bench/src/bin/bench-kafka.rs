//! Delivery behind Kafka as a contender: see `delivery_bench::kafka`.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::control::{self, Passages, Prepared, Ready, Sessions, Word, word};
use delivery_bench::kafka::{Served, Setting};

#[derive(Parser)]
struct Arguments {
    /// A broker.
    #[arg(long, env = "KAFKA_BROKERS")]
    brokers: String,
    /// The `delivery` program; the one beside this one if it is not given.
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
    let words = control::commands(|| {});
    let mut served = Served::start(&Setting {
        brokers: arguments.brokers,
        program: arguments.program.unwrap_or(beside),
        server_core: arguments.core,
        own_core: arguments.own_core,
    })?;
    control::answer(&Ready { ready: served.address.to_string(), pid: served.pid() });
    while let Ok(line) = words.recv() {
        match word(&line) {
            Some(Word::Sessions) => control::answer(&Sessions { sessions: served.sessions()? }),
            Some(Word::Prepare(plan)) => {
                served.prepare(plan)?;
                control::answer(&Prepared { prepared: true });
            }
            Some(Word::Push(plan)) => {
                control::answer(&served.push(plan)?);
                if plan.is_one_by_one() {
                    control::answer(&Passages { passages: served.passages() });
                }
            }
            Some(Word::Echo(_)) => {}
            Some(Word::Quit) => break,
            None => eprintln!("unknown word: {line}"),
        }
    }
    Ok(())
}
