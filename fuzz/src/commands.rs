//! The client's JSON messages: parsing any text succeeds or fails without a panic, and agrees with a
//! generic JSON parser on the documented format.

use delivery::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};
use delivery::service::sessions::client_message::{CONVERSATIONS_NAMED_MAX, ClientMessage, parse};
use serde_json::Value;

/// Checks `data` if it is UTF-8. The receiver passes no other text to the parser.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let ours = parse(text).ok();
    if let Some(message) = &ours {
        check_bounds(message);
    }
    // The parser also rejects repeated keys, which a `Value` does not show.
    let object = match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(object)) => object,
        Ok(Value::Null) => return assert!(ours.is_some_and(|message| message.is_empty())),
        // Valid JSON, but more than a `Value` can hold. In a field that nobody reads it is of no concern.
        Err(error) if is_limit_of_value(&error) => return,
        Ok(_) | Err(_) => return assert!(ours.is_none(), "accepted, although it is no object"),
    };
    let Some(message) = ours else { return };
    let token = object.get("access_token").and_then(Value::as_str);
    let token = token.filter(|token| !token.is_empty());
    assert_eq!(message.access_token.as_ref().map(|token| token.expose()), token);
    let positions = object.get("last_sequences").and_then(Value::as_object);
    assert_eq!(message.last_sequences.is_some(), positions.is_some());
    let (Some(ours), Some(theirs)) = (&message.last_sequences, positions) else { return };
    let named = theirs.keys().filter(|id| (1..=ID_BYTES_MAX).contains(&id.len()));
    assert_eq!(ours.len(), named.count());
    for one in ours {
        let value = &theirs[&*one.conversation];
        let sequence = value
            .as_i64()
            .or_else(|| value.as_str().and_then(|digits| digits.parse().ok()))
            .or(value.is_null().then_some(0))
            .expect("an int64 or null");
        assert_eq!(one.sequence, sequence.max(0));
    }
}

/// Whether the text is JSON by the grammar of RFC 8259, which sets no limit to numbers and nesting and allows an
/// escape of half a surrogate pair.
fn is_limit_of_value(error: &serde_json::Error) -> bool {
    let error = error.to_string();
    let limits = [
        "number out of range",
        "recursion limit exceeded",
        "lone leading surrogate in hex escape",
        "unexpected end of hex escape",
    ];
    limits.iter().any(|limit| error.starts_with(limit))
}

fn check_bounds(message: &ClientMessage) {
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
