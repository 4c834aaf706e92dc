//! The socket of a gRPC connection: says why it ended, and hands its bytes to HTTP/2 in portions.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::domain::close::EndReason;

/// Bytes that HTTP/2 gets before the streams have taken what it made of them. So it never holds more
/// than 1,639 frames of one byte, and resets or opens no more streams than a connection may have.
const PORTION_BYTES: u64 = 16 * 1024;

/// A socket, owned by HTTP/2. Its state is shared with the connection.
#[derive(Debug)]
pub(super) struct Socket {
    stream: Take<TcpStream>,
    state: Arc<SocketState>,
}

/// What the connection knows and decides about its socket.
#[derive(Debug)]
pub(super) struct SocketState {
    opened_at: Instant,
    /// When the last bytes came, ms since `opened_at`.
    received_ms: AtomicU64,
    /// The portion is used up, and HTTP/2 wants more.
    waits: AtomicBool,
    /// The next portion may be read.
    granted: AtomicBool,
    end: OnceLock<EndReason>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> (Self, Arc<SocketState>) {
        let state = Arc::new(SocketState {
            opened_at: Instant::now(),
            received_ms: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            granted: AtomicBool::new(false),
            end: OnceLock::new(),
        });
        (Self { stream: stream.take(PORTION_BYTES), state: Arc::clone(&state) }, state)
    }

    fn tcp(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.stream.get_mut())
    }
}

impl SocketState {
    /// Records why the connection ends. The first reason counts.
    pub(super) fn ended(&self, why: EndReason) {
        let _ = self.end.set(why);
    }

    /// Why a stream ended if nothing else is known: the reason of its connection, or the client has reset it.
    pub(super) fn reason_of_stream(&self) -> EndReason {
        self.end.get().copied().unwrap_or(EndReason::ClosedByPeer)
    }

    /// When the connection was accepted.
    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// When the last bytes came.
    pub(super) fn received_at(&self) -> Instant {
        self.opened_at + Duration::from_millis(self.received_ms.load(Ordering::Relaxed))
    }

    /// Grants the next portion if HTTP/2 waits for it. The caller then polls HTTP/2 again.
    pub(super) fn grant_portion(&self) -> bool {
        let waits = self.waits.swap(false, Ordering::Relaxed);
        if waits {
            self.granted.store(true, Ordering::Relaxed);
        }
        waits
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.stream.limit() == 0 {
            if !self.state.granted.swap(false, Ordering::Relaxed) {
                self.state.waits.store(true, Ordering::Relaxed);
                return Poll::Pending;
            }
            self.stream.set_limit(PORTION_BYTES);
        }
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        match &read {
            Ok(()) if buffer.filled().len() > before => {
                let ms = self.state.opened_at.elapsed().as_millis();
                let ms = u64::try_from(ms).unwrap_or(u64::MAX);
                self.state.received_ms.store(ms, Ordering::Relaxed);
            }
            Ok(()) => self.state.ended(EndReason::PeerGone),
            Err(_) => self.state.ended(EndReason::PeerReset),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.tcp().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.tcp().poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp().poll_shutdown(context)
    }
}
