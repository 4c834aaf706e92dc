//! Accepts the TCP connections of the gRPC port, within the limits.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::connection::{Shared, serve};
use super::limits::AddressLimits;
use crate::domain::limiter::LimitExceeded;
use crate::service::backends::outage::Outage;

/// Pause after a failed accept, which usually means that no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts and serves connections until `shutdown` resolves. Then waits until all have ended, at most for the
/// shutdown timeout; ends what is left.
pub(super) async fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    limits: AddressLimits,
    shutdown: impl Future<Output = ()>,
) {
    let (stop, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let outage = Outage::default();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            () = &mut shutdown => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                shared.counters.grpc_accept_failures.add(1);
                if let Some(again) = outage.failed(Instant::now()) {
                    tracing::warn!(%error, "cannot accept a gRPC connection{again}");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(serving) = admit(&shared, &limits, stream, peer, &stopped).await {
            connections.spawn(serving);
        }
    }
    drop(listener);
    stop.send_replace(true);
    // An error means that the time has passed.
    let _ = timeout(shared.config.shutdown_timeout, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
}

/// Checks the limits. `None`: the connection exceeds one and is closed at once, so that its client tries another node
/// instead of waiting.
async fn admit(
    shared: &Arc<Shared>,
    limits: &AddressLimits,
    stream: TcpStream,
    peer: SocketAddr,
    stopped: &watch::Receiver<bool>,
) -> Option<impl Future<Output = ()> + Send + use<>> {
    let counters = &shared.counters;
    let address = match limits.admit(peer.ip()) {
        Ok(address) => address,
        Err(exceeded) => {
            match exceeded {
                LimitExceeded::TotalRate => counters.grpc_connections_refused_total_rate.add(1),
                LimitExceeded::AddressRate => counters.grpc_connections_refused_address_rate.add(1),
                LimitExceeded::AddressConnections => {
                    counters.grpc_connections_refused_address_count.add(1);
                }
            }
            return None;
        }
    };
    let leave = Arc::new(Notify::new());
    let Some((place, replaceable)) = shared.places.take(&leave).await else {
        counters.grpc_connections_refused.add(1);
        return None;
    };
    // Fails only if the socket is already broken. The first read then reports it.
    let _ = stream.set_nodelay(true);
    counters.grpc_connections.add(1);
    let makes_room = (replaceable, leave);
    let serving = serve(Arc::clone(shared), stream, address, makes_room, stopped.clone());
    Some(async move {
        serving.await;
        drop(place);
    })
}
