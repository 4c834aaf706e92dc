//! TLS in the simulation: clients that seal what they send and open what they receive, and a thread that makes
//! handshakes. The records are real. The handshake is not: two messages and a secret that both sides know, so that a
//! seed replays exactly.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::*;
use crate::handoff::{Consumer, Duplex, Producer, Pushed, ring};
use crate::protocol::tls::handshake::JOBS_MAX;
use crate::protocol::tls::keys::RecordKeys;
use crate::protocol::tls::record::{ContentType, whole_length};
use crate::protocol::tls::{
    Content, HandshakeProgress, Job, Opening, Secrets, Suite, TlsHandshake,
};
use crate::reactor::tls::ShardHandshakeEnd;

/// A record of the simulated handshake, with the number of the client.
const HELLO_BYTES: usize = 9;
const HELLO: u8 = 22;
/// The record of the alert `handshake_failure`.
const FAILED: [u8; 7] = [21, 3, 3, 0, 2, 2, 40];

fn hello(number: usize) -> [u8; HELLO_BYTES] {
    let [a, b, c, d] = (number as u32).to_be_bytes();
    [HELLO, 3, 3, 0, 4, a, b, c, d]
}

/// The number in the record at the start of `input`, which is removed; `None`: it is another record.
fn take_hello(input: &mut Vec<u8>) -> Option<usize> {
    let number = *input.strip_prefix(&[HELLO, 3, 3, 0, 4])?.first_chunk()?;
    input.drain(..HELLO_BYTES);
    Some(u32::from_be_bytes(number) as usize)
}

/// Both secrets of a client.
fn secrets(number: usize) -> Secrets {
    let suite = Suite::ALL[number % Suite::ALL.len()];
    let secret = |of: u8| Zeroizing::new(vec![of ^ number as u8; suite.secret_bytes()]);
    Secrets { suite, client: secret(1), server: secret(2), server_records: 0 }
}

/// The thread that makes the handshakes of the shard.
pub(super) struct HandshakeThread {
    end: Duplex<Consumer<Job>, Producer<Job>>,
    /// It fails this many of 256.
    failing: u8,
}

impl HandshakeThread {
    pub(super) fn new(bell: &Arc<Doorbell>, failing: u8) -> (Self, ShardHandshakeEnd) {
        let (commands, jobs) = ring(JOBS_MAX, Arc::clone(bell));
        let (done, reports) = ring(JOBS_MAX, Arc::clone(bell));
        let end = Duplex { commands: jobs, reports: done };
        (Self { end, failing }, Duplex { commands, reports })
    }

    pub(super) fn is_idle(&self) -> bool {
        self.end.commands.is_empty()
    }
}

/// The second message of a client completes it.
#[derive(Debug)]
struct SimulatedHandshake {
    number: usize,
}

impl TlsHandshake for SimulatedHandshake {
    fn advance(&mut self, input: &mut Vec<u8>, output: &mut Vec<u8>) -> HandshakeProgress {
        match take_hello(input) {
            Some(number) => {
                assert_eq!(number, self.number, "the handshake of another client");
                HandshakeProgress::Done(Box::new(secrets(self.number)))
            }
            None => {
                output.extend(FAILED);
                HandshakeProgress::Failed
            }
        }
    }
}

impl Simulation {
    /// The thread makes some handshakes.
    pub(super) fn handshakes_advance(&mut self, limit: usize) {
        for _ in 0..limit {
            let Some(thread) = &mut self.handshaker else { return };
            let Some(mut job) = thread.end.commands.pop() else { return };
            let fails = self.random.chance(thread.failing) && !self.resting;
            job.progress = match job.handshake.take() {
                _ if fails => {
                    job.output.extend(FAILED);
                    HandshakeProgress::Failed
                }
                Some(mut handshake) => {
                    let progress = handshake.advance(&mut job.input, &mut job.output);
                    job.handshake =
                        matches!(progress, HandshakeProgress::NeedMore).then_some(handshake);
                    progress
                }
                None => match take_hello(&mut job.input) {
                    Some(number) => {
                        job.output.extend(hello(number));
                        job.handshake = Some(Box::new(SimulatedHandshake { number }));
                        HandshakeProgress::NeedMore
                    }
                    None => {
                        job.output.extend(FAILED);
                        HandshakeProgress::Failed
                    }
                },
            };
            if let Pushed::Full(_) = thread.end.reports.push(job) {
                panic!("more handshakes are under way than may be");
            }
            self.service.rang = true;
        }
    }

    /// A client sends these bytes of its messages.
    pub(super) fn client_says(&mut self, number: usize, plain: &[u8]) {
        let client = &mut self.clients[number];
        let socket = client.socket;
        match &mut client.tls {
            None => self.kernel().client_sends(socket, plain),
            Some(tls) => {
                let bytes = tls.seals(plain, &mut self.random);
                self.kernel().client_sends(socket, &bytes);
            }
        }
    }

    /// What the shard has sent to a client, without TLS.
    pub(super) fn client_hears(&mut self, number: usize) -> Vec<u8> {
        let socket = self.clients[number].socket;
        let sent = self.kernel().take_sent(socket);
        let Some(tls) = &mut self.clients[number].tls else { return sent };
        let (plain, answer) = tls.opens(sent);
        self.kernel().client_sends(socket, &answer);
        plain
    }

    /// A client violates RFC 8446.
    pub(super) fn break_records(&mut self, number: usize) {
        let client = &mut self.clients[number];
        client.acts.broke_protocol = true;
        client.outbox.clear();
        let socket = client.socket;
        let bad: &[u8] = self.random.pick(&[
            &[23, 3, 3, 0, 17, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17][..],
            &[23, 3, 3, 255, 255],
            &[20, 3, 3, 0, 1, 1],
        ]);
        self.kernel().client_sends(socket, bad);
    }
}

/// The TLS of a client.
#[derive(Debug)]
pub(super) struct ClientTls {
    number: usize,
    is_begun: bool,
    /// What it says once the handshake is complete.
    waiting: Vec<u8>,
    /// Records of the handshake that have arrived in part.
    unopened: Vec<u8>,
    /// Its own keys and those of the server, after the handshake.
    keys: Option<(RecordKeys, Opening)>,
    /// Records without data, which count as frames.
    pub(super) key_updates: usize,
    /// The server has closed.
    is_closed: bool,
    /// The handshake has failed.
    has_failed: bool,
}

impl ClientTls {
    pub(super) fn new(number: usize) -> Self {
        let (waiting, unopened) = (Vec::new(), Vec::new());
        Self {
            number,
            is_begun: false,
            waiting,
            unopened,
            keys: None,
            key_updates: 0,
            is_closed: false,
            has_failed: false,
        }
    }

    /// Whether it has said everything.
    pub(super) fn is_silent(&self) -> bool {
        self.waiting.is_empty()
    }

    fn seals(&mut self, plain: &[u8], random: &mut Random) -> Vec<u8> {
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.is_begun, true) {
            out.extend(hello(self.number));
        }
        let Some((keys, _)) = &mut self.keys else {
            self.waiting.extend_from_slice(plain);
            return out;
        };
        if random.chance(10) {
            let asks = u8::from(random.chance(128));
            keys.seal(ContentType::Handshake, &mut out, |out| out.extend([24, 0, 0, 1, asks]));
            keys.update();
            self.key_updates += 1;
        }
        let mut rest = plain;
        while !rest.is_empty() {
            let length = if random.chance(128) { rest.len() } else { 1 + random.below(rest.len()) };
            let (piece, more) = rest.split_at(length.min(1 << 14));
            rest = more;
            keys.seal(ContentType::ApplicationData, &mut out, |out| out.extend_from_slice(piece));
        }
        out
    }

    /// What the shard says, and what the client answers at once.
    fn opens(&mut self, mut sent: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
        let (mut plain, mut answer) = (Vec::new(), Vec::new());
        if self.has_failed {
            return (plain, answer);
        }
        if self.keys.is_none() {
            self.unopened.append(&mut sent);
            let whole = whole_length(&self.unopened).is_some_and(|it| it <= self.unopened.len());
            if !whole {
                return (plain, answer);
            }
            if self.unopened[0] != HELLO {
                assert_eq!(self.unopened[0], 21, "neither a hello nor an alert");
                self.has_failed = true;
                return (plain, answer);
            }
            assert_eq!(self.unopened[..HELLO_BYTES], hello(self.number));
            sent = self.unopened.split_off(HELLO_BYTES);
            let [mut own, server] = secrets(self.number).keys();
            answer.extend(hello(self.number));
            let waiting = std::mem::take(&mut self.waiting);
            for piece in waiting.chunks(1 << 14) {
                own.seal(ContentType::ApplicationData, &mut answer, |out| {
                    out.extend_from_slice(piece)
                });
            }
            self.keys = Some((own, Opening::new(server)));
        }
        let (_, opening) = self.keys.as_mut().expect("the handshake is complete");
        let mut input = &mut sent[..];
        while !input.is_empty() {
            assert!(!self.is_closed, "bytes after an alert");
            // An alert of a handshake that fails comes without keys.
            if input[0] == 21 && opening.incomplete_since().is_none() {
                self.has_failed = true;
                break;
            }
            let opened = opening.next(input, 0).expect("a record of the shard");
            match opened.content {
                Content::Data(at) => plain.extend_from_slice(&input[at]),
                Content::Assembled(data) => plain.extend(data),
                Content::Closed | Content::Failed(_) => self.is_closed = true,
                Content::KeyUpdate { asked } => assert!(!asked),
                Content::Incomplete => {}
                Content::Nothing => panic!("an empty record"),
            }
            input = &mut input[opened.consumed..];
        }
        (plain, answer)
    }
}
