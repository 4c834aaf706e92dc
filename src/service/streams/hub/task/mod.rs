//! The hub's task: the only owner of the rings and the slots.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Status;

use super::delivery::{Delivery, Signal, Signals};
use super::outbox::{Delivered, Outbox};
use super::slots::Slots;
use super::{HubConfig, HubMetrics, HubPeer, Input, Reply, status};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{
    DeliveryClass, Hello, Recipients, ReplyTo, ShardCommand, ShardReport, Ticket,
};
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::HANDOFF_BATCH_MAX;
use crate::handoff::{Doorbell, Pushed};
use crate::service::runtime::bell::AsyncBell;

/// Between looks for streams that stall or take too long to end.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Between attempts at a report ring that is full: nothing rings when it has room again.
const FULL_RING_RETRY: Duration = Duration::from_millis(1);
/// What streams end with if every peer is gone without a word.
const ABANDONED: Close = Close::new(CloseCode::GOING_AWAY, "server stopping");
/// The session manager's place among the peers.
const MANAGER: usize = 0;

struct PeerLink {
    port: HubPeer,
    /// Reports that found the ring full. Bounded: one `Done` per delivery under way, one `Ended`
    /// per stream, and no new `Opened` or `Resume` while anything waits.
    backlog: VecDeque<ShardReport>,
}

enum Phase {
    /// The session manager has not decided yet.
    Asking(Reply),
    Live,
    Ending {
        why: EndReason,
        until: Instant,
    },
}

struct Session {
    outbox: Arc<Outbox>,
    phase: Phase,
}

/// See the module above. Runs until it was told to stop and every stream has ended.
pub struct Hub {
    config: HubConfig,
    peers: Vec<PeerLink>,
    bell: AsyncBell,
    inputs: mpsc::Receiver<Input>,
    signals: Arc<Signals>,
    metrics: Arc<HubMetrics>,
    sessions: Slots<Session>,
    /// Sessions in `sessions`.
    open: usize,
    accepting: watch::Sender<bool>,
    stopping: bool,
    next_sweep: Instant,
}

impl Hub {
    pub(super) fn new(
        config: HubConfig,
        peers: Vec<HubPeer>,
        bell: Arc<Doorbell>,
        inputs: mpsc::Receiver<Input>,
        signals: Arc<Signals>,
        metrics: Arc<HubMetrics>,
        accepting: watch::Sender<bool>,
    ) -> io::Result<Self> {
        let link = |port| PeerLink { port, backlog: VecDeque::new() };
        Ok(Self {
            sessions: Slots::new(config.streams_max),
            config,
            peers: peers.into_iter().map(link).collect(),
            bell: AsyncBell::new(bell)?,
            inputs,
            signals,
            metrics,
            open: 0,
            accepting,
            stopping: false,
            next_sweep: Instant::now() + SWEEP_INTERVAL,
        })
    }

    /// The task.
    pub async fn run(mut self) {
        loop {
            let more = self.turn();
            let now = Instant::now();
            if self.next_sweep <= now {
                self.next_sweep = now + SWEEP_INTERVAL;
                self.sweep(now);
            }
            if self.stopping && self.open == 0 {
                break;
            }
            if more {
                tokio::task::yield_now().await;
            } else {
                self.sleep().await;
            }
        }
        self.say_stopped().await;
    }

    /// A bounded round through everything that may wait. Returns whether more does.
    fn turn(&mut self) -> bool {
        for signal in self.signals.take() {
            self.on_signal(signal);
        }
        for _ in 0..HANDOFF_BATCH_MAX {
            if self.is_backlogged() {
                break;
            }
            let Ok(input) = self.inputs.try_recv() else { break };
            self.on_input(input);
        }
        for peer in 0..self.peers.len() {
            for _ in 0..HANDOFF_BATCH_MAX {
                if self.is_full() {
                    break;
                }
                let Some(command) = self.peers[peer].port.commands.pop() else { break };
                self.on_command(peer, command);
            }
        }
        if self.is_abandoned() && !self.stopping {
            self.stop(&ABANDONED);
        }
        self.flush();
        self.metrics.counters.stream_deliveries.set(self.signals.deliveries() as u64);
        self.commands_wait()
    }

    fn commands_wait(&self) -> bool {
        !self.is_full() && self.peers.iter().any(|peer| !peer.port.commands.is_empty())
            || self.is_abandoned() && !self.stopping
    }

    async fn sleep(&mut self) {
        self.bell.about_to_sleep();
        if self.commands_wait() {
            return self.bell.awake();
        }
        let backlogged = self.is_backlogged();
        tokio::select! {
            () = self.bell.rung() => {}
            () = self.signals.wake.notified() => {}
            () = sleep(FULL_RING_RETRY), if backlogged => {}
            input = self.inputs.recv(), if !backlogged && !self.inputs.is_closed() => {
                if let Some(input) = input {
                    self.on_input(input);
                }
            }
            () = sleep_until(self.next_sweep) => {}
        }
        self.bell.awake();
    }

    /// Whether so much is under way that no more is taken in.
    fn is_full(&self) -> bool {
        self.signals.deliveries() >= self.config.deliveries_max
            || self.signals.bytes() >= self.config.deliveries_bytes_max
    }

    fn is_backlogged(&self) -> bool {
        !self.peers[MANAGER].backlog.is_empty()
    }

    /// The session manager is gone without having said so.
    fn is_abandoned(&self) -> bool {
        let commands = &self.peers[MANAGER].port.commands;
        commands.is_abandoned() && commands.is_empty()
    }

    fn on_signal(&mut self, signal: Signal) {
        match signal {
            Signal::Done(ReplyTo { peer, ticket }) => {
                self.report(usize::from(peer), ShardReport::Done { ticket })
            }
            Signal::Gone(connection, why) => self.forget(connection, why),
        }
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::Open { hello, outbox, reply } => self.open(hello, outbox, reply),
            Input::Resume { connection, conversation, after } => {
                if self.sessions.get_mut(connection).is_some() {
                    let resume = ShardReport::Resume { connection, conversation, after };
                    self.report(MANAGER, resume);
                }
            }
        }
    }

    fn open(&mut self, hello: Box<Hello>, outbox: Arc<Outbox>, reply: Reply) {
        if !*self.accepting.borrow() {
            self.metrics.counters.stream_sessions_refused.add(1);
            let _ = reply.send(Err(status::not_serving()));
            return;
        }
        // A full house is known without asking; the reply is needed again if it is.
        let session = Session { outbox, phase: Phase::Asking(reply) };
        let connection = match self.sessions.insert(session) {
            Ok(connection) => connection,
            Err(Session { phase, .. }) => {
                self.metrics.counters.stream_sessions_refused.add(1);
                if let Phase::Asking(reply) = phase {
                    let _ = reply.send(Err(status::full()));
                }
                return;
            }
        };
        self.open += 1;
        self.report(MANAGER, ShardReport::Opened { connection, hello });
    }

    fn on_command(&mut self, peer: usize, command: ShardCommand) {
        match command {
            ShardCommand::Deliver { event, recipients, class, ticket } => {
                self.deliver(peer, event, &recipients, class, ticket);
            }
            ShardCommand::Admit { connection } => self.admit(connection),
            ShardCommand::Refuse { connection, refusal } => {
                let refused = status::of_refusal(&refusal);
                self.end(connection, refused, EndReason::Refused, true);
            }
            ShardCommand::GoLive { connection, delivered } => {
                match self.sessions.get_mut(connection) {
                    Some(session) => session.outbox.release(&delivered, Instant::now()),
                    None => self.metrics.counters.stream_commands_stale.add(1),
                }
            }
            ShardCommand::SendText { .. } => self.metrics.counters.stream_texts_discarded.add(1),
            ShardCommand::Close { connection, close, why } => {
                self.end(connection, status::of_close(&close), why, false);
            }
            ShardCommand::StopAccepting => {
                self.accepting.send_replace(false);
            }
            ShardCommand::Stop { close } => self.stop(&close),
        }
    }

    fn deliver(
        &mut self,
        peer: usize,
        event: Arc<Event>,
        recipients: &Recipients,
        class: DeliveryClass,
        ticket: Option<Ticket>,
    ) {
        let counters = &self.metrics.counters;
        let reply_to = ticket.map(|ticket| ReplyTo { peer: peer as u16, ticket });
        let Some(delivery) = Delivery::new(event, reply_to, &self.signals) else {
            counters.stream_events_inexpressible.add(1);
            if let Some(ticket) = ticket {
                self.report(peer, ShardReport::Done { ticket });
            }
            return;
        };
        let now = Instant::now();
        let mut overflowed = Vec::new();
        for (connection, _) in recipients.iter() {
            let Some(session) = self.sessions.get_mut(connection) else {
                counters.stream_events_stale.add(1);
                continue;
            };
            match session.outbox.deliver(class, &delivery, now) {
                Delivered::Queued => {}
                Delivered::Held => counters.stream_events_held.add(1),
                Delivered::Duplicate => counters.stream_events_duplicate.add(1),
                Delivered::Ended => counters.stream_events_stale.add(1),
                Delivered::Overflow => overflowed.push((connection, status::overflow())),
                Delivered::CatchUpOverflow => {
                    overflowed.push((connection, status::catch_up_overflow()));
                }
            }
        }
        for (connection, status) in overflowed {
            self.metrics.counters.stream_overflows.add(1);
            self.metrics.counters.stream_events_unsent.add(1);
            self.end(connection, status, EndReason::QueueOverflow, true);
        }
    }

    fn admit(&mut self, connection: ConnectionKey) {
        let counters = &self.metrics.counters;
        let Some(session) = self.sessions.get_mut(connection) else {
            counters.stream_commands_stale.add(1);
            return;
        };
        match std::mem::replace(&mut session.phase, Phase::Live) {
            Phase::Asking(reply) => {
                counters.stream_sessions_opened.add(1);
                counters.stream_sessions.add(1);
                if reply.send(Ok(connection)).is_err() {
                    self.forget(connection, EndReason::PeerGone);
                }
            }
            phase @ (Phase::Live | Phase::Ending { .. }) => {
                session.phase = phase;
                counters.stream_commands_stale.add(1);
            }
        }
    }

    /// Ends a stream with a status; it is forgotten when that was taken, or after a while.
    fn end(&mut self, connection: ConnectionKey, status: Status, why: EndReason, at_once: bool) {
        let Some(session) = self.sessions.get_mut(connection) else {
            self.metrics.counters.stream_commands_stale.add(1);
            return;
        };
        let until = Instant::now() + self.config.close_timeout;
        match std::mem::replace(&mut session.phase, Phase::Ending { why, until }) {
            Phase::Asking(reply) => {
                self.metrics.counters.stream_sessions_refused.add(1);
                let _ = reply.send(Err(status));
                // Nothing of it is counted as an open session.
                self.discard(connection, why);
            }
            Phase::Live => self.give_up(connection, status, at_once),
            // The first reason counts; what is still queued may be given up by the second.
            Phase::Ending { why, until } => {
                session.phase = Phase::Ending { why, until };
                if at_once {
                    self.give_up(connection, status, true);
                }
            }
        }
    }

    fn give_up(&mut self, connection: ConnectionKey, status: Status, at_once: bool) {
        if let Some(session) = self.sessions.get_mut(connection) {
            let unsent = session.outbox.end(status, at_once);
            self.metrics.counters.stream_events_unsent.add(unsent as u64);
        }
    }

    /// A stream is over.
    fn forget(&mut self, connection: ConnectionKey, why: EndReason) {
        let Some(session) = self.sessions.get_mut(connection) else { return };
        let why = match session.phase {
            Phase::Ending { why, .. } => why,
            Phase::Live => why,
            // Only the hub knows the key of a session that nobody has been told of.
            Phase::Asking(_) => unreachable!("an undecided session has no writer"),
        };
        self.metrics.counters.stream_sessions.sub(1);
        self.give_up(connection, status::not_serving(), true);
        self.discard(connection, why);
    }

    fn discard(&mut self, connection: ConnectionKey, why: EndReason) {
        if self.sessions.remove(connection).is_some() {
            self.open -= 1;
            self.metrics.ended[why as usize].add(1);
            self.report(MANAGER, ShardReport::Ended { connection, why });
        }
    }

    fn stop(&mut self, close: &Close) {
        self.accepting.send_replace(false);
        self.stopping = true;
        let open: Vec<_> = self.sessions.iter_mut().map(|(connection, _)| connection).collect();
        for connection in open {
            self.end(connection, status::of_close(close), EndReason::Draining, false);
        }
    }

    /// Ends what stalls, and forgets what took too long to end or to be asked for.
    fn sweep(&mut self, now: Instant) {
        let mut stalled = Vec::new();
        let mut behind = Vec::new();
        let mut over = Vec::new();
        let mut unanswered = Vec::new();
        for (connection, session) in self.sessions.iter_mut() {
            match &session.phase {
                Phase::Asking(reply) if reply.is_closed() => unanswered.push(connection),
                Phase::Ending { why, until } if *until <= now => over.push((connection, *why)),
                Phase::Live => {
                    let for_too_long = |since: Option<Instant>, limit| {
                        since.is_some_and(|since| since + limit <= now)
                    };
                    let (config, outbox) = (&self.config, &session.outbox);
                    if for_too_long(outbox.waiting_since(), config.stall_timeout) {
                        stalled.push(connection);
                    } else if for_too_long(outbox.resuming_since(), config.catch_up_timeout) {
                        behind.push(connection);
                    }
                }
                Phase::Asking(_) | Phase::Ending { .. } => {}
            }
        }
        for connection in stalled {
            self.metrics.counters.stream_stalls.add(1);
            self.end(connection, status::stalled(), EndReason::WriteTimeout, true);
        }
        for connection in behind {
            self.metrics.counters.stream_catch_up_timeouts.add(1);
            self.end(connection, status::catch_up_timeout(), EndReason::ClosedByService, true);
        }
        for (connection, why) in over {
            self.forget(connection, why);
        }
        for connection in unanswered {
            self.discard(connection, EndReason::HandshakeTimeout);
        }
    }

    fn report(&mut self, peer: usize, report: ShardReport) {
        if !self.peers[peer].backlog.is_empty() {
            self.peers[peer].backlog.push_back(report);
        } else if let Some(report) = self.push(peer, report) {
            self.peers[peer].backlog.push_back(report);
        }
    }

    /// Gives the report back if the ring is full. The slot of an ended session may be used again
    /// once its end is in the ring.
    fn push(&mut self, peer: usize, report: ShardReport) -> Option<ShardReport> {
        let ended = match &report {
            ShardReport::Ended { connection, .. } => Some(*connection),
            _ => None,
        };
        match self.peers[peer].port.reports.push(report) {
            Pushed::Full(report) => return Some(report),
            Pushed::Accepted | Pushed::Closed(_) => {}
        }
        if let Some(connection) = ended {
            self.sessions.free(connection);
        }
        None
    }

    fn flush(&mut self) {
        for peer in 0..self.peers.len() {
            while let Some(report) = self.peers[peer].backlog.pop_front() {
                if let Some(report) = self.push(peer, report) {
                    self.peers[peer].backlog.push_front(report);
                    break;
                }
            }
            self.peers[peer].port.reports.publish();
        }
    }

    /// The last words, to every peer, after everything else that waits for it.
    async fn say_stopped(mut self) {
        for signal in self.signals.take() {
            self.on_signal(signal);
        }
        for peer in 0..self.peers.len() {
            self.report(peer, ShardReport::Stopped);
        }
        loop {
            self.flush();
            if self.peers.iter().all(|peer| peer.backlog.is_empty()) {
                return;
            }
            sleep(FULL_RING_RETRY).await;
        }
    }
}

#[cfg(test)]
mod tests;
