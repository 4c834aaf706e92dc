//! TLS on the port of WebSocket clients.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::{AlertDescription, ClientConfig, ClientConnection, Error, HandshakeKind, StreamOwned};
use tungstenite::client::IntoClientRequest as _;
use tungstenite::{Message, WebSocket};

use crate::support::node::Node;
use crate::support::wait::{SOON, until};
use crate::tls::Certificates;

type Secured = StreamOwned<ClientConnection, TcpStream>;

fn secured(node: &Node, config: &Arc<ClientConfig>) -> Secured {
    let stream = TcpStream::connect(node.public).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let name = "chat.test".try_into().unwrap();
    StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), stream)
}

/// A client of the authority that offers what browsers offer.
fn client(files: &Certificates) -> Arc<ClientConfig> {
    let mut config = files.client().as_ref().clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

fn session(node: &Node, config: &Arc<ClientConfig>, device: &str) -> WebSocket<Secured> {
    let url = format!("wss://chat.test/ws?user_id=alice&device_id={device}");
    let request = url.into_client_request().unwrap();
    let (mut socket, _) = tungstenite::client(request, secured(node, config)).unwrap();
    socket.send(Message::text(r#"{"last_sequences":{}}"#)).unwrap();
    socket
}

fn event(socket: &mut WebSocket<Secured>) {
    while !matches!(socket.read().expect("no end"), Message::Binary(_)) {}
}

fn counter(node: &Node, name: &str) -> f64 {
    node.metrics().sum(&format!("delivery_{name}_total"), &[])
}

/// Why a client without a session failed.
fn failure(node: &Node, config: &Arc<ClientConfig>) -> Error {
    let mut stream = secured(node, config);
    let failed = stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0; 1])).unwrap_err();
    failed.downcast::<Error>().expect("an error of TLS")
}

#[test]
fn session_over_tls_gets_events_and_closes_cleanly() {
    let files = Certificates::new(&["chat.test"]);
    let node = files.node().set("DEV_DEMO", "true").start();
    let config = client(&files);
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let mut socket = session(&node, &config, "phone");
        event(&mut socket);
        assert_eq!(socket.get_ref().conn.handshake_kind(), Some(kind));
        assert_eq!(socket.get_ref().conn.alpn_protocol(), Some(&b"http/1.1"[..]));
        socket.close(None).unwrap();
        while socket.read().is_ok() {}
        // Without close_notify it would be an error.
        assert_eq!(socket.get_mut().read(&mut [0; 1]).expect("close_notify"), 0);
    }
    assert_eq!(counter(&node, "websocket_tls_handshakes_full"), 1.0);
    assert_eq!(counter(&node, "websocket_tls_handshakes_resumed"), 1.0);
    assert_eq!(counter(&node, "shard_tls_errors"), 0.0);
}

#[test]
fn certificate_is_replaced_without_a_disconnect() {
    let mut files = Certificates::new(&["chat.test"]);
    let node = files.node().set("DEV_DEMO", "true").start();
    let devices = ["a", "b", "c", "d", "e"];
    let mut sessions = devices.map(|device| session(&node, &client(&files), device));
    sessions.iter_mut().for_each(event);
    let shown = |stream: &Secured| stream.conn.peer_certificates().unwrap()[0].clone().into_owned();
    let first = shown(sessions[0].get_ref());
    files.replace(&["chat.test"], 4000);
    until(SOON, "the next certificate is served", || {
        let other = session(&node, &client(&files), "other");
        (shown(other.get_ref()) != first).then_some(())
    });
    sessions.iter_mut().for_each(event);
}

#[test]
fn session_survives_key_updates() {
    let files = Certificates::new(&["chat.test"]);
    let node = files.node().set("DEV_DEMO", "true").start();
    let mut socket = session(&node, &client(&files), "phone");
    for _ in 0..3 {
        event(&mut socket);
        socket.get_mut().conn.refresh_traffic_keys().unwrap();
        socket.send(Message::Ping("after".into())).unwrap();
        while !matches!(socket.read().expect("no end"), Message::Pong(_)) {}
    }
    event(&mut socket);
}

#[test]
fn clients_that_do_not_fit_are_told() {
    let files = Certificates::new(&["chat.test"]);
    let node = files.node().start();
    let mut plain = TcpStream::connect(node.public).unwrap();
    plain.set_read_timeout(Some(SOON)).unwrap();
    plain.write_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.ends_with("this port speaks TLS: use https:// or wss://"), "{answer}");

    let alert = |description| Error::AlertReceived(description);
    let mut config = client(&files).as_ref().clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let expected = alert(AlertDescription::NoApplicationProtocol);
    assert_eq!(failure(&node, &Arc::new(config)), expected);

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let old = ClientConfig::builder_with_provider(provider);
    let old = old.with_protocol_versions(&[&rustls::version::TLS12]).unwrap();
    let old = old.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    assert_eq!(failure(&node, &Arc::new(old)), alert(AlertDescription::ProtocolVersion));

    let stranger = client(&Certificates::new(&["chat.test"]));
    assert!(matches!(failure(&node, &stranger), Error::InvalidCertificate(_)));
    for name in ["version", "protocol", "by_client"] {
        let name = format!("websocket_tls_failed_{name}");
        until(SOON, &name, || (counter(&node, &name) == 1.0).then_some(()));
    }
    assert_eq!(counter(&node, "shard_tls_refused_plaintext"), 1.0);
}

#[test]
fn silent_and_slow_clients_are_ended() {
    let files = Certificates::new(&["chat.test"]);
    let node = files.node().set("HANDSHAKE_TIMEOUT", "1s").set("MESSAGE_TIMEOUT", "1s").start();
    // Half of a client hello.
    let mut half = TcpStream::connect(node.public).unwrap();
    half.set_read_timeout(Some(SOON)).unwrap();
    half.write_all(&[22, 3, 1, 1, 0, 1]).unwrap();
    assert_eq!(half.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(counter(&node, "shard_handshake_timeouts"), 1.0);
    // Half of a record.
    let mut socket = session(&node, &client(&files), "phone");
    socket.get_mut().sock.write_all(&[23, 3, 3, 1, 0]).unwrap();
    let end = loop {
        match socket.read() {
            Ok(Message::Close(Some(frame))) => break frame,
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(u16::from(end.code), 1008);
    // A record that nobody has sealed.
    let mut socket = session(&node, &client(&files), "tablet");
    socket.get_mut().sock.write_all(&[23, 3, 3, 0, 17]).unwrap();
    socket.get_mut().sock.write_all(&[7; 17]).unwrap();
    let failed = loop {
        match socket.read() {
            Ok(_) => {}
            Err(tungstenite::Error::Io(error)) => break error.downcast::<Error>(),
            Err(error) => panic!("{error}"),
        }
    };
    let expected = Error::AlertReceived(AlertDescription::BadRecordMac);
    assert_eq!(failed.map_err(io::Error::other).unwrap(), expected);
    assert_eq!(counter(&node, "shard_tls_errors"), 1.0);
}

/// Opening one costs more than a byte of a request, so they are limited before there is a session too.
#[test]
fn key_updates_without_end_are_refused_before_the_request() {
    let files = Certificates::new(&["chat.test"]);
    let node = files.node().set("HANDSHAKE_TIMEOUT", "5m").start();
    let mut stream = secured(&node, &client(&files));
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).unwrap();
    }
    let ended = (0..100_000).find_map(|_| {
        stream.conn.refresh_traffic_keys().unwrap();
        stream.conn.write_tls(&mut stream.sock).err()
    });
    // The alert may be lost to a reset: the client goes on sending.
    assert!(ended.is_some(), "100,000 key updates are taken");
    until(SOON, "it is counted", || {
        (counter(&node, "shard_inbound_rate_exceeded") >= 1.0).then_some(())
    });
}
