//! The interface between a shard and an operating system: sockets and time, nothing else.
//!
//! A shard is generic over [`Kernel`], so the same code runs on io_uring ([`Ring`](super::Ring)) and
//! on a simulated kernel that injects faults from a seed.
//!
//! ```text
//!   shard                         kernel
//!   ─────                         ──────
//!   accept(key)         ───────►  Accepted{key, peer} | AcceptFailed{key}
//!   poll_readable(key)  ───────►  Readable{key, armed: true} … Readable{key, armed: false}
//!   receive(key)        ───────►  Received{key, Bytes(lease) | End | NoBuffers | …}
//!   send(key, buffer)   ───────►  Sent{key, buffer, result}
//!   poll_writable(key)  ───────►  Writable{key}
//!   shutdown(key)       ───────►  ShutDown{key}
//!   cancel(key)         ───────►  Cancelled{key}, and the last completion of each poll of this key
//!   close(key, how)     ───────►  Closed{key}
//! ```
//!
//! Requests are queued and submitted by the next [`Kernel::enter`]. Each gets exactly one completion
//! that names its connection; `poll_readable` gets any number with `armed: true` and a last one with
//! `armed: false`. The caller has at most one request of each kind in flight per connection. The
//! slot of the key is the index of the socket in the kernel's file table, so no second table is
//! needed.

use std::io;
use std::net::SocketAddr;
use std::ops::DerefMut;

use rustix::io::Errno;

use super::send_buffer::SendBuffer;
use crate::domain::ids::ConnectionKey;

/// An operating system as a shard sees it. Only [`Kernel::enter`] blocks.
pub trait Kernel {
    /// A receive buffer lent by the kernel: the bytes of one receive, borrowed exclusively and
    /// returned to the kernel on drop.
    type Lease: DerefMut<Target = [u8]>;

    /// Monotonic time, ms, as of the last return of [`Kernel::enter`]. The epoch is arbitrary, but
    /// the same for all kernels of a process, and the value is always larger than one day.
    fn now_ms(&self) -> u64;

    /// Unix time, ms, as of the last return of [`Kernel::enter`].
    fn unix_ms(&self) -> u64;

    /// Number of receive buffers. If one `enter` submits more receives than this, some complete
    /// with [`Received::NoBuffers`].
    fn receive_buffers(&self) -> usize;

    /// Accepts one connection into file `connection.slot`, which must be empty. At most
    /// [`ACCEPTS_IN_FLIGHT_MAX`](crate::domain::limits::ACCEPTS_IN_FLIGHT_MAX) at a time.
    fn accept(&mut self, connection: ConnectionKey);

    /// Closes the listener. Each accept in flight still completes, successfully or not. No accept
    /// may follow.
    fn stop_accepting(&mut self);

    /// Polls for data, the peer's end of stream or an error, until cancelled. Edge-triggered: one
    /// completion per arrival.
    fn poll_readable(&mut self, connection: ConnectionKey);

    /// Receives available bytes into a buffer of the kernel's choice. Never waits.
    fn receive(&mut self, connection: ConnectionKey);

    /// Sends as much as fits into the socket's buffer. Never waits: it completes within the next
    /// `enter`, so a stalled reader pins no buffer.
    fn send(&mut self, connection: ConnectionKey, buffer: SendBuffer);

    /// Polls, once, for room in the socket's buffer or an error.
    fn poll_writable(&mut self, connection: ConnectionKey);

    /// Shuts down our half of the stream (FIN) behind the bytes already sent.
    fn shutdown(&mut self, connection: ConnectionKey);

    /// Cancels the polls of this connection. Each still completes one last time.
    fn cancel(&mut self, connection: ConnectionKey);

    /// Closes the socket and empties its file. The caller has nothing else in flight on it.
    fn close(&mut self, connection: ConnectionKey, how: HowToClose);

    /// One system call: submits the queued requests, collects completions and, if there is none,
    /// waits as given. It may return early.
    ///
    /// # Errors
    /// The ring has failed and cannot be used any more.
    fn enter(&mut self, wait: Wait) -> io::Result<()>;

    /// The next completion, in the order of the kernel; `None` until the next [`Kernel::enter`].
    fn next_completion(&mut self) -> Option<Completion<Self::Lease>>;
}

/// How long [`Kernel::enter`] may wait while nothing has completed. The doorbell ends any wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Do not wait: there is more to do.
    No,
    /// Until this time of [`Kernel::now_ms`].
    UntilMs(u64),
    /// Until something completes.
    Forever,
}

/// What happens to bytes that the peer has not received yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HowToClose {
    /// The kernel keeps delivering them (within its own timeouts), then sends FIN.
    Orderly,
    /// They are discarded and the peer gets a reset. For peers that stopped reading: their socket
    /// buffers would otherwise outlive the connection.
    Abort,
}

/// A completed request.
#[derive(Debug)]
pub enum Completion<L> {
    /// A client has connected; its socket is file `connection.slot`.
    Accepted {
        /// The key given to [`Kernel::accept`].
        connection: ConnectionKey,
        /// The client's address.
        peer: SocketAddr,
    },
    /// The accept has failed; the file is still empty.
    AcceptFailed {
        /// The key given to [`Kernel::accept`].
        connection: ConnectionKey,
        /// `CANCELED` after [`Kernel::stop_accepting`]; `MFILE`, `NFILE`, `NOBUFS`, `NOMEM`: the
        /// system lacks a resource; others concern one client that is already gone.
        error: Errno,
    },
    /// There is something to receive: data, the end of stream, or an error.
    Readable {
        /// The connection.
        connection: ConnectionKey,
        /// Whether the poll continues. `false`: this was its last completion.
        armed: bool,
        /// The socket has failed. Keep receiving until a receive fails: data that arrived before
        /// the failure may hide it, and no other completion announces it.
        broken: bool,
    },
    /// A receive has completed.
    Received {
        /// The connection.
        connection: ConnectionKey,
        /// The outcome.
        received: Received<L>,
    },
    /// The socket has room again, the poll was cancelled, or the socket has failed. The next send
    /// shows which.
    Writable {
        /// The connection.
        connection: ConnectionKey,
    },
    /// A send has completed.
    Sent {
        /// The connection.
        connection: ConnectionKey,
        /// The buffer given to [`Kernel::send`].
        buffer: SendBuffer,
        /// Number of bytes that the socket took, possibly fewer than given. `AGAIN`: none, the
        /// socket is full. `NOBUFS`, `NOMEM`: none, the system lacks memory for the moment. `PIPE`, `CONNRESET` and
        /// others: the connection is broken.
        result: Result<usize, Errno>,
    },
    /// Our half of the stream is shut down, or the connection is gone already.
    ShutDown {
        /// The connection.
        connection: ConnectionKey,
    },
    /// The cancel has completed. The cancelled polls complete separately, before or after it.
    Cancelled {
        /// The connection.
        connection: ConnectionKey,
    },
    /// The socket is closed and its file is empty.
    Closed {
        /// The connection.
        connection: ConnectionKey,
    },
}

/// The outcome of a receive.
#[derive(Debug)]
pub enum Received<L> {
    /// At least one byte.
    Bytes {
        /// The bytes.
        lease: L,
        /// Whether the socket holds more bytes, or its end of stream. No further
        /// [`Completion::Readable`] announces those.
        more: bool,
    },
    /// The peer has shut down its half of the stream (FIN).
    End,
    /// There was nothing to receive.
    Nothing,
    /// All receive buffers are lent, or the system lacks memory. Nothing is lost; receive again once some are returned.
    NoBuffers,
    /// The connection is broken.
    Failed(Errno),
}
