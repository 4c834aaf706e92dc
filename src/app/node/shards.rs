//! Starts and watches the shard threads.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use rustls::ServerConfig;
use tokio::time::interval;

use super::mesh::ShardSide;
use super::metrics::register;
use super::sizing::Sizing;
use super::tls::Tls;
use crate::app::admin::Collector;
use crate::app::config::{Count, Settings, Size};
use crate::domain::capacity::Capacity;
use crate::domain::ids::ShardId;
use crate::domain::limiter::{ConnectionLimiter, ConnectionLimits};
use crate::handoff::Doorbell;
use crate::protocol::upgrade::UpgradeRules;
use crate::reactor::config::ShardConfig;
use crate::reactor::counters::ShardCounters;
use crate::reactor::shard::ShardLinks;
use crate::reactor::thread::{ShardHandle, SpawnError, spawn};
use crate::reactor::tls::ShardHandshakeEnd;
use crate::service::tls::TlsCounters;
use crate::service::tls::handshake::capture_secrets;
use crate::service::tls::handshaker::Handshaker;
use crate::uring::SetupError;

/// Receive buffers per shard, 2 MiB. Only those in use are resident.
const RECEIVE_BUFFERS: u16 = 512;
/// What WebSocket clients speak in TLS, if they say (RFC 7301, RFC 6455 §1.7).
const ALPN: &[u8] = b"http/1.1";
/// Interval at which the threads are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The running shards.
pub(super) struct Shards {
    handles: Vec<ShardHandle>,
    pub counters: Vec<Arc<ShardCounters>>,
}

/// The configuration of all shards.
pub(super) fn shard_config(settings: &Settings, sizing: &Sizing) -> ShardConfig {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let bytes = |size: Size| u32::try_from(size.0).unwrap_or(u32::MAX);
    let frames = |count: Count| u16::try_from(count.0).unwrap_or(u16::MAX);
    ShardConfig {
        connections_max: sizing.connections_per_shard,
        handshake_ms_max: ms(settings.handshake_timeout),
        resume_grace_ms: ms(settings.resume_grace),
        catch_up_ms_max: ms(settings.catch_up_timeout),
        cursor_interval_ms: ms(settings.cursor_interval),
        ping_after_ms: ms(settings.ping_interval),
        ping_spread_ms: ms(settings.ping_interval / 9),
        idle_ms_max: ms(settings.idle_timeout),
        message_ms_max: ms(settings.message_timeout),
        write_ms_max: ms(settings.write_timeout),
        close_ms_max: ms(settings.close_timeout),
        queue_frames_max: frames(settings.queue_messages_max),
        queue_bytes_max: bytes(settings.queue_bytes_max),
        hold_frames_max: frames(settings.hold_messages_max),
        hold_bytes_max: bytes(settings.hold_bytes_max),
        events_max: settings.shard_events_max.u32(),
        event_bytes_max: settings.shard_event_bytes_max.0,
        inbound_frames_per_s_max: frames(settings.inbound_messages_per_second),
        inbound_bytes_per_s_max: bytes(settings.inbound_bytes_per_second),
        message_bytes_max: bytes(settings.message_bytes_max),
        receive_buffers: RECEIVE_BUFFERS,
        upgrade: UpgradeRules {
            echo: settings.echo,
            deflate: settings.deflate,
            origins: settings.origin_rule().expect("validated with the settings"),
            ..UpgradeRules::default()
        },
        ..ShardConfig::default()
    }
}

/// The limits that all shards and the gRPC port share.
pub(super) fn connection_limits(settings: &Settings) -> ConnectionLimits {
    let limit = |count: Count| match count.u32() {
        0 => u32::MAX,
        limit => limit,
    };
    ConnectionLimits {
        connections_per_address_max: limit(settings.connections_per_address),
        handshakes_per_address_per_s_max: limit(settings.handshakes_per_second_per_address),
        handshakes_per_s_max: limit(settings.handshakes_per_second),
        ipv6_prefix_bits: settings.ipv6_client_prefix.0 as u8,
    }
}

/// TLS on the port of the shards.
pub(super) struct ShardTls {
    config: Arc<ServerConfig>,
    counters: Arc<TlsCounters>,
}

impl ShardTls {
    /// With the certificates and tickets of the node.
    pub(super) fn new(tls: &Tls, collectors: &mut Vec<Collector>) -> Self {
        let mut config = tls.server_config(&[ALPN]);
        capture_secrets(&mut config);
        let counters = register("websocket_tls_", collectors);
        Self { config: Arc::new(config), counters }
    }

    /// Starts the thread that makes the handshakes of a shard. It ends with the shard.
    fn handshaker(&self, number: u16, bell: &Arc<Doorbell>) -> Result<ShardHandshakeEnd, String> {
        let (config, counters) = (Arc::clone(&self.config), Arc::clone(&self.counters));
        let (handshaker, end) = Handshaker::new(config, counters, bell)
            .map_err(|error| format!("shard {number}: {error}"))?;
        handshaker
            .spawn(format!("handshakes-{number}"))
            .map_err(|error| format!("shard {number}: cannot start a thread: {error}"))?;
        Ok(end)
    }
}

impl Shards {
    /// Starts one thread per side, and with TLS one more that makes its handshakes.
    ///
    /// # Errors
    /// A ring cannot be set up. The text says what to do. Shards that have started end by
    /// themselves, because their rings are dropped.
    pub(super) fn start(
        config: &ShardConfig,
        limiter: Arc<ConnectionLimiter>,
        listener: OwnedFd,
        capacity: Capacity,
        sides: Vec<ShardSide>,
        tls: Option<&ShardTls>,
    ) -> Result<Self, String> {
        let count = sides.len() as u64;
        let (listener, capacity) = (Arc::new(listener), Arc::new(capacity));
        let mut shards = Self { handles: Vec::new(), counters: Vec::new() };
        for (number, side) in (0..).zip(sides) {
            let counters = Arc::new(ShardCounters::default());
            shards.counters.push(Arc::clone(&counters));
            let ShardSide { bell, peers } = side;
            let limiter = Arc::clone(&limiter);
            let capacity = Arc::clone(&capacity);
            let handshaker = tls.map(|tls| tls.handshaker(number, &bell)).transpose()?;
            let links = ShardLinks { peers, bell, limiter, capacity, counters, handshaker };
            let handle = spawn(ShardId(number), config.clone(), Arc::clone(&listener), links);
            shards.handles.push(handle.map_err(|error| not_started(&error, count))?);
        }
        Ok(shards)
    }

    /// Waits until a shard has ended unexpectedly, and returns which and why.
    pub(super) async fn lost(&self) -> String {
        let mut ticks = interval(CHECK_INTERVAL);
        loop {
            ticks.tick().await;
            if let Some(failure) = self.failure() {
                return failure;
            }
            if let Some(number) = self.handles.iter().position(ShardHandle::is_finished) {
                return format!("shard {number} has ended, although nobody has stopped it");
            }
        }
    }

    /// The first failure of a ring.
    fn failure(&self) -> Option<String> {
        self.handles.iter().enumerate().find_map(|(number, handle)| {
            Some(format!("shard {number} has failed: io_uring_enter: {}", handle.failure()?))
        })
    }

    /// Waits for all shard threads to end.
    ///
    /// # Errors
    /// The first failure.
    pub(super) fn join(self) -> Result<(), String> {
        let failure = self.failure();
        self.handles.into_iter().for_each(ShardHandle::join);
        failure.map_or(Ok(()), Err)
    }
}

/// The text for a shard that could not be started, one of `shards`.
fn not_started(error: &SpawnError, shards: u64) -> String {
    let SpawnError::Ring { source: SetupError::NoMemory { bytes }, .. } = error else {
        return error.to_string();
    };
    let each = bytes.div_ceil(1024);
    let all = each * shards;
    let fewer = "\n      or less memory for each shard: --connections-max 10000";
    match getrlimit(Resource::Memlock).current {
        Some(limit) if limit < all * 1024 => format!(
            "{error}: RLIMIT_MEMLOCK is {} KiB, and rings count towards it: {each} KiB for each shard, {all} KiB \
             in all\n      use a higher limit: `ulimit -l {all}`, in systemd LimitMEMLOCK={all}K, in Docker --ulimit \
             memlock={}; more if other programs of this user have locked memory{fewer}",
            limit / 1024,
            all * 1024
        ),
        _ => format!(
            "{error}: the memory of this machine or the memory limit of this process's control group is used \
             up\n      use a higher limit: in systemd MemoryMax=, in Docker --memory; at least {all} KiB more{fewer}"
        ),
    }
}
