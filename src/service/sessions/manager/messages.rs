//! Messages of WebSocket clients (`client_message` has their forms).
//!
//! The first message is the resume request (contract §3), alone or together with a fresh token. A
//! first message without a resume request puts the session live at once. A later resume request is
//! answered with 4408: newer events have already been sent, so the order would be lost.

use super::CheckPurpose;
use super::node_state::NodeState;
use super::records::{CatchUpState, SessionState, expiry};
use super::state::SessionManager;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Secret, ShardCommand};
use crate::domain::ids::{ConnectionKey, ShardId};
use crate::service::sessions::auth::{AuthFailure, Identity, TokenCheck};
use crate::service::sessions::catch_up::CatchUpScope;
use crate::service::sessions::client_message::{self, ClientMessage};

/// Closes a session whose resume request comes too late.
const TOO_LATE: Close = Close::new(CloseCode::RESUME_TOO_LATE, "resume request too late");

impl SessionManager {
    pub(super) fn on_message(&mut self, shard: ShardId, connection: ConnectionKey, text: &str) {
        let Some(record) = self.records[shard.index()].get(connection) else {
            self.counters.reports_stale.add(1);
            return;
        };
        if record.state != SessionState::Live {
            return; // It is being closed.
        }
        let is_first = record.catch_up == CatchUpState::Awaited;
        let message = client_message::parse(text).inspect_err(|why| {
            tracing::debug!(%why, "client message ignored");
            self.counters.messages_ignored.add(1);
        });
        let ClientMessage { last_sequences, access_token } = message.unwrap_or_default();
        if let Some(token) = access_token {
            self.on_fresh_token(shard, connection, token);
        }
        match last_sequences {
            Some(named) if is_first => {
                self.begin_catch_up(shard, connection, CatchUpScope::Session(named));
            }
            Some(_) => self.on_late_resume(shard, connection),
            None if is_first => self.go_live(shard, connection, CatchUpState::TooLate),
            None => {}
        }
    }

    /// No resume request came within the grace: the shard has put the session live.
    pub(super) fn on_grace_expired(&mut self, shard: ShardId, connection: ConnectionKey) {
        let Some(record) = self.records[shard.index()].get(connection) else {
            self.counters.reports_stale.add(1);
            return;
        };
        if record.catch_up == CatchUpState::Awaited {
            record.catch_up = CatchUpState::TooLate;
            self.catch_ups.expect_none(shard, connection);
        }
    }

    fn on_late_resume(&mut self, shard: ShardId, connection: ConnectionKey) {
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        match record.catch_up {
            CatchUpState::TooLate => {
                self.counters.resumes_too_late.add(1);
                self.close(shard, connection, TOO_LATE, EndReason::ClosedByService);
            }
            // Contract §3: later requests are ignored.
            CatchUpState::Awaited | CatchUpState::Running | CatchUpState::Done => {
                self.counters.messages_ignored.add(1);
            }
        }
    }

    /// Puts a session live that has nothing to catch up with.
    pub(super) fn go_live(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        state: CatchUpState,
    ) {
        if let Some(record) = self.records[shard.index()].get(connection) {
            record.catch_up = state;
            self.catch_ups.expect_none(shard, connection);
            self.send(shard, ShardCommand::GoLive { connection, delivered: Box::default() });
        }
    }

    fn on_fresh_token(&mut self, shard: ShardId, connection: ConnectionKey, token: Secret) {
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        let Some(ids) = record.ids.clone() else { return };
        if std::mem::replace(&mut record.token_in_check, true) {
            self.counters.messages_ignored.add(1);
            return; // One at a time: the first one has not been answered yet.
        }
        match self.auth.check(Some(&token), ids.user()) {
            TokenCheck::Done(outcome) => self.on_fresh_token_checked(shard, connection, outcome),
            TokenCheck::Pending(check) => {
                self.await_check(shard, connection, check, CheckPurpose::FreshToken);
            }
        }
    }

    pub(super) fn on_fresh_token_checked(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        outcome: Result<Identity, AuthFailure>,
    ) {
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        record.token_in_check = false;
        if record.state != SessionState::Live || self.node_state.get() == NodeState::Stopping {
            return;
        }
        let answer = match outcome {
            Ok(identity) => {
                record.expires_s = expiry(&identity);
                self.counters.tokens_refreshed.add(1);
                serde_json::json!({ "token_expires_at": identity.expires_at_s })
            }
            Err(failure) => {
                self.counters.tokens_refused.add(1);
                serde_json::json!({ "error": failure.to_string() })
            }
        };
        let text = answer.to_string().into_boxed_str();
        self.send(shard, ShardCommand::SendText { connection, text });
    }
}
