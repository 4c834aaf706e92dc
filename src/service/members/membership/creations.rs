//! The conversations that were created lately: a replica of the conversation service may not know them yet.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::domain::members::Members;
use crate::service::members::membership::changes::REPLICA_LAG_MAX;

/// Creations that are remembered. Beyond that the oldest are forgotten, also if they are younger than
/// [`REPLICA_LAG_MAX`]. Their lists are shared with the cache.
const CREATIONS_MAX: usize = 1_024;

#[derive(Debug)]
struct RecentCreation {
    conversation: Arc<str>,
    members: Members,
    read_at: Instant,
}

/// The youngest creations, the oldest first.
#[derive(Debug, Default)]
pub(super) struct RecentCreations(VecDeque<RecentCreation>);

impl RecentCreations {
    /// A conversation was created with these members.
    pub(super) fn insert(&mut self, conversation: Arc<str>, members: Members, read_at: Instant) {
        let is_old =
            |it: &RecentCreation| read_at.saturating_duration_since(it.read_at) > REPLICA_LAG_MAX;
        while self.0.len() >= CREATIONS_MAX || self.0.front().is_some_and(is_old) {
            self.0.pop_front();
        }
        self.0.push_back(RecentCreation { conversation, members, read_at });
    }

    /// Those with this user that were read within [`REPLICA_LAG_MAX`] before `asked_at`, or later.
    pub(super) fn of_user(
        &self,
        user: &str,
        asked_at: Instant,
    ) -> impl Iterator<Item = (Arc<str>, bool)> {
        let is_recent = move |it: &&RecentCreation| {
            asked_at.saturating_duration_since(it.read_at) <= REPLICA_LAG_MAX
        };
        let recent = self.0.iter().rev().take_while(is_recent);
        let with_user = recent.filter(move |it| it.members.contains(user));
        with_user.map(|it| (Arc::clone(&it.conversation), true))
    }
}
