//! Nodes without hand-off through the log: how they are noticed, and who is left out.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use delivery::service::backends::ports::{Forwarding, LogNodes, RemoteNodes};
use delivery::service::backends::redis::{
    LegacyConfig, LegacyCounters, LegacyNodes, NodesCounters,
};
use tokio::sync::oneshot;

use super::link::until;
use super::nodes::Bench;
use super::server::Options;

/// The leases of other nodes; this one has its own.
#[derive(Default)]
struct Leases(Mutex<HashSet<String>>);

impl Leases {
    fn add(&self, instance: &str) {
        self.0.lock().unwrap().insert(instance.to_owned());
    }
}

impl LogNodes for Leases {
    fn has_lease(&self, instance: &str) -> bool {
        self.0.lock().unwrap().contains(instance)
    }

    fn own_renewals(&self) -> Option<u64> {
        Some(1)
    }
}

struct World {
    bench: Bench,
    leases: Arc<Leases>,
    legacy: LegacyNodes,
    counters: Arc<LegacyCounters>,
    sent: Arc<NodesCounters>,
}

impl World {
    async fn new(options: Options<'static>) -> Option<Self> {
        let bench = Bench::new(options, |_| {}).await?;
        let (counters, sent) = (Arc::<LegacyCounters>::default(), Arc::default());
        let leases = Arc::<Leases>::default();
        let config = LegacyConfig {
            instance: "here".into(),
            always: false,
            is_registered: true,
            lease_overdue_after: Duration::from_secs(3600),
        };
        let legacy = LegacyNodes::start(
            config,
            bench.link.clone(),
            Arc::clone(&leases) as _,
            Arc::clone(&counters),
            Arc::clone(&sent),
        );
        Some(Self { bench, leases, legacy, counters, sent })
    }

    async fn handed_over(&self, value: &str, users: &[&str]) {
        let (done, ended) = oneshot::channel();
        let done = Box::new(move || done.send(()).expect("somebody waits"));
        assert_eq!(self.legacy.forward(value.as_bytes(), users, done), Forwarding::Pending);
        ended.await.unwrap();
    }
}

fn a_moment() -> tokio::time::Sleep {
    tokio::time::sleep(Duration::from_millis(10))
}

async fn instance_without_a_lease_is_noticed(options: Options<'static>) {
    let Some(world) = World::new(options).await else { return };
    let _own = world.bench.node("here").await;
    world.leases.add("n1");
    let _leased = world.bench.node("n1").await;
    until(|| !world.legacy.may_exist(), a_moment).await;
    assert_eq!(world.counters.legacy_nodes.get(), 0);
    let other = world.bench.node("n2").await;
    until(|| world.legacy.may_exist(), a_moment).await;
    assert_eq!(world.counters.legacy_nodes.get(), 1);
    drop(other);
    until(|| world.counters.legacy_nodes.get() == 0, a_moment).await;
    assert!(world.legacy.may_exist(), "it may come back");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribed_instance_without_a_lease_is_noticed() {
    instance_without_a_lease_is_noticed(Options::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribed_instance_without_a_lease_is_noticed_in_a_cluster() {
    instance_without_a_lease_is_noticed(Options { cluster: true, ..Options::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_with_a_lease_gets_nothing_through_redis() {
    let Some(world) = World::new(Options::default()).await else { return };
    world.leases.add("n1");
    // Alice has a device on a node of each kind.
    world.bench.register("alice", "phone", "n1");
    world.bench.register("alice", "desk", "n2");
    world.bench.register("bob", "phone", "n1");
    let mut legacy = world.bench.node("n2").await;
    world.handed_over("one", &["alice"]).await;
    world.handed_over("two", &["bob"]).await;
    world.handed_over("three", &["alice", "bob"]).await;
    assert_eq!((legacy.next().await, legacy.next().await), ("one".into(), "three".into()));
    assert_eq!(world.sent.redis_publishes.get(), 2);
    assert_eq!(world.sent.redis_publishes_unheard.get(), 0);
}
