//! CatchUpService: what a client missed, sent before what happens now (contract §3).
//!
//! ```text
//!  first message ─► waits its turn ─► which conversations? ─► their pages, side by side ─► Release
//!                   (sessions_max)    ListConversations       call ─► encode ─► socket
//!                                                             (calls_max)   (one page at a time)
//! ```
//!
//! - **Pace.** A page goes to the socket in chunks that fit the session's queue; the next chunk
//!   follows when the shard reports that the last one was sent. So catch-up is never faster than
//!   the socket, and cannot overflow the queue that closes slow readers.
//! - **Bounds.** Calls under way, sessions at it, pages held and requests waiting are each bounded
//!   for all sessions together; who waits does so first come, first served. A session that does not
//!   take a chunk in [`CatchUpConfig::chunk_timeout`] makes room by being closed.
//! - **Whose conversations.** Those that the conversation service lists for the user. One that the
//!   client names beyond those is looked up, and sent only if the user is a member: who was removed
//!   receives nothing more, and nobody reads a conversation by naming it.
//! - **Failures** are retried a few times and then told: the session is closed with 1013 and a
//!   reason, and the client resumes from what it has. Nothing is skipped in silence.
//!
//! - **Other nodes** (`ROUTING_MODE=group`) hand a session's events over once they can know of it
//!   ([`Visibility`]). What is with the message service is sent at once; when they do, what happened
//!   meanwhile is asked for, and only then the session goes live. It waits without a turn.
//!
//! The shard holds the session's live events meanwhile. [`CatchUpStep::Complete`] says what was sent, so
//! that nothing of it is sent again.

mod page;
mod positions;
mod task;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::domain::close::{Close, CloseCode};
use crate::domain::event::Event;
use crate::domain::ids::{ConversationPosition, SessionAddress};
use crate::service::backends::ports::{ConversationListing, ConversationSource, MessageSource};
use crate::service::events::encode::{CompressionConfig, Encoder};
use crate::service::members::directory::SessionIds;
use crate::service::sessions::client_message::LastSequence;
use crate::service::sessions::presence::Visibility;

/// Messages asked for at once (contract §3).
const PAGE_MESSAGES: u16 = 100;

/// Settings of catch-up.
#[derive(Clone, Debug)]
pub struct CatchUpConfig {
    /// Calls to the neighbours under way at once, all sessions together.
    pub calls_max: usize,
    /// Conversations of one session that are asked for at once.
    pub conversations_at_once: usize,
    /// Sessions that catch up at once; the others wait their turn.
    pub sessions_max: usize,
    /// Pages held until their socket has taken them, bytes, all sessions together.
    pub pages_bytes_max: usize,
    /// Requests held while they wait or run, bytes, all sessions together; one more is closed with
    /// 1013.
    pub requests_bytes_max: usize,
    /// Attempts at one call before the catch-up has failed.
    pub attempts_max: u32,
    /// For the socket to take one chunk.
    pub chunk_timeout: Duration,
    /// Messages of one chunk: no more than half of what a session's queue may hold.
    pub chunk_messages_max: usize,
    /// Bytes of one chunk, likewise; a single message may be longer.
    pub chunk_bytes_max: usize,
    /// As for live events.
    pub compression: CompressionConfig,
}

impl Default for CatchUpConfig {
    /// 64 calls, 4 for one session, 512 sessions, 64 MiB each of pages and requests, 5 attempts,
    /// 30 s for a chunk of 64 messages or 512 KiB.
    fn default() -> Self {
        Self {
            calls_max: 64,
            conversations_at_once: 4,
            sessions_max: 512,
            pages_bytes_max: 64 * 1024 * 1024,
            requests_bytes_max: 64 * 1024 * 1024,
            attempts_max: 5,
            chunk_timeout: Duration::from_secs(30),
            chunk_messages_max: 64,
            chunk_bytes_max: 512 * 1024,
            compression: CompressionConfig::default(),
        }
    }
}

crate::counters! {
    /// What catch-up did.
    pub struct CatchUpCounters of SharedCounter {
        Counter requested: "Catch-ups asked for",
        Counter completed: "Catch-ups that were completed",
        Counter refused: "Catch-ups refused because too many waited (1013)",
        Counter failed_neighbour: "Catch-ups given up because a neighbouring service did not answer (1013)",
        Counter failed_slow: "Catch-ups given up because the client read too slowly (1013)",
        Counter unreached: "Catch-ups completed before this node was registered for the session: what other nodes route until then comes with the next",
        Counter retries: "Calls tried again",
        Counter conversations: "Conversations caught up",
        Counter conversations_refused: "Conversations named by clients who are not members",
        Counter pages: "Pages received",
        Counter messages: "Messages sent by catch-up",
        Gauge waiting: "Sessions waiting for their turn to catch up",
        Gauge running: "Sessions catching up",
        Gauge pages_bytes: "Bytes of pages held until their socket has taken them",
    }
}

/// Who says which conversations a user may read.
#[derive(Clone)]
pub enum ReadAccess {
    /// The conversation service.
    Checked {
        /// Lists a user's conversations.
        listing: Arc<dyn ConversationListing>,
        /// Lists a conversation's members.
        source: Arc<dyn ConversationSource>,
    },
    /// Nobody: what a client names is sent, and nothing else. Only where clients are trusted to be
    /// who they say they are anyway (`AUTH_MODE=trust`).
    Unchecked,
}

/// What a session asks for.
#[derive(Debug)]
pub enum CatchUpScope {
    /// WebSocket: all conversations of the user, these from where the client is in them.
    Session(Vec<LastSequence>),
    /// gRPC: one conversation.
    Conversation {
        /// Its id.
        conversation: Box<str>,
        /// The last sequence that the client has.
        after: i64,
    },
}

/// One catch-up.
#[derive(Debug)]
pub struct CatchUpRequest {
    /// Whose.
    pub ids: SessionIds,
    /// Where it is.
    pub address: SessionAddress,
    /// What for.
    pub scope: CatchUpScope,
    /// How far other nodes know the session; `None`: none hands anything over.
    pub visibility: Option<Arc<Visibility>>,
}

/// From a catch-up to the session manager.
#[derive(Debug)]
pub struct CatchUpReport {
    /// The session.
    pub address: SessionAddress,
    /// What is to be done for it.
    pub step: CatchUpStep,
}

/// See [`CatchUpReport`].
#[derive(Debug)]
pub enum CatchUpStep {
    /// Deliver these in order.
    Chunk {
        /// At least one.
        events: Vec<Arc<Event>>,
        /// Told when the last of them was sent.
        sent: oneshot::Sender<()>,
    },
    /// All was sent.
    Complete {
        /// Per conversation the highest sequence that the client has now.
        delivered: Box<[ConversationPosition]>,
    },
    /// It has failed: close the session with this.
    Failed(Close),
}

/// How a catch-up begins.
#[derive(Debug)]
pub enum CatchUpStart {
    /// Catch-up is off: nothing was missed as far as this node can say.
    Off,
    /// Steps will follow, until aborted.
    Running(AbortHandle),
    /// Too many wait: close the session with this.
    Refused(Close),
}

/// Why a catch-up failed, to be told to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CatchUpFailure {
    Conversations,
    Messages,
    TooSlow,
    /// The session has ended: there is nobody to tell.
    Gone,
}

impl CatchUpFailure {
    fn close(self) -> Option<Close> {
        let reason = match self {
            Self::Conversations => "catch-up failed: conversation service unavailable, try again",
            Self::Messages => "catch-up failed: message service unavailable, try again",
            Self::TooSlow => "catch-up failed: the client reads too slowly, try again",
            Self::Gone => return None,
        };
        Some(Close::new(CloseCode::TRY_AGAIN_LATER, reason))
    }
}

const REFUSED: Close =
    Close::new(CloseCode::TRY_AGAIN_LATER, "catch-up refused: too many are waiting, try again");

struct CatchUpResources {
    config: CatchUpConfig,
    messages: Arc<dyn MessageSource>,
    access: ReadAccess,
    counters: Arc<CatchUpCounters>,
    sessions: Semaphore,
    calls: Semaphore,
    pages_bytes: Arc<Semaphore>,
    requests_bytes: Arc<Semaphore>,
    /// Idle ones: as many as have ever worked at the same time, so one per runtime thread at most.
    encoders: Mutex<Vec<Encoder>>,
}

/// Starts catch-ups; clones share its bounds.
#[derive(Clone)]
pub struct CatchUpService(Option<Arc<CatchUpResources>>);

impl CatchUpService {
    /// No catch-up: there is no message service, or no way to know whose conversations are whose.
    pub fn off() -> Self {
        Self(None)
    }

    /// Catch-up from this message service.
    pub fn new(
        config: CatchUpConfig,
        messages: Arc<dyn MessageSource>,
        access: ReadAccess,
        counters: Arc<CatchUpCounters>,
    ) -> Self {
        let fits = |bytes: usize| bytes.min(u32::MAX as usize).min(Semaphore::MAX_PERMITS);
        Self(Some(Arc::new(CatchUpResources {
            sessions: Semaphore::new(config.sessions_max),
            calls: Semaphore::new(config.calls_max),
            pages_bytes: Arc::new(Semaphore::new(fits(config.pages_bytes_max))),
            requests_bytes: Arc::new(Semaphore::new(fits(config.requests_bytes_max))),
            encoders: Mutex::default(),
            config,
            messages,
            access,
            counters,
        })))
    }

    /// Begins one in a task of its own. Needs a tokio runtime.
    pub fn begin(&self, request: CatchUpRequest, out: mpsc::Sender<CatchUpReport>) -> CatchUpStart {
        let Some(resources) = &self.0 else { return CatchUpStart::Off };
        resources.counters.requested.add(1);
        let bytes = u32::try_from(request.scope.bytes()).unwrap_or(u32::MAX);
        let Ok(held) = Arc::clone(&resources.requests_bytes).try_acquire_many_owned(bytes) else {
            resources.counters.refused.add(1);
            return CatchUpStart::Refused(REFUSED);
        };
        let resources = Arc::clone(resources);
        let task = tokio::spawn(async move {
            task::run(resources, request, out).await;
            drop(held);
        });
        CatchUpStart::Running(task.abort_handle())
    }
}

impl CatchUpScope {
    /// About what it takes in memory.
    fn bytes(&self) -> usize {
        let one = size_of::<LastSequence>();
        match self {
            Self::Session(named) => {
                one + named.iter().map(|named| one + named.conversation.len()).sum::<usize>()
            }
            Self::Conversation { conversation, .. } => one + conversation.len(),
        }
    }
}
