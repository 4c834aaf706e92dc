//! One event on its way to streams, and the word that goes back when it has reached them all.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::domain::close::EndReason;
use crate::domain::command::ReplyTo;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;

/// What happens outside the hub's task and concerns it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// No stream holds this delivery any more.
    Done(ReplyTo),
    /// Neither the reader nor the writer of a stream is there any more.
    Gone(ConnectionKey, EndReason),
}

/// Signals that wait for the hub. Bounded by what they stand for: one for each delivery under way
/// (see [`Signals::deliveries`]) and one for each stream.
#[derive(Debug, Default)]
pub(super) struct Signals {
    waiting: Mutex<Vec<Signal>>,
    deliveries: AtomicUsize,
    bytes: AtomicUsize,
    /// Woken at every signal and at the end of every delivery.
    pub(super) wake: Notify,
}

impl Signals {
    pub(super) fn send(&self, signal: Signal) {
        self.waiting.lock().expect("no holder panics").push(signal);
        self.wake.notify_one();
    }

    /// All that wait, in order.
    pub(super) fn take(&self) -> Vec<Signal> {
        std::mem::take(&mut *self.waiting.lock().expect("no holder panics"))
    }

    /// Deliveries that some stream still holds.
    pub(super) fn deliveries(&self) -> usize {
        self.deliveries.load(Ordering::Relaxed)
    }

    /// Their bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// An event for one or more streams. When the last of them has let go of it, whether it was sent
/// or the stream ended, the issuer of its ticket hears of it.
#[derive(Debug)]
pub(crate) struct Delivery {
    event: Arc<Event>,
    reply_to: Option<ReplyTo>,
    signals: Arc<Signals>,
}

impl Delivery {
    /// `None`: the event cannot be expressed on a stream, so there is nothing to send.
    pub(super) fn new(
        event: Arc<Event>,
        reply_to: Option<ReplyTo>,
        signals: &Arc<Signals>,
    ) -> Option<Arc<Self>> {
        let bytes = event.frame(Encoding::Stream)?.len();
        signals.deliveries.fetch_add(1, Ordering::Relaxed);
        signals.bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(Arc::new(Self { event, reply_to, signals: Arc::clone(signals) }))
    }

    /// A serialized `DeliveryEvent`.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.event.frame(Encoding::Stream).unwrap_or_default()
    }

    /// The event.
    pub(crate) fn event(&self) -> &Event {
        &self.event
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.signals.deliveries.fetch_sub(1, Ordering::Relaxed);
        self.signals.bytes.fetch_sub(self.bytes().len(), Ordering::Relaxed);
        match self.reply_to {
            Some(reply_to) => self.signals.send(Signal::Done(reply_to)),
            None => self.signals.wake.notify_one(),
        }
    }
}
