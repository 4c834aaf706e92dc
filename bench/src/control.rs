//! How the conductor talks to servers and clients: words on their standard input, one JSON object
//! per line on their standard output.

use std::io::{self, BufRead, Write};
use std::sync::mpsc::{Receiver, channel};

use serde::Serialize;

use crate::generator::Plan;
use crate::journey::Passage;

/// Prints one answer.
pub fn answer(value: &impl Serialize) {
    let mut line = serde_json::to_string(value).expect("plain data");
    line.push('\n');
    let mut out = io::stdout().lock();
    // The conductor is gone if this fails; the end of the input will tell.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// The lines of the standard input, read by a thread of their own; `wake` is called for each and
/// for the end.
pub fn commands(wake: impl Fn() + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
            wake();
        }
        drop(sender);
        wake();
    });
    receiver
}

/// A server listens.
#[derive(Debug, Serialize)]
pub struct Ready {
    /// Where.
    pub ready: String,
    /// Its process: whose processor time counts.
    pub pid: u32,
}

impl Ready {
    /// This process listens.
    pub fn here(address: &impl ToString) -> Self {
        Self { ready: address.to_string(), pid: std::process::id() }
    }
}

/// A server has handed out all events of a plan.
#[derive(Debug, Serialize)]
pub struct Pushed {
    /// Messages that were due to clients.
    pub messages: u64,
    /// From the first event to the last send, ns.
    pub elapsed_ns: u64,
    /// Processor time that making the events took, where a thread of its own made them, ns.
    pub generator_ns: u64,
    /// Sends that the socket took only in part or not at once.
    pub retries: u64,
    /// Sends in all, where they are counted: fewer than messages if those that waited went together.
    pub sends: Option<u64>,
}

/// How many sessions are open.
#[derive(Debug, Serialize)]
pub struct Sessions {
    /// The number.
    pub sessions: usize,
}

/// What a plan needs beforehand is there.
#[derive(Debug, Serialize)]
pub struct Prepared {
    /// Whether anything had to be done.
    pub prepared: bool,
}

/// What a server behind Kafka saw of the events that it has pushed one by one: said after
/// [`Pushed`].
#[derive(Debug, Serialize)]
pub struct Passages {
    /// One for each event.
    pub passages: Vec<Passage>,
}

/// A word from the conductor to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// `sessions`: print how many are open.
    Sessions,
    /// `prepare …`: make ready for a plan.
    Prepare(Plan),
    /// `push …`: push, and print when the last send is done.
    Push(Plan),
    /// `echo MS`: answer echoes for so long (those that always do need not be told).
    Echo(u64),
    /// `quit`: end.
    Quit,
}

/// Understands a line.
pub fn word(line: &str) -> Option<Word> {
    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
    match first {
        "sessions" => Some(Word::Sessions),
        "prepare" => rest.parse().ok().map(Word::Prepare),
        "push" => rest.parse().ok().map(Word::Push),
        "echo" => rest.parse().ok().map(Word::Echo),
        "quit" => Some(Word::Quit),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        assert_eq!(word("sessions"), Some(Word::Sessions));
        let plan = Plan { group: 1, burst: 2, events: 3, rate: 4, at_once: 5, bytes: 128 };
        assert_eq!(word(&format!("push {plan}")), Some(Word::Push(plan)));
        assert_eq!(word("push 1"), None);
        assert_eq!(word("echo 500"), Some(Word::Echo(500)));
    }
}
