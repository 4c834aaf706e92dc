//! What the kernel answered.

use std::net::SocketAddr;

use rustix::io::Errno;

use super::buffers::Lease;
use crate::domain::ids::ConnectionKey;
use crate::domain::outgoing::SendBuffer;

/// The outcome of a receive.
#[derive(Debug)]
pub enum Received {
    /// Bytes came; `more`: the socket holds further ones (or its end), so receive again.
    Bytes {
        /// The bytes, at least one.
        lease: Lease,
        /// Whether the socket was left with something to read.
        more: bool,
    },
    /// The peer will send nothing more (FIN).
    End,
    /// Nothing to read just now: wait for the next [`Completion::Readable`].
    Nothing,
    /// All receive buffers are lent: give some back, then receive again. Nothing is lost.
    NoBuffer,
    /// The socket failed, or the receive was cancelled ([`Errno::CANCELED`]).
    Failed(Errno),
}

/// One completion. Operations on a connection name it by the key they were given, which may be an
/// older generation than the slot's present one.
#[derive(Debug)]
pub enum Completion {
    /// An accept ended: the socket is in the fixed file of the key's slot.
    Accepted {
        /// As given to the accept.
        connection: ConnectionKey,
        /// The peer's address.
        result: Result<SocketAddr, Errno>,
    },
    /// The socket has become readable, or has ended or failed: receive.
    Readable {
        /// The connection.
        connection: ConnectionKey,
        /// `false`: the watch has ended and must be renewed to learn more.
        watching: bool,
        /// The socket has failed: receives go on until one says how.
        broken: bool,
        /// An error of the watch itself ([`Errno::CANCELED`] after a cancel).
        result: Result<(), Errno>,
    },
    /// A receive ended.
    Received {
        /// The connection.
        connection: ConnectionKey,
        /// How.
        outcome: Received,
    },
    /// A send ended.
    Sent {
        /// The connection.
        connection: ConnectionKey,
        /// What was sent from, given back.
        buffer: SendBuffer,
        /// Bytes sent, possibly fewer than asked. [`Errno::AGAIN`]: none, the socket is full.
        result: Result<usize, Errno>,
    },
    /// The socket takes bytes again, or has failed: send.
    Writable {
        /// The connection.
        connection: ConnectionKey,
        /// An error of the wait itself ([`Errno::CANCELED`] after a cancel).
        result: Result<(), Errno>,
    },
    /// A cancel ended. What it cancelled completes by itself, before or after.
    Cancelled {
        /// The connection.
        connection: ConnectionKey,
    },
    /// A shutdown ended.
    ShutDown {
        /// The connection.
        connection: ConnectionKey,
        /// Fails if the peer is gone already.
        result: Result<(), Errno>,
    },
    /// The fixed file is free.
    Closed {
        /// The connection.
        connection: ConnectionKey,
        /// An error means that there was no file: a fault of ours.
        result: Result<(), Errno>,
    },
    /// The doorbell was rung.
    Rung,
}
