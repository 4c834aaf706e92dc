//! One session's catch-up, a task.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{Mutex, OwnedSemaphorePermit, SemaphorePermit, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::page::{chunks, in_order};
use super::positions::Positions;
use super::{
    CatchUpFailure, CatchUpReport, CatchUpRequest, CatchUpResources, CatchUpScope, CatchUpStep,
    PAGE_MESSAGES, ReadAccess,
};
use crate::domain::counters::SharedCounter;
use crate::domain::event::Event;
use crate::domain::ids::{ConversationPosition, SessionAddress};
use crate::service::backends::ports::{BoxFuture, ConversationListing, NeighbourError};
use crate::service::events::proto::message::v1::Message;
use crate::service::runtime::backoff::Backoff;
use crate::service::sessions::presence::{Visibility, VisibilityState};

/// Delays before a failed call is retried; the attempts are bounded by the configuration.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::MAX);
/// Attempts at a page of full size; later ones ask for less, in case the page is what is too large
/// or too slow.
const FULL_PAGE_ATTEMPTS: u32 = 2;

/// A conversation that was caught up.
struct CaughtUpConversation {
    conversation: Arc<str>,
    sequence: i64,
    /// What happened after its last page was asked for comes live.
    is_final: bool,
}

struct CatchUpTask {
    resources: Arc<CatchUpResources>,
    user: Arc<str>,
    address: SessionAddress,
    /// `None`: no other node hands anything over.
    visibility: Option<Arc<Visibility>>,
    out: mpsc::Sender<CatchUpReport>,
    /// One page at a time goes to the socket: together they would overflow its queue.
    socket: Mutex<()>,
}

/// Counts itself on a gauge for as long as it lives, however it ends.
struct GaugeGuard<'a>(&'a SharedCounter);

impl<'a> GaugeGuard<'a> {
    fn new(gauge: &'a SharedCounter) -> Self {
        gauge.add(1);
        Self(gauge)
    }
}

impl Drop for GaugeGuard<'_> {
    fn drop(&mut self) {
        self.0.sub(1);
    }
}

/// Bytes of a page that is held, off the gauge and back in the budget when dropped.
struct HeldPage {
    resources: Arc<CatchUpResources>,
    bytes: u64,
    _budget: Option<OwnedSemaphorePermit>,
}

impl Drop for HeldPage {
    fn drop(&mut self) {
        self.resources.counters.pages_bytes.sub(self.bytes);
    }
}

/// Catches one session up, and says how it ended.
pub(super) async fn run(
    resources: Arc<CatchUpResources>,
    request: CatchUpRequest,
    out: mpsc::Sender<CatchUpReport>,
) {
    let CatchUpRequest { ids, address, scope, visibility } = request;
    let task = Arc::new(CatchUpTask {
        resources: Arc::clone(&resources),
        user: Arc::from(ids.user()),
        address,
        visibility,
        out: out.clone(),
        socket: Mutex::new(()),
    });
    let step = match task.catch_up(scope).await {
        Ok(delivered) => {
            resources.counters.completed.add(1);
            CatchUpStep::Complete { delivered }
        }
        Err(failure) => {
            match failure {
                CatchUpFailure::Conversations | CatchUpFailure::Messages => {
                    resources.counters.failed_neighbour.add(1);
                }
                CatchUpFailure::TooSlow => resources.counters.failed_slow.add(1),
                CatchUpFailure::Gone => {}
            }
            let Some(close) = failure.close() else { return };
            CatchUpStep::Failed(close)
        }
    };
    // An error means that the session manager has ended, and the session with it.
    let _ = out.send(CatchUpReport { address, step }).await;
}

/// A position among the sessions that catch up at once.
struct CatchUpSlot<'a> {
    _place: SemaphorePermit<'a>,
    _running: GaugeGuard<'a>,
}

impl CatchUpResources {
    async fn turn(&self) -> Result<CatchUpSlot<'_>, CatchUpFailure> {
        let waiting = GaugeGuard::new(&self.counters.waiting);
        // Never closed.
        let position = self.sessions.acquire().await.map_err(|_| CatchUpFailure::Gone)?;
        drop(waiting);
        Ok(CatchUpSlot { _place: position, _running: GaugeGuard::new(&self.counters.running) })
    }
}

impl CatchUpTask {
    async fn catch_up(
        self: Arc<Self>,
        scope: CatchUpScope,
    ) -> Result<Box<[ConversationPosition]>, CatchUpFailure> {
        let mut turn = self.resources.turn().await?;
        let mut positions = Positions::new(scope);
        while !self.round(&mut positions).await? {
            // Who waits for other nodes to know the session keeps nobody from his turn, unless the
            // positions that it keeps meanwhile find no room.
            let Some(visibility) = &self.visibility else { break };
            let bytes = u32::try_from(positions.bytes()).unwrap_or(u32::MAX);
            let budget = Arc::clone(&self.resources.requests_bytes);
            if let Ok(kept) = budget.try_acquire_many_owned(bytes) {
                drop(turn);
                visibility.decided().await;
                turn = self.resources.turn().await?;
                drop(kept);
            } else {
                visibility.decided().await;
            }
        }
        drop(turn);
        if self.visibility_state() == VisibilityState::NotVisible {
            self.resources.counters.unreached.add(1);
        }
        Ok(positions.delivered())
    }

    /// Whether other nodes hand over what is routed from now on.
    fn visibility_state(&self) -> VisibilityState {
        self.visibility
            .as_ref()
            .map_or(VisibilityState::Visible, |visibility| visibility.state(Instant::now()))
    }

    /// Whether there is nothing to wait for.
    fn is_decided(&self) -> bool {
        !matches!(self.visibility_state(), VisibilityState::Pending(_))
    }

    /// Asks for what is missing. Returns whether what happened since comes live.
    async fn round(self: &Arc<Self>, positions: &mut Positions) -> Result<bool, CatchUpFailure> {
        let is_last = self.is_decided();
        if let ReadAccess::Checked { listing, .. } = &self.resources.access {
            let listed = if positions.is_session { self.list(listing).await? } else { Vec::new() };
            positions.listed(&listed);
            for conversation in positions.doubtful(&listed) {
                let is_member = self.is_member(&conversation).await?;
                if positions.judged(&conversation, is_member) {
                    self.resources.counters.conversations_refused.add(1);
                }
            }
        }
        self.conversations(positions).await?;
        Ok(is_last)
    }

    async fn list(
        &self,
        listing: &Arc<dyn ConversationListing>,
    ) -> Result<Vec<Arc<str>>, CatchUpFailure> {
        let ask = |_| listing.conversations_of(Arc::clone(&self.user));
        let listed = self.ask(ask, CatchUpFailure::Conversations).await?.unwrap_or_default();
        let mut ids: Vec<Arc<str>> = listed
            .into_iter()
            .map(|conversation| Arc::from(conversation.conversation_id))
            .filter(|id: &Arc<str>| !id.is_empty())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    async fn is_member(&self, conversation: &Arc<str>) -> Result<bool, CatchUpFailure> {
        let ReadAccess::Checked { source, .. } = &self.resources.access else { return Ok(true) };
        let ask = |_| source.members(Arc::clone(conversation));
        let members = self.ask(ask, CatchUpFailure::Conversations).await?.unwrap_or_default();
        Ok(members.contains(&self.user))
    }

    /// Catches conversations up, a few side by side.
    async fn conversations(
        self: &Arc<Self>,
        positions: &mut Positions,
    ) -> Result<(), CatchUpFailure> {
        let mut wanted = VecDeque::from(positions.wanted());
        let mut running = JoinSet::new();
        loop {
            while running.len() < self.resources.config.conversations_at_once
                && let Some((conversation, after)) = wanted.pop_front()
            {
                running.spawn(Arc::clone(self).conversation(conversation, after));
            }
            match running.join_next().await {
                None => return Ok(()),
                // The rest is aborted with the set.
                Some(done) => {
                    let CaughtUpConversation { conversation, sequence, is_final } =
                        done.unwrap_or(Err(CatchUpFailure::Gone))?;
                    positions.caught_up(&conversation, sequence, is_final);
                }
            }
        }
    }

    /// Catches one conversation up, page by page.
    async fn conversation(
        self: Arc<Self>,
        conversation: Arc<str>,
        after: i64,
    ) -> Result<CaughtUpConversation, CatchUpFailure> {
        let mut sequence = after;
        let mut is_final;
        loop {
            is_final = self.is_decided();
            let (messages, asked, held) = self.page(&conversation, sequence).await?;
            let is_last = messages.len() < usize::from(asked);
            let messages = in_order(messages, sequence);
            let Some(newest) = messages.last().map(|message| message.sequence) else {
                if is_last {
                    break;
                }
                // A full page without progress would be asked for again for ever.
                return Err(CatchUpFailure::Messages);
            };
            let encoding = self.address.encoding;
            let events = self.resources.encode(&conversation, messages, encoding);
            let socket = self.socket.lock().await;
            for chunk in chunks(events, encoding, &self.resources.config) {
                self.send(chunk).await?;
            }
            drop((socket, held));
            sequence = newest;
            if is_last {
                break;
            }
        }
        self.resources.counters.conversations.add(1);
        Ok(CaughtUpConversation { conversation, sequence, is_final })
    }

    /// One page, how many messages were asked for, and what it holds of the budget.
    async fn page(
        &self,
        conversation: &Arc<str>,
        after: i64,
    ) -> Result<(Vec<Message>, u16, Option<HeldPage>), CatchUpFailure> {
        let mut asked = PAGE_MESSAGES;
        let ask = |attempt: u32| {
            let less = attempt.saturating_sub(FULL_PAGE_ATTEMPTS - 1).min(15);
            asked = (PAGE_MESSAGES >> (2 * less).min(15)).max(1);
            let (user, conversation) = (Arc::clone(&self.user), Arc::clone(conversation));
            let page = self.resources.messages.messages_after(user, conversation, after, asked);
            let resources = Arc::clone(&self.resources);
            // The budget is waited for within the call's turn, so no more pages are in memory than
            // calls may be under way and the budget has room for.
            let page: BoxFuture<_> = Box::pin(async move {
                let messages = page.await?;
                let held = hold(resources, &messages).await;
                Ok((messages, held))
            });
            page
        };
        let answer = self.ask(ask, CatchUpFailure::Messages).await?;
        self.resources.counters.pages.add(1);
        // A conversation that is gone has no messages.
        let (messages, held) =
            answer.map_or((Vec::new(), None), |(messages, held)| (messages, Some(held)));
        Ok((messages, asked, held))
    }

    /// Asks a neighbour within the bound of calls, a few times if it fails. `None`: it does not
    /// know what it was asked for.
    async fn ask<A>(
        &self,
        mut ask: impl FnMut(u32) -> BoxFuture<Result<A, NeighbourError>>,
        otherwise: CatchUpFailure,
    ) -> Result<Option<A>, CatchUpFailure> {
        let config = &self.resources.config;
        for attempt in 0..config.attempts_max {
            if attempt > 0 {
                self.resources.counters.retries.add(1);
                sleep(BACKOFF.random_delay(attempt - 1)).await;
            }
            let turn = self.resources.calls.acquire().await;
            let answer = ask(attempt).await;
            drop(turn);
            match answer {
                Ok(answer) => return Ok(Some(answer)),
                Err(NeighbourError::NotFound) => return Ok(None),
                Err(NeighbourError::Unavailable(why)) => {
                    tracing::debug!(why, attempt, "a call for catch-up failed");
                }
            }
        }
        Err(otherwise)
    }

    /// Hands a chunk over and waits until the socket has taken it.
    async fn send(&self, events: Vec<Arc<Event>>) -> Result<(), CatchUpFailure> {
        let count = events.len() as u64;
        let (sent, taken) = oneshot::channel();
        let step = CatchUpStep::Chunk { events, sent };
        let handed = self.out.send(CatchUpReport { address: self.address, step }).await;
        handed.map_err(|_| CatchUpFailure::Gone)?;
        match timeout(self.resources.config.chunk_timeout, taken).await {
            Ok(Ok(())) => {
                self.resources.counters.messages.add(count);
                Ok(())
            }
            Ok(Err(_)) => Err(CatchUpFailure::Gone),
            Err(_) => Err(CatchUpFailure::TooSlow),
        }
    }
}

/// Takes a page into the budget; one larger than all of it takes all of it.
async fn hold(resources: Arc<CatchUpResources>, messages: &[Message]) -> HeldPage {
    let bytes: usize = messages.iter().map(Message::encoded_len).sum();
    let share = bytes.min(resources.config.pages_bytes_max).min(u32::MAX as usize) as u32;
    let budget = Arc::clone(&resources.pages_bytes).acquire_many_owned(share).await.ok();
    resources.counters.pages_bytes.add(bytes as u64);
    HeldPage { resources, bytes: bytes as u64, _budget: budget }
}
