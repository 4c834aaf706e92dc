//! The catch-up of one session, a task.
//!
//! Its steps (questions about membership, pages) run concurrently; it sends their pages itself, one after
//! the other. If the socket does not take a chunk soon, the session is *stalled*: it drops all other pages,
//! gives its slot back, and fetches again when its socket has taken the chunk. So a session that reads
//! slowly keeps nothing that others wait for.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{SemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::fetches::PageRequest;
use super::page::{CaughtUpEvent, Page, chunks};
use super::positions::{ConversationStep, Positions, ReadDecision};
use super::steps::{RunningSteps, StepOutcome};
use super::{
    CatchUpFailure, CatchUpReport, CatchUpRequest, CatchUpResources, CatchUpScope, CatchUpStep,
    PAGE_MESSAGES, ReadAccess,
};
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::counters::SharedCounter;
use crate::domain::event::Event;
use crate::domain::ids::{ConversationKey, SessionAddress};
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, NOT_FOUND_RETRY, NeighbourError,
};
use crate::service::runtime::backoff::Backoff;
use crate::service::sessions::presence::{Visibility, VisibilityState};

/// Delays before a failed call is retried; the attempts are bounded by the configuration.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::MAX);
/// Attempts that request a page of full size. Later ones request a quarter of the one before, in
/// case the page is too large or takes too long.
const FULL_PAGE_ATTEMPTS: u32 = 2;

/// The catch-up of one session.
pub(super) struct CatchUpTask {
    pub(super) resources: Arc<CatchUpResources>,
    pub(super) user: Arc<str>,
    pub(super) address: SessionAddress,
    /// `None`: no other node hands over events.
    visibility: Option<Arc<Visibility>>,
    reports: mpsc::Sender<CatchUpReport>,
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

/// Runs one catch-up and reports its outcome.
pub(super) async fn run(
    resources: Arc<CatchUpResources>,
    request: CatchUpRequest,
    reports: mpsc::Sender<CatchUpReport>,
) {
    let CatchUpRequest { ids, address, scope, cursor, visibility } = request;
    let wants_cursors = cursor.is_some();
    let task = Arc::new(CatchUpTask {
        resources: Arc::clone(&resources),
        user: Arc::from(ids.user()),
        address,
        visibility,
        reports: reports.clone(),
    });
    let mut since_cursor = false;
    let step = match task.resume(scope, cursor).await {
        Ok(resumed) => {
            resources.counters.completed.add(1);
            since_cursor = resumed.since_cursor;
            CatchUpStep::Complete { delivered: Box::new(resumed.delivered) }
        }
        Err(failure) => {
            match failure {
                CatchUpFailure::Conversations | CatchUpFailure::Messages => {
                    resources.counters.failed_neighbour.add(1);
                }
                CatchUpFailure::TooSlow => resources.counters.failed_slow.add(1),
                CatchUpFailure::CursorExpired(_) | CatchUpFailure::SessionEnded => {}
            }
            let Some(close) = failure.close() else { return };
            CatchUpStep::Failed(close)
        }
    };
    let is_complete = matches!(step, CatchUpStep::Complete { .. });
    // An error means that the session manager has ended, so the session has too.
    let _ = reports.send(CatchUpReport { address, step }).await;
    if is_complete && wants_cursors && (since_cursor || task.is_known().await) {
        let _ = reports.send(CatchUpReport { address, step: CatchUpStep::MayHaveCursors }).await;
    }
}

/// One of the [`sessions_max`](super::CatchUpConfig::sessions_max) concurrent catch-ups.
pub(super) struct CatchUpSlot<'a> {
    _permit: SemaphorePermit<'a>,
    _running: GaugeGuard<'a>,
}

impl CatchUpResources {
    pub(super) async fn slot(&self) -> Result<CatchUpSlot<'_>, CatchUpFailure> {
        let waiting = GaugeGuard::new(&self.counters.waiting);
        // The semaphore is never closed.
        let permit = self.sessions.acquire().await.map_err(|_| CatchUpFailure::SessionEnded)?;
        drop(waiting);
        Ok(CatchUpSlot { _permit: permit, _running: GaugeGuard::new(&self.counters.running) })
    }

    /// Remembers what was delivered as far as the budget of all sessions has room.
    pub(super) fn remember(
        &self,
        only: Option<ConversationKey>,
        runs: Vec<SequenceRun>,
    ) -> CaughtUp {
        let delivered = CaughtUp::new(only, runs);
        if delivered.is_empty() || self.delivered.has_room() {
            return delivered.charged_to(&self.delivered);
        }
        self.counters.delivered_forgotten.add(delivered.runs().len() as u64);
        CaughtUp::new(delivered.conversation, Vec::new())
    }
}

/// A chunk that the socket has not taken soon.
pub(super) struct StalledChunk {
    taken: oneshot::Receiver<()>,
    messages: u64,
    bytes: usize,
}

/// A round of one session: its positions, its place among the others, and its pace.
struct Round<'a, 'p> {
    positions: &'p mut Positions,
    /// `None` only while the session is stalled.
    slot: Option<CatchUpSlot<'a>>,
    /// Steps that may run concurrently: one after a stall, more while the socket is quick. So a slow
    /// session fetches little ahead that it would have to drop.
    steps_at_once: usize,
}

/// The failure of a question about an id that only the client knows: a malformed id is its fault, and
/// means that there is no such conversation.
fn of_client(error: NeighbourError) -> NeighbourError {
    match error {
        NeighbourError::Invalid(_) => NeighbourError::NotFound,
        NeighbourError::NotFound
        | NeighbourError::Denied(_)
        | NeighbourError::Unsupported(_)
        | NeighbourError::TooLarge(_)
        | NeighbourError::Unavailable(_) => error,
    }
}

impl CatchUpTask {
    pub(super) async fn report(&self, step: CatchUpStep) -> Result<(), CatchUpFailure> {
        let reported = self.reports.send(CatchUpReport { address: self.address, step }).await;
        reported.map_err(|_| CatchUpFailure::SessionEnded)
    }

    /// Sends what the message service has. Returns the messages that were sent, and the only conversation that was
    /// caught up.
    pub(super) async fn catch_up(
        self: &Arc<Self>,
        scope: CatchUpScope,
    ) -> Result<(Option<ConversationKey>, Vec<SequenceRun>), CatchUpFailure> {
        let mut slot = self.resources.slot().await?;
        let mut positions = Positions::new(scope);
        loop {
            let is_last = self.is_decided();
            slot = self.round(&mut positions, slot).await?;
            let Some(visibility) = self.visibility.as_ref().filter(|_| !is_last) else { break };
            // Does not hold a slot while waiting for other nodes, unless the budget has no room for
            // the positions.
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
        self.resources.counters.delivered_forgotten.add(positions.forgotten);
        Ok(positions.into_runs())
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

    /// Sends what is missing now.
    async fn round<'a>(
        self: &'a Arc<Self>,
        positions: &mut Positions,
        slot: CatchUpSlot<'a>,
    ) -> Result<CatchUpSlot<'a>, CatchUpFailure> {
        let steps = match &self.resources.access {
            ReadAccess::Checked { listing, .. } => {
                let is_session = positions.is_session;
                let listed = if is_session { self.list(listing).await? } else { Vec::new() };
                positions.add_listed(&listed);
                positions.steps(Some(&listed))
            }
            ReadAccess::Unchecked => positions.steps(None),
        };
        let steps_at_once = self.resources.config.steps_at_once;
        let mut round = Round { positions, slot: Some(slot), steps_at_once };
        self.run_steps(VecDeque::from(steps), &mut round).await?;
        match round.slot {
            Some(slot) => Ok(slot),
            None => self.resources.slot().await,
        }
    }

    /// The user's conversations, sorted.
    async fn list(
        &self,
        listing: &Arc<dyn ConversationListing>,
    ) -> Result<Vec<Arc<str>>, CatchUpFailure> {
        let call = || listing.conversations_of(Arc::clone(&self.user));
        let mut listed = self.call(call, CatchUpFailure::Conversations).await?;
        if listed.is_none() {
            sleep(NOT_FOUND_RETRY).await;
            listed = self.call(call, CatchUpFailure::Conversations).await?;
        }
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

    /// Runs these steps, and those that follow from them. Replicas lag, so what is not found is asked for
    /// once more, all after the same delay.
    async fn run_steps<'a>(
        self: &'a Arc<Self>,
        mut waiting: VecDeque<ConversationStep>,
        round: &mut Round<'a, '_>,
    ) -> Result<(), CatchUpFailure> {
        let mut running = RunningSteps::default();
        let (mut not_found, mut asked_again) = (VecDeque::new(), HashSet::new());
        loop {
            while running.len() < round.steps_at_once
                && let Some(step) = waiting.pop_front()
            {
                let is_last = asked_again.contains(&step);
                running.start(step.clone(), Arc::clone(self).step(step, is_last));
            }
            let (next, stalled) = match running.next().await {
                None if not_found.is_empty() => return Ok(()),
                None => {
                    sleep(NOT_FOUND_RETRY).await;
                    waiting = std::mem::take(&mut not_found);
                    continue;
                }
                Some(Err(failure)) => return Err(failure),
                Some(Ok(StepOutcome::NotFound(step))) => {
                    match asked_again.insert(step.clone()) {
                        true => not_found.push_back(step),
                        false => self.does_not_exist(step, round.positions),
                    }
                    (None, None)
                }
                Some(Ok(StepOutcome::Membership(conversation, is_member))) => {
                    (self.verified(conversation, is_member, round.positions), None)
                }
                Some(Ok(StepOutcome::Page { conversation, page, is_final })) => {
                    self.send_page(conversation, &page, is_final, round).await?
                }
            };
            if stalled.is_some() {
                running.abort().await.for_each(|step| waiting.push_front(step));
            }
            // The next page of a conversation comes before other conversations.
            if let Some(next) = next {
                waiting.push_front(next);
            }
            if let Some(stalled) = stalled {
                round.slot = None;
                self.wait_for_socket(stalled).await?;
                round.slot = Some(self.resources.slot().await?);
            }
        }
    }

    /// `is_last`: what is not found now does not exist.
    async fn step(
        self: Arc<Self>,
        step: ConversationStep,
        is_last: bool,
    ) -> Result<StepOutcome, CatchUpFailure> {
        let outcome = match (&step, &self.resources.access) {
            (ConversationStep::Verify(conversation), ReadAccess::Checked { source, .. }) => {
                let call = || -> BoxFuture<_> {
                    let members = source.members(Arc::clone(conversation));
                    Box::pin(async move { members.await.map_err(of_client) })
                };
                let members = self.call(call, CatchUpFailure::Conversations).await?;
                let is_member = members.map(|members| members.contains(&self.user));
                is_member
                    .map(|is_member| StepOutcome::Membership(Arc::clone(conversation), is_member))
            }
            (ConversationStep::Verify(conversation), ReadAccess::Unchecked) => {
                Some(StepOutcome::Membership(Arc::clone(conversation), true))
            }
            (ConversationStep::Fetch(conversation, after), _) => {
                let (conversation, is_final) = (Arc::clone(conversation), self.is_decided());
                let page = self.page(&conversation, *after, is_last).await?;
                page.map(|page| StepOutcome::Page { conversation, page, is_final })
            }
        };
        Ok(outcome.unwrap_or(StepOutcome::NotFound(step)))
    }

    /// A conversation was not found twice: a deleted one has neither members nor messages.
    fn does_not_exist(&self, step: ConversationStep, positions: &mut Positions) {
        match step {
            ConversationStep::Verify(conversation) => {
                self.verified(conversation, false, positions);
            }
            ConversationStep::Fetch(conversation, _) => {
                self.resources.counters.conversations.add(1);
                positions.caught_up(&conversation, false);
            }
        }
    }

    /// The next step for a conversation whose members are known.
    fn verified(
        &self,
        conversation: Arc<str>,
        is_member: bool,
        positions: &mut Positions,
    ) -> Option<ConversationStep> {
        match positions.set_membership(&conversation, is_member) {
            ReadDecision::Fetch(after) => Some(ConversationStep::Fetch(conversation, after)),
            ReadDecision::Refused => {
                self.resources.counters.conversations_refused.add(1);
                None
            }
            ReadDecision::Left => None,
        }
    }

    /// Sends a page. Returns the next step for its conversation, and the chunk that the socket has not
    /// taken soon.
    async fn send_page(
        &self,
        conversation: Arc<str>,
        page: &Page,
        is_final: bool,
        round: &mut Round<'_, '_>,
    ) -> Result<(Option<ConversationStep>, Option<StalledChunk>), CatchUpFailure> {
        let config = &self.resources.config;
        let encoding = self.address.encoding;
        let events = self.resources.encode(page, encoding);
        let is_new = |event: &&CaughtUpEvent| !round.positions.was_sent(&conversation, event.0);
        let unsent: Vec<_> = events.iter().filter(is_new).cloned().collect();
        let mut chunks = chunks(unsent, encoding, config).into_iter();
        let mut stalled = None;
        while let Some(chunk) = chunks.next() {
            let last = chunk.last().map_or(0, |(sequence, _)| *sequence);
            chunk.iter().for_each(|(sequence, _)| round.positions.sent(&conversation, *sequence));
            stalled = self.send(chunk).await?;
            if stalled.is_none() {
                round.steps_at_once = (2 * round.steps_at_once).min(config.steps_at_once);
                continue;
            }
            round.steps_at_once = 1;
            if chunks.len() > 0 {
                return Ok((Some(ConversationStep::Fetch(conversation, last)), stalled));
            }
        }
        let next = match (page.newest(), page.is_last) {
            (Some(newest), false) => Some(ConversationStep::Fetch(conversation, newest)),
            // A full page without progress would be requested for ever.
            (None, false) => return Err(CatchUpFailure::Messages),
            (_, true) => {
                self.resources.counters.conversations.add(1);
                round.positions.caught_up(&conversation, is_final);
                None
            }
        };
        Ok((next, stalled))
    }

    /// One page. `None`: not found. `is_own`: the call is made for this user.
    async fn page(
        &self,
        conversation: &Arc<str>,
        after: i64,
        mut is_own: bool,
    ) -> Result<Option<Arc<Page>>, CatchUpFailure> {
        // Without a check of ours, the message service may decide who reads what, and only the client
        // says that there is such a conversation.
        let is_checked = matches!(self.resources.access, ReadAccess::Checked { .. });
        for attempt in 0..self.resources.config.attempts_max {
            let quarters = attempt.saturating_sub(FULL_PAGE_ATTEMPTS - 1).min(15);
            let page_size = (PAGE_MESSAGES >> (2 * quarters).min(15)).max(1);
            let reader = (is_own || !is_checked).then(|| Arc::clone(&self.user));
            let conversation = Arc::clone(conversation);
            let request = PageRequest { conversation, after, page_size, reader };
            let page = self.resources.fetch(request, &self.user).await;
            match page.map_err(|error| if is_checked { error } else { of_client(error) }) {
                Ok(page) => {
                    self.resources.counters.pages.add(1);
                    return Ok(Some(page));
                }
                Err(NeighbourError::NotFound) => return Ok(None),
                Err(why) => self.failed(attempt, &why).await,
            }
            // The call may have been made for another user.
            is_own = true;
        }
        Err(CatchUpFailure::Messages)
    }

    /// Calls the conversation service within the bound of calls, and retries failures. `None`: not
    /// found.
    async fn call<A>(
        &self,
        call: impl Fn() -> BoxFuture<Result<A, NeighbourError>>,
        failure: CatchUpFailure,
    ) -> Result<Option<A>, CatchUpFailure> {
        for attempt in 0..self.resources.config.attempts_max {
            let permit = self.resources.limits.call().await;
            let answer = call().await;
            drop(permit);
            match answer {
                Ok(answer) => return Ok(Some(answer)),
                Err(NeighbourError::NotFound) => return Ok(None),
                Err(why) => self.failed(attempt, &why).await,
            }
        }
        Err(failure)
    }

    /// A call has failed: waits before the next attempt, if there is one. A refusal says nothing about
    /// what was asked for: it is not an empty answer.
    async fn failed(&self, attempt: u32, why: &NeighbourError) {
        tracing::debug!(%why, attempt, "a catch-up's call to a neighbour failed");
        if attempt + 1 < self.resources.config.attempts_max {
            self.resources.counters.retries.add(1);
            sleep(BACKOFF.random_delay(attempt)).await;
        }
    }

    /// Sends a chunk and waits until the socket has taken it, or is found to be slow.
    pub(super) async fn send(
        &self,
        chunk: Vec<CaughtUpEvent>,
    ) -> Result<Option<StalledChunk>, CatchUpFailure> {
        let config = &self.resources.config;
        let events: Vec<_> = chunk.into_iter().map(|(_, event)| event).collect();
        let messages = events.len() as u64;
        let length = |event: &Arc<Event>| event.frame(self.address.encoding).map_or(0, <[u8]>::len);
        let bytes = events.iter().map(length).sum();
        let (sent, mut taken) = oneshot::channel();
        self.report(CatchUpStep::Chunk { events, sent }).await?;
        match timeout(config.stall_after.min(config.chunk_timeout), &mut taken).await {
            Ok(Ok(())) => {
                self.resources.counters.messages.add(messages);
                Ok(None)
            }
            Ok(Err(_)) => Err(CatchUpFailure::SessionEnded),
            Err(_) => Ok(Some(StalledChunk { taken, messages, bytes })),
        }
    }

    /// Waits for a slow socket. The caller holds neither a slot nor pages meanwhile.
    pub(super) async fn wait_for_socket(
        &self,
        stalled: StalledChunk,
    ) -> Result<(), CatchUpFailure> {
        let resources = &self.resources;
        resources.counters.stalls.add(1);
        let share = stalled.bytes.min(resources.config.stalled_bytes_max).min(u32::MAX as usize);
        // Too many sessions are stalled: this one pays, not those that read.
        let Ok(_room) = resources.stalled_bytes.try_acquire_many(share as u32) else {
            return Err(CatchUpFailure::TooSlow);
        };
        let stalled_gauge = GaugeGuard::new(&resources.counters.stalled);
        let left = resources.config.chunk_timeout.saturating_sub(resources.config.stall_after);
        match timeout(left, stalled.taken).await {
            Ok(Ok(())) => resources.counters.messages.add(stalled.messages),
            Ok(Err(_)) => return Err(CatchUpFailure::SessionEnded),
            Err(_) => return Err(CatchUpFailure::TooSlow),
        }
        drop(stalled_gauge);
        Ok(())
    }
}
