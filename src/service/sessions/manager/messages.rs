//! Messages of WebSocket clients (`client_message` has their forms).
//!
//! The first message is the resume request (contract §3), alone or together with a fresh token. Without
//! `last_sequences` it requests everything. A first message that is no such JSON closes the session with
//! 1000, as in the Go service. A session that sends none goes live after its grace. A resume request after
//! that is answered with 4408: newer events have already been sent, so the order would be lost.

use super::CheckPurpose;
use super::node_state::NodeState;
use super::records::{CatchUpState, SessionState, expiry, issued};
use super::state::SessionManager;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Secret, ShardCommand};
use crate::domain::ids::SessionAddress;
use crate::service::sessions::auth::{AuthFailure, Identity, TokenCheck};
use crate::service::sessions::catch_up::CatchUpScope;
use crate::service::sessions::client_message::{self, ClientMessage, InvalidMessage};

/// Closes a session whose resume request comes too late.
const TOO_LATE: Close = Close::new(CloseCode::RESUME_TOO_LATE, "resume request too late");

impl SessionManager {
    pub(super) fn on_message(&mut self, address: SessionAddress, text: &str) {
        let Some(record) = self.record(address) else { return };
        if record.state != SessionState::Live {
            return; // It is being closed.
        }
        let is_first = record.catch_up == CatchUpState::Awaited;
        let state = record.catch_up;
        let message = match client_message::parse(text) {
            Ok(message) => message,
            Err(why) if is_first => return self.on_invalid_first_message(address, why),
            Err(why) => {
                tracing::debug!(%why, "client message ignored");
                return self.counters.messages_ignored.add(1);
            }
        };
        let is_resume_request = message.is_resume_request();
        let ClientMessage { last_sequences, cursor, access_token } = message;
        if let Some(token) = access_token {
            self.on_fresh_token(address, token);
        }
        match state {
            CatchUpState::Awaited => {
                let scope = CatchUpScope::Session(last_sequences.unwrap_or_default());
                self.begin_catch_up(address, scope, cursor);
            }
            CatchUpState::TooLate if is_resume_request => {
                self.counters.resumes_too_late.add(1);
                self.close(address, TOO_LATE, EndReason::ClosedByService);
            }
            // Contract §3: later messages are ignored.
            CatchUpState::Running | CatchUpState::Done if is_resume_request => {
                self.counters.messages_ignored.add(1);
            }
            // Only a fresh token.
            CatchUpState::Running | CatchUpState::Done | CatchUpState::TooLate => {}
        }
    }

    fn on_invalid_first_message(&mut self, address: SessionAddress, why: InvalidMessage) {
        self.counters.first_messages_invalid.add(1);
        let reason = format!("first message: {why}").into();
        let close = Close { code: CloseCode::NORMAL, reason };
        self.close(address, close, EndReason::PeerAtFault);
    }

    /// No resume request came within the grace: the shard has put the session live.
    pub(super) fn on_grace_expired(&mut self, address: SessionAddress) {
        let Some(record) = self.record(address) else { return };
        if record.catch_up == CatchUpState::Awaited {
            record.catch_up = CatchUpState::TooLate;
            self.catch_ups.expect_none(address);
        }
    }

    /// Puts a session live that has nothing to catch up with.
    pub(super) fn go_live(&mut self, address: SessionAddress, state: CatchUpState) {
        if let Some(record) = self.record(address) {
            record.catch_up = state;
            self.catch_ups.expect_none(address);
            let (connection, delivered) = (address.connection, Box::default());
            self.send(address.shard, ShardCommand::GoLive { connection, delivered });
        }
    }

    fn on_fresh_token(&mut self, address: SessionAddress, token: Secret) {
        let Some(record) = self.record(address) else { return };
        let Some(ids) = record.ids.clone() else { return };
        if std::mem::replace(&mut record.token_in_check, true) {
            self.counters.messages_ignored.add(1);
            return; // One at a time: the first one has not been answered yet.
        }
        match self.auth.check(Some(&token), ids.user()) {
            TokenCheck::Done(outcome) => self.on_fresh_token_checked(address, outcome),
            TokenCheck::Pending(check) => {
                self.await_check(address, check, CheckPurpose::FreshToken);
            }
        }
    }

    pub(super) fn on_fresh_token_checked(
        &mut self,
        address: SessionAddress,
        outcome: Result<Identity, AuthFailure>,
    ) {
        let is_stopping = self.state() == NodeState::Stopping;
        let outcome = outcome.and_then(|identity| {
            let is_revoked = self.revocations.cover(&identity.user, issued(&identity));
            if is_revoked { Err(AuthFailure::Revoked) } else { Ok(identity) }
        });
        let Some(record) = self.record(address) else { return };
        record.token_in_check = false;
        if record.state != SessionState::Live || is_stopping {
            return;
        }
        let answer = match outcome {
            Ok(identity) => {
                record.expires_s = expiry(&identity);
                record.issued_s = issued(&identity);
                self.counters.tokens_refreshed.add(1);
                serde_json::json!({ "token_expires_at": identity.expires_at_s })
            }
            Err(failure) => {
                self.counters.tokens_refused.add(1);
                serde_json::json!({ "error": failure.to_string() })
            }
        };
        let (connection, text) = (address.connection, answer.to_string().into());
        self.send(address.shard, ShardCommand::SendText { connection, text });
    }
}
