//! Queue of one stream: order, limits, and the transition from catch-up to live events.
//!
//! ```text
//!            live event                         caught-up message
//!                │ its conversation is               │
//!                │ catching up, or the               │
//!      ┌─────────┤ session is opening                │
//!      ▼         ▼                                   ▼
//!    held ──► queue ──────────────────────────────► queue ──► HTTP/2
//!      go live; without the duplicates of catch-up
//! ```
//!
//! A live event is held if and only if the session is opening or the conversation of the event is
//! catching up. So events of one conversation keep their order, independently of the others.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::Status;

use super::delivery::{Delivery, Held};
use crate::domain::caught_up::CaughtUp;
use crate::domain::command::DeliveryClass;
use crate::domain::ids::ConversationKey;

/// A stream that gets cursors gets one when its queue becomes empty after this many events, as for WebSocket.
const BURST_EVENTS: usize = 64;

/// A window counts as closed if the writer has had bytes for so long, also if it is the socket that is full. The writer
/// passes what both have room for at once.
const WINDOW_CLOSED_MIN: Duration = Duration::from_millis(1);

/// Limits of one stream.
#[derive(Clone, Debug)]
pub struct OutboxLimits {
    /// Queued live events (contract §3: 128).
    pub live_messages_max: usize,
    /// Bytes of queued live events. An event that is the only one queued may exceed it.
    pub live_bytes_max: usize,
    /// Held live events.
    pub hold_messages_max: usize,
    /// Bytes of held live events. An event that is the only one held may exceed it.
    pub hold_bytes_max: usize,
    /// Queued caught-up messages. Catch-up sends at the pace of the client, so it reaches this limit
    /// only if that pacing fails.
    pub catch_up_messages_max: usize,
    /// Bytes of queued caught-up messages. A message that is the only one queued may exceed it.
    pub catch_up_bytes_max: usize,
    /// Conversations that a client may name in one session.
    pub conversations_max: usize,
}

impl Default for OutboxLimits {
    /// 128 live events or 1 MiB; 1,024 held events or 1 MiB; 1,024 caught-up messages or 8 MiB; 4,096
    /// conversations.
    fn default() -> Self {
        Self {
            live_messages_max: 128,
            live_bytes_max: 1 << 20,
            hold_messages_max: 1024,
            hold_bytes_max: 1 << 20,
            catch_up_messages_max: 1024,
            catch_up_bytes_max: 8 << 20,
            conversations_max: 4096,
        }
    }
}

impl OutboxLimits {
    /// Memory of one stream at these limits without the events, bytes. Queues and tables grow by
    /// doubling.
    pub fn memory_max(&self) -> usize {
        let entries =
            self.live_messages_max + 2 * self.hold_messages_max + self.catch_up_messages_max;
        let queues = entries * size_of::<(QueuedKind, Arc<Delivery>)>();
        let conversations =
            self.conversations_max * size_of::<(ConversationKey, NamedConversation)>();
        size_of::<OutboxState>() + 2 * (queues + conversations)
    }
}

/// Result of [`Outbox::deliver`].
#[must_use = "an ignored overflow is a lost message"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliverOutcome {
    /// Queued to be sent.
    Queued,
    /// The same, and three quarters of the limits are in use: no further live event may come until half of them are
    /// free ([`Outbox::awaits_writer`]).
    QueuedLong,
    /// Held until catch-up completes.
    Held,
    /// Dropped: catch-up has delivered exactly this message.
    Duplicate,
    /// Too many events are queued: the stream must be closed.
    Overflow,
    /// Too many events are held or caught up: the stream must be closed.
    CatchUpOverflow,
    /// The stream has ended.
    Ended,
}

/// What the hub is told when the writer has taken an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Drained {
    /// The hub was waiting for this ([`Outbox::awaits_writer`]).
    pub(super) ends_wait: bool,
    /// The queue is empty after many events, so that the session wants a cursor.
    pub(super) burst: bool,
}

/// What a client's position in a conversation means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PositionReport {
    /// First position in this conversation: catch up from there.
    CatchUp,
    /// Later position. It drops nothing: the message service may commit a lower sequence later, and
    /// the client does not know of it.
    Acknowledged,
    /// First position, but the session already has [`OutboxLimits::conversations_max`] conversations.
    TooMany,
}

/// What happens to queued events when a stream is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsent {
    /// They are sent before the status.
    Send,
    /// They are dropped.
    Discard,
}

#[derive(Debug)]
enum NamedConversation {
    CatchingUp,
    Live {
        /// Forgotten at `forget_at`: until then a message may come live that was sent before.
        delivered: Box<CaughtUp>,
        forget_at: Instant,
    },
}

/// Messages and bytes in use, with their limits.
#[derive(Debug)]
struct Usage {
    messages: usize,
    bytes: usize,
    messages_max: usize,
    bytes_max: usize,
}

impl Usage {
    fn new(messages_max: usize, bytes_max: usize) -> Self {
        Self { messages: 0, bytes: 0, messages_max, bytes_max }
    }

    /// Returns whether the message fits. One message always fits in bytes.
    fn try_add(&mut self, bytes: usize) -> bool {
        let fits = self.messages < self.messages_max
            && (self.messages == 0 || self.bytes + bytes <= self.bytes_max);
        if fits {
            self.messages += 1;
            self.bytes += bytes;
        }
        fits
    }

    /// The same, but a message also fits if it is the one that makes it nearly full.
    fn try_add_before_full(&mut self, bytes: usize) -> bool {
        let first_beyond = self.messages < self.messages_max && !self.is_nearly_full();
        if first_beyond {
            self.messages += 1;
            self.bytes += bytes;
        }
        first_beyond || self.try_add(bytes)
    }

    fn sub(&mut self, bytes: usize) {
        self.messages -= 1;
        self.bytes -= bytes;
    }

    fn clear(&mut self) {
        (self.messages, self.bytes) = (0, 0);
    }

    fn is_half_full(&self) -> bool {
        self.messages > self.messages_max / 2 || self.bytes > self.bytes_max / 2
    }

    fn is_nearly_full(&self) -> bool {
        self.messages >= self.messages_max * 3 / 4 || self.bytes >= self.bytes_max / 4 * 3
    }
}

/// Which limit a queued event counts against.
#[derive(Clone, Copy, Debug)]
enum QueuedKind {
    Live,
    CatchUp,
    /// Was held. Counts against no limit: all held events are released at once, so their number is
    /// limited already.
    Released,
    /// A cursor. The hub bounds their number.
    Cursor,
}

#[derive(Debug)]
struct OutboxState {
    queue: VecDeque<(QueuedKind, Arc<Delivery>)>,
    held: VecDeque<Held>,
    /// Live events in `queue`.
    live: Usage,
    /// Events in `held`.
    holding: Usage,
    /// Caught-up messages in `queue`.
    catch_up: Usage,
    conversations: HashMap<ConversationKey, NamedConversation>,
    conversations_max: usize,
    opening: bool,
    /// The client has asked for cursors.
    wants_cursors: bool,
    /// What was missed since a cursor is being sent.
    resuming: bool,
    /// What was sent since a cursor; forgotten at that time.
    since_cursor: Option<(Box<CaughtUp>, Instant)>,
    /// Events that the writer took since the last cursor.
    taken: usize,
    /// When to forget what the earliest catch-up delivered; `None`: nothing is remembered.
    forget_next: Option<Instant>,
    /// Number of conversations that are catching up.
    catching_up: usize,
    /// When one of them last completed, or the first one started.
    catch_up_since: Option<Instant>,
    /// When the client's window last let something out although more was waiting, or an event began to wait.
    unread_since: Option<Instant>,
    /// Since when the writer has bytes that the client's window has not let out. Those that it lets out in between do not
    /// count, so that no client keeps the room of the hub by opening its window a little at a time.
    writing_since: Option<Instant>,
    status: Option<Status>,
    /// The hub waits until half of the limits are free.
    awaited: bool,
    /// That has happened.
    ends_wait: bool,
    waker: Option<Waker>,
}

/// Queue of one stream, shared between the hub, the writer of the stream and its reader.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<OutboxState>,
    /// Notified when the session has ended, whatever its client has read.
    over: Notify,
}

impl Outbox {
    /// An empty queue that holds live events until [`Outbox::opening_done`].
    pub(crate) fn new(limits: &OutboxLimits) -> Self {
        let state = OutboxState {
            queue: VecDeque::new(),
            held: VecDeque::new(),
            live: Usage::new(limits.live_messages_max, limits.live_bytes_max),
            holding: Usage::new(limits.hold_messages_max, limits.hold_bytes_max),
            catch_up: Usage::new(limits.catch_up_messages_max, limits.catch_up_bytes_max),
            conversations: HashMap::new(),
            conversations_max: limits.conversations_max,
            opening: true,
            wants_cursors: false,
            resuming: false,
            since_cursor: None,
            taken: 0,
            forget_next: None,
            catching_up: 0,
            catch_up_since: None,
            unread_since: None,
            writing_since: None,
            status: None,
            awaited: false,
            ends_wait: false,
            waker: None,
        };
        Self { state: Mutex::new(state), over: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, OutboxState> {
        self.state.lock().expect("no holder panics")
    }

    /// The client has named a conversation.
    pub(crate) fn report_position(
        &self,
        conversation: ConversationKey,
        now: Instant,
    ) -> PositionReport {
        let mut state = self.state();
        if state.conversations.contains_key(&conversation) {
            return PositionReport::Acknowledged;
        }
        if state.conversations.len() >= state.conversations_max {
            return PositionReport::TooMany;
        }
        state.conversations.insert(conversation, NamedConversation::CatchingUp);
        state.catching_up += 1;
        state.catch_up_since.get_or_insert(now);
        PositionReport::CatchUp
    }

    /// The client has a cursor, or wants one: all live events are held until what it missed was sent.
    pub(super) fn resume_since_cursor(&self, now: Instant) {
        let mut state = self.state();
        state.wants_cursors = true;
        state.resuming = true;
        state.catch_up_since.get_or_insert(now);
    }

    /// Queues a cursor, unless events of the session are held or are being caught up: these would come after it.
    /// Returns whether it was queued.
    pub(super) fn push_cursor(&self, cursor: &Arc<Delivery>, now: Instant) -> bool {
        let mut state = self.state();
        let is_behind = state.opening || state.resuming || state.catching_up > 0;
        // A queue that is half full gets its cursor when it has drained.
        let is_slow = state.queue.len() > state.live.messages_max / 2;
        if is_behind || is_slow || !state.held.is_empty() || state.status.is_some() {
            return false;
        }
        state.taken = 0;
        state.enqueue(QueuedKind::Cursor, Arc::clone(cursor), now);
        state.wake();
        true
    }

    /// Whether the writer has not yet taken enough since [`DeliverOutcome::QueuedLong`].
    pub(super) fn awaits_writer(&self) -> bool {
        self.state().awaited
    }

    /// What follows from the last event that the writer took. Each is told once.
    pub(super) fn drained(&self) -> Drained {
        let mut state = self.state();
        let burst = state.wants_cursors && state.queue.is_empty() && state.taken >= BURST_EVENTS;
        if burst {
            state.taken = 0;
        }
        Drained { ends_wait: std::mem::take(&mut state.ends_wait), burst }
    }

    /// Queues or holds an event, or returns why not.
    pub(super) fn deliver(
        &self,
        class: DeliveryClass,
        delivery: &Arc<Delivery>,
        now: Instant,
    ) -> DeliverOutcome {
        let mut state = self.state();
        if state.status.is_some() {
            return DeliverOutcome::Ended;
        }
        let bytes = delivery.bytes().len();
        let kind = match class {
            DeliveryClass::CatchUp if state.catch_up.try_add(bytes) => QueuedKind::CatchUp,
            DeliveryClass::CatchUp => return DeliverOutcome::CatchUpOverflow,
            DeliveryClass::Live if state.is_duplicate(delivery) => {
                return DeliverOutcome::Duplicate;
            }
            DeliveryClass::Live if state.must_hold(delivery) => {
                return state.hold(delivery, bytes, now);
            }
            // The hub waits for a queue that is nearly full. An event that is longer than what is left then is no
            // overflow.
            DeliveryClass::Live if state.live.try_add_before_full(bytes) => QueuedKind::Live,
            DeliveryClass::Live => return DeliverOutcome::Overflow,
        };
        state.enqueue(kind, Arc::clone(delivery), now);
        state.wake();
        if class == DeliveryClass::Live && !state.awaited && state.live.is_nearly_full() {
            state.awaited = true;
            return DeliverOutcome::QueuedLong;
        }
        DeliverOutcome::Queued
    }

    /// Catch-up of the conversation is complete. What it delivered is remembered until `forget_at`.
    pub(super) fn go_live(&self, delivered: Box<CaughtUp>, now: Instant, forget_at: Instant) {
        let mut state = self.state();
        if delivered.conversation.is_none() {
            state.resuming = false;
            if !delivered.is_empty() {
                state.since_cursor = Some((delivered, forget_at));
                state.forget_next.get_or_insert(forget_at);
            }
            state.catch_up_since = (state.catching_up > 0).then_some(now);
            return state.release_held(now);
        }
        let named = delivered.conversation.and_then(|named| state.conversations.get_mut(&named));
        if let Some(named @ NamedConversation::CatchingUp) = named {
            let remembers = !delivered.is_empty();
            *named = NamedConversation::Live { delivered, forget_at };
            state.catching_up -= 1;
            if remembers {
                state.forget_next.get_or_insert(forget_at);
            }
        }
        let is_behind = state.catching_up > 0 || state.resuming;
        state.catch_up_since = is_behind.then_some(now);
        state.release_held(now);
    }

    /// The opening is over: live events are no longer held for it.
    pub(crate) fn opening_done(&self, now: Instant) {
        let mut state = self.state();
        if std::mem::replace(&mut state.opening, false) {
            state.release_held(now);
        }
    }

    /// Closes the stream with a status; the first status counts. Drops held events, because their
    /// catch-up is incomplete. Returns the number of events dropped.
    pub(super) fn close(&self, status: Status, unsent: Unsent) -> usize {
        let mut state = self.state();
        let (mut held, mut queued) = (VecDeque::new(), VecDeque::new());
        if state.status.is_none() {
            held = std::mem::take(&mut state.held);
            state.holding.clear();
            state.catch_up_since = None;
            state.status = Some(status);
            state.awaited = false;
        }
        if unsent == Unsent::Discard {
            queued = std::mem::take(&mut state.queue);
            state.live.clear();
            state.catch_up.clear();
            state.unread_since = None;
        }
        state.wake();
        // Dropping the deliveries reports their tickets; that must happen outside the lock.
        drop(state);
        held.len() + queued.len()
    }

    /// The next event to send; after the last one, the status of the stream.
    pub(crate) fn poll_next(
        &self,
        context: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<Arc<Delivery>, Status>> {
        let mut state = self.state();
        if let Some((kind, delivery)) = state.queue.pop_front() {
            let bytes = delivery.bytes().len();
            match kind {
                QueuedKind::Live => {
                    state.live.sub(bytes);
                    if state.awaited && !state.live.is_half_full() {
                        (state.awaited, state.ends_wait) = (false, true);
                    }
                }
                QueuedKind::CatchUp => state.catch_up.sub(bytes),
                QueuedKind::Released | QueuedKind::Cursor => {}
            }
            state.taken += 1;
            state.unread_since = (!state.queue.is_empty()).then_some(now);
            return Poll::Ready(Ok(delivery));
        }
        if let Some(status) = &state.status {
            return Poll::Ready(Err(status.clone()));
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            waker => *waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// Forgets what catch-up delivered long ago.
    pub(super) fn forget_delivered(&self, now: Instant) {
        let mut state = self.state();
        if state.forget_next.is_none_or(|at| at > now) {
            return;
        }
        state.forget_next = None;
        let OutboxState { conversations, forget_next, since_cursor, .. } = &mut *state;
        match since_cursor {
            Some((_, at)) if *at <= now => *since_cursor = None,
            Some((_, at)) => *forget_next = Some(*at),
            None => {}
        }
        for named in conversations.values_mut() {
            let NamedConversation::Live { delivered, forget_at } = named else { continue };
            if *forget_at <= now {
                **delivered = CaughtUp::default();
            } else if !delivered.is_empty() {
                *forget_next = Some(forget_next.map_or(*forget_at, |next| next.min(*forget_at)));
            }
        }
    }

    /// The client's window has let out what the writer had, except for `left` bytes.
    pub(crate) fn let_out(&self, left: usize, now: Instant) {
        let mut state = self.state();
        state.unread_since = (left > 0 || !state.queue.is_empty()).then_some(now);
        state.writing_since = (left > 0).then(|| state.writing_since.unwrap_or(now));
    }

    /// The session has ended: what its stream still has is not sent.
    pub(super) fn end(&self) {
        self.over.notify_one();
    }

    /// Waits for the end of the session.
    pub(crate) async fn ended(&self) {
        self.over.notified().await;
    }

    /// Since when something waits and the client's window lets nothing out; `None` if nothing waits.
    pub(crate) fn unread_since(&self) -> Option<Instant> {
        self.state().unread_since
    }

    /// What the held events would cost if no other stream held them, bytes.
    pub(super) fn held_cost(&self) -> u64 {
        let state = self.state();
        state.held.iter().map(|held| held.delivery().event().cost()).sum()
    }

    /// Number of live events that wait for the client's window, and the bytes that they cost; `None` if it is open.
    pub(super) fn waiting_for_window(&self, now: Instant) -> Option<(u64, u64)> {
        let state = self.state();
        state.writing_since.filter(|since| *since + WINDOW_CLOSED_MIN <= now)?;
        let live = |kind: &QueuedKind| matches!(kind, QueuedKind::Live | QueuedKind::Released);
        let live = state.queue.iter().filter(|(kind, _)| live(kind));
        Some(live.fold((0, 0), |(events, cost), (_, it)| (events + 1, cost + it.event().cost())))
    }

    /// Since when conversations are catching up and none completes; `None` if there are none.
    pub(super) fn catch_up_since(&self) -> Option<Instant> {
        self.state().catch_up_since
    }
}

impl OutboxState {
    fn hold(&mut self, delivery: &Arc<Delivery>, bytes: usize, now: Instant) -> DeliverOutcome {
        if !self.holding.try_add(bytes) {
            return DeliverOutcome::CatchUpOverflow;
        }
        self.held.push_back(Held::new(Arc::clone(delivery)));
        // Holding events during the opening is optional, so it ends before it can overflow.
        if self.holding.is_half_full() && std::mem::replace(&mut self.opening, false) {
            self.release_held(now);
        }
        DeliverOutcome::Held
    }

    fn enqueue(&mut self, kind: QueuedKind, delivery: Arc<Delivery>, now: Instant) {
        self.queue.push_back((kind, delivery));
        self.unread_since.get_or_insert(now);
    }

    /// Whether catch-up has delivered this live event. False during catch-up, when this is not known.
    fn is_duplicate(&self, delivery: &Delivery) -> bool {
        let event = delivery.event();
        if self.since_cursor.as_ref().is_some_and(|(delivered, _)| delivered.has(event)) {
            return true;
        }
        let Some(position) = event.position else { return false };
        match self.conversations.get(&position.conversation) {
            Some(NamedConversation::Live { delivered, .. }) => delivered.contains(position),
            Some(NamedConversation::CatchingUp) | None => false,
        }
    }

    fn must_hold(&self, delivery: &Delivery) -> bool {
        let catching_up =
            |key| matches!(self.conversations.get(key), Some(NamedConversation::CatchingUp));
        self.opening
            || self.resuming
            || delivery.event().conversation.as_ref().is_some_and(catching_up)
    }

    /// Moves the events that need not be held to the queue, without duplicates.
    fn release_held(&mut self, now: Instant) {
        for held in std::mem::take(&mut self.held) {
            let delivery = held.delivery();
            if self.must_hold(delivery) {
                self.held.push_back(held);
                continue;
            }
            self.holding.sub(delivery.bytes().len());
            if !self.is_duplicate(delivery) {
                self.enqueue(QueuedKind::Released, Arc::clone(delivery), now);
            }
        }
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests;
