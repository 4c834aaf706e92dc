//! `DeliveryApi.Connect` (contract §1) on its own port, with the standard health and reflection
//! services. `docs/grpc.md` tells clients how to use it.

mod codec;
mod connect;
mod connections;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::counters;
use crate::service::events::proto::DESCRIPTORS;
use crate::service::streams::hub::HubHandle;

pub use connect::REQUEST_BYTES_MAX;

use connect::ConnectService;

/// Accepted connections that wait for HTTP/2 to begin.
const ACCEPTED_MAX: usize = 64;

/// Settings of the gRPC port.
#[derive(Clone, Debug)]
pub struct GrpcConfig {
    /// TCP connections at a time.
    pub connections_max: usize,
    /// Streams of one connection at a time; more wait at the client.
    pub streams_per_connection_max: u32,
    /// From the call to its first request, and again until the session is admitted.
    pub handshake_timeout: Duration,
    /// A new session's live events wait until its client has named no further conversation for this
    /// long, so that all it names at first is caught up without a seam.
    pub opening_pause: Duration,
    /// Longest such wait in all.
    pub opening_max: Duration,
    /// Requests a client may send at once.
    pub requests_burst: u32,
    /// Requests a client may send per second in the long run.
    pub requests_per_s: u32,
    /// Between HTTP/2 pings; they find peers that went without a word.
    pub keepalive_interval: Duration,
    /// For the answer to a ping; then the connection and all its sessions end.
    pub keepalive_timeout: Duration,
    /// For the connections to close after the port was told to.
    pub shutdown_timeout: Duration,
}

impl Default for GrpcConfig {
    /// 10,000 connections of 1,000 streams, 10 s for the handshake, 200 ms of pause and 2 s at
    /// most, 8,192 requests at once and 100/s, pings like those of WebSocket (contract §3: after
    /// 54 s, 6 s to answer), 5 s to shut down.
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            streams_per_connection_max: 1_000,
            handshake_timeout: Duration::from_secs(10),
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
    /// What happens on the gRPC port before a session is the hub's.
    pub struct GrpcCounters of SharedCounter {
        Counter grpc_connections: "TCP connections accepted on the gRPC port",
        Counter grpc_connections_refused: "TCP connections closed at once because too many were open",
        Counter grpc_accept_failures: "Failed attempts to accept a connection on the gRPC port",
        Counter grpc_calls: "Calls of Connect",
        Counter grpc_calls_late: "Calls of Connect without a first request or an admission in time",
        Counter grpc_calls_malformed: "Calls of Connect ended because of what the client sent",
        Counter grpc_requests: "Requests that came on streams",
        Counter grpc_requests_too_many: "Streams ended because their client sent too many requests",
    }
}

/// Why the port could not be served.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The descriptors that were compiled in do not make a reflection service.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The HTTP/2 server gave up.
    #[error("gRPC server: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves the port until `shutdown` and until its connections have closed, or some time later.
///
/// # Errors
/// See [`GrpcError`]; a fault of one connection is none.
pub async fn serve(
    config: GrpcConfig,
    listener: TcpListener,
    hub: HubHandle,
    counters: Arc<GrpcCounters>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GrpcError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reporting = tokio::spawn(report_health(health, hub.accepting()));
    let (accepted, incoming) = mpsc::channel(ACCEPTED_MAX);
    let accepting =
        connections::accept(listener, config.connections_max, accepted, Arc::clone(&counters));
    let accepting = tokio::spawn(accepting);

    let (stop, stopped) = watch::channel(false);
    let mut stopping = stopped.clone();
    let shutdown_timeout = config.shutdown_timeout;
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(config.keepalive_interval))
        .http2_keepalive_timeout(Some(config.keepalive_timeout))
        .max_concurrent_streams(config.streams_per_connection_max)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(HEADER_BYTES_MAX);
    let served = server
        .add_service(health_service)
        .add_service(reflection()?.build_v1()?)
        .add_service(reflection()?.build_v1alpha()?)
        .add_service(ConnectService::new(config, hub, counters))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        });
    let outcome = tokio::select! {
        served = served => served,
        () = async {
            shutdown.await;
            stop.send_replace(true);
            tokio::time::sleep(shutdown_timeout).await;
        } => Ok(()),
    };
    accepting.abort();
    reporting.abort();
    Ok(outcome?)
}

/// What a client may send on one stream before it is read, bytes: requests are of
/// [`REQUEST_BYTES_MAX`] at most.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// The same on all streams of one connection together.
const CONNECTION_WINDOW_BYTES: u32 = 256 * 1024;
/// What hyper takes for one stream from its writer before the socket does, bytes (its default).
const STREAM_SEND_BYTES: u64 = 400 * 1024;
/// Memory of one stream in the HTTP/2 server, bytes.
pub const STREAM_BYTES_MAX: u64 = STREAM_SEND_BYTES + STREAM_WINDOW_BYTES as u64;
/// Memory of one connection beside its streams, bytes: headers, frames being read and written.
pub const CONNECTION_BYTES_MAX: u64 = 4 * HEADER_BYTES_MAX as u64;

/// Headers of one call, bytes: room for a token and what proxies add.
const HEADER_BYTES_MAX: u32 = 16 * 1024;

/// Names what is served here and nothing else of the packages that are compiled in.
fn reflection() -> Result<tonic_reflection::server::Builder<'static>, GrpcError> {
    Ok(tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .with_service_name(ConnectService::NAME)
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection"))
}

/// `SERVING` while the node takes new sessions, for the server as a whole and for `Connect`.
async fn report_health(health: HealthReporter, mut accepting: watch::Receiver<bool>) {
    loop {
        let status = match *accepting.borrow_and_update() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        health.set_service_status("", status).await;
        health.set_service_status(ConnectService::NAME, status).await;
        if accepting.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
