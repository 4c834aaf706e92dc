//! A Sentinel process for one test, on a free loopback port.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use delivery_testkit::ports::free_port;
use redis::{RedisResult, Value, cmd};
use tempfile::TempDir;

use super::server::Server;

/// How long to wait for the Sentinel. Reached only when it never happens.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running Sentinel; dropping it kills it.
pub(crate) struct Sentinel {
    child: Child,
    /// Its port on loopback.
    pub(crate) port: u16,
    _folder: TempDir,
}

impl Sentinel {
    /// Monitors `primary` as `main`. `directives`: further lines of its configuration.
    pub(crate) fn start(primary: &Server, directives: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let file = folder.path().join("sentinel.conf");
        let text = format!(
            "bind 127.0.0.1\nport {port}\ndir {}\nsentinel monitor main 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n\
             {directives}\n",
            folder.path().display(),
            primary.port
        );
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new("redis-server");
        command.arg(&file).arg("--sentinel").stdout(Stdio::null()).stdin(Stdio::null());
        Self { child: command.spawn().unwrap(), port, _folder: folder }
    }

    /// A connection, if it accepts one already.
    pub(crate) fn try_connection(&self, password: &str) -> RedisResult<redis::Connection> {
        let user = if password.is_empty() { String::new() } else { format!(":{password}@") };
        redis::Client::open(format!("redis://{user}127.0.0.1:{}", self.port))?.get_connection()
    }

    /// A connection, once it knows a replica that can be promoted.
    pub(crate) fn ready(&self, password: &str) -> redis::Connection {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(mut connection) = self.try_connection(password)
                && let Ok(replicas) = replicas(&mut connection)
                && replicas.contains("master-link-status ok")
            {
                return connection;
            }
            assert!(Instant::now() < deadline, "the Sentinel finds the replica");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the Sentinel knows about the replicas, as words.
fn replicas(connection: &mut redis::Connection) -> RedisResult<String> {
    let answer: Vec<Vec<String>> = cmd("SENTINEL").arg("REPLICAS").arg("main").query(connection)?;
    Ok(answer.concat().join(" "))
}

/// Whether a server, which needs no password, is a primary. A Sentinel that promotes it closes all
/// connections to it, also the one that asks.
pub(crate) fn is_primary(server: &Server) -> bool {
    let role: RedisResult<Vec<Value>> = cmd("ROLE").query(&mut server.connection());
    role.is_ok_and(|role| role[0] == Value::BulkString(b"master".to_vec()))
}

/// Whether the Sentinel has finished the failover.
pub(crate) fn sees_no_failover(connection: &mut redis::Connection) -> bool {
    let answer: Vec<String> = cmd("SENTINEL").arg("MASTER").arg("main").query(connection).unwrap();
    !answer.join(" ").contains("failover_in_progress")
}
