//! Subscriptions to what other nodes and the presence service publish (contract §4).
//!
//! ```text
//!   connect ─► subscribe ─► read ──────► hand-offs ─► bounded queue ─► router
//!      ▲                     │ │
//!      │  backoff, jitter    │ └───────► presence ──► location cache, fan-out
//!      └─── lost, silent ◄───┘
//! ```
//!
//! The subscription follows the link: after each new connection of the link, and every few seconds, the
//! reader checks that the server that the link uses knows the subscription (`PUBSUB NUMSUB`).
//! Otherwise, for example when a partition keeps the old primary alive, it subscribes again there.
//!
//! Redis keeps nothing for a disconnected subscriber: messages published during the gap are lost,
//! and their number is unknown. So when the subscription is back, and before anything is read from it,
//! all sessions of the node are closed with 4409; not before, because a client that resumes at once
//! would fall into the same gap. The metrics count the gaps and their duration, from the last sign
//! of life to the new subscription.
//!
//! The reader never waits for the router, because the buffer of the client library is unbounded; records
//! wait in a bounded queue instead (`handed_over`).

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use redis::aio::{PubSubSink, PubSubStream};
use redis::{ConnectionInfo, FromRedisValue, Msg, RedisResult, Value, cmd};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt as _;

use super::address::RedisAddress;
use super::announcer::{self, MovedUsers};
use super::cluster;
use super::config::RedisConfig;
use super::counters::SubscriptionCounters;
use super::gaps::{self, MissedUsers};
use super::handed_over::HandedOver;
use super::legacy::LegacyWatch;
use super::link::RedisLink;
use super::locations::Locations;
use super::refusal::reason;
use crate::service::backends::outage::Outage;
use crate::service::backends::ports::{MissedEvents, RouterInbox};

/// The channel of the presence service.
const PRESENCE_UPDATES: &str = "presence:updates";
/// Interval of checks whether the channel's slot has moved to another node of a cluster.
const OWNER_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Settings of the subscriptions; those of the connection are the link's.
#[derive(Clone, Debug)]
pub struct SubscriptionsConfig {
    /// This node's instance id: other nodes publish on its channel.
    pub instance: Arc<str>,
    /// Whether to subscribe to hand-offs (`ROUTING_MODE=group`).
    pub hand_offs: bool,
    /// With hand-off through the log (`HANDOFF=log`): which nodes hand over through Redis.
    pub legacy: Option<Arc<LegacyWatch>>,
    /// Maximum number of handed-over records waiting for the router.
    pub records_max: usize,
    /// Maximum bytes of these records.
    pub bytes_max: usize,
    /// Interval of pings on the subscribed connection.
    pub ping_interval: Duration,
}

impl SubscriptionsConfig {
    /// Defaults: hand-offs, 8,192 records or 32 MiB, a ping every 5 s.
    pub fn new(instance: Arc<str>) -> Self {
        Self {
            instance,
            hand_offs: true,
            legacy: None,
            records_max: 8_192,
            bytes_max: 32 << 20,
            ping_interval: Duration::from_secs(5),
        }
    }
}

/// Receives changes of presence. Must not block, and bounds its memory.
pub trait PresenceUpdates: Send + Sync + 'static {
    /// A serialized `PresenceUpdateEvent`.
    fn updated(&self, payload: &[u8]);
    /// Changes may have been missed.
    fn missed(&self);
    /// A node has registered a session of this user (see [`super::Announcer`]).
    fn moved(&self, user: &str) {
        let _ = user;
    }
    /// Another node has registered a session of this user; follows [`PresenceUpdates::moved`].
    fn moved_elsewhere(&self, user: &str) {
        let _ = user;
    }
}

/// Receivers of what is published.
#[derive(Clone)]
pub struct Sinks {
    /// Handed-over records.
    pub router: Arc<dyn RouterInbox>,
    /// Gaps in what is handed over.
    pub missed: Arc<dyn MissedEvents>,
    /// Each receives all changes of presence.
    pub presence: Vec<Arc<dyn PresenceUpdates>>,
}

impl PresenceUpdates for Locations {
    fn updated(&self, payload: &[u8]) {
        use crate::service::events::proto::presence::v1::PresenceUpdateEvent;
        if let Ok(event) = PresenceUpdateEvent::decode(payload) {
            self.forget(&event.user_id);
        }
    }

    fn missed(&self) {
        self.forget_all();
    }

    fn moved(&self, user: &str) {
        self.forget(user);
    }
}

/// The running subscriptions; dropping this ends them.
pub struct Subscriptions {
    counters: Arc<SubscriptionCounters>,
    _tasks: JoinSet<()>,
}

impl Subscriptions {
    /// Subscribes in the background, and resubscribes until dropped. Needs a tokio runtime.
    pub fn start(
        config: SubscriptionsConfig,
        link: RedisLink,
        sinks: Sinks,
        counters: Arc<SubscriptionCounters>,
    ) -> Self {
        let mut tasks = JoinSet::new();
        let bounds = (config.records_max, config.bytes_max);
        let (router, missed) = (Arc::clone(&sinks.router), Arc::clone(&sinks.missed));
        let handed_over =
            HandedOver::start(bounds, router, missed, Arc::clone(&counters), &mut tasks);
        let channel = super::channel_of(&config.instance);
        let reader = Arc::new(Reader {
            config,
            link,
            channel,
            sinks,
            handed_over,
            counters: Arc::clone(&counters),
            gaps: Outage::default(),
        });
        tasks.spawn(reader.run());
        Self { counters, _tasks: tasks }
    }

    /// Whether the subscriptions are active now.
    pub fn is_up(&self) -> bool {
        self.counters.redis_subscribed.get() != 0
    }
}

struct Reader {
    config: SubscriptionsConfig,
    link: RedisLink,
    channel: String,
    sinks: Sinks,
    handed_over: HandedOver,
    counters: Arc<SubscriptionCounters>,
    gaps: Outage,
}

/// A subscribed connection.
struct Subscribed {
    home: Home,
    sink: PubSubSink,
    messages: PubSubStream,
}

/// Where a connection is subscribed.
struct Home {
    node: ConnectionInfo,
    /// The link's connection at that time.
    generation: u64,
}

/// A subscription that replaces another.
struct Moved {
    subscribed: Subscribed,
    /// What is published after this may have been missed; `None`: nothing was missed.
    heard_until: Option<Instant>,
}

/// Whether the subscription is where it should be.
enum Position {
    Right,
    /// In a cluster, whose nodes pass messages on to each other.
    OtherNode(ConnectionInfo),
    /// The server that the link uses does not know the subscription.
    OtherServer(ConnectionInfo),
}

impl Reader {
    async fn run(self: Arc<Self>) {
        let mut attempt = 0;
        let mut last_sign: Option<Instant> = None;
        if let Some(legacy) = &self.config.legacy {
            // Otherwise the other nodes would take this one for a node without a lease.
            legacy.lease_stored().await;
        }
        loop {
            let generation = self.link.generation();
            match self.subscribe().await {
                Ok(subscribed) => {
                    let since = Instant::now();
                    let _ = self.link.outage().succeeded(since);
                    match last_sign {
                        Some(last_sign) => self.missed_since(last_sign).await,
                        // Sessions that began before the first subscription.
                        None => self.missed(self.may_miss_hand_offs().await),
                    }
                    self.counters.redis_subscriptions.add(1);
                    // Set last, so that whoever reads 1 also finds the gap counted and no stale
                    // entries.
                    self.counters.redis_subscribed.set(1);
                    last_sign = Some(self.read(subscribed).await);
                    self.counters.redis_subscribed.set(0);
                    self.link.suspect();
                    // Only a connection that lasted resets the backoff, as in the link.
                    if since.elapsed() > self.link.config().backoff.max() {
                        attempt = 0;
                    }
                }
                // The link logs why, and a new connection ends the wait.
                Err(_) if !self.link.is_up() => {
                    let delay = self.link.config().backoff.random_delay(attempt);
                    let _ = timeout(delay, self.link.reconnected(generation)).await;
                    attempt = attempt.saturating_add(1);
                    continue;
                }
                Err(why) => {
                    self.link.suspect();
                    if let Some(report) = self.link.outage().failed(Instant::now()) {
                        tracing::warn!(why, "cannot subscribe to Redis, retrying{report}");
                    }
                }
            }
            sleep(self.link.config().backoff.random_delay(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    /// Counts and reports a gap that began after `last_sign`.
    async fn missed_since(&self, last_sign: Instant) {
        let gap_ms = u64::try_from(last_sign.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.counters.redis_subscription_gaps.add(1);
        self.counters.redis_subscription_gap_ms.add(gap_ms);
        let hand_offs = self.may_miss_hand_offs().await;
        if hand_offs && let Some(report) = self.gaps.failed(Instant::now()) {
            tracing::warn!(
                gap_ms,
                "subscribed to Redis again; events published meanwhile are lost, so the sessions of this \
                 node are closed with 4409{report}"
            );
        }
        self.missed(hand_offs);
    }

    /// Whether other nodes may have published hand-offs.
    async fn may_miss_hand_offs(&self) -> bool {
        match &self.config.legacy {
            Some(legacy) => legacy.ask().await,
            None => self.config.hand_offs,
        }
    }

    fn missed(&self, hand_offs: bool) {
        if hand_offs {
            self.sinks.missed.missed_by_all();
        }
        self.sinks.presence.iter().for_each(|sink| sink.missed());
    }

    async fn subscribe(&self) -> Result<Subscribed, String> {
        let generation = self.link.generation();
        let node = cluster::home(&self.link, &self.channel).await;
        let node = node.ok_or("not connected, or no node owns the channel")?;
        self.subscribe_at(Home { node, generation }).await
    }

    async fn subscribe_at(&self, home: Home) -> Result<Subscribed, String> {
        let config = self.link.config();
        let subscribing = subscribe(config, home.node.clone(), self.channels());
        let (sink, messages) = timeout(config.connect_timeout, subscribing)
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|error| reason(&error))?;
        Ok(Subscribed { home, sink, messages })
    }

    fn channels(&self) -> Vec<&str> {
        let mut channels = Vec::new();
        if self.config.hand_offs {
            channels.push(self.channel.as_str());
            channels.push(gaps::CHANNEL);
        }
        if !self.sinks.presence.is_empty() {
            channels.push(PRESENCE_UPDATES);
            channels.push(announcer::CHANNEL);
        }
        channels
    }

    /// Reads until the connection is lost; returns its last sign of life.
    async fn read(self: &Arc<Self>, subscribed: Subscribed) -> Instant {
        let Subscribed { home, sink, mut messages } = subscribed;
        let mut last_sign = Instant::now();
        let (alive, mut signs) = mpsc::channel(1);
        let mut pinging = JoinSet::new();
        pinging.spawn(self.pinger(sink, alive.clone()));
        let mut moving = JoinSet::new();
        moving.spawn(Arc::clone(self).moved_from(home));
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(message) => {
                        last_sign = Instant::now();
                        self.take(&message);
                    }
                    None => return last_sign,
                },
                Some(sign) = signs.recv() => last_sign = sign,
                // The ping task has ended: a ping had no answer.
                Some(_) = pinging.join_next() => return last_sign,
                Some(Ok(Moved { subscribed, heard_until })) = moving.join_next() => {
                    // The old connection is drained after the new subscription: a message in
                    // between may arrive twice, but is not lost.
                    while let Ok(Some(message)) = timeout(Duration::ZERO, messages.next()).await {
                        self.take(&message);
                    }
                    if let Some(heard_until) = heard_until {
                        self.missed_since(heard_until).await;
                    }
                    self.counters.redis_subscriptions.add(1);
                    pinging = JoinSet::new();
                    pinging.spawn(self.pinger(subscribed.sink, alive.clone()));
                    moving.spawn(Arc::clone(self).moved_from(subscribed.home));
                    messages = subscribed.messages;
                }
            }
        }
    }

    /// Waits until the subscription is no longer where it should be, and subscribes there.
    async fn moved_from(self: Arc<Self>, mut home: Home) -> Moved {
        let cluster = matches!(self.link.config().address, RedisAddress::Cluster(_));
        let interval = if cluster { OWNER_CHECK_INTERVAL } else { self.config.ping_interval };
        let mut heard = Instant::now();
        loop {
            let _ = timeout(interval, self.link.reconnected(home.generation)).await;
            let (asked, generation) = (Instant::now(), self.link.generation());
            let (node, heard_until) = match self.position(&home, generation).await {
                None => {
                    // Not known: the link is down, or just lost its connection.
                    sleep(self.link.config().backoff.random_delay(0)).await;
                    continue;
                }
                Some(Position::Right) => {
                    heard = asked;
                    home.generation = generation;
                    continue;
                }
                Some(Position::OtherNode(node)) => (node, None),
                Some(Position::OtherServer(node)) => (node, Some(heard)),
            };
            match self.subscribe_at(Home { node, generation }).await {
                Ok(subscribed) => return Moved { subscribed, heard_until },
                Err(_) => sleep(self.link.config().backoff.max()).await,
            }
        }
    }

    /// `None`: Redis does not say.
    async fn position(&self, home: &Home, generation: u64) -> Option<Position> {
        let node = cluster::home(&self.link, &self.channel).await?;
        let other_address = node.addr() != home.node.addr();
        if matches!(self.link.config().address, RedisAddress::Cluster(_)) {
            let moved = Position::OtherNode(node);
            return Some(if other_address { moved } else { Position::Right });
        }
        let known = !other_address
            && if self.config.hand_offs {
                self.is_known().await?
            } else {
                // Other nodes share all channels, so only the link's connection tells.
                home.generation == generation
            };
        Some(if known { Position::Right } else { Position::OtherServer(node) })
    }

    /// Whether the server that the link uses has a subscriber of this node's channel. A user who
    /// may not ask is believed to be subscribed. `None`: no answer.
    async fn is_known(&self) -> Option<bool> {
        let mut count = cmd("PUBSUB");
        count.arg("NUMSUB").arg(&self.channel);
        match self.link.ask(vec![count]).await.ok()?.pop()? {
            Ok(answer) => {
                let (_, subscribers): (String, u64) =
                    FromRedisValue::from_redis_value(answer).ok()?;
                Some(subscribers > 0)
            }
            Err(error) => error.code().is_some().then_some(true),
        }
    }

    /// Pings until there is no answer.
    fn pinger(
        &self,
        mut sink: PubSubSink,
        alive: mpsc::Sender<Instant>,
    ) -> impl Future<Output = ()> + 'static {
        let every = self.config.ping_interval;
        let patience = self.link.config().response_timeout;
        async move {
            loop {
                sleep(every).await;
                match timeout(patience, sink.ping::<Value>()).await {
                    // A full channel already holds a sign of life.
                    Ok(Ok(_)) => drop(alive.try_send(Instant::now())),
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        }
    }

    fn take(&self, message: &Msg) {
        let payload = message.get_payload_bytes();
        match message.get_channel_name() {
            PRESENCE_UPDATES => {
                self.counters.redis_presence_updates.add(1);
                self.sinks.presence.iter().for_each(|sink| sink.updated(payload));
            }
            announcer::CHANNEL => self.take_moves(payload),
            gaps::CHANNEL => self.take_gap(payload),
            _ => {
                if let Some(legacy) = &self.config.legacy
                    && legacy.is_lease_overdue()
                {
                    // It may come after a gap, which it would hide.
                    legacy.count_overdue();
                    self.sinks.missed.missed_by_all();
                }
                self.handed_over.take(payload);
            }
        }
    }

    fn take_moves(&self, payload: &[u8]) {
        // An unreadable message comes from another version; dropping too many entries is safe.
        let everybody = MovedUsers { users: Vec::new(), everybody: true, origin: 0 };
        let moved = MovedUsers::decode(payload).unwrap_or(everybody);
        self.counters.redis_moves_heard.add(moved.users.len() as u64);
        for sink in &self.sinks.presence {
            if moved.everybody {
                sink.missed();
            }
            moved.users.iter().for_each(|user| sink.moved(user));
            if moved.origin != *announcer::ORIGIN {
                moved.users.iter().for_each(|user| sink.moved_elsewhere(user));
            }
        }
    }

    fn take_gap(&self, payload: &[u8]) {
        // An unreadable message comes from another version; closing too many sessions is safe.
        let everybody = MissedUsers { everybody: true, ..MissedUsers::default() };
        let missed = MissedUsers::decode(payload).unwrap_or(everybody);
        // What this node could not hand over, it has delivered to its own sessions.
        if *missed.instance == *self.config.instance {
            return;
        }
        // What a node with a lease could not publish, the log hands over.
        let legacy = self.config.legacy.as_ref();
        if legacy.is_some_and(|legacy| legacy.has_lease(&missed.instance)) {
            return;
        }
        self.counters.redis_gaps_heard.add(1);
        self.counters.redis_gap_users_heard.add(missed.users.len() as u64);
        if missed.everybody {
            self.counters.redis_gaps_heard_everybody.add(1);
            self.sinks.missed.missed_by_all();
        }
        missed.users.iter().for_each(|user| self.sinks.missed.missed_by_user(user));
    }
}

async fn subscribe(
    config: &RedisConfig,
    node: ConnectionInfo,
    channels: Vec<&str>,
) -> RedisResult<(PubSubSink, PubSubStream)> {
    let mut connection = config.client(node)?.get_async_pubsub().await?;
    connection.subscribe(channels).await?;
    Ok(connection.split())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::backends::redis::LocationsConfig;
    use crate::service::events::proto::presence::v1::PresenceUpdateEvent;

    #[test]
    fn presence_change_invalidates_the_location() {
        let (locations, now) = (Locations::new(LocationsConfig::default()), Instant::now());
        for user in ["alice", "bob"] {
            locations.remember(user.into(), locations.ask(user, now), Arc::from([]));
        }
        let event = PresenceUpdateEvent { user_id: "alice".into(), ..Default::default() };
        locations.updated(&event.encode_to_vec());
        assert!(locations.find("alice", now).is_none());
        assert!(locations.find("bob", now).is_some());
        locations.updated(b"\xff malformed");
        assert!(locations.find("bob", now).is_some());
        locations.missed();
        assert!(locations.find("bob", now).is_none());
    }
}
