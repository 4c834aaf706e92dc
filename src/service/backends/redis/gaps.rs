//! Users of other nodes who may have missed an event because its hand-off failed, and how the other
//! nodes are told about them.
//!
//! ```text
//!   hand-off failed or refused ──► untold ── PUBLISH answered ──► told ─┐
//!   published, but nobody listened ───────────────────────────► doubtful│
//!                                    ▲                                  │
//!                                    └── another server is used now ────┘
//! ```
//!
//! The other nodes close the sessions of these users with 4409, and the clients resume. A client
//! resumes after the last event that it received, so an event that it receives after a gap would hide
//! the gap. Therefore nothing is handed over while users are untold: each batch of hand-offs tells
//! first, on the same connection.
//!
//! A node that is not subscribed when it is told closes all its sessions when it is subscribed again, so
//! an answered `PUBLISH` reaches everybody who needs it, if the server is the right one. A server that
//! is replaced by another was perhaps the wrong one, for example a demoted primary: what was told there,
//! or published there without a listener, is told again.
//!
//! Users are counted up to [`USERS_MAX`]; beyond that, everybody has missed something.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use prost::Message as _;
use redis::{Cmd, FromRedisValue, cmd};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::address::RedisAddress;
use super::counters::NodesCounters;
use super::link::{RedisFault, RedisLink};
use crate::service::backends::outage::Outage;

/// The channel on which nodes tell each other. Go nodes do not subscribe to it.
pub(super) const CHANNEL: &str = "delivery-gaps";
/// Maximum number of users in a set.
const USERS_MAX: usize = 16_384;
/// Maximum number of users in the three sets.
pub const USERS_REMEMBERED_MAX: usize = 3 * USERS_MAX;
/// Users in one message.
const USERS_AT_ONCE: usize = 4_096;
/// How long what was told or published at a server is remembered, at least; at most twice as long.
const DOUBTED_FOR: Duration = Duration::from_secs(300);

/// A message on [`CHANNEL`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct MissedUsers {
    /// Users who may have missed an event on every node except the sender.
    #[prost(string, repeated, tag = "1")]
    pub(super) users: Vec<String>,
    /// Too many to name: all users may have missed one.
    #[prost(bool, tag = "2")]
    pub(super) everybody: bool,
    /// The instance that could not hand over.
    #[prost(string, tag = "3")]
    pub(super) instance: String,
}

/// A bounded set of users that becomes everybody.
#[derive(Debug, Default, PartialEq, Eq)]
struct UserSet {
    users: HashSet<Arc<str>>,
    everybody: bool,
}

impl UserSet {
    fn is_empty(&self) -> bool {
        self.users.is_empty() && !self.everybody
    }

    fn add<'a>(&mut self, users: impl IntoIterator<Item = &'a Arc<str>>) {
        for user in users {
            if self.everybody {
                return;
            }
            if self.users.len() < USERS_MAX {
                self.users.insert(Arc::clone(user));
            } else if !self.users.contains(user) {
                self.users = HashSet::new();
                self.everybody = true;
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.everybody |= other.everybody;
        if self.everybody {
            self.users = HashSet::new();
        } else {
            self.add(&other.users);
        }
    }

    /// As messages, each of a bounded size.
    fn messages(&self, instance: &str) -> Vec<MissedUsers> {
        let part = |users: &[&Arc<str>]| MissedUsers {
            users: users.iter().map(|user| user.to_string()).collect(),
            everybody: self.everybody,
            instance: instance.to_owned(),
        };
        if self.everybody {
            return vec![part(&[])];
        }
        let users: Vec<_> = self.users.iter().collect();
        users.chunks(USERS_AT_ONCE).map(part).collect()
    }
}

#[derive(Debug)]
struct GapState {
    untold: UserSet,
    /// What was told, or published without a listener, at the current server: lately and earlier.
    doubtful: [UserSet; 2],
    /// When the first of the two began.
    doubtful_since: Instant,
}

impl GapState {
    fn new(now: Instant) -> Self {
        Self { untold: UserSet::default(), doubtful: Default::default(), doubtful_since: now }
    }

    /// The set for what becomes doubtful now.
    fn doubtful(&mut self, now: Instant) -> &mut UserSet {
        let age = now.duration_since(self.doubtful_since);
        if age >= DOUBTED_FOR {
            let lately = std::mem::take(&mut self.doubtful[0]);
            self.doubtful[1] = if age < 2 * DOUBTED_FOR { lately } else { UserSet::default() };
            self.doubtful_since = now;
        }
        &mut self.doubtful[0]
    }

    /// Another server is used now.
    fn server_changed(&mut self, now: Instant) {
        let _ = self.doubtful(now);
        for doubtful in std::mem::take(&mut self.doubtful) {
            self.untold.merge(doubtful);
        }
    }
}

/// The users who have to be told about. Usable from any thread.
#[derive(Debug)]
pub(super) struct Gaps {
    state: Mutex<GapState>,
    added: Notify,
    counters: Arc<NodesCounters>,
}

impl Gaps {
    pub(super) fn new(counters: Arc<NodesCounters>) -> Self {
        Self { state: Mutex::new(GapState::new(Instant::now())), added: Notify::new(), counters }
    }

    fn state(&self) -> MutexGuard<'_, GapState> {
        self.state.lock().expect("no holder panics")
    }

    /// These users may have missed an event.
    pub(super) fn lost<'a>(&self, users: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut state = self.state();
        state.untold.add(users);
        self.show(&state);
        let has_untold = !state.untold.is_empty();
        drop(state);
        if has_untold {
            self.added.notify_one();
        }
    }

    /// All users on other nodes may have missed an event.
    pub(super) fn lost_by_all(&self) {
        let mut state = self.state();
        state.untold = UserSet { users: HashSet::new(), everybody: true };
        self.show(&state);
        drop(state);
        self.added.notify_one();
    }

    /// An event for these users was published, but their instance did not listen: it is down, and
    /// closes its sessions when it listens again, or this node uses the wrong server.
    pub(super) fn unheard<'a>(&self, users: impl IntoIterator<Item = &'a Arc<str>>) {
        self.state().doubtful(Instant::now()).add(users);
    }

    pub(super) fn has_untold(&self) -> bool {
        !self.state().untold.is_empty()
    }

    fn take(&self) -> UserSet {
        std::mem::take(&mut self.state().untold)
    }

    fn put_back(&self, users: UserSet) {
        let mut state = self.state();
        state.untold.merge(users);
        self.show(&state);
    }

    fn told(&self, users: UserSet) {
        let mut state = self.state();
        state.doubtful(Instant::now()).merge(users);
        self.show(&state);
    }

    fn server_changed(&self) {
        let mut state = self.state();
        state.server_changed(Instant::now());
        self.show(&state);
    }

    fn show(&self, state: &GapState) {
        self.counters.redis_gap_users_untold.set(state.untold.users.len() as u64);
        self.counters.redis_gap_everybody_untold.set(u64::from(state.untold.everybody));
    }
}

/// Tells the other nodes. Used by the task that hands over, so that the order is kept.
pub(super) struct Teller {
    instance: Arc<str>,
    gaps: Arc<Gaps>,
    link: RedisLink,
    /// The connection of the last check of the server.
    generation: u64,
    /// The server at that time.
    server: Option<String>,
    attempt: u32,
    /// No attempt without a hand-off before this time, unless there is a new connection.
    next_attempt: Instant,
    outage: Outage,
}

impl Teller {
    pub(super) fn new(instance: Arc<str>, gaps: Arc<Gaps>, link: RedisLink) -> Self {
        Self {
            instance,
            gaps,
            link,
            generation: 0,
            server: None,
            attempt: 0,
            next_attempt: Instant::now(),
            outage: Outage::default(),
        }
    }

    /// Waits until [`Teller::tell`] has something to do.
    pub(super) async fn due(&self) {
        loop {
            let generation = self.link.generation();
            if self.gaps.has_untold() || generation != self.generation {
                let _ = timeout_at(self.next_attempt, self.link.reconnected(generation)).await;
                return;
            }
            tokio::select! {
                () = self.gaps.added.notified() => {}
                () = self.link.reconnected(generation) => {}
            }
        }
    }

    /// Tells the other nodes about everybody untold.
    ///
    /// # Errors
    /// Some are still untold.
    pub(super) async fn tell(&mut self) -> Result<(), RedisFault> {
        let told = match self.check_server().await {
            Ok(()) => self.tell_untold().await,
            Err(fault) => Err(fault),
        };
        match told {
            Ok(()) => self.attempt = 0,
            Err(_) => {
                let delay = self.link.config().backoff.random_delay(self.attempt);
                self.next_attempt = Instant::now() + delay;
                self.attempt = self.attempt.saturating_add(1);
            }
        }
        told
    }

    async fn tell_untold(&self) -> Result<(), RedisFault> {
        let untold = self.gaps.take();
        if untold.is_empty() {
            return Ok(());
        }
        let counters = &self.gaps.counters;
        let messages = untold.messages(&self.instance);
        let count = messages.len() as u64;
        let answers = self.link.run(messages.iter().map(publish).collect()).await;
        let refused = match answers {
            Ok(answers) => answers.into_iter().find_map(Result::err),
            Err(fault) => {
                self.gaps.put_back(untold);
                return Err(fault);
            }
        };
        if let Some(refused) = refused {
            self.gaps.put_back(untold);
            return Err(RedisFault::Failed(super::refusal::reason(&refused)));
        }
        counters.redis_gaps_told.add(count);
        if let Some(report) = self.outage.failed(Instant::now()) {
            let (users, everybody) = (untold.users.len(), untold.everybody);
            tracing::warn!(
                users,
                everybody,
                "hand-offs to other nodes failed; the sessions there are closed with 4409{report}"
            );
        }
        self.gaps.told(untold);
        Ok(())
    }

    /// Notices that another server is used.
    async fn check_server(&mut self) -> Result<(), RedisFault> {
        let generation = self.link.generation();
        if generation == self.generation {
            return Ok(());
        }
        let server = server_of(&self.link, generation).await?;
        self.generation = generation;
        if self.server.as_ref().is_some_and(|former| *former != server) {
            self.gaps.server_changed();
        }
        self.server = Some(server);
        Ok(())
    }
}

fn publish(message: &MissedUsers) -> Cmd {
    let mut publish = cmd("PUBLISH");
    publish.arg(CHANNEL).arg(message.encode_to_vec());
    publish
}

/// A name for the server, which differs from that of every other one. A server that does not tell it
/// is taken for another one at each connection. All nodes of a cluster pass messages on to each other,
/// so they are one server.
async fn server_of(link: &RedisLink, generation: u64) -> Result<String, RedisFault> {
    if matches!(link.config().address, RedisAddress::Cluster(_)) {
        return Ok("cluster".to_owned());
    }
    let mut info = cmd("INFO");
    info.arg("server");
    let answer = link.ask(vec![info]).await?.pop().and_then(Result::ok);
    let text = answer.and_then(|answer| String::from_redis_value(answer).ok());
    let run_id = text.as_deref().and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix("run_id:")).map(str::to_owned)
    });
    Ok(run_id.unwrap_or_else(|| format!("connection {generation}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(range: std::ops::Range<usize>) -> Vec<Arc<str>> {
        range.map(|n| Arc::from(n.to_string())).collect()
    }

    fn set(range: std::ops::Range<usize>) -> UserSet {
        let mut set = UserSet::default();
        set.add(&users(range));
        set
    }

    #[test]
    fn too_many_users_are_everybody_and_use_no_memory() {
        let mut all = set(0..USERS_MAX);
        all.add(&users(5..6));
        assert!(!all.everybody, "it is in the set");
        all.add(&users(USERS_MAX..USERS_MAX + 1));
        assert_eq!(all, UserSet { users: HashSet::new(), everybody: true });
        all.add(&users(0..1));
        assert!(all.users.is_empty());
        let mut few = set(0..3);
        few.merge(all);
        assert_eq!(few, UserSet { users: HashSet::new(), everybody: true });
        let mut half = set(0..USERS_MAX);
        half.merge(set(1..USERS_MAX + 1));
        assert!(half.everybody);
    }

    #[test]
    fn every_user_is_told_once_in_parts() {
        let messages = set(0..2 * USERS_AT_ONCE + 1).messages("n1");
        assert_eq!(messages.len(), 3);
        let told: HashSet<_> = messages.iter().flat_map(|part| part.users.clone()).collect();
        assert_eq!(told.len(), 2 * USERS_AT_ONCE + 1);
        assert!(messages.iter().all(|part| part.users.len() <= USERS_AT_ONCE));
        assert!(UserSet::default().messages("n1").is_empty());
    }

    #[test]
    fn what_was_said_at_a_server_is_repeated_at_the_next_for_a_time() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut state = GapState::new(start);
        state.doubtful(after(0)).add(&users(0..1));
        state.doubtful(after(299)).add(&users(1..2));
        state.doubtful(after(301)).add(&users(2..3));
        state.server_changed(after(600));
        assert_eq!(state.untold, set(0..3), "five minutes at least");
        state.server_changed(after(601));
        assert_eq!(state.untold, set(0..3), "once");

        let mut state = GapState::new(start);
        state.doubtful(after(0)).add(&users(0..1));
        state.doubtful(after(301)).add(&users(1..2));
        state.doubtful(after(602)).add(&users(2..3));
        state.server_changed(after(603));
        assert_eq!(state.untold, set(1..3), "ten minutes at most");

        let mut state = GapState::new(start);
        state.doubtful(after(0)).add(&users(0..1));
        state.server_changed(after(601));
        assert!(state.untold.is_empty());
    }
}
