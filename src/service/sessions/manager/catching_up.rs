//! Starts catch-ups, and passes their messages on to the shards.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::catch_ups::CatchUpAdmission;
use super::records::CatchUpState;
use super::state::SessionManager;
use crate::domain::caught_up::CaughtUp;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{DeliveryClass, Recipients, ShardCommand, Ticket};
use crate::domain::cursor::CursorRequest;
use crate::domain::event::Event;
use crate::domain::ids::SessionAddress;
use crate::service::events::conversation_key::conversation_key;
use crate::service::sessions::catch_up::{
    CatchUpReport, CatchUpRequest, CatchUpScope, CatchUpStart, CatchUpStep,
};

/// Closes a gRPC session that names more conversations than may be queued.
const TOO_MANY: Close =
    Close::new(CloseCode::POLICY_VIOLATION, "too many conversations are being caught up");

impl SessionManager {
    /// A session requests the messages that it missed.
    pub(super) fn begin_catch_up(
        &mut self,
        address: SessionAddress,
        scope: CatchUpScope,
        cursor: Option<CursorRequest>,
    ) {
        if !self.is_live(address) {
            return;
        }
        match self.catch_ups.admit(address, scope, self.catch_up.steps_at_once()) {
            CatchUpAdmission::Start(scope) => self.start_catch_up(address, scope, cursor),
            CatchUpAdmission::Queued => {}
            CatchUpAdmission::TooMany => {
                self.close(address, TOO_MANY, EndReason::PeerAtFault);
            }
        }
    }

    fn start_catch_up(
        &mut self,
        address: SessionAddress,
        scope: CatchUpScope,
        cursor: Option<CursorRequest>,
    ) {
        let SessionAddress { shard, connection, .. } = address;
        let Some(record) = self.record(address) else { return };
        let Some(ids) = record.ids.clone() else { return };
        let only = match &scope {
            CatchUpScope::Session(_) | CatchUpScope::SinceCursor => None,
            CatchUpScope::Conversation { conversation, .. } => Some(conversation_key(conversation)),
        };
        record.catch_up = CatchUpState::Running;
        let visibility = self.catch_ups.visibility(address, &scope);
        let request = CatchUpRequest { ids, address, scope, cursor, visibility };
        match self.catch_up.begin(request, self.catch_up_reports.clone()) {
            CatchUpStart::Running(task) => self.catch_ups.started(address, task),
            CatchUpStart::Off => {
                self.catch_ups.cancel(address);
                match only {
                    None => self.go_live(address, CatchUpState::Done),
                    Some(_) => {
                        let delivered = Box::new(CaughtUp::new(only, Vec::new()));
                        self.send(shard, ShardCommand::GoLive { connection, delivered });
                    }
                }
            }
            CatchUpStart::Refused(close) => {
                self.close(address, close, EndReason::ClosedByService);
            }
        }
    }

    pub(super) fn on_catch_up_report(&mut self, CatchUpReport { address, step }: CatchUpReport) {
        if !self.is_live(address) {
            return; // Dropping `sent` notifies the task.
        }
        match step {
            CatchUpStep::Chunk { events, sent } => self.deliver_chunk(address, events, sent),
            CatchUpStep::Complete { delivered } => {
                let connection = address.connection;
                self.send(address.shard, ShardCommand::GoLive { connection, delivered });
                self.on_catch_up_complete(address);
            }
            CatchUpStep::CursorExpired(why) => {
                let connection = address.connection;
                self.send(address.shard, ShardCommand::CursorExpired { connection, why });
            }
            CatchUpStep::MayHaveCursors => self.send_cursors(address),
            CatchUpStep::Failed(close) => {
                self.close(address, close, EndReason::ClosedByService);
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
        let mut ticket = Some(self.catch_ups.ticket(address.shard, sent));
        for (index, event) in events.into_iter().enumerate() {
            let command = ShardCommand::Deliver {
                event,
                recipients: Recipients::One((address.connection, address.encoding)),
                class: DeliveryClass::CatchUp,
                // The queue keeps the order: when the last one is sent, all are.
                ticket: if index == last { ticket.take() } else { None },
            };
            self.send(address.shard, command);
        }
    }

    fn send_cursors(&mut self, address: SessionAddress) {
        if let Some(record) = self.record(address) {
            record.cursors = true;
            let connection = address.connection;
            self.send(address.shard, ShardCommand::SendCursors { connection });
        }
    }

    fn on_catch_up_complete(&mut self, address: SessionAddress) {
        let (next, is_last) = self.catch_ups.completed(address);
        if is_last && let Some(record) = self.record(address) {
            record.catch_up = CatchUpState::Done;
        }
        if let Some(scope) = next {
            self.start_catch_up(address, scope, None);
        }
    }

    /// The socket has taken a chunk.
    pub(super) fn on_done(&mut self, ticket: Ticket) {
        if !self.catch_ups.chunk_sent(ticket) {
            self.counters.reports_stale.add(1);
        }
    }
}
