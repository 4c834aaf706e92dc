//! The session manager's loop. It only dispatches.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::links::ControlLink;
use super::node_state::NodeState;
use super::records::SessionRecords;
use super::state::SessionManager;
use super::{
    ManagerRequest, REQUESTS_WAITING_MAX, SessionConfig, SessionCounters, SessionHandle,
    SessionPorts, TICK,
};
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::cursor::CursorRequest;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::service::events::timestamp::unix_ms;
use crate::service::runtime::bell::AsyncBell;
use crate::service::sessions::catch_up::{CatchUpReport, CatchUpScope};

/// Wait before a full ring is tried again: a shard does not ring when it has made room.
const FULL_RING_RETRY: Duration = Duration::from_millis(1);
/// Reports taken from one shard per turn, so that no shard starves another.
const REPORTS_PER_TURN_MAX: usize = 256;
/// Requests, and reports of catch-ups, taken per turn.
const REQUESTS_PER_TURN_MAX: usize = 256;
/// Reports of catch-ups that may wait for the session manager. A catch-up waits while it is full.
const CATCH_UP_REPORTS_WAITING_MAX: usize = 256;

impl SessionManager {
    /// Starts the session manager's task on the current runtime.
    ///
    /// # Errors
    /// The doorbell cannot be registered with the runtime.
    pub fn spawn(
        config: SessionConfig,
        ports: SessionPorts,
        counters: Arc<SessionCounters>,
    ) -> io::Result<SessionHandle> {
        let bell = AsyncBell::new(Arc::clone(&ports.bell))?;
        let (requests, request_receiver) = mpsc::channel(REQUESTS_WAITING_MAX);
        let (catch_up_reports, report_receiver) = mpsc::channel(CATCH_UP_REPORTS_WAITING_MAX);
        let (node_state, state) = watch::channel(NodeState::Serving);
        let handle = SessionHandle {
            requests,
            presence: ports.presence.clone(),
            unregister_timeout: config.unregister_timeout,
            state,
        };
        let weak = handle.requests.downgrade();
        let manager = Self::new(config, ports, counters, weak, catch_up_reports, node_state);
        tokio::spawn(manager.run(request_receiver, report_receiver, bell));
        Ok(handle)
    }

    async fn run(
        mut self,
        mut requests: mpsc::Receiver<ManagerRequest>,
        mut catch_up_reports: mpsc::Receiver<CatchUpReport>,
        bell: AsyncBell,
    ) {
        let mut next_tick = Instant::now() + TICK;
        while self.state() != NodeState::Stopped {
            self.take_missed();
            self.take_reports();
            self.take_requests(&mut requests, &mut catch_up_reports);
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick(now, unix_ms() / 1000);
            }
            self.flush();

            bell.about_to_sleep();
            if self.links.iter().any(ControlLink::is_ready) {
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
                    // Every handle has been dropped, so no shutdown can be ordered any more.
                    None => return,
                },
                Some(report) = catch_up_reports.recv() => self.on_catch_up_report(report),
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
        requests: &mut mpsc::Receiver<ManagerRequest>,
        catch_up_reports: &mut mpsc::Receiver<CatchUpReport>,
    ) {
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Ok(request) = requests.try_recv() else { break };
            self.on_request(request);
        }
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Ok(report) = catch_up_reports.try_recv() else { break };
            self.on_catch_up_report(report);
        }
    }

    fn on_report(&mut self, shard: ShardId, report: ShardReport) {
        match report {
            ShardReport::Opened { connection, hello } => {
                let encoding = hello.encoding;
                self.on_opened(SessionAddress { shard, encoding, connection }, hello);
            }
            ShardReport::Ended { connection, .. } => {
                self.with_session(shard, connection, Self::on_ended);
            }
            ShardReport::Stopped => self.on_stopped(shard),
            ShardReport::Message { connection, text } => {
                self.with_session(shard, connection, |manager, it| manager.on_message(it, &text));
            }
            ShardReport::Resume { connection, conversation, after } => {
                let scope = CatchUpScope::Conversation { conversation, after };
                self.with_session(shard, connection, |manager, it| {
                    manager.begin_catch_up(it, scope, None)
                });
            }
            ShardReport::ResumeSince { connection, cursor } => {
                let cursor = Some(CursorRequest::of_bytes(&cursor));
                self.with_session(shard, connection, |manager, it| {
                    manager.begin_catch_up(it, CatchUpScope::SinceCursor, cursor);
                });
            }
            ShardReport::GraceExpired { connection } => {
                self.with_session(shard, connection, Self::on_grace_expired);
            }
            ShardReport::Fence => {
                // The sessions that have left the directory on other threads. The session manager closes all others
                // when it removes them.
                self.take_missed();
                self.send(shard, ShardCommand::Fence);
            }
            ShardReport::Done { ticket } => self.on_done(ticket),
        }
    }

    /// Handles a report about a session, unless the session has already ended.
    fn with_session(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        handle: impl FnOnce(&mut Self, SessionAddress),
    ) {
        match self.records[shard.index()].address(connection) {
            Some(address) => handle(self, address),
            None => self.counters.reports_stale.add(1),
        }
    }

    pub(super) fn on_request(&mut self, request: ManagerRequest) {
        match request {
            ManagerRequest::Checked { address, outcome, purpose } => {
                self.on_checked(address, outcome, purpose);
            }
            ManagerRequest::MovedElsewhere(user) => self.check_registrations(&user),
            ManagerRequest::Operator(request) => self.on_operator_request(request),
            ManagerRequest::ShutDown { shutdown, stopped } => {
                self.on_shut_down(shutdown, stopped, Instant::now());
            }
        }
    }

    /// The periodic work.
    pub(super) fn tick(&mut self, now: Instant, unix_s: u64) {
        self.unix_s = unix_s;
        self.revocations.expire(unix_s);
        self.counters.revocations.set(self.revocations.len() as u64);
        self.take_lapsed();
        self.take_missed();
        self.close_missed(now);
        self.close_replaced_elsewhere();
        self.close_replaced_in_log();
        if let Some(announcer) = &self.announcer {
            announcer.flush();
        }
        self.close_expired(now, unix_s);
        self.refresh_registrations(now);
        self.advance_drain(now);
        self.records.iter_mut().for_each(SessionRecords::shrink);
    }

    pub(super) fn flush(&mut self) {
        for link in &mut self.links {
            link.flush();
        }
        let waiting: usize = self.links.iter().map(ControlLink::waiting).sum();
        self.counters.commands_waiting.set(waiting as u64);
    }
}
