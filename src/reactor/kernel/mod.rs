//! What the shard asks of an operating system, and what it is told: sockets and time, nothing
//! else. The shard is generic over [`Kernel`], so the same code runs on io_uring and on a
//! simulated kernel that a seed drives through every fault.
//!
//! ```text
//!   shard                         kernel
//!   ─────                         ──────
//!   accept(key)         ───────►  Accepted{key, peer} | AcceptFailed{key}
//!   poll_readable(key)  ───────►  Readable{key, armed: true} … Readable{key, armed: false}
//!   receive(key)        ───────►  Received{key, Data(lease) | End | NoBuffers | …}
//!   send(key, buffer)   ───────►  Sent{key, buffer, result}
//!   poll_writable(key)  ───────►  Writable{key}
//!   shutdown(key)       ───────►  ShutDown{key}
//!   cancel(key)         ───────►  Cancelled{key}, and the end of every poll of this key
//!   close(key, how)     ───────►  Closed{key}
//! ```
//!
//! Requests are queued and leave with the next [`Kernel::enter`]; each is answered by exactly one
//! completion that names its connection (`poll_readable` by any number with `armed: true` and one
//! last). At most one request of each kind is in flight per connection: the caller's duty, asserted
//! by both kernels. The slot of the key is also the number of the socket in the kernel's file
//! table, so there is no second table to look into.

pub mod simulated;
mod uring;

use std::io;
use std::net::SocketAddr;
use std::ops::DerefMut;

use rustix::io::Errno;

use crate::domain::ids::ConnectionKey;
use crate::reactor::outgoing::SendBuffer;

pub use uring::UringKernel;

/// An operating system as a shard sees it. Nothing here blocks but [`Kernel::enter`].
pub trait Kernel {
    /// A receive buffer lent by the kernel: the bytes of one receive, exclusively ours, handed back
    /// when dropped.
    type Lease: DerefMut<Target = [u8]>;

    /// Monotonic time, ms, as of the last return of [`Kernel::enter`]. Its zero means nothing, but
    /// is far enough from 0 that a day can be subtracted.
    fn now_ms(&self) -> u64;

    /// Unix time, ms, as of the last return of [`Kernel::enter`].
    fn unix_ms(&self) -> u64;

    /// Receive buffers there are. More receives than this in one `enter` find none.
    fn receive_buffers(&self) -> usize;

    /// Accepts one connection as file number `connection.slot`, which is empty.
    fn accept(&mut self, connection: ConnectionKey);

    /// Closes the listener. Each accept in flight still completes, failed or not.
    fn stop_accepting(&mut self);

    /// Watches for data, the peer's end of stream, or an error, until cancelled. Edge-triggered:
    /// one completion for every arrival.
    fn poll_readable(&mut self, connection: ConnectionKey);

    /// Receives what is there into a buffer of the kernel's choice. Never waits.
    fn receive(&mut self, connection: ConnectionKey);

    /// Sends as much as fits into the socket's buffer. Never waits: it completes within the next
    /// `enter`, so a stalled reader holds no buffer.
    fn send(&mut self, connection: ConnectionKey, buffer: SendBuffer);

    /// Watches, once, for room in the socket's buffer (or an error).
    fn poll_writable(&mut self, connection: ConnectionKey);

    /// Ends our half of the stream (FIN) after what was sent.
    fn shutdown(&mut self, connection: ConnectionKey);

    /// Ends the polls of this connection; each completes for the last time.
    fn cancel(&mut self, connection: ConnectionKey);

    /// Closes the socket and empties its place in the file table. The caller has nothing else in
    /// flight on it.
    fn close(&mut self, connection: ConnectionKey, how: HowToClose);

    /// One system call: submits what was requested, collects what has completed, and, if nothing
    /// has, waits as told. May return early.
    ///
    /// # Errors
    /// The ring itself has failed: the shard cannot go on.
    fn enter(&mut self, wait: Wait) -> io::Result<()>;

    /// The next thing that has happened, in the order of the kernel.
    fn next_completion(&mut self) -> Option<Completion<Self::Lease>>;
}

/// How long [`Kernel::enter`] may wait if nothing has completed. A ring of the doorbell ends any
/// wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: there is more to do.
    No,
    /// Until this time of [`Kernel::now_ms`].
    UntilMs(u64),
    /// As long as it takes.
    Forever,
}

/// What happens to what the peer has not yet taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HowToClose {
    /// The kernel goes on delivering it (within its own timeouts), then FIN.
    Orderly,
    /// It is discarded and the peer gets a reset: for peers that stopped reading, whose socket
    /// buffers would otherwise outlive the connection.
    Abort,
}

/// What has happened.
#[derive(Debug)]
pub enum Completion<L> {
    /// A client has connected and is file number `connection.slot`.
    Accepted {
        /// The key given to [`Kernel::accept`].
        connection: ConnectionKey,
        /// The client's address.
        peer: SocketAddr,
    },
    /// No client on this one: the place in the file table is still empty.
    AcceptFailed {
        /// The key given to [`Kernel::accept`].
        connection: ConnectionKey,
        /// `CANCELED` after [`Kernel::stop_accepting`]; `MFILE`, `NFILE`, `NOBUFS`, `NOMEM`: the
        /// system is short of something; others concern one client that is gone already.
        error: Errno,
    },
    /// There is something to receive: data, the end, or an error.
    Readable {
        /// Which connection.
        connection: ConnectionKey,
        /// Whether the watch goes on; if not, this was its last completion.
        armed: bool,
        /// The socket has failed: receives must go on until one says so, because what came before
        /// the failure may hide it and nothing announces it again.
        broken: bool,
    },
    /// A receive has completed.
    Received {
        /// Which connection.
        connection: ConnectionKey,
        /// With what.
        received: Received<L>,
    },
    /// The socket's buffer has room again, or the watch was cancelled, or the socket has failed:
    /// a send tells.
    Writable {
        /// Which connection.
        connection: ConnectionKey,
    },
    /// A send has completed.
    Sent {
        /// Which connection.
        connection: ConnectionKey,
        /// What was given to [`Kernel::send`].
        buffer: SendBuffer,
        /// How many bytes of it the socket took, perhaps not all; `AGAIN`: none now; `PIPE`,
        /// `CONNRESET` and others: the connection is broken.
        result: Result<usize, Errno>,
    },
    /// Our half of the stream is ended, or the peer has ended everything already.
    ShutDown {
        /// Which connection.
        connection: ConnectionKey,
    },
    /// The polls that were armed have been told to end; their last completions come on their own,
    /// before or after this.
    Cancelled {
        /// Which connection.
        connection: ConnectionKey,
    },
    /// The place in the file table is empty.
    Closed {
        /// Which connection.
        connection: ConnectionKey,
    },
}

/// The outcome of a receive.
#[derive(Debug)]
pub enum Received<L> {
    /// At least one byte.
    Data {
        /// The bytes.
        lease: L,
        /// Whether the socket had more than fitted, or its end: no further
        /// [`Completion::Readable`] comes for that.
        more: bool,
    },
    /// The peer has ended its half of the stream.
    End,
    /// Nothing was there.
    Nothing,
    /// All buffers are lent. Nothing is lost; ask again when some are home.
    NoBuffers,
    /// The connection is broken.
    Failed(Errno),
}
