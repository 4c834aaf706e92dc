//! The session manager of a node of the simulated cluster: admits sessions, and closes them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::logs::{Device, user_name};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::service::cluster::announcer::SessionAnnouncer;
use crate::service::cluster::holder::SessionSerial;
use crate::service::cluster::missed::MissedSessions;
use crate::service::cluster::nodes::EpochEnd;
use crate::service::cluster::own_epoch::OwnEpoch;
use crate::service::cluster::ports::NodeEpoch;
use crate::service::cluster::table::TableListener;
use crate::service::cluster::wire::Lease;
use crate::service::members::directory::{Directory, SessionIds};

/// A session that the node closed.
#[derive(Debug)]
pub(super) enum ClosedSession {
    /// It missed events. `with_all`: so did all sessions of its node since it began, or its epoch has ended.
    Missed { slot: u32, with_all: bool },
    /// A newer one of the same device began on another node.
    Replaced { slot: u32, epoch: u64, serial: u64 },
}

/// Passes on what the table says about the node, and remembers which epochs ended.
pub(super) struct EpochWatch {
    own: Arc<OwnEpoch>,
    epoch: AtomicU64,
    ended: Mutex<Vec<(u64, EpochEnd)>>,
}

impl EpochWatch {
    pub(super) fn new(own: Arc<OwnEpoch>) -> Self {
        Self { own, epoch: AtomicU64::new(0), ended: Mutex::default() }
    }

    pub(super) fn set_epoch(&self, epoch: NodeEpoch) {
        self.epoch.store(epoch.0, Ordering::Relaxed);
    }
}

impl TableListener for EpochWatch {
    fn begun(&self, serial: SessionSerial, offset: i64) {
        self.own.begun(serial, offset);
    }

    fn replaced(&self, user: &str, device: &str, up_to: SessionSerial) {
        self.own.replaced(user, device, up_to);
    }

    fn ended(&self, why: EpochEnd, by: Option<&Lease>) {
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.ended.lock().expect("one thread").push((epoch, why));
        self.own.ended(why, by);
    }
}

/// A session that the manager holds.
struct ManagedSession {
    device: Device,
    epoch: u64,
    /// Losses of all sessions of the node before it began.
    losses: u64,
}

pub(super) struct SimulatedManager {
    directory: Arc<Directory>,
    announcer: Arc<SessionAnnouncer>,
    missed: Arc<MissedSessions>,
    watch: Arc<EpochWatch>,
    /// How often hand-offs to the node were deleted before it read them.
    hand_offs_lost: Arc<AtomicU64>,
    epochs_ended: u64,
    slot: u32,
    held: BTreeMap<u32, ManagedSession>,
}

pub(super) fn ids((user, device): Device) -> SessionIds {
    SessionIds::new(&user_name(user), &format!("device-{device}"))
}

pub(super) fn address(slot: u32) -> SessionAddress {
    SessionAddress {
        shard: ShardId(0),
        encoding: Encoding::Binary,
        connection: ConnectionKey { slot, generation: 0 },
    }
}

impl SimulatedManager {
    pub(super) fn new(
        directory: Arc<Directory>,
        announcer: Arc<SessionAnnouncer>,
        missed: Arc<MissedSessions>,
        watch: Arc<EpochWatch>,
        hand_offs_lost: Arc<AtomicU64>,
    ) -> Self {
        Self {
            directory,
            announcer,
            missed,
            watch,
            hand_offs_lost,
            epochs_ended: 0,
            slot: 0,
            held: BTreeMap::new(),
        }
    }

    /// How often hand-offs to the node were deleted before it read them.
    pub(super) fn losses(&self) -> u64 {
        self.hand_offs_lost.load(Ordering::Relaxed)
    }

    /// The epochs that have ended since the last call.
    pub(super) fn take_ended(&mut self) -> Vec<(u64, EpochEnd)> {
        let ended = std::mem::take(&mut *self.watch.ended.lock().expect("one thread"));
        self.epochs_ended += ended.len() as u64;
        ended
    }

    pub(super) fn flush(&self) {
        self.announcer.flush();
    }

    /// Does what the log and the routers report. Returns the sessions that it closed. To be called after
    /// [`SimulatedManager::take_ended`].
    pub(super) fn close_sessions(&mut self) -> Vec<ClosedSession> {
        let mut closed = Vec::new();
        let mut batch = self.missed.take();
        // The order of hash tables differs between runs.
        batch.left.sort_unstable_by_key(|(_, address)| address.connection.slot);
        let mut named: Vec<_> = batch.named.iter().map(|it| it.connection.slot).collect();
        named.sort_unstable();
        let losses = self.losses() + self.epochs_ended;
        for (ids, address) in batch.left {
            match self.directory.find(&ids) {
                None => self.announcer.ended(&ids, address),
                Some(_) => self.announcer.replaced(&ids, address),
            }
            let slot = address.connection.slot;
            if let Some(session) = self.held.remove(&slot) {
                closed.push(ClosedSession::Missed { slot, with_all: losses > session.losses });
            }
        }
        for slot in named {
            if let Some(session) = self.held.get(&slot) {
                let with_all = losses > session.losses;
                self.end(slot);
                closed.push(ClosedSession::Missed { slot, with_all });
            }
        }
        let mut replaced: Vec<_> = self.announcer.take_replaced().into_iter().collect();
        replaced.sort_unstable_by(|(one, _), (other, _)| {
            one.user().cmp(other.user()).then_with(|| one.device().cmp(other.device()))
        });
        for (ids, up_to) in replaced {
            let Some(address) = self.directory.find(&ids) else { continue };
            let Some(serial) = self.announcer.serial(address).filter(|serial| *serial <= up_to)
            else {
                continue;
            };
            let slot = address.connection.slot;
            if let Some(session) = self.held.get(&slot) {
                let epoch = session.epoch;
                self.end(slot);
                closed.push(ClosedSession::Replaced { slot, epoch, serial: serial.0 });
            }
        }
        closed
    }

    /// Admits a session. Returns its slot; `None`: it was refused.
    pub(super) fn admit(&mut self, device: Device) -> Option<u32> {
        let (slot, ids) = (self.slot + 1, ids(device));
        let epoch = self.announcer.began(&ids, address(slot)).ok()?;
        self.slot = slot;
        if let Some(former) = self.directory.insert(ids.clone(), address(slot)) {
            self.held.remove(&former.connection.slot);
            self.announcer.replaced(&ids, former);
        }
        self.announcer.admitted(address(slot), epoch);
        let losses = self.losses() + self.epochs_ended;
        self.held.insert(slot, ManagedSession { device, epoch: epoch.0, losses });
        Some(slot)
    }

    /// A session ends.
    pub(super) fn end(&mut self, slot: u32) {
        let Some(session) = self.held.remove(&slot) else { return };
        let ids = ids(session.device);
        if self.directory.remove(&ids, address(slot)) {
            self.announcer.ended(&ids, address(slot));
        }
    }

    /// All sessions end.
    pub(super) fn end_all(&mut self) {
        for slot in self.held.keys().copied().collect::<Vec<_>>() {
            self.end(slot);
        }
    }
}
