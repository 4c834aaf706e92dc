//! Non-blocking connects from several source addresses.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_tcp_nodelay};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

/// Connections per source address: few enough that the system finds a free port quickly.
const PER_SOURCE: usize = 2_000;
/// Source addresses per process. The next process uses others, because the ports of closed connections
/// stay in TIME_WAIT for a minute.
const SOURCES: u32 = 1 << 12;
/// 127.0.0.0/8 without its first addresses.
const FIRST: u32 = (127 << 24) + 256;

/// Source address of connection `number` of a process.
pub(super) fn source_of(process: u32, number: usize) -> Ipv4Addr {
    let number = (number / PER_SOURCE) as u32 % (SOURCES - 1);
    Ipv4Addr::from(FIRST + process % (SOURCES - 1) * SOURCES + number)
}

/// Begins connection `number` of this process.
pub(crate) fn begin(
    server: SocketAddr,
    number: usize,
    receive_buffer_bytes: usize,
) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    if server.ip().is_loopback() {
        let source = source_of(std::process::id(), number);
        bind(&socket, &SocketAddrV4::new(source, 0))?;
    }
    set_tcp_nodelay(&socket, true)?;
    if receive_buffer_bytes > 0 {
        set_socket_recv_buffer_size(&socket, receive_buffer_bytes)?;
    }
    match connect(&socket, &server) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_loopback_and_change_with_the_number() {
        assert_eq!(source_of(0, 0), Ipv4Addr::new(127, 0, 1, 0));
        assert_eq!(source_of(0, PER_SOURCE), Ipv4Addr::new(127, 0, 1, 1));
        assert_ne!(source_of(1, 0), source_of(2, 0));
        assert!(source_of(u32::MAX, usize::MAX).is_loopback());
    }
}
