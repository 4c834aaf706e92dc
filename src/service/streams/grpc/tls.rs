//! TLS on the gRPC port: HTTP/2 over TLS 1.3, agreed on by ALPN (RFC 9113 §3.2).
//!
//! ```text
//!  ClientHello ──► does it offer h2? ──► wait for a turn ──► sign ──► Finished of the client ──► HTTP/2
//!  └─────────────── on the threads for handshakes ──────────────────────────────────────────┘
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::server::Acceptor;
use rustls::{HandshakeKind, ServerConfig};
use tokio::io::AsyncWriteExt as _;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::socket::TcpSocket;
use crate::service::tls::TlsCounters;
use crate::service::tls::failure::TlsFailure;
use crate::service::tls::threads::HandshakeThreads;

/// The protocol of the port.
pub const ALPN: &[u8] = b"h2";

/// Records that wait for the socket, bytes. More makes HTTP/2 wait.
const UNSENT_RECORDS_BYTES: usize = 32 * 1024;
/// Memory of TLS on one connection, bytes: these records, what has come of one record or handshake message (rustls takes
/// up to 64 KiB), what was decrypted of it (16 KiB), and 16 KiB for the state of the connection.
pub const TLS_BYTES_MAX: u64 = UNSENT_RECORDS_BYTES as u64 + (64 + 16 + 16) * 1024;

/// The alert `no_application_protocol` (RFC 7301 §3.2) as a record that is not encrypted, as all are before the
/// ServerHello: type 21, version, 2 bytes, fatal, 120.
const NO_APPLICATION_PROTOCOL: [u8; 7] = [21, 3, 3, 0, 2, 2, 120];

/// How the port makes handshakes.
#[derive(Debug)]
pub struct GrpcTls {
    config: Arc<ServerConfig>,
    pub(super) threads: HandshakeThreads,
    counters: Arc<TlsCounters>,
}

impl GrpcTls {
    /// `config`: with [`ALPN`].
    pub fn new(
        config: ServerConfig,
        threads: HandshakeThreads,
        counters: Arc<TlsCounters>,
    ) -> Arc<Self> {
        Arc::new(Self { config: Arc::new(config), threads, counters })
    }

    /// Makes a handshake, and counts it unless the future is dropped. Half of `time` is for waiting for a turn.
    ///
    /// # Errors
    /// There was none.
    pub(super) async fn accept(
        self: &Arc<Self>,
        socket: TcpSocket,
        time: Duration,
    ) -> Result<TlsStream<TcpSocket>, TlsFailure> {
        let this = Arc::clone(self);
        let made = self.threads.run(async move { this.handshake(socket, time / 2).await }).await;
        let outcome = made.unwrap_or(Err(TlsFailure::Other));
        match &outcome {
            Ok(stream) => match stream.get_ref().1.handshake_kind() {
                Some(HandshakeKind::Resumed) => self.counters.handshakes_resumed.add(1),
                _ => self.counters.handshakes_full.add(1),
            },
            Err(failure) => failure.count(&self.counters),
        }
        outcome
    }

    async fn handshake(
        &self,
        socket: TcpSocket,
        patience: Duration,
    ) -> Result<TlsStream<TcpSocket>, TlsFailure> {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), socket).await;
        let mut hello = hello.map_err(|error| failed(&error))?;
        // A client may leave ALPN out, which rustls lets pass.
        if hello.client_hello().alpn().is_none() {
            tracing::debug!("TLS handshake failed: the client does not offer {ALPN:?} by ALPN");
            // An error means that the client is gone.
            let _ = hello.io.write_all(&NO_APPLICATION_PROTOCOL).await;
            return Err(TlsFailure::Protocol);
        }
        let Some(turn) = self.threads.turn(patience).await else { return Err(TlsFailure::Busy) };
        let limit = |tls: &mut rustls::ServerConnection| {
            tls.set_buffer_limit(Some(UNSENT_RECORDS_BYTES));
        };
        // Signs.
        let signed = hello.into_stream_with(Arc::clone(&self.config), limit);
        drop(turn);
        signed.await.map_err(|error| failed(&error))
    }
}

fn failed(error: &io::Error) -> TlsFailure {
    tracing::debug!("TLS handshake failed: {error}");
    error.into()
}
