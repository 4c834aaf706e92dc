//! What the servers are made to do.

use super::Role;
use crate::generator::PushPlan;

/// What a work asks of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Push so.
    Push(PushPlan),
    /// Answer echoes: how many at a time, of what size, for how long (ms).
    Echo {
        /// Messages under way.
        window: usize,
        /// Bytes of each.
        bytes: usize,
        /// Duration.
        ms: u64,
    },
}

/// What the sessions of a work have asked for in their upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Nothing: binary.
    Binary,
    /// The JSON subprotocol.
    Json,
    /// The JSON subprotocol and permessage-deflate.
    JsonDeflate,
}

impl Wire {
    /// All, in the order in which they are used.
    pub const ALL: [Self; 3] = [Self::Binary, Self::Json, Self::JsonDeflate];

    /// What the client has to be told.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Binary => &[],
            Self::Json => &["--protocol=realchat.v1.json"],
            Self::JsonDeflate => &["--protocol=realchat.v1.json", "--deflate"],
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its name in the table.
    pub title: &'static str,
    /// What is done.
    pub task: Task,
    /// By what kind of sessions.
    pub wire: Wire,
}

impl Work {
    /// Whether a server of this kind can do it.
    pub fn suits(&self, role: Role) -> bool {
        match (self.task, self.wire) {
            (Task::Push(_), Wire::Json | Wire::JsonDeflate) => role == Role::Delivery,
            // Records are spread over partitions, so eight in a row do not stay together.
            (Task::Push(plan), Wire::Binary) => role != Role::Kafka || plan.burst == 1,
            (Task::Echo { .. }, _) => role != Role::Kafka,
        }
    }
}

/// Messages a second of most works: about half of what one core can push, so that the client keeps
/// up. A server that is ahead of its client fills the sockets, and then it is the memory of what
/// waits in them that is measured.
const MESSAGES_PER_S: u64 = 64_000;
/// Of which so many come at once.
const AT_ONCE: u64 = 512;
/// Messages of a work: 15 for each of 10,000 sessions. A receiver acknowledges the first 16
/// segments after a silence at once (`TCP_MAX_QUICKACKS`), within the send, on the server's core;
/// what follows is acknowledged when the client reads, on the client's, and costs the server a
/// third less. Chat is silence, mostly, so that it is the first that is measured, with every server.
const MESSAGES: u64 = 150_000;
/// Events a second of the work that is about latency: a fifth of the most that one core pushes
/// here.
const LATENCY_RATE: u64 = 25_000;
/// The same where a broker, its producer and the client share a core with ease.
const SLOW_RATE: u64 = 5_000;
/// Bytes of the value that becomes 1024 bytes of JSON.
const JSON_KIB_BYTES: usize = 841;

/// For conversations of `group`, so many in a row, by the handful.
const fn push(group: usize, burst: usize, bytes: usize) -> Task {
    let rate = MESSAGES_PER_S / group as u64;
    let at_once = AT_ONCE / group as u64;
    Task::Push(PushPlan { group, burst, events: MESSAGES / group as u64, rate, at_once, bytes })
}

const LATENCY: PushPlan = PushPlan {
    group: 1,
    burst: 1,
    events: LATENCY_RATE * 3,
    rate: LATENCY_RATE,
    at_once: 1,
    bytes: 128,
};

const fn work(name: &'static str, title: &'static str, wire: Wire, task: Task) -> Work {
    Work { name, title, task, wire }
}

/// All works.
pub const WORKS: [Work; 10] = [
    work("push", "push, one recipient each", Wire::Binary, push(1, 1, 128)),
    work("groups", "conversations of 100", Wire::Binary, push(100, 1, 128)),
    work("burst", "8 events waiting per session", Wire::Binary, push(1, 8, 128)),
    work(
        "flood",
        "push, one recipient each, as fast as it goes",
        Wire::Binary,
        Task::Push(PushPlan { events: MESSAGES, rate: 0, ..LATENCY }),
    ),
    work("latency", "push, 25,000 a second, one by one", Wire::Binary, Task::Push(LATENCY)),
    work(
        "slow",
        "push, 5,000 a second, one by one",
        Wire::Binary,
        Task::Push(PushPlan { events: SLOW_RATE * 3, rate: SLOW_RATE, ..LATENCY }),
    ),
    work("json", "conversations of 100, JSON", Wire::Json, push(100, 1, 128)),
    work("kib", "conversations of 100, 1 KiB of JSON", Wire::Json, push(100, 1, JSON_KIB_BYTES)),
    work(
        "deflate",
        "conversations of 100, 1 KiB of JSON, deflate",
        Wire::JsonDeflate,
        push(100, 1, JSON_KIB_BYTES),
    ),
    work(
        "echo",
        "echo, 256 under way",
        Wire::Binary,
        Task::Echo { window: 256, bytes: 128, ms: 3000 },
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ() {
        for (at, work) in WORKS.iter().enumerate() {
            assert!(WORKS[at + 1..].iter().all(|other| other.name != work.name));
        }
    }

    #[test]
    fn a_kib_of_json_is_one() {
        use crate::payload::{Stamp, Template};
        use delivery::service::{encode, envelope};

        let stamp = Stamp { sequence: 100, intended_ns: 1 };
        let value = Template::new(JSON_KIB_BYTES).envelope(1_000_000, stamp);
        let text = encode::json(&envelope::decode(&value).unwrap()).unwrap();
        assert!((1020..=1028).contains(&text.len()), "{}", text.len());
        assert_eq!(Stamp::find(&text), Some(stamp));
    }
}
