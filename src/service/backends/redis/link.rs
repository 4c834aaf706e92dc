//! One shared connection to Redis. A supervisor task reconnects it.
//!
//! ```text
//!            connected                    a probe failed,
//!   Down ──────────────────► Up           the connection broke
//!    ▲  backoff with jitter   │ ─────────────────────────────┐
//!    └────────────────────────┴──────────────────────────────┘
//! ```
//!
//! While it is down, every call fails at once. While it is up, a call waits at most
//! [`RedisConfig::response_timeout`]. A failed call makes the supervisor probe at once instead of
//! at the next interval.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, Pipeline, RedisError, RedisResult,
    TlsCertificates, Value,
};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::address::RedisAddress;
use crate::counters;
use crate::service::backends::outage::Outage;
use crate::service::runtime::backoff::Backoff;

/// Commands of one call that are in flight together; bounds the buffers of both sides.
const PIPELINE_COMMANDS_MAX: usize = 512;

/// Settings of a link.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// The server or cluster.
    pub address: RedisAddress,
    /// Trusted roots for `rediss`, PEM; `None`: the public web's.
    pub root_certificates: Option<Vec<u8>>,
    /// Time to establish a connection, handshake included.
    pub connect_timeout: Duration,
    /// Time for all answers to one call.
    pub response_timeout: Duration,
    /// Interval of probes while connected.
    pub probe_interval: Duration,
    /// Delays between attempts to connect.
    pub backoff: Backoff,
}

impl RedisConfig {
    /// Defaults: 1 s to connect, 500 ms for answers, a probe every 5 s, 100 ms to 5 s (plus up to
    /// half of it) between attempts.
    pub fn new(address: RedisAddress) -> Self {
        Self {
            address,
            root_certificates: None,
            connect_timeout: Duration::from_secs(1),
            response_timeout: Duration::from_millis(500),
            probe_interval: Duration::from_secs(5),
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5))
                .with_jitter(1.0, 1.5),
        }
    }

    /// A client for one node with these settings.
    pub(super) fn client(&self, node: ConnectionInfo) -> RedisResult<Client> {
        match (&self.root_certificates, node.addr()) {
            (Some(roots), redis::ConnectionAddr::TcpTls { .. }) => {
                Client::build_with_tls(node, certificates(roots))
            }
            _ => Client::open(node),
        }
    }
}

fn certificates(roots: &[u8]) -> TlsCertificates {
    TlsCertificates { client_tls: None, root_cert: Some(roots.to_vec()) }
}

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

counters! {
    /// Connections and commands of a link.
    pub struct RedisLinkCounters of SharedCounter {
        Gauge redis_up: "1 while commands can be sent to Redis",
        Counter redis_connections: "Connections to Redis established",
        Counter redis_connection_failures: "Attempts to connect to Redis that failed",
        Counter redis_connection_losses: "Established connections to Redis that were lost",
        Counter redis_commands: "Commands sent to Redis",
        Counter redis_commands_failed: "Commands to Redis without an answer: connection lost or timed out",
        Counter redis_commands_refused: "Commands not sent because Redis was unreachable",
    }
}

#[derive(Clone)]
enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// What the handles and the supervisor share.
struct LinkState {
    config: RedisConfig,
    counters: Arc<RedisLinkCounters>,
    connection: RwLock<Option<Connection>>,
    /// A call failed: probe now.
    probe_now: Notify,
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
        probe_now: Notify::new(),
    });
    let mut supervisor = JoinSet::new();
    supervisor.spawn(supervise(Arc::clone(&shared)));
    RedisLink { shared, _supervisor: Arc::new(supervisor) }
}

impl RedisLink {
    /// Whether commands can be sent.
    pub fn is_up(&self) -> bool {
        self.shared.connection.read().expect("no holder panics").is_some()
    }

    /// The settings of the link.
    pub fn config(&self) -> &RedisConfig {
        &self.shared.config
    }

    /// Sends commands together and returns their answers in order; a command's error takes the
    /// place of its answer. Each command names keys of one slot at most. A cluster executes each on
    /// the node of its slot, in no particular order.
    ///
    /// # Errors
    /// Redis is unreachable, or not all answers arrived in time: any of the commands may have been
    /// executed.
    pub async fn run(&self, commands: Vec<Cmd>) -> Result<Vec<RedisResult<Value>>, RedisFault> {
        let counters = &self.shared.counters;
        let count = commands.len() as u64;
        let connection = self.shared.connection.read().expect("no holder panics").clone();
        let Some(connection) = connection else {
            counters.redis_commands_refused.add(count);
            return Err(RedisFault::Down);
        };
        counters.redis_commands.add(count);
        let deadline = self.shared.config.response_timeout;
        let answers = match timeout(deadline, connection.run(commands)).await {
            Ok(Ok(answers)) => Ok(answers),
            Ok(Err(error)) if error.is_timeout() => Err(RedisFault::TimedOut),
            Ok(Err(error)) => Err(RedisFault::Failed(category(&error))),
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
    answer.as_ref().is_err_and(|error| error.is_io_error() || error.is_timeout())
}

/// The kind of an error without the server's message, which may quote a command's arguments.
pub(super) fn category(error: &RedisError) -> String {
    match error.code() {
        Some(code) => code.to_owned(),
        None => error.category().to_owned(),
    }
}

impl Connection {
    async fn run(self, commands: Vec<Cmd>) -> RedisResult<Vec<RedisResult<Value>>> {
        match self {
            Self::Single(connection) => pipelined(connection, commands).await,
            Self::Cluster(connection) => routed(connection, commands).await,
        }
    }

    async fn probe(&self) -> RedisResult<()> {
        let ping = redis::cmd("PING");
        match self {
            Self::Single(connection) => {
                connection.clone().send_packed_command(&ping).await.map(drop)
            }
            // Any node: a cluster that lost one node still serves the other slots.
            Self::Cluster(connection) => {
                let anywhere = RoutingInfo::SingleNode(SingleNodeRoutingInfo::Random);
                connection.clone().route_command(ping, anywhere).await.map(drop)
            }
        }
    }
}

async fn pipelined(
    mut connection: MultiplexedConnection,
    commands: Vec<Cmd>,
) -> RedisResult<Vec<RedisResult<Value>>> {
    let mut answers = Vec::with_capacity(commands.len());
    let mut commands = commands.into_iter().peekable();
    while commands.peek().is_some() {
        let mut pipeline = Pipeline::new();
        for command in commands.by_ref().take(PIPELINE_COMMANDS_MAX) {
            pipeline.add_command(command);
        }
        pipeline.ignore_errors();
        let part: Vec<RedisResult<Value>> = pipeline.query_async(&mut connection).await?;
        answers.extend(part);
    }
    Ok(answers)
}

/// Runs commands concurrently, so that the client batches what goes to one node.
async fn routed(
    connection: ClusterConnection,
    commands: Vec<Cmd>,
) -> RedisResult<Vec<RedisResult<Value>>> {
    let mut answers: Vec<RedisResult<Value>> =
        (0..commands.len()).map(|_| Ok(Value::Nil)).collect();
    let mut running = JoinSet::new();
    for (index, command) in commands.into_iter().enumerate() {
        if running.len() == PIPELINE_COMMANDS_MAX {
            take_answer(&mut running, &mut answers).await?;
        }
        let mut connection = connection.clone();
        running.spawn(async move { (index, command.query_async(&mut connection).await) });
    }
    while !running.is_empty() {
        take_answer(&mut running, &mut answers).await?;
    }
    Ok(answers)
}

/// Takes one answer. An unreachable node fails its own commands only.
async fn take_answer(
    running: &mut JoinSet<(usize, RedisResult<Value>)>,
    answers: &mut [RedisResult<Value>],
) -> RedisResult<()> {
    match running.join_next().await {
        Some(Ok((index, answer))) => {
            answers[index] = answer;
            Ok(())
        }
        Some(Err(_)) => Err((redis::ErrorKind::Client, "a command was cancelled").into()),
        None => Ok(()),
    }
}

async fn supervise(shared: Arc<LinkState>) {
    let mut attempt = 0;
    let outage = Outage::default();
    let address = &shared.config.address;
    loop {
        let opened = timeout(shared.config.connect_timeout, open(&shared.config)).await;
        match opened
            .unwrap_or_else(|_| Err((redis::ErrorKind::Io, "connecting took too long").into()))
        {
            Ok(connection) => {
                let since = Instant::now();
                shared.counters.redis_connections.add(1);
                match outage.succeeded(since) {
                    Some(recovery) => {
                        tracing::info!(%address, "connected to Redis again {recovery}")
                    }
                    None => tracing::info!(%address, "connected to Redis"),
                }
                set(&shared, Some(connection.clone()));
                let why = watch(&shared, &connection).await;
                set(&shared, None);
                shared.counters.redis_connection_losses.add(1);
                if let Some(report) = outage.failed(Instant::now()) {
                    tracing::warn!(%address, why, "connection to Redis lost{report}");
                }
                // Only a connection that lasted resets the backoff: a proxy may accept connections
                // for a server that is down.
                if since.elapsed() > shared.config.backoff.max() {
                    attempt = 0;
                }
            }
            Err(error) => {
                shared.counters.redis_connection_failures.add(1);
                let why = category(&error);
                if let Some(report) = outage.failed(Instant::now()) {
                    tracing::warn!(%address, why, "Redis unreachable, reconnecting{report}");
                }
            }
        }
        sleep(shared.config.backoff.random_delay(attempt)).await;
        attempt = attempt.saturating_add(1);
    }
}

fn set(shared: &LinkState, connection: Option<Connection>) {
    shared.counters.redis_up.set(u64::from(connection.is_some()));
    *shared.connection.write().expect("no holder panics") = connection;
}

/// Probes the connection until it fails; returns the reason.
async fn watch(shared: &LinkState, connection: &Connection) -> String {
    loop {
        // Probe after a failed call and after the interval.
        let _ = timeout(shared.config.probe_interval, shared.probe_now.notified()).await;
        match timeout(shared.config.response_timeout, connection.probe()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return category(&error),
            Err(_) => return "no answer to a probe".to_owned(),
        }
    }
}

async fn open(config: &RedisConfig) -> RedisResult<Connection> {
    match &config.address {
        RedisAddress::Single(node) => {
            let client = config.client((**node).clone())?;
            let settings = AsyncConnectionConfig::new()
                .set_connection_timeout(Some(config.connect_timeout))
                .set_response_timeout(Some(config.response_timeout));
            let connection = client.get_multiplexed_async_connection_with_config(&settings).await?;
            Ok(Connection::Single(connection))
        }
        RedisAddress::Cluster(nodes) => {
            let mut builder = ClusterClient::builder(nodes.clone())
                .connection_timeout(config.connect_timeout)
                .response_timeout(config.response_timeout);
            if let Some(roots) = &config.root_certificates {
                builder = builder.certs(certificates(roots));
            }
            Ok(Connection::Cluster(builder.build()?.get_async_connection().await?))
        }
    }
}
