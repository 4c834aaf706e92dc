//! TLS for the ports of clients: certificates, session tickets, and how both are used in a handshake.
//!
//! Only TLS 1.3 (RFC 8446): `docs/tls.md` says why.

pub mod certificates;
pub mod failure;
pub mod handshake;
pub mod handshaker;
#[cfg(test)]
pub(crate) mod testing;
pub mod threads;
pub mod tickets;

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::{ServerConfig, version};

use tickets::Tickets;

/// Tickets for each handshake. A client that uses up one in a handshake that fails, as many do in a storm of reconnects,
/// has another one.
const TICKETS_PER_HANDSHAKE: usize = 2;

/// How handshakes are made: TLS 1.3 only, without early data (0-RTT), without client certificates. `alpn`: the protocols
/// of the port (RFC 7301), the preferred one first.
///
/// The client's order of ciphers counts: clients without instructions for AES put ChaCha20 first.
pub fn server_config(
    certificates: Arc<dyn ResolvesServerCert>,
    tickets: Arc<Tickets>,
    alpn: &[&[u8]],
) -> ServerConfig {
    let suites = [
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    let provider = CryptoProvider { cipher_suites: suites.to_vec(), ..default_provider() };
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&version::TLS13])
        .expect("the suites are those of TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.ticketer = tickets;
    config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    config
}

crate::counters! {
    /// Counters of the handshakes of one port.
    pub struct TlsCounters of SharedCounter {
        Counter handshakes_full: "TLS handshakes with a signature",
        Counter handshakes_resumed: "TLS handshakes with a ticket, without a signature",
        Counter failed_not_tls: "Connections that sent something other than TLS",
        Counter failed_version: "TLS handshakes with clients that do not offer TLS 1.3",
        Counter failed_incompatible: "TLS handshakes with clients that offer no usable cipher, group or signature",
        Counter failed_protocol: "TLS handshakes with clients that do not offer the protocol of the port (ALPN)",
        Counter failed_by_client: "TLS handshakes ended by an alert of the client, for example because it does not trust the certificate",
        Counter failed_gone: "Connections that ended during the TLS handshake",
        Counter failed_busy: "TLS handshakes not made because too many waited for a signature",
        Counter failed_other: "TLS handshakes with messages that are not valid, and other failures",
    }
}

#[cfg(test)]
mod tests;
