//! One node, from start to exit. Starts all parts in the order of their dependencies and stops them in
//! reverse order.

mod admin_socket;
mod back_ends;
mod cluster;
mod deadlines;
mod followed_files;
mod memory;
mod mesh;
mod metrics;
mod other_nodes;
mod ports;
mod prepared;
mod process;
mod routing;
mod shards;
mod signals;
mod sizing;
mod streams;
mod tls;
mod tokens;

use std::fmt;
use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, timeout_at};

use self::back_ends::BackEnds;
use self::cluster::{Cluster, RunningCluster};
use self::deadlines::Deadlines;
use self::memory::MemoryBudget;
use self::mesh::{Mesh, PeerSide};
use self::other_nodes::{OtherNodesListener, OwnSessions};
use self::ports::Ports;
pub use self::prepared::Prepared;
use self::routing::{Routing, kafka_config};
use self::shards::{ShardTls, Shards, connection_limits, shard_config};
use self::signals::Signals;
use self::sizing::Sizing;
use self::streams::Streams;
use super::admin::{
    self, Admin, AdminCounters, Collector, DrainSwitch, NotCancelled, Operated, RequestMetrics,
};
use super::config::{AuthMode, Settings};
use super::telemetry::{self, LogSink};
use crate::domain::capacity::Capacity;
use crate::domain::counted::Counted;
use crate::domain::limiter::ConnectionLimiter;
use crate::service::backends::ports::MissedEvents;
use crate::service::cluster::missed::MissedSessions;
use crate::service::members::directory::Directory;
use crate::service::sessions::auth::Authenticator;
use crate::service::sessions::manager::{
    SessionConfig, SessionCounters, SessionHandle, SessionManager, SessionPorts, Shutdown,
};

/// The input of [`run`].
pub struct Plan {
    /// All settings.
    pub settings: Settings,
    /// Made from these settings.
    pub prepared: Prepared,
    /// The address to listen on if a setting gives a port only.
    pub ip: IpAddr,
    /// Creates the page served at `/try`.
    pub try_page: Option<fn(&Addresses) -> String>,
}

/// The addresses that a node listens on. A port 0 in the settings is replaced by the actual port.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The public port.
    pub websocket: SocketAddr,
    /// The admin port.
    pub admin: SocketAddr,
    /// The gRPC port; `None`: gRPC is off.
    pub grpc: Option<SocketAddr>,
    /// The public port and the gRPC port speak TLS.
    pub is_secure: bool,
}

/// Interval at which readiness is checked until the node is ready.
const READY_INTERVAL: Duration = Duration::from_millis(50);
/// Time for the remaining tasks to end. Only calls to other services remain. Less if a node that
/// stops has less time left.
const TASKS_END_MAX: Duration = Duration::from_secs(1);

/// Runs a node until it is stopped. Calls `on_ready` once, when the node is ready for the first time.
///
/// # Errors
/// A part could not be started or has failed. The text says which, and what to do.
pub fn run(plan: Plan, on_ready: impl FnOnce(&Addresses)) -> Result<(), String> {
    let log = telemetry::start(&plan.settings)?;
    plan.prepared.signals.log_to(log.clone());
    let sizing = plan.prepared.sizing;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(sizing.service_threads)
        .thread_name("service")
        .enable_all()
        .build()
        .map_err(|error| format!("the service threads did not start: {error}"))?;
    let (outcome, exit) = match runtime.block_on(run_node(plan, &log, on_ready)) {
        Ok(Stopped { outcome, exit }) => (outcome, Some(exit)),
        Err(error) => (Err(error), None),
    };
    let exit = exit.unwrap_or_else(|| Instant::now() + TASKS_END_MAX);
    let left = || exit.saturating_duration_since(Instant::now());
    // Both are usually done at once. Half of the time is for each.
    runtime.shutdown_timeout((left() / 2).min(TASKS_END_MAX));
    log.flush_within(left());
    outcome
}

/// The end of a node that was started.
struct Stopped {
    outcome: Result<(), String>,
    /// When the process exits at the latest.
    exit: Instant,
}

/// The running parts, which must be stopped in order.
struct Node {
    settings: Settings,
    shards: Shards,
    streams: Option<Streams>,
    sessions: SessionHandle,
    auth: Arc<Authenticator>,
    routing: Routing,
    from_other_nodes: Option<OtherNodesListener>,
    cluster: Option<RunningCluster>,
    name: Arc<str>,
}

async fn run_node(
    plan: Plan,
    log: &LogSink,
    on_ready: impl FnOnce(&Addresses),
) -> Result<Stopped, String> {
    let Prepared { sizing, mut signals } = plan.prepared;
    let mut ports = Ports::bind(&plan.settings, plan.ip).await?;
    let addresses = ports.addresses;
    let (admin_socket, _socket_file) = ports.admin_socket.take().unzip();
    let connections = Arc::new(AdminCounters::default());
    let tokens = tokens::operators(&plan.settings, &connections, signals.read_again())?;
    let drain = Arc::new(DrainSwitch::default());
    let (node, admin_listener, mut collectors) =
        start(plan.settings, &sizing, ports, log, drain.subscribe(), signals.read_again())?;

    let mut checks = vec![node.routing.check(), tokens::check(Arc::clone(&node.auth))];
    checks.extend(node.from_other_nodes.as_ref().map(OtherNodesListener::check));
    checks.extend(node.cluster.as_ref().map(RunningCluster::check));
    collectors.push(metrics::component("admin_", Arc::clone(&connections)));
    let admin = Arc::new(Admin {
        service: node.settings.service_name.to_string(),
        checks,
        collectors: node.settings.metrics_enabled.then_some(collectors),
        drain: Arc::clone(&drain),
        try_page: plan.try_page.map(|page| page(&addresses)),
        requests: RequestMetrics::default(),
        connections,
        tokens,
        operated: Operated {
            node: Arc::clone(&node.name),
            sessions: node.sessions.clone(),
            has_tokens: node.settings.auth_mode == AuthMode::Jwt,
        },
    });
    let serving = admin::serve(admin_listener, admin_socket, Arc::clone(&admin));
    let admin_task = tokio::spawn(serving);
    tracing::info!("WebSocket on {}, admin on {}", addresses.websocket, addresses.admin);
    if let Some(path) = &node.settings.admin_socket {
        tracing::info!("admin also on {}", path.display());
    }

    let ready = ready_once(&admin, || on_ready(&addresses));
    tokio::pin!(ready);
    let outcome = loop {
        let requested = tokio::select! {
            request = stop_requested(&mut signals, drain.subscribe()) => Ok(request),
            failure = node.failure() => Err(failure),
            () = &mut ready => unreachable!("it never returns"),
        };
        signals.node_ends(true);
        let served_on = match requested {
            Ok(request) => node.serve_on(&request, &drain, &mut signals).await,
            Err(failure) => Err(failure),
        };
        match served_on {
            Ok(DelayEnd::Over) => break Ok(()),
            Ok(DelayEnd::DrainCancelled) => signals.node_ends(false),
            Err(failure) => break Err(failure),
        }
    };
    // Readiness turns off before the first session is closed.
    drain.stop(NotCancelled::SessionsClosing);
    let Stopped { outcome: ended, exit } = node.stop().await;
    admin_task.abort();
    tracing::info!("stopped");
    Ok(Stopped { outcome: outcome.and(ended), exit })
}

/// Starts everything except the admin port, in the order of the dependencies.
fn start(
    settings: Settings,
    sizing: &Sizing,
    ports: Ports,
    log: &LogSink,
    drained: watch::Receiver<bool>,
    read_again: watch::Receiver<u64>,
) -> Result<(Node, TcpListener, Vec<Collector>), String> {
    let config = shard_config(&settings, sizing);
    let memory = MemoryBudget::new(&settings, sizing, &config);
    log_sizes(sizing, &memory);
    // Several TLS providers may be linked; this selects one. An error means that one is selected already.
    let _ = rustls::crypto::ring::default_provider().install_default();

    let instance = instance_id(&settings);
    let streams_wanted = usize::from(ports.grpc.is_some());
    let mut mesh =
        Mesh::new(usize::from(sizing.shards) + streams_wanted, usize::from(sizing.routers))
            .map_err(|error| format!("cannot create the doorbells: {error}"))?;
    let directory = Arc::new(Directory::new());
    let bell = Arc::clone(&mesh.session_manager.bell);
    let kafka = kafka_config(&settings, &instance);
    let mut collectors = Vec::new();
    let cluster =
        Cluster::prepare(&settings, kafka.clone(), &directory, Arc::clone(&bell), &mut collectors)?;
    let log_nodes = cluster.as_ref().map(Cluster::log_nodes);
    let mut back_ends = BackEnds::start(&settings, sizing, &instance, log_nodes, collectors)?;
    let limiter = Arc::new(ConnectionLimiter::new(connection_limits(&settings)));
    // The gRPC hub is the last shard.
    let streams = match ports.grpc {
        Some(listener) => {
            let side = mesh.shards.pop().expect("one more for the hub");
            let (limiter, drained) = (Arc::clone(&limiter), drained.clone());
            Some(Streams::start(
                &settings,
                sizing,
                listener,
                side,
                limiter,
                drained,
                &mut back_ends,
            )?)
        }
        None => None,
    };
    let tls = back_ends.tls.as_ref().map(|tls| ShardTls::new(tls, &mut back_ends.collectors));
    let shards = Shards::start(
        &config,
        limiter,
        ports.shards,
        Capacity::new(sizing.connections),
        mesh.shards,
        tls.as_ref(),
    )?;
    let counters = Arc::new(SessionCounters::default());
    let missed = match &cluster {
        Some(cluster) => Arc::clone(cluster.missed()),
        None => Arc::new(MissedSessions::new(Arc::clone(&directory), None, bell)),
    };
    let mut peers = back_ends.for_routing(Arc::clone(&missed) as Arc<dyn MissedEvents>);
    peers.cluster = cluster.as_ref().map(|cluster| (cluster.for_routers(), cluster.for_claims()));
    let mut collectors = std::mem::take(&mut back_ends.collectors);
    let routing =
        Routing::start(&settings, sizing, kafka, mesh.routers, &directory, peers, &mut collectors)?;
    // Before the first session, so that none is told that its cursor cannot be used.
    if let Some(replays) = routing.replays(&settings, back_ends.catch_up.chunk_max()) {
        back_ends.catch_up.set_replays(replays);
    }
    let sessions = sessions(
        &settings,
        mesh.session_manager,
        Arc::clone(&directory),
        Arc::clone(&missed),
        cluster.as_ref(),
        &back_ends,
        Arc::clone(&counters),
    )?;
    let from_other_nodes = back_ends.other_nodes.as_ref().map(|others| {
        let service = back_ends.conversations.as_ref();
        let missed = Arc::clone(&missed) as Arc<dyn MissedEvents>;
        let own = OwnSessions { handle: &sessions, missed, directory: &directory };
        others.listen(&instance, own, &routing, service, &mut collectors)
    });
    let cluster = cluster.map(|cluster| cluster.start(routing.controls())).transpose()?;
    let log = Arc::clone(log.counters());
    let hub = streams.as_ref().map(|streams| Arc::clone(&streams.metrics));
    collectors.extend([
        memory.collector(routing.partitions()),
        process::collector(),
        metrics::shards(shards.counters.clone(), hub, Arc::clone(&counters)),
        metrics::component("session_", counters),
        metrics::component("", log),
        metrics::draining(drained),
    ]);
    let auth = Arc::clone(&back_ends.tokens.auth);
    if let Some(tls) = back_ends.tls {
        tls.follow_files(&settings, read_again.clone());
    }
    back_ends.tokens.follow_files(&settings, sessions.clone(), read_again);
    let node = Node {
        settings,
        shards,
        streams,
        sessions,
        auth,
        routing,
        from_other_nodes,
        cluster,
        name: instance,
    };
    Ok((node, ports.admin, collectors))
}

fn log_sizes(sizing: &Sizing, memory: &MemoryBudget) {
    tracing::info!(
        "{} of {}, {}, {}",
        Counted(sizing.shards, "shard"),
        Counted(sizing.connections_per_shard, "connection"),
        Counted(sizing.routers, "router"),
        Counted(sizing.service_threads, "service thread"),
    );
    memory.log();
}

fn sessions(
    settings: &Settings,
    side: PeerSide,
    directory: Arc<Directory>,
    missed: Arc<MissedSessions>,
    cluster: Option<&Cluster>,
    back_ends: &BackEnds,
    counters: Arc<SessionCounters>,
) -> Result<SessionHandle, String> {
    let config = SessionConfig {
        sessions_per_user_max: settings.connections_per_user.size(),
        revocations_kept: settings.revocations_kept,
        revoked: back_ends.tokens.revoked.clone(),
        ..SessionConfig::default()
    };
    let ports = SessionPorts {
        bell: side.bell,
        shards: side.shards,
        directory,
        missed,
        announcer: cluster.map(|cluster| Arc::clone(cluster.announcer())),
        auth: Arc::clone(&back_ends.tokens.auth),
        presence: back_ends.presence.clone(),
        catch_up: back_ends.catch_up.clone(),
    };
    SessionManager::spawn(config, ports, counters)
        .map_err(|error| format!("the session manager did not start: {error}"))
}

impl Node {
    /// Waits until a part has failed without which the node cannot serve. Returns which.
    async fn failure(&self) -> String {
        let of_cluster = async {
            match &self.cluster {
                Some(cluster) => cluster.failure().await,
                None => pending().await,
            }
        };
        tokio::select! {
            reason = self.shards.lost() => reason,
            reason = of_cluster => reason,
        }
    }

    /// Accepts and serves connections for another `drain_delay`, or as long as was requested with the drain, because load
    /// balancers poll readiness. Until it is over, a drain request can be cancelled. A signal shortens what was requested.
    ///
    /// # Errors
    /// A part has failed meanwhile.
    async fn serve_on(
        &self,
        request: &StopRequest,
        drain: &DrainSwitch,
        signals: &mut Signals,
    ) -> Result<DelayEnd, String> {
        let mut is_signalled = matches!(request, StopRequest::Signal(_));
        if is_signalled {
            drain.stop(NotCancelled::Signalled);
        }
        let mut changes = drain.subscribe();
        let requested = drain.requested();
        let delay = requested.and_then(|it| it.delay).unwrap_or(self.settings.drain_delay);
        if !delay.is_zero() {
            tracing::info!(
                "{request}: not ready any more, accepting connections for another {delay:?}"
            );
        }
        let over = sleep(delay);
        tokio::pin!(over);
        while !drain.was_cancelled(requested) {
            tokio::select! {
                () = &mut over => break,
                _ = changes.changed() => {}
                _ = signals.first(), if !is_signalled => {
                    is_signalled = true;
                    drain.stop(NotCancelled::Signalled);
                    let latest = Instant::now() + self.settings.drain_delay;
                    let deadline = over.deadline().min(latest);
                    over.as_mut().reset(deadline);
                }
                failure = self.failure() => return Err(failure),
            }
        }
        if !drain.commit(requested) {
            tracing::info!("the drain was cancelled: serving as before");
            return Ok(DelayEnd::DrainCancelled);
        }
        tracing::info!("{request}: stopping");
        Ok(DelayEnd::Over)
    }

    /// Closes the sessions, then stops the parts that feed them. Abandons what is not done within
    /// the drain period plus `stop_timeout`.
    async fn stop(self) -> Stopped {
        let Settings { drain_period, stop_timeout, .. } = self.settings;
        let shutdown =
            if drain_period.is_zero() { Shutdown::Stop } else { Shutdown::Drain(drain_period) };
        let deadlines = Deadlines::new(Instant::now() + drain_period, stop_timeout);
        // Routing continues, so sessions that are still open receive events.
        let ended = timeout_at(deadlines.sessions, self.sessions.shut_down(shutdown)).await;
        let all_ended = ended.is_ok();
        if !all_ended {
            tracing::error!(
                "sessions still open, terminating them (STOP_TIMEOUT={stop_timeout:?})"
            );
        }
        drop(self.from_other_nodes);
        if let Some(streams) = self.streams {
            streams.stop(deadlines.streams).await;
        }
        let grace = deadlines.records.saturating_duration_since(Instant::now());
        let routing = self.routing;
        let commit = tokio::task::spawn_blocking(move || routing.stop(grace));
        if timeout_at(deadlines.group, commit).await.is_err() {
            tracing::error!(
                "the last offset commit timed out: some events will be delivered again"
            );
        }
        if let Some(cluster) = self.cluster {
            let grace = deadlines.cluster.saturating_duration_since(Instant::now());
            let ends = tokio::task::spawn_blocking(move || cluster.stop(grace));
            let _ = timeout_at(deadlines.cluster, ends).await;
        }
        // A shard that still has sessions runs until the process exits.
        let outcome = if all_ended { self.shards.join() } else { Ok(()) };
        Stopped { outcome, exit: deadlines.exit }
    }
}

/// The name of the node: as configured, or the host name with a random number.
fn instance_id(settings: &Settings) -> Arc<str> {
    if let Some(name) = &settings.instance_id {
        return name.as_str().into();
    }
    // In a container this is its id, in a pod the name of the pod. If it cannot be read, the random
    // number is enough.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{:08x}", host.trim(), rand::random::<u32>()).into()
}

/// Calls `then` when the node is ready for the first time. Never returns.
async fn ready_once(admin: &Admin, then: impl FnOnce()) {
    let mut ticks = interval(READY_INTERVAL);
    loop {
        ticks.tick().await;
        if admin.missing().is_empty() {
            break;
        }
    }
    tracing::info!("ready");
    then();
    pending().await
}

/// What stops a node that works.
enum StopRequest {
    /// The name of the signal.
    Signal(&'static str),
    /// A request on the admin port.
    Drain,
}

impl fmt::Display for StopRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signal(name) => name,
            Self::Drain => "POST /admin/drain",
        })
    }
}

/// How the delay of a node that drains has ended.
enum DelayEnd {
    Over,
    DrainCancelled,
}

async fn stop_requested(signals: &mut Signals, mut drained: watch::Receiver<bool>) -> StopRequest {
    tokio::select! {
        name = signals.first() => StopRequest::Signal(name),
        // The sender lives as long as the admin port.
        _ = drained.wait_for(|requested| *requested) => StopRequest::Drain,
    }
}
