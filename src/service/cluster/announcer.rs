//! Announces the beginnings and ends of this node's sessions in the sessions topic.
//!
//! While the queue of the topic is full, changes wait here, at most one per user and device: the last one.
//! Beginnings are written in the order of their serials, because other parts compare serials to know which
//! beginnings were read.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use prost::Message as _;

use super::holder::SessionSerial;
use super::own_epoch::OwnEpoch;
use super::ports::{NodeEpoch, SessionsWriter};
use super::table::SessionTable;
use super::wire::{SessionBegun, SessionsKey};
use crate::counters;
use crate::domain::ids::SessionAddress;
use crate::service::members::directory::SessionIds;

/// Changes that may wait before new sessions are refused: those of 6 s at 10,000 beginnings a second.
pub const CHANGES_WAITING_MAX: usize = 65_536;

counters! {
    /// Metrics of the announcer.
    pub struct AnnouncerCounters of SharedCounter {
        Counter begun: "Beginnings of sessions of this node that were queued for the sessions topic.",
        Counter ended: "Ends of sessions of this node that were queued for the sessions topic.",
        Gauge waiting: "Changes of sessions that wait because the queue of the sessions topic is full.",
        Counter refused_waiting: "Sessions refused with 503 because too many changes waited.",
        Counter refused_no_lease: "Sessions refused with 503 because the lease of this node was not stored yet.",
    }
}

/// Why a session cannot be announced, so that it is not to be admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unannounced {
    /// The lease of this node is not stored yet.
    NoLease,
    /// Too many changes wait: the topic cannot be written.
    Full,
}

#[derive(Debug)]
struct WaitingChange {
    /// Its key in the order.
    turn: u64,
    /// `None`: the end.
    begun: Option<SessionBegun>,
    /// The topic may hold an earlier beginning with this key, so that the end has to be written.
    is_stored: bool,
    /// Whether `is_stored` follows from a change that waited before.
    is_certain: bool,
}

#[derive(Debug, Default)]
struct AnnouncerState {
    /// What waits was said under this epoch.
    epoch: Option<NodeEpoch>,
    last_serial: u64,
    last_turn: u64,
    waiting: HashMap<SessionIds, WaitingChange>,
    /// What waits, oldest change first.
    order: BTreeMap<u64, SessionIds>,
}

impl AnnouncerState {
    /// Drops what was said under an epoch that has ended: all readers ignore it.
    fn follow(&mut self, epoch: Option<NodeEpoch>) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.waiting.clear();
            self.order.clear();
        }
    }

    fn take(&mut self, ids: &SessionIds) -> Option<WaitingChange> {
        let change = self.waiting.remove(ids)?;
        self.order.remove(&change.turn);
        Some(change)
    }

    fn wait(&mut self, ids: &SessionIds, change: WaitingChange) {
        self.order.insert(change.turn, ids.clone());
        self.waiting.insert(ids.clone(), change);
    }

    fn next_turn(&mut self) -> u64 {
        self.last_turn += 1;
        self.last_turn
    }
}

/// Announces sessions. Used by the session manager; see [`SessionAnnouncer::began`] for the order of calls.
pub struct SessionAnnouncer {
    own: Arc<OwnEpoch>,
    table: Arc<SessionTable>,
    writer: Arc<dyn SessionsWriter>,
    waiting_max: usize,
    state: Mutex<AnnouncerState>,
    counters: Arc<AnnouncerCounters>,
}

impl SessionAnnouncer {
    /// `table` has `own` as its listener. `waiting_max`: see [`CHANGES_WAITING_MAX`].
    pub fn new(
        own: Arc<OwnEpoch>,
        table: Arc<SessionTable>,
        writer: Arc<dyn SessionsWriter>,
        waiting_max: usize,
        counters: Arc<AnnouncerCounters>,
    ) -> Self {
        Self { own, table, writer, waiting_max, state: Mutex::default(), counters }
    }

    fn state(&self) -> MutexGuard<'_, AnnouncerState> {
        self.state.lock().expect("no holder panics")
    }

    /// A session is about to be admitted: call this, answer the handshake, insert the session into the
    /// directory, then call [`SessionAnnouncer::admitted`] with what this returns.
    ///
    /// # Errors
    /// The session must be refused; see [`Unannounced`].
    pub fn began(
        &self,
        ids: &SessionIds,
        address: SessionAddress,
    ) -> Result<NodeEpoch, Unannounced> {
        let Some(epoch) = self.own.living() else {
            self.counters.refused_no_lease.add(1);
            return Err(Unannounced::NoLease);
        };
        let mut state = self.state();
        state.follow(Some(epoch));
        if state.waiting.len() >= self.waiting_max {
            self.counters.refused_waiting.add(1);
            return Err(Unannounced::Full);
        }
        state.last_serial += 1;
        let serial = state.last_serial;
        self.own.holder().began(SessionSerial(serial), address);
        let begun = SessionBegun { serial, as_of: self.table.next_offset() };
        let before = state.take(ids);
        if state.order.is_empty() && before.is_none() && self.write(epoch, ids, Some(&begun)) {
            return Ok(epoch);
        }
        let change = WaitingChange {
            turn: state.next_turn(),
            begun: Some(begun),
            is_stored: before.as_ref().is_some_and(|before| before.is_stored),
            is_certain: before.is_some(),
        };
        state.wait(ids, change);
        self.flush_state(&mut state);
        Ok(epoch)
    }

    /// The session is in the directory. If the epoch has ended meanwhile, it is closed as one that has missed
    /// events.
    pub fn admitted(&self, session: SessionAddress, epoch: NodeEpoch) {
        if self.own.living() != Some(epoch) {
            self.own.missed(session);
        }
    }

    /// A later session of the same user and device has taken the place of this one in the directory. Nothing
    /// is written for it.
    pub fn replaced(&self, ids: &SessionIds, former: SessionAddress) {
        self.own.holder().ended(former);
        if let Some(change) = self.state().waiting.get_mut(ids)
            && !change.is_certain
        {
            change.is_stored = true;
        }
    }

    /// A session has left the directory, which has no other one of this user and device.
    pub fn ended(&self, ids: &SessionIds, session: SessionAddress) {
        self.own.holder().ended(session);
        let mut state = self.state();
        state.follow(self.own.living());
        let Some(epoch) = state.epoch else { return };
        let before = state.take(ids);
        if before.as_ref().is_some_and(|before| !before.is_stored) {
            self.counters.waiting.set(state.waiting.len() as u64);
            return;
        }
        if state.order.is_empty() && before.is_none() && self.write(epoch, ids, None) {
            return;
        }
        let turn = state.next_turn();
        state.wait(ids, WaitingChange { turn, begun: None, is_stored: true, is_certain: true });
        self.flush_state(&mut state);
    }

    /// The serial of a session that has not ended.
    pub fn serial(&self, session: SessionAddress) -> Option<SessionSerial> {
        self.own.holder().serial(session)
    }

    /// Sessions that began on another node later than here: those with a serial up to this one.
    pub fn take_replaced(&self) -> HashMap<SessionIds, SessionSerial> {
        self.own.take_replaced()
    }

    /// Writes what waits, as far as there is room. Returns whether nothing waits any more. To be called
    /// periodically.
    pub fn flush(&self) -> bool {
        let mut state = self.state();
        state.follow(self.own.living());
        self.flush_state(&mut state)
    }

    fn flush_state(&self, state: &mut AnnouncerState) -> bool {
        if let Some(epoch) = state.epoch {
            while let Some(first) = state.order.first_entry() {
                let ids = first.get();
                if !self.write(epoch, ids, state.waiting[ids].begun.as_ref()) {
                    break;
                }
                state.waiting.remove(&first.remove());
            }
        }
        self.counters.waiting.set(state.waiting.len() as u64);
        state.waiting.is_empty()
    }

    fn write(&self, epoch: NodeEpoch, ids: &SessionIds, begun: Option<&SessionBegun>) -> bool {
        let key =
            SessionsKey { epoch: epoch.0, user: ids.user().into(), device: ids.device().into() };
        let value = begun.map(SessionBegun::encode_to_vec);
        let is_queued = self.writer.write(&key, value.as_deref());
        if is_queued {
            match begun {
                Some(_) => self.counters.begun.add(1),
                None => self.counters.ended.add(1),
            }
        }
        is_queued
    }
}
