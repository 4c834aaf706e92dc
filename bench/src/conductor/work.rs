//! What the servers are made to do.

use crate::generator::Plan;

/// What a work asks of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Push so.
    Push(Plan),
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

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its name in the table.
    pub title: &'static str,
    /// What is done.
    pub task: Task,
}

const fn push(group: usize, burst: usize, events: u64, rate: u64) -> Task {
    Task::Push(Plan { group, burst, events, rate, bytes: 128 })
}

/// All works.
pub const WORKS: [Work; 5] = [
    Work { name: "push", title: "push, one recipient each", task: push(1, 1, 400_000, 0) },
    Work { name: "groups", title: "conversations of 100", task: push(100, 1, 4_000, 0) },
    Work { name: "burst", title: "8 events in a row per session", task: push(1, 8, 800_000, 0) },
    Work { name: "paced", title: "push, 20,000 a second", task: push(1, 1, 60_000, 20_000) },
    Work {
        name: "echo",
        title: "echo, 256 under way",
        task: Task::Echo { window: 256, bytes: 128, ms: 3000 },
    },
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
}
