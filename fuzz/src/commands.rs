//! The client's JSON messages: parsing any text succeeds or fails without a panic, and agrees with a
//! generic JSON parser on the documented format.

use delivery::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};
use delivery::service::sessions::client_message::{
    CLIENT_MESSAGE_BYTES_MAX, CONVERSATIONS_NAMED_MAX, ClientMessage, parse,
};
use serde_json::Value;

/// Checks `data` if it is UTF-8. The receiver passes no other text to the parser.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let ours = parse(text).ok();
    if let Some(message) = &ours {
        check_bounds(message);
    }
    // The parser also rejects repeated keys and text before `{`, which a `Value` does not show.
    let Ok(Value::Object(object)) = serde_json::from_str::<Value>(text) else {
        assert!(ours.is_none(), "accepted, although it is not a JSON object");
        return;
    };
    if text.len() > CLIENT_MESSAGE_BYTES_MAX {
        assert!(ours.is_none());
        return;
    }
    let Some(message) = ours else { return };
    let token = object.get("access_token").and_then(Value::as_str);
    assert_eq!(message.access_token.as_ref().map(|token| token.expose()), token);
    let positions = object.get("last_sequences").and_then(Value::as_object);
    assert_eq!(message.last_sequences.is_some(), positions.is_some());
    let (Some(ours), Some(theirs)) = (&message.last_sequences, positions) else { return };
    assert_eq!(ours.len(), theirs.len());
    for one in ours {
        let value = &theirs[&*one.conversation];
        let sequence = value
            .as_i64()
            .or_else(|| value.as_str().and_then(|digits| digits.parse().ok()))
            .expect("an int64");
        assert_eq!(one.sequence, sequence.max(0));
    }
}

fn check_bounds(message: &ClientMessage) {
    assert!(message.last_sequences.is_some() || message.access_token.is_some());
    if let Some(token) = &message.access_token {
        assert!((1..=TOKEN_BYTES_MAX).contains(&token.expose().len()));
    }
    let positions = message.last_sequences.as_deref().unwrap_or_default();
    assert!(positions.len() <= CONVERSATIONS_NAMED_MAX);
    assert!(
        positions.is_sorted_by(|a, b| a.conversation < b.conversation),
        "unsorted or duplicate"
    );
    for one in positions {
        assert!((1..=ID_BYTES_MAX).contains(&one.conversation.len()) && one.sequence >= 0);
    }
}
