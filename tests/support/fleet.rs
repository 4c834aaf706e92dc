//! Many WebSocket clients on one thread. Written apart from the server's own framing, so that the
//! two can disagree; knows just enough of RFC 6455 for an honest client, and how to be a bad one.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use base64::Engine as _;
use rustix::event::{Timespec, epoll};
use sha1::{Digest as _, Sha1};

/// Read from one socket at a time.
const SCRATCH_BYTES: usize = 256 * 1024;
/// Any key will do for masking: the server must unmask whatever comes.
const MASK: [u8; 4] = [0x5a, 0x01, 0xfe, 0x80];
/// The nonce of every handshake, and the answer to it (RFC 6455 §4.2.2).
const KEY: &str = "ZGVsaXZlcnktdGVzdHMhIQ==";

/// Names a client of one fleet.
pub type ClientId = usize;

/// What happened to a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen<'a> {
    /// The handshake was answered with 101; the head of the answer.
    Open(&'a str),
    /// The handshake was answered with something else: status and the whole answer so far.
    Refused(u16, &'a str),
    /// A binary message.
    Binary(&'a [u8]),
    /// A text message.
    Text(&'a str),
    /// A ping, answered already.
    Ping,
    /// A pong.
    Pong(&'a [u8]),
    /// A close frame, answered already; the socket is closed. 1005: it carried no code.
    Closed(u16, &'a str),
    /// The socket ended without a close frame.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Handshaking,
    Open,
    /// We sent a close frame.
    Closing,
    Over,
}

#[derive(Debug)]
struct Client {
    /// Gone when the client is: a test with many clients has no descriptors to spare.
    stream: Option<TcpStream>,
    phase: Phase,
    /// Sent as soon as the connection is open.
    first_message: Option<String>,
    /// The beginning of what has not come whole.
    partial: Vec<u8>,
    answers_pings: bool,
}

/// How a client connects.
#[derive(Clone, Debug)]
pub struct Connect {
    /// Where.
    pub address: SocketAddr,
    /// Path and query.
    pub target: String,
    /// Header lines beyond those of every upgrade, each with its CRLF.
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

/// See the module.
pub struct Fleet {
    epoll: OwnedFd,
    clients: Vec<Client>,
    scratch: Vec<u8>,
    ready: Vec<epoll::Event>,
}

impl Fleet {
    /// Without clients. Lets this process, and what it starts from now on, have as many
    /// descriptors as it may.
    pub fn new() -> Self {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        let limit = rustix::process::Rlimit { current: limit.maximum, ..limit };
        setrlimit(Resource::Nofile, limit).expect("up to the maximum");
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

    /// Takes in a socket on which an upgrade request has been sent, whole or not.
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
        let phase = Phase::Handshaking;
        self.clients.push(Client {
            stream: Some(stream),
            phase,
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
        self.clients[id].phase == Phase::Open
    }

    /// Clients whose connection is open.
    pub fn open_count(&self) -> usize {
        self.clients.iter().filter(|client| client.phase == Phase::Open).count()
    }

    /// Waits up to `timeout` for something to read and tells what came. Returns how many sockets
    /// had something.
    pub fn turn(&mut self, timeout: Duration, on: &mut impl FnMut(ClientId, Seen<'_>)) -> usize {
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
            if client.phase != Phase::Over
                && !client.read(&mut self.scratch, &mut |seen| on(id, seen))
            {
                client.end(&self.epoll);
            }
        }
        let count = ready.len();
        self.ready = ready;
        count
    }

    /// Sends a masked frame. `false`: the socket did not take it.
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
        if client.phase == Phase::Open {
            client.phase = Phase::Closing;
        }
    }

    /// Stops reading, as a stalled program does: the socket's buffers fill.
    pub fn stall(&mut self, id: ClientId) {
        epoll::delete(&self.epoll, self.stream(id)).expect("was added");
    }

    /// Reads again after [`Fleet::stall`].
    pub fn unstall(&mut self, id: ClientId) {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        let data = epoll::EventData::new_u64(id as u64);
        epoll::add(&self.epoll, self.stream(id), data, flags).expect("was not added");
    }

    /// Ends the connection without a close frame; with a reset if anything was unread.
    pub fn abort(&mut self, id: ClientId) {
        self.clients[id].end(&self.epoll);
    }

    /// The socket, to be rude with.
    pub fn stream(&self, id: ClientId) -> &TcpStream {
        self.clients[id].stream.as_ref().expect("not over")
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
    fn end(&mut self, epoll: &OwnedFd) {
        self.phase = Phase::Over;
        if let Some(stream) = self.stream.take() {
            // Fails if the client was stalled, that is not watched.
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

    /// Reads what is there. `false`: the connection is over, and that has been told.
    fn read(&mut self, scratch: &mut [u8], on: &mut impl FnMut(Seen<'_>)) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        match stream.read(scratch) {
            Ok(0) => {
                on(Seen::Gone);
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
                on(Seen::Gone);
                false
            }
        }
    }

    /// Handles what came whole and returns how much that was. `None`: the connection is over.
    fn take(&mut self, input: &[u8], on: &mut impl FnMut(Seen<'_>)) -> Option<usize> {
        let mut used = 0;
        if self.phase == Phase::Handshaking {
            let end = input.windows(4).position(|window| window == b"\r\n\r\n");
            let Some(end) = end else { return Some(0) };
            used = end + 4;
            let head = std::str::from_utf8(&input[..used]).expect("an ASCII answer");
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
            if status != 101 {
                on(Seen::Refused(status, &String::from_utf8_lossy(input)));
                return None;
            }
            assert!(head.contains(&accept_value()), "the wrong Sec-WebSocket-Accept: {head}");
            self.phase = Phase::Open;
            on(Seen::Open(head));
            if let Some(text) = self.first_message.take() {
                assert!(self.send(1, text.as_bytes()), "a fresh socket takes a small message");
            }
        }
        while let Some((opcode, payload, length)) = server_frame(&input[used..]) {
            match opcode {
                1 => on(Seen::Text(std::str::from_utf8(payload).expect("the server sends UTF-8"))),
                2 => on(Seen::Binary(payload)),
                9 => {
                    if self.answers_pings {
                        self.send(10, payload);
                    }
                    on(Seen::Ping);
                }
                10 => on(Seen::Pong(payload)),
                8 => {
                    if self.phase != Phase::Closing {
                        self.send(8, payload);
                    }
                    let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    on(Seen::Closed(
                        code,
                        std::str::from_utf8(payload.get(2..).unwrap_or(&[])).expect("UTF-8"),
                    ));
                    return None;
                }
                _ => panic!("the server sent opcode {opcode}"),
            }
            used += length;
        }
        Some(used)
    }
}

/// The first whole frame: opcode, payload, length in all. The server neither masks nor fragments.
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
    let mut frame = vec![u8::from(fin) << 7 | opcode];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | length as u8),
        length @ 126..=65_535 => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

fn accept_value() -> String {
    let digest = Sha1::digest(format!("{KEY}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
    base64::engine::general_purpose::STANDARD.encode(digest)
}
