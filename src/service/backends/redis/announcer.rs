//! Announces to the other nodes that a user is connected to this one.
//!
//! The other nodes cache a user's location for a second. The presence service does not announce a
//! session that moves without going offline, so for that second its events would go to its old
//! node. Each node therefore announces the users that it has registered, and the others drop their
//! cached locations. Users registered while an announcement is in flight are batched in the next
//! one.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex};

use prost::Message as _;
use redis::cmd;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::counters::NodesCounters;
use super::legacy::RegistryUse;
use super::link::RedisLink;

/// The channel of the announcements. Channels of instances begin with `delivery:`.
pub(super) const CHANNEL: &str = "delivery-moves";
/// Users in one announcement.
const USERS_AT_ONCE: usize = 4_096;
/// Maximum number of users that wait; beyond that, the other nodes drop all entries.
pub const USERS_MAX: usize = 65_536;

/// Identifies this process's announcements.
pub(super) static ORIGIN: LazyLock<u64> = LazyLock::new(rand::random);

/// A message on [`CHANNEL`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct MovedUsers {
    /// Users with a new registration.
    #[prost(string, repeated, tag = "1")]
    pub(super) users: Vec<String>,
    /// Too many to name: all users may have moved.
    #[prost(bool, tag = "2")]
    pub(super) everybody: bool,
    /// [`ORIGIN`] of the announcing process.
    #[prost(uint64, tag = "3")]
    pub(super) origin: u64,
}

/// Users whose registration is not announced yet.
#[derive(Debug, Default)]
struct PendingUsers {
    users: HashSet<String>,
    everybody: bool,
}

#[derive(Debug, Default)]
struct PendingAnnouncements {
    users: Mutex<PendingUsers>,
    added: Notify,
}

/// A handle on the announcing task. Dropping the last clone stops the task.
#[derive(Clone, Debug)]
pub struct Announcer {
    pending: Arc<PendingAnnouncements>,
    registry_use: RegistryUse,
    _task: Arc<JoinSet<()>>,
}

impl Announcer {
    /// Starts the announcing task. Needs a tokio runtime. Nothing is announced while no other node uses
    /// the registry.
    pub fn start(link: RedisLink, counters: Arc<NodesCounters>, registry_use: RegistryUse) -> Self {
        let pending = Arc::<PendingAnnouncements>::default();
        let mut task = JoinSet::new();
        task.spawn(announce(Arc::clone(&pending), link, counters));
        Self { pending, registry_use, _task: Arc::new(task) }
    }

    /// Whether other nodes use the registry to find the sessions of this node.
    pub fn is_needed(&self) -> bool {
        self.registry_use.is_active()
    }

    /// Announces that a session of this user is registered on this node.
    pub fn registered(&self, user: &str) {
        if !self.is_needed() {
            return;
        }
        let mut pending = self.pending.users.lock().expect("no holder panics");
        if pending.users.len() < USERS_MAX {
            pending.users.insert(user.to_owned());
        } else {
            pending.users.clear();
            pending.everybody = true;
        }
        drop(pending);
        self.pending.added.notify_one();
    }
}

async fn announce(
    pending: Arc<PendingAnnouncements>,
    link: RedisLink,
    counters: Arc<NodesCounters>,
) {
    loop {
        let moved = take(&mut pending.users.lock().expect("no holder panics"));
        let Some(moved) = moved else {
            pending.added.notified().await;
            continue;
        };
        let count = moved.users.len() as u64;
        let mut publish = cmd("PUBLISH");
        publish.arg(CHANNEL).arg(moved.encode_to_vec());
        match link.run(vec![publish]).await {
            Ok(_) => counters.redis_moves_announced.add(count),
            // The other nodes' entries expire within a second, and are dropped if Redis is lost.
            Err(_) => counters.redis_moves_unannounced.add(count),
        }
    }
}

fn take(pending: &mut PendingUsers) -> Option<MovedUsers> {
    if std::mem::take(&mut pending.everybody) {
        pending.users.clear();
        return Some(MovedUsers { users: Vec::new(), everybody: true, origin: *ORIGIN });
    }
    if pending.users.is_empty() {
        return None;
    }
    let users = if pending.users.len() <= USERS_AT_ONCE {
        std::mem::take(&mut pending.users).into_iter().collect()
    } else {
        let users: Vec<String> = pending.users.iter().take(USERS_AT_ONCE).cloned().collect();
        for user in &users {
            pending.users.remove(user);
        }
        users
    };
    Some(MovedUsers { users, everybody: false, origin: *ORIGIN })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(count: usize) -> PendingUsers {
        let users = (0..count).map(|n| n.to_string()).collect();
        PendingUsers { users, everybody: false }
    }

    #[test]
    fn every_pending_user_is_announced_once_in_parts() {
        let mut pending = pending(2 * USERS_AT_ONCE + 1);
        let mut announced = HashSet::new();
        let mut parts = 0;
        while let Some(moved) = take(&mut pending) {
            parts += 1;
            assert!(moved.users.into_iter().all(|user| announced.insert(user)));
        }
        assert_eq!((parts, announced.len()), (3, 2 * USERS_AT_ONCE + 1));
    }

    #[test]
    fn too_many_users_are_everybody() {
        let mut pending = pending(3);
        pending.everybody = true;
        let everybody = MovedUsers { users: Vec::new(), everybody: true, origin: *ORIGIN };
        assert_eq!(take(&mut pending), Some(everybody));
        assert_eq!(take(&mut pending), None);
    }
}
