//! The session manager's state, and the actions that its handlers share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::catch_ups::CatchUps;
use super::drain::Drain;
use super::links::ControlLink;
use super::missed_closes::MissedCloses;
use super::node_state::NodeState;
use super::records::{SessionRecord, SessionRecords, SessionState};
use super::revocations::Revocations;
use super::sweep::Sweep;
use super::{ManagerRequest, SessionConfig, SessionCounters, SessionPorts};
use crate::domain::close::{Close, EndReason};
use crate::domain::command::ShardCommand;
use crate::domain::ids::{SessionAddress, ShardId};
use crate::service::cluster::announcer::SessionAnnouncer;
use crate::service::cluster::missed::MissedSessions;
use crate::service::events::timestamp::unix_ms;
use crate::service::members::directory::{Directory, SessionIds};
use crate::service::sessions::auth::Authenticator;
use crate::service::sessions::catch_up::{CatchUpReport, CatchUpService};
use crate::service::sessions::presence::Presence;

/// Period in which every token's expiry is checked once: a session is closed at most this late.
const EXPIRY_SWEEP: Duration = Duration::from_secs(2);

/// The session manager. [`SessionManager::spawn`] starts its task.
pub struct SessionManager {
    pub(super) config: SessionConfig,
    pub(super) links: Vec<ControlLink>,
    pub(super) records: Vec<SessionRecords>,
    pub(super) directory: Arc<Directory>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) presence: Presence,
    pub(super) catch_up: CatchUpService,
    pub(super) counters: Arc<SessionCounters>,
    /// Given to the token checks that the manager starts. Weak, so that the manager ends with its
    /// last handle.
    pub(super) requests: mpsc::WeakSender<ManagerRequest>,
    /// Given to the catch-ups that the manager starts.
    pub(super) catch_up_reports: mpsc::Sender<CatchUpReport>,
    pub(super) catch_ups: CatchUps,
    pub(super) refresh_sweep: Sweep,
    pub(super) expiry_sweep: Sweep,
    /// Read by the manager's handles.
    pub(super) node_state: watch::Sender<NodeState>,
    pub(super) drain: Option<Drain>,
    pub(super) announcer: Option<Arc<SessionAnnouncer>>,
    pub(super) missed: Arc<MissedSessions>,
    pub(super) missed_closes: MissedCloses,
    pub(super) revocations: Revocations,
    /// Unix time at the last tick, seconds.
    pub(super) unix_s: u64,
    /// Callers that wait for the last shard to stop.
    pub(super) shutdown_waiters: Vec<oneshot::Sender<()>>,
}

impl SessionManager {
    pub(super) fn new(
        config: SessionConfig,
        ports: SessionPorts,
        counters: Arc<SessionCounters>,
        requests: mpsc::WeakSender<ManagerRequest>,
        catch_up_reports: mpsc::Sender<CatchUpReport>,
        node_state: watch::Sender<NodeState>,
    ) -> Self {
        let unix_s = unix_ms() / 1000;
        let mut revocations = Revocations::new(config.revocations_kept);
        for revoked in &config.revoked {
            let _ = revocations.add(revoked, unix_s);
        }
        let count = u16::try_from(ports.shards.len()).expect("shards are numbered in 16 bits");
        Self {
            links: ports.shards.into_iter().map(ControlLink::new).collect(),
            records: (0..count).map(|shard| SessionRecords::new(ShardId(shard))).collect(),
            directory: ports.directory,
            auth: ports.auth,
            refresh_sweep: Sweep::new(ports.presence.refresh_interval()),
            expiry_sweep: Sweep::new(EXPIRY_SWEEP),
            presence: ports.presence,
            catch_up: ports.catch_up,
            counters,
            requests,
            catch_up_reports,
            catch_ups: CatchUps::default(),
            node_state,
            drain: None,
            announcer: ports.announcer,
            missed: ports.missed,
            missed_closes: MissedCloses::new(config.missed_per_second),
            revocations,
            unix_s,
            config,
            shutdown_waiters: Vec::new(),
        }
    }

    pub(super) fn state(&self) -> NodeState {
        *self.node_state.borrow()
    }

    pub(super) fn send(&mut self, shard: ShardId, command: ShardCommand) {
        self.links[shard.index()].send(command);
    }

    /// Sends a session a close frame; the shard reports its end later. Returns false, and does
    /// nothing, if the session is not open.
    pub(super) fn close(&mut self, address: SessionAddress, close: Close, why: EndReason) -> bool {
        let Some(record) = self.record(address) else { return false };
        if !record.is_open() {
            return false;
        }
        record.state = SessionState::Closing;
        self.catch_ups.cancel(address);
        let connection = address.connection;
        self.send(address.shard, ShardCommand::Close { connection, close, why });
        true
    }

    /// Takes a session out of the directory, and tells the other nodes. Returns whether it was in it.
    pub(super) fn leave(&mut self, ids: &SessionIds, address: SessionAddress) -> bool {
        let was_in = self.directory.remove(ids, address);
        if was_in && let Some(announcer) = &self.announcer {
            announcer.ended(ids, address);
        }
        was_in
    }

    /// The record of a session, if it still holds its slot.
    pub(super) fn record(&mut self, address: SessionAddress) -> Option<&mut SessionRecord> {
        self.records[address.shard.index()].get(address.connection)
    }

    pub(super) fn is_live(&mut self, address: SessionAddress) -> bool {
        self.record(address).is_some_and(|record| record.state == SessionState::Live)
    }

    /// Slots that the largest shard has used.
    pub(super) fn slots_max(&self) -> usize {
        self.records.iter().map(SessionRecords::len).max().unwrap_or(0)
    }
}
