//! A real Sentinel that names the primary.

use delivery_testkit::ports::free_port;
use redis::{Cmd, Value, cmd};

use super::link::{config, linked, until};
use super::log::Log;
use super::refusals::look;
use super::sentinel_process::{Sentinel, is_primary, sees_no_failover};
use super::server::{Commands as _, Options, Server};
use super::subscriptions::listening;

/// Returns the number of subscribers; 0 if the connection was closed meanwhile.
fn publish(mut connection: redis::Connection, value: &str) -> u64 {
    cmd("PUBLISH").arg("delivery:n1").arg(value).query(&mut connection).unwrap_or(0)
}

/// Promise: “A node follows a failover by Sentinel”
#[tokio::test]
async fn node_follows_a_failover() {
    let Some(first) = Server::start(Options::default()) else { return };
    let port = first.port.to_string();
    let options = Options { arguments: &["--replicaof", "127.0.0.1", &port], ..Options::default() };
    let second = Server::start(options).unwrap();
    let sentinel = Sentinel::start(&first, "");
    let mut connection = sentinel.ready("");

    let log = Log::start();
    // Two of these Sentinels do not exist: the answers of the rest count.
    let nobody = free_port();
    let address =
        format!("redis+sentinel://127.0.0.1:{nobody},127.0.0.1:{},127.0.0.1:1/main", sentinel.port);
    let (link, counters) = linked(config(&address)).await;
    let mut inbox = listening(&link, "n1").await;
    assert_eq!(publish(first.connection(), "before"), 1);
    assert_eq!(inbox.next().await, "before");

    connection.command("SENTINEL FAILOVER main");
    // The Sentinel closes the clients' connections to the new primary once.
    until(|| is_primary(&second), look).await;
    until(|| sees_no_failover(&mut connection), look).await;
    until(|| publish(second.connection(), "after") == 1, look).await;
    while inbox.next().await != "after" {}
    until(|| link.is_up() && counters.redis_connections.get() >= 2, look).await;
    assert_eq!(link.run(vec![Cmd::set("key", "new")]).await.unwrap(), [Ok(Value::Okay)]);
    let value: String = Cmd::get("key").query(&mut second.connection()).unwrap();
    assert_eq!(value, "new");
    assert_eq!(log.lines_with("Redis does not serve").len(), 1);
}

/// Promise: “An old primary that still accepts writes is left when the Sentinels name another”
#[tokio::test]
async fn old_primary_that_still_accepts_writes_is_left() {
    let options = Options { password: Some("server"), ..Options::default() };
    let Some(old) = Server::start(options) else { return };
    let new = Server::start(options).unwrap();
    let sentinel = Sentinel::start(
        &old,
        "sentinel auth-pass main server\nrequirepass watcher\nsentinel sentinel-pass watcher",
    );
    until(|| sentinel.try_connection("watcher").is_ok(), look).await;
    let mut connection = sentinel.try_connection("watcher").unwrap();
    let address = format!(
        "redis+sentinel://:server@127.0.0.1:{}/main?sentinel_password=watcher",
        sentinel.port
    );
    let (link, _) = linked(config(&address)).await;
    let inbox = listening(&link, "n1").await;

    // As a node sees it that a partition left with the old primary: nobody demotes that one.
    connection.command("SENTINEL REMOVE main");
    connection.command(&format!("SENTINEL MONITOR main 127.0.0.1 {} 1", new.port));
    let on = |port: u16| {
        redis::Client::open(format!("redis://:server@127.0.0.1:{port}"))
            .unwrap()
            .get_connection()
            .unwrap()
    };
    until(|| publish(on(new.port), "after") == 1, look).await;
    until(|| link.is_up() && inbox.gaps() == 1, look).await;
    assert_eq!(publish(on(old.port), "nobody"), 0);
}

#[tokio::test]
async fn name_that_the_sentinels_do_not_know_is_explained() {
    let Some(first) = Server::start(Options::default()) else { return };
    let sentinel = Sentinel::start(&first, "");
    until(|| sentinel.try_connection("").is_ok(), look).await;
    let log = Log::start();
    let address = format!("redis+sentinel://127.0.0.1:{}/mian", sentinel.port);
    let counters = std::sync::Arc::default();
    let link = delivery::service::backends::redis::connect(config(&address), counters);
    until(|| !log.lines_with("does not monitor a primary of the name mian").is_empty(), look).await;
    assert!(!link.is_connected());
}
