//! The session manager: decides on every handshake, keeps the directory, closes sessions.
//!
//! One tokio task, connected to every shard (the gRPC hub counts as the last one). It keeps a small
//! record per connection, and no task or timer. Slow work (fetching keys for a token, presence,
//! catch-up) runs in tasks of its own. Each result comes back as a request.
//!
//! ```text
//! Opened ──► Checking ──► Live ──► Closing ──► (Ended) Free
//!               └───────► Refused ────────────────┘
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `run` | the loop: takes reports and requests, calls the handlers below |
//! | `admission`, `messages`, `catching_up`, `missed`, `upkeep`, `operators`, `stopping` | the handlers |
//! | `state` | [`SessionManager`] and the actions that all handlers share |
//! | `records`, `links`, `catch_ups`, `drain`, `missed_closes`, `revocations`, `sweep`, `node_state` | its parts; they do not use the manager |

mod admission;
mod catch_ups;
mod catching_up;
mod drain;
mod links;
mod messages;
mod missed;
mod missed_closes;
mod node_state;
mod operators;
mod records;
mod revocations;
mod run;
mod state;
mod stopping;
mod sweep;
#[cfg(test)]
mod tests;
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

pub use self::node_state::NodeState;
pub use self::operators::{ListPlace, SessionList, SessionView};
pub use self::records::RECORD_BYTES;
pub use self::revocations::{FutureMoment, RevocationsFull, RevokedTokens, USERS_REVOKED_MAX};
pub use self::state::SessionManager;

use self::operators::OperatorRequest;
use crate::domain::command::Hello;
use crate::domain::ids::SessionAddress;
use crate::handoff::{Doorbell, PeerEnd};
use crate::service::backends::redis::PresenceUpdates;
use crate::service::cluster::announcer::SessionAnnouncer;
use crate::service::cluster::missed::MissedSessions;
use crate::service::members::directory::Directory;
use crate::service::sessions::auth::{AuthFailure, Authenticator, Identity};
use crate::service::sessions::catch_up::CatchUpService;
use crate::service::sessions::presence::Presence;

/// Requests that may wait for the session manager. A sender waits while the queue is full.
pub const REQUESTS_WAITING_MAX: usize = 1024;
/// Interval of the periodic work.
const TICK: Duration = Duration::from_millis(100);

/// Settings of the session manager.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Sessions that one user may hold on this node, over all devices.
    pub sessions_per_user_max: usize,
    /// During a drain each client gets its own wait before it reconnects, up to this long. This
    /// spreads the load on the other nodes.
    pub reconnect_spread: Duration,
    /// At shutdown: how long to wait until presence has unregistered all sessions.
    pub unregister_timeout: Duration,
    /// Sessions per second that are closed with 4409 because they have missed events. The others wait, and
    /// get no event meanwhile. At least 1.
    pub missed_per_second: u32,
    /// How long a revocation is kept.
    pub revocations_kept: Duration,
    /// What is revoked from the first session on. At most [`USERS_REVOKED_MAX`] users; further ones are left out.
    pub revoked: Vec<RevokedTokens>,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            sessions_per_user_max: 32,
            reconnect_spread: Duration::from_secs(5),
            unregister_timeout: Duration::from_secs(5),
            missed_per_second: 1_000,
            revocations_kept: Duration::from_secs(24 * 3600),
            revoked: Vec::new(),
        }
    }
}

/// Dependencies of the session manager.
pub struct SessionPorts {
    /// Doorbell that all shards ring for the session manager.
    pub bell: Arc<Doorbell>,
    /// The rings to the shards, by shard number. The gRPC hub, if there is one, is the last.
    pub shards: Vec<PeerEnd>,
    /// The sessions of this node. Only the session manager writes to it.
    pub directory: Arc<Directory>,
    /// The sessions that have missed events.
    pub missed: Arc<MissedSessions>,
    /// Tells the other nodes of the sessions of this one; only with hand-off through the log.
    pub announcer: Option<Arc<SessionAnnouncer>>,
    /// Checks tokens.
    pub auth: Arc<Authenticator>,
    /// Registers sessions.
    pub presence: Presence,
    /// Sends sessions the messages that they missed.
    pub catch_up: CatchUpService,
}

crate::counters! {
    /// Counters of the session manager.
    pub struct SessionCounters of Counter {
        Gauge sessions: "Sessions admitted and not yet ended",
        Counter handshakes: "Handshakes received",
        Counter admitted: "Handshakes admitted",
        Counter refused_bad_request: "Handshakes refused with 400: an id was missing or cannot be registered",
        Counter refused_reserved_ids: "Those whose ids cannot be registered: they contain a colon or a brace",
        Counter refused_unauthorized: "Handshakes refused with 401: no valid token",
        Counter refused_revoked: "Those whose token was revoked",
        Counter refused_forbidden: "Handshakes refused with 403: the token belongs to another user",
        Counter refused_user_limit: "Handshakes refused with 429: the user has too many sessions",
        Counter refused_unavailable: "Handshakes refused with 503: the node is stopping, cannot tell the other nodes of the session, or has no keys to check tokens with",
        Counter replaced: "Sessions closed because the same user and device connected again to this node",
        Counter replaced_elsewhere: "Sessions closed because the same user and device connected to another node",
        Counter ended: "Sessions that ended",
        Counter resumes_too_late: "Sessions closed because their resume request came after they had gone live (4408)",
        Counter events_missed: "Sessions that have missed events between nodes and were closed (4409)",
        Gauge events_missed_waiting: "Sessions that have missed events and wait for their close, without events",
        Counter first_messages_invalid: "Sessions closed because their first message was no resume request (1000)",
        Counter tokens_refreshed: "Fresh tokens accepted from sessions",
        Counter tokens_refused: "Fresh tokens refused",
        Counter tokens_expired: "Sessions closed because their token expired (4401)",
        Counter tokens_revoked: "Sessions closed because their token was revoked (4401)",
        Gauge revocations: "Users whose tokens are revoked, and one more if everybody's are",
        Counter closed_by_operator: "Sessions closed on request of an operator (1001)",
        Counter messages_ignored: "Client messages ignored: malformed, or not expected at that time",
        Counter reports_stale: "Reports about connections that had already ended",
        Counter shards_lost: "Shards that ended without reporting that they stopped",
        Gauge commands_waiting: "Commands waiting for room in a ring",
    }
}

/// How to shut the node down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Close all sessions at once with 1001.
    Stop,
    /// Close sessions with 1012 at a steady pace over this period, then close the rest. Each client
    /// gets a wait in the close reason. If clients wait that long, they also arrive at the other
    /// nodes at a steady pace: per second at most the number of sessions at the start, divided by
    /// the longer of this period and [`SessionConfig::reconnect_spread`] in seconds.
    Drain(Duration),
}

/// A request of another task to the session manager.
enum ManagerRequest {
    /// A token check is complete.
    Checked {
        address: SessionAddress,
        outcome: Result<Identity, AuthFailure>,
        purpose: CheckPurpose,
    },
    /// Another node has registered a session of this user.
    MovedElsewhere(Box<str>),
    /// Of an operator.
    Operator(OperatorRequest),
    /// Close all sessions. `stopped` is notified when every shard has stopped.
    ShutDown { shutdown: Shutdown, stopped: oneshot::Sender<()> },
}

/// What a token was checked for.
enum CheckPurpose {
    /// A handshake waits for the result.
    Admission(Box<Hello>),
    /// A session sent a fresh token.
    FreshToken,
}

/// The application's handle of the session manager.
#[derive(Clone)]
pub struct SessionHandle {
    requests: mpsc::Sender<ManagerRequest>,
    presence: Presence,
    unregister_timeout: Duration,
    state: watch::Receiver<NodeState>,
}

impl SessionHandle {
    /// Lifecycle of the node. It is ready only while serving.
    pub fn state(&self) -> NodeState {
        *self.state.borrow()
    }

    /// Closes all sessions. Returns when every shard has stopped and presence has unregistered the
    /// sessions, or [`SessionConfig::unregister_timeout`] has passed. A second call replaces an
    /// earlier one that is still running; both return at the same time.
    pub async fn shut_down(&self, shutdown: Shutdown) {
        let (stopped, wait) = oneshot::channel();
        if self.requests.send(ManagerRequest::ShutDown { shutdown, stopped }).await.is_ok() {
            // An error means that the manager has ended, so all sessions have.
            let _ = wait.await;
        }
        self.presence.shut_down(self.unregister_timeout).await;
    }
}

impl PresenceUpdates for SessionHandle {
    fn updated(&self, _payload: &[u8]) {}

    fn missed(&self) {}

    /// Checks whether a session of this node has moved to another one. If the queue is full, the
    /// next refresh finds out.
    fn moved_elsewhere(&self, user: &str) {
        let _ = self.requests.try_send(ManagerRequest::MovedElsewhere(user.into()));
    }
}
