//! gRPC server: `DeliveryApi.Connect` (contract §1) with the standard health and reflection services.
//! `docs/grpc.md` is the guide for clients.

mod codec;
mod connect;
mod connections;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
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

/// Accepted connections that wait for the HTTP/2 server.
const ACCEPTED_MAX: usize = 64;

/// Settings of the gRPC port.
#[derive(Clone, Debug)]
pub struct GrpcConfig {
    /// Concurrent TCP connections.
    pub connections_max: usize,
    /// Concurrent streams per connection. More calls wait in the client.
    pub streams_per_connection_max: u32,
    /// Time from the call to its first request, and again until the session is admitted.
    pub handshake_timeout: Duration,
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
    /// 10,000 connections of 1,000 streams; 10 s handshake; opening pause 200 ms, at most 2 s; 8,192
    /// requests at once and 100/s; pings as for WebSocket (contract §3: every 54 s, 6 s to answer); 5 s
    /// shutdown.
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
    /// Counters of the gRPC port. The hub counts what happens within sessions.
    pub struct GrpcCounters of SharedCounter {
        Counter grpc_connections: "TCP connections accepted on the gRPC port",
        Counter grpc_connections_refused: "TCP connections closed at once because of the connection limit",
        Counter grpc_accept_failures: "Failed attempts to accept a connection on the gRPC port",
        Counter grpc_calls: "Calls of Connect",
        Counter grpc_calls_late: "Calls of Connect that exceeded the handshake timeout",
        Counter grpc_calls_malformed: "Calls of Connect with an invalid request or token",
        Counter grpc_requests: "Requests received on streams",
        Counter grpc_requests_too_many: "Streams closed because the client exceeded the request rate",
    }
}

/// Failure of the gRPC server.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The compiled-in descriptors are not valid for the reflection service.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The HTTP/2 server failed.
    #[error("gRPC server: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves the port until `shutdown` resolves and all connections have closed, or the shutdown timeout
/// expires. While `drained` is true, the health service tells load balancers to go elsewhere.
///
/// # Errors
/// See [`GrpcError`]. An error of a single connection is not reported.
pub async fn serve(
    config: GrpcConfig,
    listener: TcpListener,
    hub: HubHandle,
    counters: Arc<GrpcCounters>,
    drained: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GrpcError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reporting = tokio::spawn(report_health(health, hub.accepting(), drained));
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

/// HTTP/2 receive window of a stream, bytes. A request has at most [`REQUEST_BYTES_MAX`].
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// HTTP/2 receive window of a connection, bytes.
const CONNECTION_WINDOW_BYTES: u32 = 256 * 1024;
/// Send buffer of hyper per stream, bytes (hyper's default).
const STREAM_SEND_BYTES: u64 = 400 * 1024;
/// Memory of one stream in the HTTP/2 server, bytes.
pub const STREAM_BYTES_MAX: u64 = STREAM_SEND_BYTES + STREAM_WINDOW_BYTES as u64;
/// Memory of one connection without its streams, bytes: headers, frames being read and written.
pub const CONNECTION_BYTES_MAX: u64 = 4 * HEADER_BYTES_MAX as u64;

/// Headers of one call, bytes: room for a token and the fields that proxies add.
const HEADER_BYTES_MAX: u32 = 16 * 1024;

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
