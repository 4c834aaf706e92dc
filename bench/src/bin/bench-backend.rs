//! What stands around a node: see `delivery_bench::backend`.

use clap::Parser;
use delivery_bench::backend::Backend;
use delivery_bench::control::{self, Prepared, Word, word};
use serde::Serialize;

#[derive(Parser)]
struct Arguments {
    /// Kafka brokers.
    #[arg(long)]
    brokers: String,
    /// Sessions that events are for.
    #[arg(long)]
    sessions: usize,
}

#[derive(Serialize)]
struct Ready {
    ready: String,
    messages: String,
    conversations: String,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let words = control::commands(|| {});
    let mut backend = Backend::start(&arguments.brokers, arguments.sessions)?;
    control::answer(&Ready {
        ready: backend.address.to_string(),
        messages: backend.topics.messages.clone(),
        conversations: backend.topics.conversations.clone(),
    });
    while let Ok(line) = words.recv() {
        match word(&line) {
            Some(Word::Prepare(plan)) => {
                control::answer(&Prepared { prepared: backend.prepare(plan) });
            }
            Some(Word::Push(plan)) => control::answer(&backend.push(plan)),
            Some(Word::Quit) => break,
            None if line == "presence" => {
                control::answer(&backend.presence());
            }
            Some(Word::Sessions | Word::Echo(_)) | None => eprintln!("unknown word: {line}"),
        }
    }
    std::process::exit(0)
}
