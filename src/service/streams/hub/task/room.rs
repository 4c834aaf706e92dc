//! The room for live events in the streams, and who is closed when there is none.

use std::cmp::Reverse;
use std::time::Duration;

use tokio::time::Instant;

use super::Hub;
use crate::domain::close::EndReason;
use crate::domain::limits::{held_share, queued_share};
use crate::domain::wait_allowance::WaitAllowance;
use crate::service::streams::hub::outbox::Unsent;
use crate::service::streams::hub::status;

/// A stream may be closed for the room that its queue takes if its oldest event has waited for this long. Otherwise the
/// writers may only lack processor time.
pub(super) const BEHIND_MIN: Duration = Duration::from_secs(1);

impl Hub {
    /// Whether the limit of deliveries in progress is reached.
    pub(super) fn is_full(&self) -> bool {
        self.has_more_queued_than(1, 1)
    }

    /// Whether there is so little room left that streams have to be closed, before the rings wait for them.
    pub(super) fn is_crowded(&self) -> bool {
        self.has_more_queued_than(7, 8)
    }

    /// Notes how much is in the streams at the end of a turn.
    pub(super) fn note_room(&mut self) {
        self.was_crowded = self.is_crowded();
        let (queued, held) = (self.notices.queued.events(), self.notices.held.events());
        self.metrics.counters.stream_deliveries.set(queued + held);
        self.metrics.counters.stream_deliveries_held.set(held);
    }

    /// Whether at least this part of what may be queued is queued.
    fn has_more_queued_than(&self, numerator: u64, denominator: u64) -> bool {
        let share = |all: usize| queued_share(all as u64) * numerator;
        let queued = &self.notices.queued;
        queued.events() * denominator >= share(self.config.deliveries_max)
            || queued.cost() * denominator >= share(self.config.deliveries_bytes_max)
    }

    /// Whether more than this part of what may be held is held. One event may exceed the limits.
    pub(super) fn has_more_held_than(&self, numerator: u64, denominator: u64) -> bool {
        let share = |all: usize| held_share(all as u64) * numerator;
        let held = &self.notices.held;
        held.events() > 1
            && (held.events() * denominator > share(self.config.deliveries_max)
                || held.cost() * denominator > share(self.config.deliveries_bytes_max))
    }

    /// There has been little room for as long as that may last. Closes streams that are behind, those with the longest queues
    /// first, until a quarter of the room is free.
    pub(super) fn close_those_behind(&mut self, now: Instant) {
        self.room_waits = WaitAllowance::new(self.now_ms());
        let mut behind = Vec::new();
        for (connection, stream) in self.streams.iter_mut() {
            match stream.outbox.backlog(now) {
                Some((waited, cost)) if waited >= BEHIND_MIN => behind.push((cost, connection)),
                Some(_) | None => {}
            }
        }
        behind.sort_unstable_by_key(|(cost, _)| Reverse(*cost));
        for (_, connection) in behind {
            if !self.has_more_queued_than(3, 4) {
                return;
            }
            self.metrics.counters.stream_closed_for_room.add(1);
            self.close(connection, status::overflow(), EndReason::QueueOverflow, Unsent::Discard);
        }
    }

    /// Too much is held for the streams that catch up: closes those that hold most, until a quarter of the room is free.
    pub(super) fn close_largest_holders(&mut self) {
        let streams = self.streams.iter_mut();
        let holders = streams.map(|(connection, it)| (Reverse(it.outbox.held_cost()), connection));
        let mut holders: Vec<_> = holders.filter(|(Reverse(cost), _)| *cost > 0).collect();
        holders.sort_unstable_by_key(|(cost, _)| *cost);
        for (_, connection) in holders {
            if !self.has_more_held_than(3, 4) {
                return;
            }
            self.metrics.counters.stream_closed_in_catch_up_for_room.add(1);
            let (status, why) = (status::catch_up_overflow(), EndReason::QueueOverflow);
            self.close(connection, status, why, Unsent::Discard);
        }
    }
}
