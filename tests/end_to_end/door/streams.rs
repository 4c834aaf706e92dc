//! The gRPC port beside clients that behave badly, with real sockets.

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};

use delivery_testkit::proto::delivery::v1::DeliveryConnectRequest;

use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::http2::{
    DATA, END_STREAM, GOAWAY, HEADERS, Http2, RST_STREAM, call, frame, hello, message,
};
use crate::support::node::{Node, NodeBuilder};
use crate::support::wait::{SOON, until};

/// Waits until this counter is at least `least`.
#[track_caller]
fn counted(node: &Node, counter: &str, least: usize) {
    until(SOON, counter, || (node.metrics().sum(counter, &[]) >= least as f64).then_some(()));
}

/// A session on a connection of its own.
#[track_caller]
fn session(node: &Node, user: &str) -> Http2 {
    let mut client = Http2::connect(node.grpc);
    client.write(&[call(1, None), hello(1, user)].concat());
    client.admitted(1);
    client
}

/// A socket that has been sent `bytes`, and is silent from then on.
fn silent(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    use std::io::Write as _;
    let mut stream = TcpStream::connect(address).expect("the server accepts");
    stream.set_read_timeout(Some(SOON)).expect("a socket");
    stream.write_all(bytes).expect("a fresh socket takes it");
    stream
}

/// Waits until the server has closed the socket.
#[track_caller]
fn is_closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    if let Err(error) = stream.read_to_end(&mut rest) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

/// An acknowledgement.
fn acknowledgement(sequence: i64) -> Vec<u8> {
    message(&DeliveryConnectRequest {
        conversation_id: "room".into(),
        last_received_sequence: sequence,
        ..Default::default()
    })
}

/// The limits of docs/grpc.md apply to one stream. A proxy may carry the streams of many users in one connection.
#[test]
fn requests_of_one_user_end_nobody_elses_stream() {
    const EACH: usize = 1_000;
    let node = NodeBuilder::dev().start();
    let mut shared = Http2::connect(node.grpc);
    for (stream, user) in [(1, "alice"), (3, "bob")] {
        // One after the other, because waiting for one skips the frames of others.
        shared.write(&[call(stream, None), hello(stream, user)].concat());
        shared.admitted(stream);
    }
    // One frame for each request, all in one write.
    let requests = (0..EACH).map(|sequence| {
        let sequence = i64::try_from(sequence).expect("small");
        frame(DATA, 0, 1, &acknowledgement(sequence))
    });
    shared.write(&requests.collect::<Vec<_>>().concat());
    counted(&node, "delivery_grpc_requests_total", 2 + EACH);
    // One frame for each byte.
    let bytes: Vec<u8> = (0..EACH).flat_map(|_| acknowledgement(1)).collect();
    for part in bytes.chunks(1_000) {
        let frames: Vec<_> = part.iter().map(|byte| frame(DATA, 0, 1, &[*byte])).collect();
        shared.write(&frames.concat());
        assert_eq!(shared.answers(), []);
    }
    counted(&node, "delivery_grpc_requests_total", 2 + 2 * EACH);
    // More than the limit ends this stream, and no other.
    let burst = frame(DATA, 0, 1, &message(&DeliveryConnectRequest::default()).repeat(1_000));
    until(SOON, "the request limit", || {
        shared.write(&burst);
        shared.answers().iter().any(|frame| frame.stream == 1).then_some(())
    });
    shared.write(
        &[frame(DATA, 0, 3, &acknowledgement(1)), call(5, None), hello(5, "carol")].concat(),
    );
    shared.admitted(5);
    assert_eq!(node.metrics().sum("delivery_stream_sessions", &[]), 2.0);
}

/// A client does not know yet that its stream has ended when it sends its next requests.
#[test]
fn late_requests_of_an_ended_stream_end_nobody_elses_stream() {
    let node = NodeBuilder::dev().start();
    let mut shared = session(&node, "bob");
    for stream in (3..).step_by(2).take(200) {
        let wrong = DeliveryConnectRequest { last_received_sequence: -1, ..Default::default() };
        shared.write(&[call(stream, None), frame(DATA, 0, stream, &message(&wrong))].concat());
        until(SOON, "the end of the stream", || {
            let frame = shared.next().expect("the connection is open");
            assert_ne!(frame.kind, GOAWAY, "{}", String::from_utf8_lossy(&frame.payload));
            let ended = frame.kind == HEADERS && frame.flags & END_STREAM > 0;
            (frame.stream == stream && (ended || frame.kind == RST_STREAM)).then_some(())
        });
        // In all streams more than the budget of unread frames that HTTP/2 libraries have for a connection of this
        // size.
        let late = frame(DATA, 0, stream, &acknowledgement(1)).repeat(400);
        shared.write(&late);
    }
    assert!(shared.answers().iter().all(|frame| frame.stream != 1));
    assert_eq!(node.metrics().sum("delivery_stream_sessions", &[]), 1.0);
}

#[test]
fn silent_connections_lock_nobody_out() {
    // No connection of this test exceeds a deadline.
    let node = NodeBuilder::dev().set("CONNECTIONS_MAX", 20).start();
    let mut honest = session(&node, "alice");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let parts = [0, 12, preface.len()].into_iter().cycle();
    let silent: Vec<_> = parts.take(60).map(|sent| silent(node.grpc, &preface[..sent])).collect();
    let mut next = session(&node, "bob");
    assert_eq!(honest.answers(), []);
    assert_eq!(next.answers(), []);
    for stream in silent.into_iter().take(20) {
        is_closed(stream);
    }
    assert!(node.metrics().sum("delivery_grpc_connections_replaced_total", &[]) >= 20.0);
}

#[test]
fn connection_without_preface_or_call_has_a_deadline() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let node = NodeBuilder::dev()
        .set("HANDSHAKE_TIMEOUT", "100ms")
        .set("PING_INTERVAL", "1s")
        .set("IDLE_TIMEOUT", "2s")
        .start();
    is_closed(silent(node.grpc, b""));
    is_closed(silent(node.grpc, &preface[..12]));
    assert_eq!(node.metrics().sum("delivery_grpc_connections_late_total", &[]), 2.0);
    is_closed(silent(node.grpc, preface));
    // It answers pings, but has no call.
    let mut idle = Http2::connect(node.grpc);
    until(SOON, "the end of the idle connection", || {
        idle.next().is_none_or(|frame| frame.kind == GOAWAY).then_some(())
    });
    counted(&node, "delivery_grpc_connections_idle_total", 1);
}

#[test]
fn both_ports_count_the_connections_of_an_address_together() {
    let node = NodeBuilder::dev().set("CONNECTIONS_PER_ADDRESS", 2).start();
    let mut websocket = Client::session(node.public, "alice", "1");
    let mut stream = session(&node, "bob");
    is_closed(silent(node.grpc, b""));
    counted(&node, "delivery_grpc_connections_refused_address_count_total", 1);
    let mut refused = Client::connect(&Connect::session(node.public, "carol", "1"));
    assert!(matches!(refused.receive(), Received::Refused(429, _)));
    assert_eq!(stream.answers(), []);
    drop(stream);
    until(SOON, "room for one more", || {
        let mut next = Client::connect(&Connect::session(node.public, "carol", "1"));
        matches!(next.receive(), Received::Open(_)).then_some(())
    });
    assert!(websocket.send(9, b"still there?"));
}

/// The token is in the headers, so the node does not wait for the first request to refuse it.
#[test]
fn call_without_a_valid_token_is_refused_by_its_headers() {
    let node = NodeBuilder::dev()
        .set("AUTH_MODE", "jwt")
        .set("JWT_SECRET", "a secret of at least 32 characters")
        .start();
    let mut client = Http2::connect(node.grpc);
    for (stream, token) in [(1, None), (3, Some("x")), (5, Some("eyJhbGciOiJIUzI1NiJ9.e30.AAAA"))] {
        client.write(&call(stream, token));
        let refused = until(SOON, "the answer", || {
            let frame = client.next().expect("the connection is open");
            (frame.kind == HEADERS && frame.stream == stream).then_some(frame)
        });
        assert_eq!(refused.flags & END_STREAM, END_STREAM);
    }
    assert_eq!(node.metrics().sum("delivery_grpc_calls_refused_token_total", &[]), 3.0);
}
