//! The port with TLS.

use std::io::ErrorKind;
use std::sync::Mutex;
use std::thread;

use h2::Ping;
use rustls::pki_types::ServerName;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ClientConfig, Error, RootCertStore, version};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket as TokioSocket;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Certificate, ClientTlsConfig};

use super::super::socket::TcpSocket;
use super::limits::PREFACE;
use super::*;
use crate::service::tls::certificates::Certificates;
use crate::service::tls::failure::TlsFailure;
use crate::service::tls::testing::TestAuthority;
use crate::service::tls::threads::HandshakeThreads;
use crate::service::tls::tickets::Tickets;
use crate::service::tls::{TlsCounters, server_config};

const NAME: &str = "chat.test";
/// The server answers each one with as many bytes.
const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\x0012345678";

/// TLS of a port, and an authority that its clients trust.
pub(super) struct TestTls {
    pub(super) port: Arc<GrpcTls>,
    authority: TestAuthority,
    certificates: Arc<ObservedCertificates>,
    counters: Arc<TlsCounters>,
}

/// A channel to a port with this TLS.
pub(super) async fn channel(tls: Option<&TestTls>, address: SocketAddr) -> Channel {
    match tls {
        Some(tls) => tls.channel(address),
        None => super::channel(address).await,
    }
}

/// Remembers on which threads certificates were chosen. The same step makes the signature.
#[derive(Debug)]
struct ObservedCertificates {
    inner: Certificates,
    threads: Mutex<Vec<Option<String>>>,
}

impl ResolvesServerCert for ObservedCertificates {
    fn resolve(&self, client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.threads.lock().unwrap().push(thread::current().name().map(str::to_owned));
        self.inner.resolve(client)
    }
}

impl TestTls {
    fn new() -> Self {
        let authority = TestAuthority::new("authority");
        let inner = Certificates::new(&[authority.pair(&[NAME])]);
        let certificates = Arc::new(ObservedCertificates { inner, threads: Mutex::default() });
        let tickets = Arc::new(Tickets::new(&[], || 0));
        let resolver = Arc::clone(&certificates);
        let config = server_config(resolver, tickets, &[ALPN]);
        let counters = Arc::new(TlsCounters::default());
        let threads = HandshakeThreads::start(1).unwrap();
        let port = GrpcTls::new(config, threads, Arc::clone(&counters));
        Self { port, authority, certificates, counters }
    }

    async fn open(&self, config: GrpcConfig) -> Port {
        let limits = ConnectionLimits::default();
        Port::start(config, HubConfig::default(), limits, true, Some(self)).await
    }

    /// Connects when it is used.
    fn channel(&self, address: SocketAddr) -> Channel {
        let authority = Certificate::from_pem(self.authority.pem());
        let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name(NAME);
        let channel = Channel::from_shared(format!("https://{address}")).unwrap();
        channel.tls_config(tls).unwrap().connect_lazy()
    }

    fn client(&self, alpn: &[&[u8]]) -> ClientConfig {
        self.client_of(alpn, &version::TLS13)
    }

    fn client_of(
        &self,
        alpn: &[&[u8]],
        version: &'static rustls::SupportedProtocolVersion,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.certificate().der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(&[version]).unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config
    }
}

async fn connect(
    config: &Arc<ClientConfig>,
    address: SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TokioSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let stream = socket.connect(address).await.unwrap();
    let name = ServerName::try_from(NAME).unwrap();
    TlsConnector::from(Arc::clone(config)).connect(name, stream).await
}

/// Connects and waits for the answer to a ping.
async fn ping(config: &Arc<ClientConfig>, address: SocketAddr) {
    let stream = connect(config, address).await.unwrap();
    let (_client, mut http2) = h2::client::handshake(stream).await.unwrap();
    let mut pings = http2.ping_pong().unwrap();
    tokio::select! {
        pong = pings.ping(Ping::opaque()) => drop(pong.unwrap()),
        ended = http2 => panic!("{ended:?}"),
    }
}

#[tokio::test]
async fn session_over_tls_stays_while_the_certificate_is_replaced() {
    let tls = TestTls::new();
    let mut port = tls.open(GrpcConfig::default()).await;
    let (mut session, connection) = port.session().await;
    let next = TestAuthority::new("next authority");
    tls.certificates.inner.replace(&[next.pair(&[NAME])]);
    port.router.deliver(connection, message("c", 1), DeliveryClass::Live, 1);
    assert_eq!(session.next().await.unwrap(), 1);
    assert_eq!(tls.counters.handshakes_full.get(), 1);
    // New clients get the new one, which this one does not trust.
    let refused = connect(&Arc::new(tls.client(&[b"h2"])), port.address).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidData);
}

#[tokio::test]
async fn returning_client_is_resumed() {
    let tls = TestTls::new();
    let port = tls.open(GrpcConfig::default()).await;
    let client = Arc::new(tls.client(&[b"h2"]));
    for _ in 0..3 {
        ping(&client, port.address).await;
    }
    assert_eq!((tls.counters.handshakes_full.get(), tls.counters.handshakes_resumed.get()), (1, 2));
    let threads = tls.certificates.threads.lock().unwrap();
    assert!(threads.iter().all(|name| name.as_deref() == Some("tls")), "{threads:?}");
}

#[tokio::test]
async fn handshakes_that_fail_are_told_to_the_client_and_counted() {
    let tls = TestTls::new();
    let port = tls.open(GrpcConfig::default()).await;
    let wrong = TestTls::new();
    for (client, alert, counter) in [
        (tls.client(&[]), AlertDescription::NoApplicationProtocol, &tls.counters.failed_protocol),
        (
            tls.client(&[b"http/1.1"]),
            AlertDescription::NoApplicationProtocol,
            &tls.counters.failed_protocol,
        ),
        (
            tls.client_of(&[b"h2"], &version::TLS12),
            AlertDescription::ProtocolVersion,
            &tls.counters.failed_version,
        ),
    ] {
        let before = counter.get();
        let error = connect(&Arc::new(client), port.address).await.unwrap_err();
        let error = error.into_inner().unwrap().downcast::<Error>().unwrap();
        assert_eq!(*error, Error::AlertReceived(alert));
        while counter.get() == before {
            tokio::task::yield_now().await;
        }
    }
    connect(&Arc::new(wrong.client(&[b"h2"])), port.address).await.unwrap_err();
    let mut gone = TcpStream::connect(port.address).await.unwrap();
    gone.write_all(&[22, 3, 1]).await.unwrap();
    drop(gone);
    for bytes in [PREFACE, b"GET / HTTP/1.1\r\n\r\n"] {
        let mut client = TcpStream::connect(port.address).await.unwrap();
        client.write_all(bytes).await.unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(received[..1], [21], "an alert (RFC 8446 §5.1): {received:?}");
    }
    while port.counters.grpc_connections_malformed.get() < 7 {
        tokio::task::yield_now().await;
    }
    let counters = &tls.counters;
    assert_eq!(counters.failed_not_tls.get(), 2);
    assert_eq!(counters.failed_by_client.get(), 1);
    assert_eq!(counters.failed_gone.get(), 1);
}

#[tokio::test]
async fn connection_without_a_handshake_in_time_is_closed() {
    // Nothing, and the beginning of a ClientHello.
    for sent in [&[][..], &[22, 3, 1, 2, 0, 1]] {
        let tls = TestTls::new();
        let config =
            GrpcConfig { handshake_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
        let port = tls.open(config).await;
        let mut client = TcpStream::connect(port.address).await.unwrap();
        client.write_all(sent).await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(port.counters.grpc_connections_late.get(), 1);
    }
}

#[tokio::test]
async fn handshake_without_a_turn_is_given_up() {
    let tls = TestTls::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = Arc::new(tls.client(&[b"h2"]));
    let connecting = tokio::spawn(async move { connect(&client, address).await });
    let (stream, _) = listener.accept().await.unwrap();
    let turn = tls.port.threads.turn(Duration::ZERO).await;
    assert!(turn.is_some());
    let outcome = tls.port.accept(TcpSocket::new(stream), Duration::ZERO).await;
    assert_eq!(outcome.unwrap_err(), TlsFailure::Busy);
    assert_eq!(tls.counters.failed_busy.get(), 1);
    connecting.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn connection_whose_socket_takes_nothing_is_ended() {
    // More than TLS has room for, and less: then HTTP/2 has written everything.
    for pings in [usize::MAX, 2_000] {
        let tls = TestTls::new();
        let config =
            GrpcConfig { write_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
        let port = tls.open(config).await;
        let mut client = connect(&Arc::new(tls.client(&[b"h2"])), port.address).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        let mut left = pings;
        // An error means that the server has ended it.
        while left > 0 && client.write_all(&PING.repeat(left.min(1_000))).await.is_ok() {
            left -= left.min(1_000);
        }
        let ended = async {
            while port.counters.grpc_connections_stalled.get() == 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(60), ended).await.expect("it is ended");
    }
}

#[tokio::test]
async fn connection_ends_with_a_close_notify() {
    let tls = TestTls::new();
    let port = tls.open(GrpcConfig::default()).await;
    let mut client = connect(&Arc::new(tls.client(&[b"h2"])), port.address).await.unwrap();
    client.write_all(PREFACE).await.unwrap();
    client.read_u8().await.unwrap();
    port.shutdown.send(()).unwrap();
    // HTTP/2 waits for the answer to a ping before it closes (RFC 9113 §6.8).
    let head = [0, 0, 8, 6, 0, 0, 0, 0, 0];
    let mut received = Vec::new();
    let payload = loop {
        let at = received.windows(17).find(|part: &&[u8]| part.starts_with(&head));
        if let Some(ping) = at {
            break ping[9..].to_vec();
        }
        assert_ne!(client.read_buf(&mut received).await.unwrap(), 0);
    };
    client.write_all(&[&[0, 0, 8, 6, 1, 0, 0, 0, 0], &payload[..]].concat()).await.unwrap();
    // Without a `close_notify` this would be an error.
    client.read_to_end(&mut Vec::new()).await.unwrap();
}
