//! What clients say after their handshake (see `client_message` for the forms).
//!
//! The first message is the resume request (contract §3), alone or together with a fresh token. A
//! first message that asks for nothing puts the session live at once; asking later is answered
//! with 4408, because what happened meanwhile has been sent already and the order would be lost.

use super::records::{CatchUpState, NEVER, SessionState};
use super::state::Manager;
use super::{CheckPurpose, NodeState};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Secret, ShardCommand};
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::service::sessions::auth::{AuthFailure, Checked, Identity};
use crate::service::sessions::catch_up::CatchUpScope;
use crate::service::sessions::client_message::{self, ClientMessage};

/// What a client is told that asks too late.
const TOO_LATE: Close = Close::new(CloseCode::RESUME_TOO_LATE, "resume request too late");

impl Manager {
    pub(super) fn on_message(&mut self, shard: ShardId, connection: ConnectionKey, text: &str) {
        let Some(record) = self.records[shard.index()].get(connection) else {
            self.counters.reports_stale.add(1);
            return;
        };
        if record.state != SessionState::Live {
            return; // It has been told to close.
        }
        let is_first = record.catch_up == CatchUpState::Awaited;
        let message = client_message::parse(text).inspect_err(|why| {
            tracing::debug!(%why, "client message without a meaning");
            self.counters.messages_ignored.add(1);
        });
        let ClientMessage { last_sequences, access_token } =
            message.unwrap_or(ClientMessage { last_sequences: None, access_token: None });
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

    /// The session went live by itself: no request came within the grace.
    pub(super) fn on_grace_expired(&mut self, shard: ShardId, connection: ConnectionKey) {
        let Some(record) = self.records[shard.index()].get(connection) else {
            self.counters.reports_stale.add(1);
            return;
        };
        if record.catch_up == CatchUpState::Awaited {
            record.catch_up = CatchUpState::TooLate;
            self.catching_up.expect_nothing(shard, connection);
        }
    }

    fn on_late_resume(&mut self, shard: ShardId, connection: ConnectionKey) {
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        match record.catch_up {
            CatchUpState::TooLate => {
                self.counters.resumes_too_late.add(1);
                self.close(shard, connection, TOO_LATE, EndReason::ClosedByService);
            }
            // Contract §3: later messages carry no meaning.
            CatchUpState::Awaited | CatchUpState::Running | CatchUpState::Done => {
                self.counters.messages_ignored.add(1);
            }
        }
    }

    fn go_live(&mut self, shard: ShardId, connection: ConnectionKey, state: CatchUpState) {
        if let Some(record) = self.records[shard.index()].get(connection) {
            record.catch_up = state;
            self.catching_up.expect_nothing(shard, connection);
            self.send(shard, ShardCommand::GoLive { connection, delivered: Box::default() });
        }
    }

    /// There is nothing to catch up with.
    pub(super) fn nothing_missed(&mut self, shard: ShardId, connection: ConnectionKey) {
        self.go_live(shard, connection, CatchUpState::Done);
    }

    fn on_fresh_token(&mut self, shard: ShardId, connection: ConnectionKey, token: Secret) {
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        let Some(ids) = record.ids.clone() else { return };
        if std::mem::replace(&mut record.token_in_check, true) {
            self.counters.messages_ignored.add(1);
            return; // One at a time: the answer to the first is on its way.
        }
        match self.auth.check(Some(&token), ids.user()) {
            Checked::Now(outcome) => self.on_token_checked(shard, connection, outcome),
            Checked::Later(check) => {
                self.check_apart(shard, connection, check, CheckPurpose::FreshToken);
            }
        }
    }

    pub(super) fn on_token_checked(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        outcome: Result<Identity, AuthFailure>,
    ) {
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        record.token_in_check = false;
        if record.state != SessionState::Live || self.state() == NodeState::Stopping {
            return;
        }
        let answer = match outcome {
            Ok(identity) => {
                let Some(record) = self.records[shard.index()].get(connection) else { return };
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

    /// A gRPC session asks for one conversation.
    pub(super) fn on_resume(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        conversation: Box<str>,
        after: i64,
    ) {
        self.begin_catch_up(shard, connection, CatchUpScope::Conversation { conversation, after });
    }

    /// Where a live session is.
    pub(super) fn address_of(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
    ) -> Option<SessionAddress> {
        let record = self.records[shard.index()].get(connection)?;
        (record.state == SessionState::Live).then_some(SessionAddress {
            shard,
            encoding: record.encoding,
            connection,
        })
    }
}

/// When an identity ends, as a record keeps it.
pub(super) fn expiry(identity: &Identity) -> u32 {
    identity.expires_at_s.map_or(NEVER, |at| u32::try_from(at).unwrap_or(NEVER))
}
