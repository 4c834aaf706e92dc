//! Clients whose socket takes nothing.

use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::limits::{PREFACE, call_and_reset};
use super::*;

/// `SETTINGS` and `WINDOW_UPDATE` that open all windows as far as possible (RFC 9113 §6.5.2, §6.9).
const OPEN_WINDOWS: &[u8] =
    b"\0\0\x06\x04\0\0\0\0\0\0\x04\x7f\xff\xff\xff\0\0\x04\x08\0\0\0\0\0\x7f\xff\0\0";

/// `HEADERS` and the first request of a session of alice, on stream 1.
fn connect() -> Vec<u8> {
    const PATH: &[u8] = b"/realchat.delivery.v1.DeliveryApi/Connect";
    // POST, http, a path, and a content type: names from the static table (RFC 7541, appendix A).
    let fields =
        [&[0x83, 0x86, 4, PATH.len() as u8], PATH, b"\x0f\x10\x10application/grpc"].concat();
    let request = DeliveryConnectRequest {
        user_id: "alice".into(),
        device_id: "desk".into(),
        ..DeliveryConnectRequest::default()
    };
    let request = request.encode_to_vec();
    let message = [&[0, 0, 0, 0, request.len() as u8], &*request].concat();
    [
        &[0, 0, fields.len() as u8, 1, 4, 0, 0, 0, 1],
        &*fields,
        &[0, 0, message.len() as u8, 0, 0, 0, 0, 0, 1],
        &*message,
    ]
    .concat()
}

impl Port {
    /// A session whose windows are open and whose client reads nothing, so that its socket takes no more.
    async fn blocked_session(config: GrpcConfig) -> (Self, TcpStream, ConnectionKey) {
        let mut port = Self::open(config, HubConfig::default()).await;
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        let mut client = socket.connect(port.address).await.unwrap();
        client.write_all(&[PREFACE, OPEN_WINDOWS, &connect()].concat()).await.unwrap();
        let connection = port.manager.opened().await;
        port.manager.send(ShardCommand::Admit { connection });
        for sequence in 1..=4 {
            let event = message(&"c".repeat(128 * 1_024), sequence);
            port.router.deliver(connection, event, DeliveryClass::Live, 1);
        }
        // The writer takes the second one when HTTP/2 has all of the first one.
        for _ in 0..2 {
            assert!(matches!(port.router.report().await, ShardReport::Done { .. }));
        }
        (port, client, connection)
    }
}

#[tokio::test]
async fn connection_whose_socket_takes_nothing_is_ended() {
    let config = GrpcConfig { write_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
    let port = Port::open(config, HubConfig::default()).await;
    let mut client = TcpStream::connect(port.address).await.unwrap();
    client.write_all(PREFACE).await.unwrap();
    // Each is answered, until the socket is full.
    let pings = b"\0\0\x08\x06\0\0\0\0\x0012345678".repeat(1_000);
    while client.write_all(&pings).await.is_ok() {}
    assert_eq!(port.counters.grpc_connections_stalled.get(), 1);
}

#[tokio::test]
async fn socket_that_takes_nothing_is_reset_at_its_end() {
    let config = GrpcConfig { write_timeout: Duration::from_millis(50), ..GrpcConfig::default() };
    let (mut port, mut client, connection) = Port::blocked_session(config).await;
    assert_eq!(port.ended(connection).await, EndReason::WriteTimeout);
    let error = client.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn connection_that_takes_no_ends_of_calls_is_ended() {
    let config = GrpcConfig { connections_max: 1, ..GrpcConfig::default() };
    let (port, mut client, _connection) = Port::blocked_session(config).await;
    for call in 1..5_000 {
        if client.write_all(&call_and_reset(call)).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(port.counters.grpc_connections_unread.get(), 1);
}
