//! The room for live events in the streams, and who is closed when there is none.

use std::cmp::Reverse;
use std::time::Duration;

use tokio::time::Instant;

use super::Hub;
use crate::domain::close::EndReason;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::{held_share, queued_share};
use crate::service::streams::hub::outbox::Unsent;
use crate::service::streams::hub::status;

/// How long the routers' rings may wait for a writer before it counts as slow. A burst fills the queue of a stream
/// before its writer has run at all.
const WRITER_MAX: Duration = Duration::from_millis(16);

/// A stream whose queue is almost full.
#[derive(Clone, Copy, Debug)]
pub(super) struct AwaitedWriter {
    pub(super) connection: ConnectionKey,
    /// Since the hub began.
    pub(super) since: Duration,
    /// The routers' rings do not wait for it any more: it may overflow.
    pub(super) given_up: bool,
}

/// If the windows of clients are not the cause that there is little room, the hub looks again after so long.
const ROOM_RETRY_MS: u64 = 16;

impl AwaitedWriter {
    fn is_slow(self, now: Duration) -> bool {
        self.since + WRITER_MAX <= now
    }
}

impl Hub {
    /// Counts the time since the last turn as a wait if the routers' rings waited for clients, or nearly so.
    pub(super) fn count_waits(&mut self) {
        let (now, now_ms) = (self.began.elapsed(), self.now_ms());
        self.room_waits.pass(now_ms, self.was_crowded);
        let makes_wait = |it: &AwaitedWriter| !it.given_up && it.is_slow(now);
        self.writer_waits.pass(now_ms, self.awaited.iter().any(makes_wait));
    }

    /// Ends the waits that are over. Returns whether the routers' rings still wait for a writer. They wait for slow
    /// ones only as long as all clients together may make them wait ([`WaitAllowance`](crate::domain::wait_allowance::WaitAllowance)).
    pub(super) fn end_writer_waits(&mut self) -> bool {
        if self.awaited.is_empty() {
            return false;
        }
        let (now, is_used_up) = (self.began.elapsed(), self.writer_waits.is_used_up());
        let streams = &self.streams;
        self.awaited.retain_mut(|it| {
            it.given_up |= is_used_up && it.is_slow(now);
            streams.get(it.connection).is_some_and(|stream| stream.outbox.awaits_writer())
        });
        self.awaited.iter().any(|it| !it.given_up)
    }

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

    /// There has been little room for as long as that may last. If at least half of what is queued waits for windows of
    /// clients, closes their streams, those with the longest queues first, until a quarter of the room is free. What the
    /// rings have may fill it again at once: then there is nothing left to wait, and further streams are closed.
    /// Otherwise the writers only lack processor time, and make room.
    pub(super) fn close_closed_windows(&mut self, now: Instant) {
        let (mut events, mut cost) = (0, 0);
        let mut closed = Vec::new();
        for (connection, stream) in self.streams.iter_mut() {
            let Some(waiting) = stream.outbox.waiting_for_window(now) else { continue };
            (events, cost) = (events + waiting.0, cost + waiting.1);
            if waiting.0 > 0 {
                closed.push((Reverse(waiting.1), connection));
            }
        }
        let queued = &self.notices.queued;
        if events < queued.events() / 2 && cost < queued.cost() / 2 {
            return self.room_waits.allow(ROOM_RETRY_MS);
        }
        closed.sort_unstable_by_key(|(cost, _)| *cost);
        for (_, connection) in closed {
            if !self.has_more_queued_than(3, 4) {
                return;
            }
            self.metrics.counters.stream_closed_for_room.add(1);
            self.close(connection, status::overflow(), EndReason::QueueOverflow, Unsent::Discard);
        }
    }

    /// Too much is held for the streams that catch up: closes those that hold most, until a quarter of the room is
    /// free.
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
