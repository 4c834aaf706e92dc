//! The bookkeeping of running catch-ups: tasks, queued requests, and chunks in flight.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;

use slab::Slab;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::domain::command::Ticket;
use crate::domain::ids::{SessionAddress, ShardId};
use crate::service::sessions::catch_up::CatchUpScope;
use crate::service::sessions::client_message::CONVERSATIONS_NAMED_MAX;
use crate::service::sessions::presence::{Visibility, VisibilityState};

/// The catch-ups of one session.
#[derive(Debug, Default)]
struct SessionCatchUps {
    running: usize,
    tasks: Vec<AbortHandle>,
    queued: VecDeque<CatchUpScope>,
}

/// What to do with a new request of a session.
pub(super) enum CatchUpAdmission {
    Start(CatchUpScope),
    Queued,
    /// The session already has [`CONVERSATIONS_NAMED_MAX`] queued.
    TooMany,
}

/// All catch-ups of this node, by shard and slot.
#[derive(Debug, Default)]
pub(super) struct CatchUps {
    sessions: HashMap<(ShardId, u32), SessionCatchUps>,
    /// The visibility of sessions that may still request a catch-up (`ROUTING_MODE=group`).
    visibilities: HashMap<(ShardId, u32), Arc<Visibility>>,
    /// Chunks in flight by ticket: the shard, and the task to notify.
    chunks: Slab<(ShardId, oneshot::Sender<()>)>,
}

/// The key of a session in [`CatchUps`].
fn slot(address: SessionAddress) -> (ShardId, u32) {
    (address.shard, address.connection.slot)
}

impl CatchUps {
    /// Keeps the visibility of a session that was just admitted.
    pub(super) fn expect(&mut self, address: SessionAddress, visibility: Arc<Visibility>) {
        self.visibilities.insert(slot(address), visibility);
    }

    /// The session will not request a catch-up.
    pub(super) fn expect_none(&mut self, address: SessionAddress) {
        self.visibilities.remove(&slot(address));
    }

    /// What this catch-up has to wait for. `None`: no other node hands over events, or every one
    /// already does.
    pub(super) fn visibility(
        &mut self,
        address: SessionAddress,
        scope: &CatchUpScope,
    ) -> Option<Arc<Visibility>> {
        let key = slot(address);
        match scope {
            // A session has only one of these.
            CatchUpScope::Session(_) => self.visibilities.remove(&key),
            CatchUpScope::SinceCursor => None,
            CatchUpScope::Conversation { .. } => {
                let visibility = Arc::clone(self.visibilities.get(&key)?);
                if visibility.state(Instant::now()) == VisibilityState::Visible {
                    self.visibilities.remove(&key);
                    return None;
                }
                Some(visibility)
            }
        }
    }

    /// Decides whether a new request starts now or is queued. `at_once`: concurrent catch-ups of one session. A
    /// WebSocket session has one for all its conversations, a gRPC session one for each.
    pub(super) fn admit(
        &mut self,
        address: SessionAddress,
        scope: CatchUpScope,
        at_once: usize,
    ) -> CatchUpAdmission {
        let session = self.sessions.entry(slot(address)).or_default();
        if session.running < at_once {
            return CatchUpAdmission::Start(scope);
        }
        if session.queued.len() >= CONVERSATIONS_NAMED_MAX {
            return CatchUpAdmission::TooMany;
        }
        session.queued.push_back(scope);
        CatchUpAdmission::Queued
    }

    pub(super) fn started(&mut self, address: SessionAddress, task: AbortHandle) {
        let session = self.sessions.entry(slot(address)).or_default();
        session.tasks.retain(|task| !task.is_finished());
        session.tasks.push(task);
        session.running += 1;
    }

    /// One catch-up of the session is complete. Returns the next one to start, and whether the
    /// session has caught up completely.
    pub(super) fn completed(&mut self, address: SessionAddress) -> (Option<CatchUpScope>, bool) {
        let key = slot(address);
        let Some(session) = self.sessions.get_mut(&key) else { return (None, false) };
        session.running = session.running.saturating_sub(1);
        let next = session.queued.pop_front();
        let is_last = next.is_none() && session.running == 0;
        if is_last {
            self.sessions.remove(&key);
        }
        (next, is_last)
    }

    /// Aborts the catch-ups of a session that has ended or is being closed.
    pub(super) fn cancel(&mut self, address: SessionAddress) {
        self.expect_none(address);
        if let Some(session) = self.sessions.remove(&slot(address)) {
            session.tasks.iter().for_each(AbortHandle::abort);
        }
    }

    /// Drops the chunks of a shard that has stopped: it will not report them done.
    pub(super) fn drop_chunks_of(&mut self, shard: ShardId) {
        self.chunks.retain(|_, (of, _)| *of != shard);
    }

    /// The ticket of a new chunk. `sent` is notified when the shard reports it done.
    pub(super) fn ticket(&mut self, shard: ShardId, sent: oneshot::Sender<()>) -> Ticket {
        let index = self.chunks.insert((shard, sent)) as u64;
        Ticket(NonZeroU64::MIN.saturating_add(index))
    }

    /// Returns false if no chunk has this ticket.
    pub(super) fn chunk_sent(&mut self, ticket: Ticket) -> bool {
        let index = (ticket.0.get() - 1) as usize;
        let chunk = self.chunks.try_remove(index);
        let is_known = chunk.is_some();
        if let Some((_, sent)) = chunk {
            // An error means that the task was aborted because its session ended.
            let _ = sent.send(());
        }
        is_known
    }
}
