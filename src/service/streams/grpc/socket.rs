//! The socket of a gRPC connection: says why it ended, and hands its bytes to HTTP/2 in portions.
//!
//! ```text
//!  HTTP/2 ── Socket: portions ── TLS, or nothing ── TcpSocket: whether the kernel takes anything ── kernel
//! ```
//!
//! TLS has a buffer of its own. So what the kernel takes is seen below it, and what HTTP/2 gets is bounded above it.

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

/// The socket takes what HTTP/2 writes.
const NOT_BLOCKED: u64 = u64::MAX;

/// What is below HTTP/2.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A socket, owned by HTTP/2. Its state is shared with the connection.
pub(super) struct Socket {
    stream: Take<Box<dyn Transport>>,
    state: Arc<SocketState>,
}

/// The end of a connection that the kernel has.
#[derive(Debug)]
pub(super) struct TcpSocket {
    stream: TcpStream,
    state: Arc<SocketState>,
}

/// What the connection knows and decides about its socket.
#[derive(Debug)]
pub(super) struct SocketState {
    opened_at: Instant,
    /// When the last bytes came, ms since `opened_at`.
    received_ms: AtomicU64,
    /// Since when the socket takes nothing although HTTP/2 has something to write, ms since `opened_at`; or
    /// [`NOT_BLOCKED`].
    blocked_ms: AtomicU64,
    /// The socket has begun or ceased to block since the connection asked last.
    block_changed: AtomicBool,
    /// The portion is used up, and HTTP/2 wants more.
    waits: AtomicBool,
    /// The next portion may be read.
    granted: AtomicBool,
    end: OnceLock<EndReason>,
}

impl TcpSocket {
    /// A connection that was just accepted.
    pub(super) fn new(stream: TcpStream) -> Self {
        let state = Arc::new(SocketState {
            opened_at: Instant::now(),
            received_ms: AtomicU64::new(0),
            blocked_ms: AtomicU64::new(NOT_BLOCKED),
            block_changed: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            granted: AtomicBool::new(false),
            end: OnceLock::new(),
        });
        Self { stream, state }
    }

    pub(super) fn state(&self) -> Arc<SocketState> {
        Arc::clone(&self.state)
    }

    fn tcp(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(&mut self.stream)
    }
}

impl Socket {
    /// `stream`: the [`TcpSocket`] of this state, or TLS on top of it.
    pub(super) fn new(stream: Box<dyn Transport>, state: Arc<SocketState>) -> Self {
        Self { stream: stream.take(PORTION_BYTES), state }
    }

    fn inner(&mut self) -> Pin<&mut Box<dyn Transport>> {
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
        self.at(self.received_ms.load(Ordering::Relaxed))
    }

    /// Since when the socket takes nothing although HTTP/2 has something to write; `None` if it takes all.
    pub(super) fn blocked_since(&self) -> Option<Instant> {
        let ms = self.blocked_ms.load(Ordering::Relaxed);
        (ms != NOT_BLOCKED).then(|| self.at(ms))
    }

    /// Whether the socket has begun or ceased to block since the last call.
    pub(super) fn take_block_change(&self) -> bool {
        self.block_changed.swap(false, Ordering::Relaxed)
    }

    fn written(&self, result: &Poll<io::Result<usize>>) {
        if result.is_pending() == self.blocked_since().is_some() {
            return;
        }
        let since = if result.is_pending() { self.now_ms() } else { NOT_BLOCKED };
        self.blocked_ms.store(since, Ordering::Relaxed);
        self.block_changed.store(true, Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.opened_at.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn at(&self, ms: u64) -> Instant {
        self.opened_at + Duration::from_millis(ms)
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

impl Drop for TcpSocket {
    /// What the socket does not take is dropped with it. Otherwise the kernel would keep it for minutes.
    fn drop(&mut self) {
        if self.state.blocked_since().is_some() {
            // Fails only if the socket is already broken.
            let _ = self.stream.set_zero_linger();
        }
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
                self.state.received_ms.store(self.state.now_ms(), Ordering::Relaxed);
            }
            Ok(()) => self.state.ended(EndReason::PeerGone),
            Err(error) => self.state.ended(match error.kind() {
                // Without a `close_notify` (RFC 8446 §6.1). HTTP/2 and gRPC say themselves what is complete.
                io::ErrorKind::UnexpectedEof => EndReason::PeerGone,
                io::ErrorKind::InvalidData => EndReason::PeerAtFault,
                _ => EndReason::PeerReset,
            }),
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
        self.inner().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(context)
    }
}

impl AsyncRead for TcpSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.tcp().poll_read(context, buffer)
    }
}

impl AsyncWrite for TcpSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.tcp().poll_write(context, bytes);
        self.state.written(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.tcp().poll_write_vectored(context, parts);
        self.state.written(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp().poll_shutdown(context)
    }
}
