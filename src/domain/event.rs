//! An event, encoded once for all its recipients.

use std::sync::Arc;

use crate::domain::budget::{Charge, EventBudget};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConversationKey, ConversationPosition};

/// One immutable event with its encoded frames. Server frames are not masked (RFC 6455 §5.1), so
/// the same bytes serve every recipient.
#[derive(Debug, Default)]
pub struct Event {
    frames: [Option<Box<[u8]>>; Encoding::COUNT],
    /// Position within the conversation; `None` for events without one (receipts, presence,
    /// membership). It identifies the messages that catch-up has delivered.
    pub position: Option<ConversationPosition>,
    /// Position within the log, as if the partition were a conversation; `None` for an event that is not of the log. It
    /// identifies the events that a replay since a cursor has delivered.
    pub log_position: Option<ConversationPosition>,
    /// The conversation of the event, whether or not it has a position in it; `None` for events of
    /// no conversation (presence). While a conversation is being caught up, all its live events are
    /// held.
    pub conversation: Option<ConversationKey>,
    /// When the event was appended to its log, Unix time in ms; 0 if unknown. For the latency
    /// histogram.
    pub appended_at_ms: u64,
    /// Part of the routers' budget; `None`: the event is bounded in another way.
    charge: Option<Charge>,
}

impl Event {
    /// Memory of an event besides its frames and its recipient lists, bytes: the event itself, its
    /// reference counts, and the bookkeeping of each shard that holds it.
    pub const OVERHEAD_BYTES: u64 = 512;

    /// An event without frames yet.
    pub fn new(position: Option<ConversationPosition>, appended_at_ms: u64) -> Self {
        let conversation = position.map(|position| position.conversation);
        Self { position, conversation, appended_at_ms, ..Self::default() }
    }

    /// Sets the position within the log.
    pub fn at_log_position(mut self, at: ConversationPosition) -> Self {
        self.log_position = Some(at);
        self
    }

    /// Sets the conversation of an event without a position.
    pub fn of_conversation(mut self, conversation: ConversationKey) -> Self {
        debug_assert!(self.position.is_none_or(|position| position.conversation == conversation));
        self.conversation = Some(conversation);
        self
    }

    /// Adds the bytes for one encoding: a whole frame, header and payload.
    pub fn with_frame(mut self, encoding: Encoding, frame: Box<[u8]>) -> Self {
        self.frames[encoding.index()] = Some(frame);
        self
    }

    /// Charges what the event costs to a budget, for as long as the event lives.
    pub fn charged_to(mut self, budget: &Arc<EventBudget>) -> Self {
        self.charge = Some(budget.charge(self.cost()));
        self
    }

    /// A shard, or the hub, holds the event for sessions that catch up: until [`Event::end_hold`], it counts towards
    /// the holder's bound of such events, not towards the budget.
    pub fn begin_hold(&self) {
        if let Some(charge) = &self.charge {
            charge.suspend();
        }
    }

    /// The holder has no such session any more.
    pub fn end_hold(&self) {
        if let Some(charge) = &self.charge {
            charge.resume();
        }
    }

    /// Total bytes of all frames.
    pub fn bytes(&self) -> u64 {
        self.frames.iter().flatten().map(|frame| frame.len() as u64).sum()
    }

    /// What one queued event costs, bytes: its frames and [`Event::OVERHEAD_BYTES`].
    pub fn cost(&self) -> u64 {
        self.bytes() + Self::OVERHEAD_BYTES
    }

    /// The bytes for a session of this encoding, or those of the uncompressed encoding if the event
    /// did not shrink. `None`: the encoding has no form for the event, or it was not encoded in
    /// it, and the session is skipped.
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
}
