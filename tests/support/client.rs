//! One client at a time, for tests that tell a story.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::fleet::{Connect, Fleet, Seen};
use super::wait::SOON;

/// What a client saw, kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The head of the 101.
    Open(String),
    /// Status and whole answer.
    Refused(u16, String),
    /// A binary message.
    Binary(Vec<u8>),
    /// A text message.
    Text(String),
    /// A ping.
    Ping,
    /// A pong.
    Pong(Vec<u8>),
    /// A close frame.
    Closed(u16, String),
    /// The end without a close frame.
    Gone,
}

impl From<Seen<'_>> for Heard {
    fn from(seen: Seen<'_>) -> Self {
        match seen {
            Seen::Open(head) => Self::Open(head.into()),
            Seen::Refused(status, answer) => Self::Refused(status, answer.into()),
            Seen::Binary(payload) => Self::Binary(payload.into()),
            Seen::Text(text) => Self::Text(text.into()),
            Seen::Ping => Self::Ping,
            Seen::Pong(payload) => Self::Pong(payload.into()),
            Seen::Closed(code, reason) => Self::Closed(code, reason.into()),
            Seen::Gone => Self::Gone,
        }
    }
}

/// See the module.
pub struct Client {
    fleet: Fleet,
    heard: VecDeque<Heard>,
}

impl Client {
    /// Sends the upgrade request.
    pub fn connect(connect: &Connect) -> Self {
        let mut fleet = Fleet::new();
        fleet.connect(connect).expect("the server accepts");
        Self { fleet, heard: VecDeque::new() }
    }

    /// Takes in a socket on which an upgrade request has been sent, whole or not.
    pub fn adopt(stream: std::net::TcpStream) -> Self {
        let mut fleet = Fleet::new();
        fleet.adopt(stream, None, true).expect("a socket");
        Self { fleet, heard: VecDeque::new() }
    }

    /// An honest session, open.
    pub fn session(address: SocketAddr, user: &str, device: &str) -> Self {
        Self::opened(&Connect::session(address, user, device))
    }

    /// Connects and waits for the 101.
    #[track_caller]
    pub fn opened(connect: &Connect) -> Self {
        let mut client = Self::connect(connect);
        match client.hear() {
            Heard::Open(_) => client,
            other => panic!("not open: {other:?}"),
        }
    }

    /// Waits for the next thing.
    #[track_caller]
    pub fn hear(&mut self) -> Heard {
        self.hear_within(SOON).expect("hears something in time")
    }

    /// Waits for the next thing, but not longer.
    pub fn hear_within(&mut self, limit: Duration) -> Option<Heard> {
        let deadline = Instant::now() + limit;
        while self.heard.is_empty() {
            let left = deadline.checked_duration_since(Instant::now())?;
            let heard = &mut self.heard;
            self.fleet.turn(left, &mut |_, seen| heard.push_back(seen.into()));
        }
        self.heard.pop_front()
    }

    /// Waits for the end, passing over everything before it.
    #[track_caller]
    pub fn hear_end(&mut self) -> Heard {
        loop {
            let heard = self.hear();
            if matches!(heard, Heard::Closed(..) | Heard::Gone | Heard::Refused(..)) {
                return heard;
            }
        }
    }

    /// Sends a masked frame, whole or not.
    pub fn send(&mut self, opcode: u8, payload: &[u8]) -> bool {
        self.fleet.send(0, opcode, payload)
    }

    /// Sends a text message.
    pub fn send_text(&mut self, text: &str) -> bool {
        self.fleet.send_text(0, text)
    }

    /// Begins the closing handshake.
    pub fn close(&mut self, code: u16) {
        self.fleet.close(0, code);
    }

    /// Ends without a word.
    pub fn abort(&mut self) {
        self.fleet.abort(0);
    }

    /// The socket, to be rude with.
    pub fn stream(&self) -> &std::net::TcpStream {
        self.fleet.stream(0)
    }
}
