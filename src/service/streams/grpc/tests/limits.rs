//! Clients that exceed a limit or a deadline.

use std::net::{IpAddr, Ipv4Addr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// Waits until the server closes the socket. Returns what it has sent.
async fn rest(mut socket: TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    // A reset is an end, too.
    let _ = socket.read_to_end(&mut rest).await;
    rest
}

/// The preface with empty settings (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

#[tokio::test]
async fn connection_with_a_session_is_not_replaced() {
    let config = GrpcConfig { connections_max: 1, ..GrpcConfig::default() };
    let mut port = Port::open(config, HubConfig::default()).await;
    let (session, connection) = port.session().await;
    let second = TcpStream::connect(port.address).await.unwrap();
    assert!(rest(second).await.is_empty());
    assert_eq!(port.counters.grpc_connections_refused.get(), 1);
    assert_eq!(port.counters.grpc_connections.get(), 1);
    // Its session was the only one.
    drop(session);
    assert_eq!(port.ended(connection).await, EndReason::ClosedByPeer);
    port.channel = channel(port.address).await;
    port.session().await;
    assert_eq!(port.counters.grpc_connections_replaced.get(), 1);
}

#[tokio::test]
async fn oldest_connection_without_a_session_makes_room() {
    let config = GrpcConfig { connections_max: 3, ..GrpcConfig::default() };
    let mut port = Port::open(config, HubConfig::default()).await;
    // The session of the first connection keeps it.
    let _session = port.session().await;
    let silent = TcpStream::connect(port.address).await.unwrap();
    let mut half = TcpStream::connect(port.address).await.unwrap();
    half.write_all(&PREFACE[..12]).await.unwrap();
    port.channel = channel(port.address).await;
    let _second = port.session().await;
    rest(silent).await;
    port.channel = channel(port.address).await;
    let _third = port.session().await;
    rest(half).await;
    assert_eq!(port.counters.grpc_connections_replaced.get(), 2);
    assert_eq!(port.counters.grpc_connections_refused.get(), 0);
}

#[tokio::test]
async fn connections_of_one_address_are_limited_together_with_the_other_ports() {
    let limits = ConnectionLimits { connections_per_address_max: 2, ..ConnectionLimits::default() };
    let port = Port::with_limits(limits).await;
    // A connection to another port.
    let elsewhere = port.limiter.admit(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).unwrap();
    let second = TcpStream::connect(port.address).await.unwrap();
    assert!(rest(second).await.is_empty());
    assert_eq!(port.counters.grpc_connections_refused_address_count.get(), 1);
    port.limiter.release(elsewhere, 0);
    channel(port.address).await;
}

#[tokio::test]
async fn further_calls_of_a_connection_count_as_handshakes() {
    let limits =
        ConnectionLimits { handshakes_per_address_per_s_max: 2, ..ConnectionLimits::default() };
    let mut port = Port::with_limits(limits).await;
    // The first call is that of the connection.
    let _first = port.session().await;
    let _second = port.session().await;
    assert_eq!(port.call(None).refused().await.code(), Code::ResourceExhausted);
    assert_eq!(port.counters.grpc_calls_refused_rate.get(), 1);
    let third = TcpStream::connect(port.address).await.unwrap();
    assert!(rest(third).await.is_empty());
    assert_eq!(port.counters.grpc_connections_refused_address_rate.get(), 1);
}

/// `HEADERS` of a call without a body, and a `RST_STREAM` behind it (RFC 9113 §6.2, §6.4).
pub(super) fn call_and_reset(number: u32) -> Vec<u8> {
    let stream = (2 * number + 1).to_be_bytes();
    // POST, http and /, from the static table (RFC 7541, appendix A).
    let headers: [&[u8]; 3] = [&[0, 0, 3, 1, 4], &stream, &[0x83, 0x86, 0x84]];
    let reset: [&[u8]; 3] = [&[0, 0, 4, 3, 0], &stream, &[0, 0, 0, 8]];
    [headers, reset].concat().concat()
}

/// The clock of the limits stands still.
async fn client_of_few_handshakes() -> (Port, TcpStream) {
    let limits =
        ConnectionLimits { handshakes_per_address_per_s_max: 3, ..ConnectionLimits::default() };
    // The channel of the port is the first handshake.
    let port = Port::with_limits(limits).await;
    let mut client = TcpStream::connect(port.address).await.unwrap();
    client.write_all(PREFACE).await.unwrap();
    (port, client)
}

#[tokio::test]
async fn calls_that_are_reset_at_once_count_as_handshakes() {
    let (port, mut client) = client_of_few_handshakes().await;
    let calls: Vec<u8> = (0..1_000).flat_map(call_and_reset).collect();
    client.write_all(&calls).await.unwrap();
    client.write_all(b"\0\0\x08\x06\0\0\0\0\x0012345678").await.unwrap();
    let mut received = Vec::new();
    while !received.windows(8).any(|part| part == b"12345678") {
        assert_ne!(client.read_buf(&mut received).await.unwrap(), 0, "still open");
    }
    let Port { counters, .. } = &port;
    assert_eq!(counters.grpc_streams.get(), 1_000);
    // The connection is one, with the first call, and the second call is another.
    assert_eq!(counters.grpc_calls_refused_rate.get(), 998);
    assert_eq!(port.refused(), [(429, 998)]);
    assert_eq!(counters.grpc_connections_flooded.get(), 0);
}

#[tokio::test]
async fn connection_with_far_more_calls_than_handshakes_is_ended() {
    let (port, mut client) = client_of_few_handshakes().await;
    let refused = CALLS_REFUSED_PER_S_MAX;
    let calls: Vec<u8> = (0..2 * refused).flat_map(call_and_reset).collect();
    // An error means that the server has ended it.
    let _ = client.write_all(&calls).await;
    rest(client).await;
    assert_eq!(port.counters.grpc_connections_flooded.get(), 1);
    assert_eq!(port.counters.grpc_calls_refused_rate.get(), u64::from(refused) + 1);
}

#[tokio::test]
async fn connection_without_a_preface_in_time_is_closed() {
    for sent in [0, 12, 23] {
        let config =
            GrpcConfig { handshake_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
        let port = Port::open(config, HubConfig::default()).await;
        let mut client = TcpStream::connect(port.address).await.unwrap();
        client.write_all(&PREFACE[..sent]).await.unwrap();
        rest(client).await;
        assert_eq!(port.counters.grpc_connections_late.get(), 1);
    }
    let port = Port::default().await;
    let mut client = TcpStream::connect(port.address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    rest(client).await;
    assert_eq!(port.counters.grpc_connections_malformed.get(), 1);
}

#[tokio::test]
async fn connection_without_a_call_for_the_idle_timeout_is_closed() {
    // The second one has the preface without the settings.
    for sent in [PREFACE.len(), 24] {
        let config =
            GrpcConfig { idle_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
        let port = Port::open(config, HubConfig::default()).await;
        let mut client = TcpStream::connect(port.address).await.unwrap();
        client.write_all(&PREFACE[..sent]).await.unwrap();
        // Type 7, the flags, stream 0, and no error: the client may call on another connection (RFC 9113 §6.8).
        let goodbye = [7, 0, 0, 0, 0, 0];
        let mut received = Vec::new();
        while !received.windows(goodbye.len()).any(|part| part == goodbye) {
            assert_ne!(client.read_buf(&mut received).await.unwrap(), 0, "{received:?}");
        }
        assert!(port.counters.grpc_connections_idle.get() >= 1);
    }
}

#[tokio::test]
async fn connection_with_a_session_is_not_idle() {
    let config = GrpcConfig { idle_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
    let mut port = Port::open(config.clone(), HubConfig::default()).await;
    let (mut session, connection) = port.session().await;
    tokio::time::pause();
    tokio::time::advance(10 * config.idle_timeout).await;
    tokio::time::resume();
    port.router.deliver(connection, message("c", 1), DeliveryClass::Live, 1);
    assert_eq!(session.next().await.unwrap(), 1);
}

#[tokio::test]
async fn token_is_judged_before_the_first_request() {
    let port = Port::without_valid_tokens().await;
    let status = port.call(None);
    let (_requests, answer) = (status.requests, status.answer);
    let status = answer.await.unwrap().unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "no valid token"));
    assert_eq!(port.counters.grpc_calls_refused_token.get(), 1);
    assert_eq!(port.refused(), [(401, 1)]);
}

#[tokio::test]
async fn oldest_call_without_a_request_makes_room() {
    let config = GrpcConfig { calls_waiting_max: 1, ..GrpcConfig::default() };
    let mut port = Port::open(config, HubConfig::default()).await;
    let Call { requests: _requests, answer } = port.call(None);
    while port.counters.grpc_calls.get() < 1 {
        tokio::task::yield_now().await;
    }
    let _session = port.session().await;
    assert_eq!(answer.await.unwrap().unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(port.counters.grpc_calls_replaced.get(), 1);
    assert_eq!(port.refused(), [(429, 1)]);
}

#[tokio::test]
async fn too_many_requests_close_the_stream() {
    let config = GrpcConfig { requests_burst: 3, requests_per_s: 0, ..GrpcConfig::default() };
    let mut port = Port::open(config, HubConfig::default()).await;
    let (mut session, connection) = port.session().await;
    for _ in 0..3 {
        session.report_position("", 0).await;
    }
    assert_eq!(session.next().await.unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(port.ended(connection).await, EndReason::PeerAtFault);
}

#[tokio::test]
async fn call_without_a_request_in_time_fails() {
    let config = GrpcConfig { handshake_timeout: Duration::ZERO, ..GrpcConfig::default() };
    let port = Port::open(config, HubConfig::default()).await;
    let call = port.call(None);
    let Call { requests: _requests, answer } = call;
    assert_eq!(answer.await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    assert_eq!(port.counters.grpc_calls_late.get(), 1);
}

#[tokio::test]
async fn metadata_above_the_limit_end_nobody_elses_stream() {
    let mut port = Port::default().await;
    let (mut session, connection) = port.session().await;
    // The second one is decoded in pieces: the last field does not fit into one frame.
    for sizes in [[9_000, 9_000], [17_000, 40_000], [60_000, 0]] {
        let (_requests, receiver) = mpsc::channel::<DeliveryConnectRequest>(1);
        let mut request = Request::new(ReceiverStream::new(receiver));
        for (name, size) in ["x-first", "x-second"].into_iter().zip(sizes) {
            request.metadata_mut().insert(name, "x".repeat(size).parse().unwrap());
        }
        let mut client = DeliveryApiClient::new(port.channel.clone());
        let status = client.connect(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{sizes:?}: {status}");
    }
    assert_eq!(port.refused(), [(400, 3)]);
    port.router.deliver(connection, message("c", 1), DeliveryClass::Live, 1);
    assert_eq!(session.next().await.unwrap(), 1);
}
