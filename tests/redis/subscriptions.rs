//! Subscriptions: order, gaps and bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use delivery::domain::ids::SessionAddress;
use delivery::handoff::Pushed;
use delivery::service::backends::ports::{MissedEvents, RouterInbox, RouterInput};
use delivery::service::backends::redis::{
    Locations, PresenceUpdates, RedisLink, Sinks, SubscriptionCounters, Subscriptions,
    SubscriptionsConfig,
};
use delivery::service::events::proto::presence::v1::{PresenceStatus, PresenceUpdateEvent};
use prost::Message as _;
use tokio::sync::mpsc;

use super::link::{config, linked, until};
use super::server::{Options, Server};

struct Router(mpsc::Sender<RouterInput>);

impl RouterInbox for Router {
    fn send(&self, input: RouterInput) -> Pushed<RouterInput> {
        match self.0.try_send(input) {
            Ok(()) => Pushed::Accepted,
            Err(mpsc::error::TrySendError::Full(input)) => Pushed::Full(input),
            Err(mpsc::error::TrySendError::Closed(input)) => Pushed::Closed(input),
        }
    }
}

#[derive(Default)]
struct Presence {
    updated: AtomicU64,
    missed: AtomicU64,
}

impl PresenceUpdates for Presence {
    fn updated(&self, _payload: &[u8]) {
        self.updated.fetch_add(1, Ordering::Relaxed);
    }

    fn missed(&self) {
        self.missed.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts the gaps that concern all sessions.
#[derive(Default)]
struct Gaps(AtomicU64);

impl MissedEvents for Gaps {
    fn missed(&self, _session: SessionAddress) {}

    fn missed_by_user(&self, _user: &str) {}

    fn missed_by_all(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A subscribed instance and what it received.
pub(crate) struct Inbox {
    inputs: mpsc::Receiver<RouterInput>,
    counters: Arc<SubscriptionCounters>,
    presence: Arc<Presence>,
    missed: Arc<Gaps>,
    subscriptions: Subscriptions,
}

impl Inbox {
    /// The next handed-over record.
    pub(crate) async fn next(&mut self) -> String {
        match self.inputs.recv().await.unwrap() {
            RouterInput::Remote { value } => String::from_utf8(value.to_vec()).unwrap(),
            RouterInput::ToUsers { .. } => panic!("not a hand-off"),
        }
    }

    /// Gaps that were counted.
    pub(crate) fn gaps(&self) -> u64 {
        self.counters.redis_subscription_gaps.get()
    }
}

pub(crate) async fn listening(link: &RedisLink, instance: &str) -> Inbox {
    let config = SubscriptionsConfig {
        ping_interval: std::time::Duration::from_millis(50),
        ..SubscriptionsConfig::new(instance.into())
    };
    with(config, link, 8).await
}

async fn with(config: SubscriptionsConfig, link: &RedisLink, router_slots: usize) -> Inbox {
    let (router, inputs) = mpsc::channel(router_slots);
    let presence = Arc::new(Presence::default());
    let counters = Arc::new(SubscriptionCounters::default());
    let missed = Arc::new(Gaps::default());
    let sinks = Sinks {
        router: Arc::new(Router(router)),
        missed: missed.clone(),
        presence: vec![presence.clone()],
    };
    let subscriptions = Subscriptions::start(config, link.clone(), sinks, Arc::clone(&counters));
    until(|| subscriptions.is_up(), tokio::task::yield_now).await;
    // Once for the sessions that began before the first subscription.
    assert_eq!(missed.0.swap(0, Ordering::SeqCst), 1);
    Inbox { inputs, counters, presence, missed, subscriptions }
}

/// Subscriptions that only invalidate cached locations.
pub(crate) async fn invalidating(
    link: &RedisLink,
    instance: &str,
    locations: &Arc<Locations>,
) -> (Subscriptions, Arc<SubscriptionCounters>) {
    let (router, _) = mpsc::channel(1);
    let counters = Arc::new(SubscriptionCounters::default());
    let sinks = Sinks {
        router: Arc::new(Router(router)),
        missed: Arc::new(Gaps::default()),
        presence: vec![locations.clone()],
    };
    let config = SubscriptionsConfig::new(instance.into());
    let subscriptions = Subscriptions::start(config, link.clone(), sinks, Arc::clone(&counters));
    until(|| subscriptions.is_up(), tokio::task::yield_now).await;
    (subscriptions, counters)
}

fn publish(server: &Server, channel: &str, value: &[u8]) -> u64 {
    redis::cmd("PUBLISH").arg(channel).arg(value).query(&mut server.connection()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn gap_is_counted_and_the_subscription_restored() {
    let Some(mut server) = Server::start(Options::default()) else { return };
    let (link, _) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    let mut inbox = listening(&link, "n1").await;
    assert_eq!(publish(&server, "delivery:n1", b"one"), 1);
    assert_eq!(inbox.next().await, "one");
    assert_eq!(inbox.counters.redis_subscription_gaps.get(), 0);

    server.kill();
    until(|| !inbox.subscriptions.is_up(), tokio::task::yield_now).await;
    assert_eq!(inbox.missed.0.load(Ordering::SeqCst), 0, "not before the subscription is back");
    let server = Server::start_on(server.port, Options::default()).expect("the port is free");
    until(|| inbox.subscriptions.is_up(), tokio::task::yield_now).await;
    assert_eq!(inbox.missed.0.load(Ordering::SeqCst), 1);
    assert_eq!(publish(&server, "delivery:n1", b"two"), 1);
    assert_eq!(inbox.next().await, "two");
    assert_eq!(inbox.counters.redis_subscription_gaps.get(), 1);
    assert!(inbox.counters.redis_subscription_gap_ms.get() > 0);
    assert_eq!(inbox.presence.missed.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connection_is_replaced() {
    let Some(server) = Server::start(Options::default()) else { return };
    let (link, _) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    let quick = SubscriptionsConfig {
        ping_interval: std::time::Duration::from_millis(10),
        ..SubscriptionsConfig::new("n1".into())
    };
    let inbox = with(quick, &link, 8).await;
    server.signal(rustix::process::Signal::STOP);
    until(|| !inbox.subscriptions.is_up(), tokio::task::yield_now).await;
    server.signal(rustix::process::Signal::CONT);
    until(|| inbox.subscriptions.is_up(), tokio::task::yield_now).await;
    assert_eq!(inbox.counters.redis_subscription_gaps.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_router_is_waited_for_within_bounds_and_then_all_sessions_have_a_gap() {
    let Some(server) = Server::start(Options::default()) else { return };
    let (link, _) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    let few = SubscriptionsConfig { records_max: 4, ..SubscriptionsConfig::new("n1".into()) };
    let mut inbox = with(few, &link, 1).await;
    for n in 0..20 {
        publish(&server, "delivery:n1", n.to_string().as_bytes());
    }
    // One record is in the router, one on its way, four in the queue; which ones depends on timing.
    // A record is counted on arrival, and a moment later as dropped.
    let counters = Arc::clone(&inbox.counters);
    let all_seen =
        || counters.redis_hand_offs.get() == 20 && counters.redis_hand_offs_dropped.get() >= 14;
    until(all_seen, tokio::task::yield_now).await;
    let dropped = counters.redis_hand_offs_dropped.get();
    assert!(dropped <= 16, "{dropped}");
    assert_eq!(inbox.missed.0.load(Ordering::SeqCst), 0, "not while records wait");
    let mut came = Vec::new();
    for _ in 0..20 - dropped {
        came.push(inbox.next().await.parse::<u64>().unwrap());
    }
    assert!(came.is_sorted(), "{came:?}");
    // The records before the gap were routed; the next one finds no session that missed some.
    until(|| inbox.missed.0.load(Ordering::SeqCst) == 1, tokio::task::yield_now).await;
    publish(&server, "delivery:n1", b"20");
    assert_eq!(inbox.next().await, "20");
    assert_eq!(inbox.missed.0.load(Ordering::SeqCst), 1);
    assert_eq!(counters.redis_hand_off_gaps.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_change_reaches_the_subscribers() {
    let Some(server) = Server::start(Options::default()) else { return };
    let (link, _) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    let inbox = listening(&link, "n1").await;
    let update = PresenceUpdateEvent {
        user_id: "alice".into(),
        status: PresenceStatus::Online.into(),
        occurred_at: 1_700_000_000,
    };
    assert_eq!(publish(&server, "presence:updates", &update.encode_to_vec()), 1);
    until(|| inbox.presence.updated.load(Ordering::Relaxed) == 1, tokio::task::yield_now).await;
    assert_eq!(inbox.counters.redis_hand_offs.get(), 0);
}
