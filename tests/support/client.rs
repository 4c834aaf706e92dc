//! A single client, for tests that go step by step.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub use super::fleet::Received;
use super::fleet::{Connect, Fleet};
use super::wait::SOON;

/// A client whose events are read one at a time.
pub struct Client {
    fleet: Fleet,
    received: VecDeque<Received>,
}

impl Client {
    /// Sends the upgrade request.
    pub fn connect(connect: &Connect) -> Self {
        let mut fleet = Fleet::new();
        fleet.connect(connect).expect("the server accepts");
        Self { fleet, received: VecDeque::new() }
    }

    /// Uses a socket on which an upgrade request has been sent, whole or in part.
    pub fn adopt(stream: std::net::TcpStream) -> Self {
        let mut fleet = Fleet::new();
        fleet.adopt(stream, None, true).expect("a socket");
        Self { fleet, received: VecDeque::new() }
    }

    /// Opens an honest session.
    pub fn session(address: SocketAddr, user: &str, device: &str) -> Self {
        Self::opened(&Connect::session(address, user, device))
    }

    /// Connects and waits for the 101.
    #[track_caller]
    pub fn opened(connect: &Connect) -> Self {
        let mut client = Self::connect(connect);
        match client.receive() {
            Received::Open(_) => client,
            other => panic!("not open: {other:?}"),
        }
    }

    /// Waits for the next thing.
    #[track_caller]
    pub fn receive(&mut self) -> Received {
        self.receive_within(SOON).expect("an event in time")
    }

    /// Waits for the next thing, but not longer.
    pub fn receive_within(&mut self, limit: Duration) -> Option<Received> {
        let deadline = Instant::now() + limit;
        while self.received.is_empty() {
            let left = deadline.checked_duration_since(Instant::now())?;
            let received = &mut self.received;
            self.fleet.turn(left, &mut |_, event| received.push_back(event));
        }
        self.received.pop_front()
    }

    /// Waits for the end of the connection and skips everything before it.
    #[track_caller]
    pub fn receive_end(&mut self) -> Received {
        loop {
            let received = self.receive();
            if matches!(received, Received::Closed(..) | Received::Ended | Received::Refused(..)) {
                return received;
            }
        }
    }

    /// Sends a masked frame. `false`: the socket did not take it whole.
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

    /// Terminates the connection without a close frame.
    pub fn abort(&mut self) {
        self.fleet.abort(0);
    }

    /// The socket, for invalid traffic.
    pub fn stream(&self) -> &std::net::TcpStream {
        self.fleet.stream(0)
    }
}
