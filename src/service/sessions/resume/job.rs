//! One session's catch-up, a task.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{Mutex, OwnedSemaphorePermit, SemaphorePermit, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::page::{chunks, in_order};
use super::places::Places;
use super::{CatchUp, Failure, Membership, PAGE_MESSAGES, ResumeRequest, Scope, Shared, Step};
use crate::domain::counters::SharedCounter;
use crate::domain::event::Event;
use crate::domain::ids::{SessionAddress, StreamPosition};
use crate::service::backends::ports::{BoxFuture, ConversationListing, NeighbourError};
use crate::service::events::proto::message::v1::Message;
use crate::service::sessions::presence::{Reach, Standing};

/// First wait before a failed call is tried again; doubles each time, with up to half of it less
/// by chance.
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Attempts at a page of full size; later ones ask for less, in case the page is what is too large
/// or too slow.
const FULL_PAGE_ATTEMPTS: u32 = 2;

/// A conversation that was caught up.
struct CaughtUp {
    conversation: Arc<str>,
    sequence: i64,
    /// What happened after its last page was asked for comes live.
    is_final: bool,
}

struct Job {
    shared: Arc<Shared>,
    user: Arc<str>,
    address: SessionAddress,
    /// `None`: no other node hands anything over.
    reach: Option<Arc<Reach>>,
    out: mpsc::Sender<CatchUp>,
    /// One page at a time goes to the socket: together they would overflow its queue.
    socket: Mutex<()>,
}

/// Counts itself on a gauge for as long as it lives, however it ends.
struct OnGauge<'a>(&'a SharedCounter);

impl<'a> OnGauge<'a> {
    fn new(gauge: &'a SharedCounter) -> Self {
        gauge.add(1);
        Self(gauge)
    }
}

impl Drop for OnGauge<'_> {
    fn drop(&mut self) {
        self.0.sub(1);
    }
}

/// Bytes of a page that is held, off the gauge and back in the budget when dropped.
struct Held {
    shared: Arc<Shared>,
    bytes: u64,
    _budget: Option<OwnedSemaphorePermit>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.counters.pages_bytes.sub(self.bytes);
    }
}

/// Catches one session up, and says how it ended.
pub(super) async fn run(shared: Arc<Shared>, request: ResumeRequest, out: mpsc::Sender<CatchUp>) {
    let ResumeRequest { ids, address, scope, reach } = request;
    let job = Arc::new(Job {
        shared: Arc::clone(&shared),
        user: Arc::from(ids.user()),
        address,
        reach,
        out: out.clone(),
        socket: Mutex::new(()),
    });
    let step = match job.catch_up(scope).await {
        Ok(delivered) => {
            shared.counters.completed.add(1);
            Step::Complete { delivered }
        }
        Err(failure) => {
            match failure {
                Failure::Conversations | Failure::Messages => {
                    shared.counters.failed_neighbour.add(1);
                }
                Failure::TooSlow => shared.counters.failed_slow.add(1),
                Failure::Gone => {}
            }
            let Some(close) = failure.close() else { return };
            Step::Failed(close)
        }
    };
    // An error means that the session manager has ended, and the session with it.
    let _ = out.send(CatchUp { address, step }).await;
}

/// A place among the sessions that catch up at once.
struct Turn<'a> {
    _place: SemaphorePermit<'a>,
    _running: OnGauge<'a>,
}

impl Shared {
    async fn turn(&self) -> Result<Turn<'_>, Failure> {
        let waiting = OnGauge::new(&self.counters.waiting);
        // Never closed.
        let place = self.sessions.acquire().await.map_err(|_| Failure::Gone)?;
        drop(waiting);
        Ok(Turn { _place: place, _running: OnGauge::new(&self.counters.running) })
    }
}

impl Job {
    async fn catch_up(self: Arc<Self>, scope: Scope) -> Result<Box<[StreamPosition]>, Failure> {
        let mut turn = self.shared.turn().await?;
        let mut places = Places::new(scope);
        while !self.round(&mut places).await? {
            // Who waits for other nodes to know the session keeps nobody from his turn, unless the
            // places that it keeps meanwhile find no room.
            let Some(reach) = &self.reach else { break };
            let bytes = u32::try_from(places.bytes()).unwrap_or(u32::MAX);
            let budget = Arc::clone(&self.shared.requests_bytes);
            if let Ok(kept) = budget.try_acquire_many_owned(bytes) {
                drop(turn);
                reach.decided().await;
                turn = self.shared.turn().await?;
                drop(kept);
            } else {
                reach.decided().await;
            }
        }
        drop(turn);
        if self.standing() == Standing::Unreached {
            self.shared.counters.unreached.add(1);
        }
        Ok(places.delivered())
    }

    /// Whether other nodes hand over what is routed from now on.
    fn standing(&self) -> Standing {
        self.reach.as_ref().map_or(Standing::Reached, |reach| reach.standing(Instant::now()))
    }

    /// Whether there is nothing to wait for.
    fn is_decided(&self) -> bool {
        !matches!(self.standing(), Standing::Open(_))
    }

    /// Asks for what is missing. Returns whether what happened since comes live.
    async fn round(self: &Arc<Self>, places: &mut Places) -> Result<bool, Failure> {
        let is_last = self.is_decided();
        if let Membership::Checked { listing, .. } = &self.shared.membership {
            let listed = if places.is_session { self.list(listing).await? } else { Vec::new() };
            places.listed(&listed);
            for conversation in places.doubtful(&listed) {
                let is_member = self.is_member(&conversation).await?;
                if places.judged(&conversation, is_member) {
                    self.shared.counters.conversations_refused.add(1);
                }
            }
        }
        self.conversations(places).await?;
        Ok(is_last)
    }

    async fn list(&self, listing: &Arc<dyn ConversationListing>) -> Result<Vec<Arc<str>>, Failure> {
        let ask = |_| listing.conversations_of(Arc::clone(&self.user));
        let listed = self.ask(ask, Failure::Conversations).await?.unwrap_or_default();
        let mut ids: Vec<Arc<str>> = listed
            .into_iter()
            .map(|conversation| Arc::from(conversation.conversation_id))
            .filter(|id: &Arc<str>| !id.is_empty())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    async fn is_member(&self, conversation: &Arc<str>) -> Result<bool, Failure> {
        let Membership::Checked { source, .. } = &self.shared.membership else { return Ok(true) };
        let ask = |_| source.members(Arc::clone(conversation));
        let members = self.ask(ask, Failure::Conversations).await?.unwrap_or_default();
        Ok(members.contains(&self.user))
    }

    /// Catches conversations up, a few side by side.
    async fn conversations(self: &Arc<Self>, places: &mut Places) -> Result<(), Failure> {
        let mut wanted = VecDeque::from(places.wanted());
        let mut running = JoinSet::new();
        loop {
            while running.len() < self.shared.config.conversations_at_once
                && let Some((conversation, after)) = wanted.pop_front()
            {
                running.spawn(Arc::clone(self).conversation(conversation, after));
            }
            match running.join_next().await {
                None => return Ok(()),
                // The rest is aborted with the set.
                Some(done) => {
                    let CaughtUp { conversation, sequence, is_final } =
                        done.unwrap_or(Err(Failure::Gone))?;
                    places.caught_up(&conversation, sequence, is_final);
                }
            }
        }
    }

    /// Catches one conversation up, page by page.
    async fn conversation(
        self: Arc<Self>,
        conversation: Arc<str>,
        after: i64,
    ) -> Result<CaughtUp, Failure> {
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
                return Err(Failure::Messages);
            };
            let encoding = self.address.encoding;
            let events = self.shared.encode(&conversation, messages, encoding);
            let socket = self.socket.lock().await;
            for chunk in chunks(events, encoding, &self.shared.config) {
                self.send(chunk).await?;
            }
            drop((socket, held));
            sequence = newest;
            if is_last {
                break;
            }
        }
        self.shared.counters.conversations.add(1);
        Ok(CaughtUp { conversation, sequence, is_final })
    }

    /// One page, how many messages were asked for, and what it holds of the budget.
    async fn page(
        &self,
        conversation: &Arc<str>,
        after: i64,
    ) -> Result<(Vec<Message>, u16, Option<Held>), Failure> {
        let mut asked = PAGE_MESSAGES;
        let ask = |attempt: u32| {
            let less = attempt.saturating_sub(FULL_PAGE_ATTEMPTS - 1).min(15);
            asked = (PAGE_MESSAGES >> (2 * less).min(15)).max(1);
            let (user, conversation) = (Arc::clone(&self.user), Arc::clone(conversation));
            let page = self.shared.messages.messages_after(user, conversation, after, asked);
            let shared = Arc::clone(&self.shared);
            // The budget is waited for within the call's turn, so no more pages are in memory than
            // calls may be under way and the budget has room for.
            let page: BoxFuture<_> = Box::pin(async move {
                let messages = page.await?;
                let held = hold(shared, &messages).await;
                Ok((messages, held))
            });
            page
        };
        let answer = self.ask(ask, Failure::Messages).await?;
        self.shared.counters.pages.add(1);
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
        otherwise: Failure,
    ) -> Result<Option<A>, Failure> {
        let config = &self.shared.config;
        for attempt in 0..config.attempts_max {
            if attempt > 0 {
                self.shared.counters.retries.add(1);
                let wait = RETRY_MIN.saturating_mul(1 << (attempt - 1).min(16));
                sleep(wait.mul_f64(rand::random_range(0.5..=1.0))).await;
            }
            let turn = self.shared.calls.acquire().await;
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
    async fn send(&self, events: Vec<Arc<Event>>) -> Result<(), Failure> {
        let count = events.len() as u64;
        let (sent, taken) = oneshot::channel();
        let step = Step::Chunk { events, sent };
        let handed = self.out.send(CatchUp { address: self.address, step }).await;
        handed.map_err(|_| Failure::Gone)?;
        match timeout(self.shared.config.chunk_timeout, taken).await {
            Ok(Ok(())) => {
                self.shared.counters.messages.add(count);
                Ok(())
            }
            Ok(Err(_)) => Err(Failure::Gone),
            Err(_) => Err(Failure::TooSlow),
        }
    }
}

/// Takes a page into the budget; one larger than all of it takes all of it.
async fn hold(shared: Arc<Shared>, messages: &[Message]) -> Held {
    let bytes: usize = messages.iter().map(Message::encoded_len).sum();
    let share = bytes.min(shared.config.pages_bytes_max).min(u32::MAX as usize) as u32;
    let budget = Arc::clone(&shared.pages_bytes).acquire_many_owned(share).await.ok();
    shared.counters.pages_bytes.add(bytes as u64);
    Held { shared, bytes: bytes as u64, _budget: budget }
}
