//! The protocol between the conductor and its servers and clients: one word per line on their
//! standard input, one JSON object per line on their standard output.

use std::io::{self, BufRead, Write};
use std::sync::mpsc::{Receiver, channel};

use serde::Serialize;

use crate::generator::PushPlan;
use crate::journey::Passage;

/// Prints one answer.
pub fn answer(value: &impl Serialize) {
    let mut line = serde_json::to_string(value).expect("plain data");
    line.push('\n');
    let mut out = io::stdout().lock();
    // Fails if the conductor has ended; then the standard input ends too.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// The lines of the standard input as `parse` reads them, from a thread of their own; a line that it
/// does not understand is reported and dropped. `wake` is called after each line and at the end.
pub fn commands<W: Send + 'static>(
    parse: impl Fn(&str) -> Option<W> + Send + 'static,
    wake: impl Fn() + Send + 'static,
) -> Receiver<W> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let Some(word) = parse(&line) else {
                eprintln!("unknown word: {line}");
                continue;
            };
            if sender.send(word).is_err() {
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
    /// Its address.
    pub ready: String,
    /// The process whose processor time counts.
    pub pid: u32,
    /// The same of a second node of one cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other: Option<Box<Self>>,
}

impl Ready {
    /// This process listens.
    pub fn here(address: &impl ToString) -> Self {
        Self { ready: address.to_string(), pid: std::process::id(), other: None }
    }
}

/// A server has handed out all events of a plan.
#[derive(Debug, Default, Serialize)]
pub struct Pushed {
    /// Messages due to clients.
    pub messages: u64,
    /// From the first event to the last send, ns.
    pub elapsed_ns: u64,
    /// Processor time for generating the events, ns; 0 if another process does it.
    pub generator_ns: u64,
    /// Sends that the socket took only in part or not at once.
    pub retries: u64,
    /// Sends, where they are counted: fewer than messages if several messages shared one.
    pub sends: Option<u64>,
}

/// The number of open sessions.
#[derive(Debug, Serialize)]
pub struct OpenSessions {
    /// The number.
    pub sessions: usize,
}

/// The server is ready for a plan.
#[derive(Debug, Serialize)]
pub struct Prepared {
    /// Whether there was anything to do.
    pub prepared: bool,
}

/// What a server behind Kafka observed of events that it pushed one by one. Follows [`Pushed`].
#[derive(Debug, Serialize)]
pub struct Passages {
    /// One for each event.
    pub passages: Vec<Passage>,
}

/// A word from the conductor to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// `sessions`: print the number of open sessions.
    Sessions,
    /// `presence`: print the counts of the presence service.
    Presence,
    /// `calls`: print the calls to the services.
    Calls,
    /// `prepare PLAN`: get ready for a plan.
    Prepare(PushPlan),
    /// `push PLAN`: push, and print when the last send is done.
    Push(PushPlan),
    /// `echo MS`: answer echoes for this time, if the server does not always do that.
    Echo(u64),
    /// `quit`: exit.
    Quit,
}

impl Word {
    /// Parses a line.
    pub fn parse(line: &str) -> Option<Self> {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        match first {
            "sessions" => Some(Self::Sessions),
            "presence" => Some(Self::Presence),
            "calls" => Some(Self::Calls),
            "prepare" => rest.parse().ok().map(Self::Prepare),
            "push" => rest.parse().ok().map(Self::Push),
            "echo" => rest.parse().ok().map(Self::Echo),
            "quit" => Some(Self::Quit),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_parsed() {
        assert_eq!(Word::parse("sessions"), Some(Word::Sessions));
        let plan =
            PushPlan { group: 1, each: 1, burst: 2, events: 3, rate: 4, at_once: 5, bytes: 128 };
        assert_eq!(Word::parse(&format!("push {plan}")), Some(Word::Push(plan)));
        assert_eq!(Word::parse("push 1"), None);
        assert_eq!(Word::parse("echo 500"), Some(Word::Echo(500)));
    }
}
