use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::service::events::proto::conversation::v1::{
    Conversation, ConversationCreatedEvent, MembershipChangedEvent, Participant,
    ReadReceiptUpdatedEvent,
};
use crate::service::events::proto::message::v1::{Message, MessageDeletedEvent, MessageSentEvent};
use crate::service::events::proto::presence::v1::PresenceUpdateEvent;
use crate::service::events::proto::shared::v1::EventEnvelope;
use crate::service::events::timestamp::Timestamp;

/// `MESSAGE_SENT`, version 1, at 1 s, message { conversation "c", sequence 7 }.
const GOLDEN: [u8; 19] = [
    0x08, 0x0a, // event_type = 10
    0x10, 0x01, // schema_version = 1
    0x1a, 0x02, 0x08, 0x01, // occurred_at { seconds: 1 }
    0x22, 0x09, // payload, 9 bytes
    0x0a, 0x07, // message, 7 bytes
    0x12, 0x01, b'c', // conversation_id
    0x20, 0x07, // sequence
    0x2a, 0x00, // message_type = ""
];

#[test]
fn golden_bytes() {
    let record = decode(&GOLDEN).unwrap();
    assert_eq!(record.event_type, 10);
    assert_eq!(record.payload, &GOLDEN[10..]);
    assert_eq!(record.body, EventBody::MessageSent { conversation: "c", sequence: 7 });
    assert_eq!(record.conversation(), Some("c"));
    assert_eq!(repeated(&GOLDEN, 3).unwrap(), [&GOLDEN[6..8]]);
}

#[test]
fn truncated_value_does_not_panic() {
    for len in 0..GOLDEN.len() {
        let _ = decode(&GOLDEN[..len]);
    }
    assert_eq!(decode(&GOLDEN[..18]), Err(EnvelopeError::Truncated));
    assert_eq!(decode(&[]), Err(EnvelopeError::Empty));
}

#[test]
fn unknown_event_type_keeps_its_payload() {
    let value = [0x08, 0x1f, 0x22, 0x01, 0xff];
    let record = decode(&value).unwrap();
    assert_eq!((record.event_type, record.payload), (31, &[0xff][..]));
    assert_eq!((record.body.clone(), record.conversation()), (EventBody::Unknown, None));
}

#[test]
fn creation_lists_every_member_once_wherever_named() {
    let created = ConversationCreatedEvent {
        conversation: Some(Conversation {
            conversation_id: "c".into(),
            participant_user_ids: vec!["b".into(), "a".into()],
            participants_with_roles: vec![Participant { user_id: "d".into(), role: 2 }],
            ..Conversation::default()
        }),
        participant_user_ids: vec!["b".into(), String::new(), "c".into()],
    };
    let value = envelope(EventType::ConversationCreated as i32, created.encode_to_vec());
    assert_eq!(
        decode(&value).unwrap().body,
        EventBody::ConversationCreated { conversation: "c", members: vec!["a", "b", "c", "d"] }
    );
}

#[test]
fn parts_of_one_message_are_merged() {
    let part = |message: Message| MessageSentEvent { message: Some(message) }.encode_to_vec();
    let mut payload = part(Message { conversation_id: "c".into(), ..Message::default() });
    payload.extend(part(Message { sequence: -3, ..Message::default() }));
    let value = envelope(10, payload);
    assert_eq!(
        decode(&value).unwrap().body,
        EventBody::MessageSent { conversation: "c", sequence: -3 }
    );
}

fn envelope(event_type: i32, payload: Vec<u8>) -> Vec<u8> {
    EventEnvelope {
        event_type,
        schema_version: 1,
        occurred_at: Some(Timestamp { seconds: 1, nanos: 0 }),
        payload: payload.into(),
    }
    .encode_to_vec()
}

/// What prost decodes from the same bytes.
fn oracle(value: &[u8]) -> Option<(i32, Vec<u8>, EventBody<'static>)> {
    fn leak(text: String) -> &'static str {
        text.leak()
    }
    let envelope = EventEnvelope::decode(value).ok()?;
    let payload = &envelope.payload[..];
    let body = match envelope.event_type {
        1 => {
            let event = ConversationCreatedEvent::decode(payload).ok()?;
            let conversation = event.conversation.unwrap_or_default();
            let mut members: Vec<_> = event
                .participant_user_ids
                .into_iter()
                .chain(conversation.participant_user_ids)
                .chain(conversation.participants_with_roles.into_iter().map(|p| p.user_id))
                .filter(|id| !id.is_empty())
                .map(leak)
                .collect();
            members.sort_unstable();
            members.dedup();
            EventBody::ConversationCreated {
                conversation: leak(conversation.conversation_id),
                members,
            }
        }
        2 => {
            let event = MembershipChangedEvent::decode(payload).ok()?;
            let (conversation, user) = (leak(event.conversation_id), leak(event.user_id));
            EventBody::MembershipChanged { conversation, user, added: event.added }
        }
        10 => {
            let message = MessageSentEvent::decode(payload).ok()?.message.unwrap_or_default();
            let conversation = leak(message.conversation_id);
            EventBody::MessageSent { conversation, sequence: message.sequence }
        }
        11 => {
            let event = MessageDeletedEvent::decode(payload).ok()?;
            let (conversation, message_id) = (leak(event.conversation_id), leak(event.message_id));
            EventBody::MessageDeleted { conversation, message_id }
        }
        12 => {
            let event = ReadReceiptUpdatedEvent::decode(payload).ok()?;
            EventBody::ReadReceiptUpdated { conversation: leak(event.conversation_id) }
        }
        20 => {
            let event = PresenceUpdateEvent::decode(payload).ok()?;
            EventBody::PresenceUpdated { user: leak(event.user_id) }
        }
        _ => EventBody::Unknown,
    };
    Some((envelope.event_type, envelope.payload.to_vec(), body))
}

/// Every nonempty value that prost accepts is decoded to the same event. The reverse does not hold,
/// because strings that routing does not read are not checked.
fn agree(value: &[u8]) -> Result<(), TestCaseError> {
    let ours = decode(value);
    if !value.is_empty()
        && let Some((event_type, payload, body)) = oracle(value)
    {
        let ours = ours.expect("prost accepts it");
        prop_assert_eq!(
            (ours.event_type, ours.payload, ours.body),
            (event_type, &payload[..], body)
        );
    }
    Ok(())
}

/// Valid wire format: known and unknown fields, repeated, in any order and nesting.
fn wire_bytes() -> impl Strategy<Value = Vec<u8>> {
    fn varint(mut value: u64, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }
    let leaf = prop::collection::vec(any::<u8>(), 0..6);
    leaf.prop_recursive(4, 64, 6, move |inner| {
        let number = prop_oneof![4 => 1u32..10, 1 => 1u32..4000];
        let field = (number, 0u8..6, any::<u64>(), 0u64..25, inner).prop_map(
            move |(number, kind, wide, narrow, bytes)| {
                let key = |wire: u64| u64::from(number) << 3 | wire;
                let mut out = Vec::new();
                match kind {
                    0 | 1 => {
                        varint(key(0), &mut out);
                        varint(if kind == 0 { narrow } else { wide }, &mut out);
                    }
                    2 => {
                        varint(key(1), &mut out);
                        out.extend(wide.to_le_bytes());
                    }
                    3 => {
                        varint(key(5), &mut out);
                        out.extend(&wide.to_le_bytes()[..4]);
                    }
                    _ => {
                        varint(key(2), &mut out);
                        varint(bytes.len() as u64, &mut out);
                        out.extend(bytes);
                    }
                }
                out
            },
        );
        prop::collection::vec(field, 0..6).prop_map(|fields| fields.concat())
    })
}

proptest! {
    #[test]
    fn random_bytes_do_not_panic(value in prop::collection::vec(any::<u8>(), 0..200)) {
        agree(&value)?;
    }

    #[test]
    fn random_wire_format_decodes_as_prost_does(value in wire_bytes()) {
        agree(&value)?;
    }

    #[test]
    fn every_event_type_decodes_as_prost_does(
        kind in prop::sample::select(vec![0, 1, 2, 10, 11, 12, 20, 99, -1]),
        payload in wire_bytes(),
    ) {
        agree(&envelope(kind, payload))?;
    }

    #[test]
    fn well_formed_message_is_decoded(
        conversation in ".{0,40}", sequence: i64, content in ".{0,200}", cut in 0usize..400,
    ) {
        let message = Message {
            conversation_id: conversation.clone(),
            sequence,
            content,
            sent_at: Some(Timestamp::default()),
            ..Message::default()
        };
        let value = envelope(10, MessageSentEvent { message: Some(message) }.encode_to_vec());
        let record = decode(&value).unwrap();
        prop_assert_eq!(record.body, EventBody::MessageSent { conversation: &conversation, sequence });
        agree(&value[..cut.min(value.len())])?;
    }
}
