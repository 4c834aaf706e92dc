//! The connections of the admin port, and those of its Unix socket. Each serves one request, so that a connection is in
//! one of two states, and each has its deadline:
//!
//! ```text
//!  accepted ── whole head ──► answering ── answer written ──► closed
//!     │ makes room for a new connection at the limit
//! ```

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tonic::codegen::Service as _;

use super::access::AdminPeer;
use crate::service::backends::outage::Outage;
use crate::service::runtime::places::{Places, Replaceable};

/// Concurrent connections of the port, and as many of the socket. At this limit the oldest one whose request is not whole
/// makes room for a new one.
pub(super) const CONNECTIONS_MAX: usize = 256;
/// Longest request head, bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Pause after a failed accept, which usually means that no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The deadlines of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestDeadlines {
    /// From accepting it to its whole request head.
    pub(super) head: Duration,
    /// From there to the last byte of the answer.
    pub(super) answer: Duration,
}

impl Default for RequestDeadlines {
    /// 10 s each.
    fn default() -> Self {
        Self { head: Duration::from_secs(10), answer: Duration::from_secs(10) }
    }
}

crate::counters! {
    /// Counters of the connections to the admin port.
    pub struct AdminCounters of SharedCounter {
        Counter connections: "Connections accepted on the admin port",
        Counter connections_refused: "Connections closed at once: all others were being answered",
        Counter connections_replaced: "Connections without a whole request that made room for a new one",
        Counter connections_late: "Connections whose request head did not come within 10 s",
        Counter connections_stalled: "Connections that did not take their answer within 10 s",
        Counter accept_failures: "Failed attempts to accept a connection on the admin port",
        Counter requests_denied: "Requests below /admin/ that were denied: no token, from another machine, or of a web page",
        Counter token_reloads: "Tokens of operators replaced while the node ran",
        Counter token_reload_failures: "Tokens of operators that could not be read again; the old ones stay in use",
    }
}

/// A socket that accepts connections to the admin API.
pub(super) trait AdminListener {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, AdminPeer)>> + Send;
}

impl AdminListener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<(TcpStream, AdminPeer)> {
        self.accept().await.map(|(stream, peer)| (stream, AdminPeer::Address(peer.ip())))
    }
}

impl AdminListener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, AdminPeer)> {
        let (stream, _) = self.accept().await?;
        let user = stream.peer_cred().ok().map(|credentials| credentials.uid());
        Ok((stream, AdminPeer::Socket(user)))
    }
}

/// Accepts and serves connections until the future is dropped.
pub(super) async fn serve<L: AdminListener>(
    listener: L,
    router: axum::Router,
    deadlines: RequestDeadlines,
    counters: Arc<AdminCounters>,
) {
    let places = Places::new(CONNECTIONS_MAX);
    let outage = Outage::default();
    loop {
        let (stream, peer) = match listener.next().await {
            Ok(accepted) => accepted,
            Err(error) => {
                counters.accept_failures.add(1);
                if let Some(again) = outage.failed(Instant::now()) {
                    tracing::warn!(%error, "cannot accept an admin connection{again}");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let leave = Arc::new(Notify::new());
        let Some((place, replaceable)) = places.take(&leave).await else {
            counters.connections_refused.add(1);
            continue;
        };
        counters.connections.add(1);
        let serving = serve_connection(
            (stream, peer),
            router.clone(),
            (replaceable, leave),
            deadlines,
            Arc::clone(&counters),
        );
        tokio::spawn(async move {
            serving.await;
            drop(place);
        });
    }
}

async fn serve_connection<S: AsyncRead + AsyncWrite + Unpin>(
    (stream, peer): (S, AdminPeer),
    router: axum::Router,
    (replaceable, leave): (Replaceable, Arc<Notify>),
    deadlines: RequestDeadlines,
    counters: Arc<AdminCounters>,
) {
    let has_head = Notify::new();
    let replaceable = Mutex::new(Some(replaceable));
    let answer = |mut request: hyper::Request<Incoming>| {
        replaceable.lock().expect("no holder panics").take();
        request.extensions_mut().insert(peer);
        has_head.notify_one();
        router.clone().call(request)
    };
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    tokio::pin!(connection);
    tokio::select! {
        biased;
        // An error concerns this client alone.
        _ = &mut connection => return,
        () = has_head.notified() => {}
        () = leave.notified() => return counters.connections_replaced.add(1),
        () = sleep(deadlines.head) => return counters.connections_late.add(1),
    }
    if timeout(deadlines.answer, connection).await.is_err() {
        counters.connections_stalled.add(1);
    }
}
