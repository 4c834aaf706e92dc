//! The conversations of users who return with a cursor to a node that does not know the members of what they have
//! missed.
//!
//! A node that has just started has filled its tails from Kafka and knows no members. The members of every conversation
//! in the tails would be a request for each of them, and one that is not answered would hold up everybody. A user's own
//! list is one request, says of every record whether it is theirs, and concerns nobody else.
//!
//! A list is used for one return: for a short time, and not beyond the assignment of another partition, whose tail may
//! contain conversations that are younger than the list.

use std::hash::BuildHasher as _;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hashbrown::DefaultHashBuilder;

use crate::service::backends::ports::{ConversationListing, NOT_FOUND_RETRY, NeighbourError};
use crate::service::members::membership::Membership;
use crate::service::runtime::backoff::Backoff;
use crate::service::runtime::cache::{Bounds, Cache, Weigh};
use crate::service::runtime::clock::steady_ms;

/// How long a list is used, ms: the pauses between the chunks of one return.
const LIFETIME_MS: u64 = 10_000;
/// Conversations in the lists that are kept, and users.
const IDS_MAX: usize = 200_000;
/// Memory of one of them: its pointer, counts, and an id of 36 bytes, as the allocator rounds it.
const ID_BYTES: usize = 16 + 64;

/// Memory of the lists, bytes.
pub const USER_LISTS_BYTES_MAX: usize = IDS_MAX * ID_BYTES;

/// The conversations of a user, sorted.
pub type UserList = Arc<[Arc<str>]>;

/// Bounds and times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UserListsConfig {
    /// Requests in flight at a time.
    pub requests_max: usize,
    /// Deadline of a request, ms.
    pub deadline_ms: u64,
    /// Delays after failed requests.
    pub backoff: Backoff,
}

impl Default for UserListsConfig {
    /// 64 requests of at most 5 s, delays from 100 ms to 5 s.
    fn default() -> Self {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        Self { requests_max: 64, deadline_ms: 5_000, backoff }
    }
}

/// Result of a look-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserLookup {
    /// The complete list.
    Known(UserList),
    /// Not known yet. The doorbells of [`Membership::wake`] ring when a request has ended.
    Pending,
}

#[derive(Debug)]
enum ListState {
    Requested { failures: u32 },
    Known { list: UserList, since_ms: u64, assignments: u64 },
    Failing { retry_ms: u64, failures: u32 },
}

impl Weigh for ListState {
    fn weight(&self) -> usize {
        match self {
            Self::Known { list, .. } => 1 + list.len(),
            Self::Requested { .. } | Self::Failing { .. } => 1,
        }
    }

    /// The number of requests at a time is bounded.
    fn is_pinned(&self) -> bool {
        matches!(self, Self::Requested { .. })
    }
}

#[derive(Debug)]
struct Lists {
    cache: Cache<ListState>,
    requests: usize,
    /// Partitions assigned so far: a list from before an assignment is not used.
    assignments: u64,
}

/// The lists of a node. All routers share them.
pub struct UserLists {
    config: UserListsConfig,
    listing: Arc<dyn ConversationListing>,
    membership: Arc<Membership>,
    runtime: tokio::runtime::Handle,
    lists: Mutex<Lists>,
    hasher: DefaultHashBuilder,
}

impl UserLists {
    /// Requests lists from `listing`, whose answers are never behind the log that was read
    /// ([`CurrentConversations`](crate::service::members::current::CurrentConversations)).
    pub fn new(
        config: UserListsConfig,
        listing: Arc<dyn ConversationListing>,
        membership: Arc<Membership>,
        runtime: tokio::runtime::Handle,
    ) -> Arc<Self> {
        let cache = Cache::new(Bounds { entries_max: IDS_MAX, weight_max: IDS_MAX });
        let lists = Mutex::new(Lists { cache, requests: 0, assignments: 0 });
        let hasher = DefaultHashBuilder::default();
        Arc::new(Self { config, listing, membership, runtime, lists, hasher })
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().expect("no holder panics")
    }

    /// A partition is assigned to this node: lists that were requested before are not used any more.
    pub fn assigned(&self) {
        self.lists().assignments += 1;
    }

    /// The conversations of a user. A list that is not known is requested, once for all who look it up.
    pub fn lookup(self: &Arc<Self>, user: &Arc<str>, now_ms: u64) -> UserLookup {
        // Before that, the answer could miss a change that is never applied.
        if !self.membership.is_following() {
            return UserLookup::Pending;
        }
        let hash = self.hasher.hash_one(&**user);
        let mut lists = self.lists();
        let Lists { cache, requests, assignments } = &mut *lists;
        let assignments = *assignments;
        let mut failures = 0;
        let found = cache.update(hash, user, |_, state| match state {
            ListState::Requested { .. } => Some(UserLookup::Pending),
            ListState::Known { list, since_ms, assignments: then }
                if *then == assignments && now_ms < *since_ms + LIFETIME_MS =>
            {
                Some(UserLookup::Known(Arc::clone(list)))
            }
            ListState::Failing { retry_ms, failures: so_far } => {
                failures = *so_far;
                (now_ms < *retry_ms).then_some(UserLookup::Pending)
            }
            ListState::Known { .. } => None,
        });
        if let Some(Some(found)) = found {
            return found;
        }
        if *requests < self.config.requests_max {
            *requests += 1;
            cache.insert(hash, Arc::clone(user), ListState::Requested { failures });
            cache.evict_stale(|state| match state {
                ListState::Known { since_ms, .. } => now_ms >= *since_ms + LIFETIME_MS,
                ListState::Failing { retry_ms, .. } => now_ms >= *retry_ms + LIFETIME_MS,
                ListState::Requested { .. } => false,
            });
            cache.evict(user);
            self.runtime.spawn(Arc::clone(self).request(Arc::clone(user), assignments));
        }
        UserLookup::Pending
    }

    async fn request(self: Arc<Self>, user: Arc<str>, assignments: u64) {
        let since_ms = steady_ms();
        let deadline = Duration::from_millis(self.config.deadline_ms);
        let ask = || async {
            let answer = self.listing.conversations_of(Arc::clone(&user));
            let answer = tokio::time::timeout(deadline, answer).await;
            answer.unwrap_or_else(|_| Err(NeighbourError::Unavailable("no answer in time".into())))
        };
        let mut answer = ask().await;
        if answer == Err(NeighbourError::NotFound) {
            // Replicas lag: only the second such answer counts.
            tokio::time::sleep(NOT_FOUND_RETRY).await;
            answer = ask().await;
        }
        let ids = match answer {
            Ok(listed) => Ok(listed.into_iter().map(|it| it.conversation_id).collect()),
            Err(NeighbourError::NotFound) => Ok(Vec::new()),
            Err(reason) => Err(reason),
        };
        let ids = ids.map(|mut ids: Vec<String>| {
            ids.sort_unstable();
            ids.dedup();
            ids.into_iter().map(Arc::from).collect()
        });
        self.answered(&user, ids, since_ms, assignments);
        self.membership.ring();
    }

    fn answered(
        &self,
        user: &Arc<str>,
        answer: Result<UserList, NeighbourError>,
        since_ms: u64,
        assignments: u64,
    ) {
        let hash = self.hasher.hash_one(&**user);
        let mut lists = self.lists();
        lists.requests -= 1;
        lists.cache.update(hash, user, |_, state| {
            let ListState::Requested { failures } = *state else { return };
            *state = match answer {
                Ok(list) => ListState::Known { list, since_ms, assignments },
                Err(reason) => {
                    tracing::debug!(user = %user, %reason, "cannot list conversations");
                    let pause = self.config.backoff.random_delay(failures);
                    let retry_ms = steady_ms() + pause.as_millis() as u64;
                    ListState::Failing { retry_ms, failures: failures + 1 }
                }
            };
        });
        lists.cache.evict(user);
    }
}

impl std::fmt::Debug for UserLists {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserLists").field("config", &self.config).finish_non_exhaustive()
    }
}
