//! One connection to a server or a cluster: how it is opened and how commands are sent on it.

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::{Cmd, ConnectionAddr, ConnectionInfo, Pipeline, RedisError, RedisResult, Value};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::address::RedisAddress;
use super::config::{RedisConfig, certificates};
use super::probe::CLUSTER_KEYS;
use super::refusal::{RedisRefusal, reason};
use super::sentinel;

/// Commands of one call that are in flight together; bounds the buffers of both sides.
const PIPELINE_COMMANDS_MAX: usize = 512;
/// Repetitions of a command that a cluster redirects or refuses.
const CLUSTER_RETRIES: u32 = 3;
/// Shortest and longest wait before such a repetition, ms. All of them fit into a call's time for
/// answers, so that the caller learns the cluster's answer instead of a timeout. (The library's
/// shortest wait is 1,280 ms.)
const CLUSTER_RETRY_WAIT_MS: (u64, u64) = (5, 50);

#[derive(Clone)]
pub(super) enum RedisConnection {
    /// A connection to this server.
    Single(MultiplexedConnection, Box<ConnectionInfo>),
    Cluster(ClusterConnection),
}

/// Why a connection could not be opened.
pub(super) struct OpenError {
    /// `None`: there was no answer.
    pub(super) refusal: Option<RedisRefusal>,
    pub(super) why: String,
}

impl From<&RedisError> for OpenError {
    fn from(error: &RedisError) -> Self {
        Self { refusal: RedisRefusal::of(error), why: reason(error) }
    }
}

impl RedisConnection {
    /// Resolves the address and connects: asks the Sentinels, then the name service.
    pub(super) async fn open(config: &RedisConfig) -> Result<Self, OpenError> {
        let node = match &config.address {
            RedisAddress::Single(node) => (**node).clone(),
            RedisAddress::Sentinel(address) => sentinel::primary(config, address)
                .await
                .map_err(|why| OpenError { refusal: None, why })?,
            RedisAddress::Cluster(nodes) => {
                return match timeout(config.connect_timeout, open_cluster(config, nodes)).await {
                    Ok(opened) => opened.map_err(|error| OpenError::from(&error)),
                    Err(_) => Err(too_long()),
                };
            }
        };
        match timeout(config.connect_timeout, open_single(config, node.clone())).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => {
                Err(unsolicited(config, &node).await.unwrap_or_else(|| (&error).into()))
            }
            Err(_) => Err(too_long()),
        }
    }

    /// The server; `None`: a cluster.
    pub(super) fn node(&self) -> Option<&ConnectionInfo> {
        match self {
            Self::Single(_, node) => Some(node),
            Self::Cluster(_) => None,
        }
    }

    /// Keys of a probe.
    pub(super) fn probe_keys(&self) -> usize {
        match self {
            Self::Single(..) => 1,
            Self::Cluster(_) => CLUSTER_KEYS,
        }
    }

    pub(super) async fn run(self, commands: Vec<Cmd>) -> RedisResult<Vec<RedisResult<Value>>> {
        match self {
            Self::Single(connection, _) => pipelined(connection, commands).await,
            Self::Cluster(connection) => routed(connection, commands).await,
        }
    }
}

fn too_long() -> OpenError {
    OpenError { refusal: None, why: "connecting took too long".to_owned() }
}

async fn open_single(config: &RedisConfig, node: ConnectionInfo) -> RedisResult<RedisConnection> {
    let client = config.client(node.clone())?;
    let settings = config.connection_settings();
    let connection = client.get_multiplexed_async_connection_with_config(&settings).await?;
    Ok(RedisConnection::Single(connection, Box::new(node)))
}

async fn open_cluster(
    config: &RedisConfig,
    nodes: &[ConnectionInfo],
) -> RedisResult<RedisConnection> {
    let mut builder = ClusterClient::builder(nodes.to_vec())
        .connection_timeout(config.connect_timeout)
        .response_timeout(config.response_timeout)
        .retries(CLUSTER_RETRIES)
        .min_retry_wait(CLUSTER_RETRY_WAIT_MS.0)
        .max_retry_wait(CLUSTER_RETRY_WAIT_MS.1);
    if let Some(roots) = &config.root_certificates {
        builder = builder.certs(certificates(roots));
    }
    Ok(RedisConnection::Cluster(builder.build()?.get_async_connection().await?))
}

/// What a server says before it closes a new connection: that it has too many clients, or that it
/// is in protected mode. The client library drops an answer that it did not ask for.
async fn unsolicited(config: &RedisConfig, node: &ConnectionInfo) -> Option<OpenError> {
    let ConnectionAddr::Tcp(host, port) = node.addr() else { return None };
    let read = async {
        let mut stream = TcpStream::connect((host.as_str(), *port)).await.ok()?;
        let mut line = Vec::with_capacity(256);
        (&mut stream).take(256).read_to_end(&mut line).await.ok()?;
        redis::parse_redis_value(&line).ok()?.extract_error().err()
    };
    let error = timeout(config.response_timeout, read).await.ok()??;
    Some((&error).into())
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
