//! Settings of the connections to Redis.

use std::time::Duration;

use redis::{AsyncConnectionConfig, Client, ConnectionInfo, RedisResult, TlsCertificates};

use super::address::RedisAddress;
use crate::service::runtime::backoff::Backoff;

/// Settings of a link.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// The server, the Sentinels or the cluster.
    pub address: RedisAddress,
    /// Trusted roots for `rediss`, PEM; `None`: the public web's.
    pub root_certificates: Option<Vec<u8>>,
    /// Time to establish a connection, handshake included.
    pub connect_timeout: Duration,
    /// Time for all answers to one call.
    pub response_timeout: Duration,
    /// Interval of probes while Redis serves. Otherwise the delays of `backoff` apply.
    pub probe_interval: Duration,
    /// Delays between attempts to connect.
    pub backoff: Backoff,
}

impl RedisConfig {
    /// Defaults: 1 s to connect, 500 ms for answers, a probe every 5 s, 100 ms to 5 s (plus up to
    /// half of it) between attempts.
    pub fn new(address: RedisAddress) -> Self {
        Self {
            address,
            root_certificates: None,
            connect_timeout: Duration::from_secs(1),
            response_timeout: Duration::from_millis(500),
            probe_interval: Duration::from_secs(5),
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5))
                .with_jitter(1.0, 1.5),
        }
    }

    /// A client for one node with these settings.
    pub(super) fn client(&self, node: ConnectionInfo) -> RedisResult<Client> {
        match (&self.root_certificates, node.addr()) {
            (Some(roots), redis::ConnectionAddr::TcpTls { .. }) => {
                Client::build_with_tls(node, certificates(roots))
            }
            _ => Client::open(node),
        }
    }

    /// The time limits of a connection to one server.
    pub(super) fn connection_settings(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(self.response_timeout))
    }
}

pub(super) fn certificates(roots: &[u8]) -> TlsCertificates {
    TlsCertificates { client_tls: None, root_cert: Some(roots.to_vec()) }
}
