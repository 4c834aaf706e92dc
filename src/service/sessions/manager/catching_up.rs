//! The sessions that are catching up: what their tasks hand over, and what the shards report back.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;

use slab::Slab;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::records::CatchUpState;
use super::state::Manager;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, Ticket};
use crate::domain::event::Event;
use crate::domain::ids::{ConnectionKey, ConversationPosition, SessionAddress, ShardId};
use crate::service::sessions::catch_up::{
    CatchUpReport, CatchUpRequest, CatchUpScope, CatchUpStart, CatchUpStep,
};
use crate::service::sessions::client_message::CONVERSATIONS_NAMED_MAX;
use crate::service::sessions::presence::{Visibility, VisibilityState};

/// Catch-ups of one session at once: a WebSocket session has one for all its conversations, a
/// gRPC session one for each.
const CATCH_UPS_AT_ONCE: usize = 4;
/// What a gRPC session is told that names more conversations than may wait.
const TOO_MANY: Close =
    Close::new(CloseCode::POLICY_VIOLATION, "too many conversations are being caught up");

#[derive(Debug, Default)]
struct CatchUps {
    running: usize,
    tasks: Vec<AbortHandle>,
    waiting: VecDeque<CatchUpScope>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct CatchingUp {
    sessions: HashMap<(ShardId, u32), CatchUps>,
    /// How far the sessions are known that may still ask (`ROUTING_MODE=group`).
    visibilities: HashMap<(ShardId, u32), Arc<Visibility>>,
    /// Chunks under way, by ticket: which shard has it, and who waits for it.
    chunks: Slab<(ShardId, oneshot::Sender<()>)>,
}

impl CatchingUp {
    /// A session was admitted.
    pub(super) fn expect(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        visibility: Arc<Visibility>,
    ) {
        self.visibilities.insert((shard, connection.slot), visibility);
    }

    /// A session will not ask for what it missed, or not again.
    pub(super) fn expect_nothing(&mut self, shard: ShardId, connection: ConnectionKey) {
        self.visibilities.remove(&(shard, connection.slot));
    }

    /// How far a session is known that asks for this.
    fn visibility(
        &mut self,
        address: SessionAddress,
        scope: &CatchUpScope,
    ) -> Option<Arc<Visibility>> {
        let key = (address.shard, address.connection.slot);
        match scope {
            // Once in its life.
            CatchUpScope::Session(_) => self.visibilities.remove(&key),
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

    /// A session has ended, or is about to: what it missed is nobody's any more.
    pub(super) fn forget(&mut self, shard: ShardId, connection: ConnectionKey) {
        self.visibilities.remove(&(shard, connection.slot));
        if let Some(catch_ups) = self.sessions.remove(&(shard, connection.slot)) {
            for task in catch_ups.tasks {
                task.abort();
            }
        }
    }

    /// A shard has ended: nothing of it will be reported done.
    pub(super) fn forget_shard(&mut self, shard: ShardId) {
        self.chunks.retain(|_, (of, _)| *of != shard);
    }

    fn ticket(&mut self, shard: ShardId, sent: oneshot::Sender<()>) -> Ticket {
        let index = self.chunks.insert((shard, sent)) as u64;
        Ticket(NonZeroU64::MIN.saturating_add(index))
    }
}

impl Manager {
    pub(super) fn begin_catch_up(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        scope: CatchUpScope,
    ) {
        let Some(address) = self.address_of(shard, connection) else { return };
        let at_once = self.catching_up.sessions.entry((shard, connection.slot)).or_default();
        if at_once.running >= CATCH_UPS_AT_ONCE {
            if at_once.waiting.len() >= CONVERSATIONS_NAMED_MAX {
                self.close(shard, connection, TOO_MANY, EndReason::PeerAtFault);
            } else {
                at_once.waiting.push_back(scope);
            }
            return;
        }
        self.run_catch_up(address, scope);
    }

    fn run_catch_up(&mut self, address: SessionAddress, scope: CatchUpScope) {
        let (shard, connection) = (address.shard, address.connection);
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        let Some(ids) = record.ids.clone() else { return };
        let owed = match &scope {
            CatchUpScope::Session(_) => None,
            CatchUpScope::Conversation { conversation, after } => Some(ConversationPosition {
                conversation: crate::service::events::conversation_key::conversation_key(
                    conversation,
                ),
                sequence: *after,
            }),
        };
        record.catch_up = CatchUpState::Running;
        let visibility = self.catching_up.visibility(address, &scope);
        let request = CatchUpRequest { ids, address, scope, visibility };
        match self.catch_up.begin(request, self.catch_up_sender.clone()) {
            CatchUpStart::Running(task) => {
                let catch_ups =
                    self.catching_up.sessions.entry((shard, connection.slot)).or_default();
                catch_ups.tasks.retain(|task| !task.is_finished());
                catch_ups.tasks.push(task);
                catch_ups.running += 1;
            }
            CatchUpStart::Off => {
                self.catching_up.sessions.remove(&(shard, connection.slot));
                match owed {
                    None => self.nothing_missed(shard, connection),
                    Some(position) => {
                        let delivered = Box::new([position]);
                        self.send(shard, ShardCommand::GoLive { connection, delivered });
                    }
                }
            }
            CatchUpStart::Refused(close) => {
                self.close(shard, connection, close, EndReason::ClosedByService);
            }
        }
    }

    pub(super) fn on_catch_up(&mut self, CatchUpReport { address, step }: CatchUpReport) {
        let (shard, connection) = (address.shard, address.connection);
        if self.address_of(shard, connection).is_none() {
            return; // Dropping what the task waits for tells it.
        }
        match step {
            CatchUpStep::Chunk { events, sent } => self.deliver_chunk(address, events, sent),
            CatchUpStep::Complete { delivered } => {
                self.send(shard, ShardCommand::GoLive { connection, delivered });
                self.after_catch_up(address);
            }
            CatchUpStep::Failed(close) => {
                self.close(shard, connection, close, EndReason::ClosedByService);
            }
        }
    }

    fn deliver_chunk(
        &mut self,
        address: SessionAddress,
        events: Vec<Arc<Event>>,
        sent: oneshot::Sender<()>,
    ) {
        let Some(last) = events.len().checked_sub(1) else { return };
        let mut ticket = Some(self.catching_up.ticket(address.shard, sent));
        for (index, event) in events.into_iter().enumerate() {
            let command = ShardCommand::Deliver {
                event,
                recipients: Recipients::One(address.connection, address.encoding),
                class: DeliveryClass::CatchUp,
                // The queue keeps the order: when the last is sent, so are the others.
                ticket: if index == last { ticket.take() } else { None },
            };
            self.send(address.shard, command);
        }
    }

    fn after_catch_up(&mut self, address: SessionAddress) {
        let key = (address.shard, address.connection.slot);
        let Some(catch_ups) = self.catching_up.sessions.get_mut(&key) else { return };
        catch_ups.running = catch_ups.running.saturating_sub(1);
        let next = catch_ups.waiting.pop_front();
        if next.is_none() && catch_ups.running == 0 {
            self.catching_up.sessions.remove(&key);
            if let Some(record) = self.records[address.shard.index()].get(address.connection) {
                record.catch_up = CatchUpState::Done;
            }
        }
        if let Some(scope) = next {
            self.run_catch_up(address, scope);
        }
    }

    pub(super) fn on_done(&mut self, ticket: Ticket) {
        let index = (ticket.0.get() - 1) as usize;
        match self.catching_up.chunks.try_remove(index) {
            // The task may be gone: its session ended.
            Some((_, sent)) => drop(sent.send(())),
            None => self.counters.reports_stale.add(1),
        }
    }
}
