//! What becomes of records that cannot be delivered.

use std::fmt;

use crate::service::events::envelope::EnvelopeError;
use crate::service::routing::router::lane::TopicPartition;
use crate::service::routing::router::record::RawRecord;

/// Why a record was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterReason {
    /// It is not an `EventEnvelope`. The publisher's fault.
    Undecodable(EnvelopeError),
    /// Neither the event nor the record's key names a conversation. The publisher's fault.
    NoConversation,
    /// The conversation service knows of no such conversation.
    NoSuchConversation,
    /// Nobody can be asked who belongs to the conversation: no conversation service is configured,
    /// and its creation was not read.
    MembersUnknown,
    /// The conversation service did not answer for the stated time.
    MembersUnavailable,
}

impl DeadLetterReason {
    /// For the header of a dead letter: stable, without spaces.
    pub fn label(self) -> &'static str {
        match self {
            Self::Undecodable(_) => "undecodable",
            Self::NoConversation => "no_conversation",
            Self::NoSuchConversation => "no_such_conversation",
            Self::MembersUnknown => "members_unknown",
            Self::MembersUnavailable => "members_unavailable",
        }
    }
}

impl fmt::Display for DeadLetterReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undecodable(error) => write!(f, "not an event envelope: {error}"),
            Self::NoConversation => f.write_str("names no conversation"),
            Self::NoSuchConversation => f.write_str("the conversation does not exist"),
            Self::MembersUnknown => {
                f.write_str("the members are unknown and there is no conversation service to ask")
            }
            Self::MembersUnavailable => {
                f.write_str("the conversation service does not tell the members")
            }
        }
    }
}

/// A record that was given up.
#[derive(Clone, Copy, Debug)]
pub struct DeadLetter<'a> {
    /// The partition it stands in.
    pub log: &'a TopicPartition,
    /// The record.
    pub raw: RawRecord<'a>,
    /// Why.
    pub reason: DeadLetterReason,
}

/// Called once when a dead letter is stored, or never can be.
pub type DeadLetterDone = Box<dyn FnOnce() + Send + Sync>;

/// Takes records that were given up.
pub trait DeadLetterSink: Send + Sync {
    /// Never blocks. `done` is called once when the record is stored, or never can be (counted
    /// there). `false`: nothing more is taken at the moment, and `done` will not be called.
    fn send(&self, letter: DeadLetter<'_>, done: DeadLetterDone) -> bool;
}
