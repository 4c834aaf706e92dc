//! A session that moves: its new node announces it, and events follow it at once.

use std::sync::Arc;

use delivery::service::backends::redis::{Announcer, NodesCounters, RegistryUse};
use delivery::service::members::directory::SessionIds;
use delivery::service::sessions::presence::{
    Presence, PresenceConfig, PresenceCounters, PresenceTarget,
};

use super::link::until;
use super::nodes::Bench;
use super::server::Options;
use super::subscriptions::invalidating;

#[tokio::test(flavor = "multi_thread")]
async fn session_that_moved_gets_its_events_at_its_new_node_at_once() {
    // Cached locations live for an hour here, so only the announcement can invalidate one.
    let Some(mut bench) = Bench::new(Options::default(), |_| {}).await else { return };
    let (_subscriptions, subscribed) =
        invalidating(&bench.link, "here", bench.nodes.locations()).await;
    let (mut old, mut new) = (bench.node("n1").await, bench.node("n2").await);
    bench.register("alice", "phone", "n1");
    bench.handed_over("one", &["alice"]).await;
    assert_eq!(old.next().await, "one");

    let counters = Arc::new(NodesCounters::default());
    let config = PresenceConfig {
        announcer: Some(Announcer::start(
            bench.link.clone(),
            Arc::clone(&counters),
            RegistryUse::always(),
        )),
        ..PresenceConfig::new("n2".into())
    };
    let target = PresenceTarget::Redis(bench.link.clone());
    let presence = Presence::spawn(config, target, Arc::new(PresenceCounters::default()));
    assert!(presence.register(&SessionIds::new("alice", "phone"), false));
    until(|| subscribed.redis_moves_heard.get() > 0, tokio::task::yield_now).await;

    bench.handed_over("two", &["alice"]).await;
    assert_eq!(new.next().await, "two");
    assert_eq!(counters.redis_moves_announced.get(), 1);
    assert_eq!(bench.counters.redis_lookups.get(), 2);
}
