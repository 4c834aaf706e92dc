//! A page of messages, and the events made of it.

use std::sync::{Arc, Mutex};

use prost::Message as _;

use super::calls::PageCharge;
use super::{CatchUpConfig, CatchUpResources};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::domain::event::Event;
use crate::service::events::encode::{Encoder, encode_envelope};
use crate::service::events::envelope;
use crate::service::events::proto::message::v1::{Message, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventType;

/// A caught-up message with its sequence.
pub(super) type CaughtUpEvent = (i64, Arc<Event>);

/// A page, shared by the sessions that requested it together. It is encoded once for all sessions of an
/// encoding.
pub(super) struct Page {
    /// Ascending sequences, each with the record's value.
    values: Vec<(i64, Vec<u8>)>,
    /// Whether it is the last one (contract §1).
    pub(super) is_last: bool,
    encoded: Mutex<[Option<Arc<[CaughtUpEvent]>>; Encoding::COUNT]>,
    _charge: PageCharge,
}

impl Page {
    /// The messages after `after`.
    pub(super) fn new(
        conversation: &str,
        (after, page_size): (i64, u16),
        messages: Vec<Message>,
        charge: PageCharge,
    ) -> Self {
        let is_last = messages.len() < usize::from(page_size);
        let value = |message: Message| (message.sequence, envelope_of(conversation, message));
        let values = in_order(messages, after).into_iter().map(value).collect();
        Self { values, is_last, encoded: Mutex::default(), _charge: charge }
    }

    /// The sequence of the newest message; `None`: there is none.
    pub(super) fn newest(&self) -> Option<i64> {
        self.values.last().map(|(sequence, _)| *sequence)
    }
}

/// The messages after `after`, ascending, without duplicates. The contract guarantees this for
/// every page. The caller relies on it, so it is enforced here.
pub(super) fn in_order(mut messages: Vec<Message>, after: i64) -> Vec<Message> {
    messages.retain(|message| message.sequence > after);
    messages.sort_by_key(|message| message.sequence);
    messages.dedup_by_key(|message| message.sequence);
    messages
}

/// The record's value for a caught-up message (contract §3).
fn envelope_of(conversation: &str, mut message: Message) -> Vec<u8> {
    // It was requested from this conversation, and removing duplicates of live events relies on that.
    if message.conversation_id != conversation {
        message.conversation_id = conversation.to_owned();
    }
    let occurred_at = message.sent_at;
    let payload = MessageSentEvent { message: Some(message) }.encode_to_vec();
    encode_envelope(EventType::MessageSent, occurred_at, payload)
}

impl CatchUpResources {
    /// The events of a page, encoded with an idle encoder unless another session has done so.
    pub(super) fn encode(&self, page: &Page, encoding: Encoding) -> Arc<[CaughtUpEvent]> {
        let mut encoded = page.encoded.lock().expect("no holder panics");
        let events = &mut encoded[encoding.index()];
        if let Some(events) = events {
            return Arc::clone(events);
        }
        let idle = self.encoders.lock().expect("no holder panics").pop();
        let mut encoder = idle.unwrap_or_else(|| Encoder::new(self.config.compression));
        let mut wanted = EncodingSet::default();
        wanted.insert(encoding);
        let event = |(sequence, value): &(i64, Vec<u8>)| {
            // Never fails: the envelope was encoded above.
            let record = envelope::decode(value).ok()?;
            Some((*sequence, Arc::new(encoder.encode(&record, wanted, 0))))
        };
        let made: Arc<[CaughtUpEvent]> = page.values.iter().filter_map(event).collect();
        self.counters.events_reduced.add(encoder.take_reduced());
        self.encoders.lock().expect("no holder panics").push(encoder);
        *events = Some(Arc::clone(&made));
        made
    }
}

/// Cuts events into chunks that fit a session's queue.
pub(super) fn chunks(
    events: impl IntoIterator<Item = CaughtUpEvent>,
    encoding: Encoding,
    config: &CatchUpConfig,
) -> Vec<Vec<CaughtUpEvent>> {
    let mut chunks: Vec<Vec<CaughtUpEvent>> = Vec::new();
    let mut room = 0;
    for (sequence, event) in events {
        let bytes = event.frame(encoding).map_or(0, <[u8]>::len);
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < config.chunk_messages_max && bytes <= room => {
                chunk.push((sequence, event));
                room -= bytes;
            }
            _ => {
                chunks.push(vec![(sequence, event)]);
                room = config.chunk_bytes_max.saturating_sub(bytes);
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::events::proto::shared::v1::EventEnvelope;
    use crate::service::sessions::catch_up::tests::message;

    #[test]
    fn caught_up_message_is_the_envelope_of_the_contract() {
        let value = envelope_of("c", message("c", 7));
        let envelope = EventEnvelope::decode(&value[..]).unwrap();
        assert_eq!(envelope.event_type(), EventType::MessageSent);
        assert_eq!(envelope.schema_version, 1);
        assert_eq!(envelope.occurred_at, message("c", 7).sent_at);
        let event = MessageSentEvent::decode(envelope.payload).unwrap();
        assert_eq!(event.message, Some(message("c", 7)));
    }

    #[test]
    fn page_out_of_order_is_sorted() {
        let sequences = |messages: Vec<Message>| {
            messages.iter().map(|message| message.sequence).collect::<Vec<_>>()
        };
        let page = [5, 3, 4, 3, 2].map(|sequence| message("c", sequence)).to_vec();
        assert_eq!(sequences(in_order(page, 2)), [3, 4, 5]);
    }

    #[test]
    fn chunks_keep_their_bounds_and_the_order() {
        let event = |bytes: usize| {
            let frame = vec![0; bytes].into_boxed_slice();
            Arc::new(Event::new(None, 0).with_frame(Encoding::Binary, frame))
        };
        let config = CatchUpConfig {
            chunk_messages_max: 3,
            chunk_bytes_max: 100,
            ..CatchUpConfig::default()
        };
        let sizes = [10, 20, 30, 40, 60, 1, 500, 1];
        let events: Vec<_> = (1..).zip(sizes.iter().map(|bytes| event(*bytes))).collect();
        let cut = chunks(events.clone(), Encoding::Binary, &config);
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [3, 2, 1, 1, 1]);
        let flat: Vec<_> = cut.into_iter().flatten().collect();
        assert!(flat.iter().zip(&events).all(|(a, b)| Arc::ptr_eq(&a.1, &b.1)));
        assert_eq!(flat.len(), events.len());
    }
}
