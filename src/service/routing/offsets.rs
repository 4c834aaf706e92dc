//! Tracks which records of a partition are done, and thus which offset may be committed.
//!
//! ```text
//! taken in order      100   101   104   105   106        (offsets may have gaps)
//! done in any order    ✓     ✓     ·     ✓     ·
//! committable                     104  ← the lowest that is not done; a new owner reads on there
//! ```

use std::collections::VecDeque;

use crate::domain::command::Ticket;

/// Identifies a record of a window until it is done: the number of records taken before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowIndex(u64);

#[derive(Clone, Copy, Debug)]
struct WindowEntry {
    offset: i64,
    state: RecordState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RecordState {
    /// Not routed yet.
    Taken,
    /// Routed. The ticket is returned by whatever it waits for.
    InFlight(Ticket),
    Done,
}

/// The records of one partition from the lowest that is not done to the last taken.
#[derive(Debug)]
pub struct OffsetWindow {
    entries: VecDeque<WindowEntry>,
    /// `WindowIndex` of the first entry.
    first: u64,
    /// One more than the last offset taken.
    next: i64,
    /// Entries that are not done.
    open: usize,
    records_max: usize,
}

impl OffsetWindow {
    /// Memory of one record, bytes.
    pub const ENTRY_BYTES: usize = size_of::<WindowEntry>();

    /// A window of at most `records_max` records over a partition that is read from `start`.
    pub fn new(start: i64, records_max: usize) -> Self {
        assert!(records_max > 0);
        Self { entries: VecDeque::new(), first: 0, next: start, open: 0, records_max }
    }

    /// The lowest offset that can be taken.
    pub fn next(&self) -> i64 {
        self.next
    }

    /// Whether another record can be taken. If not, the partition waits until its oldest record is
    /// done or given up.
    pub fn has_room(&self) -> bool {
        self.entries.len() < self.records_max
    }

    /// Records in the window: taken, not yet committable.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Records that are taken and not done.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Whether every record taken is committable.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes the next record. The caller has checked for room; offsets ascend.
    pub fn take(&mut self, offset: i64) -> WindowIndex {
        assert!(self.has_room());
        assert!(offset >= self.next, "{offset} after {}", self.next);
        let index = WindowIndex(self.first + self.entries.len() as u64);
        self.entries.push_back(WindowEntry { offset, state: RecordState::Taken });
        self.next = offset + 1;
        self.open += 1;
        index
    }

    fn state(&mut self, record: WindowIndex) -> &mut RecordState {
        let index = record.0.checked_sub(self.first).expect("done once") as usize;
        &mut self.entries[index].state
    }

    /// A record is routed.
    pub fn in_flight(&mut self, record: WindowIndex, ticket: Ticket) {
        *self.state(record) = RecordState::InFlight(ticket);
    }

    /// The oldest record, if it is in flight.
    pub fn oldest_in_flight(&self) -> Option<(WindowIndex, Ticket)> {
        match self.entries.front()?.state {
            RecordState::InFlight(ticket) => Some((WindowIndex(self.first), ticket)),
            RecordState::Taken | RecordState::Done => None,
        }
    }

    /// Marks a record done, once each. Returns whether the committable offset has moved.
    pub fn done(&mut self, record: WindowIndex) -> bool {
        let before = std::mem::replace(self.state(record), RecordState::Done);
        assert!(before != RecordState::Done, "done once");
        self.open -= 1;
        let before = self.first;
        while self.entries.front().is_some_and(|entry| entry.state == RecordState::Done) {
            self.entries.pop_front();
            self.first += 1;
        }
        self.first != before
    }

    /// The offset to commit: every record below it is done, and a new owner reads on there.
    pub fn committable(&self) -> i64 {
        self.entries.front().map_or(self.next, |entry| entry.offset)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn gap_in_the_log_is_skipped() {
        let mut window = OffsetWindow::new(10, 4);
        assert_eq!(window.committable(), 10);
        let (a, b) = (window.take(12), window.take(20));
        assert_eq!(window.committable(), 12);
        assert!(!window.done(b));
        assert_eq!(window.committable(), 12);
        assert!(window.done(a));
        assert_eq!(window.committable(), 21);
        assert!(window.is_empty());
    }

    #[test]
    fn full_window_has_room_again_once_its_oldest_record_is_done() {
        let mut window = OffsetWindow::new(0, 2);
        let (oldest, other) = (window.take(0), window.take(1));
        window.done(other);
        assert!(!window.has_room());
        window.done(oldest);
        assert!(window.has_room());
    }

    #[test]
    #[should_panic(expected = "done once")]
    fn done_twice_panics() {
        let mut window = OffsetWindow::new(0, 2);
        let first = window.take(0);
        window.take(1);
        window.done(first);
        window.done(first);
    }

    proptest! {
        /// The oracle keeps every record ever taken and scans them all.
        #[test]
        fn committable_is_the_lowest_not_done(
            start in 0i64..1000,
            steps in prop::collection::vec((any::<bool>(), 1i64..4, any::<prop::sample::Index>()), 0..300),
        ) {
            let mut window = OffsetWindow::new(start, 16);
            let mut oracle = BTreeMap::new();
            let mut open = Vec::new();
            let mut next = start;
            for (take, gap, pick) in steps {
                if take && window.has_room() {
                    let offset = next + gap - 1;
                    open.push((offset, window.take(offset)));
                    oracle.insert(offset, false);
                    next = offset + 1;
                } else if !open.is_empty() {
                    let (offset, taken) = open.swap_remove(pick.index(open.len()));
                    let before = window.committable();
                    let moved = window.done(taken);
                    oracle.insert(offset, true);
                    prop_assert_eq!(moved, window.committable() != before);
                }
                let lowest = oracle.iter().find(|(_, done)| !**done).map_or(next, |(at, _)| *at);
                prop_assert_eq!(window.committable(), lowest);
                let held = oracle.range(lowest..).count();
                prop_assert_eq!(window.len(), held);
                prop_assert_eq!(window.open(), oracle.values().filter(|done| !**done).count());
                prop_assert_eq!(window.has_room(), held < 16);
            }
        }
    }
}
