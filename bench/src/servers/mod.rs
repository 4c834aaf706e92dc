//! The comparison servers: the same task and protocol, each written as is usual for its kind. They obey
//! the words of [`Word`](crate::control::Word).

mod bare;
mod epoll;
mod rings;
mod table;
mod tokio_tungstenite;
mod tokio_uring_tungstenite;

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use clap::ValueEnum;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio_rustls::TlsAcceptor;

use self::tokio_tungstenite::Buffers;
use crate::ours::own_server_config;

/// A comparison server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A bare io_uring: the limit.
    Bare,
    /// epoll and `send(2)`.
    Epoll,
    /// tokio, a task per connection, tungstenite.
    Tokio,
    /// The same with the default buffers of tungstenite.
    TokioDefaults,
    /// The same as `tokio`, over TLS with tokio-rustls.
    TokioTls,
    /// tokio-uring, a task per connection, tungstenite.
    TokioUring,
}

/// Runs a server until its standard input ends. `capacity`: maximum of sessions. `park`: the bare server
/// keeps its sockets in file tables of its rings, so that there can be more sessions than descriptors.
///
/// # Errors
/// A system call failed.
pub fn run(kind: Kind, capacity: usize, park: bool) -> io::Result<()> {
    let listener = listen()?;
    match kind {
        Kind::Bare => epoll::run(listener, capacity, epoll::Engine::Uring, park),
        Kind::Epoll => epoll::run(listener, capacity, epoll::Engine::Send, false),
        Kind::Tokio => tokio_tungstenite::run(listener, capacity, Buffers::Small, None),
        Kind::TokioDefaults => tokio_tungstenite::run(listener, capacity, Buffers::Defaults, None),
        Kind::TokioTls => {
            let tls = TlsAcceptor::from(Arc::new(own_server_config()?));
            tokio_tungstenite::run(listener, capacity, Buffers::Small, Some(tls))
        }
        Kind::TokioUring => tokio_uring_tungstenite::run(listener, capacity),
    }
}

/// Listens on a free port, with Delivery's backlog and send buffer.
fn listen() -> io::Result<TcpListener> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 128 * 1024)?;
    rustix::net::bind(&socket, &std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0))?;
    rustix::net::listen(&socket, 4096)?;
    let listener = TcpListener::from(socket);
    crate::control::answer(&crate::control::Ready::here(&listener.local_addr()?));
    Ok(listener)
}
