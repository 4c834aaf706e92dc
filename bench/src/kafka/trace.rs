//! Times at which the producer's records were sent, appended and acknowledged.

use std::sync::Mutex;

use rdkafka::client::ClientContext;
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};

use crate::clock::{now_ns, unix_offset_ns};
use crate::journey::Passage;

/// A producer that keeps a [`Passage`] of each record that [`Trace::begin`] has numbered.
pub(super) type TracedProducer = BaseProducer<Trace>;

/// The passages so far, by number.
#[derive(Default)]
pub(super) struct Trace(Mutex<Vec<Passage>>);

/// Number of a record that is not traced.
pub(super) const UNTRACED: usize = usize::MAX;

impl Trace {
    fn passages(&self) -> std::sync::MutexGuard<'_, Vec<Passage>> {
        self.0.lock().expect("no holder panics")
    }

    /// Begins the passage of a record that is about to be sent. Returns its number.
    pub(super) fn begin(&self, session: usize, sequence: u64, due_ns: u64) -> usize {
        let passage = Passage {
            session: session as u32,
            sequence: sequence as u32,
            due_ns,
            sent_ns: now_ns(),
            ..Passage::default()
        };
        let mut passages = self.passages();
        passages.push(passage);
        passages.len() - 1
    }

    /// Takes all passages.
    pub(super) fn take(&self) -> Vec<Passage> {
        std::mem::take(&mut *self.passages())
    }
}

impl ClientContext for Trace {}

impl ProducerContext for Trace {
    type DeliveryOpaque = usize;

    /// Called by the thread that polls the producer. A record that failed keeps times of 0, and the
    /// client reports it as lost.
    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        let Ok(message) = result else { return };
        if let Some(passage) = self.passages().get_mut(number) {
            passage.acknowledged_ns = now_ns();
            passage.partition = message.partition();
            let appended_ms = message.timestamp().to_millis().unwrap_or(0);
            passage.appended_ns =
                (appended_ms.cast_unsigned() * 1_000_000).saturating_sub(unix_offset_ns());
        }
    }
}
