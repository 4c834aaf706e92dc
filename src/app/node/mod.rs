//! One node, from start to exit: everything is made here, in the order in which it depends on each
//! other, and ended here in the reverse.

mod back_ends;
mod ledger;
mod mesh;
mod metrics;
mod shards;
mod signals;
mod sizing;

use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{interval, timeout};

use self::back_ends::BackEnds;
use self::ledger::Ledger;
use self::mesh::{Mesh, PeerEnd};
use self::shards::{Shards, gate_config, shard_config};
use self::signals::Signals;
use self::sizing::{Machine, Sizing};
use super::admin::{self, Admin, Check, Requests};
use super::config::Settings;
use super::telemetry::{self, LogSink};
use crate::reactor::listener::{ListenerConfig, listen_all};
use crate::service::directory::Directory;
use crate::service::sessions::{
    Ending, SessionConfig, SessionCounters, SessionHandle, SessionManager, SessionPorts, ShardPort,
    Stage,
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

async fn live(
    plan: Plan,
    sizing: Sizing,
    log: &LogSink,
    on_ready: impl FnOnce(&Addresses),
) -> Result<(), String> {
    let Plan { settings, ip, try_page } = plan;
    let mut signals = Signals::catch().map_err(|error| format!("no signals: {error}"))?;
    let config = shard_config(&settings, &sizing);
    tracing::info!(
        "{} shards of {} connections, {} routers, {} service threads",
        sizing.shards,
        sizing.connections_per_shard,
        sizing.routers,
        sizing.service_threads
    );
    let ledger = Ledger::new(&settings, &sizing, &config);
    ledger.announce();
    // Several TLS providers may be linked; this one is meant. An error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();

    // Every port first: one that is taken is told before anything has begun.
    let mut listener = ListenerConfig::new(settings.http_port.or(ip));
    listener.send_buffer_bytes = (settings.so_sndbuf.0 > 0).then(|| settings.so_sndbuf.bytes());
    let (listeners, websocket) =
        listen_all(&listener, usize::from(sizing.shards)).map_err(|error| error.to_string())?;
    let admin_listener = bind("HTTP_ADDR", settings.http_addr.or(ip)).await?;
    let at = Addresses { websocket, admin: local(&admin_listener), grpc: None };

    let mesh = Mesh::new(usize::from(sizing.shards), usize::from(sizing.routers))
        .map_err(|error| format!("no descriptors for the rings: {error}"))?;
    let shards = Shards::start(&config, gate_config(&settings), listeners, mesh.shards)?;

    // Their rings must live as long as the shards.
    let routers = mesh.routers;
    let instance = instance_id(&settings);
    let back_ends = BackEnds::start(&settings, &instance)?;
    if back_ends.conversations.is_none() {
        tracing::warn!(
            "CONV_SVC_ADDR is not set: events of conversations whose creation was not seen cannot \
             be routed"
        );
    }
    let redis = back_ends.redis;
    let directory = Arc::new(Directory::new());
    let session_counters = Arc::new(SessionCounters::default());
    let sessions = SessionManager::spawn(
        SessionConfig {
            sessions_per_user_max: settings.connections_per_user.size(),
            ..SessionConfig::default()
        },
        SessionPorts {
            bell: mesh.session_manager.bell,
            shards: mesh.session_manager.shards.into_iter().map(shard_port).collect(),
            directory: Arc::clone(&directory),
            auth: back_ends.auth,
            presence: back_ends.presence,
            resume: back_ends.resume,
        },
        Arc::clone(&session_counters),
    )
    .map_err(|error| format!("the session manager did not start: {error}"))?;

    let (drain, drained) = watch::channel(false);
    let admin = Arc::new(Admin {
        service: settings.service_name.to_string(),
        checks: vec![serving(sessions.clone())],
        samples: settings.metrics_enabled.then(|| {
            let log = Arc::clone(log.counters());
            let counters = Arc::clone(&session_counters);
            let mut samples = back_ends.samples;
            samples.extend([
                ledger.samples(),
                metrics::shards(shards.counters.clone(), session_counters),
                metrics::component("session_", move |visit| counters.visit(visit)),
                metrics::component("", move |visit| log.visit(visit)),
            ]);
            samples
        }),
        drain,
        try_page: try_page.map(|page| page(&at)),
        requests: Requests::default(),
    });
    let admin_task = tokio::spawn(admin::serve(admin_listener, Arc::clone(&admin)));
    tracing::info!("WebSocket on {websocket}, admin on {}", at.admin);

    let outcome = tokio::select! {
        why = told_to_stop(&mut signals, drained) => { tracing::info!("{why}: stopping"); Ok(()) }
        number = shards.lost() => Err(format!("shard {number} has ended by itself")),
        () = ready_once(&admin, || on_ready(&at)) => unreachable!("it waits for ever"),
    };
    // Readiness turns off before the first session is told to go.
    admin.drain.send_replace(true);
    signals.leave_at_the_next(log.clone());
    let ended = stop(&settings, sessions, shards).await;
    drop((routers, redis));
    admin_task.abort();
    tracing::info!("stopped");
    outcome.and(ended)
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
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| format!("{setting}: cannot listen on {address}: {error}"))
}

fn local(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound socket has an address")
}

fn shard_port(end: PeerEnd) -> ShardPort {
    ShardPort { commands: end.commands, reports: end.reports }
}

fn serving(sessions: SessionHandle) -> Check {
    Box::new(move || match sessions.stage() {
        Stage::Serving => None,
        Stage::Draining => Some("draining".to_owned()),
        Stage::Stopping | Stage::Stopped => Some("stopping".to_owned()),
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

/// Ends the sessions, then what fed them. Bounded: what is not done by then is left.
async fn stop(settings: &Settings, sessions: SessionHandle, shards: Shards) -> Result<(), String> {
    let ending = if settings.drain_period.is_zero() {
        Ending::Stop
    } else {
        Ending::Drain(settings.drain_period)
    };
    let limit = settings.drain_period + settings.stop_timeout;
    if timeout(limit, sessions.end(ending)).await.is_err() {
        tracing::error!("sessions were still open after {limit:?} and are left");
        return Ok(());
    }
    shards.join()
}
