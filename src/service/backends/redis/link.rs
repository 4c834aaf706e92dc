//! One shared connection to Redis. A supervisor task reconnects it and probes whether Redis serves.
//!
//! ```text
//!            connected,             the connection broke, or the server
//!            probe answered         is a replica or refuses the login
//!   Down ──────────────────► Connected ────────────────────────────────┐
//!    ▲  backoff with jitter   │ up: the last probe succeeded            │
//!    │                        │ not up: Redis refuses to serve          │
//!    └────────────────────────┴─────────────────────────────────────────┘
//! ```
//!
//! *Down*: every call fails at once. *Connected*: a call waits at most
//! [`RedisConfig::response_timeout`]. Calls are sent also while Redis refuses to serve, because some
//! of them succeed: a full Redis still answers look-ups and passes on what is published. A failed or
//! refused call makes the supervisor probe at once instead of at the next interval. Each new
//! connection resolves the address again. While Redis refuses to serve, another connection is tried
//! with each probe: the address may meanwhile lead to another server, or the credentials may have
//! changed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use redis::{Cmd, ConnectionInfo, ErrorKind, RedisResult, Value};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::address::RedisAddress;
use super::config::RedisConfig;
use super::connection::RedisConnection;
use super::counters::RedisLinkCounters;
use super::probe::{self, Health};
use super::refusal::{RedisRefusal, reason};
use super::sentinel;
use crate::service::backends::outage::Outage;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedisFault {
    /// There is no connection; nothing was sent.
    #[error("Redis is not connected")]
    Down,
    /// No answer in time; the commands may have been executed.
    #[error("Redis did not answer in time")]
    TimedOut,
    /// The connection failed; the commands may have been executed.
    #[error("the connection to Redis failed: {0}")]
    Failed(String),
}

/// What the handles and the supervisor share.
struct LinkState {
    config: RedisConfig,
    counters: Arc<RedisLinkCounters>,
    connection: RwLock<Option<RedisConnection>>,
    /// Whether Redis serves.
    up: AtomicBool,
    /// Counts connections.
    generation: watch::Sender<u64>,
    /// A call failed or was refused: probe now.
    probe_now: Notify,
    /// The last refusal of a command since the last probe.
    refused: Mutex<Option<RedisRefusal>>,
    /// Failures of the link and of the subscriptions, so that an outage is logged once.
    outage: Outage,
}

/// A handle on the shared connection. Dropping the last clone closes it.
#[derive(Clone)]
pub struct RedisLink {
    shared: Arc<LinkState>,
    _supervisor: Arc<JoinSet<()>>,
}

/// Connects in the background, and reconnects until dropped. Needs a tokio runtime.
pub fn connect(config: RedisConfig, counters: Arc<RedisLinkCounters>) -> RedisLink {
    let shared = Arc::new(LinkState {
        config,
        counters,
        connection: RwLock::new(None),
        up: AtomicBool::new(false),
        generation: watch::Sender::new(0),
        probe_now: Notify::new(),
        refused: Mutex::new(None),
        outage: Outage::default(),
    });
    let mut supervisor = JoinSet::new();
    supervisor.spawn(supervise(Arc::clone(&shared)));
    RedisLink { shared, _supervisor: Arc::new(supervisor) }
}

impl RedisLink {
    /// Whether Redis serves: the last probe succeeded.
    pub fn is_up(&self) -> bool {
        self.shared.up.load(Ordering::Acquire)
    }

    /// Whether commands are sent; Redis may refuse them.
    pub fn is_connected(&self) -> bool {
        self.shared.current().is_some()
    }

    /// The settings of the link.
    pub fn config(&self) -> &RedisConfig {
        &self.shared.config
    }

    /// The server that the link uses now; `None`: a cluster, or not connected.
    pub(super) fn node(&self) -> Option<ConnectionInfo> {
        self.shared.current().and_then(|connection| connection.node().cloned())
    }

    /// The number of the current connection. Grows with each.
    pub(super) fn generation(&self) -> u64 {
        *self.shared.generation.borrow()
    }

    /// Waits for a connection after the one of this number.
    pub(super) async fn reconnected(&self, generation: u64) {
        let mut connections = self.shared.generation.subscribe();
        let _ = connections.wait_for(|now| *now != generation).await;
    }

    /// Makes the link probe now: another connection to the same Redis failed.
    pub(super) fn suspect(&self) {
        self.shared.probe_now.notify_one();
    }

    /// The failures of the link and of what uses it.
    pub(super) fn outage(&self) -> &Outage {
        &self.shared.outage
    }

    /// Sends commands together and returns their answers in order; a command's error takes the
    /// place of its answer. Each command names keys of one slot at most. A cluster executes each on
    /// the node of its slot, in no particular order.
    ///
    /// # Errors
    /// Redis is unreachable, or not all answers arrived in time: any of the commands may have been
    /// executed.
    pub async fn run(&self, commands: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, RedisFault> {
        let answers = self.ask(commands).await;
        for error in answers.iter().flatten().filter_map(|answer| answer.as_ref().err()) {
            if let Some(refusal) = RedisRefusal::of(error) {
                refusal.counter(&self.shared.counters).add(1);
                *self.shared.refused.lock().expect("no holder panics") = Some(refusal);
                self.shared.probe_now.notify_one();
            }
        }
        answers
    }

    /// [`RedisLink::run`] for questions about Redis itself. A user may lack the permission for them:
    /// their refusal does not mean that Redis does not serve.
    ///
    /// # Errors
    /// Those of [`RedisLink::run`].
    pub(super) async fn ask(
        &self,
        commands: Vec<Cmd>,
    ) -> Result<Vec<RedisResult<Value>>, RedisFault> {
        let counters = &self.shared.counters;
        let count = commands.len() as u64;
        let Some(connection) = self.shared.current() else {
            counters.redis_commands_refused.add(count);
            return Err(RedisFault::Down);
        };
        counters.redis_commands.add(count);
        let deadline = self.shared.config.response_timeout;
        let answers = match timeout(deadline, connection.run(commands)).await {
            Ok(Ok(answers)) => Ok(answers),
            Ok(Err(error)) if error.is_timeout() => Err(RedisFault::TimedOut),
            Ok(Err(error)) => Err(RedisFault::Failed(reason(&error))),
            Err(_) => Err(RedisFault::TimedOut),
        };
        let broken = match &answers {
            Ok(answers) => answers.iter().filter(|answer| lost(answer)).count() as u64,
            Err(_) => count,
        };
        if broken > 0 {
            counters.redis_commands_failed.add(broken);
            self.shared.probe_now.notify_one();
        }
        answers
    }
}

/// Whether the connection failed, rather than the server answering with an error.
fn lost(answer: &RedisResult<Value>) -> bool {
    answer.as_ref().is_err_and(|error| {
        let no_node = error.kind() == ErrorKind::ClusterConnectionNotFound;
        error.is_io_error() || error.is_timeout() || no_node
    })
}

async fn supervise(shared: Arc<LinkState>) {
    let mut attempt = 0;
    loop {
        match RedisConnection::open(&shared.config).await {
            Ok(connection) => {
                let since = Instant::now();
                let why = shared.watch(connection).await;
                shared.disconnect();
                shared.failed(&why);
                // Only a connection that lasted resets the backoff: a proxy may accept connections
                // for a server that is down.
                if since.elapsed() > shared.config.backoff.max() {
                    attempt = 0;
                }
            }
            Err(error) => {
                shared.counters.redis_connection_failures.add(1);
                if let Some(refusal) = error.refusal {
                    refusal.counter(&shared.counters).add(1);
                }
                shared.failed(&error.why);
            }
        }
        sleep(shared.config.backoff.random_delay(attempt)).await;
        attempt = attempt.saturating_add(1);
    }
}

impl LinkState {
    fn current(&self) -> Option<RedisConnection> {
        self.connection.read().expect("no holder panics").clone()
    }

    /// Probes a new connection and uses it once Redis answers, until it must be replaced; returns
    /// the reason.
    async fn watch(&self, mut connection: RedisConnection) -> String {
        let mut write = true;
        let mut attempt = 0;
        let mut in_use = false;
        loop {
            let health = self.check(&connection, &mut write).await;
            if let Health::Refuses(refusal, _) = &health {
                refusal.counter(&self.counters).add(1);
            }
            match health {
                Health::Lost(why) => return format!("the connection failed: {why}"),
                Health::Refuses(refusal, why) if refusal.needs_another_connection() => return why,
                Health::Serves => {
                    if !std::mem::replace(&mut in_use, true) {
                        self.use_connection(&connection);
                    }
                    self.serves();
                    attempt = 0;
                    // Probe after a failed call and after the interval.
                    let _ = timeout(self.config.probe_interval, self.probe_now.notified()).await;
                }
                Health::Refuses(_, why) | Health::Partial(why) => {
                    if !std::mem::replace(&mut in_use, true) {
                        self.use_connection(&connection);
                    }
                    self.set_up(false);
                    self.failed(&why);
                    sleep(self.config.backoff.random_delay(attempt)).await;
                    attempt = attempt.saturating_add(1);
                    if let Some(other) = self.another().await {
                        self.use_connection(&other);
                        connection = other;
                        write = true;
                    }
                }
            }
        }
    }

    /// Probes the connection, and judges the answers of the calls since the last probe.
    async fn check(&self, connection: &RedisConnection, write: &mut bool) -> Health {
        let refused = self.refused.lock().expect("no holder panics").take();
        let mut health = self.probe(connection, *write).await;
        if *write && matches!(health, Health::Refuses(RedisRefusal::Permission, _)) {
            *write = false;
            health = self.probe(connection, false).await;
        }
        match (health, refused) {
            (Health::Serves, Some(refusal)) => Health::Refuses(refusal, refusal.to_string()),
            (Health::Serves, None) => self.check_primary(connection).await,
            (health, _) => health,
        }
    }

    async fn probe(&self, connection: &RedisConnection, write: bool) -> Health {
        let commands = probe::commands(connection.probe_keys(), write);
        match timeout(self.config.response_timeout, connection.clone().run(commands)).await {
            Ok(Ok(answers)) => probe::judge(&answers),
            Ok(Err(error)) => probe::judge(&[Err(error)]),
            Err(_) => Health::Lost("no answer to a probe".to_owned()),
        }
    }

    /// Whether the Sentinels still name this server. They may have chosen another primary while a
    /// partition keeps the old one from learning it: it still accepts writes.
    async fn check_primary(&self, connection: &RedisConnection) -> Health {
        if let RedisAddress::Sentinel(address) = &self.config.address
            && let Some(node) = connection.node()
            && let Ok(primary) = sentinel::primary(&self.config, address).await
            && primary.addr() != node.addr()
        {
            return Health::Lost("the Sentinels name another primary".to_owned());
        }
        Health::Serves
    }

    /// Another connection, if Redis serves on it. A cluster's client finds new nodes itself.
    async fn another(&self) -> Option<RedisConnection> {
        if matches!(self.config.address, RedisAddress::Cluster(_)) {
            return None;
        }
        let other = RedisConnection::open(&self.config).await.ok()?;
        (self.probe(&other, true).await == Health::Serves).then_some(other)
    }

    fn use_connection(&self, connection: &RedisConnection) {
        *self.connection.write().expect("no holder panics") = Some(connection.clone());
        self.counters.redis_connections.add(1);
        self.generation.send_modify(|generation| *generation += 1);
    }

    fn disconnect(&self) {
        let connection = self.connection.write().expect("no holder panics").take();
        self.set_up(false);
        // Otherwise the connection was never used.
        match connection {
            Some(_) => self.counters.redis_connection_losses.add(1),
            None => self.counters.redis_connection_failures.add(1),
        }
    }

    /// Returns whether it was up.
    fn set_up(&self, up: bool) -> bool {
        self.counters.redis_up.set(u64::from(up));
        self.up.swap(up, Ordering::AcqRel)
    }

    fn serves(&self) {
        if self.set_up(true) {
            return;
        }
        let address = &self.config.address;
        match self.outage.succeeded(Instant::now()) {
            Some(recovery) => tracing::info!(%address, "Redis serves again {recovery}"),
            None if self.counters.redis_connections.get() == 1 => {
                tracing::info!(%address, "connected to Redis");
            }
            // The outage was not logged, so its end is not.
            None => {}
        }
    }

    fn failed(&self, why: &str) {
        if let Some(report) = self.outage.failed(Instant::now()) {
            let address = &self.config.address;
            tracing::warn!(%address, why, "Redis does not serve, retrying{report}");
        }
    }
}
