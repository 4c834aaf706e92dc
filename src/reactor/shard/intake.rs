//! Takes commands from the rings and queues deliveries.

use std::cmp::Reverse;
use std::rc::Rc;
use std::sync::Arc;

use super::clock::ticks;
use super::tally::Outcome;
use super::{Leftover, SESSION_MANAGER, Shard};
use crate::domain::caught_up::CaughtUp;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{DeliveryClass, Recipients, ReplyTo, ShardCommand, Ticket};
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::{HANDOFF_BATCH_MAX, held_share, queued_share};
use crate::domain::outgoing::Outgoing;
use crate::domain::wait_allowance::WaitAllowance;
use crate::protocol::frame::{self, Opcode};
use crate::protocol::upgrade::Refused;
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::{Connection, Filter, Flags, Lifecycle, LifecycleClass};
use crate::reactor::queue::SendQueue;
use crate::reactor::wheel::Tick;
use crate::uring::{HowToClose, Kernel};

/// How long a socket may take nothing before its client counts as a slow reader, ticks. A burst
/// fills even a fast reader's socket for a moment.
const STALL_TICKS_MAX: Tick = 2;
/// Recipients per turn. When this is reached, the rings wait for the next turn. One event may
/// exceed it.
const DELIVERIES_PER_TURN_MAX: usize = 16 * 1024;
const HOLD_OVERFLOW: Close = Close::new(
    CloseCode::TRY_AGAIN_LATER,
    "too much happened during catch-up: reconnect and resume",
);

impl<K: Kernel> Shard<K> {
    /// Counts the time since the last turn as a wait if the rings waited for clients, or nearly so. Called before
    /// anything has completed. A queue whose socket was not full waits for our own next send, which takes no longer
    /// than a turn.
    pub(super) fn count_waits(&mut self) {
        let now_ms = self.kernel.now_ms();
        let awaited = self.awaited.iter().filter_map(|key| self.slab.get(*key));
        let socket_is_full = awaited.into_iter().any(Connection::has_full_socket);
        self.queue_waits.pass(now_ms, socket_is_full);
        self.room_waits.pass(now_ms, self.was_crowded);
    }

    /// Takes a bounded batch from each ring, starting with another ring each turn.
    pub(super) fn take_commands(&mut self) -> Leftover {
        let peers = self.commands.len();
        let mut budget = DELIVERIES_PER_TURN_MAX;
        let mut left = Leftover::default();
        if self.reports.is_stopped() {
            // The last report may still wait for room. No report may follow it.
            return left;
        }
        if self.is_crowded() && self.room_waits.is_used_up() {
            self.close_full_sockets();
        }
        for turn in 0..peers {
            let peer = (self.first_peer + turn) % peers;
            for _ in 0..HANDOFF_BATCH_MAX {
                if peer != SESSION_MANAGER && self.holds_too_much() {
                    left.intake_paused = true;
                    break;
                }
                if peer != SESSION_MANAGER && self.end_queue_waits() {
                    self.counters.counts.intake_waits.add(1);
                    left.intake_waits = true;
                    break;
                }
                if budget == 0 {
                    break;
                }
                let Some(command) = self.commands[peer].pop() else { break };
                budget = budget.saturating_sub(self.command(peer, command));
            }
        }
        self.first_peer = (self.first_peer + 1) % peers;
        self.was_crowded = self.is_crowded();
        if left.intake_paused {
            self.counters.counts.intake_paused.add(1);
        }
        if self.commands[SESSION_MANAGER].is_abandoned()
            && self.commands[SESSION_MANAGER].is_empty()
        {
            self.stop(Close::new(CloseCode::GOING_AWAY, "server closing"));
        }
        left.work = self.commands_wait(left);
        left
    }

    /// Whether the rings hold a command that the next turn would take.
    pub(super) fn commands_wait(&self, left: Leftover) -> bool {
        let routers_wait = left.intake_paused || left.intake_waits;
        let considered = if routers_wait { SESSION_MANAGER + 1 } else { self.commands.len() };
        self.commands[..considered].iter().any(|ring| !ring.is_empty())
    }

    /// Ends the waits for queues that are over. Returns whether the intake still waits. A burst may fill
    /// a queue within one turn, while a socket takes only one batch per turn. That does not make its
    /// client a slow reader. The intake waits until each queue has room, or until its socket has taken
    /// nothing for [`STALL_TICKS_MAX`]. While the socket is full, it waits only as long as all clients
    /// together may make it wait ([`WaitAllowance`]), so that clients that read in small amounts cannot
    /// stall the others. After that the queue may overflow.
    fn end_queue_waits(&mut self) -> bool {
        let is_used_up = self.queue_waits.is_used_up();
        self.awaited.retain(|key| {
            let Some(connection) = self.slab.get_mut(*key) else { return false };
            let waits = is_filling(connection, self.now, &self.config)
                && !(connection.has_full_socket() && is_used_up);
            if !waits {
                connection.flags.clear(Flags::AWAITED);
            }
            waits
        });
        !self.awaited.is_empty()
    }

    pub(super) fn holds_too_much(&self) -> bool {
        self.has_more_queued_than(1, 1)
    }

    /// Whether there is so little room left that sessions have to be closed, before the rings wait for them.
    fn is_crowded(&self) -> bool {
        self.has_more_queued_than(7, 8)
    }

    /// Whether at least this part of what may be queued is queued.
    fn has_more_queued_than(&self, numerator: u64, denominator: u64) -> bool {
        let share = |all| queued_share(all) * numerator;
        let queued = self.tally.queued;
        queued.events * denominator >= share(self.config.events_max.into())
            || queued.cost() * denominator >= share(self.config.event_bytes_max)
    }

    /// Whether more than this part of what may be held is held. One event may exceed the bounds.
    pub(super) fn has_more_held_than(&self, numerator: u64, denominator: u64) -> bool {
        let share = |all| held_share(all) * numerator;
        let held = self.tally.held;
        held.events > 1
            && (held.events * denominator > share(self.config.events_max.into())
                || held.cost() * denominator > share(self.config.event_bytes_max))
    }

    /// Too much is held for the sessions that catch up: closes those that hold most, until a quarter of the room is
    /// free.
    fn close_largest_holders(&mut self) {
        let holders = self.slab.iter().filter_map(|(key, connection)| {
            let held = connection.lifecycle.holding().filter(|held| !held.is_empty())?;
            Some((Reverse(held.cost()), key))
        });
        let mut holders: Vec<_> = holders.collect();
        holders.sort_unstable_by_key(|(cost, _)| *cost);
        for (_, key) in holders {
            if !self.has_more_held_than(3, 4) {
                return;
            }
            self.counters.counts.closed_in_catch_up_for_room.add(1);
            self.close_holder(key);
        }
    }

    /// Ends a session because of the events that it holds.
    fn close_holder(&mut self, key: ConnectionKey) {
        match self.slab.get(key).map(|connection| &connection.lifecycle) {
            Some(Lifecycle::Deciding(_)) => {
                let refused = Refused::unavailable("try again", self.config.retry_after_s);
                self.answer(key, &refused, EndReason::QueueOverflow);
                self.receive_on(key);
            }
            _ => self.close(key, &HOLD_OVERFLOW, EndReason::QueueOverflow),
        }
    }

    /// There has been little room for as long as that may last. If at least half of what is queued waits for full
    /// sockets, closes their sessions, those with the longest queues first, until a quarter of the room is free.
    /// Otherwise our own sends make room.
    fn close_full_sockets(&mut self) {
        self.room_waits = WaitAllowance::new(self.kernel.now_ms());
        let is_cause = |it: &Connection| {
            let is_echo = it.lifecycle.class() == LifecycleClass::Echo;
            it.has_full_socket() && !is_echo && !it.lifecycle.is_over()
        };
        let full = self.slab.iter().filter(|(_, connection)| is_cause(connection));
        let (mut frames, mut cost) = (0, 0);
        let mut full: Vec<_> = full
            .map(|(key, it)| {
                frames += it.queue.frames() as u64;
                cost += it.queue.cost();
                (Reverse(it.queue.cost()), key)
            })
            .collect();
        let queued = self.tally.queued;
        if frames < queued.events / 2 && cost < queued.cost() / 2 {
            return;
        }
        full.sort_unstable_by_key(|(cost, _)| *cost);
        for (_, key) in full {
            if !self.has_more_queued_than(3, 4) {
                return;
            }
            self.counters.counts.closed_for_room.add(1);
            match self.slab.get(key).map(|connection| &connection.lifecycle) {
                Some(lifecycle) if lifecycle.is_open() => self.close_for_overflow(key),
                _ => self.terminate(key, EndReason::QueueOverflow, HowToClose::Abort),
            }
        }
    }

    /// Executes a command. Returns the number of its recipients.
    fn command(&mut self, peer: usize, command: ShardCommand) -> usize {
        match command {
            ShardCommand::Deliver { event, recipients, class, ticket } => {
                return self.deliver(peer, event, &recipients, class, ticket);
            }
            ShardCommand::Admit { connection } => self.admit(connection),
            ShardCommand::Refuse { connection, refusal } => self.refuse(connection, refusal),
            ShardCommand::GoLive { connection, delivered } => self.go_live(connection, delivered),
            ShardCommand::SendText { connection, text } => self.send_text(connection, &text),
            ShardCommand::Close { connection, close, why } => {
                self.close_by_service(connection, &close, why);
            }
            ShardCommand::Routed { positions } => self.cursors.routed(&positions),
            ShardCommand::SendCursors { connection } => self.begin_cursors(connection),
            ShardCommand::CursorExpired { connection, why } => {
                let text = format!(r#"{{"cursor_expired":"{}"}}"#, why.label());
                self.send_text(connection, &text);
            }
            ShardCommand::StopCursors { connection } => self.stop_cursors(connection),
            ShardCommand::Fence => self.cursors.fence_answered(),
            ShardCommand::StopAccepting => self.stop_accepting(),
            ShardCommand::Stop { close } => self.stop(close),
        }
        0
    }

    fn deliver(
        &mut self,
        peer: usize,
        event: Arc<Event>,
        recipients: &Recipients,
        class: DeliveryClass,
        ticket: Option<Ticket>,
    ) -> usize {
        let count = recipients.iter().len();
        self.tally.event_taken(&event, class, count);
        let reply_to = ticket.map(|ticket| ReplyTo { peer: peer as u16, ticket });
        if count == 0 {
            self.tally.event_done(&event, class, reply_to);
            return 0;
        }
        let outgoing = Outgoing::event(event, reply_to, class, count as u32);
        for (key, _) in recipients.iter() {
            match self.deliver_one(key, &outgoing, class) {
                Ok(()) => {}
                Err(outcome) => self.tally.recipient_done(&outgoing, outcome),
            }
        }
        count
    }

    /// Appends an event to a connection's queue.
    ///
    /// # Errors
    /// The outcome, if the delivery is done already.
    fn deliver_one(
        &mut self,
        key: ConnectionKey,
        outgoing: &Rc<Outgoing>,
        class: DeliveryClass,
    ) -> Result<(), Outcome> {
        let connection = self.slab.get_mut(key).ok_or(Outcome::Stale)?;
        let holds = match connection.lifecycle {
            Lifecycle::Live | Lifecycle::Filtering(_) => false,
            Lifecycle::Deciding(_) if class == DeliveryClass::Live => true,
            Lifecycle::Holding(_) => class == DeliveryClass::Live,
            // There is no catch-up before the 101.
            Lifecycle::Accepting
            | Lifecycle::Securing(_)
            | Lifecycle::Handshake(_)
            | Lifecycle::Deciding(_)
            | Lifecycle::Echo(_) => {
                return Err(Outcome::Stale);
            }
            Lifecycle::Closing(_)
            | Lifecycle::Lingering(_)
            | Lifecycle::Terminating(_)
            | Lifecycle::Freeing => {
                return Err(Outcome::Ended);
            }
        };
        let bytes = outgoing.bytes(connection.queue.encoding());
        let length = match bytes.map(<[u8]>::len) {
            None | Some(0) => return Err(Outcome::Skipped),
            Some(length) => length,
        };
        if class == DeliveryClass::Live {
            filter(&connection.lifecycle, outgoing)?;
        }
        if holds {
            return self.hold(key, outgoing, length);
        }
        // The rings wait for a queue that is nearly full. A frame that is longer than what is left then is no overflow.
        let queue = &mut connection.queue;
        if queue.frames() >= usize::from(self.config.queue_frames_max)
            || (queue.bytes() + length > self.config.queue_bytes_max as usize
                && is_nearly_full(queue, &self.config))
        {
            self.close_for_overflow(key);
            return Err(Outcome::Ended);
        }
        queue.push(&mut self.nodes, Rc::clone(outgoing));
        self.queue_grown(key);
        Ok(())
    }

    /// Holds a live event.
    fn hold(
        &mut self,
        key: ConnectionKey,
        outgoing: &Rc<Outgoing>,
        length: usize,
    ) -> Result<(), Outcome> {
        let config = &self.config;
        let held = self.slab[key].lifecycle.held();
        let (held, delivered_by_catch_up) = held.expect("the lifecycle holds events");
        if covered(delivered_by_catch_up, outgoing) {
            return Err(Outcome::Duplicate);
        }
        if held.frames() < usize::from(config.hold_frames_max)
            && (held.is_empty() || held.bytes() + length <= config.hold_bytes_max as usize)
        {
            held.push(&mut self.nodes, Rc::clone(outgoing));
            self.tally.hold(outgoing);
            if self.has_more_held_than(1, 1) {
                self.close_largest_holders();
            }
            return Ok(());
        }
        self.counters.counts.hold_overflows.add(1);
        self.close_holder(key);
        Err(Outcome::Ended)
    }

    /// Ends catch-up: sends the held events that catch-up has not delivered.
    fn go_live(&mut self, key: ConnectionKey, delivered: Box<CaughtUp>) {
        let until = self.after(self.config.dedupe_ms);
        let Some(Lifecycle::Holding(_)) =
            self.slab.get(key).map(|connection| &connection.lifecycle)
        else {
            return self.counters.counts.commands_stale.add(1);
        };
        self.go_live_with(key, Filter::new(delivered, until));
    }

    /// Ends catch-up with a filter. Also called when the resume grace period has passed.
    pub(super) fn go_live_with(&mut self, key: ConnectionKey, filter: Filter) {
        let Lifecycle::Holding(holding) = &mut self.slab[key].lifecycle else {
            panic!("the session holds no events")
        };
        if holding.delivered_by_catch_up.is_some() {
            return self.counters.counts.commands_stale.add(1);
        }
        let mut kept = SendQueue::new(holding.queue.encoding());
        while let Some(outgoing) = holding.queue.pop(&mut self.nodes) {
            if covered(Some(&filter), &outgoing) {
                self.tally.end_hold(&outgoing);
                self.tally.recipient_done(&outgoing, Outcome::Duplicate);
            } else {
                kept.push(&mut self.nodes, outgoing);
            }
        }
        holding.queue = kept;
        holding.delivered_by_catch_up = Some(filter);
        self.drain_held(key);
    }

    /// Moves held events into the queue at the socket's pace. When all are moved, the session is
    /// live.
    pub(super) fn drain_held(&mut self, key: ConnectionKey) {
        let frames_max = usize::from(self.config.queue_frames_max / 2);
        let bytes_max = self.config.queue_bytes_max as usize / 2;
        let connection = &mut self.slab[key];
        let Lifecycle::Holding(holding) = &mut connection.lifecycle else {
            panic!("the session holds no events")
        };
        if holding.delivered_by_catch_up.is_none() {
            return;
        }
        let queue = &mut connection.queue;
        while queue.frames() < frames_max && queue.bytes() < bytes_max {
            let Some(outgoing) = holding.queue.pop(&mut self.nodes) else { break };
            self.tally.end_hold(&outgoing);
            queue.push(&mut self.nodes, outgoing);
        }
        let something_to_send = !queue.is_empty();
        if holding.queue.is_empty() {
            let filter = holding.delivered_by_catch_up.take().filter(|filter| !filter.is_empty());
            let next =
                filter.map_or(Lifecycle::Live, |filter| Lifecycle::Filtering(Box::new(filter)));
            self.set_lifecycle(key, next);
            self.schedule(key);
            self.add_for_cursors(key);
        }
        if something_to_send {
            self.queue_grown(key);
        }
    }

    fn send_text(&mut self, key: ConnectionKey, text: &str) {
        let frames_max = usize::from(self.config.queue_frames_max);
        match self.slab.get(key) {
            Some(connection) if connection.lifecycle.is_open() => {
                if connection.queue.frames() >= frames_max {
                    return self.close_for_overflow(key);
                }
                self.push_own(key, frame::encode(Opcode::Text, false, text.as_bytes()));
            }
            _ => self.counters.counts.commands_stale.add(1),
        }
    }
}

/// Whether the queue of a live session has little room left, while its socket keeps up.
pub(super) fn is_filling(connection: &Connection, now: Tick, config: &ShardConfig) -> bool {
    let is_live = matches!(connection.lifecycle, Lifecycle::Live | Lifecycle::Filtering(_));
    if !is_live || !is_nearly_full(&connection.queue, config) {
        return false;
    }
    // The deadline of a stalled socket is this far from its last progress.
    let limit = now + ticks(config.write_ms_max);
    let stalls = connection.deadline.near(now) + STALL_TICKS_MAX <= limit;
    !(connection.flags.has(Flags::STALLED) && stalls)
}

/// Whether three quarters of a queue are in use.
fn is_nearly_full(queue: &SendQueue, config: &ShardConfig) -> bool {
    queue.frames() >= usize::from(config.queue_frames_max) * 3 / 4
        || queue.bytes() >= config.queue_bytes_max as usize / 4 * 3
}

/// Whether catch-up has delivered this event.
fn covered(filter: Option<&Filter>, outgoing: &Outgoing) -> bool {
    match (filter, outgoing.as_event()) {
        (Some(filter), Some(event)) => filter.covers(event),
        _ => false,
    }
}

/// Applies the filter of a live session.
fn filter(lifecycle: &Lifecycle, outgoing: &Outgoing) -> Result<(), Outcome> {
    match lifecycle {
        Lifecycle::Filtering(filter) if covered(Some(filter), outgoing) => Err(Outcome::Duplicate),
        _ => Ok(()),
    }
}
