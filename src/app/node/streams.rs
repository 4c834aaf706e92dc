//! The gRPC port: the hub, which counts as one more shard, and the server in front of it.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::back_ends::BackEnds;
use super::mesh::ShardSide;
use super::metrics::register;
use super::sizing::Sizing;
use crate::app::config::Settings;
use crate::domain::limiter::ConnectionLimiter;
use crate::service::sessions::auth::AuthFailure;
use crate::service::streams::grpc::{self, AddressLimits, GrpcConfig, GrpcPorts, GrpcTls};
use crate::service::streams::hub::{Hub, HubConfig, HubMetrics, OutboxLimits};
use crate::service::tls::threads::HandshakeThreads;
use crate::uring::monotonic_ms;

/// The bounds of each stream's outbox.
pub(super) fn outbox_limits(settings: &Settings) -> OutboxLimits {
    OutboxLimits {
        live_messages_max: settings.queue_messages_max.size(),
        live_bytes_max: settings.queue_bytes_max.bytes(),
        hold_messages_max: settings.hold_messages_max.size(),
        hold_bytes_max: settings.hold_bytes_max.bytes(),
        ..OutboxLimits::default()
    }
}

fn tls(sizing: &Sizing, back_ends: &mut BackEnds) -> Result<Option<Arc<GrpcTls>>, String> {
    let Some(tls) = &back_ends.tls else { return Ok(None) };
    let threads = HandshakeThreads::start(sizing.stream_handshake_threads())
        .map_err(|error| format!("the threads for TLS handshakes did not start: {error}"))?;
    let counters = register("grpc_tls_", &mut back_ends.collectors);
    Ok(Some(GrpcTls::new(tls.server_config(&[grpc::ALPN]), threads, counters)))
}

/// The running gRPC port.
pub(super) struct Streams {
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
    pub metrics: Arc<HubMetrics>,
}

impl Streams {
    /// Starts the hub and the server on the current runtime. `drained`: whether the node drains.
    ///
    /// # Errors
    /// The hub's doorbell cannot be waited on, or a thread cannot be started.
    pub(super) fn start(
        settings: &Settings,
        sizing: &Sizing,
        listener: TcpListener,
        side: ShardSide,
        limiter: Arc<ConnectionLimiter>,
        drained: watch::Receiver<bool>,
        back_ends: &mut BackEnds,
    ) -> Result<Self, String> {
        let metrics = Arc::new(HubMetrics::default());
        let config = HubConfig {
            outbox: outbox_limits(settings),
            streams_max: sizing.streams_max(),
            deliveries_max: settings.shard_events_max.size(),
            deliveries_bytes_max: settings.shard_event_bytes_max.bytes(),
            catch_up_timeout: settings.catch_up_timeout,
            cursor_interval: settings.cursor_interval,
            stall_timeout: settings.write_timeout,
            close_timeout: settings.close_timeout,
            ..HubConfig::default()
        };
        let (handle, hub) = Hub::new(config, side.peers, side.bell, Arc::clone(&metrics))
            .map_err(|error| format!("the gRPC hub did not start: {error}"))?;
        tokio::spawn(hub.run());

        let config = GrpcConfig {
            connections_max: sizing.streams_max(),
            calls_waiting_max: sizing.streams_max(),
            handshake_timeout: settings.handshake_timeout,
            write_timeout: settings.write_timeout,
            idle_timeout: settings.idle_timeout,
            keepalive_interval: settings.ping_interval,
            keepalive_timeout: settings.idle_timeout.saturating_sub(settings.ping_interval),
            ..GrpcConfig::default()
        };
        let (stop, stopped) = oneshot::channel();
        let counters = register("", &mut back_ends.collectors);
        let auth = Arc::clone(&back_ends.tokens.auth);
        let ports = GrpcPorts {
            hub: handle,
            limits: AddressLimits::new(limiter, monotonic_ms),
            judge: Arc::new(move |token| auth.judge(token).map_err(AuthFailure::refusal)),
            tls: tls(sizing, back_ends)?,
        };
        let served = grpc::serve(config, listener, ports, counters, drained, async {
            // An error means that the node is gone, which stops the server as well.
            let _ = stopped.await;
        });
        let server = tokio::spawn(async {
            if let Err(error) = served.await {
                tracing::error!("the gRPC server failed: {error}");
            }
        });
        Ok(Self { stop, server, metrics })
    }

    /// Stops the server, at the latest at `deadline`. Called after the sessions have been closed.
    pub(super) async fn stop(mut self, deadline: Instant) {
        // An error means that the server has already failed and logged the reason.
        let _ = self.stop.send(());
        if timeout_at(deadline, &mut self.server).await.is_err() {
            tracing::warn!("gRPC connections still open, terminating them");
            self.server.abort();
        }
    }
}
