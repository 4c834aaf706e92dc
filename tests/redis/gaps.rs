//! Promise: every session that was live either got every event or was closed with 4409.
//!
//! Two instances exchange numbered events while Redis is disturbed. The sessions are modelled as clients
//! behave: a session that is closed resumes at once, with everything that was published by then.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use delivery::domain::ids::SessionAddress;
use delivery::handoff::Pushed;
use delivery::service::backends::ports::{
    Forwarding, MissedEvents, RemoteNodes, RouterInbox, RouterInput,
};
use delivery::service::backends::redis::{
    Nodes, NodesConfig, NodesCounters, RedisLink, Sinks, SubscriptionCounters, Subscriptions,
    SubscriptionsConfig,
};
use rustix::process::Signal;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::link::{config, linked, until};
use super::server::{Commands as _, Options, Server};

const USERS: [&str; 3] = ["alice", "bob", "carol"];

/// One user's stream of events.
#[derive(Clone, Copy, Debug, Default)]
struct Session {
    /// The next event. Everything before it was received, live or by the catch-up of a resume.
    next: u64,
    /// Events that came although an earlier one was missing: they hide the gap.
    holes: u64,
    closed: u64,
}

/// The sessions on the receiving instance.
#[derive(Default)]
struct Sessions {
    users: Mutex<BTreeMap<String, Session>>,
    /// Events published for each user.
    published: AtomicU64,
}

impl Sessions {
    fn closed(&self) -> u64 {
        self.users.lock().unwrap().values().map(|session| session.closed).sum()
    }

    /// Whether every session has every event.
    fn are_complete(&self) -> bool {
        let published = self.published.load(Ordering::SeqCst);
        self.users.lock().unwrap().values().all(|session| session.next == published)
    }

    fn close(&self, concerns: impl Fn(&str) -> bool) {
        let mut users = self.users.lock().unwrap();
        for (_, session) in users.iter_mut().filter(|(user, _)| concerns(user)) {
            session.closed += 1;
            session.next = self.published.load(Ordering::SeqCst);
        }
    }
}

impl RouterInbox for Sessions {
    fn send(&self, input: RouterInput) -> Pushed<RouterInput> {
        let RouterInput::Remote { value } = input else { panic!("not a hand-off") };
        let text = std::str::from_utf8(&value).unwrap();
        let (user, number) = text.split_once(' ').unwrap();
        let number: u64 = number.parse().unwrap();
        let mut users = self.users.lock().unwrap();
        let session = users.get_mut(user).unwrap();
        if number == session.next {
            session.next += 1;
        } else if number > session.next {
            session.holes += 1;
        }
        Pushed::Accepted
    }
}

impl MissedEvents for Sessions {
    fn missed(&self, _session: SessionAddress) {
        panic!("Redis knows no sessions");
    }

    fn missed_by_user(&self, user: &str) {
        self.close(|known| known == user);
    }

    fn missed_by_all(&self) {
        self.close(|_| true);
    }
}

/// The instance `here`, which hands over, and the instance `n1`, which holds all sessions.
struct Pair {
    server: Server,
    nodes: Nodes,
    sent: Arc<NodesCounters>,
    sessions: Arc<Sessions>,
    received: Arc<SubscriptionCounters>,
    _subscriptions: Subscriptions,
}

impl Pair {
    async fn start(change: impl FnOnce(&mut NodesConfig)) -> Option<Self> {
        let server = Server::start(Options::default())?;
        register(&server);
        let address = format!("127.0.0.1:{}", server.port);
        let (link, _) = linked(config(&address)).await;
        let (other_link, _) = linked(config(&address)).await;
        let sent = Arc::new(NodesCounters::default());
        let mut nodes = NodesConfig::new("here".into());
        // Few answers are cached, so that look-ups fail too.
        nodes.locations.elsewhere_ttl = Duration::from_millis(2);
        change(&mut nodes);
        let nodes = Nodes::new(nodes, link, Arc::clone(&sent));
        let sessions = Arc::new(Sessions::default());
        for user in USERS {
            sessions.users.lock().unwrap().insert(user.to_owned(), Session::default());
        }
        let received = Arc::new(SubscriptionCounters::default());
        let subscriptions = subscribed(&other_link, &sessions, &received).await;
        // The first subscription closes whatever began before it.
        sessions.users.lock().unwrap().values_mut().for_each(|session| session.closed = 0);
        Some(Self { server, nodes, sent, sessions, received, _subscriptions: subscriptions })
    }

    /// Publishes one event for each user.
    async fn publish(&self) {
        let number = self.sessions.published.load(Ordering::SeqCst);
        // The log has them before they are routed.
        self.sessions.published.store(number + 1, Ordering::SeqCst);
        for user in USERS {
            let value = format!("{user} {number}");
            let handed = self.nodes.forward(value.as_bytes(), &[user], Box::new(|| {}));
            assert_ne!(handed, Forwarding::Nobody);
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    }

    /// Publishes until something has happened.
    async fn publish_until(&self, happened: impl FnMut() -> bool) {
        until(happened, || self.publish()).await;
    }

    async fn publish_many(&self, count: usize) {
        for _ in 0..count {
            self.publish().await;
        }
    }

    /// Waits until every session has every event, and checks that no gap was hidden by a later event.
    async fn every_session_got_everything_or_was_closed(&self) {
        until(|| self.sessions.are_complete(), tokio::task::yield_now).await;
        for (user, session) in &*self.sessions.users.lock().unwrap() {
            assert_eq!(session.holes, 0, "{user}: {session:?}");
        }
    }
}

/// Writes the registrations of all users, at `n1`.
fn register(server: &Server) {
    let mut connection = server.connection();
    for user in USERS {
        connection.command(&format!("SET session:{user}:phone n1"));
        connection.command(&format!("SADD presence:user:{user}:devices phone"));
    }
}

async fn subscribed(
    link: &RedisLink,
    sessions: &Arc<Sessions>,
    counters: &Arc<SubscriptionCounters>,
) -> Subscriptions {
    let config = SubscriptionsConfig {
        ping_interval: Duration::from_millis(50),
        ..SubscriptionsConfig::new("n1".into())
    };
    let sinks = Sinks { router: sessions.clone(), missed: sessions.clone(), presence: Vec::new() };
    let subscriptions = Subscriptions::start(config, link.clone(), sinks, Arc::clone(counters));
    until(|| subscriptions.is_up(), tokio::task::yield_now).await;
    subscriptions
}

#[tokio::test(flavor = "multi_thread")]
async fn undisturbed_sessions_get_everything_and_none_is_closed() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    pair.publish_many(500).await;
    pair.every_session_got_everything_or_was_closed().await;
    assert_eq!(pair.sessions.closed(), 0);
    assert_eq!(pair.sent.redis_gaps_told.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_closed_once_after_each_cut_of_the_subscription() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    for cut in 1..=5 {
        pair.publish_many(20).await;
        pair.server.command("CLIENT KILL TYPE pubsub");
        pair.publish_until(|| pair.received.redis_subscription_gaps.get() == cut).await;
        pair.publish_many(20).await;
    }
    pair.every_session_got_everything_or_was_closed().await;
    assert_eq!(pair.sessions.closed(), 5 * USERS.len() as u64);
    assert_eq!(pair.sent.redis_gaps_told.get(), 0, "every publish was answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_whose_hand_off_fails_are_closed_when_redis_is_back() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    pair.publish_many(20).await;
    // Redis answers nobody for longer than a call waits.
    pair.server.signal(Signal::STOP);
    pair.publish_until(|| pair.sent.redis_forwards_failed.get() > 0).await;
    pair.server.signal(Signal::CONT);
    pair.publish_until(|| pair.sent.redis_gaps_told.get() > 0).await;
    pair.publish_many(20).await;
    pair.every_session_got_everything_or_was_closed().await;
    assert!(pair.sessions.closed() > 0);
    assert_eq!(pair.sent.redis_gap_users_untold.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_refused_commands_are_closed() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    // One key cannot be read, so only one user cannot be found.
    pair.publish_many(20).await;
    let mut connection = pair.server.connection();
    connection.command("DEL presence:user:bob:devices");
    connection.command("SET presence:user:bob:devices unreadable");
    pair.publish_until(|| pair.received.redis_gaps_heard.get() > 0).await;
    connection.command("DEL presence:user:bob:devices");
    connection.command("SADD presence:user:bob:devices phone");
    pair.publish_many(50).await;
    pair.every_session_got_everything_or_was_closed().await;
    let users = pair.sessions.users.lock().unwrap();
    assert!(users["bob"].closed > 0);
    assert_eq!((users["alice"].closed, users["carol"].closed), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_of_the_commands_connection_is_no_silent_loss() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    for _ in 0..5 {
        pair.publish_many(20).await;
        pair.server.command("CLIENT KILL TYPE normal SKIPME yes");
        let refused = pair.sent.redis_forwards_refused_down.get();
        let failed = pair.sent.redis_forwards_failed.get();
        pair.publish_until(|| {
            pair.sent.redis_forwards_refused_down.get() > refused
                || pair.sent.redis_forwards_failed.get() > failed
        })
        .await;
        pair.publish_until(|| pair.sent.redis_gap_users_untold.get() == 0).await;
    }
    pair.every_session_got_everything_or_was_closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_queue_is_no_silent_loss() {
    let Some(pair) = Pair::start(|nodes| nodes.records_max = 8).await else { return };
    // Routers wait for room; this test does not.
    pair.publish_many(10).await;
    pair.server.signal(Signal::STOP);
    pair.publish_until(|| pair.sent.redis_forwards_refused_full.get() > 0).await;
    pair.server.signal(Signal::CONT);
    pair.publish_until(|| pair.sent.redis_gaps_told.get() > 0).await;
    pair.publish_many(20).await;
    pair.every_session_got_everything_or_was_closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_redis_still_hands_over() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    pair.publish_many(20).await;
    pair.server.command("CONFIG SET maxmemory-policy noeviction");
    pair.server.command("CONFIG SET maxmemory 1");
    pair.publish_many(100).await;
    pair.every_session_got_everything_or_was_closed().await;
    assert_eq!(pair.sessions.closed(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn event_that_the_router_does_not_offer_is_a_gap() {
    let Some(pair) = Pair::start(|_| {}).await else { return };
    pair.sessions.published.fetch_add(1, Ordering::SeqCst);
    pair.nodes.lost(&USERS);
    pair.every_session_got_everything_or_was_closed().await;
    assert_eq!(pair.sessions.closed(), USERS.len() as u64);
}

/// Forwards connections to a port that can be changed; a change cuts the connections.
async fn switch(first: u16) -> (u16, Arc<AtomicU16>, watch::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let target = Arc::new(AtomicU16::new(first));
    let (changed, _) = watch::channel(());
    let (to, changes) = (Arc::clone(&target), changed.clone());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut cut = changes.subscribe();
            let to = to.load(Ordering::SeqCst);
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    _ = cut.changed() => {}
                }
            });
        }
    });
    (port, target, changed)
}

/// The name of the server leads to the former primary for some time.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_published_at_the_wrong_server_is_told_at_the_right_one() {
    let Some(wrong) = Server::start(Options::default()) else { return };
    let pair = Pair::start(|_| {}).await.expect("redis-server is installed");
    register(&wrong);
    let (port, target, changed) = switch(wrong.port).await;
    let (link, _) = linked(config(&format!("127.0.0.1:{port}"))).await;
    let sent = Arc::new(NodesCounters::default());
    let nodes = Nodes::new(NodesConfig::new("here".into()), link, Arc::clone(&sent));
    pair.sessions.published.fetch_add(1, Ordering::SeqCst);
    for user in USERS {
        let value = format!("{user} 0");
        let handed = nodes.forward(value.as_bytes(), &[user], Box::new(|| {}));
        assert_eq!(handed, Forwarding::Pending);
    }
    until(|| sent.redis_forwards_waiting.get() == 0, tokio::task::yield_now).await;
    assert_eq!((sent.redis_publishes_unheard.get(), sent.redis_gaps_told.get()), (3, 0));

    target.store(pair.server.port, Ordering::SeqCst);
    changed.send(()).unwrap();
    pair.every_session_got_everything_or_was_closed().await;
    assert_eq!(pair.sessions.closed(), USERS.len() as u64);

    // The same server once more: nothing is repeated.
    let told = sent.redis_gaps_told.get();
    changed.send(()).unwrap();
    nodes.lost(&["dave"]);
    until(|| sent.redis_gaps_told.get() > told, tokio::task::yield_now).await;
    assert_eq!(pair.sessions.closed(), USERS.len() as u64);
}
