//! The TCP connections below HTTP/2: accepted one by one, never more than the bound.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::server::Connected;

use super::GrpcCounters;
use crate::domain::close::EndReason;
use crate::service::backends::outage::Outage;

/// For a connection whose streams were told to be closed.
const CLOSE_PATIENCE: Duration = Duration::from_millis(20);
/// After a failed accept, which is mostly the process being out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection and its place among those that may be open.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    fate: Arc<Fate>,
    _place: OwnedSemaphorePermit,
}

/// What the calls of a connection know of it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// The client's address.
    pub(super) address: IpAddr,
    /// How the connection ended.
    pub(super) fate: Arc<Fate>,
}

/// How a connection ended: HTTP/2 tells its streams only that it did.
#[derive(Debug, Default)]
pub(super) struct Fate {
    socket: OnceLock<EndReason>,
    closed: AtomicBool,
    news: Notify,
}

impl Fate {
    fn socket_ended(&self, why: EndReason) {
        // The first word counts.
        let _ = self.socket.set(why);
    }

    /// Why a stream ended of which nothing else is known: with its socket; by us, who close a
    /// connection that answers no ping; or alone, reset by its client.
    pub(super) async fn of_stream(&self) -> EndReason {
        if self.socket.get().is_none() && !self.closed.load(Ordering::Acquire) {
            // The streams are told a moment before the connection is closed.
            let _ = timeout(CLOSE_PATIENCE, self.news.notified()).await;
        }
        match (self.socket.get(), self.closed.load(Ordering::Acquire)) {
            (Some(why), _) => *why,
            (None, true) => EndReason::PeerSilent,
            (None, false) => EndReason::ClosedByPeer,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.fate.closed.store(true, Ordering::Release);
        self.fate.news.notify_waiters();
    }
}

/// Accepts until the receiver is gone. A connection over the bound is closed at once, so that its
/// client tries another node instead of waiting.
pub(super) async fn accept(
    listener: TcpListener,
    connections_max: usize,
    accepted: mpsc::Sender<io::Result<Connection>>,
    counters: Arc<GrpcCounters>,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    let outage = Outage::default();
    loop {
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            () = accepted.closed() => return,
        };
        let stream = match stream {
            Ok((stream, _)) => stream,
            Err(error) => {
                counters.grpc_accept_failures.add(1);
                if let Some(again) = outage.failed(Instant::now()) {
                    tracing::warn!(%error, "cannot accept a gRPC connection{again}");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            counters.grpc_connections_refused.add(1);
            continue;
        };
        // Fails only on a socket that is broken already; its first read will say so.
        let _ = stream.set_nodelay(true);
        counters.grpc_connections.add(1);
        if accepted
            .send(Ok(Connection { stream, fate: Arc::default(), _place: place }))
            .await
            .is_err()
        {
            return;
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        // It fails only on a socket that is broken already.
        let address = self.stream.peer_addr().map(|address| address.ip());
        let address = address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        Peer { address, fate: Arc::clone(&self.fate) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        match &read {
            Ok(()) if buffer.filled().len() > before => {}
            Ok(()) => self.fate.socket_ended(EndReason::PeerGone),
            Err(_) => self.fate.socket_ended(EndReason::PeerReset),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
