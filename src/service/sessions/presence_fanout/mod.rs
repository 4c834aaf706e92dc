//! Pushes changes of presence to all connected users who share a conversation with the changed user
//! (contract §4).
//!
//! ```text
//!  presence:updates ─► pending, the newest per user ─► workers: who shares a conversation?
//!                      (bounded)                       (one look-up per user, cached)
//!                                                           │ of these, who is connected?
//!                                                           ▼
//!                                                         router
//! ```
//!
//! One look-up of a user's conversations finds all recipients. It is made by at most one worker per user,
//! cached for a short time, and skipped while no session is connected to this node. A burst of changes
//! of one user costs one look-up, and only the newest change is pushed.

mod contacts;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use prost::Message as _;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use self::contacts::{Contacts, Users};
use crate::counters;
use crate::domain::members::Members;
use crate::handoff::Pushed;
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, MembershipChanges, NOT_FOUND_RETRY,
    NeighbourError, RouterInbox, RouterInput,
};
use crate::service::backends::redis::PresenceUpdates;
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::presence::v1::PresenceUpdateEvent;
use crate::service::events::proto::shared::v1::EventType;
use crate::service::events::timestamp::Timestamp;
use crate::service::members::directory::Directory;
use crate::service::runtime::backoff::Backoff;

/// Conversations of one user whose members are requested one by one, because the list of
/// conversations does not include them.
const MEMBER_LISTS_MAX: usize = 64;
/// Wait between attempts at a full router.
const ROUTER_RETRY: Duration = Duration::from_millis(5);
/// Attempts at a full router.
const ROUTER_ATTEMPTS: u32 = 400;

/// Settings of the fan-out.
#[derive(Clone, Debug)]
pub struct PresenceFanoutConfig {
    /// Users with a pending change. Beyond that, changes of further users are dropped.
    pub users_waiting_max: usize,
    /// Concurrent look-ups.
    pub look_ups_max: usize,
    /// Attempts per look-up before the change is dropped.
    pub attempts_max: u32,
    /// Delays between attempts.
    pub backoff: Backoff,
    /// How long a user's contacts are cached. A member who was added to a conversation whose members this
    /// node does not know receives changes after at most this time, otherwise at once; one who was removed
    /// receives none from the removal on.
    pub contacts_lifetime: Duration,
    /// Bound of the cache: the sum of all users and their contacts, about 60 bytes each.
    pub contacts_max: usize,
}

impl Default for PresenceFanoutConfig {
    /// 10,000 users pending, 8 look-ups, 3 attempts with delays from 200 ms, contacts cached for
    /// 30 s, 500,000 of them.
    fn default() -> Self {
        Self {
            users_waiting_max: 10_000,
            look_ups_max: 8,
            attempts_max: 3,
            backoff: Backoff::new(Duration::from_millis(200), Duration::MAX).with_jitter(1.0, 1.5),
            contacts_lifetime: Duration::from_secs(30),
            contacts_max: 500_000,
        }
    }
}

counters! {
    /// Counters of the fan-out.
    pub struct PresenceFanoutCounters of SharedCounter {
        Counter presence_changes: "Changes of presence received",
        Counter presence_changes_malformed: "Changes of presence that could not be decoded",
        Counter presence_changes_coalesced: "Changes of presence replaced by a newer one of the same user",
        Counter presence_changes_dropped_full: "Changes of presence dropped because too many were pending",
        Counter presence_changes_dropped_unknown: "Changes of presence that only members of conversations created or joined lately received, because the conversation service did not answer",
        Counter presence_changes_dropped_busy: "Changes of presence dropped because the router was full for too long",
        Counter presence_changes_unconcerning: "Changes of presence without a recipient connected to this node",
        Counter presence_changes_pushed: "Changes of presence pushed to the router",
        Counter presence_changes_recipients: "Recipients of pushed changes of presence",
        Counter presence_look_ups: "Look-ups of a user's conversations for a change of presence",
        Counter presence_look_ups_failed: "Look-ups for a change of presence that failed",
        Gauge presence_users_waiting: "Users with a pending change of presence",
        Gauge presence_remembered: "Users in the cache of contacts, each with their contacts",
    }
}

/// Dependencies of the fan-out.
#[derive(Clone)]
pub struct PresenceFanoutParts {
    /// The sessions of this node.
    pub directory: Arc<Directory>,
    /// Lists a user's conversations.
    pub listing: Arc<dyn ConversationListing>,
    /// Lists a conversation's members, for lists of conversations without members.
    pub source: Arc<dyn ConversationSource>,
    /// Receives the events.
    pub router: Arc<dyn RouterInbox>,
}

#[derive(Debug)]
struct PresenceChange {
    occurred_at: i64,
    /// The change as it was published.
    payload: Vec<u8>,
}

#[derive(Debug, Default)]
struct PendingChanges {
    changes: HashMap<Arc<str>, PresenceChange>,
    /// Users with a change and without a worker, in order.
    queue: VecDeque<Arc<str>>,
    /// Users that a worker is handling.
    in_progress: HashSet<Arc<str>>,
}

struct FanoutState {
    config: PresenceFanoutConfig,
    parts: PresenceFanoutParts,
    counters: Arc<PresenceFanoutCounters>,
    pending: Mutex<PendingChanges>,
    contacts: Mutex<Contacts>,
    work: Notify,
}

/// The fan-out. Its workers end when it is dropped.
pub struct PresenceFanout {
    shared: Arc<FanoutState>,
    _workers: JoinSet<()>,
}

impl PresenceFanout {
    /// Starts the workers on the current runtime.
    pub fn new(
        config: PresenceFanoutConfig,
        parts: PresenceFanoutParts,
        counters: Arc<PresenceFanoutCounters>,
    ) -> Self {
        let contacts = Contacts::new(config.contacts_lifetime, config.contacts_max);
        let shared = Arc::new(FanoutState {
            parts,
            counters,
            pending: Mutex::default(),
            contacts: Mutex::new(contacts),
            work: Notify::new(),
            config,
        });
        let mut workers = JoinSet::new();
        for _ in 0..shared.config.look_ups_max {
            workers.spawn(Arc::clone(&shared).work());
        }
        Self { shared, _workers: workers }
    }
}

impl PresenceUpdates for PresenceFanout {
    fn updated(&self, payload: &[u8]) {
        let counters = &self.shared.counters;
        counters.presence_changes.add(1);
        match PresenceUpdateEvent::decode(payload) {
            Ok(event) if !event.user_id.is_empty() => {
                let change =
                    PresenceChange { occurred_at: event.occurred_at, payload: payload.to_vec() };
                self.shared.enqueue(event.user_id.into(), change);
            }
            Ok(_) | Err(_) => counters.presence_changes_malformed.add(1),
        }
    }

    /// Missed changes cannot be fetched: clients see a stale state until the next change.
    fn missed(&self) {}
}

impl MembershipChanges for PresenceFanout {
    fn changed(&self, conversation: &str, user: &str, added: bool, members: Option<&Members>) {
        let mut contacts = self.shared.contacts.lock().expect("no holder panics");
        contacts.changed(user, Instant::now());
        match members {
            _ if !added => contacts.left(conversation, user),
            Some(members) => contacts.joined(conversation, members.clone(), Instant::now()),
            None => {}
        }
    }

    fn created(&self, conversation: &str, members: &Members) {
        let mut contacts = self.shared.contacts.lock().expect("no holder panics");
        contacts.joined(conversation, members.clone(), Instant::now());
    }
}

impl FanoutState {
    fn pending(&self) -> MutexGuard<'_, PendingChanges> {
        self.pending.lock().expect("no holder panics")
    }

    fn enqueue(&self, user: Arc<str>, change: PresenceChange) {
        // No recipient is connected. Clients that connect later fetch the state themselves.
        if self.parts.directory.is_empty() {
            return self.counters.presence_changes_unconcerning.add(1);
        }
        let mut pending = self.pending();
        let PendingChanges { changes, queue, in_progress } = &mut *pending;
        if let Some(present) = changes.get_mut(&user) {
            if present.occurred_at <= change.occurred_at {
                *present = change;
            }
            return self.counters.presence_changes_coalesced.add(1);
        }
        if changes.len() >= self.config.users_waiting_max {
            return self.counters.presence_changes_dropped_full.add(1);
        }
        changes.insert(Arc::clone(&user), change);
        if !in_progress.contains(&user) {
            queue.push_back(user);
        }
        self.counters.presence_users_waiting.set(changes.len() as u64);
        drop(pending);
        self.work.notify_one();
    }

    async fn work(self: Arc<Self>) {
        loop {
            let Some(user) = self.next_user() else {
                self.work.notified().await;
                continue;
            };
            let contacts = self.contacts_of(&user).await;
            // Taken after the look-up, so that the newest change is pushed.
            let change = self.pending().changes.remove(&user);
            if let Some(change) = change {
                self.push(&user, contacts.as_deref(), change).await;
            }
            self.release(user);
        }
    }

    fn next_user(&self) -> Option<Arc<str>> {
        let mut pending = self.pending();
        let user = pending.queue.pop_front()?;
        pending.in_progress.insert(Arc::clone(&user));
        let more = !pending.queue.is_empty();
        drop(pending);
        if more {
            self.work.notify_one();
        }
        Some(user)
    }

    fn release(&self, user: Arc<str>) {
        let mut pending = self.pending();
        pending.in_progress.remove(&user);
        if pending.changes.contains_key(&user) {
            pending.queue.push_back(user);
            self.work.notify_one();
        }
        self.counters.presence_users_waiting.set(pending.changes.len() as u64);
    }

    /// All users who share a conversation with the user. `None`: the conversation service did not
    /// answer.
    async fn contacts_of(&self, user: &Arc<str>) -> Option<Users> {
        let cached = |now| self.contacts.lock().expect("no holder panics").find(user, now);
        if let Some(users) = cached(Instant::now()) {
            return Some(users);
        }
        for attempt in 1..=self.config.attempts_max {
            self.counters.presence_look_ups.add(1);
            let since = Instant::now();
            match self.look_up(user).await {
                Ok(found) => {
                    let mut contacts = self.contacts.lock().expect("no holder panics");
                    let (user, now) = (Arc::clone(user), Instant::now());
                    contacts.remember(user, Arc::clone(&found), since, now);
                    self.counters.presence_remembered.set(contacts.weight() as u64);
                    return Some(found);
                }
                Err(_) => self.counters.presence_look_ups_failed.add(1),
            }
            if attempt < self.config.attempts_max {
                sleep(self.config.backoff.random_delay(attempt - 1)).await;
            }
        }
        None
    }

    async fn look_up(&self, user: &Arc<str>) -> Result<Users, NeighbourError> {
        let list = || self.parts.listing.conversations_of(Arc::clone(user));
        let conversations = found_or_none(list).await?.unwrap_or_default();
        let mut found: HashSet<Arc<str>> = HashSet::new();
        let mut member_lists = 0;
        for conversation in conversations {
            let with_roles = conversation.participants_with_roles.into_iter();
            let named: Vec<String> = conversation
                .participant_user_ids
                .into_iter()
                .chain(with_roles.map(|participant| participant.user_id))
                .collect();
            if !named.is_empty() {
                found.extend(named.into_iter().map(Arc::from));
            } else if member_lists < MEMBER_LISTS_MAX {
                member_lists += 1;
                let id: Arc<str> = conversation.conversation_id.into();
                let members = found_or_none(|| self.parts.source.members(Arc::clone(&id))).await?;
                found.extend(members.unwrap_or_default().iter().map(Arc::from));
            }
        }
        found.remove(user);
        Ok(found.into_iter().collect())
    }

    /// The connected ones of these contacts, and of the conversations that have changed lately.
    fn connected(&self, user: &str, contacts: &[Arc<str>]) -> Vec<Arc<str>> {
        let is_connected = |user: &str| self.parts.directory.sessions_of(user, |_| {}) > 0;
        let known = contacts.iter().filter(|contact| is_connected(contact));
        let mut users: Vec<Arc<str>> = known.map(Arc::clone).collect();
        let mut all = self.contacts.lock().expect("no holder panics");
        let groups = all.groups_of(user, Instant::now());
        drop(all);
        let members = groups.iter().flat_map(Members::iter);
        let more = members.filter(|member| *member != user && is_connected(member)).map(Arc::from);
        users.extend(more);
        if !groups.is_empty() {
            users.sort_unstable();
            users.dedup();
        }
        users
    }

    /// `contacts`: `None` if the conversation service did not answer. Members of conversations that have changed lately
    /// are known from the log.
    async fn push(&self, user: &str, contacts: Option<&[Arc<str>]>, change: PresenceChange) {
        let users = self.connected(user, contacts.unwrap_or_default());
        match contacts {
            None => self.counters.presence_changes_dropped_unknown.add(1),
            Some(_) if users.is_empty() => self.counters.presence_changes_unconcerning.add(1),
            Some(_) => {}
        }
        if users.is_empty() {
            return;
        }
        let recipients = users.len() as u64;
        let occurred_at = Timestamp { seconds: change.occurred_at, nanos: 0 };
        let value =
            encode_envelope(EventType::PresenceUpdated, Some(occurred_at), change.payload).into();
        let mut input = RouterInput::ToUsers { value, users };
        for _ in 0..ROUTER_ATTEMPTS {
            match self.parts.router.send(input) {
                Pushed::Accepted => {
                    self.counters.presence_changes_pushed.add(1);
                    self.counters.presence_changes_recipients.add(recipients);
                    return;
                }
                Pushed::Closed(_) => return,
                Pushed::Full(back) => input = back,
            }
            sleep(ROUTER_RETRY).await;
        }
        self.counters.presence_changes_dropped_busy.add(1);
    }
}

/// Asks, and once more if it is not found, because replicas lag. `None`: it does not exist.
async fn found_or_none<A>(
    ask: impl Fn() -> BoxFuture<Result<A, NeighbourError>>,
) -> Result<Option<A>, NeighbourError> {
    if let answer @ (Ok(_)
    | Err(
        NeighbourError::Denied(_)
        | NeighbourError::Invalid(_)
        | NeighbourError::Unsupported(_)
        | NeighbourError::TooLarge(_)
        | NeighbourError::Unavailable(_),
    )) = ask().await
    {
        return answer.map(Some);
    }
    sleep(NOT_FOUND_RETRY).await;
    match ask().await {
        Err(NeighbourError::NotFound) => Ok(None),
        answer => answer.map(Some),
    }
}

#[cfg(test)]
mod tests;
