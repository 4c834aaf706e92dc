//! Who is let in, and what the end of a session undoes.

use super::messages::expiry;
use super::records::SessionState;
use super::state::Manager;
use super::{CheckPurpose, NodeState, Request};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Hello, Refusal, ShardCommand};
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::service::members::directory::SessionIds;
use crate::service::sessions::auth::{AuthFailure, Checked, Identity};

/// Contract §3.
const IDS_MISSING: &str = "missing user_id or device_id";
/// Contract §3.
pub(super) const REPLACED: Close = Close::new(CloseCode::SESSION_REPLACED, "session_replaced");
/// When a refused user may try again, seconds: about when a dead session of his has been noticed.
const USER_LIMIT_RETRY_AFTER_S: u32 = 60;
/// When to try again on a node that is going, seconds: the balancer has another one by then.
const STOPPING_RETRY_AFTER_S: u32 = 1;

impl Manager {
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
        if self.state() != NodeState::Serving {
            return self.refuse(shard, connection, stopping());
        }
        if hello.device_id.is_empty() {
            return self.refuse(shard, connection, ids_missing());
        }
        match self.auth.check(hello.token.as_ref(), &hello.user_id) {
            Checked::Now(outcome) => {
                self.on_checked(shard, connection, outcome, CheckPurpose::Admission(hello));
            }
            Checked::Later(check) => {
                self.check_apart(shard, connection, check, CheckPurpose::Admission(hello));
            }
        }
    }

    /// Waits for a check in a task of its own. There is one per handshake that waits, so the slots
    /// of the shards bound them.
    pub(super) fn check_apart(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        check: crate::service::backends::ports::BoxFuture<Result<Identity, AuthFailure>>,
        purpose: CheckPurpose,
    ) {
        let Some(requests) = self.request_sender.upgrade() else { return };
        tokio::spawn(async move {
            let outcome = check.await;
            let checked = Request::Checked { shard, connection, outcome, purpose };
            // An error means that the manager has ended, and the connection with it.
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
        match purpose {
            CheckPurpose::Admission(hello) => {
                let waits = self.records[shard.index()]
                    .get(connection)
                    .is_some_and(|record| record.state == SessionState::Checking);
                if !waits {
                    return; // The client went while its token was being checked.
                }
                match outcome {
                    Ok(identity) => self.admit(shard, connection, &hello, identity),
                    Err(failure) => self.refuse(shard, connection, failure.refusal()),
                }
            }
            CheckPurpose::FreshToken => self.on_token_checked(shard, connection, outcome),
        }
    }

    fn admit(
        &mut self,
        shard: ShardId,
        connection: ConnectionKey,
        hello: &Hello,
        identity: Identity,
    ) {
        if self.state() != NodeState::Serving {
            return self.refuse(shard, connection, stopping());
        }
        let ids = SessionIds::new(&identity.user, &hello.device_id);
        // A device that connects again takes the place of its old session.
        if self.directory.find(&ids).is_none() {
            let held = self.directory.sessions_of(&identity.user, |_| {});
            if held >= self.config.sessions_per_user_max {
                return self.refuse(shard, connection, user_limit());
            }
        }
        let address = SessionAddress { shard, encoding: hello.encoding, connection };
        let Some(record) = self.records[shard.index()].get(connection) else { return };
        record.ids = Some(ids.clone());
        record.state = SessionState::Live;
        record.expires_s = expiry(&identity);

        // The shard holds what is routed to the session from here on, also before it has carried
        // the admission out; what was routed before is in the catch-up that is yet to be asked for.
        self.send(shard, ShardCommand::Admit { connection });
        let replaced = self.directory.insert(ids.clone(), address);
        let (accepted, visibility) = self.presence.admitted(&ids, replaced.is_some());
        if let Some(visibility) = visibility {
            self.catching_up.expect(shard, connection, visibility);
        }
        if let Some(record) = self.records[shard.index()].get(connection) {
            record.registration_owed = !accepted;
        }
        self.counters.admitted.add(1);
        self.counters.sessions.add(1);
        if let Some(old) = replaced
            && self.close(old.shard, old.connection, REPLACED, EndReason::ClosedByService)
        {
            self.counters.replaced.add(1);
        }
    }

    pub(super) fn refuse(&mut self, shard: ShardId, connection: ConnectionKey, refusal: Refusal) {
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
        let Some(record) = self.records[shard.index()].close(connection) else {
            self.counters.reports_stale.add(1);
            return;
        };
        let Some(ids) = record.ids else { return };
        self.counters.sessions.sub(1);
        self.counters.ended.add(1);
        let address = SessionAddress { shard, encoding: record.encoding, connection };
        self.catching_up.forget(shard, connection);
        // A session that was replaced is not there any more: its successor stays, registered.
        if self.directory.remove(&ids, address) {
            self.presence.ended(&ids);
        }
    }
}

fn ids_missing() -> Refusal {
    Refusal { status: 400, body: IDS_MISSING.into(), retry_after_s: None }
}

fn user_limit() -> Refusal {
    Refusal {
        status: 429,
        body: "too many sessions of this user: close one, or try again later".into(),
        retry_after_s: Some(USER_LIMIT_RETRY_AFTER_S),
    }
}

fn stopping() -> Refusal {
    Refusal {
        status: 503,
        body: "this node is going down: connect again, to another one".into(),
        retry_after_s: Some(STOPPING_RETRY_AFTER_S),
    }
}
