//! When messages were late, beside what was done to the nodes.

use std::collections::BTreeMap;
use std::time::Duration;

/// Messages that took longer are late.
const LATE: Duration = Duration::from_secs(1);

/// Late messages by the second in which they were published, and notes.
#[derive(Debug, Default)]
pub(in super::super) struct Timeline {
    /// By second and node: the longest delay, and arrivals.
    late: BTreeMap<(u64, usize), (Duration, u64)>,
    notes: Vec<(Duration, String)>,
}

impl Timeline {
    /// A message of the time `sent` arrived at a session of this node.
    pub(super) fn arrived(&mut self, sent: Duration, after: Duration, node: usize) {
        if after > LATE {
            let (longest, count) = self.late.entry((sent.as_secs(), node)).or_default();
            *longest = after.max(*longest);
            *count += 1;
        }
    }

    /// Something was done to a node.
    pub(super) fn note(&mut self, at: Duration, what: &str) {
        self.notes.push((at, what.into()));
    }

    /// One line for each note, and for each second with late messages.
    pub(in super::super) fn lines(&self) -> Vec<String> {
        let notes = self.notes.iter().map(|(at, what)| (*at, format!("{at:.1?} {what}")));
        let late = self.late.iter().map(|((second, node), (longest, count))| {
            let line = format!("{second} s: {count} late at node {node}, up to {longest:.1?}");
            (Duration::from_secs(*second), line)
        });
        let mut lines: Vec<_> = notes.chain(late).collect();
        lines.sort();
        lines.into_iter().map(|(_, line)| line).collect()
    }
}
