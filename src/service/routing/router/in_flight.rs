//! Records that were passed on and are not done yet. Each has a ticket. Every shard that delivers
//! the record returns the ticket, and so does the hand-off to other nodes.

use std::collections::VecDeque;
use std::num::NonZeroU64;

use slab::Slab;

use crate::domain::command::Ticket;
use crate::service::routing::offsets::WindowIndex;

/// Identifies a record: its lane and its index in the lane's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordId {
    pub(super) lane: LaneKey,
    pub(super) index: WindowIndex,
}

/// Identifies a lane. The serial differs each time a slot is reused.
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
struct InFlightRecord {
    id: RecordId,
    /// Distinguishes this record from an earlier one in the same slot, whose report may come late.
    serial: u32,
    /// When it was routed, steady time in ms.
    since_ms: u64,
    /// Reports still expected.
    remaining: u32,
    /// Those of them that do not come from shards.
    elsewhere: u32,
    /// Whether one of these is the hand-off through Redis.
    forwarding: bool,
}

/// A ticket that is returned by something other than a shard.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReturnedTicket {
    Forward(Ticket),
    HandOff(Ticket),
    DeadLetter(Ticket),
    /// A replay of this lane is stored.
    Replay(LaneKey),
    /// What one other node was told of lost records of this lane is stored.
    Loss(LaneKey),
}

/// The records in flight, by ticket.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    records: Slab<InFlightRecord>,
    serial: u32,
    /// Deadlines of the hand-offs, in order. Steady time, ms.
    deadlines: VecDeque<(u64, Ticket)>,
    forwards: usize,
}

/// Memory of one record in flight and of its hand-off's deadline, bytes.
pub(super) const ENTRY_BYTES: usize = 2 * size_of::<InFlightRecord>() + size_of::<(u64, Ticket)>();

/// Result of a report.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReportOutcome {
    /// More reports are expected.
    MorePending,
    /// This was the last report: the record is done.
    Done(RecordId),
    /// The record is not in flight any more, or this report was not expected.
    Stale,
}

impl InFlight {
    /// Issues a ticket for a record. No report is expected yet.
    pub(super) fn open(&mut self, id: RecordId, now_ms: u64) -> Ticket {
        self.serial = self.serial.wrapping_add(1);
        let (serial, since_ms) = (self.serial, now_ms);
        let (remaining, elsewhere, forwarding) = (0, 0, false);
        let record = InFlightRecord { id, serial, since_ms, remaining, elsewhere, forwarding };
        let slot = u32::try_from(self.records.insert(record)).expect("bounded by the windows");
        let raw = u64::from(self.serial) << 32 | (u64::from(slot) + 1);
        Ticket(NonZeroU64::new(raw).expect("the slot is counted from 1"))
    }

    /// Slot and serial of a ticket.
    fn parts(ticket: Ticket) -> (usize, u32) {
        let raw = ticket.0.get();
        ((raw as u32 - 1) as usize, (raw >> 32) as u32)
    }

    fn get(&mut self, ticket: Ticket) -> Option<&mut InFlightRecord> {
        let (slot, serial) = Self::parts(ticket);
        self.records.get_mut(slot).filter(|record| record.serial == serial)
    }

    fn remove(&mut self, ticket: Ticket) -> RecordId {
        self.records.remove(Self::parts(ticket).0).id
    }

    /// Expects one more report of a shard.
    pub(super) fn expect(&mut self, ticket: Ticket) {
        self.get(ticket).expect("open").remaining += 1;
    }

    /// Expects one more report, not of a shard.
    pub(super) fn expect_elsewhere(&mut self, ticket: Ticket) {
        let record = self.get(ticket).expect("open");
        record.remaining += 1;
        record.elsewhere += 1;
    }

    /// Expects the end of the hand-off to other nodes, at the latest at `deadline_ms` (steady time).
    pub(super) fn expect_forward(&mut self, ticket: Ticket, deadline_ms: u64) {
        self.expect_elsewhere(ticket);
        self.get(ticket).expect("open").forwarding = true;
        self.forwards += 1;
        self.deadlines.push_back((deadline_ms, ticket));
    }

    /// States that all expected reports are registered. `Some`: there are none, so the record is
    /// done.
    pub(super) fn seal(&mut self, ticket: Ticket) -> Option<RecordId> {
        if self.get(ticket).expect("open").remaining > 0 {
            return None;
        }
        Some(self.remove(ticket))
    }

    /// Handles a report of a shard.
    pub(super) fn report(&mut self, ticket: Ticket) -> ReportOutcome {
        let Some(record) = self.get(ticket) else { return ReportOutcome::Stale };
        let Some(remaining) = record.remaining.checked_sub(1) else { return ReportOutcome::Stale };
        record.remaining = remaining;
        if remaining > 0 {
            return ReportOutcome::MorePending;
        }
        ReportOutcome::Done(self.remove(ticket))
    }

    /// Handles a report of something else.
    pub(super) fn report_elsewhere(&mut self, ticket: Ticket) -> ReportOutcome {
        let Some(record) = self.get(ticket) else { return ReportOutcome::Stale };
        let Some(elsewhere) = record.elsewhere.checked_sub(1) else { return ReportOutcome::Stale };
        record.elsewhere = elsewhere;
        self.report(ticket)
    }

    /// Handles the end of a hand-off through Redis. After its deadline the report is stale.
    pub(super) fn report_forward(&mut self, ticket: Ticket) -> ReportOutcome {
        match self.get(ticket) {
            Some(record) if record.forwarding => {
                record.forwarding = false;
                self.forwards -= 1;
                self.report_elsewhere(ticket)
            }
            _ => ReportOutcome::Stale,
        }
    }

    /// Gives up a record that has waited for nothing but sockets since `until_ms` or longer. Reports for it are stale
    /// from now on. Returns whether it was given up.
    pub(super) fn give_up_sockets(&mut self, ticket: Ticket, until_ms: u64) -> bool {
        let waits_for_sockets =
            self.get(ticket).is_some_and(|it| it.elsewhere == 0 && it.since_ms <= until_ms);
        if waits_for_sockets {
            self.remove(ticket);
        }
        waits_for_sockets
    }

    /// Takes the next hand-off whose deadline has passed without a report.
    pub(super) fn expired(&mut self, now_ms: u64) -> Option<Ticket> {
        while let Some(&(deadline_ms, ticket)) = self.deadlines.front() {
            let open = self.get(ticket).is_some_and(|record| record.forwarding);
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

    /// The next deadline, steady time in ms.
    pub(super) fn next_deadline_ms(&self) -> Option<u64> {
        self.deadlines.front().map(|(deadline_ms, _)| *deadline_ms)
    }

    /// Hand-offs in flight.
    pub(super) fn forwards(&self) -> usize {
        self.forwards
    }

    /// Records in flight.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::routing::offsets::OffsetWindow;

    fn id() -> RecordId {
        RecordId { lane: LaneKey(1), index: OffsetWindow::new(0, 1).take(0) }
    }

    #[test]
    fn last_report_makes_the_record_done() {
        let mut in_flight = InFlight::default();
        let ticket = in_flight.open(id(), 0);
        in_flight.expect(ticket);
        in_flight.expect_forward(ticket, 10);
        assert_eq!(in_flight.seal(ticket), None);
        assert_eq!(in_flight.report_forward(ticket), ReportOutcome::MorePending);
        assert_eq!(in_flight.report_forward(ticket), ReportOutcome::Stale, "once");
        assert_eq!(in_flight.report(ticket), ReportOutcome::Done(id()));
        assert_eq!(in_flight.report(ticket), ReportOutcome::Stale);
        assert_eq!((in_flight.len(), in_flight.forwards()), (0, 0));
    }

    #[test]
    fn record_without_expected_reports_is_done_at_once() {
        let mut in_flight = InFlight::default();
        let ticket = in_flight.open(id(), 0);
        assert_eq!(in_flight.seal(ticket), Some(id()));
        assert_eq!(in_flight.len(), 0);
    }

    #[test]
    fn report_of_an_expired_hand_off_is_stale() {
        let mut in_flight = InFlight::default();
        let (first, second) = (in_flight.open(id(), 0), in_flight.open(id(), 0));
        in_flight.expect_forward(first, 10);
        in_flight.expect_forward(second, 20);
        assert_eq!(in_flight.expired(9), None);
        assert_eq!(in_flight.report_forward(first), ReportOutcome::Done(id()));
        assert_eq!(in_flight.expired(19), None);
        assert_eq!(in_flight.next_deadline_ms(), Some(20));
        assert_eq!(in_flight.expired(20), Some(second));
        assert_eq!(in_flight.report_forward(second), ReportOutcome::Done(id()));
        let successor = in_flight.open(id(), 0);
        in_flight.expect_forward(successor, 30);
        assert_eq!(in_flight.report_forward(second), ReportOutcome::Stale);
        assert_eq!(in_flight.forwards(), 1);
    }
}
