//! gRPC server: `DeliveryApi.Connect` (contract §1) with the standard health and reflection services.
//! `docs/grpc.md` is the guide for clients.

mod codec;
mod connect;
mod connection;
mod connections;
mod limits;
mod requests;
mod responses;
mod socket;
mod tls;
mod unsent;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::counters;
use crate::domain::command::{Refusal, Secret};
use crate::service::events::proto::DESCRIPTORS;
use crate::service::runtime::places::Places;
use crate::service::streams::hub::HubHandle;

pub use connect::REQUEST_BYTES_MAX;
pub use limits::AddressLimits;
pub use tls::{ALPN, GrpcTls, TLS_BYTES_MAX};

use codec::BATCH_BYTES;
use connect::ConnectService;
use connection::Shared;
use unsent::{UNSENT_BYTES_MAX, UnsentEnds};

/// Judges the token of a call by its headers, without waiting. `Err`: the token is missing, or cannot become valid.
pub type TokenJudge = Arc<dyn Fn(Option<&Secret>) -> Result<(), Refusal> + Send + Sync>;

/// Settings of the gRPC port.
#[derive(Clone, Debug)]
pub struct GrpcConfig {
    /// Concurrent TCP connections. At this limit the oldest one without a session makes room for a new one.
    pub connections_max: usize,
    /// Concurrent calls whose first request has not come. At this limit the oldest one is ended.
    pub calls_waiting_max: usize,
    /// Time from accepting a connection to its HTTP/2 preface, the handshake of TLS included, from a call to its first
    /// request, and again until the session is admitted.
    pub handshake_timeout: Duration,
    /// Time in which a socket must take something of what is written to it.
    pub write_timeout: Duration,
    /// Time without a call after which a connection is closed.
    pub idle_timeout: Duration,
    /// The opening of a session is over when its client sends no request for this long. Until then
    /// live events are held, so that a conversation named during the opening has no duplicates.
    pub opening_pause: Duration,
    /// Longest opening.
    pub opening_max: Duration,
    /// Requests that a client may send at once.
    pub requests_burst: u32,
    /// Requests that a client may send per second in the long run.
    pub requests_per_s: u32,
    /// Interval of HTTP/2 pings, which detect dead peers.
    pub keepalive_interval: Duration,
    /// Time to answer a ping. Then the connection is closed with all its sessions.
    pub keepalive_timeout: Duration,
    /// Time for the connections to close after a shutdown.
    pub shutdown_timeout: Duration,
}

impl Default for GrpcConfig {
    /// 10,000 connections; 10,000 calls without a request; 10 s handshake; 10 s for a write; 60 s without a call; opening pause
    /// 200 ms, at most 2 s; 8,192 requests at once and 100/s; pings as for WebSocket (contract §3: every 54 s, 6 s
    /// to answer); 5 s shutdown.
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            calls_waiting_max: 10_000,
            handshake_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            opening_pause: Duration::from_millis(200),
            opening_max: Duration::from_secs(2),
            requests_burst: 8_192,
            requests_per_s: 100,
            keepalive_interval: Duration::from_secs(54),
            keepalive_timeout: Duration::from_secs(6),
            shutdown_timeout: Duration::from_secs(5),
        }
    }
}

counters! {
    /// Counters of the gRPC port. The hub counts what happens within sessions.
    pub struct GrpcCounters of SharedCounter {
        Counter grpc_connections: "TCP connections accepted on the gRPC port",
        Counter grpc_connections_refused: "TCP connections closed at once because of the connection limit",
        Counter grpc_connections_refused_total_rate: "TCP connections closed at once: too many handshakes per second in total",
        Counter grpc_connections_refused_address_rate: "TCP connections closed at once: too many handshakes per second from the address",
        Counter grpc_connections_refused_address_count: "TCP connections closed at once: too many connections from the address",
        Counter grpc_connections_replaced: "Connections without a session that made room for a new one at the connection limit",
        Counter grpc_connections_malformed: "Connections that ended, or sent something else, before their HTTP/2 preface, or whose TLS handshake failed",
        Counter grpc_connections_late: "Connections whose HTTP/2 preface did not come within the handshake timeout",
        Counter grpc_connections_idle: "Connections closed because they had no call for the idle timeout",
        Counter grpc_connections_silent: "Connections closed because the client did not answer a ping",
        Counter grpc_connections_stalled: "Connections closed because their socket took nothing for the write timeout",
        Counter grpc_connections_flooded: "Connections ended because their client went on calling far above the handshake rates",
        Counter grpc_connections_unread: "Connections closed because their socket took nothing while too many calls ended",
        Counter grpc_accept_failures: "Failed attempts to accept a connection on the gRPC port",
        Counter grpc_streams: "Calls of all methods, also those that the client has reset at once",
        Counter grpc_calls: "Calls of Connect",
        Counter grpc_calls_late: "Calls of Connect that exceeded the handshake timeout",
        Counter grpc_calls_replaced: "Calls of Connect ended because too many others waited for their first request",
        Counter grpc_calls_refused_rate: "Calls of all methods refused: too many handshakes per second",
        Counter grpc_calls_refused_token: "Calls of Connect refused by their headers: the token is missing or invalid",
        Counter grpc_calls_malformed: "Calls of Connect with an invalid request or token",
        Counter grpc_requests: "Requests received on streams",
        Counter grpc_requests_too_many: "Streams closed because the client exceeded the request rate",
    }
}

/// What the port uses of the node.
#[derive(Clone)]
pub struct GrpcPorts {
    /// The hub of the streams.
    pub hub: HubHandle,
    /// The limits per address, shared with the shards.
    pub limits: AddressLimits,
    /// Judges tokens before the first request.
    pub judge: TokenJudge,
    /// `None`: the port speaks plaintext.
    pub tls: Option<Arc<GrpcTls>>,
}

/// Failure of the gRPC server.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The compiled-in descriptors are not valid for the reflection service.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves the port until `shutdown` resolves and all connections have ended, or the shutdown timeout
/// expires. While `drained` is true, the health service tells load balancers to go elsewhere.
///
/// # Errors
/// See [`GrpcError`]. An error of a single connection is not reported.
pub async fn serve(
    config: GrpcConfig,
    listener: TcpListener,
    ports: GrpcPorts,
    counters: Arc<GrpcCounters>,
    drained: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GrpcError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reporting = tokio::spawn(report_health(health, ports.hub.accepting(), drained));
    let (limits, metrics) = (ports.limits.clone(), Arc::clone(ports.hub.metrics()));
    let tls = ports.tls.clone();
    let connect = ConnectService::new(config.clone(), ports, Arc::clone(&counters));
    let routes = Routes::new(health_service)
        .add_service(reflection()?.build_v1()?)
        .add_service(reflection()?.build_v1alpha()?)
        .add_service(connect)
        .prepare();
    let places = Places::new(config.connections_max);
    let unsent = UnsentEnds::new(config.connections_max);
    let shared = Arc::new(Shared { config, routes, counters, metrics, places, unsent, tls });
    connections::accept(shared, listener, limits, shutdown).await;
    reporting.abort();
    Ok(())
}

/// Concurrent streams per connection. More calls wait in the client.
const STREAMS_PER_CONNECTION_MAX: u32 = 1_000;
/// Calls of one connection that are refused in a second because of the handshake rates. At one more the connection is
/// ended. A proxy has a call of a user in each of its streams, and a user may call again a few times in a second.
const CALLS_REFUSED_PER_S_MAX: u32 = 10 * STREAMS_PER_CONNECTION_MAX;
/// HTTP/2 receive window of a stream, bytes. A request has at most [`REQUEST_BYTES_MAX`].
const STREAM_WINDOW_BYTES: u32 = 32 * 1024;
const _: () = assert!(REQUEST_BYTES_MAX < STREAM_WINDOW_BYTES as usize);
/// HTTP/2 receive window of a connection, bytes: the windows of all its streams, so that none waits for another.
const CONNECTION_WINDOW_BYTES: u32 = STREAMS_PER_CONNECTION_MAX * STREAM_WINDOW_BYTES;
/// Bytes of all streams of a connection that their windows have let out and the socket has not taken.
const CONNECTION_SEND_BYTES: usize = 256 * 1024;
/// Memory of one stream in the HTTP/2 server, bytes: the window once in the inbox and once in the decoder, and the events
/// that it is sending, in a buffer that grows by doubling. A larger event is a copy besides.
pub const STREAM_BYTES_MAX: u64 = 2 * STREAM_WINDOW_BYTES as u64 + 2 * BATCH_BYTES as u64;
/// Memory of one connection without its streams, bytes: what it sends, the ends of calls, headers (HTTP/2 takes at most
/// seven frames of 16 KiB), frames being read and written.
pub const CONNECTION_BYTES_MAX: u64 =
    CONNECTION_SEND_BYTES as u64 + UNSENT_BYTES_MAX + 2 * HEADERS_READ_MAX as u64;

/// Headers of one call, bytes: room for a token and the fields that proxies add.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Headers that are read, bytes. A call with more than [`HEADER_BYTES_MAX`] is refused. A call with more than this can
/// end its connection, because `h2` does not read the rest of it and then cannot decode the headers of other calls.
const HEADERS_READ_MAX: u32 = 4 * HEADER_BYTES_MAX;

/// Lists only the services of this server, not everything in the compiled-in descriptors.
fn reflection() -> Result<tonic_reflection::server::Builder<'static>, GrpcError> {
    Ok(tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .with_service_name(ConnectService::NAME)
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection"))
}

/// Reports `SERVING` while the node accepts new sessions and does not drain, for the server and for
/// `DeliveryApi`.
async fn report_health(
    health: HealthReporter,
    mut accepting: watch::Receiver<bool>,
    mut drained: watch::Receiver<bool>,
) {
    loop {
        let serving = *accepting.borrow_and_update() && !*drained.borrow_and_update();
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        health.set_service_status("", status).await;
        health.set_service_status(ConnectService::NAME, status).await;
        let changed = tokio::select! {
            changed = accepting.changed() => changed,
            changed = drained.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
