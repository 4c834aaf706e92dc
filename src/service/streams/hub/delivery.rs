//! One event on its way to streams, and the notice to the hub when no stream holds it any more.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use tonic::Status;

use crate::domain::close::EndReason;
use crate::domain::command::{DeliveryClass, ReplyTo};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;

/// Something that other tasks report to the hub's task.
#[derive(Debug)]
pub(super) enum Notice {
    /// No stream holds the delivery of this command any more.
    Delivered(ReplyTo),
    /// The queue of a stream became empty after many events.
    BurstDrained(ConnectionKey),
    /// The client broke a rule: its stream must be closed with this status.
    AtFault(ConnectionKey, Status),
    /// Both the reader and the writer of a stream are gone.
    StreamEnded(ConnectionKey, EndReason),
}

/// Live events in the streams, and what they cost.
#[derive(Debug, Default)]
pub(super) struct AtomicAmount {
    /// Below 0 for a moment, while two tasks change the same delivery.
    events: AtomicI64,
    cost: AtomicI64,
}

impl AtomicAmount {
    fn change(&self, events: i64, event: &Event) {
        let cost = i64::try_from(event.cost()).expect("memory is smaller");
        self.events.fetch_add(events, Ordering::Relaxed);
        self.cost.fetch_add(events * cost, Ordering::Relaxed);
    }

    /// Events and bytes, as they are.
    pub(super) fn sums(&self) -> [i64; 2] {
        [&self.events, &self.cost].map(|sum| sum.load(Ordering::Relaxed))
    }

    /// Number of events.
    pub(super) fn events(&self) -> u64 {
        u64::try_from(self.sums()[0]).unwrap_or(0)
    }

    /// Bytes ([`Event::cost`]).
    pub(super) fn cost(&self) -> u64 {
        u64::try_from(self.sums()[1]).unwrap_or(0)
    }
}

/// Queue of notices for the hub's task, and what the streams have. Bounded by what the notices stand for: one per
/// delivery in progress, and three per stream.
#[derive(Debug, Default)]
pub(super) struct Notices {
    queue: Mutex<Vec<Notice>>,
    /// Live events that no stream holds.
    pub(super) queued: AtomicAmount,
    /// Live events that at least one stream holds until a catch-up is complete.
    pub(super) held: AtomicAmount,
    /// Notified for every notice and whenever a delivery is dropped.
    pub(super) wake: Notify,
}

impl Notices {
    pub(super) fn send(&self, notice: Notice) {
        self.queue.lock().expect("no holder panics").push(notice);
        self.wake.notify_one();
    }

    /// Takes all queued notices, in order.
    pub(super) fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.queue.lock().expect("no holder panics"))
    }
}

/// An event for one or more streams. When the last stream drops it, sent or not, the hub reports its
/// ticket as done.
#[derive(Debug)]
pub(crate) struct Delivery {
    event: Arc<Event>,
    /// `None`: a cursor.
    class: Option<DeliveryClass>,
    reply_to: Option<ReplyTo>,
    notices: Arc<Notices>,
    /// Streams that hold it.
    holders: AtomicU32,
}

impl Delivery {
    /// `None` if the event has no encoding for a stream. Without a `class` it is a cursor.
    pub(super) fn new(
        event: Arc<Event>,
        class: Option<DeliveryClass>,
        reply_to: Option<ReplyTo>,
        notices: &Arc<Notices>,
    ) -> Option<Arc<Self>> {
        event.frame(Encoding::Stream)?;
        if class == Some(DeliveryClass::Live) {
            notices.queued.change(1, &event);
        }
        let (notices, holders) = (Arc::clone(notices), AtomicU32::new(0));
        Some(Arc::new(Self { event, class, reply_to, notices, holders }))
    }

    /// A serialized `DeliveryEvent`.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.event.frame(Encoding::Stream).unwrap_or_default()
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.class == Some(DeliveryClass::Live) {
            self.notices.queued.change(-1, &self.event);
        }
        match self.reply_to {
            Some(reply_to) => self.notices.send(Notice::Delivered(reply_to)),
            None => self.notices.wake.notify_one(),
        }
    }
}

/// A live event that a stream holds until a catch-up is complete.
#[derive(Debug)]
pub(super) struct Held(Arc<Delivery>);

impl Held {
    /// The stream holds it from now on.
    pub(super) fn new(delivery: Arc<Delivery>) -> Self {
        if delivery.holders.fetch_add(1, Ordering::Relaxed) == 0 {
            delivery.notices.queued.change(-1, &delivery.event);
            delivery.notices.held.change(1, &delivery.event);
            delivery.event.begin_hold();
        }
        Self(delivery)
    }

    /// The event.
    pub(super) fn delivery(&self) -> &Arc<Delivery> {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Delivery { event, notices, holders, .. } = &*self.0;
        if holders.fetch_sub(1, Ordering::Relaxed) == 1 {
            notices.held.change(-1, event);
            notices.queued.change(1, event);
            event.end_hold();
        }
    }
}
