//! Clients that behave badly, many at a time, from many addresses. What ends is opened again at once. They stop at the
//! first line of the standard input.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::json;

use crate::client::net;
use crate::names;

/// How often each client acts.
const PASS: Duration = Duration::from_millis(100);
/// Parts of a pass, each with as many clients: they are many machines, which do not act at the same moment.
const PARTS: usize = 20;
/// Number of the first user, above those of all other clients.
const FIRST_USER: usize = 20_000_000;
/// Connects of one part of a pass, so that those who behave get in as well.
const CONNECTS_OF_A_PART: usize = 500 / PARTS;

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Hostility {
    /// Connect and send nothing.
    Silent,
    /// Send an upgrade request byte by byte.
    Drip,
    /// Send a request head without an end.
    FloodHead,
    /// Send a request that is refused, and then more and more.
    FloodRefused,
    /// Open a session and send bytes that are no frames.
    FloodFrames,
    /// Open a session and send pings, as many as are allowed.
    Ping,
    /// Have everything echoed, and read nothing.
    NotReading,
    /// Have everything echoed, and read 625 bytes a second.
    SlowReading,
    /// Send half of the HTTP/2 preface.
    HalfPreface,
    /// Open gRPC streams without a request, one after the other.
    Streams,
}

/// Clients that behave badly.
#[derive(Clone, Debug, clap::Parser)]
pub struct HostilePlan {
    /// The WebSocket address.
    #[arg(long)]
    server: SocketAddr,
    /// The gRPC address.
    #[arg(long)]
    grpc: SocketAddr,
    /// What they do.
    #[arg(long)]
    kind: Hostility,
    /// How many.
    #[arg(long, default_value_t = 1800)]
    clients: usize,
    /// Bytes that each of them may send in a second, if that is what they do.
    #[arg(long, default_value_t = 64 * 1024)]
    bytes_per_s: usize,
}

/// One client.
#[derive(Default)]
struct Enemy {
    socket: Option<OwnedFd>,
    /// Bytes of its greeting that are sent.
    greeted: usize,
    /// Bytes of the junk that are sent of this turn of it.
    at: usize,
    /// Its next stream.
    stream: u32,
}

struct Enemies {
    plan: HostilePlan,
    all: Vec<Enemy>,
    opened: u64,
    ended: u64,
    sent: u64,
    junk: Vec<u8>,
    buffer: Vec<u8>,
}

impl HostilePlan {
    /// Runs until a line comes, then prints how often they connected.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn run(self) -> io::Result<()> {
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        std::thread::spawn(move || {
            let _ = io::stdin().read_line(&mut String::new());
            stop.store(true, Ordering::Relaxed);
        });
        let junk = match self.kind {
            // A masked frame of 4 KiB for `/echo`.
            Hostility::NotReading | Hostility::SlowReading => {
                let mut frame = vec![0x82, 0xfe, 0x10, 0x00, 0, 0, 0, 0];
                frame.resize(8 + 4096, b'e');
                frame
            }
            Hostility::Ping => vec![0x89, 0x80, 0, 0, 0, 0],
            _ => vec![b'a'; 16 * 1024],
        };
        let all = (0..self.clients).map(|_| Enemy::default()).collect();
        let mut enemies = Enemies {
            plan: self,
            all,
            opened: 0,
            ended: 0,
            sent: 0,
            junk,
            buffer: vec![0; 65_536],
        };
        for part in (0..PARTS).cycle() {
            if stopped.load(Ordering::Relaxed) {
                break;
            }
            let next = Instant::now() + PASS / PARTS as u32;
            enemies.act_in(part)?;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        println!(
            "{}",
            json!({ "opened": enemies.opened, "ended": enemies.ended, "bytes": enemies.sent })
        );
        Ok(())
    }

    fn is_grpc(&self) -> bool {
        matches!(self.kind, Hostility::HalfPreface | Hostility::Streams)
    }

    /// What client `number` sends first.
    fn greeting(&self, number: usize) -> Vec<u8> {
        let head = |path: &str, more: &str| {
            format!(
                "GET {path}?user_id={}&device_id=d HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: \
                 Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{more}",
                names::user(FIRST_USER + number),
                self.server,
            )
            .into_bytes()
        };
        match self.kind {
            Hostility::Silent => Vec::new(),
            Hostility::Drip | Hostility::FloodFrames | Hostility::Ping => head("/ws", "\r\n"),
            Hostility::FloodHead => head("/ws", "X-Endless: "),
            // No user.
            Hostility::FloodRefused => {
                b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                    .to_vec()
            }
            Hostility::NotReading | Hostility::SlowReading => head("/echo", "\r\n"),
            Hostility::HalfPreface => b"PRI * HTTP/2.0\r\n\r\nS".to_vec(),
            Hostility::Streams => {
                let mut preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
                preface.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]); // SETTINGS, empty
                preface
            }
        }
    }
}

/// HEADERS of a call of `Connect` on this stream, without a token and without an end (RFC 9113 §6.2; fields as literals
/// without indexing, RFC 7541 §6.2.2).
fn headers(stream: u32) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/realchat.delivery.v1.DeliveryApi/Connect"),
        (":authority", "h"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    let mut frame = vec![0, 0, block.len() as u8, 1, 4];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend(block);
    frame
}

impl Enemies {
    /// Lets the clients of one part act.
    fn act_in(&mut self, part: usize) -> io::Result<()> {
        let mut connects = CONNECTS_OF_A_PART;
        for number in (part..self.all.len()).step_by(PARTS) {
            if self.all[number].socket.is_none() {
                if connects == 0 {
                    continue;
                }
                connects -= 1;
                let address = if self.plan.is_grpc() { self.plan.grpc } else { self.plan.server };
                // Small, so that what is not read waits in the server.
                let buffer = match self.plan.kind {
                    Hostility::NotReading | Hostility::SlowReading => 4096,
                    _ => 0,
                };
                let socket = net::begin(address, number, buffer).ok();
                self.opened += u64::from(socket.is_some());
                self.all[number] = Enemy { socket, stream: 1, ..Enemy::default() };
                continue;
            }
            if !self.act(number) {
                self.ended += 1;
                self.all[number].socket = None;
            }
        }
        Ok(())
    }

    /// What client `number` does in one pass. Returns false if its connection has ended.
    fn act(&mut self, number: usize) -> bool {
        let Self { plan, all, junk, buffer, sent, .. } = self;
        let enemy = &mut all[number];
        let Some(socket) = &enemy.socket else { return false };
        let reads = match plan.kind {
            Hostility::NotReading => 0,
            Hostility::SlowReading => 62,
            _ => buffer.len(),
        };
        if reads > 0 {
            match recv(socket, &mut buffer[..reads], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return false,
                Ok(_) | Err(Errno::AGAIN | Errno::NOTCONN) => {}
                Err(_) => return false,
            }
        }
        let mut say =
            |bytes: &[u8]| match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(taken) => {
                    *sent += taken as u64;
                    Some(taken)
                }
                Err(Errno::AGAIN | Errno::NOTCONN) => Some(0),
                Err(_) => None,
            };
        let greeting = plan.greeting(number);
        if enemy.greeted < greeting.len() {
            let rest = &greeting[enemy.greeted..];
            let part = if plan.kind == Hostility::Drip { &rest[..1] } else { rest };
            let Some(taken) = say(part) else { return false };
            enemy.greeted += taken;
            return true;
        }
        match plan.kind {
            Hostility::Silent | Hostility::HalfPreface | Hostility::Drip => true,
            // As many as `INBOUND_MESSAGES_PER_SECOND` allows: 90 of 100.
            Hostility::Ping => say(&junk.repeat(9)).is_some(),
            Hostility::Streams => {
                let frames: Vec<u8> =
                    (0..5).flat_map(|more| headers(enemy.stream + 2 * more)).collect();
                enemy.stream += 10;
                say(&frames).is_some()
            }
            _ => {
                let mut left = plan.bytes_per_s / 10;
                while left > 0 {
                    let rest = &junk[enemy.at..];
                    match say(&rest[..rest.len().min(left)]) {
                        None => return false,
                        Some(0) => break,
                        Some(taken) => {
                            left -= taken;
                            enemy.at = (enemy.at + taken) % junk.len();
                        }
                    }
                }
                true
            }
        }
    }
}
