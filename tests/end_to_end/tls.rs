//! TLS on the port of gRPC: certificates that are replaced under load, that do not fit, and that have expired.

use std::io;
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use delivery_testkit::proto::delivery::v1::delivery_api_client::DeliveryApiClient;
use delivery_testkit::proto::delivery::v1::{DeliveryConnectRequest, DeliveryEvent};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use rustix::process::Signal;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic::{Request, Streaming};

use crate::support::node::{Node, NodeBuilder, binary};
use crate::support::wait::{SOON, until};

/// A folder of certificates as Kubernetes mounts a secret: the files are links through `..data`, which is replaced.
pub(crate) struct Certificates {
    folder: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
    versions: usize,
}

impl Certificates {
    /// With a certificate of these names.
    pub(crate) fn new(names: &[&str]) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "authority of tests");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let mut made = Self { folder: tempfile::tempdir().unwrap(), authority, versions: 0 };
        made.replace(names, 4000);
        std::fs::write(made.path("ca.crt"), made.authority.pem()).unwrap();
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), made.path(name)).unwrap();
        }
        made
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The chain and the key of a new certificate, valid until January 1 of the year.
    fn issue(&self, names: &[&str], year: i32) -> (String, String) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    pub(crate) fn replace(&mut self, names: &[&str], year: i32) {
        let (chain, key) = self.issue(names, year);
        self.replace_files(&chain, &key);
    }

    fn replace_files(&mut self, chain: &str, key: &str) {
        self.versions += 1;
        let version = self.path(&format!("..{}", self.versions));
        std::fs::create_dir(&version).unwrap();
        std::fs::write(version.join("tls.crt"), chain).unwrap();
        std::fs::write(version.join("tls.key"), key).unwrap();
        symlink(&version, self.path("..next")).unwrap();
        std::fs::rename(self.path("..next"), self.path("..data")).unwrap();
    }

    /// A node of `dev` with this certificate.
    pub(crate) fn node(&self) -> NodeBuilder {
        self.settings(NodeBuilder::dev())
    }

    /// A node with the certificate.
    pub(crate) fn settings(&self, builder: NodeBuilder) -> NodeBuilder {
        let [cert, key] = ["tls.crt", "tls.key"].map(|name| self.path(name).display().to_string());
        builder.set("TLS_CERT", cert).set("TLS_KEY", key)
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }
}

/// Makes a handshake, and reads until the server has said something.
fn handshake(
    node: &Node,
    client: &Arc<ClientConfig>,
    name: &'static str,
) -> io::Result<ClientConnection> {
    let mut stream = TcpStream::connect(node.grpc)?;
    stream.set_read_timeout(Some(SOON))?;
    let name = ServerName::try_from(name).unwrap();
    let mut tls = ClientConnection::new(Arc::clone(client), name).unwrap();
    io::Write::write_all(
        &mut tls.writer(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    )?;
    io::Read::read_exact(&mut rustls::Stream::new(&mut tls, &mut stream), &mut [0; 9])?;
    Ok(tls)
}

fn certificate(tls: &ClientConnection) -> CertificateDer<'static> {
    tls.peer_certificates().expect("a certificate")[0].clone().into_owned()
}

async fn session(channel: Channel, device: &str) -> Streaming<DeliveryEvent> {
    let hello = DeliveryConnectRequest {
        user_id: "alice".into(),
        device_id: device.into(),
        ..Default::default()
    };
    let requests = tokio_stream::once(hello).chain(tokio_stream::pending());
    let mut client = DeliveryApiClient::new(channel);
    client.connect(Request::new(requests)).await.expect("admitted").into_inner()
}

#[test]
fn certificate_is_replaced_under_load_without_a_disconnect() {
    let mut files = Certificates::new(&["chat.test"]);
    let node = files.node().set("DEV_DEMO", "true").start();
    let runtime = Runtime::new().unwrap();
    let channel = async || {
        let authority = Certificate::from_pem(files.authority.pem());
        let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name("chat.test");
        let channel = Channel::from_shared(format!("https://{}", node.grpc)).unwrap();
        channel.tls_config(tls).unwrap().connect().await.expect("the server accepts")
    };
    let mut sessions = Vec::new();
    for device in ["a", "b", "c", "d", "e"] {
        sessions.push(runtime.block_on(async { session(channel().await, device).await }));
    }
    let mut each_gets_an_event = || {
        for session in &mut sessions {
            let next = async { tokio::time::timeout(SOON, session.message()).await };
            let event = runtime.block_on(next).expect("in time").expect("no end");
            assert_eq!(event.expect("no end").conversation_id, "demo");
        }
    };
    each_gets_an_event();
    let client = files.client();
    let shown = |client: &_| handshake(&node, client, "chat.test").map(|tls| certificate(&tls));
    let first = shown(&files.client()).unwrap();
    // Without a signal.
    files.replace(&["chat.test"], 4000);
    let second = until(SOON, "the next certificate is served", || {
        shown(&files.client()).ok().filter(|shown| *shown != first)
    });
    each_gets_an_event();
    // A key of another certificate.
    let ((chain, _), (_, key)) =
        (files.issue(&["chat.test"], 4000), files.issue(&["x.test"], 4000));
    files.replace_files(&chain, &key);
    let failures = || node.metrics().sum("delivery_tls_reload_failures_total", &[]);
    until(SOON, "the failure is counted", || (failures() > 0.0).then_some(()));
    assert!(node.log().contains("tls.key` holds a key that does not belong"), "{}", node.log());
    assert_eq!(shown(&files.client()).unwrap(), second);
    // One that has expired.
    files.replace(&["chat.test"], 2001);
    until(SOON, "the failure is counted", || (failures() > 1.0).then_some(()));
    assert_eq!(shown(&files.client()).unwrap(), second);
    files.replace(&["chat.test"], 4000);
    until(SOON, "the last certificate is served", || {
        shown(&files.client()).ok().filter(|shown| *shown != second)
    });
    each_gets_an_event();
    // What was there before needs no signature, whatever the certificate.
    handshake(&node, &client, "chat.test").unwrap();
    let resumed = handshake(&node, &client, "chat.test").unwrap();
    assert_eq!(resumed.handshake_kind(), Some(HandshakeKind::Resumed));
    let metrics = node.metrics();
    assert_eq!(metrics.sum("delivery_tls_reloads_total", &[]), 2.0);
    assert_eq!(failures(), 2.0);
    assert!(metrics.sum("delivery_tls_certificate_expires_in_seconds", &["chat.test"]) > 1e9);
    assert_eq!(metrics.sum("delivery_stream_sessions", &[]), 5.0);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn hang_up_reads_certificates_again() {
    use delivery_testkit::publisher::new_topic;

    use crate::support::services::kafka_brokers;

    let mut files = Certificates::new(&["chat.test"]);
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, "certificates", 1);
    let mut node = files.settings(NodeBuilder::serve().kafka(&brokers, &topic)).start();
    let shown = |client: &_| certificate(&handshake(&node, client, "chat.test").unwrap());
    let first = shown(&files.client());
    files.replace(&["chat.test"], 4000);
    node.signal(Signal::HUP);
    until(SOON, "the next certificate is served", || {
        (shown(&files.client()) != first).then_some(())
    });
    files.replace_files("", "");
    node.signal(Signal::HUP);
    until(SOON, "the failure is told", || {
        node.log().contains("holds no certificate").then_some(())
    });
    assert!(node.stop(SOON).success());
}

#[test]
fn node_with_an_expired_certificate_starts_and_says_so() {
    let mut files = Certificates::new(&["chat.test"]);
    files.replace(&["chat.test"], 2001);
    let node = files.node().start();
    assert!(node.log().contains("tls.crt` (chat.test) has expired"), "{}", node.log());
    let error = handshake(&node, &files.client(), "chat.test").unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
    let metrics = node.metrics();
    assert!(metrics.sum("delivery_tls_certificate_expires_in_seconds", &["tls.crt"]) < 0.0);
    until(SOON, "the client's alert is counted", || {
        let refused = node.metrics().sum("delivery_grpc_tls_failed_by_client_total", &[]);
        (refused == 1.0).then_some(())
    });
}

#[test]
fn tail_speaks_tls_and_trusts_whom_it_is_told() {
    let files = Certificates::new(&["localhost"]);
    let node = files.node().set("DEV_DEMO", "true").start();
    let tail = |more: &[&str]| {
        let url = format!("wss://localhost:{}", node.public.port());
        let arguments = ["tail", "--user", "alice", "--device", "a", "--count", "1", "--url", &url];
        let output = Command::new(binary()).args(arguments).args(more).output().unwrap();
        let [out, err] =
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), out, err)
    };
    let ca = files.path("ca.crt");
    let (status, out, err) = tail(&["--ca", ca.to_str().unwrap()]);
    assert_eq!(status, Some(0), "{err}");
    assert!(out.contains(r#""conversationId":"demo""#), "{out}");
    let (status, _, err) = tail(&[]);
    assert_eq!(status, Some(1), "{err}");
    assert!(err.contains("invalid peer certificate"), "{err}");
}

#[test]
fn client_returns_to_another_node_with_a_ticket() {
    let files = Certificates::new(&["chat.test"]);
    let secret = "a secret of at least thirty-two bytes";
    let builder = files.node().set("TLS_TICKET_SECRET", secret);
    let (first, second) = (builder.start(), builder.clone().on_ports_of_its_own().start());
    let client = files.client();
    let kind = |node| handshake(node, &client, "chat.test").unwrap().handshake_kind();
    assert_eq!(kind(&first), Some(HandshakeKind::Full));
    assert_eq!(kind(&second), Some(HandshakeKind::Resumed));
    assert_eq!(first.metrics().sum("delivery_grpc_tls_handshakes_full_total", &[]), 1.0);
    assert_eq!(second.metrics().sum("delivery_grpc_tls_handshakes_resumed_total", &[]), 1.0);
    assert!(!first.log().contains("TLS_TICKET_SECRET"), "{}", first.log());
}
