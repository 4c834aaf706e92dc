//! Turns a page of messages into events.

use std::sync::Arc;

use prost::Message as _;

use super::{CatchUpConfig, CatchUpResources};
use crate::domain::encoding::{Encoding, EncodingSet};
use crate::domain::event::Event;
use crate::service::events::encode::{Encoder, encode_envelope};
use crate::service::events::envelope;
use crate::service::events::proto::message::v1::{Message, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventType;

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
    /// Encodes a page with an idle encoder.
    pub(super) fn encode(
        &self,
        conversation: &str,
        messages: Vec<Message>,
        encoding: Encoding,
    ) -> Vec<Arc<Event>> {
        let idle = self.encoders.lock().expect("no holder panics").pop();
        let mut encoder = idle.unwrap_or_else(|| Encoder::new(self.config.compression));
        let mut wanted = EncodingSet::default();
        wanted.insert(encoding);
        let mut events = Vec::with_capacity(messages.len());
        for message in messages {
            let value = envelope_of(conversation, message);
            // Never fails: the envelope was encoded above.
            if let Ok(record) = envelope::decode(&value) {
                events.push(Arc::new(encoder.encode(&record, wanted, 0)));
            }
        }
        self.encoders.lock().expect("no holder panics").push(encoder);
        events
    }
}

/// Cuts a page into chunks that fit a session's queue.
pub(super) fn chunks(
    events: Vec<Arc<Event>>,
    encoding: Encoding,
    config: &CatchUpConfig,
) -> Vec<Vec<Arc<Event>>> {
    let mut chunks: Vec<Vec<Arc<Event>>> = Vec::new();
    let mut room = 0;
    for event in events {
        let bytes = event.frame(encoding).map_or(0, <[u8]>::len);
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < config.chunk_messages_max && bytes <= room => {
                chunk.push(event);
                room -= bytes;
            }
            _ => {
                chunks.push(vec![event]);
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
        let events: Vec<_> = sizes.iter().map(|bytes| event(*bytes)).collect();
        let cut = chunks(events.clone(), Encoding::Binary, &config);
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [3, 2, 1, 1, 1]);
        let flat: Vec<_> = cut.into_iter().flatten().collect();
        assert!(flat.iter().zip(&events).all(|(a, b)| Arc::ptr_eq(a, b)));
        assert_eq!(flat.len(), events.len());
    }
}
