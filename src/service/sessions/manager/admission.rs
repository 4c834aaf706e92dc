//! Admits or refuses handshakes, and frees what a session held when it has ended.

use std::borrow::Cow;

use super::node_state::NodeState;
use super::records::{SessionState, expiry};
use super::state::SessionManager;
use super::{CheckPurpose, ManagerRequest};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Hello, Refusal, ShardCommand};
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::service::backends::ports::BoxFuture;
use crate::service::members::directory::SessionIds;
use crate::service::sessions::auth::{AuthFailure, Identity, TokenCheck};

/// Contract §3.
pub(super) const REPLACED: Close = Close::new(CloseCode::SESSION_REPLACED, "session_replaced");
/// When a user over the limit may try again, seconds: by then a dead session has been noticed.
const USER_LIMIT_RETRY_AFTER_S: u32 = 60;
/// When a client may try again while the node stops, seconds: by then the load balancer has another
/// node for it.
const STOPPING_RETRY_AFTER_S: u32 = 1;

/// Contract §3.
const IDS_MISSING: Refusal = Refusal {
    status: 400,
    body: Cow::Borrowed("missing user_id or device_id"),
    retry_after_s: None,
};
const USER_LIMIT: Refusal = Refusal {
    status: 429,
    body: Cow::Borrowed("too many sessions of this user: close one, or try again later"),
    retry_after_s: Some(USER_LIMIT_RETRY_AFTER_S),
};
const STOPPING: Refusal = Refusal {
    status: 503,
    body: Cow::Borrowed("this node is shutting down: connect to another node"),
    retry_after_s: Some(STOPPING_RETRY_AFTER_S),
};

impl SessionManager {
    pub(super) fn on_opened(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        hello: Box<Hello>,
    ) {
        if self.records[shard.index()].open(connection, hello.encoding).is_none() {
            self.counters.reports_stale.add(1);
            return;
        }
        self.counters.handshakes.add(1);
        if self.node_state.get() != NodeState::Serving {
            return self.refuse(shard, connection, STOPPING);
        }
        if hello.device_id.is_empty() {
            return self.refuse(shard, connection, IDS_MISSING);
        }
        let check = self.auth.check(hello.token.as_ref(), &hello.user_id);
        let purpose = CheckPurpose::Admission(hello);
        match check {
            TokenCheck::Done(outcome) => self.on_checked(shard, connection, outcome, purpose),
            TokenCheck::Pending(check) => self.await_check(shard, connection, check, purpose),
        }
    }

    /// Waits for a check in a task of its own. There is one per waiting connection, so the number
    /// of slots bounds them.
    pub(super) fn await_check(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        check: BoxFuture<Result<Identity, AuthFailure>>,
        purpose: CheckPurpose,
    ) {
        let Some(requests) = self.requests.upgrade() else { return };
        tokio::spawn(async move {
            let outcome = check.await;
            let checked = ManagerRequest::Checked { shard, connection, outcome, purpose };
            // An error means that the manager has ended, so the connection has too.
            let _ = requests.send(checked).await;
        });
    }

    pub(super) fn on_checked(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        outcome: Result<Identity, AuthFailure>,
        purpose: CheckPurpose,
    ) {
        let hello = match purpose {
            CheckPurpose::Admission(hello) => hello,
            CheckPurpose::FreshToken => {
                return self.on_fresh_token_checked(shard, connection, outcome);
            }
        };
        let record = self.records[shard.index()].get(connection);
        if record.is_none_or(|record| record.state != SessionState::Checking) {
            return; // The client has disconnected during the check.
        }
        match outcome {
            Ok(identity) => self.admit(shard, connection, &hello, identity),
            Err(failure) => self.refuse(shard, connection, failure.refusal()),
        }
    }

    fn admit(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        hello: &Hello,
        identity: Identity,
    ) {
        if self.node_state.get() != NodeState::Serving {
            return self.refuse(shard, connection, STOPPING);
        }
        let ids = SessionIds::new(&identity.user, &hello.device_id);
        // A device that connects again replaces its old session, so the limit does not apply.
        if self.directory.find(&ids).is_none() {
            let held = self.directory.sessions_of(&identity.user, |_| {});
            if held >= self.config.sessions_per_user_max {
                return self.refuse(shard, connection, USER_LIMIT);
            }
        }
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        // The shard holds back what is routed to the session from here on, even before it has
        // carried out the admission. What was routed before is part of the catch-up.
        self.links[shard.index()].send(ShardCommand::Admit { connection });
        let address = SessionAddress { shard, encoding: hello.encoding, connection };
        let replaced = self.directory.insert(ids.clone(), address);
        let (accepted, visibility) = self.presence.register_admitted(&ids, replaced.is_some());
        if let Some(visibility) = visibility {
            self.catch_ups.expect(shard, connection, visibility);
        }
        record.state = SessionState::Live;
        record.expires_s = expiry(&identity);
        record.ids = Some(ids);
        record.registration_pending = !accepted;
        self.counters.admitted.add(1);
        self.counters.sessions.add(1);
        if let Some(old) = replaced
            && self.close(old.shard, old.connection, REPLACED, EndReason::ClosedByService)
        {
            self.counters.replaced.add(1);
        }
    }

    fn refuse(&mut self, shard: ShardId, connection: ConnectionKey, refusal: Refusal) {
        if let Some(record) = self.records[shard.index()].get(connection) {
            record.state = SessionState::Refused;
        }
        match refusal.status {
            400 => self.counters.refused_bad_request.add(1),
            401 => self.counters.refused_unauthorized.add(1),
            403 => self.counters.refused_forbidden.add(1),
            429 => self.counters.refused_user_limit.add(1),
            _ => self.counters.refused_unavailable.add(1),
        }
        self.send(shard, ShardCommand::Refuse { connection, refusal });
    }

    pub(super) fn on_ended(&mut self, shard: ShardId, connection: ConnectionKey) {
        let Some(record) = self.records[shard.index()].free(connection) else {
            self.counters.reports_stale.add(1);
            return;
        };
        let Some(ids) = record.ids else { return };
        self.counters.sessions.sub(1);
        self.counters.ended.add(1);
        let address = SessionAddress { shard, encoding: record.encoding, connection };
        self.catch_ups.cancel(shard, connection);
        // A replaced session is no longer in the directory: its successor stays registered.
        if self.directory.remove(&ids, address) {
            self.presence.unregister(&ids);
        }
    }
}
