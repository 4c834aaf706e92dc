//! The ports of a node.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::time::{Instant, sleep};

use super::Addresses;
use super::admin_socket::{self, SocketFile};
use crate::app::config::Settings;
use crate::reactor::listener::{ListenError, ListenerConfig, listen_on};

/// How long an address may be in use at start, and how often it is tried.
const IN_USE_MAX: Duration = Duration::from_secs(3);
const IN_USE_RETRY: Duration = Duration::from_millis(20);

/// The listening sockets. They are bound first, so that a port in use is reported at once.
pub(super) struct Ports {
    pub(super) shards: OwnedFd,
    pub(super) admin: TcpListener,
    pub(super) admin_socket: Option<(UnixListener, SocketFile)>,
    pub(super) grpc: Option<TcpListener>,
    pub(super) addresses: Addresses,
}

impl Ports {
    /// Listens on all of them. `ip`: the address if a setting gives a port only.
    ///
    /// # Errors
    /// A port cannot be listened on. The text names the setting, with an example.
    pub(super) async fn bind(settings: &Settings, ip: IpAddr) -> Result<Self, String> {
        let mut public = ListenerConfig::new(settings.http_port.or(ip));
        public.shared = settings.http_port_shared;
        let send_buffer = (settings.so_sndbuf.0 > 0).then(|| settings.so_sndbuf.bytes());
        public.send_buffer_bytes = send_buffer;
        let (shards, websocket) =
            listen("HTTP_PORT", &public).await.map_err(|error| {
                let example = settings.http_port.port.saturating_add(1);
                let taken = error.source.kind() == io::ErrorKind::AddrInUse;
                let shared = if taken && !settings.http_port_shared {
                    "\n      or HTTP_PORT_SHARED=true, if it is another node that may get half of the clients"
                } else {
                    ""
                };
                format!("HTTP_PORT: {error}\n      example: HTTP_PORT={example}{shared}")
            })?;
        let admin = bind("HTTP_ADDR", settings.http_addr.or(ip), None).await?;
        let admin_socket = match &settings.admin_socket {
            Some(path) => Some(admin_socket::listen(path, settings.admin_socket_mode).await?),
            None => None,
        };
        let grpc = match settings.grpc_addr {
            Some(address) => Some(bind("GRPC_ADDR", address.or(ip), send_buffer).await?),
            None => None,
        };
        let addresses = Addresses {
            websocket,
            admin: local(&admin),
            grpc: grpc.as_ref().map(local),
            is_secure: settings.has_tls(),
        };
        Ok(Self { shards, admin, admin_socket, grpc, addresses })
    }
}

/// Listens on an address. If it is in use, that may be over soon: the kernel frees the sockets of a process that was killed
/// behind its back, and a connection of another program may have the port for a moment.
async fn listen(
    setting: &str,
    config: &ListenerConfig,
) -> Result<(OwnedFd, SocketAddr), ListenError> {
    let until = Instant::now() + IN_USE_MAX;
    let mut is_told = false;
    loop {
        match listen_on(config) {
            Err(error)
                if error.source.kind() == io::ErrorKind::AddrInUse && Instant::now() < until =>
            {
                if !std::mem::replace(&mut is_told, true) {
                    let (address, seconds) = (config.address, IN_USE_MAX.as_secs());
                    tracing::warn!("{setting}: {address} is in use; trying again for {seconds} s");
                }
                sleep(IN_USE_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

async fn bind(
    setting: &str,
    address: SocketAddr,
    send_buffer_bytes: Option<usize>,
) -> Result<TcpListener, String> {
    let config =
        ListenerConfig { send_buffer_bytes, joinable: false, ..ListenerConfig::new(address) };
    let (socket, _) = listen(setting, &config).await.map_err(|error| {
        let taken = error.source.kind() == io::ErrorKind::AddrInUse;
        let hint = if taken { "; port 0 takes any free port" } else { "" };
        let example = address.port().saturating_add(if taken { 1 } else { 0 });
        format!("{setting}: {error}{hint}\n      example: {setting}={example}")
    })?;
    let listener = std::net::TcpListener::from(socket);
    let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
    listener.map_err(|error| format!("{setting}: cannot listen on {address}: {error}"))
}

fn local(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound socket has an address")
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::socket_send_buffer_size;

    use super::*;
    use crate::app::config::dev_settings;

    #[tokio::test]
    async fn sockets_of_clients_have_the_send_buffer_of_the_setting() {
        let flags =
            [("so_sndbuf", "50000"), ("http_port", "0"), ("http_addr", "0"), ("grpc_addr", "0")];
        let ports = Ports::bind(&dev_settings(&flags), [127, 0, 0, 1].into()).await.unwrap();
        // The kernel doubles it. Accepted sockets inherit it.
        assert_eq!(socket_send_buffer_size(&ports.shards).unwrap(), 100_000);
        assert_eq!(socket_send_buffer_size(ports.grpc.unwrap()).unwrap(), 100_000);
    }
}
