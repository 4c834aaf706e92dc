//! Presence written directly (`PRESENCE_MODE=redis`): what other services read of it.

use std::sync::Arc;
use std::time::Duration;

use delivery::service::backends::redis::RedisLink;
use delivery::service::events::proto::presence::v1::{PresenceStatus, PresenceUpdateEvent};
use delivery::service::members::directory::SessionIds;
use delivery::service::sessions::presence::{
    Presence, PresenceConfig, PresenceCounters, PresenceTarget,
};
use prost::Message as _;
use redis::{FromRedisValue, Value, cmd};
use tokio_stream::StreamExt as _;

use super::link::{PATIENCE, config, linked, until};
use super::server::{Options, Server};

struct Node {
    presence: Presence,
    counters: Arc<PresenceCounters>,
    link: RedisLink,
}

impl Node {
    async fn new(instance: &str, address: &str) -> Self {
        let (link, _) = linked(config(address)).await;
        let counters = Arc::new(PresenceCounters::default());
        let target = PresenceTarget::Redis(link.clone());
        let config = PresenceConfig::new(instance.into());
        let presence = Presence::spawn(config, target, Arc::clone(&counters));
        Self { presence, counters, link }
    }

    /// Waits until the totals of registrations, refreshes and unregistrations are these.
    async fn counted(&self, registered: u64, refreshed: u64, unregistered: u64) {
        let wanted = (registered, refreshed, unregistered);
        let counters = &self.counters;
        let totals =
            || (counters.registered.get(), counters.refreshed.get(), counters.unregistered.get());
        until(|| totals() == wanted, tokio::task::yield_now).await;
    }

    /// Registers `alice`'s phone, the first registration of this node.
    async fn registers_a_phone(&self) {
        self.presence.register(&ids("alice", "phone"), false);
        self.counted(1, 0, 0).await;
    }

    async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = cmd(words[0]);
        command.arg(&words[1..]);
        let answer = self.link.run(vec![command]).await.unwrap().remove(0).unwrap();
        T::from_redis_value(answer).unwrap()
    }

    async fn holder(&self, user: &str, device: &str) -> Option<String> {
        self.ask(&["GET", &format!("session:{user}:{device}")]).await
    }

    async fn devices(&self, user: &str) -> Vec<String> {
        let mut devices: Vec<String> =
            self.ask(&["SMEMBERS", &format!("presence:user:{user}:devices")]).await;
        devices.sort();
        devices
    }
}

/// A subscriber of `presence:updates`.
struct Listener {
    updates: redis::aio::PubSub,
}

impl Listener {
    async fn new(port: u16) -> Self {
        let client = redis::Client::open(("127.0.0.1", port)).unwrap();
        let mut updates = client.get_async_pubsub().await.unwrap();
        updates.subscribe("presence:updates").await.unwrap();
        Self { updates }
    }

    async fn next(&mut self) -> (String, PresenceStatus) {
        let mut messages = self.updates.on_message();
        let next = tokio::time::timeout(PATIENCE, messages.next()).await;
        let message = next.expect("an update").expect("connected");
        let event = PresenceUpdateEvent::decode(message.get_payload_bytes()).unwrap();
        assert!(event.occurred_at > 1_700_000_000, "Unix seconds");
        (event.user_id.clone(), event.status())
    }
}

fn ids(user: &str, device: &str) -> SessionIds {
    SessionIds::new(user, device)
}

/// One server and a cluster, each with two nodes.
async fn everywhere<F: Future<Output = ()>>(test: impl Fn(u16, Node, Node) -> F) {
    for cluster in [false, true] {
        let Some(server) = Server::start(Options { cluster, ..Options::default() }) else { return };
        let scheme = if cluster { "redis+cluster" } else { "redis" };
        let address = format!("{scheme}://127.0.0.1:{}", server.port);
        let (one, two) = (Node::new("node-1", &address).await, Node::new("node-2", &address).await);
        test(server.port, one, two).await;
    }
}

#[tokio::test]
async fn keys_and_updates_are_those_of_the_contract() {
    everywhere(|port, one, _two| async move {
        let mut updates = Listener::new(port).await;
        one.registers_a_phone().await;
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Online));
        assert_eq!(one.holder("alice", "phone").await.as_deref(), Some("node-1"));
        let lifetime_s: i64 = one.ask(&["TTL", "session:alice:phone"]).await;
        assert!((55..=60).contains(&lifetime_s), "{lifetime_s}");

        one.presence.register(&ids("alice", "desk"), false);
        one.counted(2, 0, 0).await;
        assert_eq!(one.devices("alice").await, ["desk", "phone"]);
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Online));

        one.presence.unregister(&ids("alice", "phone"));
        one.counted(2, 0, 1).await;
        assert_eq!(one.holder("alice", "phone").await, None);
        assert_eq!(one.devices("alice").await, ["desk"]);
        one.presence.unregister(&ids("alice", "desk"));
        one.counted(2, 0, 2).await;
        // The end of the first device was no change of the user's presence.
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Offline));
        assert!(one.devices("alice").await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn refresh_keeps_a_registration_alive_and_makes_a_lost_one_again() {
    everywhere(|_, one, _two| async move {
        one.registers_a_phone().await;
        let _: bool = one.ask(&["EXPIRE", "session:alice:phone", "7"]).await;
        one.presence.refresh(&ids("alice", "phone"), 1);
        one.counted(1, 1, 0).await;
        let lifetime_s: i64 = one.ask(&["TTL", "session:alice:phone"]).await;
        assert!(lifetime_s > 50, "{lifetime_s}");

        let _: Value = one.ask(&["DEL", "session:alice:phone"]).await;
        one.presence.refresh(&ids("alice", "phone"), 1);
        one.counted(2, 1, 0).await;
        assert_eq!(one.holder("alice", "phone").await.as_deref(), Some("node-1"));
        assert_eq!(one.counters.vanished.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn session_that_moved_is_neither_taken_back_nor_unregistered() {
    everywhere(|_, one, two| async move {
        one.registers_a_phone().await;
        two.registers_a_phone().await;

        one.presence.refresh(&ids("alice", "phone"), 1);
        let mut replaced = Vec::new();
        until(
            || {
                replaced.extend(one.presence.take_replaced());
                !replaced.is_empty()
            },
            tokio::task::yield_now,
        )
        .await;
        assert_eq!(replaced, [ids("alice", "phone")]);
        one.presence.unregister(&ids("alice", "phone"));
        one.counted(1, 0, 1).await;
        assert_eq!(two.holder("alice", "phone").await.as_deref(), Some("node-2"));
        assert_eq!(two.devices("alice").await, ["phone"]);
    })
    .await;
}

#[tokio::test]
async fn registration_lost_to_a_failover_is_taken_back_from_the_older_session() {
    everywhere(|_, one, two| async move {
        one.presence.register(&ids("alice", "phone"), false);
        one.counted(1, 0, 0).await;
        let fence = "delivery:fence:{session:alice:phone}";
        let older: Vec<String> = one.ask(&["HGETALL", fence]).await;
        two.presence.register(&ids("alice", "phone"), false);
        two.counted(1, 0, 0).await;
        // The replica that took over has not got the second registration.
        let _: Value = one.ask(&["SET", "session:alice:phone", "node-1", "EX", "60"]).await;
        let _: Value = one.ask(&["DEL", fence]).await;
        let mut restore = vec!["HSET", fence];
        restore.extend(older.iter().map(String::as_str));
        let _: Value = one.ask(&restore).await;

        two.presence.check(&ids("alice", "phone"));
        two.counted(2, 0, 0).await;
        assert_eq!(two.presence.take_replaced(), []);
        assert_eq!(two.holder("alice", "phone").await.as_deref(), Some("node-2"));
        one.presence.check(&ids("alice", "phone"));
        let mut replaced = Vec::new();
        until(
            || {
                replaced.extend(one.presence.take_replaced());
                !replaced.is_empty()
            },
            tokio::task::yield_now,
        )
        .await;
        assert_eq!(two.holder("alice", "phone").await.as_deref(), Some("node-2"));
    })
    .await;
}

#[tokio::test]
async fn session_replaced_on_its_own_node_keeps_the_successor_registered() {
    everywhere(|_, one, two| async move {
        one.presence.register(&ids("alice", "phone"), false);
        one.counted(1, 0, 0).await;
        two.presence.register(&ids("alice", "phone"), false);
        two.counted(1, 0, 0).await;
        // The client comes back to the first node, which has not noticed that it had left.
        one.presence.register(&ids("alice", "phone"), true);
        one.counted(2, 0, 0).await;
        assert_eq!(one.holder("alice", "phone").await.as_deref(), Some("node-1"));
        two.presence.unregister(&ids("alice", "phone"));
        two.counted(1, 0, 1).await;
        assert_eq!(one.holder("alice", "phone").await.as_deref(), Some("node-1"));
        assert_eq!(one.devices("alice").await, ["phone"]);
        one.presence.unregister(&ids("alice", "phone"));
        one.counted(2, 0, 1).await;
        assert_eq!(one.holder("alice", "phone").await, None);
        assert!(one.devices("alice").await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn device_that_a_crashed_node_left_does_not_keep_its_user_online() {
    everywhere(|port, one, _two| async move {
        let mut updates = Listener::new(port).await;
        let _: Value = one.ask(&["SADD", "presence:user:alice:devices", "ghost"]).await;
        one.registers_a_phone().await;
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Online));
        one.presence.unregister(&ids("alice", "phone"));
        one.counted(1, 0, 1).await;
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Offline));
        assert!(one.devices("alice").await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn no_key_outlives_what_renews_it() {
    everywhere(|_, one, _two| async move {
        let set = "presence:user:alice:devices";
        one.registers_a_phone().await;
        let keys: Vec<String> = one.ask(&["KEYS", "*"]).await;
        assert_eq!(keys.len(), 3, "{keys:?}");
        for key in &keys {
            let lifetime_s: i64 = one.ask(&["TTL", key]).await;
            assert!((1..=3_600).contains(&lifetime_s), "{key}: {lifetime_s} s");
        }
        let lifetime_s: i64 = one.ask(&["TTL", set]).await;
        assert!((3_590..=3_600).contains(&lifetime_s), "{lifetime_s}");

        // A check renews it; a refresh in between need not.
        let _: bool = one.ask(&["EXPIRE", set, "700"]).await;
        one.presence.refresh(&ids("alice", "phone"), 1);
        one.counted(1, 1, 0).await;
        assert!(one.ask::<i64>(&["TTL", set]).await <= 700);
        one.presence.refresh(&ids("alice", "phone"), 0);
        one.counted(1, 2, 0).await;
        assert!(one.ask::<i64>(&["TTL", set]).await > 3_000);
    })
    .await;
}

#[tokio::test]
async fn end_after_the_lifetime_leaves_nothing_and_is_published() {
    everywhere(|port, one, _two| async move {
        let mut updates = Listener::new(port).await;
        one.registers_a_phone().await;
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Online));
        let _: Value = one.ask(&["DEL", "session:alice:phone"]).await;
        one.presence.unregister(&ids("alice", "phone"));
        one.counted(1, 0, 1).await;
        assert_eq!(updates.next().await, ("alice".into(), PresenceStatus::Offline));
        // The fence stays for two minutes, so that a late registration of this session is void.
        let keys: Vec<String> = one.ask(&["KEYS", "*"]).await;
        assert_eq!(keys, ["delivery:fence:{session:alice:phone}"]);
        let lifetime_s: i64 = one.ask(&["TTL", &keys[0]]).await;
        assert!((1..=120).contains(&lifetime_s), "{lifetime_s}");
    })
    .await;
}

#[tokio::test]
async fn redis_receives_the_newest_state_after_an_outage() {
    let Some(mut server) = Server::start(Options::default()) else { return };
    let node = Node::new("node-1", &format!("127.0.0.1:{}", server.port)).await;
    server.kill();
    until(|| !node.link.is_up(), tokio::task::yield_now).await;
    for user in 0..1_000 {
        node.presence.register(&ids(&format!("stays-{user}"), "phone"), false);
        node.presence.register(&ids(&format!("goes-{user}"), "phone"), false);
        node.presence.unregister(&ids(&format!("goes-{user}"), "phone"));
    }
    until(|| node.counters.failures.get() > 0, tokio::task::yield_now).await;
    let Some(_server) = Server::start_on(server.port, Options::default()) else {
        panic!("the port was free a moment ago");
    };
    until(
        || node.counters.registered.get() == 1_000,
        || tokio::time::sleep(Duration::from_millis(5)),
    )
    .await;
    assert_eq!(node.holder("stays-7", "phone").await.as_deref(), Some("node-1"));
    let sessions: Vec<String> = node.ask(&["KEYS", "session:*"]).await;
    assert_eq!(sessions.len(), 1_000);
}
