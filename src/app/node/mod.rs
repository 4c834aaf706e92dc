//! One node, from start to exit: everything is made here, in the order in which it depends on each
//! other, and ended here in the reverse.

mod back_ends;
mod ledger;
mod mesh;
mod metrics;
mod other_nodes;
mod process;
mod routing;
mod shards;
mod signals;
mod sizing;
mod streams;

use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, interval, timeout, timeout_at};

use self::back_ends::BackEnds;
use self::ledger::Ledger;
use self::mesh::{Mesh, PeerSide};
use self::other_nodes::FromOtherNodes;
use self::routing::Routing;
use self::shards::{Shards, gate_config, shard_config};
use self::signals::Signals;
use self::sizing::{Machine, Sizing};
use self::streams::Streams;
use super::admin::{self, Admin, Check, Requests, Samples};
use super::config::Settings;
use super::telemetry::{self, LogSink};
use crate::domain::counted::Counted;
use crate::reactor::listener::{ListenerConfig, listen_all};
use crate::service::members::directory::Directory;
use crate::service::sessions::manager::{
    NodeState, SessionConfig, SessionCounters, SessionHandle, SessionManager, SessionPorts,
    ShardPort, Shutdown,
};

/// What to run.
pub struct Plan {
    /// All settings.
    pub settings: Settings,
    /// Where to listen if only a port is given.
    pub ip: IpAddr,
    /// Makes the page served at `/try`.
    pub try_page: Option<fn(&Addresses) -> String>,
}

/// Where a node listens, free ports found.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The public port.
    pub websocket: SocketAddr,
    /// The admin port.
    pub admin: SocketAddr,
    /// gRPC, if it is served.
    pub grpc: Option<SocketAddr>,
}

/// How often readiness is looked at until it is there.
const READY_LOOK: Duration = Duration::from_millis(50);
/// What Kafka has at least to take the last offsets.
const COMMIT_MIN: Duration = Duration::from_secs(1);
/// What may still run when the node has stopped: tasks that wait for a neighbour.
const TASKS_END_MAX: Duration = Duration::from_secs(1);

/// Runs a node until it is told to stop. `on_ready` is called once, when it is ready for the first
/// time.
///
/// # Errors
/// Something could not be started, or a part failed for good; says what, and what to do.
pub fn run(plan: Plan, on_ready: impl FnOnce(&Addresses)) -> Result<(), String> {
    let log = telemetry::start(&plan.settings)?;
    let sizing = Sizing::decide(&plan.settings, Machine::look())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(sizing.service_threads)
        .thread_name("service")
        .enable_all()
        .build()
        .map_err(|error| format!("the service threads did not start: {error}"))?;
    let outcome = runtime.block_on(live(plan, sizing, &log, on_ready));
    runtime.shutdown_timeout(TASKS_END_MAX);
    log.flush();
    outcome
}

/// The ports, bound before anything has begun, so that one that is taken is told at once.
struct Ports {
    shards: Vec<OwnedFd>,
    admin: TcpListener,
    grpc: Option<TcpListener>,
    at: Addresses,
}

impl Ports {
    async fn bind(settings: &Settings, ip: IpAddr, sizing: &Sizing) -> Result<Self, String> {
        let mut public = ListenerConfig::new(settings.http_port.or(ip));
        public.send_buffer_bytes = (settings.so_sndbuf.0 > 0).then(|| settings.so_sndbuf.bytes());
        let (shards, websocket) =
            listen_all(&public, usize::from(sizing.shards)).map_err(|error| {
                let example = settings.http_port.port.saturating_add(1);
                format!("HTTP_PORT: {error}\n      example: HTTP_PORT={example}")
            })?;
        let admin = bind("HTTP_ADDR", settings.http_addr.or(ip)).await?;
        let grpc = match settings.grpc_addr {
            Some(address) => Some(bind("GRPC_ADDR", address.or(ip)).await?),
            None => None,
        };
        let at = Addresses { websocket, admin: local(&admin), grpc: grpc.as_ref().map(local) };
        Ok(Self { shards, admin, grpc, at })
    }
}

/// Everything that runs, and must be ended in order.
struct Node {
    settings: Settings,
    shards: Shards,
    streams: Option<Streams>,
    sessions: SessionHandle,
    routing: Routing,
    from_other_nodes: Option<FromOtherNodes>,
}

async fn live(
    plan: Plan,
    sizing: Sizing,
    log: &LogSink,
    on_ready: impl FnOnce(&Addresses),
) -> Result<(), String> {
    let mut signals = Signals::catch().map_err(|error| format!("no signals: {error}"))?;
    let ports = Ports::bind(&plan.settings, plan.ip, &sizing).await?;
    let at = ports.at;
    let (node, admin_listener, samples) = start(plan.settings, &sizing, ports, log)?;

    let (drain, drained) = watch::channel(false);
    let mut checks = vec![serving(node.sessions.clone()), node.routing.check()];
    checks.extend(node.from_other_nodes.as_ref().map(FromOtherNodes::check));
    let admin = Arc::new(Admin {
        service: node.settings.service_name.to_string(),
        checks,
        samples: node.settings.metrics_enabled.then_some(samples),
        drain,
        try_page: plan.try_page.map(|page| page(&at)),
        requests: Requests::default(),
    });
    let admin_task = tokio::spawn(admin::serve(admin_listener, Arc::clone(&admin)));
    tracing::info!("WebSocket on {}, admin on {}", at.websocket, at.admin);

    let outcome = tokio::select! {
        why = told_to_stop(&mut signals, drained) => { tracing::info!("{why}: stopping"); Ok(()) }
        number = node.shards.lost() => Err(format!("shard {number} has ended by itself")),
        () = ready_once(&admin, || on_ready(&at)) => unreachable!("it waits for ever"),
    };
    // Readiness turns off before the first session is told to go.
    admin.drain.send_replace(true);
    signals.leave_at_the_next(log.clone());
    let ended = node.stop().await;
    admin_task.abort();
    tracing::info!("stopped");
    outcome.and(ended)
}

/// Makes everything but the admin port, in the order in which it depends on each other.
fn start(
    settings: Settings,
    sizing: &Sizing,
    ports: Ports,
    log: &LogSink,
) -> Result<(Node, TcpListener, Vec<Samples>), String> {
    let config = shard_config(&settings, sizing);
    let ledger = Ledger::new(&settings, sizing, &config);
    announce(sizing, &ledger);
    // Several TLS providers may be linked; this one is meant. An error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();

    let instance = instance_id(&settings);
    let mut back_ends = BackEnds::start(&settings, sizing, &instance)?;
    let streams_wanted = usize::from(ports.grpc.is_some());
    let mut mesh =
        Mesh::new(usize::from(sizing.shards) + streams_wanted, usize::from(sizing.routers))
            .map_err(|error| format!("no descriptors for the rings: {error}"))?;
    // The gRPC hub is the last shard.
    let streams = match ports.grpc {
        Some(listener) => {
            let side = mesh.shards.pop().expect("one more for it");
            let (streams, samples) = Streams::start(&settings, sizing, listener, side)?;
            back_ends.samples.extend(samples);
            Some(streams)
        }
        None => None,
    };
    let shards = Shards::start(&config, gate_config(&settings), ports.shards, mesh.shards)?;
    let directory = Arc::new(Directory::new());
    let counters = Arc::new(SessionCounters::default());
    let sessions = sessions(
        &settings,
        mesh.session_manager,
        Arc::clone(&directory),
        &back_ends,
        Arc::clone(&counters),
    )?;
    let peers = back_ends.for_routing();
    let mut samples = back_ends.samples;
    let routing = Routing::start(
        &settings,
        sizing,
        &instance,
        mesh.routers,
        &directory,
        peers,
        &mut samples,
    )?;
    let from_other_nodes = back_ends.other_nodes.as_ref().map(|others| {
        let service = back_ends.conversations.as_ref();
        others.listen(&instance, &sessions, &routing, &directory, service, &mut samples)
    });
    let log = Arc::clone(log.counters());
    let hub = streams.as_ref().map(|streams| Arc::clone(&streams.metrics));
    samples.extend([
        ledger.samples(routing.partitions()),
        process::samples(),
        metrics::shards(shards.counters.clone(), hub, Arc::clone(&counters)),
        metrics::component("session_", move |visit| counters.visit(visit)),
        metrics::component("", move |visit| log.visit(visit)),
    ]);
    let node = Node { settings, shards, streams, sessions, routing, from_other_nodes };
    Ok((node, ports.admin, samples))
}

fn announce(sizing: &Sizing, ledger: &Ledger) {
    tracing::info!(
        "{} of {}, {}, {}",
        Counted(sizing.shards, "shard"),
        Counted(sizing.connections_per_shard, "connection"),
        Counted(sizing.routers, "router"),
        Counted(sizing.service_threads, "service thread"),
    );
    ledger.announce();
}

fn sessions(
    settings: &Settings,
    side: PeerSide,
    directory: Arc<Directory>,
    back_ends: &BackEnds,
    counters: Arc<SessionCounters>,
) -> Result<SessionHandle, String> {
    let config = SessionConfig {
        sessions_per_user_max: settings.connections_per_user.size(),
        ..SessionConfig::default()
    };
    let shards = side.shards.into_iter();
    let ports = SessionPorts {
        bell: side.bell,
        shards: shards
            .map(|end| ShardPort { commands: end.commands, reports: end.reports })
            .collect(),
        directory,
        auth: Arc::clone(&back_ends.auth),
        presence: back_ends.presence.clone(),
        catch_up: back_ends.catch_up.clone(),
    };
    SessionManager::spawn(config, ports, counters)
        .map_err(|error| format!("the session manager did not start: {error}"))
}

impl Node {
    /// Ends the sessions, then what fed them. Bounded: what is not done by then is left.
    async fn stop(self) -> Result<(), String> {
        let Settings { drain_period, stop_timeout, .. } = self.settings;
        let shutdown =
            if drain_period.is_zero() { Shutdown::Stop } else { Shutdown::Drain(drain_period) };
        let deadline = Instant::now() + drain_period + stop_timeout;
        // What is routed meanwhile still reaches the sessions that are open.
        let all_ended = timeout_at(deadline, self.sessions.shut_down(shutdown)).await.is_ok();
        if !all_ended {
            tracing::error!("sessions were still open after {stop_timeout:?} and are left");
        }
        drop(self.from_other_nodes);
        if let Some(streams) = self.streams {
            streams.stop().await;
        }
        let grace = deadline.saturating_duration_since(Instant::now()).max(COMMIT_MIN);
        let routing = self.routing;
        let commit = tokio::task::spawn_blocking(move || routing.stop(grace));
        if timeout(grace + COMMIT_MIN, commit).await.is_err() {
            tracing::error!("Kafka did not take the last offsets in time: some events come again");
        }
        // A shard that still has sessions does not end; the process does.
        if all_ended { self.shards.join() } else { Ok(()) }
    }
}

/// The node's name: what was given, or the machine's with a random number.
fn instance_id(settings: &Settings) -> Arc<str> {
    if let Some(name) = &settings.instance_id {
        return name.as_str().into();
    }
    // In a container this is its id, in a pod the pod's name. Without it the number must do.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{:08x}", host.trim(), rand::random::<u32>()).into()
}

async fn bind(setting: &str, address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| {
        let taken = error.kind() == io::ErrorKind::AddrInUse;
        let hint = if taken { "; 0 stands for any free port" } else { "" };
        let example = address.port().saturating_add(if taken { 1 } else { 0 });
        format!(
            "{setting}: cannot listen on {address}: {error}{hint}\n      example: {setting}={example}"
        )
    })
}

fn local(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound socket has an address")
}

fn serving(sessions: SessionHandle) -> Check {
    Box::new(move || match sessions.state() {
        NodeState::Serving => None,
        NodeState::Draining => Some("draining".to_owned()),
        NodeState::Stopping | NodeState::Stopped => Some("stopping".to_owned()),
    })
}

/// Calls `then` when the node is ready for the first time, then waits for ever.
async fn ready_once(admin: &Admin, then: impl FnOnce()) {
    let mut look = interval(READY_LOOK);
    loop {
        look.tick().await;
        if admin.missing().is_empty() {
            break;
        }
    }
    tracing::info!("ready");
    then();
    pending().await
}

/// A signal, or the order to drain on the admin port.
async fn told_to_stop(signals: &mut Signals, mut drained: watch::Receiver<bool>) -> String {
    tokio::select! {
        (name, _) = signals.next() => name.to_owned(),
        // The sender lives as long as the admin port.
        _ = drained.wait_for(|begun| *begun) => "POST /admin/drain".to_owned(),
    }
}
