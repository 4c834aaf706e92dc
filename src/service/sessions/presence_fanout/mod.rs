//! Changes of presence, pushed to everybody connected here who shares a conversation with the user
//! concerned (contract §4).
//!
//! ```text
//!  presence:updates ─► waiting, the newest per user ─► workers: who shares a conversation?
//!                      (bounded)                       (one look-up per user, remembered)
//!                                                           │ of these, who is connected?
//!                                                           ▼
//!                                                         router
//! ```
//!
//! One look-up of a user's conversations tells all who are to know of him; it is made by one worker
//! at a time per user, remembered for a short time, and not made at all while nobody is connected
//! here. A burst of changes of one user costs one look-up and brings the newest of them.

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
use crate::handoff::Pushed;
use crate::service::backends::ports::{
    ConversationListing, ConversationSource, MembershipChanges, NeighbourError, RouterInbox,
    RouterInput,
};
use crate::service::backends::redis::PresenceUpdates;
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::presence::v1::PresenceUpdateEvent;
use crate::service::events::proto::shared::v1::EventType;
use crate::service::events::timestamp::Timestamp;
use crate::service::members::directory::Directory;
use crate::service::runtime::backoff::Backoff;

/// Conversations of one user whose members are asked for one by one, where the list of his
/// conversations does not name them.
const CONVERSATIONS_ASKED_MAX: usize = 64;
/// Between attempts at a router that is full, and how many of them.
const ROUTER_RETRY: Duration = Duration::from_millis(5);
const ROUTER_ATTEMPTS: u32 = 400;

/// Settings of the fan-out.
#[derive(Clone, Debug)]
pub struct PresenceFanoutConfig {
    /// Users whose change may wait; of one more the change is dropped.
    pub users_waiting_max: usize,
    /// Look-ups under way at once.
    pub look_ups_max: usize,
    /// Attempts at a look-up before the change is dropped.
    pub attempts_max: u32,
    /// Delays between attempts.
    pub backoff: Backoff,
    /// How long it is believed who shares a conversation with a user. A member who was added is
    /// told after at most this; one who was removed is told nothing more from his removal on.
    pub remembered: Duration,
    /// What is remembered: users, with each who shares a conversation with them counted too; some
    /// 60 bytes each.
    pub remembered_max: usize,
}

impl Default for PresenceFanoutConfig {
    /// 10,000 users waiting, 8 look-ups, 3 attempts from 200 ms, remembered for 30 s, 500,000
    /// users.
    fn default() -> Self {
        Self {
            users_waiting_max: 10_000,
            look_ups_max: 8,
            attempts_max: 3,
            backoff: Backoff::new(Duration::from_millis(200), Duration::MAX).with_jitter(1.0, 1.5),
            remembered: Duration::from_secs(30),
            remembered_max: 500_000,
        }
    }
}

counters! {
    /// What became of changes of presence.
    pub struct PresenceFanoutCounters of SharedCounter {
        Counter presence_changes: "Changes of presence that came",
        Counter presence_changes_malformed: "Changes of presence that could not be read",
        Counter presence_changes_coalesced: "Changes of presence overtaken by a newer one of the same user",
        Counter presence_changes_dropped_full: "Changes of presence dropped because too many waited",
        Counter presence_changes_dropped_unknown: "Changes of presence dropped because the conversation service did not say whom they concern",
        Counter presence_changes_dropped_busy: "Changes of presence dropped because the router took nothing for too long",
        Counter presence_changes_unconcerning: "Changes of presence that concern nobody connected here",
        Counter presence_changes_pushed: "Changes of presence given to the router",
        Counter presence_changes_recipients: "Users they were for",
        Counter presence_look_ups: "Questions to the conversation service for a user's conversations",
        Counter presence_look_ups_failed: "Such questions without an answer",
        Gauge presence_users_waiting: "Users whose change of presence waits",
        Gauge presence_remembered: "Users remembered, with those who share a conversation with them",
    }
}

/// What the fan-out works with.
#[derive(Clone)]
pub struct PresenceFanoutParts {
    /// Who is connected here.
    pub directory: Arc<Directory>,
    /// A user's conversations.
    pub listing: Arc<dyn ConversationListing>,
    /// A conversation's members, for a list that does not name them.
    pub source: Arc<dyn ConversationSource>,
    /// Where the events go.
    pub router: Arc<dyn RouterInbox>,
}

#[derive(Debug)]
struct Change {
    occurred_at: i64,
    /// As it was published.
    payload: Vec<u8>,
}

#[derive(Debug, Default)]
struct Waiting {
    changes: HashMap<Arc<str>, Change>,
    /// Users with a change and no worker, in order.
    turns: VecDeque<Arc<str>>,
    /// Users that a worker has.
    taken: HashSet<Arc<str>>,
}

struct Shared {
    config: PresenceFanoutConfig,
    parts: PresenceFanoutParts,
    counters: Arc<PresenceFanoutCounters>,
    waiting: Mutex<Waiting>,
    contacts: Mutex<Contacts>,
    work: Notify,
}

/// See the module. Its workers end with it.
pub struct PresenceFanout {
    shared: Arc<Shared>,
    _workers: JoinSet<()>,
}

impl PresenceFanout {
    /// Starts the workers. Needs a tokio runtime.
    pub fn new(
        config: PresenceFanoutConfig,
        parts: PresenceFanoutParts,
        counters: Arc<PresenceFanoutCounters>,
    ) -> Self {
        let contacts = Contacts::new(config.remembered, config.remembered_max);
        let shared = Arc::new(Shared {
            parts,
            counters,
            waiting: Mutex::default(),
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
                let change = Change { occurred_at: event.occurred_at, payload: payload.to_vec() };
                self.shared.take_in(event.user_id.into(), change);
            }
            Ok(_) | Err(_) => counters.presence_changes_malformed.add(1),
        }
    }

    /// What was missed cannot be asked for: clients see a stale state until the next change.
    fn missed(&self) {}
}

impl MembershipChanges for PresenceFanout {
    fn changed(&self, user: &str) {
        let mut contacts = self.shared.contacts.lock().expect("no holder panics");
        contacts.changed(user, Instant::now());
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no holder panics")
    }

    fn take_in(&self, user: Arc<str>, change: Change) {
        // Nobody here can be concerned; who connects later asks for himself.
        if self.parts.directory.is_empty() {
            return self.counters.presence_changes_unconcerning.add(1);
        }
        let mut waiting = self.waiting();
        let Waiting { changes, turns, taken } = &mut *waiting;
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
        if !taken.contains(&user) {
            turns.push_back(user);
        }
        self.counters.presence_users_waiting.set(changes.len() as u64);
        drop(waiting);
        self.work.notify_one();
    }

    async fn work(self: Arc<Self>) {
        loop {
            let Some(user) = self.next_user() else {
                self.work.notified().await;
                continue;
            };
            let concerned = self.concerned(&user).await;
            // What came while it was asked is newer; it is this look-up's as well.
            let change = self.waiting().changes.remove(&user);
            if let Some(change) = change {
                match concerned {
                    Some(concerned) => self.push(&concerned, change).await,
                    None => self.counters.presence_changes_dropped_unknown.add(1),
                }
            }
            self.give_back(user);
        }
    }

    fn next_user(&self) -> Option<Arc<str>> {
        let mut waiting = self.waiting();
        let user = waiting.turns.pop_front()?;
        waiting.taken.insert(Arc::clone(&user));
        let more = !waiting.turns.is_empty();
        drop(waiting);
        if more {
            self.work.notify_one();
        }
        Some(user)
    }

    fn give_back(&self, user: Arc<str>) {
        let mut waiting = self.waiting();
        waiting.taken.remove(&user);
        if waiting.changes.contains_key(&user) {
            waiting.turns.push_back(user);
            self.work.notify_one();
        }
        self.counters.presence_users_waiting.set(waiting.changes.len() as u64);
    }

    /// Everybody who shares a conversation with the user; `None` if nobody can say.
    async fn concerned(&self, user: &Arc<str>) -> Option<Users> {
        let remembered = |now| self.contacts.lock().expect("no holder panics").find(user, now);
        if let Some(known) = remembered(Instant::now()) {
            return Some(known);
        }
        for attempt in 1..=self.config.attempts_max {
            self.counters.presence_look_ups.add(1);
            let asked = Instant::now();
            match self.look_up(user).await {
                Ok(found) => {
                    let mut contacts = self.contacts.lock().expect("no holder panics");
                    let (user, now) = (Arc::clone(user), Instant::now());
                    contacts.remember(user, Arc::clone(&found), asked, now);
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
        let conversations = match self.parts.listing.conversations_of(Arc::clone(user)).await {
            Ok(conversations) => conversations,
            Err(NeighbourError::NotFound) => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut found: HashSet<Arc<str>> = HashSet::new();
        let mut asked = 0;
        for conversation in conversations {
            let with_roles = conversation.participants_with_roles.into_iter();
            let named: Vec<String> = conversation
                .participant_user_ids
                .into_iter()
                .chain(with_roles.map(|participant| participant.user_id))
                .collect();
            if !named.is_empty() {
                found.extend(named.into_iter().map(Arc::from));
            } else if asked < CONVERSATIONS_ASKED_MAX {
                asked += 1;
                let id = Arc::from(conversation.conversation_id);
                match self.parts.source.members(id).await {
                    Ok(members) => found.extend(members),
                    Err(NeighbourError::NotFound) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        found.remove(user);
        Ok(found.into_iter().collect())
    }

    async fn push(&self, concerned: &[Arc<str>], change: Change) {
        let here = |user: &&Arc<str>| self.parts.directory.sessions_of(user, |_| {}) > 0;
        let users: Vec<_> = concerned.iter().filter(here).map(Arc::clone).collect();
        if users.is_empty() {
            return self.counters.presence_changes_unconcerning.add(1);
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

#[cfg(test)]
mod tests;
