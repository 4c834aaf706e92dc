//! What waits for one stream: order, bounds, and the seam between catch-up and live events.
//!
//! ```text
//!            live event                         caught-up message
//!                │ its conversation is               │
//!                │ being caught up, or the           │
//!      ┌─────────┤ session is just opening           │
//!      ▼         ▼                                   ▼
//!   held ──► queue ──────────────────────────────► queue ──► HTTP/2
//!      release, less what catch-up delivered
//! ```
//!
//! A live event is held if and only if the session is opening or the event's conversation is being
//! caught up; so within one conversation nothing overtakes, whatever happens in the others.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;
use tonic::Status;

use super::delivery::Delivery;
use crate::domain::command::DeliveryClass;
use crate::domain::ids::{ConversationKey, ConversationPosition};

/// The bounds of one stream.
#[derive(Clone, Debug)]
pub struct OutboxLimits {
    /// Live events that wait to be read (contract §3: 128).
    pub live_messages_max: usize,
    /// Their bytes. One event may exceed it if nothing else waits.
    pub live_bytes_max: usize,
    /// Live events that wait for catch-up.
    pub hold_messages_max: usize,
    /// Their bytes, likewise.
    pub hold_bytes_max: usize,
    /// Caught-up messages that wait. Catch-up is paced by what was sent, so this is reached only
    /// if the pace is not kept.
    pub catch_up_messages_max: usize,
    /// Their bytes.
    pub catch_up_bytes_max: usize,
    /// Conversations that a client may name in one session.
    pub conversations_max: usize,
}

impl Default for OutboxLimits {
    /// 128 live events or 1 MiB, 1,024 held ones or 1 MiB, 1,024 caught-up messages or 8 MiB, 4,096
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
    /// Memory of one stream at these limits beside the events themselves, bytes. Queues and tables
    /// grow by doubling.
    pub fn memory_max(&self) -> usize {
        let entries =
            self.live_messages_max + 2 * self.hold_messages_max + self.catch_up_messages_max;
        let queues = entries * size_of::<(Kind, Arc<Delivery>)>();
        let conversations = self.conversations_max * size_of::<(ConversationKey, Conversation)>();
        size_of::<State>() + 2 * (queues + conversations)
    }
}

/// What became of a delivery.
#[must_use = "an ignored overflow is a lost message"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivered {
    /// It waits to be sent.
    Queued,
    /// It waits for catch-up.
    Held,
    /// The client has it already: catch-up delivered it, or the client acknowledged it.
    Duplicate,
    /// Too much waits to be read already: the stream must end.
    Overflow,
    /// Too much waits because of catch-up: the stream must end.
    CatchUpOverflow,
    /// The stream has ended.
    Ended,
}

/// What a client's mention of a conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mention {
    /// The first: catch it up from there.
    Resume,
    /// A later one: the client has everything up to there, and need not be sent it.
    Acknowledged,
    /// A first one too many.
    TooMany,
}

#[derive(Debug)]
struct Conversation {
    /// The client has everything up to here: it said so, or catch-up delivered it.
    covered: i64,
    resuming: bool,
}

#[derive(Debug, Default)]
struct Load {
    messages: usize,
    bytes: usize,
}

impl Load {
    fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes;
    }

    fn sub(&mut self, bytes: usize) {
        self.messages -= 1;
        self.bytes -= bytes;
    }

    fn takes(&self, bytes: usize, messages_max: usize, bytes_max: usize) -> bool {
        self.messages < messages_max && (self.messages == 0 || self.bytes + bytes <= bytes_max)
    }
}

/// What something in the queue counts as.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Live,
    CatchUp,
    /// Was held. Bounded by what may be held, because it comes all at once.
    Released,
}

#[derive(Debug)]
struct State {
    limits: OutboxLimits,
    queue: VecDeque<(Kind, Arc<Delivery>)>,
    held: VecDeque<Arc<Delivery>>,
    /// Live events in `queue`.
    live: Load,
    /// Live events in `held`.
    holding: Load,
    /// Caught-up messages in `queue`.
    catch_up: Load,
    conversations: HashMap<ConversationKey, Conversation>,
    opening: bool,
    /// Conversations that are being caught up.
    resuming: usize,
    /// Since when none of them was completed.
    resuming_since: Option<Instant>,
    /// Since when something waits and nothing was taken.
    waiting_since: Option<Instant>,
    end: Option<Status>,
    waker: Option<Waker>,
}

/// See the module. Shared between the hub, the writer of the stream and its reader.
#[derive(Debug)]
pub(crate) struct Outbox(Mutex<State>);

impl Outbox {
    /// One whose live events are held until [`Outbox::open_up`].
    pub(super) fn new(limits: OutboxLimits) -> Self {
        Self(Mutex::new(State {
            limits,
            queue: VecDeque::new(),
            held: VecDeque::new(),
            live: Load::default(),
            holding: Load::default(),
            catch_up: Load::default(),
            conversations: HashMap::new(),
            opening: true,
            resuming: 0,
            resuming_since: None,
            waiting_since: None,
            end: None,
            waker: None,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder panics")
    }

    /// The client names a conversation.
    pub(crate) fn mention(&self, stream: ConversationKey, sequence: i64, now: Instant) -> Mention {
        let mut state = self.state();
        if let Some(conversation) = state.conversations.get_mut(&stream) {
            conversation.covered = conversation.covered.max(sequence);
            return Mention::Acknowledged;
        }
        if state.conversations.len() >= state.limits.conversations_max {
            return Mention::TooMany;
        }
        state.conversations.insert(stream, Conversation { covered: sequence, resuming: true });
        state.resuming += 1;
        state.resuming_since.get_or_insert(now);
        Mention::Resume
    }

    /// Takes an event in, or says why not.
    pub(super) fn deliver(
        &self,
        class: DeliveryClass,
        delivery: &Arc<Delivery>,
        now: Instant,
    ) -> Delivered {
        let mut state = self.state();
        if state.end.is_some() {
            return Delivered::Ended;
        }
        let bytes = delivery.bytes().len();
        match class {
            DeliveryClass::CatchUp => state.take_caught_up(delivery, bytes, now),
            DeliveryClass::Live if state.is_duplicate(delivery) => Delivered::Duplicate,
            DeliveryClass::Live if state.holds(delivery) => state.hold(delivery, bytes, now),
            DeliveryClass::Live => state.take_live(delivery, bytes, now),
        }
    }

    /// Catch-up of these conversations is complete up to these positions.
    pub(super) fn release(&self, delivered: &[ConversationPosition], now: Instant) {
        let mut state = self.state();
        for position in delivered {
            if let Some(conversation) = state.conversations.get_mut(&position.conversation) {
                conversation.covered = conversation.covered.max(position.sequence);
                if std::mem::replace(&mut conversation.resuming, false) {
                    state.resuming -= 1;
                }
            }
        }
        state.resuming_since = (state.resuming > 0).then_some(now);
        state.let_go(now);
    }

    /// The client has named what it wants to name first.
    pub(crate) fn open_up(&self, now: Instant) {
        let mut state = self.state();
        if std::mem::replace(&mut state.opening, false) {
            state.let_go(now);
        }
    }

    /// Ends the stream with a status, after what is queued or, if `at_once`, without it. The first
    /// end counts. What is held never follows: its catch-up is not complete. Returns how many
    /// events were given up.
    pub(crate) fn end(&self, status: Status, at_once: bool) -> usize {
        let mut state = self.state();
        let mut dropped = VecDeque::new();
        if state.end.is_none() {
            dropped = std::mem::take(&mut state.held);
            state.holding = Load::default();
            state.resuming_since = None;
            state.end = Some(status);
        }
        if at_once {
            dropped.extend(state.queue.drain(..).map(|(_, delivery)| delivery));
            (state.live, state.catch_up) = (Load::default(), Load::default());
            state.waiting_since = None;
        }
        state.wake();
        drop(state);
        // Their tickets are reported outside the lock.
        dropped.len()
    }

    /// The next event to send, in order; after the last, the status the stream ends with.
    pub(crate) fn poll_next(
        &self,
        context: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<Arc<Delivery>, Status>> {
        let mut state = self.state();
        if let Some((kind, delivery)) = state.queue.pop_front() {
            let bytes = delivery.bytes().len();
            match kind {
                Kind::Live => state.live.sub(bytes),
                Kind::CatchUp => state.catch_up.sub(bytes),
                Kind::Released => {}
            }
            state.waiting_since = (!state.queue.is_empty()).then_some(now);
            return Poll::Ready(Ok(delivery));
        }
        if let Some(status) = &state.end {
            return Poll::Ready(Err(status.clone()));
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            waker => *waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// Since when something waits without anything being taken.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.state().waiting_since
    }

    /// Since when conversations are being caught up without any being completed.
    pub(super) fn resuming_since(&self) -> Option<Instant> {
        self.state().resuming_since
    }
}

impl State {
    fn take_caught_up(
        &mut self,
        delivery: &Arc<Delivery>,
        bytes: usize,
        now: Instant,
    ) -> Delivered {
        let OutboxLimits { catch_up_messages_max, catch_up_bytes_max, .. } = self.limits;
        if !self.catch_up.takes(bytes, catch_up_messages_max, catch_up_bytes_max) {
            return Delivered::CatchUpOverflow;
        }
        self.catch_up.add(bytes);
        self.enqueue(Kind::CatchUp, Arc::clone(delivery), now);
        self.wake();
        Delivered::Queued
    }

    fn take_live(&mut self, delivery: &Arc<Delivery>, bytes: usize, now: Instant) -> Delivered {
        let OutboxLimits { live_messages_max, live_bytes_max, .. } = self.limits;
        if !self.live.takes(bytes, live_messages_max, live_bytes_max) {
            return Delivered::Overflow;
        }
        self.live.add(bytes);
        self.enqueue(Kind::Live, Arc::clone(delivery), now);
        self.wake();
        Delivered::Queued
    }

    fn hold(&mut self, delivery: &Arc<Delivery>, bytes: usize, now: Instant) -> Delivered {
        let OutboxLimits { hold_messages_max, hold_bytes_max, .. } = self.limits;
        if !self.holding.takes(bytes, hold_messages_max, hold_bytes_max) {
            return Delivered::CatchUpOverflow;
        }
        self.holding.add(bytes);
        self.held.push_back(Arc::clone(delivery));
        // The opening wait is a convenience: it ends before what waits for it endangers the session.
        let endangered = self.holding.messages > hold_messages_max / 2
            || self.holding.bytes > hold_bytes_max / 2;
        if endangered && std::mem::replace(&mut self.opening, false) {
            self.let_go(now);
        }
        Delivered::Held
    }

    fn enqueue(&mut self, kind: Kind, delivery: Arc<Delivery>, now: Instant) {
        self.queue.push_back((kind, delivery));
        self.waiting_since.get_or_insert(now);
    }

    /// Whether the client has this live event. While its catch-up runs nobody knows.
    fn is_duplicate(&self, delivery: &Delivery) -> bool {
        let Some(position) = delivery.event().position else { return false };
        self.conversations
            .get(&position.conversation)
            .is_some_and(|known| !known.resuming && position.sequence <= known.covered)
    }

    fn holds(&self, delivery: &Delivery) -> bool {
        let resuming = |stream| self.conversations.get(stream).is_some_and(|known| known.resuming);
        self.opening || delivery.event().conversation.as_ref().is_some_and(resuming)
    }

    /// Moves what need not be held any more to the queue, less what catch-up delivered.
    fn let_go(&mut self, now: Instant) {
        for delivery in std::mem::take(&mut self.held) {
            if self.holds(&delivery) {
                self.held.push_back(delivery);
                continue;
            }
            self.holding.sub(delivery.bytes().len());
            if !self.is_duplicate(&delivery) {
                self.enqueue(Kind::Released, delivery, now);
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
