//! One connection: where it stands, what waits for it, what is in flight on it.
//!
//! ```text
//!  Accepting ─► Handshake ─► Deciding ─► Holding ─► Filtering ─► Live      admitted sessions
//!                  │   │        │           │  │        │          │
//!                  │   └► Echo  │           │  └────────┼──────────┤      (/echo)
//!                  │       │    │           │           │          │
//!                  ▼       ▼    ▼           ▼           ▼          ▼
//!                Ending: last words (an HTTP answer, a close frame) leave the queue
//!                  │                 ▲ waits for the peer's close frame if ours went first
//!                  ▼
//!                Lingering: our end of stream is sent, the peer's awaited
//!                  │
//!                  ▼                 (every lifecycle can come here at once: resets, deadlines)
//!                Terminating: nothing is begun any more, what is in flight is joined
//!                  ▼
//!                Closing ─► the slot is free
//! ```

use std::cmp::Reverse;

use crate::domain::close::EndReason;
use crate::domain::encoding::Encoding;
use crate::domain::ids::ConversationPosition;
use crate::protocol::phase::Phase;
use crate::protocol::receiver::Receiver;
use crate::reactor::limiter::AddressPermit;
use crate::reactor::queue::SendQueue;
use crate::reactor::rate::InboundRate;
use crate::reactor::slab::Slab;
use crate::reactor::wheel::{Tick, TimerLink, TimerSlots};
use crate::uring::HowToClose;

/// What a slot holds. An idle session owns nothing beyond it.
#[derive(Debug)]
pub struct Connection {
    /// Where it stands, with what only that lifecycle needs.
    pub lifecycle: Lifecycle,
    /// The closing handshake.
    pub phase: Phase,
    /// Requests to the kernel that have not completed.
    pub in_flight: RequestSet,
    /// What else is to be remembered.
    pub flags: Flags,
    /// The receiving half.
    pub receiver: Receiver,
    /// What waits to be sent.
    pub queue: SendQueue,
    /// Its place in the wheel.
    pub timer: TimerLink,
    /// When anything was last received.
    pub last_received: Tick,
    /// Deadline of the lifecycle; in an open lifecycle that of the send without progress, if
    /// [`Flags::STALLED`].
    pub deadline: Tick,
    /// What it has sent this second.
    pub inbound: InboundRate,
    /// What is given back to the gate at the end; `None`: it was not let in.
    pub address: Option<AddressPermit>,
}

impl Connection {
    /// A slot for an accept.
    pub fn accepting() -> Self {
        Self {
            lifecycle: Lifecycle::Accepting,
            phase: Phase::Upgrading,
            in_flight: RequestSet::default(),
            flags: Flags::default(),
            receiver: Receiver::default(),
            queue: SendQueue::new(Encoding::Binary),
            timer: TimerLink::default(),
            last_received: 0,
            deadline: 0,
            inbound: InboundRate::default(),
            address: None,
        }
    }
}

/// See the diagram above.
#[derive(Debug)]
pub enum Lifecycle {
    /// The kernel has the slot: no client yet.
    Accepting,
    /// The upgrade request is incomplete.
    Handshake(Box<Handshake>),
    /// The session manager decides on the request.
    Deciding(Box<Deciding>),
    /// Admitted; live events wait until catch-up is complete.
    Holding(Box<Holding>),
    /// Live, but what catch-up delivered may still come again.
    Filtering(Box<Filter>),
    /// Live.
    Live,
    /// On `/echo`; compresses with this window, bits, if at all.
    Echo(Option<u8>),
    /// Last words are in the queue.
    Closing(EndReason),
    /// They are sent, and our end of stream.
    Lingering(EndReason),
    /// What is in flight is joined.
    Terminating(HowToClose),
    /// The kernel closes it.
    Freeing,
}

/// What a lifecycle counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifecycleClass {
    /// Before the 101.
    Handshake,
    /// An admitted session that may be delivered to.
    Session,
    /// `/echo`.
    Echo,
    /// Before the accept, or ending.
    Other,
}

impl Lifecycle {
    /// What it counts as.
    pub fn class(&self) -> LifecycleClass {
        match self {
            Self::Handshake(_) | Self::Deciding(_) => LifecycleClass::Handshake,
            Self::Holding(_) | Self::Filtering(_) | Self::Live => LifecycleClass::Session,
            Self::Echo(_) => LifecycleClass::Echo,
            Self::Accepting
            | Self::Closing(_)
            | Self::Lingering(_)
            | Self::Terminating(_)
            | Self::Freeing => LifecycleClass::Other,
        }
    }

    /// Whether frames may be queued for it: after the 101, before the last words.
    pub fn is_open(&self) -> bool {
        matches!(self.class(), LifecycleClass::Session | LifecycleClass::Echo)
    }

    /// Whether nothing may be begun on it any more.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Terminating(_) | Self::Freeing)
    }
}

/// While the upgrade request is incomplete.
#[derive(Debug)]
pub struct Handshake {
    /// The client's address.
    pub peer: std::net::IpAddr,
    /// What has come of the request, if it did not come whole.
    pub input: Vec<u8>,
}

/// While the session manager decides.
#[derive(Debug)]
pub struct Deciding {
    /// The 101, ready.
    pub response: Box<[u8]>,
    /// Client messages may come compressed.
    pub deflate: bool,
    /// Live events: a session is delivered to as soon as the service side knows it.
    pub held: SendQueue,
    /// What the client sent right behind its request.
    pub rest: Box<[u8]>,
}

impl Lifecycle {
    /// Live events that wait although nothing keeps them from being sent but the lifecycle, and what
    /// catch-up has delivered of them.
    pub fn held(&mut self) -> Option<(&mut SendQueue, Option<&mut Filter>)> {
        match self {
            Self::Deciding(deciding) => Some((&mut deciding.held, None)),
            Self::Holding(holding) => {
                Some((&mut holding.queue, holding.delivered_by_catch_up.as_mut()))
            }
            Self::Accepting
            | Self::Handshake(_)
            | Self::Filtering(_)
            | Self::Live
            | Self::Echo(_)
            | Self::Closing(_)
            | Self::Lingering(_)
            | Self::Terminating(_)
            | Self::Freeing => None,
        }
    }
}

/// While a session catches up, and while what was held then leaves at the socket's pace.
#[derive(Debug)]
pub struct Holding {
    /// Live events.
    pub queue: SendQueue,
    /// When the first message, or the release, is overdue.
    pub deadline: Tick,
    /// Set by the release: what catch-up has delivered.
    pub delivered_by_catch_up: Option<Filter>,
}

/// Live events that catch-up has delivered already.
#[derive(Debug)]
pub struct Filter {
    /// Sorted by conversation.
    positions: Box<[ConversationPosition]>,
    /// Those that have not been surpassed by a live event.
    left: usize,
    /// When the rest is forgotten.
    pub until: Tick,
}

/// Stands for a position that has been surpassed: every event is after it.
const SURPASSED: i64 = i64::MIN;

impl Filter {
    /// Remembers `positions` until `until`; of several in one conversation the last.
    pub fn new(positions: Box<[ConversationPosition]>, until: Tick) -> Self {
        let mut positions = positions.into_vec();
        positions
            .sort_unstable_by_key(|position| (position.conversation, Reverse(position.sequence)));
        positions.dedup_by_key(|position| position.conversation);
        let left = positions.len();
        Self { positions: positions.into_boxed_slice(), left, until }
    }

    /// Whether a live event at `position` has been delivered by catch-up. The first one after what
    /// was delivered ends the memory of its conversation: events of a conversation come in order.
    pub fn covers(&mut self, position: ConversationPosition) -> bool {
        let found =
            self.positions.binary_search_by_key(&position.conversation, |known| known.conversation);
        let Ok(index) = found else { return false };
        let known = &mut self.positions[index].sequence;
        if position.sequence <= *known {
            return true;
        }
        if *known != SURPASSED {
            *known = SURPASSED;
            self.left -= 1;
        }
        false
    }

    /// Whether there is nothing left to remember.
    pub fn is_spent(&self) -> bool {
        self.left == 0
    }
}

/// Kinds of requests, as a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestSet(u8);

impl RequestSet {
    /// An accept.
    pub const ACCEPT: Self = Self(1);
    /// The watch for data.
    pub const POLL_READABLE: Self = Self(1 << 1);
    /// A receive.
    pub const RECEIVE: Self = Self(1 << 2);
    /// A send.
    pub const SEND: Self = Self(1 << 3);
    /// The watch for room.
    pub const POLL_WRITABLE: Self = Self(1 << 4);
    /// The end of our half.
    pub const SHUTDOWN: Self = Self(1 << 5);
    /// The end of the watches.
    pub const CANCEL: Self = Self(1 << 6);
    /// The close.
    pub const CLOSE: Self = Self(1 << 7);

    /// Whether nothing is in flight.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    #[cfg(any(test, feature = "simulation"))]
    /// Whether each of these is in the other set too.
    pub fn is_within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether any of these is.
    pub fn any(self, of: Self) -> bool {
        self.0 & of.0 != 0
    }

    /// Both sets.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// A request of this kind leaves.
    ///
    /// # Panics
    /// If one is in flight already.
    pub fn begin(&mut self, one: Self) {
        assert!(!self.any(one), "two requests of one kind: {one:?}");
        self.0 |= one.0;
    }

    /// It has completed.
    ///
    /// # Panics
    /// If none was in flight.
    pub fn complete(&mut self, one: Self) {
        assert!(self.any(one), "a completion without a request: {one:?}");
        self.0 &= !one.0;
    }
}

/// Facts about a connection, as a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// It is in the list of those with something to send.
    pub const DIRTY: Self = Self(1);
    /// There is something to receive that was not asked for yet.
    pub const READABLE: Self = Self(1 << 1);
    /// It is in the list of those that wait to receive.
    pub const WAITING: Self = Self(1 << 2);
    /// It has been pinged since it was last heard.
    pub const PINGED: Self = Self(1 << 3);
    /// The session manager knows it: its end must be reported.
    pub const OPENED: Self = Self(1 << 4);
    /// It has sent its first message.
    pub const FIRST_MESSAGE: Self = Self(1 << 5);
    /// The socket took less than it was given; the queue's deadline runs.
    pub const STALLED: Self = Self(1 << 6);
    /// Its queue was full; once the send in flight has completed, what was not begun goes.
    pub const CUT: Self = Self(1 << 7);
    /// Its messages may come compressed.
    pub const DEFLATE: Self = Self(1 << 8);
    /// It has ended its half of the stream.
    pub const FIN_RECEIVED: Self = Self(1 << 9);
    /// Its socket has failed; what came before is still to be received.
    pub const BROKEN: Self = Self(1 << 10);
    /// The rings have waited for its queue long enough: nothing waits for it any more until it has
    /// read most of what it holds.
    pub const SLOW: Self = Self(1 << 11);

    /// Whether all of these are set.
    pub fn has(self, one: Self) -> bool {
        self.0 & one.0 == one.0
    }

    /// Sets it. Returns whether it was set before.
    pub fn set(&mut self, one: Self) -> bool {
        let before = self.has(one);
        self.0 |= one.0;
        before
    }

    /// Clears it. Returns whether it was set before.
    pub fn clear(&mut self, one: Self) -> bool {
        let before = self.has(one);
        self.0 &= !one.0;
        before
    }
}

impl TimerSlots for Slab<Connection> {
    fn timer(&mut self, slot: u32) -> &mut TimerLink {
        &mut self.at_mut(slot).timer
    }
}

const _: () = assert!(Slab::<Connection>::SLOT_BYTES <= 96, "what an idle session costs a shard");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::ConversationKey;

    fn at(stream: u64, sequence: i64) -> ConversationPosition {
        ConversationPosition { conversation: ConversationKey(stream), sequence }
    }

    #[test]
    fn filter_covers_up_to_what_was_delivered_until_it_is_surpassed() {
        let mut filter = Filter::new(Box::new([at(7, 5), at(3, 2), at(7, 4)]), 0);
        assert!(filter.covers(at(7, 4)) && filter.covers(at(7, 5)));
        assert!(!filter.covers(at(9, 1)));
        assert!(!filter.covers(at(7, 6)));
        assert!(!filter.covers(at(7, 5)), "a republished event goes through once surpassed");
        assert!(!filter.is_spent());
        assert!(!filter.covers(at(3, 3)));
        assert!(filter.is_spent());
    }

    #[test]
    #[should_panic(expected = "two requests of one kind")]
    fn second_request_of_a_kind_is_refused() {
        let mut flight = RequestSet::default();
        flight.begin(RequestSet::SEND);
        flight.begin(RequestSet::SEND);
    }
}
