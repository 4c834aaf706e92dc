//! The client's loop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use flate2::{Decompress, FlushDecompress};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use serde::Serialize;

use super::dial::Dialer;
use super::echo::Echo;
use super::net;
use super::request::{ClientConfig, hello, upgrade_request};
use super::rooms::Rooms;
use super::session::{Session, SocketState};
use super::tally::Tally;
use super::tls::TlsConnections;
use crate::clock::now_ns;
use crate::control;
use crate::frame;
use crate::journey::Arrival;
use crate::latency::Latencies;
use crate::payload::Stamp;

/// Handshakes in flight: few enough that the server's backlog does not limit them.
const DIALING_MAX: usize = 512;
const EVENTS_MAX: usize = 512;
const READ_BYTES: usize = 256 * 1024;
const COMMAND: u64 = u64::MAX;

/// The load client.
pub struct Client {
    config: ClientConfig,
    epoll: OwnedFd,
    sessions: Vec<Session>,
    open: usize,
    dialer: Dialer,
    /// Connects begun so far.
    dialed: usize,
    echo: Option<Echo>,
    stalled: bool,
    tls: Option<TlsConnections>,
    /// Bytes of TLS.
    sealed: Vec<u8>,
    /// Of sessions with several conversations.
    rooms: Option<Rooms>,
    tally: Tally,
    buffer: Vec<u8>,
    inflater: Decompress,
    inflated: Vec<u8>,
    commands: Receiver<String>,
    _command_bell: Arc<OwnedFd>,
}

#[derive(Serialize)]
struct Done<'a> {
    done: &'a str,
}

#[derive(Serialize)]
struct Arrivals<'a> {
    arrivals: &'a [Arrival],
}

#[derive(Serialize)]
struct Latency<'a> {
    latency: &'a Latencies,
}

impl Client {
    /// A client without connections.
    ///
    /// # Errors
    /// The system has no epoll or eventfd left.
    pub fn new(config: ClientConfig) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(&epoll, &*bell, EventData::new_u64(COMMAND), EventFlags::IN | EventFlags::ET)?;
        let ringer = Arc::clone(&bell);
        let commands = control::commands(
            |line| Some(line.to_owned()),
            move || {
                // Fails only if the counter is full, which wakes the client as well.
                let _ = rustix::io::write(&*ringer, &1_u64.to_ne_bytes());
            },
        );
        Ok(Self {
            rooms: (config.resume_each > 1).then(|| {
                let shape = (config.resume_group, config.resume_each);
                Rooms::new(config.first, config.sessions, shape, config.cursors)
            }),
            tls: config.tls.then(|| TlsConnections::new(config.sessions)),
            sealed: vec![0; READ_BYTES],
            sessions: (0..config.sessions).map(|_| Session::down()).collect(),
            config,
            epoll,
            open: 0,
            dialer: Dialer::default(),
            dialed: 0,
            echo: None,
            stalled: false,
            tally: Tally::default(),
            buffer: vec![0; READ_BYTES],
            inflater: Decompress::new(false),
            inflated: Vec::new(),
            commands,
            _command_bell: bell,
        })
    }

    /// Connects, then obeys words until the standard input ends.
    ///
    /// # Errors
    /// epoll failed.
    pub fn run(mut self) -> io::Result<()> {
        let all = (0..self.config.sessions as u32).collect();
        self.dialer.start("connect", all, self.config.connect_rate);
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS_MAX);
        loop {
            self.dial();
            if let Some(dialed) = self.dialer.finished() {
                control::answer(&dialed);
            }
            self.pace_echo();
            let wait_ms = match self.config.never_sleep {
                true => 0,
                false if self.dialer.is_busy() || self.echo.is_some() => 1,
                false => 1000,
            };
            let timeout = Timespec { tv_sec: wait_ms / 1000, tv_nsec: wait_ms % 1000 * 1_000_000 };
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&timeout),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match { event.data }.u64() {
                    COMMAND => {}
                    index => self.ready(index as usize, event.flags),
                }
            }
            if !self.obey() {
                return Ok(());
            }
        }
    }

    fn obey(&mut self) -> bool {
        loop {
            let line = match self.commands.try_recv() {
                Ok(line) => line,
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            let number =
                |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            match words.first().copied() {
                Some("quit") => return false,
                Some("report") => control::answer(&self.tally.report(self.open)),
                Some("latency") => control::answer(&Latency { latency: &self.tally.latency }),
                Some("arrivals") => {
                    let arrivals = self.tally.arrivals.as_deref().unwrap_or_default();
                    control::answer(&Arrivals { arrivals });
                }
                Some(word @ ("reset" | "trace")) => {
                    let arrivals = (word == "trace").then(Vec::new);
                    self.tally = Tally { arrivals, ..Tally::default() };
                    if self.config.resume_group == 0 {
                        self.sessions.iter_mut().for_each(|session| session.mark = 0);
                    }
                    control::answer(&Done { done: word });
                }
                Some("echo") => {
                    self.echo = Some(Echo::new(number(2) as usize, number(3)));
                    self.send_echoes(number(1) as usize);
                }
                Some("drop") => {
                    for index in 0..self.sessions.len() {
                        self.drop_socket(index);
                    }
                    control::answer(&Done { done: "drop" });
                }
                Some("return") => self.come_back(words.get(1).copied(), number(2)),
                Some("churn") => self.churn(number(1) as usize),
                Some("storm") => {
                    let all = (0..self.sessions.len() as u32).collect();
                    for index in 0..self.sessions.len() {
                        self.close(index);
                    }
                    self.dialer.storm(all, number(1));
                }
                Some("stall") => {
                    self.stalled = true;
                    control::answer(&Done { done: "stall" });
                }
                Some("unstall") => {
                    self.stalled = false;
                    for index in 0..self.sessions.len() {
                        self.read(index);
                    }
                    control::answer(&Done { done: "unstall" });
                }
                _ => eprintln!("unknown word: {line}"),
            }
        }
    }

    fn churn(&mut self, count: usize) {
        // Spread over all sessions; a different set each time.
        let step = (self.sessions.len() / count.max(1)).max(1);
        let from = now_ns() as usize % step;
        let chosen: Vec<u32> =
            (from..self.sessions.len()).step_by(step).take(count).map(|n| n as u32).collect();
        for index in &chosen {
            self.close(*index as usize);
        }
        self.dialer.start("churn", chosen, 0);
    }

    /// Connects all sessions that are down, to this server, at this rate.
    fn come_back(&mut self, server: Option<&str>, rate: u64) {
        match server.map(str::parse) {
            Some(Ok(server)) => self.config.server = server,
            _ => eprintln!("return ADDRESS RATE: no address"),
        }
        let is_down = |index: &u32| self.sessions[*index as usize].state == SocketState::Down;
        let down = (0..self.sessions.len() as u32).filter(is_down).collect();
        self.dialer.start("return", down, rate);
    }

    fn dial(&mut self) {
        while let Some(index) = self.dialer.next(DIALING_MAX) {
            let index = index as usize;
            let began = now_ns();
            let buffer = self.config.receive_buffer_bytes;
            let begun = net::begin(self.config.server, self.dialed, buffer).and_then(|socket| {
                let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
                epoll::add(&self.epoll, &socket, EventData::new_u64(index as u64), flags)?;
                Ok(socket)
            });
            self.dialed += 1;
            match begun {
                Ok(socket) => {
                    self.sessions[index] = Session {
                        socket: Some(socket),
                        began_ns: began,
                        mark: self.sessions[index].mark,
                        state: SocketState::Dialing,
                        ..Session::down()
                    };
                }
                Err(error) => {
                    eprintln!("session {index}: {error}");
                    self.tally.refused += 1;
                    self.dialer.failed();
                }
            }
        }
    }

    fn ready(&mut self, index: usize, flags: EventFlags) {
        if self.sessions[index].state == SocketState::Dialing {
            if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
                return self.lose(index);
            }
            if flags.contains(EventFlags::OUT) {
                self.sessions[index].state = SocketState::Upgrading;
                if let Some(tls) = &mut self.tls {
                    tls.begin(index);
                }
                let request = upgrade_request(&self.config, self.config.first + index);
                self.write(index, &request);
            }
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
        {
            self.read(index);
        }
    }

    /// Writes bytes that are far fewer than a socket's buffer holds.
    fn write(&mut self, index: usize, bytes: &[u8]) {
        let Some(socket) = &self.sessions[index].socket else { return };
        let sealed = self.tls.as_mut().map(|tls| tls.say(index, bytes).expect("memory takes it"));
        let bytes = sealed.as_deref().unwrap_or(bytes);
        if bytes.is_empty() {
            return;
        }
        match rustix::io::write(socket.as_fd(), bytes) {
            Ok(count) if count == bytes.len() => {}
            Ok(_) | Err(Errno::AGAIN) => panic!("the socket did not take {} bytes", bytes.len()),
            Err(_) => self.lose(index),
        }
    }

    fn read(&mut self, index: usize) {
        loop {
            if self.stalled && self.sessions[index].state == SocketState::Open {
                return;
            }
            let session = &mut self.sessions[index];
            let Some(socket) = &session.socket else { return };
            let kept = session.partial.as_ref().map_or(0, |partial| partial.len());
            if let Some(partial) = session.partial.take() {
                if self.buffer.len() < kept + READ_BYTES / 2 {
                    self.buffer.resize(kept + READ_BYTES, 0);
                }
                self.buffer[..kept].copy_from_slice(&partial);
            }
            let into = match self.tls {
                None => &mut self.buffer[kept..],
                Some(_) => &mut self.sealed[..READ_BYTES / 4],
            };
            let room = into.len();
            let received = match rustix::io::read(socket, into) {
                Ok(0) => return self.lose(index),
                Ok(count) => count,
                Err(Errno::AGAIN) => 0,
                Err(_) => return self.lose(index),
            };
            self.tally.bytes += received as u64;
            let count = match &mut self.tls {
                None => received,
                Some(tls) => {
                    let mut plain = Vec::new();
                    if tls.hear(index, &self.sealed[..received], &mut plain).is_err() {
                        return self.lose(index);
                    }
                    self.buffer[kept..kept + plain.len()].copy_from_slice(&plain);
                    self.write(index, &[]);
                    plain.len()
                }
            };
            let buffer = std::mem::take(&mut self.buffer);
            let used = self.consume(index, &buffer[..kept + count]);
            let rest = &buffer[used..kept + count];
            if !rest.is_empty() && self.sessions[index].socket.is_some() {
                self.sessions[index].partial = Some(Box::new(rest.to_vec()));
            }
            self.buffer = buffer;
            if received < room {
                return;
            }
        }
    }

    /// Returns the number of bytes consumed.
    fn consume(&mut self, index: usize, input: &[u8]) -> usize {
        let mut used = 0;
        if self.sessions[index].state == SocketState::Upgrading {
            let Some(head) = frame::head_end(input) else { return 0 };
            if !input.starts_with(b"HTTP/1.1 101") {
                if self.tally.refused < 3 {
                    eprintln!("refused: {}", String::from_utf8_lossy(&input[..head]).trim());
                }
                self.lose(index);
                return input.len();
            }
            used = head;
            self.opened(index);
        }
        while let Some(frame) = frame::parse(&input[used..]) {
            used += frame.total;
            self.frame(index, frame);
        }
        used
    }

    fn opened(&mut self, index: usize) {
        let Session { began_ns, mark, .. } = self.sessions[index];
        self.sessions[index].state = SocketState::Open;
        self.open += 1;
        let hello = match &self.rooms {
            Some(rooms) => rooms.hello(index),
            None => hello(&self.config, self.config.first + index, mark),
        };
        if !hello.is_empty() {
            let mut message = Vec::new();
            frame::put_masked(&mut message, frame::TEXT, hello.as_bytes());
            self.write(index, &message);
        }
        if self.dialer.opened(index as u32, began_ns) {
            self.close(index);
        }
    }

    fn frame(&mut self, index: usize, frame: frame::Frame<'_>) {
        match frame.opcode {
            frame::TEXT | frame::BINARY => {}
            frame::PING => {
                self.tally.pings += 1;
                let mut pong = Vec::new();
                frame::put_masked(&mut pong, frame::PONG, frame.payload);
                return self.write(index, &pong);
            }
            frame::CLOSE => {
                if self.tally.closed < 3 {
                    let code =
                        frame.payload.first_chunk().map_or(0, |code| u16::from_be_bytes(*code));
                    let reason =
                        String::from_utf8_lossy(frame.payload.get(2..).unwrap_or_default());
                    eprintln!("session {index} closed by the server: {code} {reason}");
                }
                return;
            }
            _ => return,
        }
        let payload =
            if frame.compressed { self.inflate(frame.payload) } else { frame.payload.to_vec() };
        if self.sessions[index].waits {
            self.sessions[index].waits = false;
            if let Some(echo) = &mut self.echo {
                echo.receive(&payload);
                if !echo.has_ended() {
                    self.send_echoes(1);
                }
            }
            return;
        }
        if let Some(rooms) = &mut self.rooms {
            return rooms.receive(index, &payload, &mut self.tally);
        }
        let now = now_ns();
        self.tally.messages += 1;
        self.tally.first_ns.get_or_insert(now);
        self.tally.last_ns = now;
        match Stamp::find(&payload) {
            None => self.tally.unstamped += 1,
            Some(stamp) => {
                self.tally.latency.record(now.saturating_sub(stamp.intended_ns));
                self.tally.order(&mut self.sessions[index].mark, stamp.sequence as u32);
                if let Some(arrivals) = &mut self.tally.arrivals {
                    let (session, sequence) = (index as u32, stamp.sequence as u32);
                    arrivals.push(Arrival { session, sequence, at_ns: now });
                }
            }
        }
    }

    fn inflate(&mut self, payload: &[u8]) -> Vec<u8> {
        let mut input = payload.to_vec();
        input.extend_from_slice(&[0, 0, 0xff, 0xff]); // RFC 7692 §7.2.2
        self.inflater.reset(false);
        self.inflated.clear();
        self.inflated.reserve(1 << 20);
        // A payload that cannot be inflated is counted as one without a stamp.
        let _ = self.inflater.decompress_vec(&input, &mut self.inflated, FlushDecompress::Sync);
        std::mem::take(&mut self.inflated)
    }

    fn send_echoes(&mut self, count: usize) {
        let Some(mut echo) = self.echo.take() else { return };
        let mut tried = 0;
        let mut sent = 0;
        while sent < count && tried < self.sessions.len() {
            let index = echo.turn;
            echo.turn = (echo.turn + 1) % self.sessions.len();
            tried += 1;
            if self.sessions[index].state != SocketState::Open || self.sessions[index].waits {
                continue;
            }
            self.sessions[index].waits = true;
            echo.in_flight += 1;
            sent += 1;
            let mut bytes = Vec::new();
            frame::put_masked(&mut bytes, frame::BINARY, &echo.payload());
            self.write(index, &bytes);
        }
        self.echo = Some(echo);
    }

    fn pace_echo(&mut self) {
        if self.echo.as_ref().is_some_and(|echo| echo.has_ended() && echo.in_flight == 0)
            && let Some(echo) = self.echo.take()
        {
            control::answer(&echo.report());
        }
    }

    /// Our own close: a close frame, then the end.
    fn close(&mut self, index: usize) {
        if self.sessions[index].state == SocketState::Open {
            let mut bytes = Vec::new();
            frame::put_masked(&mut bytes, frame::CLOSE, &1000_u16.to_be_bytes());
            self.write(index, &bytes);
        }
        if self.sessions[index].state == SocketState::Open {
            self.open -= 1;
        }
        self.down(index);
    }

    /// The network is gone: no close frame.
    fn drop_socket(&mut self, index: usize) {
        if self.sessions[index].state == SocketState::Open {
            self.open -= 1;
        }
        self.down(index);
    }

    /// Closes the socket; what the session has received stays known.
    fn down(&mut self, index: usize) {
        let mark = self.sessions[index].mark;
        self.sessions[index] = Session { mark, ..Session::down() };
    }

    /// The other side ended it, or it never came up.
    fn lose(&mut self, index: usize) {
        match self.sessions[index].state {
            SocketState::Down => {}
            SocketState::Dialing | SocketState::Upgrading => {
                self.tally.refused += 1;
                self.dialer.failed();
            }
            SocketState::Open => {
                self.tally.closed += 1;
                self.open -= 1;
                if self.sessions[index].waits
                    && let Some(echo) = &mut self.echo
                {
                    echo.in_flight -= 1;
                }
            }
        }
        self.down(index);
    }
}
