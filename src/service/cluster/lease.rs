//! The lease of this node: from the start of the node, over renewals, to its end.
//!
//! ```text
//! Reading ──► Watching ──► Announcing ──► Living ──► Stopping ──► Stopped
//!    └─────────────────────────►▲ └──◄──────┘ silent: a new epoch
//!                └──► InUse ◄───┴───────────┘ another node has the instance
//! ```

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use prost::Message as _;
use tokio::sync::watch;

use super::announcer::SessionAnnouncer;
use super::nodes::{EpochEnd, RENEWAL_MS};
use super::own_epoch::{EndedEpoch, OwnEpoch};
use super::ports::{NodeEpoch, SessionsWriter};
use super::table::SessionTable;
use super::wire::{Lease, SessionsKey, TopicPositions};

/// Renewals after which a node that did not renew is taken to be gone.
const RENEWALS_WATCHED: u64 = 3;
/// How long a node that has read the topic to its end waits for the leases of nodes of which it has read sessions,
/// ms. Long, because a node that it takes for dead by mistake has to close all its sessions.
const LEASES_AWAITED_MS: u64 = 60_000;
/// Time between two turns of the keeper.
const TURN: Duration = Duration::from_millis(100);

/// Another node has the same `INSTANCE_ID`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "INSTANCE_ID: another node has the instance {instance} (host {host}, version {version}): \
     give each node its own, or stop the other one"
)]
pub struct InstanceInUse {
    /// The instance.
    pub instance: String,
    /// Where the other node runs.
    pub host: String,
    /// Its version.
    pub version: String,
}

impl InstanceInUse {
    fn by(lease: Lease) -> Self {
        Self { instance: lease.instance, host: lease.host, version: lease.version }
    }
}

/// State of the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// The table is not read to its end yet.
    Reading,
    /// There is a lease of this instance: does its node renew it?
    Watching,
    /// The first lease of an epoch is written, and not in the table yet.
    Announcing,
    /// Sessions may be admitted, and partitions claimed.
    Living,
    /// The node must stop: another one has its instance.
    InUse(InstanceInUse),
    /// The ends of the last sessions are being written.
    Stopping,
    /// Everything is queued.
    Stopped,
}

/// What the keeper of the lease needs.
pub struct LeaseParts {
    /// `INSTANCE_ID`.
    pub instance: String,
    /// Where the node runs, for people.
    pub host: String,
    /// Version of the program.
    pub version: String,
    /// The partition of the hand-off topic that the node reads, known at the latest when the table is read.
    pub hand_off_partition: Box<dyn Fn() -> Option<i32> + Send>,
    /// Its listener is `own`.
    pub table: Arc<SessionTable>,
    /// What the table says about this node.
    pub own: Arc<OwnEpoch>,
    /// Flushed before the lease ends.
    pub announcer: Arc<SessionAnnouncer>,
    /// Where leases are written.
    pub writer: Arc<dyn SessionsWriter>,
    /// Whether the table is read to the end that the topic had at the start.
    pub is_read: Box<dyn Fn() -> bool + Send>,
    /// The partitions that the node owns, and the next offset that it routes in each.
    pub routed: Box<dyn Fn() -> Vec<TopicPositions> + Send>,
    /// Tells the reader of the hand-off topic the epoch, before the table shows it.
    pub set_epoch: Box<dyn Fn(NodeEpoch) + Send>,
    /// A random epoch, not 0.
    pub new_epoch: Box<dyn FnMut() -> NodeEpoch + Send>,
}

/// Keeps the lease of this node.
pub struct LeaseKeeper {
    parts: LeaseParts,
    state: LeaseState,
    epoch: NodeEpoch,
    /// The epoch of a node that is gone, and the renewals that were seen of it.
    watched: Option<(NodeEpoch, u64)>,
    watch_until_ms: u64,
    /// Until when nodes without a lease are waited for; `None`: not at all.
    leases_until_ms: Option<u64>,
    replaces: u64,
    /// The first epoch of this process.
    process: u64,
    /// Epochs of this process.
    number: u32,
    /// The offset up to which the table was read when the epoch began.
    as_of: i64,
    is_written: bool,
    renew_at_ms: u64,
    /// Topic, partition and generation of what the last lease stated.
    stated: HashSet<(String, i32, i64)>,
}

/// Topic, partition and generation of each position.
fn owned(positions: &[TopicPositions]) -> impl Iterator<Item = (String, i32, i64)> {
    positions.iter().flat_map(|TopicPositions { topic, partitions }| {
        partitions.iter().map(|at| (topic.clone(), at.partition, at.generation))
    })
}

fn lease_key(epoch: NodeEpoch) -> SessionsKey {
    SessionsKey { epoch: epoch.0, ..SessionsKey::default() }
}

impl LeaseKeeper {
    /// A keeper that has done nothing yet.
    pub fn new(parts: LeaseParts) -> Self {
        Self {
            parts,
            state: LeaseState::Reading,
            epoch: NodeEpoch(0),
            watched: None,
            watch_until_ms: 0,
            leases_until_ms: None,
            replaces: 0,
            process: 0,
            number: 0,
            as_of: 0,
            is_written: false,
            renew_at_ms: 0,
            stated: HashSet::new(),
        }
    }

    /// The state.
    pub fn state(&self) -> &LeaseState {
        &self.state
    }

    /// Advances. To be called every 100 ms. `now_ms`: a clock that never jumps.
    pub fn turn(&mut self, now_ms: u64) {
        if let Some(ended) = self.parts.own.take_ended() {
            self.on_ended(ended);
        }
        for epoch in self.parts.table.take_woken() {
            // If the queue is full, after its next lease.
            self.parts.writer.write(&lease_key(epoch), None);
        }
        self.await_leases(now_ms);
        match self.state {
            LeaseState::Reading if (self.parts.is_read)() && self.parts.table.is_whole() => {
                self.look_for_rival(now_ms);
            }
            LeaseState::Watching => self.watch(now_ms),
            LeaseState::Announcing => self.announce(now_ms),
            LeaseState::Living if now_ms >= self.renew_at_ms || self.has_new_partitions() => {
                self.renew(now_ms);
            }
            LeaseState::Stopping => self.finish(),
            _ => {}
        }
    }

    /// The node stops: its sessions have ended. Their ends are written, then that of the lease.
    pub fn stop(&mut self) {
        self.state = match self.state {
            LeaseState::Living | LeaseState::Announcing if self.is_written => LeaseState::Stopping,
            LeaseState::Stopping => LeaseState::Stopping,
            _ => LeaseState::Stopped,
        };
    }

    /// A living node renews its lease soon; one that does not is gone. Also while this node lives: it can have lost its
    /// position in the topic.
    fn await_leases(&mut self, now_ms: u64) {
        if self.parts.table.is_whole() || !(self.parts.is_read)() {
            self.leases_until_ms = None;
        } else if now_ms >= *self.leases_until_ms.get_or_insert(now_ms + LEASES_AWAITED_MS) {
            self.parts.table.end_unleased();
        }
    }

    fn look_for_rival(&mut self, now_ms: u64) {
        let rival = self.parts.table.node_of_instance(&self.parts.instance);
        match rival {
            None => self.begin(0, now_ms),
            Some((epoch, lease)) => {
                tracing::info!(
                    instance = lease.instance,
                    host = lease.host,
                    "this instance has a lease: watching whether it is renewed"
                );
                self.watched = Some((epoch, self.parts.table.renewals(epoch).unwrap_or(0)));
                self.watch_until_ms = now_ms + RENEWALS_WATCHED * RENEWAL_MS as u64;
                self.state = LeaseState::Watching;
            }
        }
    }

    fn watch(&mut self, now_ms: u64) {
        let Some((rival, seen)) = self.watched else { return };
        match self.parts.table.renewals(rival) {
            // It has stopped. Another one may have come.
            None => self.look_for_rival(now_ms),
            Some(renewals) if renewals > seen => {
                let lease = self.parts.table.node_of_instance(&self.parts.instance);
                let lease = lease.map(|(_, lease)| lease).unwrap_or_default();
                self.state = LeaseState::InUse(InstanceInUse::by(lease));
            }
            Some(_) if now_ms >= self.watch_until_ms => self.begin(rival.0, now_ms),
            Some(_) => {}
        }
    }

    /// Begins an epoch.
    fn begin(&mut self, replaces: u64, now_ms: u64) {
        self.replaces = replaces;
        self.epoch = (self.parts.new_epoch)();
        if self.number == 0 {
            self.process = self.epoch.0;
        }
        self.number += 1;
        self.as_of = self.parts.table.next_offset();
        self.is_written = false;
        self.state = LeaseState::Announcing;
        self.parts.table.set_own_epoch(self.epoch);
        (self.parts.set_epoch)(self.epoch);
        self.announce(now_ms);
    }

    fn announce(&mut self, now_ms: u64) {
        if !self.is_written {
            self.is_written = self.write();
            self.renew_at_ms = now_ms + RENEWAL_MS as u64;
        }
        if self.parts.table.has_lease(self.epoch) && self.parts.own.begin(self.epoch) {
            self.state = LeaseState::Living;
        }
    }

    /// Whether the node owns partitions that its last lease does not state: others count from that statement.
    fn has_new_partitions(&self) -> bool {
        owned(&(self.parts.routed)()).any(|partition| !self.stated.contains(&partition))
    }

    fn renew(&mut self, now_ms: u64) {
        // If the queue is full, at the next turn.
        if self.write() {
            self.renew_at_ms = now_ms + RENEWAL_MS as u64;
        }
    }

    fn write(&mut self) -> bool {
        let parts = &self.parts;
        let Some(hand_off_partition) = (parts.hand_off_partition)() else { return false };
        let routed = (parts.routed)();
        let stated = owned(&routed).collect();
        let lease = Lease {
            instance: parts.instance.clone(),
            hand_off_partition,
            version: parts.version.clone(),
            host: parts.host.clone(),
            replaces: self.replaces,
            process: self.process,
            number: self.number,
            routed,
            as_of: self.as_of,
            since: parts.table.first_lease(self.epoch).unwrap_or(0),
            answers_replays: true,
        };
        let is_queued = parts.writer.write(&lease_key(self.epoch), Some(&lease.encode_to_vec()));
        if is_queued {
            self.stated = stated;
        }
        is_queued
    }

    fn on_ended(&mut self, EndedEpoch { why, by }: EndedEpoch) {
        let is_over = matches!(self.state, LeaseState::Stopping | LeaseState::Stopped);
        if is_over {
            self.state = LeaseState::Stopped;
            return;
        }
        match why {
            EpochEnd::Refused | EpochEnd::Replaced => {
                self.state = LeaseState::InUse(InstanceInUse::by(by.unwrap_or_default()));
            }
            EpochEnd::Silent | EpochEnd::Stopped | EpochEnd::Lost => {
                tracing::warn!(
                    "the lease was not renewed in time: all sessions are closed with 4409"
                );
                self.state = LeaseState::Reading;
            }
        }
    }

    fn finish(&mut self) {
        if self.parts.announcer.flush() && self.parts.writer.write(&lease_key(self.epoch), None) {
            self.state = LeaseState::Stopped;
        }
    }
}

/// The thread of the keeper.
pub struct LeaseThread {
    state: watch::Receiver<LeaseState>,
    stop: mpsc::Sender<()>,
    /// Disconnected when the thread ends.
    ended: mpsc::Receiver<()>,
}

impl LeaseThread {
    /// Starts to keep the lease.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub fn spawn(parts: LeaseParts) -> io::Result<Self> {
        let (sender, state) = watch::channel(LeaseState::Reading);
        let (stop, stopped) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let run = move || {
            let _end: mpsc::Sender<()> = end;
            let begun = Instant::now();
            let mut keeper = LeaseKeeper::new(parts);
            while *keeper.state() != LeaseState::Stopped {
                keeper.turn(begun.elapsed().as_millis() as u64);
                sender.send_if_modified(|last| {
                    let is_new = *last != *keeper.state();
                    last.clone_from(keeper.state());
                    is_new
                });
                match stopped.recv_timeout(TURN) {
                    Ok(()) => keeper.stop(),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    // Nobody waits for the end any more.
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        thread::Builder::new().name("lease".into()).spawn(run)?;
        Ok(Self { state, stop, ended })
    }

    /// The state. Sessions and partitions wait for [`LeaseState::Living`]; [`LeaseState::InUse`] ends the node.
    pub fn state(&self) -> watch::Receiver<LeaseState> {
        self.state.clone()
    }

    /// Queues the ends that wait and that of the lease, for at most `grace`. To be called when all sessions have
    /// ended and before the writer is stopped. Blocks. Returns whether all are queued.
    pub fn stop(self, grace: Duration) -> bool {
        let _ = self.stop.send(()); // It may have ended.
        self.ended.recv_timeout(grace) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}
