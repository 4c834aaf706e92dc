//! Encodes an event, once per kind of session among its recipients.
//!
//! | session | message |
//! | --- | --- |
//! | binary | one binary message: the record's value, unchanged |
//! | JSON | one text message: the envelope in proto3 JSON with the inner event in place of the bytes, `{"eventType":"EVENT_TYPE_MESSAGE_SENT","schemaVersion":1,"occurredAt":"2024-01-01T00:00:00Z","payload":{"message":{"messageId":"…","sequence":"7",…}}}`; the payload of an unknown event type is base64 |
//! | gRPC | one serialized `DeliveryEvent`, see below |
//!
//! `DeliveryEvent` has fields for a message and its position in a conversation, so on a gRPC stream:
//!
//! | event | `DeliveryEvent` |
//! | --- | --- |
//! | message sent | all three fields |
//! | message deleted | a message with `message_id`, `conversation_id` and `deleted_at` (time of the event), sequence 0 |
//! | conversation created, membership changed | only `conversation_id`: the client looks the conversation up |
//! | read receipt, presence, unknown types | not sent: the contract has no field for it |
//!
//! An event that JSON or `DeliveryEvent` cannot hold as it is (a string that is not UTF-8, a time outside the years 1
//! to 9999) is *reduced*, never left out: JSON gets the payload as base64, like that of an unknown type, and no
//! `occurredAt` if that is what is wrong; a stream gets `conversation_id` and `sequence`, so that the client looks the
//! message up.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use serde::Serialize;

use crate::domain::encoding::{Encoding, EncodingSet};
use crate::domain::event::Event;
use crate::domain::ids::{ConversationKey, ConversationPosition};
use crate::protocol::deflate::{Compressor, WINDOW_BITS_MAX};
use crate::protocol::frame::{self, Opcode};
use crate::service::events::conversation_key::conversation_key;
use crate::service::events::envelope::{DecodedEvent, EventBody, repeated};
use crate::service::events::proto::conversation::v1::{
    ConversationCreatedEvent, MembershipChangedEvent, ReadReceiptUpdatedEvent,
};
use crate::service::events::proto::delivery::v1::DeliveryEvent;
use crate::service::events::proto::message::v1::{Message, MessageDeletedEvent, MessageSentEvent};
use crate::service::events::proto::presence::v1::PresenceUpdateEvent;
use crate::service::events::proto::shared::v1::{EventEnvelope, EventType};
use crate::service::events::timestamp::Timestamp;

/// `EventEnvelope.schema_version` of envelopes that Delivery creates (contract §§3, 4).
const SCHEMA_VERSION: i32 = 1;

/// Settings of compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressionConfig {
    /// Messages below this size are sent uncompressed, bytes.
    pub threshold_bytes: usize,
    /// 1 (fast) to 9 (small).
    pub level: u32,
}

impl Default for CompressionConfig {
    /// 256 bytes: for a smaller envelope deflate saves less than the size of a TCP header.
    fn default() -> Self {
        Self { threshold_bytes: 256, level: 1 }
    }
}

/// Encodes events. One per thread or task; the compressor (about 300 KiB) is created for the first
/// session that uses it.
#[derive(Debug)]
pub struct Encoder {
    config: CompressionConfig,
    compressor: Option<Compressor>,
    reduced: u64,
}

impl Encoder {
    /// An encoder with these settings.
    pub fn new(config: CompressionConfig) -> Self {
        Self { config, compressor: None, reduced: 0 }
    }

    /// Events encoded since the last call that JSON or `DeliveryEvent` could not hold as they are.
    pub fn take_reduced(&mut self) -> u64 {
        std::mem::take(&mut self.reduced)
    }

    /// The event with a frame for each encoding in `wanted` that has a form for it.
    /// `appended_at_ms`: see [`Event::appended_at_ms`].
    pub fn encode(
        &mut self,
        record: &DecodedEvent<'_>,
        wanted: EncodingSet,
        appended_at_ms: u64,
    ) -> Event {
        let conversation = record.conversation().map(conversation_key);
        let mut event = Event::new(position(record, conversation), appended_at_ms);
        if let Some(conversation) = conversation {
            event = event.of_conversation(conversation);
        }
        let either = |plain, deflated| wanted.contains(plain) || wanted.contains(deflated);
        if either(Encoding::Binary, Encoding::BinaryDeflate) {
            let forms = [Encoding::Binary, Encoding::BinaryDeflate];
            event = self.frames(event, Opcode::Binary, record.value, forms, wanted);
        }
        let mut is_reduced = false;
        if either(Encoding::Json, Encoding::JsonDeflate) {
            let (text, form) = json(record);
            is_reduced |= form == Form::Reduced;
            let forms = [Encoding::Json, Encoding::JsonDeflate];
            event = self.frames(event, Opcode::Text, &text, forms, wanted);
        }
        if wanted.contains(Encoding::Stream)
            && let Some((message, form)) = delivery_event(record)
        {
            is_reduced |= form == Form::Reduced;
            event = event.with_frame(Encoding::Stream, message.into_boxed_slice());
        }
        self.reduced += u64::from(is_reduced);
        event
    }

    /// Adds the compressed frame if it is wanted and shorter, and the plain frame if it is wanted or
    /// replaces the compressed one.
    fn frames(
        &mut self,
        mut event: Event,
        opcode: Opcode,
        message: &[u8],
        [plain, deflated]: [Encoding; 2],
        wanted: EncodingSet,
    ) -> Event {
        let compressed = if wanted.contains(deflated) { self.compress(message) } else { None };
        if wanted.contains(plain) || compressed.is_none() {
            event = event.with_frame(plain, frame::encode(opcode, false, message));
        }
        match compressed {
            Some(payload) => event.with_frame(deflated, frame::encode(opcode, true, &payload)),
            None => event,
        }
    }

    fn compress(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        if message.len() < self.config.threshold_bytes {
            return None;
        }
        if self.compressor.is_none() {
            self.compressor = Compressor::new(self.config.level, WINDOW_BITS_MAX);
        }
        self.compressor.as_mut()?.compress(message)
    }
}

/// The position of a message in its conversation. Sequences start at 1 (contract §1).
fn position(
    record: &DecodedEvent<'_>,
    conversation: Option<ConversationKey>,
) -> Option<ConversationPosition> {
    match record.body {
        EventBody::MessageSent { sequence, .. } if sequence > 0 => {
            Some(ConversationPosition { conversation: conversation?, sequence })
        }
        _ => None,
    }
}

/// A serialized `EventEnvelope` that Delivery creates (contract §§3, 4). `payload` is the serialized inner
/// event.
pub fn encode_envelope(
    event_type: EventType,
    occurred_at: Option<Timestamp>,
    payload: Vec<u8>,
) -> Vec<u8> {
    EventEnvelope {
        event_type: event_type.into(),
        schema_version: SCHEMA_VERSION,
        occurred_at,
        payload: payload.into(),
    }
    .encode_to_vec()
}

/// `EventEnvelope` in proto3 JSON, with the inner event as payload. Default values are left out, as the
/// proto3 JSON mapping requires.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonEnvelope {
    #[serde(skip_serializing_if = "JsonEventType::is_unspecified")]
    event_type: JsonEventType,
    #[serde(skip_serializing_if = "is_zero")]
    schema_version: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    occurred_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "JsonPayload::is_empty")]
    payload: JsonPayload,
}

fn is_zero(value: &i32) -> bool {
    *value == 0
}

/// The name of an event type, or its number if it is unknown.
#[derive(Serialize)]
#[serde(untagged)]
enum JsonEventType {
    Known(EventType),
    Unknown(i32),
}

impl JsonEventType {
    fn is_unspecified(&self) -> bool {
        matches!(self, Self::Known(EventType::Unspecified))
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum JsonPayload {
    ConversationCreated(ConversationCreatedEvent),
    MembershipChanged(MembershipChangedEvent),
    MessageSent(MessageSentEvent),
    MessageDeleted(MessageDeletedEvent),
    ReadReceiptUpdated(ReadReceiptUpdatedEvent),
    PresenceUpdated(PresenceUpdateEvent),
    Base64(String),
}

impl JsonPayload {
    fn is_empty(&self) -> bool {
        matches!(self, Self::Base64(text) if text.is_empty())
    }
}

/// Whether an encoding holds all of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Everything.
    Whole,
    /// What the encoding can hold (see the top of this file).
    Reduced,
}

/// The JSON text of an event.
///
/// # Panics
/// Never: base64 and a valid time can be written.
pub fn json(record: &DecodedEvent<'_>) -> (Vec<u8>, Form) {
    // Routing reads less of it, so it may be unreadable here.
    let envelope = EventEnvelope::decode(record.value).unwrap_or_default();
    let occurred_at = envelope.occurred_at.filter(|time| time.is_valid());
    let form = if occurred_at == envelope.occurred_at { Form::Whole } else { Form::Reduced };
    let text = |payload| {
        let event_type = match EventType::try_from(record.event_type) {
            Ok(known) => JsonEventType::Known(known),
            Err(_) => JsonEventType::Unknown(record.event_type),
        };
        let schema_version = envelope.schema_version;
        serde_json::to_vec(&JsonEnvelope { event_type, schema_version, occurred_at, payload })
    };
    match json_payload(record).and_then(|payload| text(payload).ok()) {
        Some(text) => (text, form),
        None => {
            let payload = JsonPayload::Base64(BASE64.encode(record.payload));
            (text(payload).expect("base64 and a valid time can be written"), Form::Reduced)
        }
    }
}

/// `None`: a string is not UTF-8.
fn json_payload(record: &DecodedEvent<'_>) -> Option<JsonPayload> {
    let inner = record.payload;
    match record.body {
        EventBody::ConversationCreated { .. } => {
            inner_json(inner, JsonPayload::ConversationCreated)
        }
        EventBody::MembershipChanged { .. } => inner_json(inner, JsonPayload::MembershipChanged),
        EventBody::MessageSent { .. } => inner_json(inner, JsonPayload::MessageSent),
        EventBody::MessageDeleted { .. } => inner_json(inner, JsonPayload::MessageDeleted),
        EventBody::ReadReceiptUpdated { .. } => inner_json(inner, JsonPayload::ReadReceiptUpdated),
        EventBody::PresenceUpdated { .. } => inner_json(inner, JsonPayload::PresenceUpdated),
        EventBody::Unknown => Some(JsonPayload::Base64(BASE64.encode(inner))),
    }
}

fn inner_json<M: prost::Message + Default>(
    inner: &[u8],
    wrap: fn(M) -> JsonPayload,
) -> Option<JsonPayload> {
    M::decode(inner).ok().map(wrap)
}

/// A serialized `DeliveryEvent`. `None`: the contract has no form for such events, see the table above.
fn delivery_event(record: &DecodedEvent<'_>) -> Option<(Vec<u8>, Form)> {
    match record.body {
        EventBody::MessageSent { conversation, sequence } => {
            let mut out = Vec::with_capacity(record.payload.len() + 2 * conversation.len() + 24);
            let head = DeliveryEvent {
                conversation_id: conversation.to_owned(),
                sequence,
                ..Default::default()
            };
            head.encode(&mut out).expect("a vector grows");
            // Routing reads only two fields. A client's library reads all of them and would end the
            // stream if a string is not UTF-8.
            if MessageSentEvent::decode(record.payload).is_err() {
                return Some((out, Form::Reduced));
            }
            // Field 3 has the type of field 1 of the payload, so its bytes are copied, including
            // unknown fields.
            for message in repeated(record.payload, 1).ok()? {
                encode_key(3, WireType::LengthDelimited, &mut out);
                encode_varint(message.len() as u64, &mut out);
                out.extend_from_slice(message);
            }
            Some((out, Form::Whole))
        }
        EventBody::MessageDeleted { conversation, message_id } => {
            let occurred_at = repeated(record.value, 3).ok()?.concat();
            let deleted_at = Timestamp::decode(&occurred_at[..]).ok();
            let form = if deleted_at.is_some() { Form::Whole } else { Form::Reduced };
            let message = deleted_at.map(|deleted_at| Message {
                message_id: message_id.to_owned(),
                conversation_id: conversation.to_owned(),
                deleted_at: Some(deleted_at),
                ..Message::default()
            });
            let conversation_id = conversation.to_owned();
            let event = DeliveryEvent { conversation_id, message, ..Default::default() };
            Some((event.encode_to_vec(), form))
        }
        EventBody::ConversationCreated { conversation, .. }
        | EventBody::MembershipChanged { conversation, .. } => {
            let conversation_id = conversation.to_owned();
            let event = DeliveryEvent { conversation_id, ..Default::default() };
            Some((event.encode_to_vec(), Form::Whole))
        }
        EventBody::ReadReceiptUpdated { .. }
        | EventBody::PresenceUpdated { .. }
        | EventBody::Unknown => None,
    }
}

#[cfg(test)]
mod tests;
