//! An event, encoded once for all its recipients.

use std::sync::Arc;

use crate::domain::budget::{Charge, EventBudget};
use crate::domain::ids::{StreamKey, StreamPosition};

/// How the events of a session are written. Fixed at the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// `realchat.v1`: a binary WebSocket message, the serialized `EventEnvelope`.
    Binary = 0,
    /// The same with permessage-deflate (RFC 7692), no context takeover.
    BinaryDeflate = 1,
    /// `realchat.v1.json`: a text WebSocket message, proto3 JSON with the inner event decoded.
    Json = 2,
    /// The same with permessage-deflate.
    JsonDeflate = 3,
    /// gRPC `Connect`: a serialized `DeliveryEvent` without any frame around it.
    Stream = 4,
}

impl Encoding {
    /// How many there are.
    pub const COUNT: usize = 5;

    /// All of them, in the order of their numbers.
    pub const ALL: [Encoding; Self::COUNT] =
        [Self::Binary, Self::BinaryDeflate, Self::Json, Self::JsonDeflate, Self::Stream];

    /// As an index into per-encoding tables.
    pub fn index(self) -> usize {
        self as usize
    }

    /// What is sent instead where compression does not pay: a compressing session may be sent any
    /// single message uncompressed (RFC 7692 §6).
    pub fn uncompressed(self) -> Encoding {
        match self {
            Self::Binary | Self::BinaryDeflate => Self::Binary,
            Self::Json | Self::JsonDeflate => Self::Json,
            Self::Stream => Self::Stream,
        }
    }
}

/// A set of encodings: what the recipients of one event need between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodingSet(u8);

impl EncodingSet {
    /// Adds one.
    pub fn insert(&mut self, encoding: Encoding) {
        self.0 |= 1 << encoding.index();
    }

    /// Whether it is in the set.
    pub fn contains(self, encoding: Encoding) -> bool {
        self.0 & (1 << encoding.index()) != 0
    }

    /// Whether nothing is.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// One immutable event with its ready frames: server frames are not masked (RFC 6455 §5.1), so the
/// same bytes serve every recipient.
#[derive(Debug, Default)]
pub struct Event {
    frames: [Option<Box<[u8]>>; Encoding::COUNT],
    /// Place within its conversation; `None` for events that have none (receipts, presence,
    /// membership). Catch-up uses it to send nothing twice.
    pub position: Option<StreamPosition>,
    /// The conversation it belongs to, with or without a place in it; `None` where it belongs to
    /// none (presence). While a conversation is being caught up, all its live events wait.
    pub stream: Option<StreamKey>,
    /// When the event was appended to its log, Unix time in ms; 0 where unknown. For the latency
    /// histogram.
    pub appended_at_ms: u64,
    /// What it takes of its maker's budget; `None`: it is bounded otherwise.
    charge: Option<Charge>,
}

impl Event {
    /// Memory of an event beside its frames and the lists of its recipients, bytes: itself, its
    /// counts, and what each shard that holds it keeps.
    pub const OVERHEAD_BYTES: u64 = 512;

    /// An event without frames yet.
    pub fn new(position: Option<StreamPosition>, appended_at_ms: u64) -> Self {
        let stream = position.map(|position| position.stream);
        Self { frames: Default::default(), position, stream, appended_at_ms, charge: None }
    }

    /// Says which conversation an event without a position belongs to.
    pub fn of_stream(mut self, stream: StreamKey) -> Self {
        debug_assert!(self.position.is_none_or(|position| position.stream == stream));
        self.stream = Some(stream);
        self
    }

    /// Adds the ready bytes for one encoding: a whole frame, header and payload.
    pub fn with_frame(mut self, encoding: Encoding, frame: Box<[u8]>) -> Self {
        self.frames[encoding.index()] = Some(frame);
        self
    }

    /// Charges its bytes, and `beside` more for what travels with it, to a budget as long as it
    /// lives.
    pub fn charged_to(mut self, budget: &Arc<EventBudget>, beside: u64) -> Self {
        self.charge = Some(budget.charge(self.bytes() + Self::OVERHEAD_BYTES + beside));
        self
    }

    /// Bytes of all frames together.
    pub fn bytes(&self) -> u64 {
        self.frames.iter().flatten().map(|frame| frame.len() as u64).sum()
    }

    /// The bytes for a session of this encoding, or those of its uncompressed form where the event
    /// did not shrink. `None`: the event cannot be expressed in it (or was not prepared for it),
    /// and the session is skipped.
    pub fn frame(&self, encoding: Encoding) -> Option<&[u8]> {
        self.frames[encoding.index()]
            .as_deref()
            .or_else(|| self.frames[encoding.uncompressed().index()].as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressing_session_falls_back_to_plain_frame() {
        let event = Event::new(None, 0).with_frame(Encoding::Json, Box::from(*b"{}"));
        assert_eq!(event.frame(Encoding::JsonDeflate), Some(&b"{}"[..]));
        assert_eq!(event.frame(Encoding::Binary), None);
    }

    #[test]
    fn encoding_set_holds_each_member_apart() {
        for one in Encoding::ALL {
            let mut set = EncodingSet::default();
            assert!(set.is_empty());
            set.insert(one);
            for other in Encoding::ALL {
                assert_eq!(set.contains(other), one == other);
            }
        }
    }
}
