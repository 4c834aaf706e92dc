//! Commands and reports: the items that cross the hand-off between the service side and the shards.
//!
//! A *peer* is a thread of the service side that owns one ring to and one ring from each shard: the
//! session manager and each router. Reports about a connection go to the session manager;
//! [`ShardReport::Done`] goes to the peer that issued the ticket.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::domain::budget::{Charge, EventBudget};
use crate::domain::caught_up::CaughtUp;
use crate::domain::close::{Close, EndReason};
use crate::domain::cursor::{CursorExpired, LogPosition};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;

/// Identifies one delivery to one shard until the shard reports it done. Only the issuer interprets
/// it.
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
#[derive(Debug)]
pub enum Recipients {
    /// A single recipient, as in a direct conversation: needs no allocation.
    One((ConnectionKey, Encoding)),
    /// Any number of recipients; no connection twice. With what the list takes of the routers' budget.
    Many(Box<[(ConnectionKey, Encoding)]>, Option<Charge>),
}

impl Recipients {
    /// One or many recipients. `budget`: is charged for the list.
    pub fn new(all: &[(ConnectionKey, Encoding)], budget: Option<&Arc<EventBudget>>) -> Self {
        match *all {
            [one] => Self::One(one),
            ref many => {
                Self::Many(many.into(), budget.map(|it| it.charge(size_of_val(many) as u64)))
            }
        }
    }

    /// All recipients.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (ConnectionKey, Encoding)> + '_ {
        let all = match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many, _) => many,
        };
        all.iter().copied()
    }
}

/// Whether an event is live or was missed by the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryClass {
    /// A live event. It is held while its session catches up, and dropped if catch-up has delivered
    /// exactly this message.
    Live,
    /// A caught-up message. It is sent before the held live events.
    CatchUp,
}

/// A command from the service side to a shard.
#[derive(Debug)]
pub enum ShardCommand {
    /// Append the event to each recipient's queue. The delivery is done when, for each recipient,
    /// the send has completed, the session has ended, or the connection was stale already.
    Deliver {
        /// The event, with a frame for each encoding among the recipients.
        event: Arc<Event>,
        /// The recipients.
        recipients: Recipients,
        /// Live or caught up.
        class: DeliveryClass,
        /// Returned in [`ShardReport::Done`]; `None`: no report wanted.
        ticket: Option<Ticket>,
    },
    /// Answer the handshake with 101: the session is in the directory. Its live events are held
    /// until [`ShardCommand::GoLive`] or the end of the resume grace period.
    Admit {
        /// The connection.
        connection: ConnectionKey,
    },
    /// Answer the handshake with an HTTP error and close.
    Refuse {
        /// The connection.
        connection: ConnectionKey,
        /// The HTTP response.
        refusal: Refusal,
    },
    /// Catch-up is complete: send the held events, except those that `delivered` contains, and go
    /// live.
    GoLive {
        /// The connection.
        connection: ConnectionKey,
        /// The messages that catch-up delivered. Their live events are duplicates, and no others.
        delivered: Box<CaughtUp>,
    },
    /// Send a text message of the service (answers to the client's control messages).
    SendText {
        /// The connection.
        connection: ConnectionKey,
        /// The text.
        text: Box<str>,
    },
    /// Send what is queued, then close with this close frame.
    Close {
        /// The connection.
        connection: ConnectionKey,
        /// Code and reason.
        close: Close,
        /// The reason under which the end is counted.
        why: EndReason,
    },
    /// Everything below these positions is in the rings of all shards, in front of this command if it
    /// came from the same router. They replace earlier positions of their partitions.
    Routed {
        /// The partitions that moved, in any order.
        positions: Box<[LogPosition]>,
    },
    /// From now on the session gets cursors: once it is live, every event of its user is given to it until it leaves
    /// the directory.
    SendCursors {
        /// The connection.
        connection: ConnectionKey,
    },
    /// The cursor of a WebSocket client cannot be used: tell it. What it missed follows as
    /// [`DeliveryClass::CatchUp`], as far as it can be caught up in another way.
    CursorExpired {
        /// The connection.
        connection: ConnectionKey,
        /// Why it cannot be used.
        why: CursorExpired,
    },
    /// The session has left the directory, and its close comes later: it gets no more cursors.
    StopCursors {
        /// The connection.
        connection: ConnectionKey,
    },
    /// The answer to [`ShardReport::Fence`].
    Fence,
    /// Close the listener; open connections stay.
    StopAccepting,
    /// Close every connection with this close frame, then report [`ShardReport::Stopped`] and end
    /// the thread.
    Stop {
        /// Code and reason for the connections that are still open.
        close: Close,
    },
}

/// An HTTP response other than 101.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status, 400 to 599.
    pub status: u16,
    /// The body: one line that says what was wrong and what to do. Contains no secret.
    pub body: std::borrow::Cow<'static, str>,
    /// `Retry-After` in seconds, for 429 and 503.
    pub retry_after_s: Option<u32>,
}

/// The content of an upgrade request, on which the service decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// `user_id` of the query, decoded; empty if missing.
    pub user_id: String,
    /// `device_id` of the query, decoded; empty if missing.
    pub device_id: String,
    /// The bearer token, from wherever in the request it was. Never printed: see [`Secret`].
    pub token: Option<Secret>,
    /// The client's address.
    pub address: IpAddr,
    /// The encoding of the session's events.
    pub encoding: Encoding,
}

/// A string that `Debug` does not print.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The value. Only for verification; never for a log, an error or a metric.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A report from a shard to the service side.
#[derive(Debug)]
pub enum ShardReport {
    /// A complete upgrade request awaits [`ShardCommand::Admit`] or [`ShardCommand::Refuse`].
    Opened {
        /// The connection.
        connection: ConnectionKey,
        /// The content of the request.
        hello: Box<Hello>,
    },
    /// A text message from the client: the resume request, or a new token.
    Message {
        /// The connection.
        connection: ConnectionKey,
        /// The text, valid UTF-8.
        text: Box<str>,
    },
    /// A gRPC session named a conversation for the first time. The peer sends what follows `after`
    /// as [`DeliveryClass::CatchUp`], then [`ShardCommand::GoLive`] with what was sent of this
    /// conversation. Only live events of this conversation are held meanwhile. Only the stream hub
    /// sends this report, once per conversation of a session.
    Resume {
        /// The connection.
        connection: ConnectionKey,
        /// The conversation's id, not empty.
        conversation: Box<str>,
        /// The last sequence that the client has, 0 or more.
        after: i64,
    },
    /// A gRPC session wants cursors. The peer sends everything since this one as [`DeliveryClass::CatchUp`], then
    /// [`ShardCommand::GoLive`] with what was sent, of no conversation in particular. All live events are held
    /// meanwhile. Only the stream hub sends this report, once per session and before its [`ShardReport::Resume`].
    ResumeSince {
        /// The connection.
        connection: ConnectionKey,
        /// The cursor, not decoded. Empty: there is none yet.
        cursor: Box<[u8]>,
    },
    /// The resume grace period passed without a first message: the session has gone live.
    GraceExpired {
        /// The connection.
        connection: ConnectionKey,
    },
    /// The connection has ended. Sent once for each connection that was reported opened. The key is
    /// not reused before this report is in the ring.
    Ended {
        /// The connection.
        connection: ConnectionKey,
        /// The reason.
        why: EndReason,
    },
    /// A cursor is due. The session manager answers with [`ShardCommand::Fence`]. In front of it come
    /// [`ShardCommand::Close`] or [`ShardCommand::StopCursors`] for each session that left the directory before this
    /// report was sent. At most one is unanswered.
    Fence,
    /// All recipients of a delivery are done.
    Done {
        /// The ticket of the delivery.
        ticket: Ticket,
    },
    /// All connections have ended; the shard's thread ends after this report.
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
