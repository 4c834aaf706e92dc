//! The catch-up of one session, a task.

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
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, NOT_FOUND_RETRY, NeighbourError,
};
use crate::service::events::proto::message::v1::Message;
use crate::service::runtime::backoff::Backoff;
use crate::service::sessions::presence::{Visibility, VisibilityState};

/// Delays before a failed call is retried; the attempts are bounded by the configuration.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::MAX);
/// Attempts that request a page of full size. Later ones request a quarter of the one before, in
/// case the page is too large or takes too long.
const FULL_PAGE_ATTEMPTS: u32 = 2;

/// A conversation that was caught up.
struct CaughtUpConversation {
    conversation: Arc<str>,
    sequence: i64,
    /// Events that were routed after the request for the last page are delivered live.
    is_final: bool,
}

/// The catch-up of one session.
struct CatchUpTask {
    resources: Arc<CatchUpResources>,
    user: Arc<str>,
    address: SessionAddress,
    /// `None`: no other node hands over events.
    visibility: Option<Arc<Visibility>>,
    reports: mpsc::Sender<CatchUpReport>,
    /// Held while a page goes to the socket: several at once would overflow the session's queue.
    socket: Mutex<()>,
}

/// Counts one on a gauge until it is dropped.
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

/// The share of a page in the memory budget, returned when dropped.
struct PageLease {
    resources: Arc<CatchUpResources>,
    bytes: u64,
    _budget: Option<OwnedSemaphorePermit>,
}

impl PageLease {
    /// Waits for room. A page larger than the whole budget takes all of it.
    async fn acquire(resources: Arc<CatchUpResources>, messages: &[Message]) -> Self {
        let bytes: usize = messages.iter().map(Message::encoded_len).sum();
        let share = bytes.min(resources.config.pages_bytes_max).min(u32::MAX as usize) as u32;
        let budget = Arc::clone(&resources.pages_bytes).acquire_many_owned(share).await.ok();
        resources.counters.pages_bytes.add(bytes as u64);
        Self { resources, bytes: bytes as u64, _budget: budget }
    }
}

impl Drop for PageLease {
    fn drop(&mut self) {
        self.resources.counters.pages_bytes.sub(self.bytes);
    }
}

/// Runs one catch-up and reports its outcome.
pub(super) async fn run(
    resources: Arc<CatchUpResources>,
    request: CatchUpRequest,
    reports: mpsc::Sender<CatchUpReport>,
) {
    let CatchUpRequest { ids, address, scope, visibility } = request;
    let task = Arc::new(CatchUpTask {
        resources: Arc::clone(&resources),
        user: Arc::from(ids.user()),
        address,
        visibility,
        reports: reports.clone(),
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
                CatchUpFailure::SessionEnded => {}
            }
            let Some(close) = failure.close() else { return };
            CatchUpStep::Failed(close)
        }
    };
    // An error means that the session manager has ended, so the session has too.
    let _ = reports.send(CatchUpReport { address, step }).await;
}

/// One of the [`sessions_max`](super::CatchUpConfig::sessions_max) concurrent catch-ups.
struct CatchUpSlot<'a> {
    _permit: SemaphorePermit<'a>,
    _running: GaugeGuard<'a>,
}

impl CatchUpResources {
    async fn slot(&self) -> Result<CatchUpSlot<'_>, CatchUpFailure> {
        let waiting = GaugeGuard::new(&self.counters.waiting);
        // The semaphore is never closed.
        let permit = self.sessions.acquire().await.map_err(|_| CatchUpFailure::SessionEnded)?;
        drop(waiting);
        Ok(CatchUpSlot { _permit: permit, _running: GaugeGuard::new(&self.counters.running) })
    }
}

/// The answer to a question about an id that only the client knows: a malformed id is its fault, and means
/// that there is no such conversation.
fn of_client<A: 'static>(
    answer: BoxFuture<Result<A, NeighbourError>>,
) -> BoxFuture<Result<A, NeighbourError>> {
    Box::pin(async move {
        answer.await.map_err(|error| match error {
            NeighbourError::Invalid(_) => NeighbourError::NotFound,
            NeighbourError::NotFound
            | NeighbourError::Denied(_)
            | NeighbourError::TooLarge(_)
            | NeighbourError::Unavailable(_) => error,
        })
    })
}

impl CatchUpTask {
    async fn catch_up(
        self: Arc<Self>,
        scope: CatchUpScope,
    ) -> Result<Box<[ConversationPosition]>, CatchUpFailure> {
        let mut slot = self.resources.slot().await?;
        let mut positions = Positions::new(scope);
        while !self.round(&mut positions).await? {
            // Does not hold a slot while waiting for other nodes, unless the budget has no room for
            // the positions.
            let Some(visibility) = &self.visibility else { break };
            let bytes = u32::try_from(positions.bytes()).unwrap_or(u32::MAX);
            let budget = Arc::clone(&self.resources.requests_bytes);
            if let Ok(permit) = budget.try_acquire_many_owned(bytes) {
                drop(slot);
                visibility.decided().await;
                slot = self.resources.slot().await?;
                drop(permit);
            } else {
                visibility.decided().await;
            }
        }
        drop(slot);
        if self.visibility_state() == VisibilityState::NotVisible {
            self.resources.counters.unreached.add(1);
        }
        Ok(positions.delivered())
    }

    /// Whether other nodes hand over what they route from now on.
    fn visibility_state(&self) -> VisibilityState {
        self.visibility
            .as_ref()
            .map_or(VisibilityState::Visible, |visibility| visibility.state(Instant::now()))
    }

    fn is_decided(&self) -> bool {
        !matches!(self.visibility_state(), VisibilityState::Pending(_))
    }

    /// Sends what is missing. Returns whether later events are delivered live, or no longer waited
    /// for.
    async fn round(self: &Arc<Self>, positions: &mut Positions) -> Result<bool, CatchUpFailure> {
        let is_last = self.is_decided();
        if let ReadAccess::Checked { listing, source } = &self.resources.access {
            let listed = if positions.is_session { self.list(listing).await? } else { Vec::new() };
            positions.add_listed(&listed);
            self.verify(positions, &listed, source).await?;
        }
        self.conversations(positions).await?;
        Ok(is_last)
    }

    /// Finds out whether the user is a member of the conversations that they name and that are not listed.
    /// Replicas lag, so what is not found is asked for once more, all after the same delay.
    async fn verify(
        &self,
        positions: &mut Positions,
        listed: &[Arc<str>],
        source: &Arc<dyn ConversationSource>,
    ) -> Result<(), CatchUpFailure> {
        let mut unverified = positions.unverified(listed);
        for is_last in [false, true] {
            let mut not_found = Vec::new();
            for conversation in unverified {
                let call = |_| of_client(source.members(Arc::clone(&conversation)));
                let members = self.call(call, CatchUpFailure::Conversations).await?;
                if members.is_none() && !is_last {
                    not_found.push(conversation);
                    continue;
                }
                let is_member = members.is_some_and(|members| members.contains(&self.user));
                if positions.set_membership(&conversation, is_member) {
                    self.resources.counters.conversations_refused.add(1);
                }
            }
            if not_found.is_empty() {
                break;
            }
            unverified = not_found;
            sleep(NOT_FOUND_RETRY).await;
        }
        Ok(())
    }

    /// The user's conversations, sorted.
    async fn list(
        &self,
        listing: &Arc<dyn ConversationListing>,
    ) -> Result<Vec<Arc<str>>, CatchUpFailure> {
        let call = |_| listing.conversations_of(Arc::clone(&self.user));
        let listed = self.call_twice(call, CatchUpFailure::Conversations).await?;
        let listed = listed.unwrap_or_default();
        let mut ids: Vec<Arc<str>> = listed
            .into_iter()
            .map(|conversation| Arc::from(conversation.conversation_id))
            .filter(|id: &Arc<str>| !id.is_empty())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Catches conversations up, a few concurrently.
    async fn conversations(
        self: &Arc<Self>,
        positions: &mut Positions,
    ) -> Result<(), CatchUpFailure> {
        let mut unfinished = VecDeque::from(positions.unfinished());
        let mut running = JoinSet::new();
        loop {
            while running.len() < self.resources.config.conversations_at_once
                && let Some((conversation, after)) = unfinished.pop_front()
            {
                running.spawn(Arc::clone(self).conversation(conversation, after));
            }
            match running.join_next().await {
                None => return Ok(()),
                // On an error the set aborts the others.
                Some(done) => {
                    let CaughtUpConversation { conversation, sequence, is_final } =
                        done.unwrap_or(Err(CatchUpFailure::SessionEnded))?;
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
            let (messages, page_size, lease) = self.page(&conversation, sequence).await?;
            let is_last = messages.len() < usize::from(page_size);
            let messages = in_order(messages, sequence);
            let Some(newest) = messages.last().map(|message| message.sequence) else {
                if is_last {
                    break;
                }
                // A full page without progress would be requested for ever.
                return Err(CatchUpFailure::Messages);
            };
            let encoding = self.address.encoding;
            let events = self.resources.encode(&conversation, messages, encoding);
            let socket = self.socket.lock().await;
            for chunk in chunks(events, encoding, &self.resources.config) {
                self.send(chunk).await?;
            }
            drop((socket, lease));
            sequence = newest;
            if is_last {
                break;
            }
        }
        self.resources.counters.conversations.add(1);
        Ok(CaughtUpConversation { conversation, sequence, is_final })
    }

    /// One page, its requested size, and its share in the memory budget.
    async fn page(
        &self,
        conversation: &Arc<str>,
        after: i64,
    ) -> Result<(Vec<Message>, u16, Option<PageLease>), CatchUpFailure> {
        let mut page_size = PAGE_MESSAGES;
        let call = |attempt: u32| {
            let quarters = attempt.saturating_sub(FULL_PAGE_ATTEMPTS - 1).min(15);
            page_size = (PAGE_MESSAGES >> (2 * quarters).min(15)).max(1);
            let (user, conversation) = (Arc::clone(&self.user), Arc::clone(conversation));
            let page = self.resources.messages.messages_after(user, conversation, after, page_size);
            let page = match self.resources.access {
                ReadAccess::Checked { .. } => page,
                // Only the client says that there is such a conversation.
                ReadAccess::Unchecked => of_client(page),
            };
            let resources = Arc::clone(&self.resources);
            // Waits for the budget while it still counts as a call. So the pages in memory are
            // bounded by the budget plus `calls_max` pages.
            let page: BoxFuture<_> = Box::pin(async move {
                let messages = page.await?;
                let lease = PageLease::acquire(resources, &messages).await;
                Ok((messages, lease))
            });
            page
        };
        let answer = self.call_twice(call, CatchUpFailure::Messages).await?;
        self.resources.counters.pages.add(1);
        // A deleted conversation has no messages.
        let (messages, lease) =
            answer.map_or((Vec::new(), None), |(messages, lease)| (messages, Some(lease)));
        Ok((messages, page_size, lease))
    }

    /// Like [`CatchUpTask::call`]; asks once more for what is not found, because replicas lag.
    async fn call_twice<A>(
        &self,
        mut call: impl FnMut(u32) -> BoxFuture<Result<A, NeighbourError>>,
        failure: CatchUpFailure,
    ) -> Result<Option<A>, CatchUpFailure> {
        let answer = self.call(&mut call, failure).await?;
        if answer.is_some() {
            return Ok(answer);
        }
        sleep(NOT_FOUND_RETRY).await;
        self.call(call, failure).await
    }

    /// Calls a neighbour within the bound of calls, and retries failures. `None`: not found.
    async fn call<A>(
        &self,
        mut call: impl FnMut(u32) -> BoxFuture<Result<A, NeighbourError>>,
        failure: CatchUpFailure,
    ) -> Result<Option<A>, CatchUpFailure> {
        for attempt in 0..self.resources.config.attempts_max {
            if attempt > 0 {
                self.resources.counters.retries.add(1);
                sleep(BACKOFF.random_delay(attempt - 1)).await;
            }
            let permit = self.resources.calls.acquire().await;
            let answer = call(attempt).await;
            drop(permit);
            match answer {
                Ok(answer) => return Ok(Some(answer)),
                Err(NeighbourError::NotFound) => return Ok(None),
                // A refusal says nothing about what was asked for: it is not an empty answer.
                Err(
                    why @ (NeighbourError::Denied(_)
                    | NeighbourError::Invalid(_)
                    | NeighbourError::TooLarge(_)
                    | NeighbourError::Unavailable(_)),
                ) => {
                    tracing::debug!(%why, attempt, "a catch-up's call to a neighbour failed");
                }
            }
        }
        Err(failure)
    }

    /// Sends a chunk and waits until the socket has taken it.
    async fn send(&self, events: Vec<Arc<Event>>) -> Result<(), CatchUpFailure> {
        let count = events.len() as u64;
        let (sent, taken) = oneshot::channel();
        let step = CatchUpStep::Chunk { events, sent };
        let reported = self.reports.send(CatchUpReport { address: self.address, step }).await;
        reported.map_err(|_| CatchUpFailure::SessionEnded)?;
        match timeout(self.resources.config.chunk_timeout, taken).await {
            Ok(Ok(())) => {
                self.resources.counters.messages.add(count);
                Ok(())
            }
            Ok(Err(_)) => Err(CatchUpFailure::SessionEnded),
            Err(_) => Err(CatchUpFailure::TooSlow),
        }
    }
}
