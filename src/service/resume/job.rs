//! One session's catch-up, a task.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{Mutex, OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::page::{chunks, in_order};
use super::{CatchUp, Failure, Membership, PAGE_MESSAGES, ResumeRequest, Scope, Shared, Step};
use crate::domain::counters::SharedCounter;
use crate::domain::event::Event;
use crate::domain::ids::{SessionAddress, StreamPosition};
use crate::service::client_message::LastSequence;
use crate::service::ports::{BoxFuture, ConversationListing, NeighbourError};
use crate::service::proto::message::v1::Message;
use crate::service::stream_key::stream_key;

/// First wait before a failed call is tried again; doubles each time, with up to half of it less
/// by chance.
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Attempts at a page of full size; later ones ask for less, in case the page is what is too large
/// or too slow.
const FULL_PAGE_ATTEMPTS: u32 = 2;

/// A conversation and the last sequence that the client has of it.
type Wanted = (Arc<str>, i64);

struct Job {
    shared: Arc<Shared>,
    user: Arc<str>,
    address: SessionAddress,
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
    let ResumeRequest { ids, address, scope } = request;
    let step = {
        let waiting = OnGauge::new(&shared.counters.waiting);
        let Ok(_turn) = shared.sessions.acquire().await else { return }; // Never closed.
        drop(waiting);
        let _running = OnGauge::new(&shared.counters.running);
        let job = Arc::new(Job {
            shared: Arc::clone(&shared),
            user: Arc::from(ids.user()),
            address,
            out: out.clone(),
            socket: Mutex::new(()),
        });
        match job.catch_up(scope).await {
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
        }
    };
    // An error means that the session manager has ended, and the session with it.
    let _ = out.send(CatchUp { address, step }).await;
}

impl Job {
    async fn catch_up(self: Arc<Self>, scope: Scope) -> Result<Box<[StreamPosition]>, Failure> {
        // A gRPC session is owed an answer about its conversation whatever came of it.
        let (wanted, owed) = match scope {
            Scope::Session(named) => (self.wanted_of_session(named).await?, None),
            Scope::Conversation { conversation, after } => {
                let conversation: Arc<str> = conversation.into();
                let position =
                    StreamPosition { stream: stream_key(&conversation), sequence: after };
                let member = self.is_member(&conversation).await?;
                let wanted = if member { vec![(conversation, after)] } else { Vec::new() };
                (wanted, Some(position))
            }
        };
        let mut delivered = self.conversations(wanted).await?;
        if let Some(owed) = owed {
            if delivered.is_empty() {
                delivered.push(owed);
            }
        } else {
            delivered.retain(|position| position.sequence > 0);
        }
        Ok(delivered.into_boxed_slice())
    }

    /// Which conversations are to be caught up, and from where.
    async fn wanted_of_session(
        self: &Arc<Self>,
        named: Vec<LastSequence>,
    ) -> Result<Vec<Wanted>, Failure> {
        let named = named.into_iter().map(|named| (Arc::from(named.conversation), named.sequence));
        let Membership::Checked { listing, .. } = &self.shared.membership else {
            return Ok(named.collect());
        };
        let mut named: HashMap<Arc<str>, i64> = named.collect();
        let listed = self.list(listing).await?;
        let mut wanted: Vec<Wanted> = listed
            .into_iter()
            .map(|conversation| {
                let after = named.remove(&conversation).unwrap_or(0);
                (conversation, after)
            })
            .collect();
        for (conversation, after) in named {
            if self.is_member(&conversation).await? {
                wanted.push((conversation, after));
            }
        }
        Ok(wanted)
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
        let member = members.contains(&self.user);
        if !member {
            self.shared.counters.conversations_refused.add(1);
        }
        Ok(member)
    }

    /// Catches conversations up, a few side by side.
    async fn conversations(
        self: &Arc<Self>,
        wanted: Vec<Wanted>,
    ) -> Result<Vec<StreamPosition>, Failure> {
        let mut wanted = VecDeque::from(wanted);
        let mut delivered = Vec::with_capacity(wanted.len());
        let mut running = JoinSet::new();
        loop {
            while running.len() < self.shared.config.conversations_at_once
                && let Some((conversation, after)) = wanted.pop_front()
            {
                running.spawn(Arc::clone(self).conversation(conversation, after));
            }
            match running.join_next().await {
                None => return Ok(delivered),
                // The rest is aborted with the set.
                Some(done) => delivered.push(done.unwrap_or(Err(Failure::Gone))?),
            }
        }
    }

    /// Catches one conversation up, page by page.
    async fn conversation(
        self: Arc<Self>,
        conversation: Arc<str>,
        after: i64,
    ) -> Result<StreamPosition, Failure> {
        let mut sequence = after;
        loop {
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
        Ok(StreamPosition { stream: stream_key(&conversation), sequence })
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
