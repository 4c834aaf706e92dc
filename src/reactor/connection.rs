//! One connection: its lifecycle, its send queue, its requests in flight.
//!
//! ```text
//!   Accepting ─► Securing ─► TLS only
//!       │           │
//!       └───────► Handshake ─► Deciding ─► Holding ─► Filtering ─► Live      admitted sessions
//!                   │   │        │           │  │        │          │
//!                   │   └► Echo  │           │  └────────┼──────────┤      (/echo)
//!                   │       │    │           │           │          │
//!                   ▼       ▼    ▼           ▼           ▼          ▼
//!                 Closing: the last frames (an HTTP response, a close frame) are sent
//!                   │                 ▲ waits for the peer's close frame if ours was first
//!                   ▼
//!                 Lingering: our FIN is sent, the peer's is awaited
//!                   │
//!                   ▼                 (any of these can come here directly: resets, deadlines)
//!                 Terminating: no new requests, those in flight complete
//!                   ▼
//!                 Freeing: the kernel closes the socket ─► the slot is free
//! ```

use crate::domain::caught_up::CaughtUp;
use crate::domain::close::EndReason;
use crate::domain::encoding::Encoding;
use crate::domain::event::Event;
use crate::domain::limiter::AddressPermit;
use crate::protocol::phase::Phase;
use crate::protocol::receiver::Receiver;
use crate::protocol::tls;
use crate::protocol::upgrade::HeadProgress;
use crate::reactor::queue::SendQueue;
use crate::reactor::rate::InboundRate;
use crate::reactor::slab::Slab;
use crate::reactor::wheel::{ShortTick, Tick, TimerLink, TimerSlots};
use crate::uring::HowToClose;

/// The content of a slot. An idle session owns no other memory.
#[derive(Debug)]
pub struct Connection {
    /// The lifecycle, with the state that only it needs.
    pub lifecycle: Lifecycle,
    /// State of the closing handshake.
    pub phase: Phase,
    /// Requests to the kernel that have not completed.
    pub in_flight: RequestSet,
    /// Boolean properties.
    pub flags: Flags,
    /// The receiving half.
    pub receiver: Receiver,
    /// Frames to be sent.
    pub queue: SendQueue,
    /// Link in the timer wheel.
    pub timer: TimerLink,
    /// When bytes were last received.
    pub last_received: ShortTick,
    /// Deadline of the lifecycle. In an open lifecycle: deadline of the stalled send, if
    /// [`Flags::STALLED`].
    pub deadline: ShortTick,
    /// What the client has sent in this second.
    pub inbound: InboundRate,
    /// Returned to the limiter at the end; `None`: the connection was not admitted.
    pub address: Option<AddressPermit>,
}

impl Connection {
    /// A connection whose accept is in flight.
    pub fn accepting() -> Self {
        Self {
            lifecycle: Lifecycle::Accepting,
            phase: Phase::Upgrading,
            in_flight: RequestSet::default(),
            flags: Flags::default(),
            receiver: Receiver::default(),
            queue: SendQueue::new(Encoding::Binary),
            timer: TimerLink::default(),
            last_received: ShortTick::default(),
            deadline: ShortTick::default(),
            inbound: InboundRate::default(),
            address: None,
        }
    }

    /// Whether its socket has not taken all of the last send, and no whole one since.
    pub fn has_full_socket(&self) -> bool {
        self.flags.has(Flags::STALLED)
    }
}

/// The lifecycle of a connection: see the diagram of the [module](self).
#[derive(Debug)]
pub enum Lifecycle {
    /// An accept is in flight: no client yet.
    Accepting,
    /// The TLS handshake is incomplete.
    Securing(Box<Securing>),
    /// The upgrade request is incomplete.
    Handshake(Box<Handshake>),
    /// The session manager decides on the request.
    Deciding(Box<Deciding>),
    /// Admitted; live events are held until catch-up is complete.
    Holding(Box<Holding>),
    /// Live, but duplicates of caught-up messages may still come.
    Filtering(Box<Filter>),
    /// Live.
    Live,
    /// On `/echo`. The window of its compression, bits; `None`: no compression.
    Echo(Option<u8>),
    /// The last frames are in the queue.
    Closing(EndReason),
    /// The last frames and our FIN are sent.
    Lingering(EndReason),
    /// Waits for the requests in flight. No new ones start.
    Terminating(HowToClose),
    /// The kernel closes the socket.
    Freeing,
}

/// The class of a lifecycle, as the gauges count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifecycleClass {
    /// Before the 101.
    Handshake,
    /// An admitted session; it may receive deliveries.
    Session,
    /// `/echo`.
    Echo,
    /// Before the accept, or after the close began.
    Other,
}

impl Lifecycle {
    /// The class of this lifecycle.
    pub fn class(&self) -> LifecycleClass {
        match self {
            Self::Securing(_) | Self::Handshake(_) | Self::Deciding(_) => LifecycleClass::Handshake,
            Self::Holding(_) | Self::Filtering(_) | Self::Live => LifecycleClass::Session,
            Self::Echo(_) => LifecycleClass::Echo,
            Self::Accepting
            | Self::Closing(_)
            | Self::Lingering(_)
            | Self::Terminating(_)
            | Self::Freeing => LifecycleClass::Other,
        }
    }

    /// Whether frames may be queued: after the 101, before the close.
    pub fn is_open(&self) -> bool {
        matches!(self.class(), LifecycleClass::Session | LifecycleClass::Echo)
    }

    /// Whether its close has begun, and no frame but the last may be queued.
    pub fn closes(&self) -> bool {
        matches!(self, Self::Closing(_) | Self::Lingering(_))
    }

    /// Whether no new request may start.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Terminating(_) | Self::Freeing)
    }
}

/// State while the TLS handshake is incomplete.
#[derive(Debug)]
pub struct Securing {
    /// The client's address.
    pub peer: std::net::IpAddr,
    /// The handshake. `None`: it has not begun, or is [under way](Self::is_under_way).
    pub handshake: Option<Box<dyn tls::TlsHandshake>>,
    /// What the client has sent of it and is not handled yet.
    pub input: Vec<u8>,
    /// Handshake and input are at the thread that makes handshakes, or wait for that. Nothing is received meanwhile.
    pub is_under_way: bool,
    /// How often they were there.
    pub visits: u8,
}

/// State while the upgrade request is incomplete.
#[derive(Debug)]
pub struct Handshake {
    /// The client's address.
    pub peer: std::net::IpAddr,
    /// The request so far, unless it arrived in one piece.
    pub input: Vec<u8>,
    /// What is checked of it.
    pub progress: HeadProgress,
}

impl Securing {
    /// Nothing has come.
    pub fn new(peer: std::net::IpAddr) -> Self {
        Self { peer, handshake: None, input: Vec::new(), is_under_way: false, visits: 0 }
    }
}

impl Handshake {
    /// Nothing has come.
    pub fn new(peer: std::net::IpAddr) -> Self {
        Self { peer, input: Vec::new(), progress: HeadProgress::default() }
    }
}

/// State while the session manager decides.
#[derive(Debug)]
pub struct Deciding {
    /// The encoded 101.
    pub response: Box<[u8]>,
    /// Client messages may be compressed.
    pub deflate: bool,
    /// Live events. A session gets deliveries as soon as the service side knows it.
    pub held: SendQueue,
    /// Bytes that the client sent directly behind its request.
    pub rest: Vec<u8>,
}

impl Lifecycle {
    /// The live events that this lifecycle holds back.
    pub fn holding(&self) -> Option<&SendQueue> {
        match self {
            Self::Deciding(deciding) => Some(&deciding.held),
            Self::Holding(holding) => Some(&holding.queue),
            _ => None,
        }
    }

    /// The same, and what catch-up has delivered.
    pub fn held(&mut self) -> Option<(&mut SendQueue, Option<&Filter>)> {
        match self {
            Self::Deciding(deciding) => Some((&mut deciding.held, None)),
            Self::Holding(holding) => {
                Some((&mut holding.queue, holding.delivered_by_catch_up.as_ref()))
            }
            Self::Accepting
            | Self::Securing(_)
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

/// State while a session catches up, and while the held events drain at the socket's pace.
#[derive(Debug)]
pub struct Holding {
    /// The held live events.
    pub queue: SendQueue,
    /// When the first message, or `GoLive`, is overdue.
    pub deadline: Tick,
    /// Set by `GoLive`: what catch-up has delivered.
    pub delivered_by_catch_up: Option<Filter>,
}

/// Drops live events that catch-up has delivered already.
#[derive(Debug)]
pub struct Filter {
    delivered: Box<CaughtUp>,
    /// When the filter expires. Until then a message may come live that was sent before the session
    /// went live: Kafka lags, or the producer repeats a record.
    pub until: Tick,
}

impl Filter {
    /// A filter that expires at `until`.
    pub fn new(delivered: Box<CaughtUp>, until: Tick) -> Self {
        Self { delivered, until }
    }

    /// Whether catch-up has delivered this live event.
    pub fn covers(&self, event: &Event) -> bool {
        self.delivered.has(event)
    }

    /// Whether the filter drops nothing.
    pub fn is_empty(&self) -> bool {
        self.delivered.is_empty()
    }
}

/// A set of request kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestSet(u8);

impl RequestSet {
    /// An accept.
    pub const ACCEPT: Self = Self(1);
    /// The poll for data.
    pub const POLL_READABLE: Self = Self(1 << 1);
    /// A receive.
    pub const RECEIVE: Self = Self(1 << 2);
    /// A send.
    pub const SEND: Self = Self(1 << 3);
    /// The poll for room in the send buffer.
    pub const POLL_WRITABLE: Self = Self(1 << 4);
    /// The shutdown of our half.
    pub const SHUTDOWN: Self = Self(1 << 5);
    /// The cancel of the polls.
    pub const CANCEL: Self = Self(1 << 6);
    /// The close.
    pub const CLOSE: Self = Self(1 << 7);

    /// Whether the set is empty.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    #[cfg(any(test, feature = "simulation"))]
    /// Whether this is a subset of `other`.
    pub fn is_within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether the set has any of these.
    pub fn any(self, of: Self) -> bool {
        self.0 & of.0 != 0
    }

    /// The union of both sets.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Adds a request that starts.
    ///
    /// # Panics
    /// If one of its kind is in flight already.
    pub fn begin(&mut self, one: Self) {
        assert!(!self.any(one), "two requests of one kind: {one:?}");
        self.0 |= one.0;
    }

    /// Removes a request that has completed.
    ///
    /// # Panics
    /// If none of its kind was in flight.
    pub fn complete(&mut self, one: Self) {
        assert!(self.any(one), "a completion without a request: {one:?}");
        self.0 &= !one.0;
    }
}

/// A set of boolean properties of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// It is in the list of connections with something to send.
    pub const DIRTY: Self = Self(1);
    /// There is something to receive, and no receive has been requested for it.
    pub const READABLE: Self = Self(1 << 1);
    /// It is in the list of connections that wait to receive.
    pub const WAITING: Self = Self(1 << 2);
    /// It has been pinged since bytes were last received.
    pub const PINGED: Self = Self(1 << 3);
    /// It was reported opened, so its end must be reported.
    pub const OPENED: Self = Self(1 << 4);
    /// It has sent its first message.
    pub const FIRST_MESSAGE: Self = Self(1 << 5);
    /// The socket took less than given; the send deadline runs.
    pub const STALLED: Self = Self(1 << 6);
    /// Its queue has overflowed. When the send in flight completes, all frames except a partly sent
    /// one are dropped.
    pub const CUT: Self = Self(1 << 7);
    /// Its messages may be compressed.
    pub const DEFLATE: Self = Self(1 << 8);
    /// The client has shut down its half of the stream.
    pub const FIN_RECEIVED: Self = Self(1 << 9);
    /// Its socket has failed; bytes from before the failure can still be received.
    pub const BROKEN: Self = Self(1 << 10);
    /// Its client has asked for cursors.
    pub const CURSORS: Self = Self(1 << 11);
    /// It is in the list of sessions that want a cursor.
    pub const CURSOR_WANTED: Self = Self(1 << 12);

    /// The rings wait for its queue.
    pub const AWAITED: Self = Self(1 << 13);

    /// Whether this is set.
    pub fn has(self, one: Self) -> bool {
        self.0 & one.0 == one.0
    }

    /// Sets it. Returns the previous value.
    pub fn set(&mut self, one: Self) -> bool {
        let before = self.has(one);
        self.0 |= one.0;
        before
    }

    /// Clears it. Returns the previous value.
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

const _: () = assert!(Slab::<Connection>::SLOT_BYTES <= 96, "memory of an idle session");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "two requests of one kind")]
    fn second_request_of_a_kind_is_refused() {
        let mut flight = RequestSet::default();
        flight.begin(RequestSet::SEND);
        flight.begin(RequestSet::SEND);
    }
}
