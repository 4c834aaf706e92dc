//! The back end around a node: see `delivery_bench::backend`.

use std::sync::mpsc::channel;

use clap::Parser;
use delivery_bench::backend::Backend;
use delivery_bench::control::{self, Prepared, Word};
use serde::Serialize;

#[derive(Parser)]
struct Arguments {
    /// Kafka brokers.
    #[arg(long)]
    brokers: String,
    /// Sessions that receive the events.
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
    let mut backend = Backend::start(&arguments.brokers, arguments.sessions)?;
    // Calls are counted while a push goes on, too.
    let calls = backend.calls();
    let (forward, words) = channel();
    let received = control::commands(Word::parse, || {});
    std::thread::spawn(move || {
        for word in received {
            match word {
                Word::Calls => control::answer(&calls.counts()),
                word => {
                    // The main thread has ended, and with it soon this process.
                    let _ = forward.send(word);
                }
            }
        }
    });
    control::answer(&Ready {
        ready: backend.address.to_string(),
        messages: backend.topics.messages.clone(),
        conversations: backend.topics.conversations.clone(),
    });
    for word in words {
        match word {
            Word::Prepare(plan) => {
                control::answer(&Prepared { prepared: backend.prepare(plan) });
            }
            Word::Push(plan) => control::answer(&backend.push(plan)),
            Word::Presence => control::answer(&backend.presence()),
            Word::Calls | Word::Sessions | Word::Echo(_) => {}
            Word::Quit => break,
        }
    }
    std::process::exit(0)
}
