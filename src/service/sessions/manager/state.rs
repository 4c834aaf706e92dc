//! The session manager's loop: dispatches, and decides nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::catching_up::CatchingUp;
use super::links::ShardLink;
use super::records::{SessionRecords, SessionState};
use super::stopping::Departure;
use super::sweep::Sweep;
use super::{NodeState, Request, SessionConfig, SessionCounters, SessionPorts};
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::ids::ShardId;
use crate::service::events::timestamp::unix_ms;
use crate::service::members::directory::Directory;
use crate::service::runtime::bell::AsyncBell;
use crate::service::sessions::auth::Authenticator;
use crate::service::sessions::catch_up::{CatchUpReport, CatchUpService};
use crate::service::sessions::presence::Presence;

/// Between two looks at what is due.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// Until a full ring is tried again: a shard rings no bell when it has made room.
const FULL_RING_RETRY: Duration = Duration::from_millis(1);
/// In which the expiry of every token is looked at once: so late at most is a session closed.
const EXPIRY_SWEEP: Duration = Duration::from_secs(2);
/// Reports taken from one shard in one turn, so that no shard starves another.
const REPORTS_PER_TURN_MAX: usize = 256;
/// Requests taken in one turn.
const REQUESTS_PER_TURN_MAX: usize = 256;

pub(super) struct Manager {
    pub(super) config: SessionConfig,
    pub(super) links: Vec<ShardLink>,
    pub(super) records: Vec<SessionRecords>,
    pub(super) directory: Arc<Directory>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) counters: Arc<SessionCounters>,
    /// For the tasks that the manager starts; weak, so that it ends with its last handle.
    pub(super) request_sender: mpsc::WeakSender<Request>,
    pub(super) presence: Presence,
    pub(super) catch_up: CatchUpService,
    pub(super) catching_up: CatchingUp,
    /// For the catch-ups that the manager begins.
    pub(super) catch_up_sender: mpsc::Sender<CatchUpReport>,
    pub(super) refreshing: Sweep,
    pub(super) expiring: Sweep,
    pub(super) departure: Departure,
    state: Arc<AtomicU8>,
}

impl Manager {
    pub(super) fn new(
        config: SessionConfig,
        ports: SessionPorts,
        counters: Arc<SessionCounters>,
        request_sender: mpsc::WeakSender<Request>,
        catch_up_sender: mpsc::Sender<CatchUpReport>,
        state: Arc<AtomicU8>,
    ) -> Self {
        let count = u16::try_from(ports.shards.len()).expect("shards are numbered in 16 bits");
        Self {
            config,
            links: ports.shards.into_iter().map(ShardLink::new).collect(),
            records: (0..count).map(|shard| SessionRecords::new(ShardId(shard))).collect(),
            directory: ports.directory,
            auth: ports.auth,
            counters,
            request_sender,
            refreshing: Sweep::new(ports.presence.refresh_interval()),
            expiring: Sweep::new(EXPIRY_SWEEP),
            presence: ports.presence,
            catch_up: ports.catch_up,
            catching_up: CatchingUp::default(),
            catch_up_sender,
            departure: Departure::default(),
            state,
        }
    }

    pub(super) async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut catch_ups: mpsc::Receiver<CatchUpReport>,
        bell: AsyncBell,
    ) {
        let mut next_tick = Instant::now() + TICK;
        while self.state() != NodeState::Stopped {
            self.take_reports();
            self.take_requests(&mut requests, &mut catch_ups);
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick(now, unix_ms() / 1000);
            }
            self.flush();

            bell.about_to_sleep();
            if self.links.iter().any(ShardLink::is_ready) {
                bell.awake();
                tokio::task::yield_now().await;
                continue;
            }
            let full = self.links.iter().any(|link| link.waiting() > 0);
            let wake = if full { Instant::now() + FULL_RING_RETRY } else { next_tick };
            tokio::select! {
                () = bell.rung() => {}
                request = requests.recv() => match request {
                    Some(request) => self.on_request(request),
                    // Every handle is gone: nobody is left to order an end, so this is it.
                    None => return,
                },
                Some(step) = catch_ups.recv() => self.on_catch_up(step),
                () = sleep_until(wake.min(next_tick)) => {}
            }
            bell.awake();
        }
    }

    pub(super) fn take_reports(&mut self) {
        for shard in 0..self.links.len() {
            for _ in 0..REPORTS_PER_TURN_MAX {
                let Some(report) = self.links[shard].report() else { break };
                self.on_report(ShardId(shard as u16), report);
            }
            if self.links[shard].is_lost() {
                self.counters.shards_lost.add(1);
                self.on_stopped(ShardId(shard as u16));
            }
        }
    }

    fn take_requests(
        &mut self,
        requests: &mut mpsc::Receiver<Request>,
        catch_ups: &mut mpsc::Receiver<CatchUpReport>,
    ) {
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Ok(request) = requests.try_recv() else { break };
            self.on_request(request);
        }
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Ok(step) = catch_ups.try_recv() else { break };
            self.on_catch_up(step);
        }
    }

    pub(super) fn on_report(&mut self, shard: ShardId, report: ShardReport) {
        match report {
            ShardReport::Opened { connection, hello } => self.on_opened(shard, connection, hello),
            ShardReport::Ended { connection, .. } => self.on_ended(shard, connection),
            ShardReport::Stopped => self.on_stopped(shard),
            ShardReport::Message { connection, text } => self.on_message(shard, connection, &text),
            ShardReport::Resume { connection, conversation, after } => {
                self.on_resume(shard, connection, conversation, after);
            }
            ShardReport::GraceExpired { connection } => self.on_grace_expired(shard, connection),
            ShardReport::Done { ticket } => self.on_done(ticket),
        }
    }

    pub(super) fn on_request(&mut self, request: Request) {
        match request {
            Request::Checked { shard, connection, outcome, purpose } => {
                self.on_checked(shard, connection, outcome, purpose);
            }
            Request::MovedElsewhere(user) => self.recheck(&user),
            Request::End { shutdown, ended } => self.on_end(shutdown, ended, Instant::now()),
        }
    }

    pub(super) fn tick(&mut self, now: Instant, unix_s: u64) {
        self.end_replaced_elsewhere();
        self.sweep_tokens(unix_s, now);
        self.sweep_presence(now);
        self.depart(now);
        self.records.iter_mut().for_each(SessionRecords::shrink);
    }

    pub(super) fn flush(&mut self) {
        for link in &mut self.links {
            link.flush();
        }
        let waiting: usize = self.links.iter().map(ShardLink::waiting).sum();
        self.counters.commands_waiting.set(waiting as u64);
    }

    /// A shard has ended: so have its connections, if it did not say so.
    fn on_stopped(&mut self, shard: ShardId) {
        let link = &mut self.links[shard.index()];
        if std::mem::replace(&mut link.stopped, true) {
            return;
        }
        self.catching_up.forget_shard(shard);
        for slot in 0..self.records[shard.index()].len() {
            let held = self.records[shard.index()].at(slot).map(|(address, _)| address);
            if let Some(address) = held {
                self.on_ended(shard, address.connection);
            }
        }
        self.after_stop();
    }

    pub(super) fn state(&self) -> NodeState {
        match self.state.load(Ordering::Relaxed) {
            0 => NodeState::Serving,
            1 => NodeState::Draining,
            2 => NodeState::Stopping,
            _ => NodeState::Stopped,
        }
    }

    pub(super) fn set_state(&mut self, state: NodeState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(super) fn send(&mut self, shard: ShardId, command: ShardCommand) {
        self.links[shard.index()].send(command);
    }

    /// Sends a live session its close frame; its end will be reported. Does nothing to one that is
    /// closing already.
    pub(super) fn close(
        &mut self,
        shard: ShardId,
        connection: crate::domain::ids::ConnectionKey,
        close: crate::domain::close::Close,
        why: crate::domain::close::EndReason,
    ) -> bool {
        let Some(record) = self.records[shard.index()].get(connection) else { return false };
        if record.state != SessionState::Live {
            return false;
        }
        record.state = SessionState::Closing;
        self.catching_up.forget(shard, connection);
        self.send(shard, ShardCommand::Close { connection, close, why });
        true
    }
}
