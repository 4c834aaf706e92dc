//! Accounting of deliveries, from the ring to the report.

use std::rc::Rc;
use std::sync::Arc;

use crate::domain::command::{DeliveryClass, ReplyTo};
use crate::domain::event::Event;
use crate::domain::outgoing::Outgoing;
use crate::reactor::connection::LifecycleClass;
use crate::reactor::counters::ShardCounters;

/// The outcome of one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The socket has taken all its bytes.
    Sent,
    /// Its connection no longer existed when it arrived.
    Stale,
    /// Its connection ended while it was queued, or was closing when it arrived.
    Ended,
    /// Catch-up had delivered it already.
    Duplicate,
    /// It cannot be expressed in the session's encoding.
    Skipped,
}

/// Events, and the bytes of their frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) events: u64,
    pub(super) bytes: u64,
}

impl Amount {
    fn add(&mut self, event: &Event) {
        self.events += 1;
        self.bytes += event.bytes();
    }

    fn sub(&mut self, event: &Event) {
        self.events -= 1;
        self.bytes -= event.bytes();
    }

    /// What the events cost, bytes.
    pub(super) fn cost(self) -> u64 {
        self.bytes + self.events * Event::OVERHEAD_BYTES
    }
}

/// Counts the events and deliveries of a shard.
#[derive(Debug)]
pub(super) struct Tally {
    counters: Arc<ShardCounters>,
    /// Deliveries that are done and not reported yet.
    done: Vec<ReplyTo>,
    /// Live events that no session holds.
    pub(super) queued: Amount,
    /// Live events that at least one session holds, because it catches up.
    pub(super) held: Amount,
    /// Caught-up messages. Catch-up bounds them.
    caught_up: Amount,
    /// Unix time of this turn, ms; for latencies.
    pub(super) unix_ms: u64,
}

impl Tally {
    pub(super) fn new(counters: Arc<ShardCounters>) -> Self {
        let none = Amount::default();
        Self { counters, done: Vec::new(), queued: none, held: none, caught_up: none, unix_ms: 0 }
    }

    /// An event has been taken from a ring.
    pub(super) fn event_taken(&mut self, event: &Event, class: DeliveryClass, recipients: usize) {
        self.counters.counts.events_taken.add(1);
        self.counters.counts.deliveries.add(recipients as u64);
        self.amount(class).add(event);
    }

    fn amount(&mut self, class: DeliveryClass) -> &mut Amount {
        match class {
            DeliveryClass::Live => &mut self.queued,
            DeliveryClass::CatchUp => &mut self.caught_up,
        }
    }

    /// A session holds a live event.
    pub(super) fn hold(&mut self, outgoing: &Outgoing) {
        if let Some(event) = outgoing.as_event()
            && outgoing.begin_hold()
        {
            self.queued.sub(event);
            self.held.add(event);
            event.begin_hold();
        }
    }

    /// A session does not hold it any more.
    pub(super) fn end_hold(&mut self, outgoing: &Outgoing) {
        if let Some(event) = outgoing.as_event()
            && outgoing.end_hold()
        {
            self.held.sub(event);
            self.queued.add(event);
            event.end_hold();
        }
    }

    /// One recipient of an event is done. Frames made by the shard are not counted.
    pub(super) fn recipient_done(&mut self, outgoing: &Rc<Outgoing>, outcome: Outcome) {
        let Some(event) = outgoing.as_event() else { return };
        let counts = &self.counters.counts;
        match outcome {
            Outcome::Sent => {
                counts.deliveries_sent.add(1);
                if event.appended_at_ms > 0 {
                    let latency_ms = self.unix_ms.saturating_sub(event.appended_at_ms);
                    self.counters.latency.record(latency_ms, 1);
                }
            }
            Outcome::Stale => counts.deliveries_stale.add(1),
            Outcome::Ended => counts.deliveries_ended.add(1),
            Outcome::Duplicate => counts.deliveries_duplicate.add(1),
            Outcome::Skipped => counts.deliveries_skipped.add(1),
        }
        if outgoing.one_done() {
            self.event_done(event, outgoing.class(), outgoing.reply_to());
        }
    }

    /// All recipients of an event are done.
    pub(super) fn event_done(
        &mut self,
        event: &Event,
        class: DeliveryClass,
        reply_to: Option<ReplyTo>,
    ) {
        self.amount(class).sub(event);
        self.done.extend(reply_to);
    }

    /// Takes the deliveries that are done and not reported yet.
    pub(super) fn take_done(&mut self) -> std::vec::Drain<'_, ReplyTo> {
        self.done.drain(..)
    }

    /// A connection has changed its class.
    pub(super) fn lifecycle_changed(&self, from: LifecycleClass, to: LifecycleClass) {
        if from == to {
            return;
        }
        let gauge = |class| match class {
            LifecycleClass::Handshake => Some(&self.counters.counts.handshakes),
            LifecycleClass::Session => Some(&self.counters.counts.sessions),
            LifecycleClass::Echo => Some(&self.counters.counts.echoes),
            LifecycleClass::Other => None,
        };
        if let Some(gauge) = gauge(from) {
            gauge.sub(1);
        }
        if let Some(gauge) = gauge(to) {
            gauge.add(1);
        }
    }

    /// Publishes the gauges.
    pub(super) fn publish_gauges(&self) {
        let Self { queued, held, caught_up, .. } = self;
        let counts = &self.counters.counts;
        counts.events_held.set(queued.events + held.events + caught_up.events);
        counts.event_bytes_held.set(queued.bytes + held.bytes + caught_up.bytes);
        counts.events_in_catch_up.set(held.events);
    }
}
