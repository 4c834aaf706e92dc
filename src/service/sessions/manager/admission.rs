//! Admits or refuses handshakes, and frees what a session held when it has ended.

use std::borrow::Cow;

use super::node_state::NodeState;
use super::records::{SessionState, client, expiry, issued};
use super::state::SessionManager;
use super::{CheckPurpose, ManagerRequest};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{Hello, Refusal, ShardCommand};
use crate::domain::ids::SessionAddress;
use crate::service::backends::ports::BoxFuture;
use crate::service::cluster::announcer::Unannounced;
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
const JOINING: Refusal = Refusal {
    status: 503,
    body: Cow::Borrowed("this node is joining the cluster: connect to another node, or try again"),
    retry_after_s: Some(STOPPING_RETRY_AFTER_S),
};
const CUT_OFF: Refusal = Refusal {
    status: 503,
    body: Cow::Borrowed(
        "this node cannot reach the cluster: connect to another node, or try again",
    ),
    retry_after_s: Some(STOPPING_RETRY_AFTER_S),
};

impl SessionManager {
    pub(super) fn on_opened(&mut self, address: SessionAddress, hello: Box<Hello>) {
        if self.records[address.shard.index()].open(address).is_none() {
            self.counters.reports_stale.add(1);
            return;
        }
        self.counters.handshakes.add(1);
        if self.state() != NodeState::Serving {
            return self.refuse(address, STOPPING);
        }
        if hello.device_id.is_empty() {
            return self.refuse(address, IDS_MISSING);
        }
        let check = self.auth.check(hello.token.as_ref(), &hello.user_id);
        let purpose = CheckPurpose::Admission(hello);
        match check {
            TokenCheck::Done(outcome) => self.on_checked(address, outcome, purpose),
            TokenCheck::Pending(check) => self.await_check(address, check, purpose),
        }
    }

    /// Waits for a token check in a task of its own. There is one task per waiting connection, so
    /// the number of slots bounds the tasks.
    pub(super) fn await_check(
        &mut self,
        address: SessionAddress,
        check: BoxFuture<Result<Identity, AuthFailure>>,
        purpose: CheckPurpose,
    ) {
        let Some(requests) = self.requests.upgrade() else { return };
        tokio::spawn(async move {
            let outcome = check.await;
            let checked = ManagerRequest::Checked { address, outcome, purpose };
            // An error means that the manager has ended, so the connection has too.
            let _ = requests.send(checked).await;
        });
    }

    pub(super) fn on_checked(
        &mut self,
        address: SessionAddress,
        outcome: Result<Identity, AuthFailure>,
        purpose: CheckPurpose,
    ) {
        let hello = match purpose {
            CheckPurpose::Admission(hello) => hello,
            CheckPurpose::FreshToken => return self.on_fresh_token_checked(address, outcome),
        };
        if self.record(address).is_none_or(|record| record.state != SessionState::Checking) {
            return; // The client has disconnected during the check.
        }
        match outcome {
            Ok(identity) => self.admit(address, &hello, identity),
            Err(failure) => self.refuse(address, failure.refusal()),
        }
    }

    fn admit(&mut self, address: SessionAddress, hello: &Hello, identity: Identity) {
        if self.state() != NodeState::Serving {
            return self.refuse(address, STOPPING);
        }
        // Also one that was revoked while it was checked.
        if self.revocations.cover(&identity.user, issued(&identity)) {
            self.counters.refused_revoked.add(1);
            return self.refuse(address, AuthFailure::Revoked.refusal());
        }
        if let Some(reserved) = self.presence.reserved(&identity.user, &hello.device_id) {
            self.counters.refused_reserved_ids.add(1);
            let body = Cow::Borrowed(reserved.reason());
            return self.refuse(address, Refusal { status: 400, body, retry_after_s: None });
        }
        let ids = SessionIds::new(&identity.user, &hello.device_id);
        // A device that connects again replaces its old session, so the limit does not apply.
        if self.directory.find(&ids).is_none() {
            let held = self.directory.sessions_of(&identity.user, |_| {});
            if held >= self.config.sessions_per_user_max {
                return self.refuse(address, USER_LIMIT);
            }
        }
        let epoch = match self.announcer.as_ref().map(|it| it.began(&ids, address)) {
            None => None,
            Some(Ok(epoch)) => Some(epoch),
            Some(Err(Unannounced::NoLease)) => return self.refuse(address, JOINING),
            Some(Err(Unannounced::Full)) => return self.refuse(address, CUT_OFF),
        };
        // From now on the shard holds back all events that are routed to the session, even before
        // it has executed the admission. Catch-up covers earlier events.
        self.send(address.shard, ShardCommand::Admit { connection: address.connection });
        let former = self.directory.insert(ids.clone(), address);
        if let (Some(announcer), Some(epoch)) = (&self.announcer, epoch) {
            if let Some(former) = former {
                announcer.replaced(&ids, former);
            }
            announcer.admitted(address, epoch);
        }
        let replaced = former.or(self.missed_closes.left(&ids));
        let (accepted, visibility) = self.presence.register_admitted(&ids, replaced.is_some());
        if let Some(visibility) = visibility {
            self.catch_ups.expect(address, visibility);
        }
        let since_s = u32::try_from(self.unix_s).unwrap_or(u32::MAX);
        let Some(record) = self.record(address) else { return };
        record.state = SessionState::Live;
        record.expires_s = expiry(&identity);
        record.issued_s = issued(&identity);
        record.since_s = since_s;
        record.client = client(hello.address);
        record.ids = Some(ids);
        record.registration_pending = !accepted;
        self.counters.admitted.add(1);
        self.counters.sessions.add(1);
        if let Some(old) = replaced
            && self.close(old, REPLACED, EndReason::ClosedByService)
        {
            self.counters.replaced.add(1);
        }
    }

    fn refuse(&mut self, address: SessionAddress, refusal: Refusal) {
        if let Some(record) = self.record(address) {
            record.state = SessionState::Refused;
        }
        match refusal.status {
            400 => self.counters.refused_bad_request.add(1),
            401 => self.counters.refused_unauthorized.add(1),
            403 => self.counters.refused_forbidden.add(1),
            429 => self.counters.refused_user_limit.add(1),
            _ => self.counters.refused_unavailable.add(1),
        }
        self.send(address.shard, ShardCommand::Refuse { connection: address.connection, refusal });
    }

    pub(super) fn on_ended(&mut self, address: SessionAddress) {
        let ids = self.record(address).and_then(|record| record.ids.clone());
        let is_in_directory = ids.as_ref().is_some_and(|ids| self.leave(ids, address));
        if !is_in_directory {
            // It may have left the directory just now.
            self.take_missed();
        }
        self.records[address.shard.index()].free(address.connection);
        let Some(ids) = ids else { return };
        self.counters.sessions.sub(1);
        self.counters.ended.add(1);
        self.catch_ups.cancel(address);
        // A replaced session is in neither: its successor stays registered.
        if is_in_directory || self.missed_closes.remove(&ids, address) {
            self.presence.unregister(&ids);
        }
    }
}
