//! What crosses the hand-off between the service side and the shards.
//!
//! A *peer* is a thread of the service side that owns one ring to and one ring from each shard:
//! the session manager and each router. What a shard reports about a connection goes to the
//! session manager; a [`ShardReport::Done`] goes back to the peer that issued the ticket.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::domain::close::{Close, EndReason};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationPosition};

/// Names one delivery towards one shard until the shard reports it done. Meaning is the issuer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub NonZeroU64);

/// The peer that awaits [`ShardReport::Done`] of a delivery, and the ticket it gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// Index of the peer that sent the command.
    pub peer: u16,
    /// Its ticket.
    pub ticket: Ticket,
}

/// The recipients of one event on one shard, each with the encoding it negotiated.
#[derive(Clone, Debug)]
pub enum Recipients {
    /// The common case of a direct conversation: no allocation.
    One(ConnectionKey, Encoding),
    /// Any number; no connection twice.
    Many(Box<[(ConnectionKey, Encoding)]>),
}

impl Recipients {
    /// All of them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (ConnectionKey, Encoding)> + '_ {
        let (one, many) = match self {
            Self::One(key, encoding) => (Some((*key, *encoding)), &[][..]),
            Self::Many(many) => (None, &many[..]),
        };
        RecipientsIter { one, many: many.iter() }
    }
}

struct RecipientsIter<'a> {
    one: Option<(ConnectionKey, Encoding)>,
    many: std::slice::Iter<'a, (ConnectionKey, Encoding)>,
}

impl Iterator for RecipientsIter<'_> {
    type Item = (ConnectionKey, Encoding);

    fn next(&mut self) -> Option<Self::Item> {
        self.one.take().or_else(|| self.many.next().copied())
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::from(self.one.is_some()) + self.many.len();
        (left, Some(left))
    }
}

impl ExactSizeIterator for RecipientsIter<'_> {}

/// Whether a delivery is what happens now or what a session missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryClass {
    /// A live event: held back while its session catches up, dropped if catch-up delivered it.
    Live,
    /// A caught-up message: passes the held ones.
    CatchUp,
}

/// From the service side to a shard.
#[derive(Debug)]
pub enum ShardCommand {
    /// Append the event to each recipient's queue. Done (if a ticket asks for the report) when for
    /// each recipient the send has completed, or the session has ended, or was stale already.
    Deliver {
        /// The event with a frame for each encoding among the recipients.
        event: Arc<Event>,
        /// Who gets it.
        recipients: Recipients,
        /// Live or caught up.
        class: DeliveryClass,
        /// Reported back when done; `None`: no report wanted.
        ticket: Option<Ticket>,
    },
    /// Answer the handshake with 101: the session is in the directory. Its live events are held
    /// until [`ShardCommand::GoLive`] or the end of the resume grace.
    Admit {
        /// Which connection.
        connection: ConnectionKey,
    },
    /// Answer the handshake with an HTTP error and close.
    Refuse {
        /// Which connection.
        connection: ConnectionKey,
        /// What to answer.
        refusal: Refusal,
    },
    /// Catch-up is complete: send what was held, except what `delivered` covers, and go live.
    GoLive {
        /// Which connection.
        connection: ConnectionKey,
        /// Per conversation the highest sequence that catch-up delivered: live events at or below
        /// it are duplicates.
        delivered: Box<[ConversationPosition]>,
    },
    /// Send a text message of the service's own (answers to the client's control messages).
    SendText {
        /// Which connection.
        connection: ConnectionKey,
        /// The text.
        text: Box<str>,
    },
    /// Send what is queued, then a close frame, and end.
    Close {
        /// Which connection.
        connection: ConnectionKey,
        /// Code and reason.
        close: Close,
        /// The metric label under which it ends.
        why: EndReason,
    },
    /// Close the listener; open connections stay.
    StopAccepting,
    /// Close every connection with this close, then report [`ShardReport::Stopped`] and end the
    /// thread.
    Stop {
        /// Code and reason for those still open.
        close: Close,
    },
}

/// An HTTP answer other than 101.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status, 400 to 599.
    pub status: u16,
    /// The body: one line that says what was wrong and what to do. Tells no secret.
    pub body: std::borrow::Cow<'static, str>,
    /// `Retry-After` in seconds, for 429 and 503.
    pub retry_after_s: Option<u32>,
}

/// What an upgrade request says of the client: for the service to decide on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// `user_id` of the query, decoded; empty if missing.
    pub user_id: String,
    /// `device_id` of the query, decoded; empty if missing.
    pub device_id: String,
    /// The bearer token, wherever it was found. Never printed: see [`Secret`].
    pub token: Option<Secret>,
    /// The client's address.
    pub address: IpAddr,
    /// What its events will be encoded as.
    pub encoding: Encoding,
}

/// A string that `Debug` does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The value: for verifying only, never for a log, an error or a metric.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// From a shard to the service side.
#[derive(Debug)]
pub enum ShardReport {
    /// A complete upgrade request waits for [`ShardCommand::Admit`] or [`ShardCommand::Refuse`].
    Opened {
        /// Which connection.
        connection: ConnectionKey,
        /// What the client said.
        hello: Box<Hello>,
    },
    /// A text message from the client: the resume request, or a fresh token.
    Message {
        /// Which connection.
        connection: ConnectionKey,
        /// The text, checked as UTF-8.
        text: Box<str>,
    },
    /// A gRPC session named a conversation for the first time: send what follows `after`, as
    /// [`DeliveryClass::CatchUp`], then [`ShardCommand::GoLive`] with exactly this conversation in
    /// `delivered`: the highest sequence that was sent, or `after`. Only its own live events wait
    /// meanwhile. Only the stream hub reports this, once per conversation of a session.
    Resume {
        /// Which connection.
        connection: ConnectionKey,
        /// The conversation's id, not empty.
        conversation: Box<str>,
        /// The last sequence the client has of it, 0 or more.
        after: i64,
    },
    /// The resume grace passed without a first message: the session has gone live by itself.
    GraceExpired {
        /// Which connection.
        connection: ConnectionKey,
    },
    /// The connection has ended. Sent once for each connection that was reported opened; the key
    /// is not used again before the report is in the ring.
    Ended {
        /// Which connection.
        connection: ConnectionKey,
        /// How.
        why: EndReason,
    },
    /// All recipients of a delivery are done.
    Done {
        /// The ticket of the delivery.
        ticket: Ticket,
    },
    /// The shard has closed everything; its thread ends after this.
    Stopped,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_is_not_printed() {
        assert_eq!(format!("{:?}", Secret::new("hunter2".into())), "Secret(…)");
    }

    #[test]
    fn commands_stay_within_a_cache_line() {
        assert!(size_of::<ShardCommand>() <= 64, "{}", size_of::<ShardCommand>());
        assert!(size_of::<ShardReport>() <= 64, "{}", size_of::<ShardReport>());
    }
}
