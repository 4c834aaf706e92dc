//! Decodes an event as far as routing needs it, without a copy: its type, its conversation, and a few
//! fields (contract §§1, 2).
//!
//! Strings that routing does not read are not checked. [`decode`] never panics, whatever the bytes.

mod wire;

use crate::service::events::envelope::wire::Fields;
use crate::service::events::proto::shared::v1::EventType;

/// Why a record cannot be decoded. The publisher's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// No value (a tombstone), or an empty one.
    #[error("empty")]
    Empty,
    /// A field ends after the record does.
    #[error("truncated")]
    Truncated,
    /// A varint of more than 64 bits.
    #[error("overlong integer")]
    Varint,
    /// Field number 0, or one beyond 29 bits.
    #[error("invalid field number")]
    Key,
    /// The wire type of a field does not fit its type in the contract.
    #[error("wrong wire type")]
    WireType,
    /// A group without an end, or groups nested too deeply.
    #[error("malformed group")]
    Group,
    /// An id that is not UTF-8.
    #[error("id is not UTF-8")]
    Utf8,
}

/// A decoded event. Borrows from the record's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedEvent<'a> {
    /// The whole value, a serialized `EventEnvelope`. Binary sessions get it unchanged.
    pub value: &'a [u8],
    /// `EventEnvelope.event_type`, which may be unknown to this program.
    pub event_type: i32,
    /// `EventEnvelope.payload`, the serialized inner event.
    pub payload: &'a [u8],
    /// The inner event.
    pub body: EventBody<'a>,
}

/// The inner event, as far as routing needs it. Ids may be empty, because proto3 has no required fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventBody<'a> {
    /// `ConversationCreatedEvent`.
    ConversationCreated {
        /// The new conversation.
        conversation: &'a str,
        /// The complete member list, sorted, without duplicates.
        members: Vec<&'a str>,
    },
    /// `MembershipChangedEvent`.
    MembershipChanged {
        /// The conversation.
        conversation: &'a str,
        /// The user who joined or left.
        user: &'a str,
        /// `true`: joined; `false`: left.
        added: bool,
    },
    /// `MessageSentEvent`.
    MessageSent {
        /// The conversation.
        conversation: &'a str,
        /// The message's sequence in it; 0 if not set.
        sequence: i64,
    },
    /// `MessageDeletedEvent`.
    MessageDeleted {
        /// The conversation.
        conversation: &'a str,
        /// The message.
        message_id: &'a str,
    },
    /// `ReadReceiptUpdatedEvent`.
    ReadReceiptUpdated {
        /// The conversation.
        conversation: &'a str,
    },
    /// `PresenceUpdateEvent`, which has no conversation.
    PresenceUpdated {
        /// The user whose presence changed.
        user: &'a str,
    },
    /// An event type that this program does not know, or none. It is routed by the record's key and
    /// sent unchanged.
    Unknown,
}

impl<'a> DecodedEvent<'a> {
    /// The conversation of the event; `None` if it names none.
    pub fn conversation(&self) -> Option<&'a str> {
        let id = match self.body {
            EventBody::ConversationCreated { conversation, .. }
            | EventBody::MembershipChanged { conversation, .. }
            | EventBody::MessageSent { conversation, .. }
            | EventBody::MessageDeleted { conversation, .. }
            | EventBody::ReadReceiptUpdated { conversation } => conversation,
            EventBody::PresenceUpdated { .. } | EventBody::Unknown => "",
        };
        (!id.is_empty()).then_some(id)
    }
}

/// Decodes a record's value.
///
/// # Errors
/// See [`EnvelopeError`].
pub fn decode(value: &[u8]) -> Result<DecodedEvent<'_>, EnvelopeError> {
    if value.is_empty() {
        return Err(EnvelopeError::Empty);
    }
    let mut event_type = 0;
    let mut payload = &[][..];
    let mut fields = Fields::new(value);
    while let Some((number, field)) = fields.next()? {
        match number {
            1 => event_type = field.integer()? as i32,
            4 => payload = field.bytes()?,
            _ => {}
        }
    }
    let body = match EventType::try_from(event_type) {
        Ok(EventType::ConversationCreated) => conversation_created(payload)?,
        Ok(EventType::MembershipChanged) => membership_changed(payload)?,
        Ok(EventType::MessageSent) => message_sent(payload)?,
        Ok(EventType::MessageDeleted) => message_deleted(payload)?,
        Ok(EventType::ReadReceiptUpdated) => {
            EventBody::ReadReceiptUpdated { conversation: string_field(payload, 1)? }
        }
        Ok(EventType::PresenceUpdated) => {
            EventBody::PresenceUpdated { user: string_field(payload, 1)? }
        }
        Ok(EventType::Unspecified) | Err(_) => EventBody::Unknown,
    };
    Ok(DecodedEvent { value, event_type, payload, body })
}

/// Every occurrence of an embedded message or bytes field. A field that is not `repeated` may occur several
/// times too; concatenating the occurrences merges them, as protobuf requires.
pub(crate) fn repeated(message: &[u8], wanted: u32) -> Result<Vec<&[u8]>, EnvelopeError> {
    let mut found = Vec::new();
    let mut fields = Fields::new(message);
    while let Some((number, field)) = fields.next()? {
        if number == wanted {
            found.push(field.bytes()?);
        }
    }
    Ok(found)
}

/// A string field; the last occurrence counts.
fn string_field(message: &[u8], wanted: u32) -> Result<&str, EnvelopeError> {
    let mut found = "";
    let mut fields = Fields::new(message);
    while let Some((number, field)) = fields.next()? {
        if number == wanted {
            found = field.string()?;
        }
    }
    Ok(found)
}

fn conversation_created(payload: &[u8]) -> Result<EventBody<'_>, EnvelopeError> {
    let mut conversation = "";
    let mut members = Vec::new();
    let mut fields = Fields::new(payload);
    while let Some((number, field)) = fields.next()? {
        match number {
            1 => {
                let mut inner = Fields::new(field.bytes()?);
                while let Some((number, field)) = inner.next()? {
                    match number {
                        1 => conversation = field.string()?,
                        // The conversation lists the members again.
                        7 => members.push(field.string()?),
                        8 => members.push(string_field(field.bytes()?, 1)?),
                        _ => {}
                    }
                }
            }
            2 => members.push(field.string()?),
            _ => {}
        }
    }
    members.retain(|id| !id.is_empty());
    members.sort_unstable();
    members.dedup();
    Ok(EventBody::ConversationCreated { conversation, members })
}

fn membership_changed(payload: &[u8]) -> Result<EventBody<'_>, EnvelopeError> {
    let (mut conversation, mut user, mut added) = ("", "", false);
    let mut fields = Fields::new(payload);
    while let Some((number, field)) = fields.next()? {
        match number {
            1 => conversation = field.string()?,
            2 => user = field.string()?,
            3 => added = field.integer()? != 0,
            _ => {}
        }
    }
    Ok(EventBody::MembershipChanged { conversation, user, added })
}

fn message_sent(payload: &[u8]) -> Result<EventBody<'_>, EnvelopeError> {
    let (mut conversation, mut sequence) = ("", 0);
    let mut fields = Fields::new(payload);
    while let Some((number, field)) = fields.next()? {
        if number == 1 {
            let mut message = Fields::new(field.bytes()?);
            while let Some((number, field)) = message.next()? {
                match number {
                    2 => conversation = field.string()?,
                    4 => sequence = field.integer()?.cast_signed(),
                    _ => {}
                }
            }
        }
    }
    Ok(EventBody::MessageSent { conversation, sequence })
}

fn message_deleted(payload: &[u8]) -> Result<EventBody<'_>, EnvelopeError> {
    let (mut conversation, mut message_id) = ("", "");
    let mut fields = Fields::new(payload);
    while let Some((number, field)) = fields.next()? {
        match number {
            1 => conversation = field.string()?,
            2 => message_id = field.string()?,
            _ => {}
        }
    }
    Ok(EventBody::MessageDeleted { conversation, message_id })
}

#[cfg(test)]
mod tests;
