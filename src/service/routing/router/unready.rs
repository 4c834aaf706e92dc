//! Pulls of records that this node has not routed, so that nobody here knows who received them.
//!
//! After a restart, and of a partition that had another owner, a tail is filled from Kafka. What its records need is
//! found out before a pull joins a pass, so that a pass waits for nothing, and a pull only for itself:
//!
//! 1. What the node knows already, from the log or because it routes it, costs nothing.
//! 2. If the pulls that wait need few conversations, and no more than there are pulls, their **members** are requested:
//!    that is less than a request for each user.
//! 3. Otherwise, or if a request fails or takes long, the **list of each user** says which records are theirs
//!    ([`user_lists`](crate::service::members::user_lists)): at most one request for each return, however many
//!    conversations the tail has, and a conversation without an answer holds up nobody.
//!
//! A list of today is that of the records, because a user who may have joined or left anything since gets
//! [`CursorExpired::MembersUnknown`] (`ReplayPass::fail_doubtful`).

use std::sync::Arc;

use hashbrown::HashSet;
use slab::Slab;

use crate::domain::cursor::CursorExpired;
use crate::service::events::envelope::{self, EventBody};
use crate::service::members::membership::Lookup;
use crate::service::members::user_lists::{UserLists, UserLookup};
use crate::service::routing::router::core::RouterCore;
use crate::service::routing::router::lane::Lane;
use crate::service::routing::router::record::named_conversation;
use crate::service::routing::router::replay_pass::ActivePull;
use crate::service::routing::router::replay_requests::{Answers, ReplayRange};

/// Time between two attempts, if nothing arrives, ms.
const RETRY_MS: u64 = 10;
/// Conversations whose members are requested instead of the lists of users.
const FEW_CONVERSATIONS: usize = 32;
/// Conversations whose members are requested at a time if users have no lists.
const CONVERSATIONS_AT_ONCE: usize = 256;
/// Records that are looked at to find these conversations; about 1 µs each.
const RECORDS_LOOKED_AT: usize = 2_048;
/// How long members are waited for before the lists of the users are requested, ms.
const MEMBERS_WAIT_MS: u64 = 1_000;

/// What the pulls wait for.
#[derive(Debug, Default)]
enum PullWait {
    /// Not decided.
    #[default]
    New,
    /// The members of these conversations.
    Members {
        conversations: Vec<Arc<str>>,
        /// Unix time, ms.
        since_ms: u64,
    },
    /// The lists of the users.
    Lists,
}

/// The pulls that wait until it is known which records are theirs.
#[derive(Default)]
pub(super) struct UnreadyPulls {
    pulls: Vec<ActivePull>,
    wait: PullWait,
    /// Unix time, ms.
    retry_ms: u64,
}

impl UnreadyPulls {
    /// Takes out of `pulls` those that want a record of which is not known who received it.
    pub(super) fn add(&mut self, pulls: &mut Vec<ActivePull>, lanes: &mut Slab<Lane>, now_ms: u64) {
        if self.pulls.is_empty() {
            self.retry_ms = now_ms;
        }
        self.pulls.extend(pulls.extract_if(.., |pull| pull.needs_members(lanes)));
        for pull in &mut self.pulls {
            pull.unready_since_ms.get_or_insert(now_ms);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.pulls.len()
    }

    /// Takes out the pulls that can join a pass now. Those that have waited for too long fail.
    pub(super) fn take_ready(
        &mut self,
        core: &RouterCore,
        lanes: &Slab<Lane>,
        now_ms: u64,
        answers: &mut Answers,
    ) -> Vec<ActivePull> {
        if self.pulls.is_empty() || now_ms < self.retry_ms {
            return Vec::new();
        }
        self.retry_ms = now_ms + RETRY_MS;
        if matches!(self.wait, PullWait::New) {
            self.wait = self.choose(core, lanes, now_ms);
        }
        let mut ready = Vec::new();
        if self.wait.request_members(core, now_ms) {
            self.wait = PullWait::New;
            ready.append(&mut self.pulls);
        } else if let (PullWait::Lists, Some(lists)) = (&self.wait, &core.user_lists) {
            ready.extend(self.pulls.extract_if(.., |pull| pull.find_list(lists, now_ms)));
        }
        let is_over = |pull: &mut ActivePull| {
            pull.unready_since_ms.is_some_and(|since_ms| {
                now_ms >= since_ms.saturating_add(core.config.route_retry_max_ms)
            })
        };
        for mut pull in self.pulls.extract_if(.., is_over) {
            pull.answer(Err(CursorExpired::MembersUnknown), answers);
        }
        if self.pulls.is_empty() {
            self.wait = PullWait::New;
        }
        ready
    }

    /// The members, if the records that the pulls need are of few conversations, or users have no lists.
    fn choose(&self, core: &RouterCore, lanes: &Slab<Lane>, since_ms: u64) -> PullWait {
        let max = match &core.user_lists {
            Some(_) => self.pulls.len().min(FEW_CONVERSATIONS),
            None => CONVERSATIONS_AT_ONCE,
        };
        let (mut found, mut looked_at) = (HashSet::<Arc<str>>::new(), 0);
        for (_, lane) in lanes {
            let Some(tail) = lane.tail() else { continue };
            let ranges = self.pulls.iter().flat_map(|pull| &pull.ranges);
            let ranges = ranges.filter(|range| range.lane == lane.key && range.next < range.to);
            let (from, to) = ranges.fold((i64::MAX, i64::MIN), |(from, to), range| {
                (from.min(range.next), to.max(range.to))
            });
            for record in tail.tail.unresolved(from, to) {
                looked_at += 1;
                let Ok(event) = envelope::decode(record.value) else { continue };
                // A creation event has its members.
                if !matches!(event.body, EventBody::ConversationCreated { .. })
                    && let Some(conversation) = named_conversation(&event, record.into())
                    && !found.contains(conversation)
                    && core.membership.known(conversation).is_none()
                {
                    found.insert(conversation.into());
                }
                let is_enough = found.len() > max || looked_at > RECORDS_LOOKED_AT;
                // If nothing is unknown so far, a pass can begin: a pull leaves it where something is.
                if is_enough && !found.is_empty() && core.user_lists.is_some() {
                    return PullWait::Lists;
                }
                if is_enough {
                    return PullWait::Members {
                        conversations: found.into_iter().collect(),
                        since_ms,
                    };
                }
            }
        }
        PullWait::Members { conversations: found.into_iter().collect(), since_ms }
    }
}

impl PullWait {
    /// Requests the members. Returns whether they are known. If a request fails or takes long, the lists of the users
    /// are waited for from now on.
    fn request_members(&mut self, core: &RouterCore, now_ms: u64) -> bool {
        let Self::Members { conversations, since_ms } = self else { return false };
        let mut is_failing = false;
        conversations.retain(|conversation| {
            let found = core.membership.lookup(conversation, None, now_ms);
            is_failing |= matches!(found, Lookup::Failing { .. });
            matches!(found, Lookup::Pending | Lookup::Failing { .. })
        });
        if conversations.is_empty() {
            return true;
        }
        if core.user_lists.is_some() && (is_failing || now_ms >= *since_ms + MEMBERS_WAIT_MS) {
            *self = Self::Lists;
        }
        false
    }
}

impl ActivePull {
    /// Whether it wants a record of which is not known who received it.
    fn needs_members(&self, lanes: &mut Slab<Lane>) -> bool {
        let mut find_unresolved = |range: &ReplayRange| {
            let lane = lanes.get_mut(range.lane.slot()).filter(|lane| lane.key == range.lane)?;
            let tail = lane.partition.as_mut()?.tail.as_mut()?;
            Some(tail.find_unresolved(range.next, range.to))
        };
        self.list.is_none() && self.ranges.iter().any(|range| find_unresolved(range) == Some(true))
    }

    /// Whether the list of its user is known now.
    fn find_list(&mut self, lists: &Arc<UserLists>, now_ms: u64) -> bool {
        match lists.lookup(&self.user, now_ms) {
            UserLookup::Known(list) => {
                self.list = Some(list);
                true
            }
            UserLookup::Pending => false,
        }
    }
}
