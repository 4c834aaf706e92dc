//! Dead letters: records that could not be routed.

use std::fmt;

use crate::service::events::envelope::EnvelopeError;
use crate::service::routing::router::partition::TopicPartition;
use crate::service::routing::router::record::RawRecord;

/// Why a record became a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterReason {
    /// The value is not an `EventEnvelope`. The publisher's fault.
    Undecodable(EnvelopeError),
    /// Neither the event nor the record's key names a conversation. The publisher's fault.
    NoConversation,
    /// The conversation service reports that the conversation does not exist.
    NoSuchConversation,
    /// The members are unknown: no conversation service is configured, and the creation event was
    /// not read.
    MembersUnknown,
    /// The members were not known within `RouterConfig::route_retry_max_ms`: the conversation service did not return
    /// them, or this node has not read the membership changes before the record.
    MembersUnavailable,
}

impl DeadLetterReason {
    /// Value of the header `delivery-reason`: stable, without spaces.
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
            Self::NoConversation => f.write_str("no conversation id in the event or the key"),
            Self::NoSuchConversation => f.write_str("the conversation does not exist"),
            Self::MembersUnknown => {
                f.write_str("members unknown, and no conversation service configured")
            }
            Self::MembersUnavailable => {
                f.write_str(
                "members not known in time: the conversation service did not return them, or this node has \
                 not read the membership changes before the record \
                 (delivery_membership_waits_for_follower_total)",
            )
            }
        }
    }
}

/// A record that could not be routed.
#[derive(Clone, Copy, Debug)]
pub struct DeadLetter<'a> {
    /// Its partition.
    pub log: &'a TopicPartition,
    /// The record.
    pub raw: RawRecord<'a>,
    /// Why.
    pub reason: DeadLetterReason,
}

/// Called once, when the dead letter is stored or has finally failed.
pub type DeadLetterDone = Box<dyn FnOnce() + Send + Sync>;

/// Stores dead letters.
pub trait DeadLetterSink: Send + Sync {
    /// Never blocks. Calls `done` once, when the record is stored or has finally failed; the sink
    /// counts failures. `false`: the sink is full, and `done` will not be called.
    fn send(&self, letter: DeadLetter<'_>, done: DeadLetterDone) -> bool;
}
