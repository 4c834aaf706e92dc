//! TCP connections of the gRPC port: limited in number, with the reason why each one ended.

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

/// How long a stream that ended waits for the end of its connection.
const CONNECTION_END_WAIT: Duration = Duration::from_millis(20);
/// Pause after a failed accept, which usually means that no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A TCP connection with its permit.
#[derive(Debug)]
pub(super) struct GrpcConnection {
    stream: TcpStream,
    end: Arc<ConnectionEnd>,
    _permit: OwnedSemaphorePermit,
}

/// Connection data for its calls.
#[derive(Clone, Debug)]
pub(super) struct ConnectionInfo {
    /// The client's address.
    pub(super) address: IpAddr,
    /// How the connection ends.
    pub(super) end: Arc<ConnectionEnd>,
}

/// How a connection ended. HTTP/2 does not pass the reason to the streams.
#[derive(Debug, Default)]
pub(super) struct ConnectionEnd {
    socket: OnceLock<EndReason>,
    closed: AtomicBool,
    on_close: Notify,
}

impl ConnectionEnd {
    fn socket_ended(&self, why: EndReason) {
        // The first reason counts.
        let _ = self.socket.set(why);
    }

    /// Why a stream ended if no other reason is known: its socket ended; the server closed the
    /// connection because a ping was not answered; or the client reset the stream.
    pub(super) async fn of_stream(&self) -> EndReason {
        if self.socket.get().is_none() && !self.closed.load(Ordering::Acquire) {
            // HTTP/2 ends the streams shortly before it closes the connection.
            let _ = timeout(CONNECTION_END_WAIT, self.on_close.notified()).await;
        }
        match (self.socket.get(), self.closed.load(Ordering::Acquire)) {
            (Some(why), _) => *why,
            (None, true) => EndReason::PeerSilent,
            (None, false) => EndReason::ClosedByPeer,
        }
    }
}

impl Drop for GrpcConnection {
    fn drop(&mut self) {
        self.end.closed.store(true, Ordering::Release);
        self.end.on_close.notify_waiters();
    }
}

/// Accepts connections until the receiver is dropped. Closes connections over the limit at once, so
/// that their clients try another node instead of waiting.
pub(super) async fn accept(
    listener: TcpListener,
    connections_max: usize,
    accepted: mpsc::Sender<io::Result<GrpcConnection>>,
    counters: Arc<GrpcCounters>,
) {
    let permits = Arc::new(Semaphore::new(connections_max));
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
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            counters.grpc_connections_refused.add(1);
            continue;
        };
        // Fails only if the socket is already broken. The first read then reports it.
        let _ = stream.set_nodelay(true);
        counters.grpc_connections.add(1);
        let connection = GrpcConnection { stream, end: Arc::default(), _permit: permit };
        if accepted.send(Ok(connection)).await.is_err() {
            return;
        }
    }
}

impl Connected for GrpcConnection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        // Fails only if the socket is already broken.
        let address = self.stream.peer_addr().map(|address| address.ip());
        let address = address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        ConnectionInfo { address, end: Arc::clone(&self.end) }
    }
}

impl AsyncRead for GrpcConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        match &read {
            Ok(()) if buffer.filled().len() > before => {}
            Ok(()) => self.end.socket_ended(EndReason::PeerGone),
            Err(_) => self.end.socket_ended(EndReason::PeerReset),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for GrpcConnection {
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
