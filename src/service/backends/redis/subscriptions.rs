//! What other nodes and the presence service publish for this one (contract §4).
//!
//! ```text
//!   connect ─► subscribe ─► read ──────► hand-offs ─► bounded queue ─► router
//!      ▲                     │ │
//!      │  back-off, jitter   │ └───────► presence ──► what changed is forgotten, fan-out
//!      └─── lost, silent ◄───┘
//! ```
//!
//! Redis keeps nothing for a subscriber that is away. What was published meanwhile is lost, and
//! how much it was nobody knows; what is counted is the gaps and their time, from the last sign of
//! life to the new subscription. The reader never waits for anything else than Redis, so that what
//! waits does so in a queue with a bound and not in the client library, which has none.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use redis::aio::{PubSubSink, PubSubStream};
use redis::{ConnectionInfo, Msg, RedisResult, Value};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt as _;

use super::announcer::{self, Moves};
use super::cluster;
use super::link::{RedisConfig, RedisLink, category};
use super::locations::Locations;
use crate::counters;
use crate::handoff::Pushed;
use crate::service::backends::outage::Outage;
use crate::service::backends::ports::{RouterInbox, RouterInput};

/// The channel of the presence service.
const PRESENCE_UPDATES: &str = "presence:updates";
/// Between attempts at a router that is full.
const ROUTER_RETRY: Duration = Duration::from_millis(1);
/// Between looks for who owns the channel's slot, in a cluster.
const OWNER_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Settings of the subscriptions; how to connect is the link's matter.
#[derive(Clone, Debug)]
pub struct SubscriptionsConfig {
    /// This node's instance id: other nodes publish on its channel.
    pub instance: Arc<str>,
    /// Whether other nodes hand records over (`ROUTING_MODE=group`).
    pub hand_offs: bool,
    /// Handed-over records that may wait for the router.
    pub records_max: usize,
    /// Their bytes.
    pub bytes_max: usize,
    /// Between pings on the subscribed connection.
    pub ping_interval: Duration,
}

impl SubscriptionsConfig {
    /// The defaults for an instance: with hand-offs, 8,192 records or 32 MiB, a ping every 5 s.
    pub fn new(instance: Arc<str>) -> Self {
        Self {
            instance,
            hand_offs: true,
            records_max: 8_192,
            bytes_max: 32 << 20,
            ping_interval: Duration::from_secs(5),
        }
    }
}

counters! {
    /// What came through the subscriptions.
    pub struct SubscriptionCounters of SharedCounter {
        Gauge redis_subscribed: "1 while subscribed",
        Counter redis_subscriptions: "Connections on which the subscriptions were made",
        Counter redis_subscription_gaps: "Times without subscription after the first one",
        Counter redis_subscription_gap_ms: "Time without subscription, ms, from the last sign of life; what was published then is lost",
        Counter redis_hand_offs: "Records that other nodes handed over",
        Counter redis_hand_offs_dropped: "Records handed over and dropped because too many waited for the router",
        Gauge redis_hand_offs_waiting: "Records handed over that wait for the router",
        Counter redis_presence_updates: "Changes of presence that were published",
        Counter redis_moves_heard: "Users whom nodes, this one included, said to have registered",
    }
}

/// Takes changes of presence. Must not block, and bounds what it keeps.
pub trait PresenceUpdates: Send + Sync + 'static {
    /// A serialized `PresenceUpdateEvent`.
    fn updated(&self, payload: &[u8]);
    /// Changes may have been missed.
    fn missed(&self);
    /// A node says that it has registered a session of this user (see [`super::Announcer`]).
    fn moved(&self, user: &str) {
        let _ = user;
    }
    /// The same, and it is another node than this one.
    fn moved_elsewhere(&self, user: &str) {
        let _ = user;
    }
}

/// Where what comes goes.
#[derive(Clone)]
pub struct Sinks {
    /// Handed-over records.
    pub router: Arc<dyn RouterInbox>,
    /// Changes of presence, each to all of these.
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

/// The running subscriptions; they end when this is dropped.
pub struct Subscriptions {
    counters: Arc<SubscriptionCounters>,
    _tasks: JoinSet<()>,
}

impl Subscriptions {
    /// Starts to subscribe in the background, and keeps at it. Needs a tokio runtime.
    pub fn start(
        config: SubscriptionsConfig,
        link: RedisLink,
        sinks: Sinks,
        counters: Arc<SubscriptionCounters>,
    ) -> Self {
        let (queue, records) = mpsc::channel(config.records_max);
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        tasks.spawn(pump(
            records,
            Arc::clone(&sinks.router),
            Arc::clone(&waiting_bytes),
            Arc::clone(&counters),
        ));
        let channel = super::channel_of(&config.instance);
        let reader = Arc::new(Reader {
            config,
            link,
            channel,
            sinks,
            queue,
            waiting_bytes,
            counters: Arc::clone(&counters),
        });
        tasks.spawn(reader.run());
        Self { counters, _tasks: tasks }
    }

    /// Whether what is published now will come: for readiness.
    pub fn is_up(&self) -> bool {
        self.counters.redis_subscribed.get() != 0
    }
}

/// Hands records to the router in their order, at its pace.
async fn pump(
    mut records: mpsc::Receiver<Bytes>,
    router: Arc<dyn RouterInbox>,
    waiting_bytes: Arc<AtomicUsize>,
    counters: Arc<SubscriptionCounters>,
) {
    while let Some(value) = records.recv().await {
        let bytes = value.len();
        let mut input = RouterInput::Remote { value };
        loop {
            match router.send(input) {
                Pushed::Accepted => break,
                Pushed::Full(back) => {
                    input = back;
                    sleep(ROUTER_RETRY).await;
                }
                Pushed::Closed(_) => return,
            }
        }
        waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        counters.redis_hand_offs_waiting.sub(1);
    }
}

struct Reader {
    config: SubscriptionsConfig,
    link: RedisLink,
    channel: String,
    sinks: Sinks,
    queue: mpsc::Sender<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
    counters: Arc<SubscriptionCounters>,
}

/// A subscribed connection.
struct Subscribed {
    node: ConnectionInfo,
    sink: PubSubSink,
    messages: PubSubStream,
}

impl Reader {
    async fn run(self: Arc<Self>) {
        let mut attempt = 0;
        let mut last_sign: Option<Instant> = None;
        let outage = Outage::default();
        loop {
            match self.subscribe().await {
                Ok(subscribed) => {
                    attempt = 0;
                    let _ = outage.works(Instant::now());
                    if let Some(last_sign) = last_sign {
                        let gap = last_sign.elapsed();
                        self.counters.redis_subscription_gaps.add(1);
                        let gap_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
                        self.counters.redis_subscription_gap_ms.add(gap_ms);
                        tracing::warn!(
                            gap_ms,
                            "subscribed to Redis again; what was published is lost"
                        );
                    }
                    self.sinks.presence.iter().for_each(|sink| sink.missed());
                    // Up only now: who sees that finds the gap counted and nothing old remembered.
                    self.counters.redis_subscribed.set(1);
                    last_sign = Some(self.read(subscribed).await);
                    self.counters.redis_subscribed.set(0);
                }
                Err(why) => {
                    if let Some(again) = outage.failed(Instant::now()) {
                        tracing::warn!(why, "cannot subscribe to Redis{again}");
                    }
                }
            }
            sleep(self.link.config().backoff.random_delay(attempt)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    async fn subscribe(&self) -> Result<Subscribed, String> {
        let node = cluster::home(&self.link, &self.channel).await;
        self.subscribe_at(node.ok_or("no node owns the channel")?).await
    }

    async fn subscribe_at(&self, node: ConnectionInfo) -> Result<Subscribed, String> {
        let config = self.link.config();
        let subscribing = subscribe(config, node.clone(), self.channels());
        let (sink, messages) = timeout(config.connect_timeout, subscribing)
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|error| category(&error))?;
        self.counters.redis_subscriptions.add(1);
        Ok(Subscribed { node, sink, messages })
    }

    fn channels(&self) -> Vec<&str> {
        let mut channels = Vec::new();
        if self.config.hand_offs {
            channels.push(self.channel.as_str());
        }
        if !self.sinks.presence.is_empty() {
            channels.push(PRESENCE_UPDATES);
            channels.push(announcer::CHANNEL);
        }
        channels
    }

    /// Reads until the connection is lost; returns its last sign of life.
    async fn read(self: &Arc<Self>, subscribed: Subscribed) -> Instant {
        let Subscribed { node, sink, mut messages } = subscribed;
        let mut last_sign = Instant::now();
        let (alive, mut signs) = mpsc::channel(1);
        let mut pinging = JoinSet::new();
        pinging.spawn(self.pinger(sink, alive.clone()));
        let mut moving = JoinSet::new();
        moving.spawn(Arc::clone(self).moved_from(node));
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
                // The only task there is has ended: no answer to a ping.
                Some(_) = pinging.join_next() => return last_sign,
                Some(Ok(moved)) = moving.join_next() => {
                    // The old one is read to its end after the new one has begun: what is published
                    // in between may come twice, but it comes.
                    while let Ok(Some(message)) = timeout(Duration::ZERO, messages.next()).await {
                        self.take(&message);
                    }
                    pinging = JoinSet::new();
                    pinging.spawn(self.pinger(moved.sink, alive.clone()));
                    moving.spawn(Arc::clone(self).moved_from(moved.node));
                    messages = moved.messages;
                }
            }
        }
    }

    /// Waits until the channel has another owner than this node, and subscribes there.
    async fn moved_from(self: Arc<Self>, node: ConnectionInfo) -> Subscribed {
        loop {
            sleep(OWNER_CHECK_INTERVAL).await;
            if let Some(home) = cluster::home(&self.link, &self.channel).await
                && home.addr() != node.addr()
                && let Ok(subscribed) = self.subscribe_at(home).await
            {
                return subscribed;
            }
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
                    // A sign that finds the channel full is one among others.
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
            _ => self.take_record(payload),
        }
    }

    fn take_moves(&self, payload: &[u8]) {
        // What cannot be read is from a node of another time; to forget too much does no harm.
        let everybody = Moves { users: Vec::new(), everybody: true, origin: 0 };
        let moves = Moves::decode(payload).unwrap_or(everybody);
        self.counters.redis_moves_heard.add(moves.users.len() as u64);
        for sink in &self.sinks.presence {
            if moves.everybody {
                sink.missed();
            }
            moves.users.iter().for_each(|user| sink.moved(user));
            if moves.origin != *announcer::ORIGIN {
                moves.users.iter().for_each(|user| sink.moved_elsewhere(user));
            }
        }
    }

    fn take_record(&self, payload: &[u8]) {
        self.counters.redis_hand_offs.add(1);
        let value = Bytes::copy_from_slice(payload);
        let bytes = value.len();
        let waiting = self.waiting_bytes.load(Ordering::Relaxed);
        let fits = waiting == 0 || waiting + bytes <= self.config.bytes_max;
        match self.queue.try_reserve() {
            Ok(place) if fits => {
                self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.counters.redis_hand_offs_waiting.add(1);
                place.send(value);
            }
            Ok(_) | Err(_) => self.counters.redis_hand_offs_dropped.add(1),
        }
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
    fn place_of_a_user_whose_presence_changed_is_unknown() {
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
