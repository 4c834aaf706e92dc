//! Hand-offs to other nodes: recipients, order, and failures.

use std::sync::Arc;
use std::time::Duration;

use delivery::service::backends::ports::{Forwarding, RemoteNodes};
use delivery::service::backends::redis::{Nodes, NodesConfig, NodesCounters, RedisLink};
use rustix::process::Signal;
use tokio::sync::mpsc;

use super::link::{config, linked, until};
use super::server::{Options, Server};
use super::subscriptions::{Inbox, listening};

/// The node under test is `here`.
pub(crate) struct Bench {
    server: Server,
    pub(crate) link: RedisLink,
    pub(crate) nodes: Nodes,
    pub(crate) counters: Arc<NodesCounters>,
    done: mpsc::UnboundedReceiver<()>,
    tell: mpsc::UnboundedSender<()>,
}

impl Bench {
    pub(crate) async fn new(
        options: Options<'static>,
        change: impl FnOnce(&mut NodesConfig),
    ) -> Option<Self> {
        let server = Server::start(options)?;
        let scheme = if options.cluster { "redis+cluster" } else { "redis" };
        let (link, _) = linked(config(&format!("{scheme}://127.0.0.1:{}", server.port))).await;
        let counters = Arc::new(NodesCounters::default());
        let mut config = NodesConfig::new("here".into());
        config.locations.elsewhere_ttl = Duration::from_secs(3600);
        config.locations.nowhere_ttl = Duration::from_secs(3600);
        change(&mut config);
        let nodes = Nodes::new(config, link.clone(), Arc::clone(&counters));
        let (tell, done) = mpsc::unbounded_channel();
        Some(Self { server, link, nodes, counters, done, tell })
    }

    /// What the presence service does when a session is registered.
    pub(crate) fn register(&self, user: &str, device: &str, instance: &str) {
        let mut connection = self.server.connection();
        redis::cmd("SET")
            .arg(format!("session:{user}:{device}"))
            .arg(instance)
            .exec(&mut connection)
            .unwrap();
        redis::cmd("SADD")
            .arg(format!("presence:user:{user}:devices"))
            .arg(device)
            .exec(&mut connection)
            .unwrap();
    }

    fn forward(&self, value: &str, users: &[&str]) -> Forwarding {
        let tell = self.tell.clone();
        let done = Box::new(move || {
            let _ = tell.send(());
        });
        self.nodes.forward(value.as_bytes(), users, done)
    }

    pub(crate) async fn handed_over(&mut self, value: &str, users: &[&str]) {
        assert_eq!(self.forward(value, users), Forwarding::Pending);
        self.done.recv().await.unwrap();
    }

    pub(crate) async fn node(&self, instance: &str) -> Inbox {
        listening(&self.link, instance).await
    }
}

async fn each_node_receives_one_message(options: Options<'static>) {
    let Some(mut bench) = Bench::new(options, |_| {}).await else { return };
    bench.register("alice", "phone", "here");
    bench.register("alice", "desk", "n1");
    bench.register("bob", "phone", "n1");
    bench.register("bob", "desk", "n2");
    bench.register("carol", "phone", "here");
    let (mut first, mut second) = (bench.node("n1").await, bench.node("n2").await);

    bench.handed_over("one", &["alice", "bob", "carol", "dave"]).await;
    assert_eq!((first.next().await, second.next().await), ("one".into(), "one".into()));
    bench.handed_over("two", &["alice"]).await;
    bench.handed_over("three", &["bob"]).await;
    assert_eq!((first.next().await, second.next().await), ("two".into(), "three".into()));
    assert_eq!(first.next().await, "three");

    // Cached by now: on this node only, or on none.
    assert_eq!(bench.forward("four", &["carol", "dave"]), Forwarding::Nobody);
    assert_eq!(bench.counters.redis_lookups.get(), 4);
    assert_eq!(bench.counters.redis_publishes.get(), 5);
    assert_eq!(bench.counters.redis_publishes_unheard.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_concerned_receives_one_message() {
    each_node_receives_one_message(Options::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_concerned_receives_one_message_through_a_cluster() {
    each_node_receives_one_message(Options { cluster: true, ..Options::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_keep_their_order_and_a_user_is_looked_up_once() {
    let Some(bench) = Bench::new(Options::default(), |_| {}).await else { return };
    bench.register("alice", "phone", "n1");
    let mut node = bench.node("n1").await;
    for n in 0..3_000 {
        assert_eq!(bench.forward(&n.to_string(), &["alice"]), Forwarding::Pending);
    }
    for n in 0..3_000 {
        assert_eq!(node.next().await, n.to_string());
    }
    assert_eq!(bench.counters.redis_lookups.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_conversation_is_looked_up_in_parts() {
    let Some(mut bench) = Bench::new(Options::default(), |_| {}).await else { return };
    bench.register("user-2999", "phone", "n1");
    let mut node = bench.node("n1").await;
    let users: Vec<String> = (0..3_000).map(|n| format!("user-{n}")).collect();
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    bench.handed_over("one", &users).await;
    assert_eq!(node.next().await, "one");
    assert_eq!(bench.counters.redis_lookups.get(), 3_000);
    assert_eq!(bench.nodes.locations().len(), 3_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn publish_without_a_listener_is_counted_and_its_users_are_looked_up_again() {
    let Some(mut bench) = Bench::new(Options::default(), |_| {}).await else { return };
    bench.register("alice", "phone", "n1");
    bench.register("bob", "phone", "n1");
    bench.handed_over("without a listener", &["alice", "bob"]).await;
    // They are still registered at n1, so there is no other node to address.
    assert_eq!(bench.counters.redis_publishes_unheard.get(), 1);
    assert_eq!(bench.counters.redis_publishes_again.get(), 0);

    // Meanwhile alice has moved, so her cached location is stale.
    bench.register("alice", "phone", "n2");
    let mut node = bench.node("n2").await;
    bench.handed_over("one", &["alice", "bob"]).await;
    assert_eq!(node.next().await, "one");
    assert_eq!(bench.counters.redis_publishes_unheard.get(), 2);
    assert_eq!(bench.counters.redis_publishes_again.get(), 1);
    // Her new location is cached now.
    bench.handed_over("two", &["alice"]).await;
    assert_eq!(node.next().await, "two");
    assert_eq!(bench.counters.redis_publishes_unheard.get(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_redis_is_not_waited_for() {
    let Some(mut bench) = Bench::new(Options::default(), |_| {}).await else { return };
    bench.handed_over("one", &["known-to-be-nowhere"]).await;
    bench.server.kill();
    until(|| !bench.link.is_up(), || bench.link.run(vec![redis::cmd("PING")])).await;
    assert_eq!(bench.forward("two", &["alice"]), Forwarding::Refused);
    assert_eq!(bench.counters.redis_forwards_refused_down.get(), 1);
    assert_eq!(bench.forward("three", &["known-to-be-nowhere"]), Forwarding::Nobody);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_hangs_lets_go_of_every_record() {
    let Some(mut bench) = Bench::new(Options::default(), |_| {}).await else { return };
    bench.server.signal(Signal::STOP);
    for n in 0..600 {
        assert_eq!(bench.forward("value", &[&format!("user-{n}")]), Forwarding::Pending);
    }
    for _ in 0..600 {
        bench.done.recv().await.unwrap();
    }
    assert_eq!(bench.counters.redis_forwards_failed.get(), 600);
    until(|| bench.counters.redis_forwards_bytes.get() == 0, tokio::task::yield_now).await;
    assert_eq!(bench.counters.redis_forwards_waiting.get(), 0);
    bench.server.signal(Signal::CONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_bounded_in_number_and_bytes() {
    let few = |config: &mut NodesConfig| (config.records_max, config.bytes_max) = (600, 1_000);
    let Some(mut bench) = Bench::new(Options::default(), few).await else { return };
    bench.server.signal(Signal::STOP);
    let mut pending = 0;
    let large = "x".repeat(300);
    while bench.forward(&large, &["alice"]) == Forwarding::Pending {
        pending += 1;
        assert!(pending <= 3, "1,000 bytes hold three");
    }
    assert_eq!(bench.counters.redis_forwards_refused_full.get(), 1);
    for _ in 0..pending {
        bench.done.recv().await.unwrap();
    }
    bench.server.signal(Signal::CONT);
}
