//! An event, encoded once for all its recipients.

use std::sync::Arc;

use crate::domain::budget::{Charge, EventBudget};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConversationKey, ConversationPosition};

/// One immutable event with its ready frames: server frames are not masked (RFC 6455 §5.1), so the
/// same bytes serve every recipient.
#[derive(Debug, Default)]
pub struct Event {
    frames: [Option<Box<[u8]>>; Encoding::COUNT],
    /// Place within its conversation; `None` for events that have none (receipts, presence,
    /// membership). Catch-up uses it to send nothing twice.
    pub position: Option<ConversationPosition>,
    /// The conversation it belongs to, with or without a place in it; `None` where it belongs to
    /// none (presence). While a conversation is being caught up, all its live events wait.
    pub conversation: Option<ConversationKey>,
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
    pub fn new(position: Option<ConversationPosition>, appended_at_ms: u64) -> Self {
        let conversation = position.map(|position| position.conversation);
        Self { frames: Default::default(), position, conversation, appended_at_ms, charge: None }
    }

    /// Says which conversation an event without a position belongs to.
    pub fn of_conversation(mut self, conversation: ConversationKey) -> Self {
        debug_assert!(self.position.is_none_or(|position| position.conversation == conversation));
        self.conversation = Some(conversation);
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
}
