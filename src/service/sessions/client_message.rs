//! The messages of WebSocket clients: JSON text.
//!
//! | message | meaning |
//! | --- | --- |
//! | `{"last_sequences": {"<conversation_id>": <int64>, …}}` | The resume request, as the first message (contract §3). Each number is the highest `sequence` that the client has of the conversation, or 0. The user's other conversations are sent from their beginning. |
//! | `{}`, `null`, `{"last_sequences": null}` | The same without positions: everything. A client that omits empty fields sends one of these when it has nothing yet. |
//! | `{"cursor": null, …}`, `{"cursor": "", …}`, `{"cursor": "<cursor>", …}` | A resume request with or without positions, from a client that wants cursors: it has none yet, or everything before this one. The positions count if the cursor cannot be used. |
//! | `{"access_token": "<JWT>"}` | At any time: a fresh token of the same user, before the old one expires. The answer is `{"token_expires_at": <Unix seconds>}`, or `{"error": "<reason>"}` and the old token stays in use. |
//!
//! One message may have both keys; as the first message it is a resume request in any case. A number may
//! be a string, as proto3 JSON writes an int64. It has no fraction and no exponent (`3.0` is refused, as by Go). An
//! empty token is none. Other keys are ignored.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::domain::command::Secret;
use crate::domain::cursor::CursorRequest;
use crate::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};

/// Conversations named in one message.
pub const CONVERSATIONS_NAMED_MAX: usize = 4096;

/// A valid client message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientMessage {
    /// The position in each named conversation, without duplicates.
    pub last_sequences: Option<Vec<LastSequence>>,
    /// The client wants cursors.
    pub cursor: Option<CursorRequest>,
    /// A fresh token.
    pub access_token: Option<Secret>,
}

impl ClientMessage {
    /// Whether it has no key: a resume request without positions, if it is the first message.
    pub fn is_empty(&self) -> bool {
        self.last_sequences.is_none() && self.cursor.is_none() && self.access_token.is_none()
    }

    /// Whether it can only be a resume request.
    pub fn is_resume_request(&self) -> bool {
        self.last_sequences.is_some() || self.cursor.is_some() || self.is_empty()
    }
}

/// The position of a client in a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastSequence {
    /// The conversation's id, 1 to [`ID_BYTES_MAX`] bytes.
    pub conversation: Box<str>,
    /// The highest sequence that the client has, 0 or more.
    pub sequence: i64,
}

/// Why a message is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// Neither a JSON object of the documented shape nor `null`.
    #[error("not a JSON object, or a key in it has the wrong type")]
    Malformed,
    /// More than [`CONVERSATIONS_NAMED_MAX`] conversations.
    #[error("more than 4096 conversations are named")]
    TooManyConversations,
}

/// Parses a client message.
///
/// # Errors
/// The message is invalid.
pub fn parse(text: &str) -> Result<ClientMessage, InvalidMessage> {
    // serde would also accept an array of the fields' values.
    if text.trim_ascii_start().starts_with('[') {
        return Err(InvalidMessage::Malformed);
    }
    let fields: Option<MessageFields> =
        serde_json::from_str(text).map_err(|_| InvalidMessage::Malformed)?;
    let fields = fields.unwrap_or_default();
    if fields.access_token.as_ref().is_some_and(|token| token.len() > TOKEN_BYTES_MAX) {
        return Err(InvalidMessage::Malformed);
    }
    let last_sequences = fields.last_sequences.map(|LastSequences(positions)| positions);
    if last_sequences.as_ref().is_some_and(|named| named.len() > CONVERSATIONS_NAMED_MAX) {
        return Err(InvalidMessage::TooManyConversations);
    }
    let access_token = fields.access_token.filter(|token| !token.is_empty()).map(Secret::new);
    let cursor = fields.cursor.map(|text| CursorRequest::of_text(text.as_deref()));
    Ok(ClientMessage { last_sequences, cursor, access_token })
}

#[derive(Default, Deserialize)]
struct MessageFields {
    #[serde(default)]
    last_sequences: Option<LastSequences>,
    /// `Some(None)`: the key is there with `null`.
    #[serde(default, deserialize_with = "present")]
    cursor: Option<Option<Box<str>>>,
    #[serde(default)]
    access_token: Option<String>,
}

fn present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Option<Box<str>>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

struct LastSequences(Vec<LastSequence>);

impl<'de> Deserialize<'de> for LastSequences {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(LastSequencesVisitor)
    }
}

struct LastSequencesVisitor;

impl<'de> Visitor<'de> for LastSequencesVisitor {
    type Value = LastSequences;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of conversation ids and sequences")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LastSequences, A::Error> {
        let mut positions = Vec::new();
        // `null` counts as 0, as in Go.
        while let Some((conversation, sequence)) = map.next_entry::<Box<str>, Option<Sequence>>()? {
            let sequence = sequence.map_or(Some(0), Sequence::value);
            let sequence = sequence.ok_or_else(|| de::Error::custom("not an int64"))?;
            // Others do not exist. They are ignored, as those are that the user is not a member of.
            if (1..=ID_BYTES_MAX).contains(&conversation.len()) {
                positions.push(LastSequence { conversation, sequence });
            }
        }
        // JSON does not define repeated keys. The last one counts, as in Go.
        positions.reverse();
        positions.sort_by(|a, b| a.conversation.cmp(&b.conversation));
        positions.dedup_by(|later, earlier| later.conversation == earlier.conversation);
        Ok(LastSequences(positions))
    }
}

/// An int64, as a number or a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Sequence {
    Number(i64),
    Text(Box<str>),
}

impl Sequence {
    /// `None`: not an int64. Sequences start at 1, so a negative number means "nothing yet".
    fn value(self) -> Option<i64> {
        match self {
            Self::Number(value) => Some(value.max(0)),
            Self::Text(text) => text.parse().ok().map(|value: i64| value.max(0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::cursor::{Cursor, CursorExpired, LogPosition, TopicId, UNCHECKED};
    use proptest::prelude::*;

    fn positions(text: &str) -> Vec<(String, i64)> {
        let all = parse(text).unwrap().last_sequences.unwrap();
        all.into_iter().map(|one| (one.conversation.into(), one.sequence)).collect()
    }

    #[test]
    fn resume_request_names_what_the_client_has() {
        let text = r#" {"last_sequences": {"b": 12, "a": "9223372036854775807", "c": -3}} "#;
        let expected = [("a".into(), i64::MAX), ("b".into(), 12), ("c".into(), 0)];
        assert_eq!(positions(text), expected);
        assert_eq!(positions(r#"{"last_sequences": {}, "more": [1, {}]}"#), []);
    }

    #[test]
    fn last_of_repeated_keys_counts() {
        assert_eq!(positions(r#"{"last_sequences": {"a": 1, "b": 2, "a": 3}}"#).len(), 2);
        assert_eq!(positions(r#"{"last_sequences": {"a": 1, "a": 3}}"#), [("a".into(), 3)]);
    }

    #[test]
    fn fresh_token_comes_alone_or_with_a_resume_request() {
        let alone = parse(r#"{"access_token": "x.y.z"}"#).unwrap();
        assert_eq!(alone.access_token.as_ref().map(Secret::expose), Some("x.y.z"));
        assert_eq!(alone.last_sequences, None);
        let both = parse(r#"{"access_token": "t", "last_sequences": {"a": 1}}"#).unwrap();
        assert!(both.access_token.is_some() && both.last_sequences.is_some());
    }

    #[test]
    fn cursor_comes_with_or_without_positions() {
        let cursor = |text: &str| parse(text).unwrap().cursor;
        assert_eq!(cursor(r#"{"last_sequences": {}}"#), None);
        for none in [r#"{"cursor": null}"#, r#"{"cursor": ""}"#] {
            assert_eq!(cursor(none), Some(CursorRequest::First), "{none}");
            assert!(!parse(none).unwrap().is_empty());
        }
        let at = LogPosition { topic: TopicId(1), partition: 0, next: 5, check: UNCHECKED };
        let known = Cursor::of_sorted(&[at]).unwrap();
        let text = format!(r#"{{"cursor":"{}","last_sequences":{{"a":1}}}}"#, known.to_text());
        assert_eq!(cursor(&text), Some(CursorRequest::Since(known)));
        assert_eq!(positions(&text), [("a".into(), 1)]);
        let unusable = CursorRequest::Unusable(CursorExpired::Malformed);
        assert_eq!(cursor(r#"{"cursor": "AQ"}"#), Some(unusable));
    }

    /// Issue “From the log to the members”: “`{}`, `null` and `{"last_sequences":null}` return
    /// everything from 0” in the Go service.
    #[test]
    fn message_without_positions_is_valid() {
        for text in [
            "{}",
            " null ",
            r#"{"last_sequences": null}"#,
            r#"{"typing": true}"#,
            r#"{"access_token": ""}"#,
            r#"{"access_token": null, "last_sequences": null}"#,
            // Fields of others may hold whatever JSON allows.
            r#"{"typing": "\ud800", "at": 1e999}"#,
        ] {
            assert!(parse(text).unwrap().is_empty(), "{text}");
        }
        assert_eq!(positions(r#"{"last_sequences": {}}"#), []);
    }

    #[test]
    fn entry_without_a_sequence_is_from_the_beginning_and_one_without_an_id_is_ignored() {
        let long = "x".repeat(ID_BYTES_MAX + 1);
        let text = format!(r#"{{"last_sequences": {{"a": null, "": 1, "{long}": 1, "b": 2}}}}"#);
        assert_eq!(positions(&text), [("a".into(), 0), ("b".into(), 2)]);
    }

    #[test]
    fn any_other_message_is_invalid() {
        for text in [
            "",
            "{",
            "[]",
            r#"[{"a": 1}, "token"]"#,
            r#""last_sequences""#,
            "5",
            "true",
            "nul",
            r#"{"last_sequences": []}"#,
            r#"{"last_sequences": "a"}"#,
            r#"{"last_sequences": {"a": 1.5}}"#,
            r#"{"last_sequences": {"a": 3.0}}"#,
            r#"{"last_sequences": {"a": 3e0}}"#,
            r#"{"last_sequences": {"a": true}}"#,
            r#"{"last_sequences": {"a": "x"}}"#,
            r#"{"last_sequences": {"a": 9223372036854775808}}"#,
            r#"{"last_sequences": {"a": 1}} x"#,
            r#"{"last_sequences": {"a": 1}, "last_sequences": {"b": 1}}"#,
            r#"{"access_token": 5}"#,
            r#"{"cursor": 5}"#,
            r#"{"cursor": null, "cursor": null}"#,
        ] {
            assert_eq!(parse(text), Err(InvalidMessage::Malformed), "{text}");
        }
    }

    #[test]
    fn limits_hold() {
        let named = |count: usize| {
            let all: Vec<_> = (0..count).map(|n| format!(r#""{n}":1"#)).collect();
            format!(r#"{{"last_sequences":{{{}}}}}"#, all.join(","))
        };
        assert_eq!(positions(&named(CONVERSATIONS_NAMED_MAX)).len(), CONVERSATIONS_NAMED_MAX);
        let too_many = parse(&named(CONVERSATIONS_NAMED_MAX + 1));
        assert_eq!(too_many, Err(InvalidMessage::TooManyConversations));
        let long = format!(r#"{{"access_token":"{}"}}"#, "x".repeat(TOKEN_BYTES_MAX + 1));
        assert_eq!(parse(&long), Err(InvalidMessage::Malformed));
        let deep = format!(r#"{{"x":{}"#, "[".repeat(64_000));
        assert_eq!(parse(&deep), Err(InvalidMessage::Malformed));
    }

    proptest! {
        #[test]
        fn no_text_causes_a_panic(text in any::<String>()) {
            let _ = parse(&text);
        }

        #[test]
        fn any_positions_are_parsed_back(
            all in prop::collection::btree_map("[^\\p{Cc}]{1,40}", 0..=i64::MAX, 0..50)
        ) {
            let text = serde_json::json!({ "last_sequences": &all }).to_string();
            prop_assert_eq!(positions(&text), all.into_iter().collect::<Vec<_>>());
        }
    }
}
