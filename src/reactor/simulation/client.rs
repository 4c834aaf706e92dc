//! The model of a client: honest, slow, broken or hostile, depending on the seed; and what it may
//! expect.

use std::collections::VecDeque;

use super::random::Random;
use super::session::Session;
use super::tls::ClientTls;
use super::wire::{self, Wire, client_frame};
use crate::reactor::simulation::kernel::SocketId;
use crate::reactor::wheel::TICK_MS;

/// What the client connects for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientKind {
    /// A session, with or without JSON.
    Session { json: bool },
    /// `/echo`.
    Echo,
    /// A request that is refused.
    Bad,
    /// A request that is never completed.
    Endless,
}

/// How the client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Everything, at once.
    Prompt,
    /// A little at a time.
    Slow,
    /// Nothing.
    Stalled,
}

/// Actions of the client that explain its end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ClientActs {
    pub(super) ended: bool,
    pub(super) reset: bool,
    pub(super) closed: bool,
    pub(super) broke_protocol: bool,
    /// It has not completed a message in time.
    pub(super) was_slow: bool,
    /// It sends without pause, and never reads anything again.
    pub(super) floods: bool,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: SocketId,
    pub(super) kind: ClientKind,
    pub(super) reading: Reading,
    /// It does nothing wrong, and its socket takes everything at once.
    pub(super) stands_by: bool,
    /// Bytes to send: the request, later frames.
    pub(super) outbox: VecDeque<u8>,
    /// Since when a part of what it has begun to send is missing, ms.
    pub(super) partly_sent_since_ms: Option<u64>,
    pub(super) wire: Wire,
    /// `None`: it speaks plaintext.
    pub(super) tls: Option<ClientTls>,
    pub(super) answered: Option<u16>,
    pub(super) acts: ClientActs,
    pub(super) session: Session,
    /// Texts that must be reported to the session manager, in order.
    pub(super) texts: VecDeque<String>,
    /// Payloads of pings that may be answered.
    pub(super) pings: VecDeque<Vec<u8>>,
    /// Payloads that must be echoed.
    pub(super) echoes: VecDeque<Vec<u8>>,
    /// Whether the shard has closed its socket.
    pub(super) over: bool,
    /// Whether the shard has pinged it and received nothing since.
    pub(super) pinged: bool,
    /// Frames that it has queued.
    pub(super) frames: usize,
    serial: u32,
}

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

impl Client {
    pub(super) fn new(
        number: usize,
        socket: SocketId,
        kind: ClientKind,
        random: &mut Random,
    ) -> Self {
        let reading = match random.below(16) {
            0 => Reading::Stalled,
            1..=3 => Reading::Slow,
            _ => Reading::Prompt,
        };
        let mut client = Self {
            socket,
            kind,
            reading,
            stands_by: false,
            outbox: VecDeque::new(),
            partly_sent_since_ms: None,
            wire: Wire::default(),
            tls: None,
            answered: None,
            acts: ClientActs::default(),
            session: Session::default(),
            texts: VecDeque::new(),
            pings: VecDeque::new(),
            echoes: VecDeque::new(),
            over: false,
            pinged: false,
            frames: 0,
            serial: 0,
        };
        client.outbox.extend(request(number, kind).into_bytes());
        // Some clients do not wait for the response.
        if matches!(kind, ClientKind::Session { .. }) && random.chance(32) {
            client.queue_text(random);
        }
        client
    }

    fn key(random: &mut Random) -> [u8; 4] {
        (random.draw() as u32).to_be_bytes()
    }

    /// Whether it may still send frames.
    pub(super) fn may_send(&self) -> bool {
        let ClientActs { ended, reset, closed, broke_protocol, .. } = self.acts;
        let has_session_or_echo =
            matches!(self.kind, ClientKind::Session { .. } | ClientKind::Echo);
        has_session_or_echo && !(self.over || ended || reset || closed || broke_protocol)
    }

    /// Takes the first bytes of its outbox to send them at `now_ms`. Its messages have to be complete within
    /// `message_ms_max`.
    pub(super) fn takes(&mut self, length: usize, now_ms: u64, message_ms_max: u64) -> Vec<u8> {
        self.acts.was_slow |= self.is_slow(now_ms, message_ms_max);
        let bytes = self.outbox.drain(..length).collect();
        let since_ms = self.partly_sent_since_ms.unwrap_or(now_ms);
        self.partly_sent_since_ms = (!self.outbox.is_empty()).then_some(since_ms);
        bytes
    }

    /// Whether it has not completed a message in time, or might not have.
    pub(super) fn is_slow(&self, now_ms: u64, message_ms_max: u64) -> bool {
        let since_ms = self.partly_sent_since_ms;
        self.acts.was_slow
            || since_ms.is_some_and(|since_ms| now_ms + TICK_MS >= since_ms + message_ms_max)
    }

    /// Queues a text that must reach the session manager, possibly in fragments.
    pub(super) fn queue_text(&mut self, random: &mut Random) {
        self.serial += 1;
        let text =
            format!("{{\"n\":{},\"pad\":\"{}\"}}", self.serial, "x".repeat(random.below(200)));
        let cut = random.below(text.len());
        let bytes = text.as_bytes();
        if random.chance(64) {
            self.frame(false, wire::TEXT, &bytes[..cut], random);
            if random.chance(128) {
                self.queue_ping(random);
            }
            self.frame(true, 0, &bytes[cut..], random);
        } else {
            self.frame(true, wire::TEXT, bytes, random);
        }
        self.texts.push_back(text);
    }

    /// Queues a message that has no meaning for the server.
    pub(super) fn queue_meaningless(&mut self, random: &mut Random) {
        // The first message is always the resume request, so it must not be one of these.
        if self.serial > 0 {
            self.frame(true, wire::BINARY, &vec![1; random.below(300)], random);
        }
    }

    pub(super) fn queue_ping(&mut self, random: &mut Random) {
        let payload = vec![random.draw() as u8; random.below(126)];
        self.frame(true, wire::PING, &payload, random);
        self.pings.push_back(payload);
    }

    pub(super) fn queue_pong(&mut self, random: &mut Random) {
        self.frame(true, wire::PONG, &[], random);
    }

    pub(super) fn queue_echo(&mut self, random: &mut Random) {
        let length = if random.chance(16) { random.below(30_000) } else { random.below(200) };
        let payload = vec![random.draw() as u8; length];
        self.frame(true, wire::BINARY, &payload, random);
        self.echoes.push_back(payload);
    }

    pub(super) fn queue_close(&mut self, random: &mut Random) {
        let payload: &[u8] = if random.chance(128) { &[] } else { &[3, 232] };
        self.frame(true, wire::CLOSE, payload, random);
        self.acts.closed = true;
    }

    /// Queues a violation of RFC 6455: an unmasked frame or a reserved opcode.
    pub(super) fn queue_violation(&mut self, random: &mut Random) {
        let bad: &[u8] = random.pick(&[&[0x81, 0x01, b'x'][..], &[0x83, 0x80, 0, 0, 0, 0]]);
        self.outbox.extend(bad);
        self.acts.broke_protocol = true;
    }

    /// Queues more frames than the rate limit allows.
    pub(super) fn queue_flood(&mut self, random: &mut Random) {
        for _ in 0..200 {
            self.frame(true, wire::PONG, &[], random);
        }
    }

    fn frame(&mut self, fin: bool, opcode: u8, payload: &[u8], random: &mut Random) {
        self.frames += 1;
        self.outbox.extend(client_frame(fin, opcode, payload, Self::key(random)));
    }

    /// Answers the server's close frame.
    pub(super) fn answer_close(&mut self, random: &mut Random) {
        if self.may_send() {
            self.queue_close(random);
        }
    }
}

/// The number of the client with this user id.
pub(super) fn number_of(user_id: &str) -> usize {
    user_id
        .strip_prefix('u')
        .and_then(|number| number.parse().ok())
        .expect("a user of the simulation")
}

fn request(number: usize, kind: ClientKind) -> String {
    let (path, protocol) = match kind {
        ClientKind::Session { json: false } | ClientKind::Bad | ClientKind::Endless => ("/ws", ""),
        ClientKind::Session { json: true } => {
            ("/ws", "Sec-WebSocket-Protocol: realchat.v1.json\r\n")
        }
        ClientKind::Echo => ("/echo", ""),
    };
    let version = if kind == ClientKind::Bad { 12 } else { 13 };
    let end = if kind == ClientKind::Endless { "" } else { "\r\n" };
    format!(
        "GET {path}?user_id=u{number}&device_id=d HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\n{protocol}Sec-WebSocket-Key: {KEY}\r\n\
         Sec-WebSocket-Version: {version}\r\n{end}"
    )
}
