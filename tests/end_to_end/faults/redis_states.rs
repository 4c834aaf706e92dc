//! States in which Redis answers, or keeps its connections, but does not serve.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::scene::Scene;

/// Between two rounds of killed connections: longer than a node waits before it connects again.
const KILL_EVERY: Duration = Duration::from_millis(500);

fn command(address: SocketAddr, words: &[&str]) {
    let client = redis::Client::open(format!("redis://{address}")).expect("an address");
    let mut connection = client.get_connection().expect("Redis answers");
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    let answer: redis::Value = command.query(&mut connection).expect("Redis does it");
    drop(answer);
}

/// Kills all connections of clients, again and again for this long.
pub(super) fn kills_connections(scene: &mut Scene, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        for kind in ["normal", "pubsub"] {
            command(scene.redis.address, &["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]);
        }
        scene.run(KILL_EVERY);
    }
}

/// Refuses every write for this long, because its memory is used up (`noeviction`).
pub(super) fn is_full(scene: &mut Scene, time: Duration) {
    command(scene.redis.address, &["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    command(scene.redis.address, &["CONFIG", "SET", "maxmemory", "1"]);
    scene.run(time);
    command(scene.redis.address, &["CONFIG", "SET", "maxmemory", "0"]);
}

/// Is a replica for this long, as after a failover. Its clients stay connected, and writes are refused.
pub(super) fn is_demoted(scene: &mut Scene, time: Duration) {
    // Nobody listens there: the primary is somewhere else, and this node never becomes in sync.
    command(scene.redis.address, &["REPLICAOF", "127.0.0.1", "1"]);
    scene.run(time);
    command(scene.redis.address, &["REPLICAOF", "NO", "ONE"]);
}
