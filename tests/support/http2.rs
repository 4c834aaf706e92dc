//! A raw HTTP/2 client of the gRPC port, frame by frame: it decides what is in one write. It shares no code with the
//! server's HTTP/2.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use delivery_testkit::proto::delivery::v1::DeliveryConnectRequest;
use prost::Message as _;

use super::wait::SOON;

/// Kinds of frames (RFC 9113 §6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
/// Flags of a frame.
pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// The bytes of a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A call of `Connect`: its headers, literal and not indexed (RFC 7541 §6.2.2).
pub fn call(stream: u32, token: Option<&str>) -> Vec<u8> {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let mut fields = vec![
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/realchat.delivery.v1.DeliveryApi/Connect"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    fields.extend(bearer.iter().map(|bearer| ("authorization", bearer.as_str())));
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            // Longer ones need a second byte of length.
            block.push(u8::try_from(text.len()).ok().filter(|len| *len < 127).expect("short"));
            block.extend(text.as_bytes());
        }
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// A request of `Connect` as gRPC sends it, uncompressed.
pub fn message(request: &DeliveryConnectRequest) -> Vec<u8> {
    let encoded = request.encode_to_vec();
    let mut bytes = vec![0];
    bytes.extend(u32::try_from(encoded.len()).expect("short").to_be_bytes());
    bytes.extend(encoded);
    bytes
}

/// The first request of a session.
pub fn hello(stream: u32, user: &str) -> Vec<u8> {
    let request = DeliveryConnectRequest {
        user_id: user.into(),
        device_id: "1".into(),
        ..Default::default()
    };
    frame(DATA, 0, stream, &message(&request))
}

/// A connection.
pub struct Http2 {
    stream: TcpStream,
}

impl Http2 {
    /// Sends the preface with empty settings.
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the server accepts");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        let client = Self { stream };
        client.write(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat());
        client
    }

    /// Sends these bytes in one write, or in several if the socket is full.
    pub fn write(&self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).expect("the connection is open");
    }

    /// The next frame that is neither settings, a ping of the server nor a window; `None`: the connection has ended.
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.stream.read_exact(&mut payload).ok()?;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let (kind, flags) = (head[3], head[4]);
            match kind {
                SETTINGS if flags & ACK == 0 => self.write(&frame(SETTINGS, ACK, 0, &[])),
                PING if flags & ACK == 0 => self.write(&frame(PING, ACK, 0, &payload)),
                SETTINGS | WINDOW_UPDATE => {}
                _ => return Some(Frame { kind, flags, stream, payload }),
            }
        }
    }

    /// Waits until a session is admitted, which the headers of the response say. Skips other frames.
    #[track_caller]
    pub fn admitted(&mut self, stream: u32) {
        loop {
            let frame = self.next().expect("the connection is open");
            assert_ne!(frame.kind, GOAWAY, "{}", String::from_utf8_lossy(&frame.payload));
            if frame.stream == stream {
                assert_eq!((frame.kind, frame.flags & END_STREAM), (HEADERS, 0), "{frame:?}");
                return;
            }
        }
    }

    /// Asserts that the server answers on this connection, and returns the frames that came before the answer.
    #[track_caller]
    pub fn answers(&mut self) -> Vec<Frame> {
        self.write(&frame(PING, 0, 0, b"answer!?"));
        let mut before = Vec::new();
        loop {
            let frame = self.next().expect("the connection is open");
            assert_ne!(frame.kind, GOAWAY, "{}", String::from_utf8_lossy(&frame.payload));
            if frame.kind == PING {
                return before;
            }
            before.push(frame);
        }
    }
}
