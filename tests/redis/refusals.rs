//! Redis answers but does not serve. Each state is provoked in a real server: the link notices it by
//! its own probe, counts it, logs it once, and recovers without a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use delivery::service::backends::redis::{RedisConfig, RedisLinkCounters, connect};
use delivery_testkit::ports::free_port;
use redis::{Value, cmd};
use tokio::net::{TcpListener, TcpStream};

use super::link::{config, linked, until};
use super::log::Log;
use super::server::{Commands as _, Options, Server};
use super::subscriptions::listening;

/// Between two looks. The link and the server run meanwhile.
pub(crate) fn look() -> impl Future<Output = ()> {
    tokio::time::sleep(Duration::from_millis(2))
}

fn on(server: &Server) -> RedisConfig {
    config(&format!("127.0.0.1:{}", server.port))
}

/// Redis refuses after `refuse` and serves after `restore`. The node sends no command meanwhile.
async fn is_noticed_and_recovers(
    config: RedisConfig,
    counter: fn(&RedisLinkCounters) -> u64,
    why: &str,
    refuse: impl FnOnce(),
    restore: impl FnOnce(),
) {
    let log = Log::start();
    let (link, counters) = linked(config).await;
    assert_eq!((counters.redis_up.get(), counter(&counters)), (1, 0));
    refuse();
    until(|| counters.redis_up.get() == 0 && counter(&counters) > 0, look).await;
    assert!(!link.is_up());
    // It stays down, and further refusals are counted but not logged.
    until(
        || counter(&counters) >= 4,
        || {
            assert_eq!(counters.redis_up.get(), 0);
            look()
        },
    )
    .await;
    let lines = log.lines_with("Redis does not serve");
    assert_eq!(lines.len(), 1, "{:#?}", log.lines_with(""));
    assert!(lines[0].contains(why) || lines[0].contains("connection"), "{lines:#?}");
    assert!(log.lines_with("serves again").is_empty());

    restore();
    until(|| link.is_up(), look).await;
    assert_eq!(counters.redis_up.get(), 1);
    assert_eq!(log.lines_with("Redis serves again").len(), 1);
    assert_eq!(log.lines_with("Redis does not serve").len(), 1);
    let answers = link.run(vec![redis::Cmd::set("key", "value")]).await.unwrap();
    assert_eq!(answers, [Ok(Value::Okay)]);
}

// Promise: “A Redis that answers but does not serve is noticed within one probe interval”
#[tokio::test]
async fn demoted_primary_whose_connection_stays() {
    let Some(server) = Server::start(Options::default()) else { return };
    let nobody = format!("REPLICAOF 127.0.0.1 {}", free_port());
    let demote = || server.command(&nobody);
    let promote = || server.command("REPLICAOF NO ONE");
    is_noticed_and_recovers(
        on(&server),
        |c| c.redis_refused_replica.get(),
        "READONLY",
        demote,
        promote,
    )
    .await;
}

#[tokio::test]
async fn full_memory_with_noeviction() {
    let Some(server) = Server::start(Options::default()) else { return };
    let fill = || server.command("CONFIG SET maxmemory 1");
    let free = || server.command("CONFIG SET maxmemory 0");
    is_noticed_and_recovers(on(&server), |c| c.redis_refused_memory.get(), "OOM", fill, free).await;
}

#[tokio::test]
async fn snapshot_that_cannot_be_written() {
    let Some(server) = Server::start(Options::default()) else { return };
    let fail = || {
        let save = &["SET", "save", "3600 1"];
        cmd("CONFIG").arg(save).exec(&mut server.connection()).unwrap();
        server.command("SET key value");
        server.remove_folder();
        let mut connection = server.connection();
        connection.command("BGSAVE");
        let failed = || -> bool {
            let info: String = cmd("INFO").arg("persistence").query(&mut connection).unwrap();
            info.contains("rdb_last_bgsave_status:err")
        };
        std::iter::repeat_with(failed).find(|failed| *failed);
    };
    let ignore = || server.command("CONFIG SET stop-writes-on-bgsave-error no");
    is_noticed_and_recovers(on(&server), |c| c.redis_refused_disk.get(), "MISCONF", fail, ignore)
        .await;
}

#[tokio::test]
async fn primary_without_enough_replicas() {
    let Some(server) = Server::start(Options::default()) else { return };
    let demand = || server.command("CONFIG SET min-replicas-to-write 1");
    let relax = || server.command("CONFIG SET min-replicas-to-write 0");
    let counter = |c: &RedisLinkCounters| c.redis_refused_no_replicas.get();
    is_noticed_and_recovers(on(&server), counter, "NOREPLICAS", demand, relax).await;
}

#[tokio::test]
async fn password_that_was_changed() {
    let Some(server) = Server::start(Options::default()) else { return };
    let connection = std::cell::RefCell::new(server.connection());
    let change = || {
        connection.borrow_mut().command("CONFIG SET requirepass secret");
        // Redis closes only the connections of deleted users, so this one is what a restart does.
        connection.borrow_mut().command("CLIENT KILL TYPE normal");
    };
    let restore = || connection.borrow_mut().command("CONFIG SET requirepass \"\"");
    let counter = |c: &RedisLinkCounters| c.redis_refused_credentials.get();
    is_noticed_and_recovers(on(&server), counter, "NOAUTH", change, restore).await;
}

#[tokio::test]
async fn wrong_password() {
    let options = Options { password: Some("right"), ..Options::default() };
    let Some(server) = Server::start(options) else { return };
    let counters = Arc::new(RedisLinkCounters::default());
    let log = Log::start();
    let address = format!("redis://:wrong@127.0.0.1:{}", server.port);
    let link = connect(config(&address), Arc::clone(&counters));
    until(|| counters.redis_refused_credentials.get() >= 4, look).await;
    assert!(!link.is_up() && !link.is_connected());
    let lines = log.lines_with("Redis does not serve");
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains("WRONGPASS") && !lines[0].contains("wrong@"), "{lines:?}");
}

#[tokio::test]
async fn permission_that_was_revoked() {
    let Some(server) = Server::start(Options::default()) else { return };
    let connection = std::cell::RefCell::new(server.connection());
    let revoke = || connection.borrow_mut().command("ACL SETUSER default -set -get");
    let grant = || connection.borrow_mut().command("ACL SETUSER default +@all");
    let counter = |c: &RedisLinkCounters| c.redis_refused_permission.get();
    is_noticed_and_recovers(on(&server), counter, "NOPERM", revoke, grant).await;
}

#[tokio::test]
async fn user_who_may_only_read_is_served_until_a_write_is_refused() {
    let Some(server) = Server::start(Options::default()) else { return };
    server.command("ACL SETUSER reader on >secret ~session:* ~presence:* &* +@read +publish");
    let address = format!("redis://reader:secret@127.0.0.1:{}", server.port);
    let (link, counters) = linked(config(&address)).await;
    assert_eq!(counters.redis_refused_permission.get(), 0);
    let set = || vec![redis::Cmd::set("session:a:b", "n1")];
    let up = Arc::clone(&counters);
    until(|| up.redis_up.get() == 0, || link.run(set())).await;
    assert!(counters.redis_refused_permission.get() > 0);
    until(|| link.is_up(), look).await;
}

#[tokio::test]
async fn too_many_clients() {
    let Some(server) = Server::start(Options::default()) else { return };
    let connection = std::cell::RefCell::new(server.connection());
    let fill = || {
        connection.borrow_mut().command("CONFIG SET maxclients 1");
        connection.borrow_mut().command("CLIENT KILL TYPE normal");
    };
    let free = || connection.borrow_mut().command("CONFIG SET maxclients 100");
    let counter = |c: &RedisLinkCounters| c.redis_refused_clients.get();
    is_noticed_and_recovers(on(&server), counter, "maxclients", fill, free).await;
}

#[tokio::test]
async fn script_that_does_not_end() {
    let Some(server) = Server::start(Options::default()) else { return };
    let mut looping = server.connection();
    let run = || {
        server.command("CONFIG SET busy-reply-threshold 1");
        std::thread::spawn(move || {
            let script = cmd("EVAL").arg("while true do end").arg(0).exec(&mut looping);
            assert!(script.is_err(), "it was killed");
        });
    };
    let kill = || server.command("SCRIPT KILL");
    is_noticed_and_recovers(on(&server), |c| c.redis_refused_busy.get(), "BUSY", run, kill).await;
}

#[tokio::test]
async fn server_that_loads_its_data() {
    let arguments = [
        ["--enable-debug-command", "yes"],
        // Microseconds per key: seconds for all, so that the link sees it on any machine. Redis
        // answers clients after each KiB.
        ["--key-load-delay", "1000"],
        ["--loading-process-events-interval-bytes", "1024"],
    ];
    let options = Options { arguments: arguments.as_flattened(), ..Options::default() };
    let Some(server) = Server::start(options) else { return };
    let mut keys = redis::pipe();
    for key in 0..3_000 {
        keys.set(key, "x".repeat(1_000)).ignore();
    }
    keys.exec(&mut server.connection()).unwrap();
    let mut loading = server.connection();
    let reload = || drop(std::thread::spawn(move || loading.command("DEBUG RELOAD")));
    is_noticed_and_recovers(
        on(&server),
        |c| c.redis_refused_loading.get(),
        "LOADING",
        reload,
        || {},
    )
    .await;
}

#[tokio::test]
async fn cluster_without_an_owner_of_its_slots() {
    let options = Options { cluster: true, ..Options::default() };
    let Some(server) = Server::start(options) else { return };
    let config = config(&format!("redis+cluster://127.0.0.1:{}", server.port));
    let remove = || server.command("CLUSTER DELSLOTSRANGE 0 16383");
    let add = || server.command("CLUSTER ADDSLOTSRANGE 0 16383");
    let counter = |c: &RedisLinkCounters| c.redis_refused_cluster_down.get();
    is_noticed_and_recovers(config, counter, "CLUSTERDOWN", remove, add).await;
}

#[tokio::test]
async fn full_cluster() {
    let options = Options { cluster: true, ..Options::default() };
    let Some(server) = Server::start(options) else { return };
    let config = config(&format!("redis+cluster://127.0.0.1:{}", server.port));
    let fill = || server.command("CONFIG SET maxmemory 1");
    let free = || server.command("CONFIG SET maxmemory 0");
    is_noticed_and_recovers(config, |c| c.redis_refused_memory.get(), "OOM", fill, free).await;
}

#[tokio::test]
async fn proxy_that_accepts_and_never_answers() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept().await.unwrap());
        }
    });
    let log = Log::start();
    let counters = Arc::new(RedisLinkCounters::default());
    let config = RedisConfig { connect_timeout: Duration::from_millis(50), ..config(&address) };
    let link = connect(config, Arc::clone(&counters));
    until(
        || counters.redis_connection_failures.get() >= 3,
        || {
            assert!(!link.is_up());
            look()
        },
    )
    .await;
    assert_eq!(log.lines_with("Redis does not serve").len(), 1);
    held.abort();
}

/// A name that leads to another server after a failover: a proxy of which only new connections get
/// to the new server.
async fn switchable(target: Arc<AtomicU16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let port = target.load(Ordering::Relaxed);
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", port)).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

/// Promise: “The subscription follows the server that the link uses”
#[tokio::test(flavor = "multi_thread")]
async fn link_and_subscription_leave_a_demoted_primary_for_the_new_one() {
    let Some(old) = Server::start(Options::default()) else { return };
    let Some(new) = Server::start(Options::default()) else { return };
    let target = Arc::new(AtomicU16::new(old.port));
    let port = switchable(Arc::clone(&target)).await;
    let (link, counters) = linked(config(&format!("127.0.0.1:{port}"))).await;
    let mut inbox = listening(&link, "n1").await;
    assert_eq!(inbox.gaps(), 0);

    // Both connections to the old primary stay open. It is cut off from the new one.
    target.store(new.port, Ordering::Relaxed);
    old.command(&format!("REPLICAOF 127.0.0.1 {}", free_port()));
    let publish = |value: &str| -> u64 {
        let mut publish = cmd("PUBLISH");
        publish.arg("delivery:n1").arg(value).query(&mut new.connection()).unwrap()
    };
    let mut sent = 0;
    until(|| publish(&sent.to_string()) == 1, look).await;
    sent += 1;
    assert_eq!(inbox.next().await, "0");
    assert_eq!(publish(&sent.to_string()), 1);
    assert_eq!(inbox.next().await, "1");
    until(|| link.is_up() && inbox.gaps() == 1, look).await;
    assert!(counters.redis_refused_replica.get() > 0);
    link.run(vec![redis::Cmd::set("key", "new")]).await.unwrap();
    let value: String = redis::Cmd::get("key").query(&mut new.connection()).unwrap();
    assert_eq!(value, "new");
}
