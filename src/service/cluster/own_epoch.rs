//! What the sessions topic says about this node: whether its epoch lives, which of its sessions are stored,
//! and which have been replaced on another node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::holder::{Holder, SessionSerial};
use super::nodes::EpochEnd;
use super::ports::NodeEpoch;
use super::table::TableListener;
use super::wire::Lease;
use crate::domain::ids::SessionAddress;
use crate::service::backends::ports::MissedEvents;
use crate::service::members::directory::SessionIds;

/// How the epoch of this node ended.
#[derive(Clone, Debug, PartialEq)]
pub struct EndedEpoch {
    /// Why.
    pub why: EpochEnd,
    /// The lease of the node that has its place.
    pub by: Option<Lease>,
}

#[derive(Debug, Default)]
struct OwnState {
    /// The epoch whose lease is in the table: sessions may be admitted under it.
    living: Option<NodeEpoch>,
    ended: Option<EndedEpoch>,
    /// Sessions replaced on other nodes; those with a serial up to this one. Only sessions whose beginning is
    /// in the table are told, so there are never more than sessions.
    replaced: HashMap<SessionIds, SessionSerial>,
}

/// The node's own epoch and sessions. The thread that applies the topic writes it, the session manager and the
/// keeper of the lease read it.
pub struct OwnEpoch {
    holder: Arc<Mutex<Holder>>,
    missed: Arc<dyn MissedEvents>,
    state: Mutex<OwnState>,
}

impl OwnEpoch {
    /// No epoch lives yet.
    pub fn new(holder: Arc<Mutex<Holder>>, missed: Arc<dyn MissedEvents>) -> Self {
        Self { holder, missed, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, OwnState> {
        self.state.lock().expect("no holder panics")
    }

    pub(super) fn holder(&self) -> MutexGuard<'_, Holder> {
        self.holder.lock().expect("no holder panics")
    }

    /// The epoch under which sessions may be admitted now.
    pub fn living(&self) -> Option<NodeEpoch> {
        self.state().living
    }

    /// The table shows the lease of this epoch. Returns false if it has ended since.
    pub fn begin(&self, epoch: NodeEpoch) -> bool {
        let mut state = self.state();
        if state.ended.is_none() {
            state.living = Some(epoch);
        }
        state.living.is_some()
    }

    /// How the last epoch ended, once.
    pub(super) fn take_ended(&self) -> Option<EndedEpoch> {
        self.state().ended.take()
    }

    /// Sessions that began on another node later than here: those with a serial up to this one.
    pub(super) fn take_replaced(&self) -> HashMap<SessionIds, SessionSerial> {
        std::mem::take(&mut self.state().replaced)
    }

    /// Reports a session that was admitted while the epoch ended.
    pub(super) fn missed(&self, session: SessionAddress) {
        self.holder().ended(session);
        self.missed.missed(session);
    }
}

impl TableListener for OwnEpoch {
    fn begun(&self, serial: SessionSerial, offset: i64) {
        self.holder().stored(serial, offset);
    }

    fn replaced(&self, user: &str, device: &str, up_to: SessionSerial) {
        self.state().replaced.insert(SessionIds::new(user, device), up_to);
    }

    /// No owner hands over to the epoch any more, so all sessions have missed events. From now on none is
    /// admitted until the next epoch lives.
    fn ended(&self, why: EpochEnd, by: Option<&Lease>) {
        let mut state = self.state();
        // In this order: whoever admits a session looks at `living` before and after it puts the session into
        // the directory.
        state.living = None;
        state.ended = Some(EndedEpoch { why, by: by.cloned() });
        state.replaced.clear();
        drop(state);
        self.missed.missed_by_all();
    }
}
