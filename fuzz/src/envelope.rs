//! Kafka records: decoding any bytes succeeds or fails without a panic. The router's decoder accepts
//! what prost accepts, with the same result, and the encoded frames contain the event.

use delivery::domain::encoding::{Encoding, EncodingSet};
use delivery::protocol::deflate::Inflater;
use delivery::service::events::encode::{CompressionConfig, Encoder};
use delivery::service::events::envelope::{DecodedEvent, EnvelopeError, EventBody, decode};
use delivery::service::events::proto::conversation::v1::{
    ConversationCreatedEvent, MembershipChangedEvent, ReadReceiptUpdatedEvent,
};
use delivery::service::events::proto::delivery::v1::DeliveryEvent;
use delivery::service::events::proto::message::v1::{MessageDeletedEvent, MessageSentEvent};
use delivery::service::events::proto::presence::v1::PresenceUpdateEvent;
use delivery::service::events::proto::shared::v1::{EventEnvelope, EventType};
use prost::Message as _;

/// Checks the value of a Kafka record.
pub fn check(data: &[u8]) {
    let ours = decode(data);
    if let Ok(record) = &ours {
        assert_eq!(record.value, data);
        check_frames(record);
    }
    if data.is_empty() {
        // For prost an envelope of default values; for Kafka a record without a value.
        assert_eq!(ours, Err(EnvelopeError::Empty));
        return;
    }
    // prost also checks strings that routing does not read, so it accepts less, never more.
    let Ok(envelope) = EventEnvelope::decode(data) else { return };
    if !inner_event_decodes(&envelope) {
        return;
    }
    let record = ours.expect("prost decodes it");
    assert_eq!(record.event_type, envelope.event_type);
    assert_eq!(record.payload, envelope.payload);
    check_body(&record, &envelope);
}

fn inner_event_decodes(envelope: &EventEnvelope) -> bool {
    let payload = &envelope.payload[..];
    match envelope.event_type() {
        EventType::ConversationCreated => ConversationCreatedEvent::decode(payload).is_ok(),
        EventType::MembershipChanged => MembershipChangedEvent::decode(payload).is_ok(),
        EventType::MessageSent => MessageSentEvent::decode(payload).is_ok(),
        EventType::MessageDeleted => MessageDeletedEvent::decode(payload).is_ok(),
        EventType::ReadReceiptUpdated => ReadReceiptUpdatedEvent::decode(payload).is_ok(),
        EventType::PresenceUpdated => PresenceUpdateEvent::decode(payload).is_ok(),
        EventType::Unspecified => true,
    }
}

fn check_body(record: &DecodedEvent<'_>, envelope: &EventEnvelope) {
    let payload = &envelope.payload[..];
    match &record.body {
        EventBody::ConversationCreated { conversation, members } => {
            let event = ConversationCreatedEvent::decode(payload).expect("decodes");
            let inner = event.conversation.unwrap_or_default();
            let mut expected: Vec<&str> =
                event.participant_user_ids.iter().map(|id| &**id).collect();
            expected.extend(inner.participant_user_ids.iter().map(|id| &**id));
            expected.extend(inner.participants_with_roles.iter().map(|one| &*one.user_id));
            expected.retain(|id| !id.is_empty());
            expected.sort_unstable();
            expected.dedup();
            assert_eq!((*conversation, members), (&*inner.conversation_id, &expected));
        }
        EventBody::MembershipChanged { conversation, user, added } => {
            let event = MembershipChangedEvent::decode(payload).expect("decodes");
            let theirs = (&*event.conversation_id, &*event.user_id, event.added);
            assert_eq!((*conversation, *user, *added), theirs);
        }
        EventBody::MessageSent { conversation, sequence } => {
            let event = MessageSentEvent::decode(payload).expect("decodes");
            let message = event.message.unwrap_or_default();
            assert_eq!((*conversation, *sequence), (&*message.conversation_id, message.sequence));
        }
        EventBody::MessageDeleted { conversation, message_id } => {
            let event = MessageDeletedEvent::decode(payload).expect("decodes");
            let theirs = (&*event.conversation_id, &*event.message_id);
            assert_eq!((*conversation, *message_id), theirs);
        }
        EventBody::ReadReceiptUpdated { conversation } => {
            let event = ReadReceiptUpdatedEvent::decode(payload).expect("decodes");
            assert_eq!(*conversation, event.conversation_id);
        }
        EventBody::PresenceUpdated { user } => {
            let event = PresenceUpdateEvent::decode(payload).expect("decodes");
            assert_eq!(*user, event.user_id);
        }
        EventBody::Unknown => assert!(matches!(envelope.event_type(), EventType::Unspecified)),
    }
}

/// Binary frames contain the record unchanged, JSON frames contain JSON, compressed frames the same.
fn check_frames(record: &DecodedEvent<'_>) {
    let mut all = EncodingSet::default();
    Encoding::ALL.into_iter().for_each(|encoding| all.insert(encoding));
    let config = CompressionConfig { threshold_bytes: 16, level: 1 };
    let event = Encoder::new(config).encode(record, all, 0);

    let binary = event.frame(Encoding::Binary).expect("every event has a binary frame");
    assert_eq!(payload(binary, 0x82), record.value);
    check_deflate(event.frame(Encoding::BinaryDeflate), 0x82, record.value);
    let json = event.frame(Encoding::Json).expect("every event has a JSON frame");
    let text = payload(json, 0x81);
    let value: serde_json::Value = serde_json::from_slice(text).expect("JSON");
    assert!(value.is_object());
    check_deflate(event.frame(Encoding::JsonDeflate), 0x81, text);
    if let Some(stream) = event.frame(Encoding::Stream) {
        DeliveryEvent::decode(stream).expect("a DeliveryEvent");
    }
}

/// Checks a compressed frame of the message, or a plain one if compression does not shrink it.
fn check_deflate(frame: Option<&[u8]>, first: u8, message: &[u8]) {
    let frame = frame.expect("exists if the plain one exists");
    if frame[0] == first {
        assert_eq!(payload(frame, first), message);
        return;
    }
    let compressed = payload(frame, first | 0x40);
    assert!(compressed.len() < message.len());
    assert_eq!(Inflater::default().inflate(compressed, message.len()), Ok(message));
}

/// The payload of an unmasked frame that starts with this byte.
fn payload(frame: &[u8], first: u8) -> &[u8] {
    assert_eq!(frame[0], first);
    let (header, length) = match frame[1] {
        126 => (4, usize::from(u16::from_be_bytes([frame[2], frame[3]]))),
        127 => (10, frame[2..10].iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))),
        short => (2, usize::from(short)),
    };
    assert_eq!(frame.len(), header + length);
    &frame[header..]
}
