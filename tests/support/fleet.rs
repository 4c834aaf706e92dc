//! Many WebSocket clients on one thread. Shares no code with the server's framing, so that the two can
//! disagree. Implements the part of RFC 6455 that an honest client needs, and some violations.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use base64::Engine as _;
use rustix::event::{Timespec, epoll};
use sha1::{Digest as _, Sha1};
use tungstenite::protocol::frame::FrameHeader;

/// Bytes read from a socket at a time.
const SCRATCH_BYTES: usize = 256 * 1024;
/// Masking key of every frame. A constant is valid: the server must unmask with any key.
const MASK: [u8; 4] = [0x5a, 0x01, 0xfe, 0x80];
/// `Sec-WebSocket-Key` of every handshake (RFC 6455 §4.2.2).
const KEY: &str = "ZGVsaXZlcnktdGVzdHMhIQ==";

/// Index of a client in its fleet.
pub type ClientId = usize;

/// An event of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// The handshake was answered with 101. The head of the answer.
    Open(String),
    /// The handshake was answered with another status. The status and the answer so far.
    Refused(u16, String),
    /// A binary message.
    Binary(Vec<u8>),
    /// A text message.
    Text(String),
    /// A ping, already answered.
    Ping,
    /// A pong.
    Pong(Vec<u8>),
    /// A close frame, already answered; the socket is closed. 1005: the frame has no code.
    Closed(u16, String),
    /// The socket ended without a close frame.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientState {
    Handshaking,
    Open,
    /// This client has sent a close frame.
    Closing,
    Ended,
}

#[derive(Debug)]
struct Client {
    /// `None` once the client has ended: a test with many clients has no descriptors to spare.
    stream: Option<TcpStream>,
    state: ClientState,
    /// Sent as soon as the connection is open.
    first_message: Option<String>,
    /// An incomplete answer or frame.
    partial: Vec<u8>,
    answers_pings: bool,
}

/// How a client connects.
#[derive(Clone, Debug)]
pub struct Connect {
    /// Address of the server.
    pub address: SocketAddr,
    /// Path and query.
    pub target: String,
    /// More header lines, each with its CRLF.
    pub headers: String,
    /// Sent as soon as the connection is open.
    pub first_message: Option<String>,
    /// `SO_RCVBUF` before connecting.
    pub receive_buffer: Option<usize>,
    /// Whether it answers pings.
    pub answers_pings: bool,
}

impl Connect {
    /// An honest session of `user` on `device` that asks for no catch-up.
    pub fn session(address: SocketAddr, user: &str, device: &str) -> Self {
        Self {
            address,
            target: format!("/ws?user_id={user}&device_id={device}"),
            headers: String::new(),
            first_message: Some(r#"{"last_sequences":{}}"#.into()),
            receive_buffer: None,
            answers_pings: true,
        }
    }

    /// The bytes of the upgrade request.
    pub fn request(&self) -> String {
        format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n{}\r\n",
            self.target, self.address, self.headers
        )
    }
}

/// The clients and their epoll.
pub struct Fleet {
    epoll: OwnedFd,
    clients: Vec<Client>,
    scratch: Vec<u8>,
    ready: Vec<epoll::Event>,
}

impl Fleet {
    /// A fleet without clients. Raises `RLIMIT_NOFILE` of this process, and of those that it starts,
    /// to the maximum.
    pub fn new() -> Self {
        raise_descriptor_limit();
        Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll"),
            clients: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
            ready: Vec::with_capacity(1024),
        }
    }

    /// Connects and sends the upgrade request; the answer comes through [`Fleet::turn`].
    pub fn connect(&mut self, connect: &Connect) -> io::Result<ClientId> {
        let mut stream = dial(connect)?;
        stream.write_all(connect.request().as_bytes())?;
        self.adopt(stream, connect.first_message.clone(), connect.answers_pings)
    }

    /// Adds a socket on which an upgrade request has been sent, whole or in part.
    pub fn adopt(
        &mut self,
        stream: TcpStream,
        first_message: Option<String>,
        answers_pings: bool,
    ) -> io::Result<ClientId> {
        stream.set_nonblocking(true)?;
        let id = self.clients.len();
        epoll::add(
            &self.epoll,
            &stream,
            epoll::EventData::new_u64(id as u64),
            epoll::EventFlags::IN | epoll::EventFlags::RDHUP,
        )?;
        self.clients.push(Client {
            stream: Some(stream),
            state: ClientState::Handshaking,
            first_message,
            partial: Vec::new(),
            answers_pings,
        });
        Ok(id)
    }

    /// Clients ever added.
    pub fn len(&self) -> usize {
        self.clients.len()
    }

    /// Whether the client's connection is open.
    pub fn is_open(&self, id: ClientId) -> bool {
        self.clients[id].state == ClientState::Open
    }

    /// Clients whose connection is open.
    pub fn open_count(&self) -> usize {
        self.clients.iter().filter(|client| client.state == ClientState::Open).count()
    }

    /// Waits up to `timeout` for readable sockets and calls `on` for each event. Returns the number
    /// of readable sockets.
    pub fn turn(&mut self, timeout: Duration, on: &mut impl FnMut(ClientId, Received)) -> usize {
        let timeout =
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        self.ready.clear();
        let spare = rustix::buffer::spare_capacity(&mut self.ready);
        match epoll::wait(&self.epoll, spare, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("epoll: {error}"),
        }
        let ready = std::mem::take(&mut self.ready);
        for event in &ready {
            let id = event.data.u64() as usize;
            let client = &mut self.clients[id];
            if client.state != ClientState::Ended
                && !client.read(&mut self.scratch, &mut |received| on(id, received))
            {
                client.terminate(&self.epoll);
            }
        }
        let count = ready.len();
        self.ready = ready;
        count
    }

    /// Sends a masked frame. `false`: the socket did not take it whole.
    pub fn send(&mut self, id: ClientId, opcode: u8, payload: &[u8]) -> bool {
        self.clients[id].send(opcode, payload)
    }

    /// Sends a text message.
    pub fn send_text(&mut self, id: ClientId, text: &str) -> bool {
        self.send(id, 1, text.as_bytes())
    }

    /// Begins the closing handshake.
    pub fn close(&mut self, id: ClientId, code: u16) {
        let client = &mut self.clients[id];
        client.send(8, &code.to_be_bytes());
        if client.state == ClientState::Open {
            client.state = ClientState::Closing;
        }
    }

    /// Stops reading, so that the socket's buffers fill.
    pub fn stall(&mut self, id: ClientId) {
        epoll::delete(&self.epoll, self.stream(id)).expect("was added");
    }

    /// Reads again after [`Fleet::stall`].
    pub fn unstall(&mut self, id: ClientId) {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        let data = epoll::EventData::new_u64(id as u64);
        epoll::add(&self.epoll, self.stream(id), data, flags).expect("was not added");
    }

    /// Terminates the connection without a close frame; with a reset if anything is unread.
    pub fn abort(&mut self, id: ClientId) {
        self.clients[id].terminate(&self.epoll);
    }

    /// The socket, for invalid traffic.
    pub fn stream(&self, id: ClientId) -> &TcpStream {
        self.clients[id].stream.as_ref().expect("not ended")
    }
}

/// Opens the TCP connection.
pub fn dial(connect: &Connect) -> io::Result<TcpStream> {
    use rustix::net;
    let family = if connect.address.is_ipv4() {
        net::AddressFamily::INET
    } else {
        net::AddressFamily::INET6
    };
    let socket =
        net::socket_with(family, net::SocketType::STREAM, net::SocketFlags::CLOEXEC, None)?;
    if let Some(bytes) = connect.receive_buffer {
        net::sockopt::set_socket_recv_buffer_size(socket.as_fd(), bytes)?;
    }
    net::connect(&socket, &connect.address)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl Client {
    fn terminate(&mut self, epoll: &OwnedFd) {
        self.state = ClientState::Ended;
        if let Some(stream) = self.stream.take() {
            // Fails if the client is stalled, because it is not in the set then.
            let _ = epoll::delete(epoll, &stream);
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        self.partial = Vec::new();
    }

    fn send(&mut self, opcode: u8, payload: &[u8]) -> bool {
        let frame = masked_frame(true, opcode, payload);
        let Some(stream) = &mut self.stream else { return false };
        matches!(stream.write(&frame), Ok(written) if written == frame.len())
    }

    /// Reads once. `false`: the connection has ended, and `on` was called for that.
    fn read(&mut self, scratch: &mut [u8], on: &mut impl FnMut(Received)) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        match stream.read(scratch) {
            Ok(0) => {
                on(Received::Ended);
                false
            }
            Ok(count) => {
                if self.partial.is_empty() {
                    let Some(used) = self.take(&scratch[..count], on) else { return false };
                    self.partial.extend_from_slice(&scratch[used..count]);
                } else {
                    let mut partial = std::mem::take(&mut self.partial);
                    partial.extend_from_slice(&scratch[..count]);
                    let Some(used) = self.take(&partial, on) else { return false };
                    partial.drain(..used);
                    self.partial = partial;
                }
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(_) => {
                on(Received::Ended);
                false
            }
        }
    }

    /// Handles complete frames and returns their length. `None`: the connection has ended.
    fn take(&mut self, input: &[u8], on: &mut impl FnMut(Received)) -> Option<usize> {
        let mut used = 0;
        if self.state == ClientState::Handshaking {
            let end = input.windows(4).position(|window| window == b"\r\n\r\n");
            let Some(end) = end else { return Some(0) };
            used = end + 4;
            let head = std::str::from_utf8(&input[..used]).expect("an ASCII answer");
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
            if status != 101 {
                on(Received::Refused(status, String::from_utf8_lossy(input).into()));
                return None;
            }
            assert!(head.contains(&accept_value()), "the wrong Sec-WebSocket-Accept: {head}");
            self.state = ClientState::Open;
            on(Received::Open(head.into()));
            if let Some(text) = self.first_message.take() {
                assert!(self.send(1, text.as_bytes()), "a fresh socket takes a small message");
            }
        }
        while let Some((opcode, payload, length)) = server_frame(&input[used..]) {
            match opcode {
                1 => on(Received::Text(utf8(payload))),
                2 => on(Received::Binary(payload.into())),
                9 => {
                    if self.answers_pings {
                        self.send(10, payload);
                    }
                    on(Received::Ping);
                }
                10 => on(Received::Pong(payload.into())),
                8 => {
                    if self.state != ClientState::Closing {
                        self.send(8, payload);
                    }
                    let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    on(Received::Closed(code, utf8(payload.get(2..).unwrap_or_default())));
                    return None;
                }
                _ => panic!("the server sent opcode {opcode}"),
            }
            used += length;
        }
        Some(used)
    }
}

fn utf8(text: &[u8]) -> String {
    String::from_utf8(text.into()).expect("the server sends UTF-8")
}

/// Raises `RLIMIT_NOFILE` to the maximum and returns it.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .expect("up to the maximum");
    limit.maximum.unwrap_or(u64::MAX)
}

/// The first complete frame: opcode, payload, total length. The server neither masks nor fragments.
fn server_frame(input: &[u8]) -> Option<(u8, &[u8], usize)> {
    let [first, second, ..] = *input else { return None };
    assert_eq!(first & 0xf0, 0x80, "FIN, no reserved bits: {first:#x}");
    assert_eq!(second & 0x80, 0, "a server does not mask (RFC 6455 §5.1)");
    let (header, length) = match second {
        126 => (4, u64::from(u16::from_be_bytes(*input.get(2..)?.first_chunk()?))),
        127 => (10, u64::from_be_bytes(*input.get(2..)?.first_chunk()?)),
        length => (2, u64::from(length)),
    };
    let end = header + usize::try_from(length).expect("fits");
    Some((first & 0x0f, input.get(header..end)?, end))
}

/// A client's frame.
pub fn masked_frame(fin: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let (opcode, mask) = (opcode.into(), Some(MASK));
    let header = FrameHeader { is_final: fin, opcode, mask, ..FrameHeader::default() };
    let mut frame = Vec::new();
    header.format(payload.len() as u64, &mut frame).expect("memory takes it");
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

fn accept_value() -> String {
    let digest = Sha1::digest(format!("{KEY}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
    base64::engine::general_purpose::STANDARD.encode(digest)
}
