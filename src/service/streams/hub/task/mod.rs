//! Task of the hub. It alone owns the rings and the slots.

mod cursors;
mod room;
mod sweep;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Status;

use super::delivery::{Delivery, Notice, Notices};
use super::outbox::{DeliverOutcome, Outbox, Unsent};
use super::slot_map::SlotMap;
use super::{
    AdmissionReply, HUB_REQUESTS_MAX, HubConfig, HubHandle, HubMetrics, HubRequest, NotAdmitted,
    status,
};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{
    DeliveryClass, Hello, Recipients, ReplyTo, ShardCommand, ShardReport, Ticket,
};
use crate::domain::cursor_schedule::CursorSchedule;
use crate::domain::event::Event;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::HANDOFF_BATCH_MAX;
use crate::domain::wait_allowance::WaitAllowance;
use crate::handoff::{Consumer, Doorbell, Duplex, ShardEnd, SpillingProducer};
use crate::service::runtime::bell::AsyncBell;
use room::AwaitedWriter;

/// Interval between checks for stalled streams and expired deadlines.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Retry interval for a full report ring: its consumer does not notify the hub.
const FULL_RING_RETRY: Duration = Duration::from_millis(1);
/// How often a hub with little room looks whether it has more, or has waited long enough.
const CROWDED_RETRY: Duration = Duration::from_millis(16);
/// Close of all streams if the session manager is dropped without a stop command.
const ABANDONED: Close = Close::new(CloseCode::GOING_AWAY, "server stopping");
/// Index of the session manager among the peers.
const MANAGER: usize = 0;

enum StreamState {
    /// Waits for the decision of the session manager.
    Requested(AdmissionReply),
    Live,
    Closing {
        why: EndReason,
        deadline: Instant,
    },
}

struct StreamRecord {
    outbox: Arc<Outbox>,
    state: StreamState,
    cursors: CursorState,
    /// Bursts that have drained since its last cursor.
    bursts: u8,
}

/// Whether a stream gets cursors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CursorState {
    /// Its client has not asked for them, or it has left the directory.
    Off,
    /// It is listed.
    On,
    /// One was due while events of the stream were held, or its queue was long. It is due again at the next sweep.
    Owed,
}

/// Hub of the gRPC streams. Runs until it is stopped and every stream has ended.
pub struct Hub {
    config: HubConfig,
    /// The reports that wait are bounded: one `Done` per delivery in progress, one `Ended` per stream, and no new
    /// `Opened` or `Resume` while any waits.
    peers: Vec<Duplex<Consumer<ShardCommand>, SpillingProducer<ShardReport>>>,
    bell: AsyncBell,
    requests: mpsc::Receiver<HubRequest>,
    pub(super) notices: Arc<Notices>,
    metrics: Arc<HubMetrics>,
    streams: SlotMap<StreamRecord>,
    /// Number of items in `streams`.
    open: usize,
    accepting: watch::Sender<bool>,
    /// The streams that get cursors, and the positions for these. Its time begins with the hub.
    cursors: CursorSchedule<Arc<Event>>,
    began: Instant,
    stopping: bool,
    next_sweep: Instant,
    /// There was little room at the end of the last turn.
    was_crowded: bool,
    /// How long that may last.
    room_waits: WaitAllowance,
    /// The streams with almost full queues; each once.
    awaited: Vec<AwaitedWriter>,
    /// How long they may wait for those whose writers are slow.
    writer_waits: WaitAllowance,
}

impl Hub {
    /// Creates the hub and its handle. `peers` are the session manager, then the routers; their
    /// producers ring `bell`. The caller runs [`Hub::run`] on the current runtime.
    ///
    /// # Errors
    /// The runtime cannot poll the bell.
    pub fn new(
        config: HubConfig,
        peers: Vec<ShardEnd>,
        bell: Arc<Doorbell>,
        metrics: Arc<HubMetrics>,
    ) -> io::Result<(HubHandle, Self)> {
        assert!(!peers.is_empty(), "the session manager is the first peer");
        let (requests, receiver) = mpsc::channel(HUB_REQUESTS_MAX);
        let notices = Arc::new(Notices::default());
        let (accepting, is_accepting) = watch::channel(true);
        let handle = HubHandle {
            requests,
            notices: Arc::clone(&notices),
            metrics: Arc::clone(&metrics),
            limits: config.outbox.clone(),
            accepting: is_accepting,
        };
        let cursor_ms = u64::try_from(config.cursor_interval.as_millis()).unwrap_or(u64::MAX);
        let link = |end: ShardEnd| Duplex { commands: end.commands, reports: end.reports.into() };
        let hub = Self {
            streams: SlotMap::new(config.streams_max),
            config,
            peers: peers.into_iter().map(link).collect(),
            bell: AsyncBell::new(bell)?,
            requests: receiver,
            notices,
            metrics,
            open: 0,
            accepting,
            cursors: CursorSchedule::new(cursor_ms),
            began: Instant::now(),
            stopping: false,
            next_sweep: Instant::now() + SWEEP_INTERVAL,
            was_crowded: false,
            room_waits: WaitAllowance::new(0),
            awaited: Vec::new(),
            writer_waits: WaitAllowance::new(0),
        };
        Ok((handle, hub))
    }

    /// Runs the hub.
    pub async fn run(mut self) {
        loop {
            let more = self.step();
            if self.stopping && self.open == 0 {
                break;
            }
            if more {
                tokio::task::yield_now().await;
            } else {
                self.sleep().await;
            }
        }
        self.report_stopped().await;
    }

    /// A turn, and a sweep if one is due. Returns whether commands are left.
    pub(super) fn step(&mut self) -> bool {
        let more = self.turn();
        let now = Instant::now();
        if self.next_sweep <= now {
            self.next_sweep = now + SWEEP_INTERVAL;
            self.sweep(now);
        }
        more
    }

    /// Handles a bounded number of notices, requests and commands. Returns whether commands are left.
    fn turn(&mut self) -> bool {
        self.handle_notices();
        self.count_waits();
        if self.is_crowded() && self.room_waits.is_used_up() {
            self.close_closed_windows(Instant::now());
        }
        for _ in 0..HANDOFF_BATCH_MAX {
            if self.is_backlogged() {
                break;
            }
            let Ok(request) = self.requests.try_recv() else { break };
            self.on_request(request);
        }
        for peer in 0..self.peers.len() {
            for _ in 0..HANDOFF_BATCH_MAX {
                // The session manager's commands make room; its messages are bounded by catch-up.
                if peer != MANAGER && (self.is_full() || self.end_writer_waits()) {
                    break;
                }
                let Some(command) = self.peers[peer].commands.pop() else { break };
                self.on_command(peer, command);
            }
        }
        if self.is_abandoned() && !self.stopping {
            self.stop(&ABANDONED);
        }
        self.send_cursors();
        self.flush();
        self.note_room();
        self.has_commands()
    }

    /// Whether the routers' rings wait for clients.
    pub(super) fn makes_routers_wait(&self) -> bool {
        self.is_full() || self.awaited.iter().any(|it| !it.given_up)
    }

    fn has_commands(&self) -> bool {
        let taken = if self.makes_routers_wait() { MANAGER + 1 } else { self.peers.len() };
        self.peers[..taken].iter().any(|peer| !peer.commands.is_empty())
            || self.is_abandoned() && !self.stopping
    }

    async fn sleep(&mut self) {
        self.bell.about_to_sleep();
        if self.has_commands() {
            return self.bell.awake();
        }
        let backlogged = self.is_backlogged();
        let next_cursor = self.next_cursor().unwrap_or(self.next_sweep);
        tokio::select! {
            () = self.bell.rung() => {}
            () = self.notices.wake.notified() => {}
            () = sleep(FULL_RING_RETRY), if backlogged => {}
            () = sleep(CROWDED_RETRY), if self.was_crowded || !self.awaited.is_empty() => {}
            request = self.requests.recv(), if !backlogged && !self.requests.is_closed() => {
                if let Some(request) = request {
                    self.on_request(request);
                }
            }
            () = sleep_until(self.next_sweep.min(next_cursor)) => {}
        }
        self.bell.awake();
    }

    fn is_backlogged(&self) -> bool {
        self.peers[MANAGER].reports.waiting() > 0
    }

    /// Whether the session manager was dropped without a stop command.
    fn is_abandoned(&self) -> bool {
        let commands = &self.peers[MANAGER].commands;
        commands.is_abandoned() && commands.is_empty()
    }

    fn handle_notices(&mut self) {
        for notice in self.notices.take() {
            match notice {
                Notice::Delivered(ReplyTo { peer, ticket }) => {
                    self.report(usize::from(peer), ShardReport::Done { ticket });
                }
                Notice::BurstDrained(connection) => self.want_cursor(connection),
                Notice::AtFault(connection, status) => {
                    self.close(connection, status, EndReason::PeerAtFault, Unsent::Discard);
                }
                Notice::StreamEnded(connection, why) => self.stream_ended(connection, why),
            }
        }
    }

    fn on_request(&mut self, request: HubRequest) {
        match request {
            HubRequest::Open { hello, outbox, reply } => self.open(hello, outbox, reply),
            HubRequest::ResumeSince { connection, cursor } => {
                if self.streams.get_mut(connection).is_some() {
                    self.report(MANAGER, ShardReport::ResumeSince { connection, cursor });
                }
            }
            HubRequest::CatchUp { connection, conversation, after } => {
                if self.streams.get_mut(connection).is_some() {
                    let resume = ShardReport::Resume { connection, conversation, after };
                    self.report(MANAGER, resume);
                }
            }
        }
    }

    fn open(&mut self, hello: Box<Hello>, outbox: Arc<Outbox>, reply: AdmissionReply) {
        let record = StreamRecord {
            outbox,
            state: StreamState::Requested(reply),
            cursors: CursorState::Off,
            bursts: 0,
        };
        let accepting = *self.accepting.borrow();
        let (record, refused) = match accepting {
            false => (record, status::not_serving()),
            true => match self.streams.insert(record) {
                Err(record) => (record, status::full()),
                Ok(connection) => {
                    self.open += 1;
                    self.report(MANAGER, ShardReport::Opened { connection, hello });
                    return;
                }
            },
        };
        self.metrics.counters.stream_sessions_refused.add(1);
        if let StreamState::Requested(reply) = record.state {
            let _ = reply.send(Err(NotAdmitted::ByHub(refused)));
        }
    }

    fn on_command(&mut self, peer: usize, command: ShardCommand) {
        match command {
            ShardCommand::Deliver { event, recipients, class, ticket } => {
                self.deliver(peer, event, &recipients, class, ticket);
            }
            ShardCommand::Admit { connection } => self.admit(connection),
            ShardCommand::Refuse { connection, refusal } => {
                let refused = status::of_refusal(&refusal);
                self.close(connection, refused, EndReason::Refused, Unsent::Discard);
            }
            ShardCommand::GoLive { connection, delivered } => {
                let now = Instant::now();
                let forget_at = now + self.config.dedupe;
                match self.streams.get_mut(connection) {
                    Some(stream) => stream.outbox.go_live(delivered, now, forget_at),
                    None => self.metrics.counters.stream_commands_stale.add(1),
                }
            }
            // A stream whose cursor cannot be used is closed.
            ShardCommand::SendText { .. } | ShardCommand::CursorExpired { .. } => {
                self.metrics.counters.stream_texts_discarded.add(1)
            }
            ShardCommand::Close { connection, close, why } => {
                if close.comes_with_cursor() {
                    self.push_last_cursor(connection);
                }
                self.close(connection, status::of_close(&close), why, Unsent::Send);
            }
            ShardCommand::Routed { positions } => self.cursors.routed(&positions),
            ShardCommand::SendCursors { connection } => self.begin_cursors(connection),
            ShardCommand::StopCursors { connection } => self.stop_cursors(connection),
            ShardCommand::Fence => self.cursors.fence_answered(),
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
        let Some(delivery) = Delivery::new(event, Some(class), reply_to, &self.notices) else {
            counters.stream_events_inexpressible.add(1);
            if let Some(ticket) = ticket {
                self.report(peer, ShardReport::Done { ticket });
            }
            return;
        };
        let now = Instant::now();
        let mut overflowed = Vec::new();
        for (connection, _) in recipients.iter() {
            let Some(stream) = self.streams.get_mut(connection) else {
                counters.stream_events_stale.add(1);
                continue;
            };
            match stream.outbox.deliver(class, &delivery, now) {
                DeliverOutcome::Queued => {}
                DeliverOutcome::QueuedLong => {
                    let since = now.duration_since(self.began);
                    self.awaited.push(AwaitedWriter { connection, since, given_up: false });
                }
                DeliverOutcome::Held => counters.stream_events_held.add(1),
                DeliverOutcome::Duplicate => counters.stream_events_duplicate.add(1),
                DeliverOutcome::Ended => counters.stream_events_stale.add(1),
                DeliverOutcome::Overflow => overflowed.push((connection, status::overflow())),
                DeliverOutcome::CatchUpOverflow => {
                    overflowed.push((connection, status::catch_up_overflow()));
                }
            }
        }
        for (connection, status) in overflowed {
            self.metrics.counters.stream_overflows.add(1);
            self.metrics.counters.stream_events_unsent.add(1);
            self.close(connection, status, EndReason::QueueOverflow, Unsent::Discard);
        }
        if self.has_more_held_than(1, 1) {
            self.close_largest_holders();
        }
    }

    fn admit(&mut self, connection: ConnectionKey) {
        let counters = &self.metrics.counters;
        let Some(stream) = self.streams.get_mut(connection) else {
            return counters.stream_commands_stale.add(1);
        };
        match std::mem::replace(&mut stream.state, StreamState::Live) {
            StreamState::Requested(reply) => {
                counters.stream_sessions_opened.add(1);
                counters.stream_sessions.add(1);
                if reply.send(Ok(connection)).is_err() {
                    self.stream_ended(connection, EndReason::PeerGone);
                }
            }
            state @ (StreamState::Live | StreamState::Closing { .. }) => {
                stream.state = state;
                counters.stream_commands_stale.add(1);
            }
        }
    }

    /// Closes a stream with a status. The stream ends when the status is sent, or at the close timeout.
    fn close(&mut self, connection: ConnectionKey, status: Status, why: EndReason, unsent: Unsent) {
        let Some(stream) = self.streams.get_mut(connection) else {
            return self.metrics.counters.stream_commands_stale.add(1);
        };
        let deadline = Instant::now() + self.config.close_timeout;
        match std::mem::replace(&mut stream.state, StreamState::Closing { why, deadline }) {
            StreamState::Requested(reply) => {
                self.metrics.counters.stream_sessions_refused.add(1);
                let _ = reply.send(Err(NotAdmitted::new(status, why)));
                // The session was never counted as open.
                self.remove(connection, why);
            }
            StreamState::Live => self.close_outbox(connection, status, unsent),
            // The first reason counts, but a second close may still discard the queue.
            closing @ StreamState::Closing { .. } => {
                stream.state = closing;
                if unsent == Unsent::Discard {
                    self.close_outbox(connection, status, unsent);
                }
            }
        }
    }

    fn close_outbox(&mut self, connection: ConnectionKey, status: Status, unsent: Unsent) {
        if let Some(stream) = self.streams.get_mut(connection) {
            let dropped = stream.outbox.close(status, unsent);
            self.metrics.counters.stream_events_unsent.add(dropped as u64);
        }
    }

    /// An admitted stream has ended. `why` counts unless the hub was closing it for another reason.
    fn stream_ended(&mut self, connection: ConnectionKey, why: EndReason) {
        let Some(stream) = self.streams.get_mut(connection) else { return };
        let why = match stream.state {
            StreamState::Closing { why, .. } => why,
            StreamState::Live => why,
            // The caller learns the key only on admission.
            StreamState::Requested(_) => unreachable!("a stream ends after its admission"),
        };
        self.metrics.counters.stream_sessions.sub(1);
        self.close_outbox(connection, status::not_serving(), Unsent::Discard);
        self.remove(connection, why);
    }

    fn remove(&mut self, connection: ConnectionKey, why: EndReason) {
        if self.streams.remove(connection).is_some() {
            self.open -= 1;
            self.metrics.ended[why as usize].add(1);
            self.report(MANAGER, ShardReport::Ended { connection, why });
        }
    }

    fn stop(&mut self, close: &Close) {
        self.accepting.send_replace(false);
        self.stopping = true;
        let open: Vec<_> = self.streams.iter_mut().map(|(connection, _)| connection).collect();
        for connection in open {
            if close.comes_with_cursor() {
                self.push_last_cursor(connection);
            }
            self.close(connection, status::of_close(close), EndReason::Draining, Unsent::Send);
        }
    }

    fn report(&mut self, peer: usize, report: ShardReport) {
        self.peers[peer].reports.push(report);
    }

    fn flush(&mut self) {
        for peer in &mut self.peers {
            peer.reports.flush();
            peer.reports.publish();
        }
    }

    /// Reports the stop to every peer, after all other reports.
    async fn report_stopped(mut self) {
        self.handle_notices();
        for peer in 0..self.peers.len() {
            self.report(peer, ShardReport::Stopped);
        }
        loop {
            self.flush();
            if self.peers.iter().all(|peer| peer.reports.waiting() == 0) {
                return;
            }
            sleep(FULL_RING_RETRY).await;
        }
    }
}

#[cfg(test)]
mod tests;
