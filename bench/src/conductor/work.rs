//! The works that are measured.

use std::str::FromStr;

use super::Role;
use crate::generator::PushPlan;

/// Task of a work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Push a plan.
    Push(PushPlan),
    /// Push a plan of events that are due one by one, each for a session on each of two nodes.
    HandOff(PushPlan),
    /// Answer echoes.
    Echo {
        /// Messages in flight.
        window: usize,
        /// Size of each message, bytes.
        bytes: usize,
        /// Duration, ms.
        ms: u64,
    },
}

/// Encoding that the sessions of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Binary, the default.
    Binary,
    /// The JSON subprotocol.
    Json,
    /// The JSON subprotocol and permessage-deflate.
    JsonDeflate,
}

impl Wire {
    /// All, in order of use.
    pub const ALL: [Self; 3] = [Self::Binary, Self::Json, Self::JsonDeflate];

    /// Arguments of the client.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Binary => &[],
            Self::Json => &["--protocol=realchat.v1.json"],
            Self::JsonDeflate => &["--protocol=realchat.v1.json", "--deflate"],
        }
    }
}

/// A work: one section of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its name in the table.
    pub title: &'static str,
    /// Its task.
    pub task: Task,
    /// Encoding of its sessions.
    pub wire: Wire,
}

impl Work {
    /// Whether a server of this kind can do the work.
    pub fn suits(&self, role: Role) -> bool {
        match (self.task, self.wire) {
            (Task::HandOff(_), _) => role == Role::Cluster,
            (_, _) if role == Role::Cluster => false,
            (Task::Push(_), Wire::Json | Wire::JsonDeflate) => role == Role::Delivery,
            // Bursts are not kept together across partitions.
            (Task::Push(plan), Wire::Binary) => role != Role::Kafka || plan.burst == 1,
            (Task::Echo { .. }, _) => role != Role::Kafka,
        }
    }
}

impl FromStr for Work {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        WORKS.into_iter().find(|work| work.name == name).ok_or_else(|| format!("no work {name:?}"))
    }
}

/// Messages per second of most works: about half of what one core can push, so that the client keeps
/// up. A server ahead of its client fills the sockets, which would measure memory traffic instead.
const MESSAGES_PER_S: u64 = 64_000;
/// Messages that become due together.
const AT_ONCE: u64 = 512;
/// Messages of a work: 15 for each of 10,000 sessions. After a pause, a receiver acknowledges the first
/// 16 segments at once (`TCP_MAX_QUICKACKS`), within the send, on the server's core. Later ones are
/// acknowledged when the client reads, on the client's core, and cost the server a third less. Chat
/// sessions are mostly idle, so only the first kind is measured.
const MESSAGES: u64 = 150_000;
/// Events per second of the latency work: a fifth of what one core can push.
const LATENCY_RATE: u64 = 25_000;
/// The same at a rate that leaves room on the core that broker, producer and client share.
const SLOW_RATE: u64 = 5_000;
/// The same for hand-offs: the broker stores each event twice, and a round trip.
const HAND_OFF_RATE: u64 = 1_000;
/// The same with pauses longer than a producer lingers, so that no two records share a batch.
const HAND_OFF_SLOW_RATE: u64 = 400;
const HAND_OFF_SECONDS: u64 = 15;
/// Size of a value whose JSON has 1024 bytes.
const JSON_KIB_BYTES: usize = 841;

/// A push to conversations of `group`, `burst` events in a row, in batches.
const fn push(group: usize, burst: usize, bytes: usize) -> Task {
    let rate = MESSAGES_PER_S / group as u64;
    let at_once = AT_ONCE / group as u64;
    Task::Push(PushPlan {
        group,
        each: 1,
        burst,
        events: MESSAGES / group as u64,
        rate,
        at_once,
        bytes,
    })
}

const LATENCY: PushPlan = PushPlan {
    group: 1,
    each: 1,
    burst: 1,
    events: LATENCY_RATE * 3,
    rate: LATENCY_RATE,
    at_once: 1,
    bytes: 128,
};

/// Events for a session on each of two nodes.
const fn hand_off(rate: u64) -> Task {
    Task::HandOff(PushPlan { events: rate * HAND_OFF_SECONDS, rate, ..LATENCY })
}

const fn work(name: &'static str, title: &'static str, wire: Wire, task: Task) -> Work {
    Work { name, title, task, wire }
}

/// All works.
pub const WORKS: [Work; 12] = [
    work("push", "push, one recipient each", Wire::Binary, push(1, 1, 128)),
    work("groups", "conversations of 100", Wire::Binary, push(100, 1, 128)),
    work("burst", "8 events waiting per session", Wire::Binary, push(1, 8, 128)),
    work(
        "flood",
        "push, one recipient each, at full speed",
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
    work(
        "handoff",
        "to a session on each of two nodes, 1,000 a second, one by one",
        Wire::Binary,
        hand_off(HAND_OFF_RATE),
    ),
    work(
        "handoff-slow",
        "to a session on each of two nodes, 400 a second, one by one",
        Wire::Binary,
        hand_off(HAND_OFF_SLOW_RATE),
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
        "echo, 256 in flight",
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
    fn kib_of_json_has_1024_bytes() {
        use crate::payload::{Stamp, Template};
        use delivery::service::events::{encode, envelope};

        let stamp = Stamp { sequence: 100, intended_ns: 1 };
        let value = Template::new(JSON_KIB_BYTES).envelope(1_000_000, stamp);
        let text = encode::json(&envelope::decode(&value).unwrap()).0;
        assert!((1020..=1028).contains(&text.len()), "{}", text.len());
        assert_eq!(Stamp::find(&text), Some(stamp));
    }
}
