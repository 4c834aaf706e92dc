//! The listening socket, from which all shards accept. The kernel wakes one of them for each client, in turn.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::{
    set_ipv6_v6only, set_socket_reuseaddr, set_socket_reuseport, set_socket_send_buffer_size,
    set_tcp_nodelay,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with};

/// Settings of the listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerConfig {
    /// The address. Port 0 is replaced by a free port. The unspecified
    /// IPv6 address accepts IPv4 clients too.
    pub address: SocketAddr,
    /// Kernel memory for unread output of one connection (`SO_SNDBUF`), bytes. The kernel doubles
    /// it for its own bookkeeping. `None`: the system's default, which grows to megabytes for a
    /// client that does not read.
    pub send_buffer_bytes: Option<usize>,
    /// Clients that wait to be accepted. The system caps it (`net.core.somaxconn`).
    pub backlog: i32,
    /// Whether other processes of this user may already listen on the address. The kernel then
    /// distributes the clients among all processes.
    pub shared: bool,
    /// Whether other processes of this user, which share, may listen on the address from now on.
    pub joinable: bool,
}

impl ListenerConfig {
    /// Defaults: 128 KiB of unread output, a backlog of 65,536 clients, an address of our own that others may join.
    pub fn new(address: SocketAddr) -> Self {
        let (send_buffer_bytes, backlog) = (Some(128 * 1024), 65_536);
        Self { address, send_buffer_bytes, backlog, shared: false, joinable: true }
    }
}

/// The address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}{}", hint(source))]
pub struct ListenError {
    /// The address.
    pub address: SocketAddr,
    /// The error of the system.
    #[source]
    pub source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => " (another process listens there; choose another port)",
        io::ErrorKind::AddrNotAvailable => " (no interface of this machine has that address)",
        io::ErrorKind::PermissionDenied => " (ports below 1024 need CAP_NET_BIND_SERVICE)",
        _ => "",
    }
}

/// The unspecified address of all families that the system has: IPv6, which includes IPv4, or IPv4 alone.
pub fn any_address() -> IpAddr {
    match socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None) {
        Ok(_) => Ipv6Addr::UNSPECIFIED.into(),
        Err(_) => Ipv4Addr::UNSPECIFIED.into(),
    }
}

/// Opens the listening socket and returns its address. The options are set here because accepted sockets inherit them.
///
/// # Errors
/// The address cannot be listened on.
pub fn listen_on(config: &ListenerConfig) -> Result<(OwnedFd, SocketAddr), ListenError> {
    try_listen(config)
        .map_err(|source| ListenError { address: config.address, source: source.into() })
}

fn try_listen(config: &ListenerConfig) -> rustix::io::Result<(OwnedFd, SocketAddr)> {
    let family = match config.address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_reuseaddr(&socket, true)?;
    set_socket_reuseport(&socket, config.shared)?;
    if config.address.is_ipv6() {
        set_ipv6_v6only(&socket, false)?;
    }
    set_tcp_nodelay(&socket, true)?;
    if let Some(bytes) = config.send_buffer_bytes {
        set_socket_send_buffer_size(&socket, bytes)?;
    }
    bind(&socket, &config.address)?;
    listen(&socket, config.backlog)?;
    // A socket that may not share its address at `bind` and `listen` is refused if any other listens
    // there, one with `SO_REUSEPORT` too. From here on another node that shares may join it.
    set_socket_reuseport(&socket, config.joinable)?;
    let address = SocketAddr::try_from(getsockname(&socket)?)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt::{socket_send_buffer_size, tcp_nodelay};
    use std::net::{TcpListener, TcpStream};

    fn loopback() -> ListenerConfig {
        ListenerConfig::new("127.0.0.1:0".parse().unwrap())
    }

    #[test]
    fn accepted_sockets_inherit_the_options() {
        let config = ListenerConfig { send_buffer_bytes: Some(50_000), ..loopback() };
        let (listener, address) = listen_on(&config).unwrap();
        let _client = TcpStream::connect(address).unwrap();
        let (accepted, _) = TcpListener::from(listener).accept().unwrap();
        assert!(tcp_nodelay(&accepted).unwrap());
        assert_eq!(socket_send_buffer_size(&accepted).unwrap(), 100_000);
    }

    #[test]
    fn dual_stack_accepts_both_families() {
        let config = ListenerConfig::new("[::]:0".parse().unwrap());
        let Ok((_listener, address)) = listen_on(&config) else {
            return; // no IPv6 on this machine
        };
        TcpStream::connect(("127.0.0.1", address.port())).unwrap();
    }

    #[test]
    fn address_of_another_node_is_shared_only_if_wanted() {
        let (first, address) = listen_on(&loopback()).unwrap();
        let config = ListenerConfig::new(address);
        let error = listen_on(&config).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
        listen_on(&ListenerConfig { shared: true, ..config }).unwrap();
        drop(first);
        listen_on(&config).unwrap();
    }

    /// Whoever starts at the same time, one of them wins.
    #[test]
    fn nodes_that_start_together_do_not_share_an_address() {
        let (held, address) = listen_on(&loopback()).unwrap();
        drop(held);
        for _ in 0..20 {
            let starts = [(); 4]
                .map(|()| std::thread::spawn(move || listen_on(&ListenerConfig::new(address))));
            let ends = starts.map(|start| start.join().unwrap());
            assert!(ends.iter().filter(|end| end.is_ok()).count() <= 1);
        }
    }

    #[test]
    fn taken_port_is_named_in_the_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = listen_on(&ListenerConfig::new(address)).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("another"), "{error}");
    }
}
