//! Catch-up: sends a client the messages that it missed, before live events (contract §3).
//!
//! ```text
//!  resume request ─► waits for a slot ─► which conversations? ─► their pages, concurrently ─► GoLive
//!                    (sessions_max)      ListConversations       call ─► encode ─► socket
//!                                                                (calls_max)   (one page at a time)
//! ```
//!
//! - **Pace.** A page goes to the socket in chunks that fit the session's queue. The next chunk follows
//!   when the shard reports that the last one was sent. So catch-up is never faster than the socket,
//!   and cannot overflow the queue whose overflow closes slow readers.
//! - **Bounds.** Calls in flight, sessions that catch up, pages in memory and waiting requests are each
//!   bounded for all sessions together, first come, first served (`calls`).
//! - **Fairness.** A session whose socket does not take a chunk within [`CatchUpConfig::stall_after`]
//!   keeps nothing but that chunk: no slot, no page, no call. It continues when its socket has taken the
//!   chunk, and is closed after [`CatchUpConfig::chunk_timeout`]. So a slow session waits only for itself.
//! - **Sharing.** Sessions that want the same page while its call waits share the call (`fetches`).
//! - **Access.** The conversations are those that the conversation service lists for the user. Any other
//!   that the client names is sent only if the user is a member of it. So removed members receive
//!   nothing more, and no client can read a conversation by naming it.
//! - **Cursors.** If the client has one, everything since then comes from the tails of the nodes, in the same
//!   chunks, and no message service is called (`replay`). If it cannot be used, the client is told so, and what
//!   follows is the same as without it.
//! - **Failures** are retried a few times. Then the session is closed with 1013 and a reason, and the
//!   client resumes from what it has. Nothing is skipped silently.
//! - **Other nodes** (`HANDOFF=redis`) hand over a session's events only once they can find it
//!   ([`Visibility`]). Stored messages are sent at once. When the session is visible, later
//!   messages are fetched too, and only then the session goes live. A catch-up does not hold a slot
//!   while it waits.
//!
//! The shard holds the session's live events back during catch-up. [`CatchUpStep::Complete`] names
//! exactly the messages that were sent (`positions`), so that no message is sent twice, and none is
//! lost: the message service can commit a lower sequence after a higher one (contract §2). Such a message
//! comes live, after the messages of the catch-up.

mod calls;
mod fetches;
mod page;
mod positions;
mod replay;
mod replayed;
mod resume;
mod steps;
mod task;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::domain::budget::EventBudget;
use crate::domain::caught_up::CaughtUp;
use crate::domain::close::{Close, CloseCode};
use crate::domain::counters::SharedCounter;
use crate::domain::cursor::{CursorExpired, CursorRequest};
use crate::domain::event::Event;
use crate::domain::ids::SessionAddress;
use crate::service::backends::ports::{ConversationListing, ConversationSource, MessageSource};
use crate::service::events::encode::{CompressionConfig, Encoder};
use crate::service::members::directory::SessionIds;
use crate::service::routing::replays::TailReplays;
use crate::service::sessions::client_message::LastSequence;
use crate::service::sessions::presence::Visibility;

use self::calls::CallLimits;
use self::fetches::Fetches;

/// Messages per page (contract §3).
const PAGE_MESSAGES: u16 = 100;

/// Settings of catch-up.
#[derive(Clone, Debug)]
pub struct CatchUpConfig {
    /// Concurrent calls to the neighbours, all sessions together.
    pub calls_max: usize,
    /// Conversations of one session, over WebSocket or gRPC, that are caught up concurrently: its share of the calls.
    pub steps_at_once: usize,
    /// Sessions that catch up concurrently; the others wait.
    pub sessions_max: usize,
    /// Pages in memory until their socket has taken them, bytes, all sessions together.
    pub pages_bytes_max: usize,
    /// Chunks that slow sockets have not taken, bytes, all sessions together. Beyond that, sessions whose
    /// socket is slow are closed with 1013.
    pub stalled_bytes_max: usize,
    /// What sessions remember of the messages that catch-up delivered, bytes, all sessions together.
    /// Beyond that, nothing is remembered, so that messages may be repeated live.
    pub delivered_bytes_max: usize,
    /// Requests that wait or run, bytes, all sessions together. Beyond that, sessions are closed
    /// with 1013.
    pub requests_bytes_max: usize,
    /// Attempts per call before the catch-up fails.
    pub attempts_max: u32,
    /// How long the socket may take for one chunk before its session keeps nothing that others wait
    /// for.
    pub stall_after: Duration,
    /// How long the socket may take for one chunk. Then the session is closed with 1013.
    pub chunk_timeout: Duration,
    /// Messages per chunk: at most half of what a session's queue holds.
    pub chunk_messages_max: usize,
    /// Bytes per chunk, likewise. A single message may be longer.
    pub chunk_bytes_max: usize,
    /// When to compress: the same as for live events.
    pub compression: CompressionConfig,
}

impl Default for CatchUpConfig {
    /// 64 calls, 16 of them of one session; 512 sessions; 64 MiB each of pages, of stalled chunks, of
    /// what was delivered and of requests; 5 attempts; 30 s for a chunk of 64 messages or 64 KiB, stalled
    /// after 250 ms.
    fn default() -> Self {
        Self {
            calls_max: 64,
            steps_at_once: 16,
            sessions_max: 512,
            pages_bytes_max: 64 * 1024 * 1024,
            stalled_bytes_max: 64 * 1024 * 1024,
            delivered_bytes_max: 64 * 1024 * 1024,
            requests_bytes_max: 64 * 1024 * 1024,
            attempts_max: 5,
            stall_after: Duration::from_millis(250),
            chunk_timeout: Duration::from_secs(30),
            chunk_messages_max: 64,
            chunk_bytes_max: 64 * 1024,
            compression: CompressionConfig::default(),
        }
    }
}

impl CatchUpConfig {
    /// Memory of all catch-ups together, without the pages of calls in flight, bytes.
    pub fn bytes_max(&self) -> usize {
        self.pages_bytes_max
            + self.stalled_bytes_max
            + self.delivered_bytes_max
            + self.requests_bytes_max
    }
}

crate::counters! {
    /// Counters of catch-up.
    pub struct CatchUpCounters of SharedCounter {
        Counter requested: "Catch-ups requested",
        Counter completed: "Catch-ups completed",
        Counter refused: "Catch-ups refused because too many were waiting (1013)",
        Counter failed_neighbour: "Catch-ups failed because a neighbouring service did not answer (1013)",
        Counter failed_slow: "Catch-ups failed because the client read too slowly (1013)",
        Counter unreached: "Catch-ups completed before other nodes could find the session: events that they routed until then come with its next catch-up",
        Counter retries: "Calls retried",
        Counter events_reduced: "Events that JSON or DeliveryEvent cannot hold as they are: JSON clients got the payload as base64, gRPC clients only its position",
        Counter conversations: "Conversations caught up",
        Counter conversations_refused: "Conversations named by clients that are not members",
        Counter cursor_requests: "Sessions that asked for cursors",
        Counter cursor_resumes: "Sessions that got everything since their cursor",
        Counter replayed: "Events sent since a cursor",
        Counter pages: "Pages received",
        Counter pages_shared: "Pages for which a session joined the call of another one",
        Counter stalls: "Chunks that a socket did not take within 250 ms",
        Counter delivered_forgotten: "Runs of caught-up messages that are not remembered, because there are too many: the messages may be repeated live",
        Counter messages: "Messages sent by catch-up, and all events since a cursor",
        Gauge waiting: "Sessions waiting to catch up",
        Gauge running: "Sessions catching up",
        Gauge stalled: "Sessions whose catch-up waits for their socket",
        Gauge pages_bytes: "Bytes of pages in memory until their socket has taken them",
    }
}

/// Decides which conversations a user may read.
#[derive(Clone)]
pub enum ReadAccess {
    /// The conversation service decides.
    Checked {
        /// Lists a user's conversations.
        listing: Arc<dyn ConversationListing>,
        /// Lists a conversation's members.
        source: Arc<dyn ConversationSource>,
    },
    /// Every conversation that a client names is sent, and no other. Only for nodes that trust their
    /// clients anyway (`AUTH_MODE=trust`).
    Unchecked,
}

/// What a session requests.
#[derive(Debug)]
pub enum CatchUpScope {
    /// WebSocket: all conversations of the user; the named ones after these sequences.
    Session(Vec<LastSequence>),
    /// gRPC: what was missed since the cursor. If it cannot be used, the session is closed.
    SinceCursor,
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
    /// The session's user and device.
    pub ids: SessionIds,
    /// The session's address.
    pub address: SessionAddress,
    /// What to send.
    pub scope: CatchUpScope,
    /// The client wants cursors, and may have one. Not with [`CatchUpScope::Conversation`].
    pub cursor: Option<CursorRequest>,
    /// Whether other nodes hand over the session's events. `None`: there are none that do.
    pub visibility: Option<Arc<Visibility>>,
}

/// A report of a catch-up to the session manager.
#[derive(Debug)]
pub struct CatchUpReport {
    /// The session.
    pub address: SessionAddress,
    /// What the session manager has to do.
    pub step: CatchUpStep,
}

/// What the session manager has to do for a catch-up.
#[derive(Debug)]
pub enum CatchUpStep {
    /// Deliver these events in order.
    Chunk {
        /// At least one.
        events: Vec<Arc<Event>>,
        /// Notified when the last of them was sent.
        sent: oneshot::Sender<()>,
    },
    /// Everything was sent.
    Complete {
        /// The messages that were sent.
        delivered: Box<CaughtUp>,
    },
    /// The cursor of the client cannot be used. Chunks of a catch-up without it follow.
    CursorExpired(CursorExpired),
    /// After [`CatchUpStep::Complete`]: the client has asked for cursors, and every event of the user that is routed
    /// from now on reaches the session.
    MayHaveCursors,
    /// The catch-up failed: close the session with this.
    Failed(Close),
}

/// Result of [`CatchUpService::begin`].
#[derive(Debug)]
pub enum CatchUpStart {
    /// Catch-up is off: there is nothing to send.
    Off,
    /// Reports will follow, until the task is aborted.
    Running(AbortHandle),
    /// Too many are waiting: close the session with this.
    Refused(Close),
}

/// Why a catch-up failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CatchUpFailure {
    Conversations,
    Messages,
    TooSlow,
    /// gRPC: the client has to name its conversations in another session, before any live event.
    CursorExpired(CursorExpired),
    /// The session has ended, so there is no client to inform.
    SessionEnded,
}

impl CatchUpFailure {
    fn close(self) -> Option<Close> {
        let reason = match self {
            Self::Conversations => "catch-up failed: conversation service unavailable, try again",
            Self::Messages => "catch-up failed: message service unavailable, try again",
            Self::TooSlow => "catch-up failed: the client reads too slowly, try again",
            Self::CursorExpired(why) => {
                let reason = format!("cursor expired: {}", why.label()).into();
                return Some(Close { code: CloseCode::RESUME_TOO_LATE, reason });
            }
            Self::SessionEnded => return None,
        };
        Some(Close::new(CloseCode::TRY_AGAIN_LATER, reason))
    }
}

const REFUSED: Close =
    Close::new(CloseCode::TRY_AGAIN_LATER, "catch-up refused: too many are waiting, try again");

/// What all catch-ups share: sources, budgets, encoders.
struct CatchUpResources {
    config: CatchUpConfig,
    /// `None`: there is none, or nothing decides who may read what.
    messages: Option<Arc<dyn MessageSource>>,
    access: ReadAccess,
    /// Not set: the node keeps no tails.
    replays: OnceLock<Arc<dyn TailReplays>>,
    counters: Arc<CatchUpCounters>,
    /// Cursors that could not be used, by [`CursorExpired`].
    cursors_expired: [SharedCounter; CursorExpired::COUNT],
    sessions: Semaphore,
    limits: CallLimits,
    fetches: Fetches,
    stalled_bytes: Semaphore,
    delivered: Arc<EventBudget>,
    requests_bytes: Arc<Semaphore>,
    /// Idle encoders. At most one per runtime thread, because encoding does not await.
    encoders: Mutex<Vec<Encoder>>,
}

/// Starts catch-ups. Clones share the bounds.
#[derive(Clone)]
pub struct CatchUpService(Arc<CatchUpResources>);

impl CatchUpService {
    /// Without a message service, or a way to check who may read a conversation: only what was missed since a cursor
    /// is sent.
    pub fn without_messages(config: CatchUpConfig, counters: Arc<CatchUpCounters>) -> Self {
        Self::from_parts(config, None, ReadAccess::Unchecked, counters)
    }

    /// Catches up from this message service.
    pub fn new(
        config: CatchUpConfig,
        messages: Arc<dyn MessageSource>,
        access: ReadAccess,
        counters: Arc<CatchUpCounters>,
    ) -> Self {
        Self::from_parts(config, Some(messages), access, counters)
    }

    fn from_parts(
        config: CatchUpConfig,
        messages: Option<Arc<dyn MessageSource>>,
        access: ReadAccess,
        counters: Arc<CatchUpCounters>,
    ) -> Self {
        let fits = |bytes: usize| bytes.min(u32::MAX as usize).min(Semaphore::MAX_PERMITS);
        Self(Arc::new(CatchUpResources {
            sessions: Semaphore::new(config.sessions_max),
            limits: CallLimits::new(
                config.calls_max,
                config.pages_bytes_max,
                Arc::clone(&counters),
            ),
            fetches: Fetches::default(),
            stalled_bytes: Semaphore::new(fits(config.stalled_bytes_max)),
            delivered: EventBudget::new(config.delivered_bytes_max as u64),
            requests_bytes: Arc::new(Semaphore::new(fits(config.requests_bytes_max))),
            encoders: Mutex::default(),
            config,
            messages,
            access,
            replays: OnceLock::new(),
            cursors_expired: Default::default(),
            counters,
        }))
    }

    /// Cursors of clients that could not be used for this reason.
    pub fn cursors_expired(&self, why: CursorExpired) -> u64 {
        self.0.cursors_expired[why as usize].get()
    }

    /// What sessions have missed since a cursor comes from here. Without this call no session gets cursors. To be
    /// called once, for all clones.
    pub fn set_replays(&self, replays: Arc<dyn TailReplays>) {
        assert!(self.0.replays.set(replays).is_ok(), "set once");
    }

    /// The bounds of a chunk: messages and bytes.
    pub fn chunk_max(&self) -> (usize, usize) {
        (self.0.config.chunk_messages_max, self.0.config.chunk_bytes_max)
    }

    /// Conversations of one session that are caught up concurrently. A gRPC session requests them one by one.
    pub fn steps_at_once(&self) -> usize {
        self.0.config.steps_at_once
    }

    /// Starts a catch-up in a task of its own, on the current runtime.
    pub fn begin(
        &self,
        request: CatchUpRequest,
        reports: mpsc::Sender<CatchUpReport>,
    ) -> CatchUpStart {
        let resources = &self.0;
        if resources.messages.is_none() && request.cursor.is_none() {
            return CatchUpStart::Off;
        }
        resources.counters.requested.add(1);
        let positions = match &request.cursor {
            Some(CursorRequest::Since(cursor)) => size_of_val(cursor.positions()),
            Some(CursorRequest::First | CursorRequest::Unusable(_)) | None => 0,
        };
        let bytes = u32::try_from(request.scope.bytes() + positions).unwrap_or(u32::MAX);
        let Ok(permit) = Arc::clone(&resources.requests_bytes).try_acquire_many_owned(bytes) else {
            resources.counters.refused.add(1);
            return CatchUpStart::Refused(REFUSED);
        };
        let resources = Arc::clone(resources);
        let task = tokio::spawn(async move {
            task::run(resources, request, reports).await;
            drop(permit);
        });
        CatchUpStart::Running(task.abort_handle())
    }
}

impl CatchUpScope {
    /// Approximate memory, bytes.
    fn bytes(&self) -> usize {
        let one = size_of::<LastSequence>();
        match self {
            Self::Session(named) => {
                one + named.iter().map(|named| one + named.conversation.len()).sum::<usize>()
            }
            Self::SinceCursor => one,
            Self::Conversation { conversation, .. } => one + conversation.len(),
        }
    }
}
