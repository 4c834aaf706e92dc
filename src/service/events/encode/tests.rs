use super::*;
use crate::service::events::envelope::decode;

fn all() -> EncodingSet {
    let mut set = EncodingSet::default();
    Encoding::ALL.into_iter().for_each(|encoding| set.insert(encoding));
    set
}

fn only(encoding: Encoding) -> EncodingSet {
    let mut set = EncodingSet::default();
    set.insert(encoding);
    set
}

fn message(content: &str) -> Message {
    Message {
        message_id: "m".into(),
        conversation_id: "c".into(),
        sender_user_id: "alice".into(),
        sequence: 7,
        content: content.into(),
        sent_at: Some(Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        ..Message::default()
    }
}

fn sent(message: Message) -> Vec<u8> {
    let occurred_at = message.sent_at;
    let payload = MessageSentEvent { message: Some(message) }.encode_to_vec();
    encode_envelope(EventType::MessageSent, occurred_at, payload)
}

fn encode(value: &[u8], wanted: EncodingSet) -> Event {
    Encoder::new(CompressionConfig::default()).encode(&decode(value).unwrap(), wanted, 5)
}

/// The payload of a frame with a 7-bit or 16-bit length.
fn payload(frame: &[u8]) -> &[u8] {
    if frame[1] < 126 { &frame[2..] } else { &frame[4..] }
}

fn text(value: &[u8]) -> String {
    let event = encode(value, only(Encoding::Json));
    String::from_utf8(payload(event.frame(Encoding::Json).unwrap()).to_vec()).unwrap()
}

fn on_stream(value: &[u8]) -> Option<DeliveryEvent> {
    let event = encode(value, only(Encoding::Stream));
    event.frame(Encoding::Stream).map(|bytes| DeliveryEvent::decode(bytes).unwrap())
}

#[test]
fn binary_frame_is_the_record_unchanged() {
    let mut value = sent(message("hello"));
    value.extend([0xa0, 0x06, 0x01]); // an unknown field
    let event = encode(&value, only(Encoding::Binary));
    let frame = event.frame(Encoding::Binary).unwrap();
    assert_eq!(frame[..2], [0x82, value.len() as u8]);
    assert_eq!(&frame[2..], value);
    assert_eq!(event.appended_at_ms, 5);
    assert_eq!(
        event.position,
        Some(ConversationPosition { conversation: conversation_key("c"), sequence: 7 })
    );
    assert_eq!(event.frame(Encoding::Json), None);
    assert_eq!(event.frame(Encoding::Stream), None);
}

#[test]
fn json_holds_the_inner_event() {
    assert_eq!(
        text(&sent(message("hello"))),
        r#"{"eventType":"EVENT_TYPE_MESSAGE_SENT","schemaVersion":1,"occurredAt":"2023-11-14T22:13:20Z","payload":{"message":{"messageId":"m","conversationId":"c","senderUserId":"alice","sequence":"7","content":"hello","sentAt":"2023-11-14T22:13:20Z"}}}"#
    );
    let receipt = ReadReceiptUpdatedEvent {
        conversation_id: "c".into(),
        user_id: "bob".into(),
        read_sequence: 7,
    };
    assert_eq!(
        text(&encode_envelope(EventType::ReadReceiptUpdated, None, receipt.encode_to_vec())),
        r#"{"eventType":"EVENT_TYPE_READ_RECEIPT_UPDATED","schemaVersion":1,"payload":{"conversationId":"c","userId":"bob","readSequence":"7"}}"#
    );
    let presence = PresenceUpdateEvent { user_id: "bob".into(), status: 1, occurred_at: 9 };
    assert_eq!(
        text(&encode_envelope(
            EventType::PresenceUpdated,
            Some(Timestamp { seconds: 9, nanos: 0 }),
            presence.encode_to_vec()
        )),
        r#"{"eventType":"EVENT_TYPE_PRESENCE_UPDATED","schemaVersion":1,"occurredAt":"1970-01-01T00:00:09Z","payload":{"userId":"bob","status":"PRESENCE_STATUS_ONLINE","occurredAt":"9"}}"#
    );
}

#[test]
fn json_of_an_unknown_event_type_keeps_the_bytes() {
    let value = [0x08, 0x1f, 0x22, 0x02, 0xff, 0xfe];
    assert_eq!(text(&value), r#"{"eventType":31,"payload":"//4="}"#);
    assert_eq!(text(&[0x08, 0x00]), "{}");
    assert_eq!(on_stream(&value), None);
}

/// Promise: “An event that JSON or `DeliveryEvent` cannot hold is reduced, not left out:”
#[test]
fn event_that_json_cannot_hold_has_its_payload_as_base64() {
    let far = Timestamp { seconds: i64::MAX, nanos: 0 };
    let mut late = message("");
    late.sent_at = Some(far);
    let payload = MessageSentEvent { message: Some(late) }.encode_to_vec();
    let base64 = BASE64.encode(&payload);
    let value =
        encode_envelope(EventType::MessageSent, Some(Timestamp { seconds: 9, nanos: 0 }), payload);
    let head = r#"{"eventType":"EVENT_TYPE_MESSAGE_SENT","schemaVersion":1,"#;
    assert_eq!(
        text(&value),
        format!(r#"{head}"occurredAt":"1970-01-01T00:00:09Z","payload":"{base64}"}}"#)
    );
    // Nothing but the time of the event itself is left out.
    let receipt = ReadReceiptUpdatedEvent { read_sequence: 7, ..Default::default() };
    let value = encode_envelope(EventType::ReadReceiptUpdated, Some(far), receipt.encode_to_vec());
    assert_eq!(
        text(&value),
        r#"{"eventType":"EVENT_TYPE_READ_RECEIPT_UPDATED","schemaVersion":1,"payload":{"readSequence":"7"}}"#
    );
    let mut encoder = Encoder::new(CompressionConfig::default());
    for (value, reduced) in [(&value, 1), (&sent(message("a")), 0)] {
        encoder.encode(&decode(value).unwrap(), all(), 0);
        assert_eq!(encoder.take_reduced(), reduced);
    }
}

#[test]
fn stream_gets_no_string_that_is_not_utf8() {
    let mut not_utf8 = sent(message("hello"));
    let at = not_utf8.windows(5).position(|bytes| bytes == b"alice").unwrap();
    not_utf8[at] = 0xff;
    let position = DeliveryEvent { message: None, ..on_stream(&sent(message("hello"))).unwrap() };
    assert_eq!(on_stream(&not_utf8), Some(position));
    assert!(text(&not_utf8).contains(r#""payload":""#), "as base64");
    assert!(encode(&not_utf8, all()).frame(Encoding::Binary).is_some());
}

#[test]
fn stream_carries_messages_and_deletions() {
    assert_eq!(
        on_stream(&sent(message("hello"))),
        Some(DeliveryEvent {
            conversation_id: "c".into(),
            sequence: 7,
            message: Some(message("hello")),
            ..DeliveryEvent::default()
        })
    );
    // A message in two parts: the reader merges them.
    let parts = [
        MessageSentEvent { message: Some(Message { sequence: 0, ..message("a") }) },
        MessageSentEvent { message: Some(Message { sequence: 8, ..Message::default() }) },
    ];
    let parts = parts.map(|part| part.encode_to_vec()).concat();
    let merged = on_stream(&encode_envelope(EventType::MessageSent, None, parts)).unwrap();
    assert_eq!(
        (merged.sequence, merged.message),
        (8, Some(Message { sequence: 8, ..message("a") }))
    );

    let deleted =
        MessageDeletedEvent { conversation_id: "c".into(), message_id: "m".into() }.encode_to_vec();
    let at = Timestamp { seconds: 3, nanos: 4 };
    let tombstone =
        on_stream(&encode_envelope(EventType::MessageDeleted, Some(at), deleted)).unwrap();
    assert_eq!((tombstone.conversation_id.as_str(), tombstone.sequence), ("c", 0));
    assert_eq!(
        tombstone.message,
        Some(Message {
            message_id: "m".into(),
            conversation_id: "c".into(),
            deleted_at: Some(at),
            ..Message::default()
        })
    );
}

#[test]
fn stream_gets_the_conversation_id_of_membership_events_and_no_receipts() {
    let change =
        MembershipChangedEvent { conversation_id: "c".into(), user_id: "bob".into(), added: true };
    let value = encode_envelope(EventType::MembershipChanged, None, change.encode_to_vec());
    assert_eq!(
        on_stream(&value),
        Some(DeliveryEvent { conversation_id: "c".into(), ..DeliveryEvent::default() })
    );
    let receipt = ReadReceiptUpdatedEvent { conversation_id: "c".into(), ..Default::default() };
    let value = encode_envelope(EventType::ReadReceiptUpdated, None, receipt.encode_to_vec());
    assert_eq!(on_stream(&value), None);
}

#[test]
fn only_long_messages_are_compressed() {
    let long = sent(message(&"ha ".repeat(300)));
    let event = encode(&long, only(Encoding::BinaryDeflate));
    let frame = event.frame(Encoding::BinaryDeflate).unwrap();
    assert_eq!(frame[0], 0xc2, "FIN, RSV1, binary");
    assert!(frame.len() < long.len() / 4);
    assert_eq!(event.frame(Encoding::Binary), None, "not wanted");
    let mut inflater = crate::protocol::deflate::Inflater::default();
    assert_eq!(inflater.inflate(payload(frame), long.len()).unwrap(), long);

    let short = sent(message("ha"));
    let event = encode(&short, only(Encoding::BinaryDeflate));
    assert_eq!(event.frame(Encoding::BinaryDeflate).unwrap()[0], 0x82, "below the threshold");

    let event = encode(&long, all());
    assert_eq!(payload(event.frame(Encoding::Binary).unwrap()), long);
    assert_eq!(event.frame(Encoding::JsonDeflate).unwrap()[0], 0xc1, "FIN, RSV1, text");
}
