//! The session manager: decides on every handshake, keeps the directory true, ends sessions.
//!
//! One tokio task and peer of every shard (the gRPC hub is the last of them). It holds a small
//! record per connection, no task and no timer for any of them; what takes time (keys for a token,
//! presence, catch-up) runs beside it and comes back as a request.
//!
//! ```text
//! Opened ──► Checking ──► Live ──► Closing ──► (Ended) Free
//!               └───────► Refused ────────────────┘
//! ```

mod admission;
mod catching_up;
mod links;
mod messages;
mod records;
mod state;
mod stopping;
mod sweep;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

pub use links::ShardPort;
pub use stopping::Shutdown;

use crate::domain::ids::{ConnectionKey, ShardId};
use crate::handoff::Doorbell;
use crate::service::backends::redis::PresenceUpdates;
use crate::service::members::directory::Directory;
use crate::service::runtime::bell::AsyncBell;
use crate::service::sessions::auth::{AuthFailure, Authenticator, Identity};
use crate::service::sessions::catch_up::CatchUpService;
use crate::service::sessions::presence::Presence;

/// Memory that the session manager holds for each connection, bytes.
pub const RECORD_BYTES: usize = records::RECORD_BYTES;

/// Settings of the session manager.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Sessions that one user may hold on this node, over all devices.
    pub sessions_per_user_max: usize,
    /// While draining each client is told to wait for up to this long before it reconnects, each
    /// for another time, so that the other nodes are not stormed.
    pub reconnect_spread: Duration,
    /// How long presence may take at the end to be told of all ends.
    pub unregister_timeout: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            sessions_per_user_max: 32,
            reconnect_spread: Duration::from_secs(5),
            unregister_timeout: Duration::from_secs(5),
        }
    }
}

/// What the session manager works with.
pub struct SessionPorts {
    /// On which all shards ring for it.
    pub bell: Arc<Doorbell>,
    /// By shard number; the gRPC hub, if there is one, is the last.
    pub shards: Vec<ShardPort>,
    /// Which it alone writes.
    pub directory: Arc<Directory>,
    /// Who clients are.
    pub auth: Arc<Authenticator>,
    /// Who is told of sessions.
    pub presence: Presence,
    /// What sessions missed.
    pub catch_up: CatchUpService,
}

crate::counters! {
    /// What the session manager did.
    pub struct SessionCounters of Counter {
        Gauge sessions: "Sessions admitted and not yet ended",
        Counter handshakes: "Handshakes that came to a decision or ended before it",
        Counter admitted: "Handshakes admitted",
        Counter refused_bad_request: "Handshakes refused with 400: an id was missing",
        Counter refused_unauthorized: "Handshakes refused with 401: no valid token",
        Counter refused_forbidden: "Handshakes refused with 403: somebody else's token",
        Counter refused_user_limit: "Handshakes refused with 429: the user has too many sessions",
        Counter refused_unavailable: "Handshakes refused with 503: stopping, or no keys to check tokens with",
        Counter replaced: "Sessions closed because the same user and device connected again here",
        Counter replaced_elsewhere: "Sessions closed because the same user and device connected to another node",
        Counter ended: "Sessions that ended",
        Counter resumes_too_late: "Sessions closed because they asked to resume after they had gone live (4408)",
        Counter tokens_refreshed: "Fresh tokens accepted from sessions",
        Counter tokens_refused: "Fresh tokens refused",
        Counter tokens_expired: "Sessions closed because their token expired (4401)",
        Counter messages_ignored: "Client messages that carried no meaning",
        Counter reports_stale: "Reports about connections that had ended before",
        Counter shards_lost: "Shards that went without reporting that they stopped",
        Gauge commands_waiting: "Commands that wait for room in a ring",
    }
}

/// How far the node is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NodeState {
    /// Sessions are admitted.
    Serving = 0,
    /// No new ones; those there are being told to go.
    Draining = 1,
    /// What is left is being closed.
    Stopping = 2,
    /// Nothing is left.
    Stopped = 3,
}

/// To the session manager from other tasks.
enum Request {
    /// A token check has ended.
    Checked {
        shard: ShardId,
        connection: ConnectionKey,
        outcome: Result<Identity, AuthFailure>,
        purpose: CheckPurpose,
    },
    /// Another node has registered a session of this user.
    MovedElsewhere(Box<str>),
    /// End all sessions; answered when every shard has stopped.
    End { shutdown: Shutdown, ended: oneshot::Sender<()> },
}

/// What becomes of a checked token.
enum CheckPurpose {
    /// A handshake waits.
    Admission(Box<crate::domain::command::Hello>),
    /// A session has sent a fresh one.
    FreshToken,
}

/// Requests that may wait for the session manager; who sends more waits.
pub const REQUESTS_WAITING_MAX: usize = 1024;
/// Steps of catch-ups that may wait for the session manager; who has more waits.
const CATCH_UPS_WAITING_MAX: usize = 256;

/// The application's hold on the session manager.
#[derive(Clone)]
pub struct SessionHandle {
    requests: mpsc::Sender<Request>,
    presence: Presence,
    unregister_timeout: Duration,
    state: Arc<AtomicU8>,
}

impl SessionHandle {
    /// How far the node is in its life: ready only while serving.
    pub fn state(&self) -> NodeState {
        match self.state.load(Ordering::Acquire) {
            0 => NodeState::Serving,
            1 => NodeState::Draining,
            2 => NodeState::Stopping,
            _ => NodeState::Stopped,
        }
    }

    /// Ends all sessions as `shutdown` says and waits until every shard has stopped and presence has
    /// been told. A later order takes the place of an earlier one that is still being carried out;
    /// both return at the same end.
    pub async fn shut_down(&self, shutdown: Shutdown) {
        let (ended, wait) = oneshot::channel();
        if self.requests.send(Request::End { shutdown, ended }).await.is_ok() {
            // An error means that the manager has ended, which is what is waited for.
            let _ = wait.await;
        }
        self.presence.close(self.unregister_timeout).await;
    }
}

impl PresenceUpdates for SessionHandle {
    fn updated(&self, _payload: &[u8]) {}

    fn missed(&self) {}

    /// If it is a session of this node that has moved, it ends here. What finds no room is found
    /// out with the next refreshes.
    fn moved_elsewhere(&self, user: &str) {
        let _ = self.requests.try_send(Request::MovedElsewhere(user.into()));
    }
}

/// See the module.
pub struct SessionManager;

impl SessionManager {
    /// Starts the session manager's task on the current runtime.
    ///
    /// # Errors
    /// The doorbell cannot be waited on.
    pub fn spawn(
        config: SessionConfig,
        ports: SessionPorts,
        counters: Arc<SessionCounters>,
    ) -> io::Result<SessionHandle> {
        let bell = AsyncBell::new(Arc::clone(&ports.bell))?;
        let (requests, receiver) = mpsc::channel(REQUESTS_WAITING_MAX);
        let state = Arc::new(AtomicU8::new(NodeState::Serving as u8));
        let presence = ports.presence.clone();
        let unregister_timeout = config.unregister_timeout;
        let (catch_up_sender, catch_ups) = mpsc::channel(CATCH_UPS_WAITING_MAX);
        let manager = state::Manager::new(
            config,
            ports,
            counters,
            requests.downgrade(),
            catch_up_sender,
            Arc::clone(&state),
        );
        tokio::spawn(manager.run(receiver, catch_ups, bell));
        Ok(SessionHandle { requests, presence, unregister_timeout, state })
    }
}
