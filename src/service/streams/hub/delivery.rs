//! One event on its way to streams, and the notice to the hub when no stream holds it any more.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::domain::close::EndReason;
use crate::domain::command::ReplyTo;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;

/// Something that other tasks report to the hub's task.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// No stream holds the delivery of this command any more.
    Delivered(ReplyTo),
    /// The queue of a stream became empty after many events.
    BurstDrained(ConnectionKey),
    /// Both the reader and the writer of a stream are gone.
    StreamEnded(ConnectionKey, EndReason),
}

/// Queue of notices for the hub's task. Bounded by what they stand for: one per delivery in progress
/// (see [`Notices::deliveries`]) and one per stream.
#[derive(Debug, Default)]
pub(super) struct Notices {
    queue: Mutex<Vec<Notice>>,
    deliveries: AtomicUsize,
    bytes: AtomicUsize,
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

    /// Number of deliveries that some stream still holds.
    pub(super) fn deliveries(&self) -> usize {
        self.deliveries.load(Ordering::Relaxed)
    }

    /// Bytes of these deliveries.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// An event for one or more streams. When the last stream drops it, sent or not, the hub reports its
/// ticket as done.
#[derive(Debug)]
pub(crate) struct Delivery {
    event: Arc<Event>,
    reply_to: Option<ReplyTo>,
    notices: Arc<Notices>,
}

impl Delivery {
    /// `None` if the event has no encoding for a stream.
    pub(super) fn new(
        event: Arc<Event>,
        reply_to: Option<ReplyTo>,
        notices: &Arc<Notices>,
    ) -> Option<Arc<Self>> {
        let bytes = event.frame(Encoding::Stream)?.len();
        notices.deliveries.fetch_add(1, Ordering::Relaxed);
        notices.bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(Arc::new(Self { event, reply_to, notices: Arc::clone(notices) }))
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
        self.notices.deliveries.fetch_sub(1, Ordering::Relaxed);
        self.notices.bytes.fetch_sub(self.bytes().len(), Ordering::Relaxed);
        match self.reply_to {
            Some(reply_to) => self.notices.send(Notice::Delivered(reply_to)),
            None => self.notices.wake.notify_one(),
        }
    }
}
