//! The link: every kind of connection, and a Redis that is unreachable.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use delivery::service::backends::redis::{
    RedisAddress, RedisConfig, RedisFault, RedisLink, RedisLinkCounters, connect,
};
use delivery::service::runtime::backoff::Backoff;
use redis::{Value, cmd};
use rustix::process::Signal;

use super::server::{Options, Server};

/// Maximum time a test waits for an event.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `happened`, checking again after each `between`.
pub(crate) async fn until<F: Future>(
    mut happened: impl FnMut() -> bool,
    mut between: impl FnMut() -> F,
) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !happened() {
        assert!(tokio::time::Instant::now() < deadline, "it did not happen in {PATIENCE:?}");
        between().await;
    }
}

pub(crate) fn config(address: &str) -> RedisConfig {
    RedisConfig {
        probe_interval: Duration::from_millis(50),
        response_timeout: Duration::from_millis(200),
        backoff: Backoff::new(Duration::from_millis(5), Duration::from_millis(50)),
        ..RedisConfig::new(RedisAddress::parse(address).unwrap())
    }
}

pub(crate) async fn linked(config: RedisConfig) -> (RedisLink, Arc<RedisLinkCounters>) {
    let counters = Arc::new(RedisLinkCounters::default());
    let link = connect(config, Arc::clone(&counters));
    until(|| link.is_up(), tokio::task::yield_now).await;
    (link, counters)
}

async fn stores_values(link: &RedisLink) {
    let mut commands = Vec::new();
    for n in 0..1_000 {
        let mut set = cmd("SET");
        set.arg(format!("key-{n}")).arg(n);
        commands.push(set);
    }
    link.run(commands).await.unwrap().into_iter().for_each(|answer| drop(answer.unwrap()));
    let commands = (0..1_000)
        .map(|n| {
            let mut get = cmd("GET");
            get.arg(format!("key-{n}"));
            get
        })
        .collect();
    for (n, answer) in link.run(commands).await.unwrap().into_iter().enumerate() {
        assert_eq!(answer.unwrap(), Value::BulkString(n.to_string().into_bytes()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_server_with_password() {
    let options = Options { password: Some("p@ss/word"), ..Options::default() };
    let Some(server) = Server::start(options) else { return };
    let address = format!("redis://:p%40ss%2Fword@127.0.0.1:{}", server.port);
    stores_values(&linked(config(&address)).await.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_with_tls_and_password() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
    let (certificate, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let options = Options {
        password: Some("secret"),
        tls: Some((&certificate, &key, &certificate)),
        ..Options::default()
    };
    let Some(server) = Server::start(options) else { return };

    let address = format!("rediss://default:secret@127.0.0.1:{}", server.port);
    let trusting =
        RedisConfig { root_certificates: Some(made.cert.pem().into_bytes()), ..config(&address) };
    stores_values(&linked(trusting).await.0).await;

    // Without the root certificate the connection fails.
    let counters = Arc::new(RedisLinkCounters::default());
    let link = connect(config(&address), Arc::clone(&counters));
    until(|| counters.redis_connection_failures.get() > 0, tokio::task::yield_now).await;
    assert!(!link.is_up());
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_whose_keys_are_spread_over_slots() {
    let Some(server) = Server::start(Options { cluster: true, ..Options::default() }) else {
        return;
    };
    let address = format!("redis+cluster://127.0.0.1:{}", server.port);
    stores_values(&linked(config(&address)).await.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_command_does_not_affect_the_others() {
    let Some(server) = Server::start(Options::default()) else { return };
    let (link, _) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    let mut wrong = cmd("GET");
    wrong.arg("a").arg("b");
    let answers = link.run(vec![cmd("PING"), wrong, cmd("PING")]).await.unwrap();
    assert_eq!(answers.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
    assert!(link.is_up());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_server_fails_calls_at_once_and_is_reconnected() {
    let Some(mut server) = Server::start(Options::default()) else { return };
    let (link, counters) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    server.kill();
    until(|| !link.is_up(), || link.run(vec![cmd("PING")])).await;
    assert_eq!(link.run(vec![cmd("PING")]).await.unwrap_err(), RedisFault::Down);
    assert!(counters.redis_commands_refused.get() > 0);

    let _server = Server::start_on(server.port, Options::default()).expect("the port is free");
    until(|| link.is_up(), tokio::task::yield_now).await;
    stores_values(&link).await;
    assert_eq!(counters.redis_connections.get(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_server_is_given_up_after_the_deadline() {
    let Some(server) = Server::start(Options::default()) else { return };
    let (link, counters) = linked(config(&format!("127.0.0.1:{}", server.port))).await;
    server.signal(Signal::STOP);
    assert_eq!(link.run(vec![cmd("PING")]).await.unwrap_err(), RedisFault::TimedOut);
    until(|| !link.is_up(), || link.run(vec![cmd("PING")])).await;
    assert_eq!(counters.redis_connection_losses.get(), 1);
    server.signal(Signal::CONT);
    until(|| link.is_up(), tokio::task::yield_now).await;
    stores_values(&link).await;
}
