//! Records that have been handed on and are not done: each has a ticket, which the shards and
//! whoever forwards it to other nodes give back.

use std::collections::VecDeque;
use std::num::NonZeroU64;

use slab::Slab;

use crate::domain::command::Ticket;
use crate::service::routing::offsets::Taken;

/// A record in its lane: the lane by number, and which of the partitions that held the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogRecord {
    pub(super) lane: LaneKey,
    pub(super) taken: Taken,
}

/// Names a partition as long as it is assigned.
///
/// ```text
/// | serial: 32 | slot: 32 |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LaneKey(pub(super) u64);

impl LaneKey {
    pub(super) fn new(serial: u32, slot: usize) -> Self {
        let slot = u32::try_from(slot).expect("partitions are few");
        Self(u64::from(serial) << 32 | u64::from(slot))
    }

    pub(super) fn slot(self) -> usize {
        self.0 as u32 as usize
    }
}

#[derive(Debug)]
struct Flight {
    record: LogRecord,
    /// Tells a late report for a predecessor apart.
    serial: u32,
    /// Reports still to come.
    remaining: u32,
    forwarding: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Flights {
    flights: Slab<Flight>,
    serial: u32,
    /// Forwards in the order of their deadlines.
    deadlines: VecDeque<(u64, Ticket)>,
    forwards: usize,
}

/// Memory of one record that is under way and of its hand-off's deadline, bytes.
pub(super) const ENTRY_BYTES: usize = 2 * size_of::<Flight>() + size_of::<(u64, Ticket)>();

/// What a report led to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// More is to come.
    Partly,
    /// It was the last.
    Done(LogRecord),
    /// Nobody waits for it any more.
    Stale,
}

impl Flights {
    /// A ticket for a record, with nothing to wait for yet.
    pub(super) fn open(&mut self, record: LogRecord) -> Ticket {
        self.serial = self.serial.wrapping_add(1);
        let flight = Flight { record, serial: self.serial, remaining: 0, forwarding: false };
        let key = u32::try_from(self.flights.insert(flight)).expect("bounded by the windows");
        let raw = u64::from(self.serial) << 32 | (u64::from(key) + 1);
        Ticket(NonZeroU64::new(raw).expect("the key is counted from 1"))
    }

    fn key(ticket: Ticket) -> (usize, u32) {
        let raw = ticket.0.get();
        ((raw as u32 - 1) as usize, (raw >> 32) as u32)
    }

    fn get(&mut self, ticket: Ticket) -> Option<&mut Flight> {
        let (key, serial) = Self::key(ticket);
        self.flights.get_mut(key).filter(|flight| flight.serial == serial)
    }

    /// One more report is to come.
    pub(super) fn expect(&mut self, ticket: Ticket) {
        self.get(ticket).expect("open").remaining += 1;
    }

    /// The report that forwarding has ended is to come, or its deadline.
    pub(super) fn expect_forward(&mut self, ticket: Ticket, deadline_ms: u64) {
        let flight = self.get(ticket).expect("open");
        flight.remaining += 1;
        flight.forwarding = true;
        self.forwards += 1;
        self.deadlines.push_back((deadline_ms, ticket));
    }

    /// All who are to report are known. `Some`: nobody is.
    pub(super) fn seal(&mut self, ticket: Ticket) -> Option<LogRecord> {
        if self.get(ticket).expect("open").remaining > 0 {
            return None;
        }
        Some(self.flights.remove(Self::key(ticket).0).record)
    }

    /// A shard (or the dead-letter topic) reports.
    pub(super) fn report(&mut self, ticket: Ticket) -> Reported {
        let Some(flight) = self.get(ticket) else { return Reported::Stale };
        let Some(left) = flight.remaining.checked_sub(1) else { return Reported::Stale };
        flight.remaining = left;
        if left > 0 {
            return Reported::Partly;
        }
        Reported::Done(self.flights.remove(Self::key(ticket).0).record)
    }

    /// Forwarding has ended. Late after its deadline: stale.
    pub(super) fn report_forward(&mut self, ticket: Ticket) -> Reported {
        match self.get(ticket) {
            Some(flight) if flight.forwarding => {
                flight.forwarding = false;
                self.forwards -= 1;
                self.report(ticket)
            }
            _ => Reported::Stale,
        }
    }

    /// The next forward whose deadline has passed without a report.
    pub(super) fn expired(&mut self, now_ms: u64) -> Option<Ticket> {
        while let Some(&(deadline_ms, ticket)) = self.deadlines.front() {
            let open = self.get(ticket).is_some_and(|flight| flight.forwarding);
            if open && deadline_ms > now_ms {
                return None;
            }
            self.deadlines.pop_front();
            if open {
                return Some(ticket);
            }
        }
        None
    }

    /// When the next deadline passes.
    pub(super) fn next_deadline_ms(&self) -> Option<u64> {
        self.deadlines.front().map(|(deadline_ms, _)| *deadline_ms)
    }

    /// Forwards under way.
    pub(super) fn forwards(&self) -> usize {
        self.forwards
    }

    /// Records under way.
    pub(super) fn len(&self) -> usize {
        self.flights.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::routing::offsets::OffsetWindow;

    fn record() -> LogRecord {
        LogRecord { lane: LaneKey(1), taken: OffsetWindow::new(0, 1).take(0) }
    }

    #[test]
    fn last_report_ends_it() {
        let mut flights = Flights::default();
        let ticket = flights.open(record());
        flights.expect(ticket);
        flights.expect_forward(ticket, 10);
        assert_eq!(flights.seal(ticket), None);
        assert_eq!(flights.report_forward(ticket), Reported::Partly);
        assert_eq!(flights.report_forward(ticket), Reported::Stale, "once");
        assert_eq!(flights.report(ticket), Reported::Done(record()));
        assert_eq!(flights.report(ticket), Reported::Stale);
        assert_eq!((flights.len(), flights.forwards()), (0, 0));
    }

    #[test]
    fn nobody_to_report_ends_it_at_once() {
        let mut flights = Flights::default();
        let ticket = flights.open(record());
        assert_eq!(flights.seal(ticket), Some(record()));
        assert_eq!(flights.len(), 0);
    }

    #[test]
    fn forward_past_its_deadline_is_given_up_and_its_report_stale() {
        let mut flights = Flights::default();
        let (first, second) = (flights.open(record()), flights.open(record()));
        flights.expect_forward(first, 10);
        flights.expect_forward(second, 20);
        assert_eq!(flights.expired(9), None);
        assert_eq!(flights.report_forward(first), Reported::Done(record()));
        assert_eq!(flights.expired(19), None);
        assert_eq!(flights.next_deadline_ms(), Some(20));
        assert_eq!(flights.expired(20), Some(second));
        assert_eq!(flights.report_forward(second), Reported::Done(record()));
        let successor = flights.open(record());
        flights.expect_forward(successor, 30);
        assert_eq!(flights.report_forward(second), Reported::Stale);
        assert_eq!(flights.forwards(), 1);
    }
}
