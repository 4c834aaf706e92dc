//! A node whose Redis answers but does not serve, seen from outside: its metrics page and its log.

use delivery_testkit::admin::Metrics;

#[path = "../redis/sentinel_process.rs"]
#[allow(dead_code, reason = "the tests of the client use the rest")]
mod sentinel_process;
#[path = "../redis/server.rs"]
#[allow(dead_code, reason = "the tests of the client use the rest")]
pub(super) mod server;

use self::sentinel_process::{Sentinel, is_primary, sees_no_failover};
use self::server::{Commands as _, Options, Server};
use super::support::client::Client;
use super::support::node::{Node, NodeBuilder};
use super::support::wait::{SOON, until};

fn node(url: &str) -> Node {
    let node = NodeBuilder::dev()
        .set("REDIS_URL", url)
        .set("PRESENCE_MODE", "redis")
        .set("HANDOFF", "redis")
        .start();
    wait_for(&node, "Redis serves", |metrics| metrics.sum("delivery_redis_up", &[]) == 1.0);
    node
}

fn wait_for(node: &Node, what: &str, reached: impl Fn(&Metrics) -> bool) {
    until(SOON, what, || reached(&node.metrics()).then_some(()));
}

fn lines_with(node: &Node, text: &str) -> usize {
    node.log().lines().filter(|line| line.contains(text)).count()
}

fn is_ready(node: &Node) -> bool {
    node.get("/health/ready").is_some_and(|answer| answer.status == 200)
}

#[test]
fn full_redis_is_visible_in_metrics_and_log_and_the_node_stays_ready() {
    let Some(redis) = Server::start(Options::default()) else { return };
    let node = node(&format!("redis://127.0.0.1:{}", redis.port));
    redis.command("CONFIG SET maxmemory 1");
    wait_for(&node, "two refusals", |metrics| {
        metrics.sum("delivery_redis_up", &[]) == 0.0
            && metrics.sum("delivery_redis_refused_memory_total", &[]) >= 2.0
    });
    assert!(is_ready(&node));
    assert_eq!(lines_with(&node, "Redis does not serve"), 1, "{}", node.log());
    redis.command("CONFIG SET maxmemory 0");
    wait_for(&node, "Redis serves", |metrics| metrics.sum("delivery_redis_up", &[]) == 1.0);
    until(SOON, "the end is logged", || (lines_with(&node, "serves again") == 1).then_some(()));
    assert_eq!(lines_with(&node, "Redis does not serve"), 1, "{}", node.log());
}

/// The client library of a cluster logs several lines for each attempt.
#[test]
fn lines_of_the_client_library_are_limited_too() {
    let options = Options { cluster: true, ..Options::default() };
    let Some(mut redis) = Server::start(options) else { return };
    let node = node(&format!("redis+cluster://127.0.0.1:{}", redis.port));
    redis.kill();
    wait_for(&node, "further lines of the library", |metrics| {
        metrics.sum("delivery_redis_up", &[]) == 0.0
            && metrics.sum("delivery_log_library_lines_limited_total", &[]) >= 3.0
    });
    let log = node.log();
    // At once and after ten seconds at the earliest.
    let shown = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    let library = shown("ClusterConnInner") + shown("to node") + shown("async cluster client");
    let limited = node.metrics().sum("delivery_log_library_lines_limited_total", &[]);
    assert!(library <= 3, "{library} lines, {limited} not logged:\n{log}");
    let _redis = Server::start_on(redis.port, options).expect("the port is free");
    wait_for(&node, "Redis serves", |metrics| metrics.sum("delivery_redis_up", &[]) == 1.0);
}

/// Promise: “A node follows a failover by Sentinel”
#[test]
fn node_ends_up_on_the_new_primary_after_a_failover() {
    let Some(first) = Server::start(Options::default()) else { return };
    let port = first.port.to_string();
    let options = Options { arguments: &["--replicaof", "127.0.0.1", &port], ..Options::default() };
    let second = Server::start(options).expect("redis-server is installed");
    let sentinel = Sentinel::start(&first, "");
    let mut connection = sentinel.ready("");
    let url = format!("redis+sentinel://127.0.0.1:{}/main", sentinel.port);
    let node = NodeBuilder::dev()
        .set("REDIS_URL", url)
        .set("INSTANCE_ID", "n1")
        .set("PRESENCE_MODE", "redis")
        .set("HANDOFF", "redis")
        .start();
    let hears = |server: &Server| -> u64 {
        let mut publish = redis::cmd("PUBLISH");
        publish.arg("delivery:n1").arg("unreadable").query(&mut server.connection()).unwrap()
    };
    until(SOON, "subscribed at the first", || (hears(&first) == 1).then_some(()));

    connection.command("SENTINEL FAILOVER main");
    until(SOON, "promoted", || is_primary(&second).then_some(()));
    until(SOON, "failed over", || sees_no_failover(&mut connection).then_some(()));
    until(SOON, "subscribed at the second", || (hears(&second) == 1).then_some(()));
    wait_for(&node, "Redis serves", |metrics| {
        metrics.sum("delivery_redis_up", &[]) == 1.0
            && metrics.sum("delivery_redis_connections_total", &[]) >= 2.0
    });
    let _alice = Client::session(node.public, "alice", "phone");
    until(SOON, "alice is registered at the second", || {
        let devices: Vec<String> = redis::cmd("SMEMBERS")
            .arg("presence:user:alice:devices")
            .query(&mut second.connection())
            .ok()?;
        (devices == ["phone"]).then_some(())
    });
    assert!(is_ready(&node));
    assert_eq!(lines_with(&node, "Redis does not serve"), 1, "{}", node.log());
}
