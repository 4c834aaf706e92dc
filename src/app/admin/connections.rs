//! The connections of the admin port. Each serves one request, so that a connection is in one of two states, and each
//! has its deadline:
//!
//! ```text
//!  accepted ── whole head ──► answering ── answer written ──► closed
//!     │ makes room for a new connection at the limit
//! ```

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tonic::codegen::Service as _;

use crate::service::backends::outage::Outage;
use crate::service::runtime::places::{Places, Replaceable};

/// Concurrent connections. At this limit the oldest one whose request is not whole makes room for a new one.
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
    }
}

/// Accepts and serves connections until the future is dropped.
pub(super) async fn serve(
    listener: TcpListener,
    router: axum::Router,
    deadlines: RequestDeadlines,
    counters: Arc<AdminCounters>,
) {
    let places = Places::new(CONNECTIONS_MAX);
    let outage = Outage::default();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
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
            stream,
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

async fn serve_connection(
    stream: TcpStream,
    router: axum::Router,
    (replaceable, leave): (Replaceable, Arc<Notify>),
    deadlines: RequestDeadlines,
    counters: Arc<AdminCounters>,
) {
    let has_head = Notify::new();
    let replaceable = Mutex::new(Some(replaceable));
    let answer = |request: hyper::Request<Incoming>| {
        replaceable.lock().expect("no holder panics").take();
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
