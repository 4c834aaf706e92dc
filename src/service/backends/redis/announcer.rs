//! Telling the other nodes that a user is here now.
//!
//! What they remember of his place is good for a second, and a session that moved without going
//! offline is announced by nobody else: for that second its events would go to where it was. So
//! each node says whom it has registered, and the others forget what they knew. Users that come
//! while one announcement is on its way go together in the next.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex};

use prost::Message as _;
use redis::cmd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::link::RedisLink;
use super::nodes::NodesCounters;

/// The channel; not one of an instance, whose names begin `delivery:`.
pub(super) const CHANNEL: &str = "delivery-moves";
/// Users in one announcement.
const USERS_AT_ONCE: usize = 4_096;
/// Users that wait; of more the others are told to forget everybody.
pub const USERS_MAX: usize = 65_536;

/// Tells this process's announcements from those of the others.
pub(super) static ORIGIN: LazyLock<u64> = LazyLock::new(rand::random);

/// What is published on [`CHANNEL`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Moves {
    /// Who is registered at another place than before, or at one more.
    #[prost(string, repeated, tag = "1")]
    pub(super) users: Vec<String>,
    /// There were too many to name.
    #[prost(bool, tag = "2")]
    pub(super) everybody: bool,
    /// Of the process that says so.
    #[prost(uint64, tag = "3")]
    pub(super) origin: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    users: HashSet<String>,
    everybody: bool,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Clones share it; the task ends with the last of them.
#[derive(Clone, Debug)]
pub struct Announcer {
    shared: Arc<Shared>,
    _task: Arc<Task>,
}

impl Announcer {
    /// Starts the task that announces. Needs a tokio runtime.
    pub fn start(link: RedisLink, counters: Arc<NodesCounters>) -> Self {
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(announce(Arc::clone(&shared), link, counters));
        Self { shared, _task: Arc::new(Task(task.abort_handle())) }
    }

    /// A session of this user was registered for this node.
    pub fn registered(&self, user: &str) {
        let mut waiting = self.shared.waiting.lock().expect("no holder panics");
        if waiting.users.len() < USERS_MAX {
            waiting.users.insert(user.to_owned());
        } else {
            waiting.users.clear();
            waiting.everybody = true;
        }
        drop(waiting);
        self.shared.news.notify_one();
    }
}

async fn announce(shared: Arc<Shared>, link: RedisLink, counters: Arc<NodesCounters>) {
    loop {
        let moves = take(&mut shared.waiting.lock().expect("no holder panics"));
        let Some(moves) = moves else {
            shared.news.notified().await;
            continue;
        };
        let count = moves.users.len() as u64;
        let mut publish = cmd("PUBLISH");
        publish.arg(CHANNEL).arg(moves.encode_to_vec());
        match link.run(vec![publish]).await {
            Ok(_) => counters.redis_moves_announced.add(count),
            // The others' memory ends within its second; it is empty if they lost Redis too.
            Err(_) => counters.redis_moves_unannounced.add(count),
        }
    }
}

fn take(waiting: &mut Waiting) -> Option<Moves> {
    if std::mem::take(&mut waiting.everybody) {
        waiting.users.clear();
        return Some(Moves { users: Vec::new(), everybody: true, origin: *ORIGIN });
    }
    if waiting.users.is_empty() {
        return None;
    }
    let users = if waiting.users.len() <= USERS_AT_ONCE {
        std::mem::take(&mut waiting.users).into_iter().collect()
    } else {
        let users: Vec<String> = waiting.users.iter().take(USERS_AT_ONCE).cloned().collect();
        for user in &users {
            waiting.users.remove(user);
        }
        users
    };
    Some(Moves { users, everybody: false, origin: *ORIGIN })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(count: usize) -> Waiting {
        let users = (0..count).map(|n| n.to_string()).collect();
        Waiting { users, everybody: false }
    }

    #[test]
    fn everybody_who_waits_is_announced_once_in_parts() {
        let mut waiting = waiting(2 * USERS_AT_ONCE + 1);
        let mut told = HashSet::new();
        let mut parts = 0;
        while let Some(moves) = take(&mut waiting) {
            parts += 1;
            assert!(moves.users.into_iter().all(|user| told.insert(user)));
        }
        assert_eq!((parts, told.len()), (3, 2 * USERS_AT_ONCE + 1));
    }

    #[test]
    fn too_many_are_everybody() {
        let mut waiting = waiting(3);
        waiting.everybody = true;
        let everybody = Moves { users: Vec::new(), everybody: true, origin: *ORIGIN };
        assert_eq!(take(&mut waiting), Some(everybody));
        assert_eq!(take(&mut waiting), None);
    }
}
