//! Handshakes between rustls' client and a server with this configuration, without sockets.

use std::io::{Read as _, Write as _};

use rcgen::KeyPair;
use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription, CipherSuite, ClientConfig, ClientConnection, Error, HandshakeKind,
    RootCertStore, ServerConnection, SignatureScheme,
};

use super::certificates::Certificates;
use super::failure::TlsFailure;
use super::testing::{RSA_KEY, TestAuthority};
use super::*;
use crate::domain::command::Secret;

/// What a handshake has come to.
#[derive(Debug)]
struct Outcome {
    server: Result<HandshakeKind, Error>,
    client: Result<(), Error>,
    server_side: ServerConnection,
    client_side: ClientConnection,
}

/// Makes a handshake, and has the server say something behind it, which brings the tickets to the client.
fn handshake(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>, name: &str) -> Outcome {
    let mut server_side = ServerConnection::new(Arc::clone(server)).unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client_side = ClientConnection::new(Arc::clone(client), name).unwrap();
    let (mut server, mut client) = (Ok(()), Ok(()));
    for _ in 0..4 {
        let mut wire = Vec::new();
        while client_side.wants_write() {
            client_side.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() && server.is_ok() {
            server_side.read_tls(&mut rest).unwrap();
            server = server_side.process_new_packets().map(|_| ());
        }
        if !server_side.is_handshaking() {
            server_side.writer().write_all(b"hello").unwrap();
        }
        wire.clear();
        while server_side.wants_write() {
            server_side.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() && client.is_ok() {
            client_side.read_tls(&mut rest).unwrap();
            client = client_side.process_new_packets().map(|_| ());
            let mut said = [0; 64];
            let _ = client_side.reader().read(&mut said);
        }
    }
    let server = server.map(|()| server_side.handshake_kind().expect("it is complete"));
    Outcome { server, client, server_side, client_side }
}

fn client(authority: &TestAuthority, alpn: &[&[u8]]) -> ClientConfig {
    client_with(authority, alpn, default_provider(), &[&version::TLS13])
}

fn client_with(
    authority: &TestAuthority,
    alpn: &[&[u8]],
    provider: CryptoProvider,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().der().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider));
    let builder = builder.with_protocol_versions(versions).unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config
}

/// A client that verifies these kinds of signatures only.
fn client_that_verifies(
    authority: &TestAuthority,
    is_wanted: fn(SignatureScheme) -> bool,
) -> ClientConfig {
    let mut provider = default_provider();
    let algorithms = &mut provider.signature_verification_algorithms;
    let mapping: Vec<_> =
        algorithms.mapping.iter().filter(|(scheme, _)| is_wanted(*scheme)).copied().collect();
    algorithms.mapping = mapping.leak();
    client_with(authority, &[], provider, &[&version::TLS13])
}

fn no_secrets() -> Arc<Tickets> {
    Arc::new(Tickets::new(&[], || 0))
}

fn with_secret() -> Arc<Tickets> {
    let secret = Secret::new("a secret of at least thirty-two bytes".to_owned());
    Arc::new(Tickets::new(&[secret], || 0))
}

/// The name in the certificate that the client got.
fn got(outcome: &Outcome) -> String {
    let certificates = outcome.client_side.peer_certificates().expect("a certificate");
    let certificate = webpki::EndEntityCert::try_from(&certificates[0]).unwrap();
    certificate.valid_dns_names().next().expect("a name").to_owned()
}

#[test]
fn returning_client_needs_no_signature_on_any_node_with_the_secret() {
    let authority = TestAuthority::new("authority");
    let certificates = Arc::new(Certificates::new(&[authority.pair(&["chat.test"])]));
    let node = |tickets| Arc::new(server_config(certificates.clone(), tickets, &[b"h2"]));
    let (first, second, other) = (node(with_secret()), node(with_secret()), node(no_secrets()));
    let client = Arc::new(client(&authority, &[b"h2"]));
    let kind = |node, name| handshake(node, &client, name).server.unwrap();
    assert_eq!(kind(&first, "chat.test"), HandshakeKind::Full);
    assert_eq!(kind(&second, "chat.test"), HandshakeKind::Resumed);
    assert_eq!(kind(&first, "chat.test"), HandshakeKind::Resumed);
    assert_eq!(kind(&other, "chat.test"), HandshakeKind::Full);
    // Certificates may be replaced meanwhile.
    certificates.replace(&[authority.pair(&["chat.test"])]);
    assert_eq!(kind(&other, "chat.test"), HandshakeKind::Resumed);
}

#[test]
fn early_data_is_not_offered_and_protocol_is_agreed() {
    let authority = TestAuthority::new("authority");
    let certificates = Arc::new(Certificates::new(&[authority.pair(&["chat.test"])]));
    let server = Arc::new(server_config(certificates, with_secret(), &[b"http/1.1"]));
    let mut config = client(&authority, &[b"h2", b"http/1.1"]);
    config.enable_early_data = true;
    let config = Arc::new(config);
    for _ in 0..2 {
        let mut outcome = handshake(&server, &config, "chat.test");
        assert_eq!(outcome.client_side.alpn_protocol(), Some(&b"http/1.1"[..]));
        assert!(outcome.client_side.early_data().is_none());
        assert!(outcome.server_side.early_data().is_none());
    }
}

#[test]
fn client_gets_the_certificate_of_the_name_it_asks_for() {
    let authority = TestAuthority::new("authority");
    let certificates = Arc::new(Certificates::new(&[
        authority.pair(&["first.test"]),
        authority.pair(&["*.wild.test"]),
        authority.pair(&["own.wild.test", "second.test"]),
    ]));
    let server = Arc::new(server_config(certificates.clone(), no_secrets(), &[]));
    let client = Arc::new(client(&authority, &[]));
    for (name, expected) in [
        ("first.test", "first.test"),
        ("FIRST.test", "first.test"),
        ("second.test", "own.wild.test"),
        ("own.wild.test", "own.wild.test"),
        ("any.wild.test", "*.wild.test"),
    ] {
        let outcome = handshake(&server, &client, name);
        assert!(outcome.client.is_ok(), "{name}: {outcome:?}");
        assert_eq!(got(&outcome), expected, "{name}");
    }
    // Without a usable name all get the first one, and say so if they do not want it.
    for name in ["wild.test", "a.b.wild.test", "other.test", "127.0.0.1"] {
        let outcome = handshake(&server, &client, name);
        let Err(Error::InvalidCertificate(_)) = outcome.client else {
            panic!("{name}: {outcome:?}")
        };
        let Err(error) = &outcome.server else { panic!("{name}: {outcome:?}") };
        assert_eq!(TlsFailure::from(error), TlsFailure::ByClient, "{name}");
    }
    certificates.replace(&[authority.pair(&["other.test"])]);
    assert_eq!(got(&handshake(&server, &client, "other.test")), "other.test");
}

#[test]
fn client_gets_the_signature_that_it_can_verify() {
    let authority = TestAuthority::new("authority");
    let rsa = authority.pair_with(&["chat.test"], KeyPair::from_pem(RSA_KEY).unwrap());
    let certificates = Certificates::new(&[rsa, authority.pair(&["chat.test"])]);
    let server = Arc::new(server_config(Arc::new(certificates), no_secrets(), &[]));
    let is_rsa = |scheme| {
        matches!(
            scheme,
            SignatureScheme::RSA_PSS_SHA256
                | SignatureScheme::RSA_PSS_SHA384
                | SignatureScheme::RSA_PSS_SHA512
        )
    };
    let schemes = |client: ClientConfig| {
        let outcome = handshake(&server, &Arc::new(client), "chat.test");
        let certificates = outcome.client_side.peer_certificates().expect("a certificate");
        (certificates[0].len(), outcome.server.is_ok())
    };
    let all = schemes(client(&authority, &[]));
    let (with_rsa, signed) = schemes(client_that_verifies(&authority, is_rsa));
    assert!(all.1 && signed);
    assert!(with_rsa > all.0 + 200, "an RSA key and certificate are larger: {with_rsa} {all:?}");
}

#[test]
fn other_versions_and_protocols_are_refused_and_told_apart() {
    let authority = TestAuthority::new("authority");
    let certificates = Arc::new(Certificates::new(&[authority.pair(&["chat.test"])]));
    let server = Arc::new(server_config(certificates, no_secrets(), &[b"h2"]));
    let old = client_with(&authority, &[b"h2"], default_provider(), &[&version::TLS12]);
    let http = client(&authority, &[b"http/1.1"]);
    let signs = |scheme| scheme == SignatureScheme::ED25519;
    let mut ed25519 = client_that_verifies(&authority, signs);
    ed25519.alpn_protocols = vec![b"h2".to_vec()];
    for (client, failure, alert) in [
        (old, TlsFailure::Version, AlertDescription::ProtocolVersion),
        (http, TlsFailure::Protocol, AlertDescription::NoApplicationProtocol),
        (ed25519, TlsFailure::Incompatible, AlertDescription::HandshakeFailure),
    ] {
        let outcome = handshake(&server, &Arc::new(client), "chat.test");
        assert_eq!(TlsFailure::from(outcome.server.as_ref().unwrap_err()), failure, "{outcome:?}");
        assert_eq!(outcome.client.unwrap_err(), Error::AlertReceived(alert));
    }
    for bytes in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"GET /ws HTTP/1.1\r\n\r\n"] {
        let mut server = ServerConnection::new(Arc::clone(&server)).unwrap();
        server.read_tls(&mut &bytes[..]).unwrap();
        let error = server.process_new_packets().unwrap_err();
        assert_eq!(TlsFailure::from(&error), TlsFailure::NotTls, "{error}");
    }
}

#[test]
fn cipher_is_the_one_that_the_client_prefers() {
    let authority = TestAuthority::new("authority");
    let certificates = Arc::new(Certificates::new(&[authority.pair(&["chat.test"])]));
    let server = Arc::new(server_config(certificates, no_secrets(), &[]));
    for wanted in
        [CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, CipherSuite::TLS13_AES_128_GCM_SHA256]
    {
        let mut provider = default_provider();
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != wanted);
        let client = client_with(&authority, &[], provider, &[&version::TLS13]);
        let outcome = handshake(&server, &Arc::new(client), "chat.test");
        let agreed = outcome.client_side.negotiated_cipher_suite().unwrap();
        assert_eq!(agreed.suite(), wanted);
    }
}
