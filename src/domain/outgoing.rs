//! What goes out: frames that wait in send queues, and the buffer a send carries.
//!
//! The ring lets the kernel read a [`SendBuffer`] while it keeps the value, and relies on what this
//! file keeps private: bytes in here are never changed, and stay at their address when a value is
//! moved. There is no interior mutability around them, and whoever else holds the `Arc` or the `Rc`
//! cannot get an exclusive reference while this one exists.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use crate::domain::command::ReplyTo;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;

/// One frame (or HTTP answer), or one event with its frames, held once per shard however many
/// connections it waits for. Counts without atomics; the event's own atomic count is touched once
/// per shard.
pub struct Outgoing {
    content: Content,
    reply_to: Option<ReplyTo>,
    /// Recipients whose delivery has neither completed nor been given up.
    outstanding: Cell<u32>,
}

enum Content {
    Event(Arc<Event>),
    Own(Box<[u8]>),
}

impl Outgoing {
    /// An event that came through the hand-off, for `recipients` connections.
    pub fn event(event: Arc<Event>, reply_to: Option<ReplyTo>, recipients: u32) -> Rc<Self> {
        Rc::new(Self {
            content: Content::Event(event),
            reply_to,
            outstanding: Cell::new(recipients),
        })
    }

    /// Bytes of the shard's own making: a control frame, an HTTP answer, an echo.
    pub fn own(bytes: Box<[u8]>) -> Rc<Self> {
        Rc::new(Self { content: Content::Own(bytes), reply_to: None, outstanding: Cell::new(0) })
    }

    /// The bytes for a connection of this encoding, the same at every call and at the same address
    /// as long as `self` lives. `None`: the event cannot be expressed in it.
    pub fn bytes(&self, encoding: Encoding) -> Option<&[u8]> {
        match &self.content {
            Content::Event(event) => event.frame(encoding),
            Content::Own(bytes) => Some(bytes),
        }
    }

    /// The event, if it is one.
    pub fn as_event(&self) -> Option<&Event> {
        match &self.content {
            Content::Event(event) => Some(event),
            Content::Own(_) => None,
        }
    }

    /// One recipient is done. Returns whether it was the last.
    pub fn one_done(&self) -> bool {
        let left = self.outstanding.get().checked_sub(1).expect("more done than recipients");
        self.outstanding.set(left);
        left == 0
    }

    /// Who wants to know.
    pub fn reply_to(&self) -> Option<ReplyTo> {
        self.reply_to
    }
}

impl fmt::Debug for Outgoing {
    /// Without the bytes: they are the users' own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("reply_to", &self.reply_to)
            .field("outstanding", &self.outstanding.get())
            .finish_non_exhaustive()
    }
}

/// The bytes of one send. The kernel owns it from the request to the completion, which gives it
/// back. Moving it moves no byte: [`SendBuffer::bytes`] is at the same address as long as it lives.
#[derive(Debug)]
pub struct SendBuffer {
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// One frame, straight from where all its recipients share it.
    Shared { outgoing: Rc<Outgoing>, encoding: Encoding, from: usize },
    /// Several frames, copied together.
    Batch(Vec<u8>),
}

impl SendBuffer {
    /// The frame for `encoding` without its first `from` bytes, which have been sent. At least one
    /// byte is left.
    pub fn shared(outgoing: Rc<Outgoing>, encoding: Encoding, from: usize) -> Self {
        let length = outgoing.bytes(encoding).map_or(0, <[u8]>::len);
        assert!(from < length, "nothing to send: {from} of {length}");
        Self { source: Source::Shared { outgoing, encoding, from } }
    }

    /// Several frames, copied together; not empty.
    pub fn batch(bytes: Vec<u8>) -> Self {
        assert!(!bytes.is_empty());
        Self { source: Source::Batch(bytes) }
    }

    /// What to send.
    pub fn bytes(&self) -> &[u8] {
        match &self.source {
            Source::Shared { outgoing, encoding, from } => {
                &outgoing.bytes(*encoding).unwrap_or_default()[*from..]
            }
            Source::Batch(bytes) => bytes,
        }
    }

    /// The staging buffer, if it was one, to be used again.
    pub fn into_batch(self) -> Option<Vec<u8>> {
        match self.source {
            Source::Shared { .. } => None,
            Source::Batch(bytes) => Some(bytes),
        }
    }
}
