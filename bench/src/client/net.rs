//! Sockets that are connected without waiting, from as many source addresses as it takes.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_nodelay;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

/// Connections from one source address: the system has some 28,000 ports for each.
const PER_SOURCE: usize = 15_000;

/// The source address of session `index`: 127.0.1.1 and on.
pub(super) fn source_of(index: usize) -> Ipv4Addr {
    let number = u32::try_from(index / PER_SOURCE).expect("few sources") + 256 + 1;
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 0, 0, 0)) + number)
}

/// Begins to connect session `index`.
pub(super) fn begin(server: SocketAddr, index: usize) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    if server.ip().is_loopback() {
        bind(&socket, &SocketAddrV4::new(source_of(index), 0))?;
    }
    set_tcp_nodelay(&socket, true)?;
    match connect(&socket, &server) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_loopback_and_change_in_time() {
        assert_eq!(source_of(0), Ipv4Addr::new(127, 0, 1, 1));
        assert_eq!(source_of(PER_SOURCE), Ipv4Addr::new(127, 0, 1, 2));
        assert!(source_of(1_000_000).is_loopback());
    }
}
