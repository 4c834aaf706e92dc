//! Outgoing data: the frames in send queues. The kernel reads them where they are (`uring::SendBuffer`), so there is no
//! interior mutability around the bytes, here and in [`Event`].

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use crate::domain::command::{DeliveryClass, ReplyTo};
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;

/// One frame or HTTP response, or one event with its frames. It exists once per shard, however many
/// connections it is queued for. Its reference count is not atomic; the event's own atomic count is
/// touched once per shard.
pub struct Outgoing {
    content: Content,
    reply_to: Option<ReplyTo>,
    class: DeliveryClass,
    /// Recipients whose delivery is not done yet.
    outstanding: Cell<u32>,
    /// Those of them for which it is held.
    holders: Cell<u32>,
}

enum Content {
    Event(Arc<Event>),
    Own(Box<[u8]>),
}

impl Outgoing {
    /// An event from the hand-off, for `recipients` connections.
    pub fn event(
        event: Arc<Event>,
        reply_to: Option<ReplyTo>,
        class: DeliveryClass,
        recipients: u32,
    ) -> Rc<Self> {
        let (outstanding, holders) = (Cell::new(recipients), Cell::new(0));
        Rc::new(Self { content: Content::Event(event), reply_to, class, outstanding, holders })
    }

    /// Bytes made by the shard itself: a control frame, an HTTP response, an echo.
    pub fn own(bytes: Box<[u8]>) -> Rc<Self> {
        let (outstanding, holders) = (Cell::new(0), Cell::new(0));
        let (content, class) = (Content::Own(bytes), DeliveryClass::Live);
        Rc::new(Self { content, reply_to: None, class, outstanding, holders })
    }

    /// The bytes for a connection of this encoding. Each call returns the same bytes at the same
    /// address for as long as `self` lives. `None`: the event cannot be expressed in this encoding.
    pub fn bytes(&self, encoding: Encoding) -> Option<&[u8]> {
        match &self.content {
            Content::Event(event) => event.frame(encoding),
            Content::Own(bytes) => Some(bytes),
        }
    }

    /// The event, if this is one.
    pub fn as_event(&self) -> Option<&Event> {
        match &self.content {
            Content::Event(event) => Some(event),
            Content::Own(_) => None,
        }
    }

    /// Counts one recipient as done. Returns whether it was the last.
    pub fn one_done(&self) -> bool {
        let left =
            self.outstanding.get().checked_sub(1).expect("more recipients done than there are");
        self.outstanding.set(left);
        left == 0
    }

    /// One more recipient holds it. Returns whether it is the first.
    pub fn begin_hold(&self) -> bool {
        self.holders.replace(self.holders.get() + 1) == 0
    }

    /// A recipient does not hold it any more. Returns whether it was the last.
    pub fn end_hold(&self) -> bool {
        let left = self.holders.get().checked_sub(1).expect("more holds ended than began");
        self.holders.set(left);
        left == 0
    }

    /// The class of the event.
    pub fn class(&self) -> DeliveryClass {
        self.class
    }

    /// The peer that awaits the report, if any.
    pub fn reply_to(&self) -> Option<ReplyTo> {
        self.reply_to
    }
}

impl fmt::Debug for Outgoing {
    /// Omits the bytes: they are user data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("reply_to", &self.reply_to)
            .field("outstanding", &self.outstanding.get())
            .finish_non_exhaustive()
    }
}
