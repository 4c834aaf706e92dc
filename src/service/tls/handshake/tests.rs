//! Handshakes and records against rustls as client.

use proptest::prelude::*;
use rustls::client::{ClientConnection, Resumption};
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore, SupportedCipherSuite};

use super::*;
use crate::protocol::tls::{Content, Opening, Sealing};

/// Configurations of a client and a server that know each other.
struct Pki {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

fn pki(suite: SupportedCipherSuite) -> Pki {
    let own = rcgen::generate_simple_self_signed(["chat.example".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
    let provider = Arc::new(default_provider());
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .unwrap();
    server.ticketer = rustls::crypto::ring::Ticketer::new().unwrap();
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    capture_secrets(&mut server);
    let mut roots = RootCertStore::empty();
    roots.add(own.cert.der().clone()).unwrap();
    let provider =
        rustls::crypto::CryptoProvider { cipher_suites: vec![suite], ..default_provider() };
    let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    client.resumption = Resumption::in_memory_sessions(10);
    Pki { server: Arc::new(server), client: Arc::new(client) }
}

/// A client with rustls, and this program as server.
struct Pair {
    client: ClientConnection,
    handshake: Option<Box<dyn TlsHandshake>>,
    counters: Arc<TlsCounters>,
    /// Bytes of the client that the handshake has not taken.
    input: Vec<u8>,
    opening: Option<Opening>,
    sealing: Sealing,
    /// What the server wants to send.
    queue: Vec<u8>,
    server_received: Vec<u8>,
    client_received: Vec<u8>,
    failed: bool,
    closed: bool,
}

impl Pair {
    fn new(pki: &Pki) -> Self {
        let counters = Arc::new(TlsCounters::default());
        let name = "chat.example".try_into().unwrap();
        Self {
            client: ClientConnection::new(Arc::clone(&pki.client), name).unwrap(),
            handshake: Some(ServerHandshake::begin(&pki.server, &counters).unwrap()),
            counters,
            input: Vec::new(),
            opening: None,
            sealing: Sealing::default(),
            queue: Vec::new(),
            server_received: Vec::new(),
            client_received: Vec::new(),
            failed: false,
            closed: false,
        }
    }

    /// The server gets bytes of the client.
    fn server_gets(&mut self, mut bytes: Vec<u8>) {
        if let Some(handshake) = &mut self.handshake {
            self.input.append(&mut bytes);
            let mut output = Vec::new();
            match handshake.advance(&mut self.input, &mut output) {
                HandshakeProgress::NeedMore => return self.sealing.push_handshake(&output),
                HandshakeProgress::Failed => {
                    self.failed = true;
                    return self.sealing.fail_handshake(&output);
                }
                HandshakeProgress::Done(secrets) => {
                    let [client, server] = secrets.keys();
                    self.sealing.push_handshake(&output);
                    self.sealing.establish(server);
                    self.opening = Some(Opening::new(client));
                    self.handshake = None;
                    bytes = std::mem::take(&mut self.input);
                }
            }
        }
        let opening = self.opening.as_mut().unwrap();
        let mut input = &mut bytes[..];
        while !input.is_empty() {
            let opened = opening.next(input, 0).unwrap();
            match opened.content {
                Content::Data(at) => self.server_received.extend_from_slice(&input[at]),
                Content::Assembled(data) => self.server_received.extend(data),
                Content::KeyUpdate { asked: true } => self.sealing.answer_key_update(),
                Content::Closed => self.closed = true,
                Content::Incomplete | Content::Nothing | Content::KeyUpdate { .. } => {}
                Content::Failed(alert) => panic!("{alert:?}"),
            }
            input = &mut input[opened.consumed..];
        }
    }

    /// Moves everything, in pieces of these lengths.
    fn settle(&mut self, cuts: &mut impl Iterator<Item = usize>) {
        loop {
            let mut moved = false;
            let mut sent = Vec::new();
            while self.client.wants_write() {
                self.client.write_tls(&mut sent).unwrap();
            }
            while !sent.is_empty() && !self.failed {
                let rest = sent.split_off(cuts.next().unwrap().min(sent.len()));
                self.server_gets(std::mem::replace(&mut sent, rest));
                moved = true;
            }
            loop {
                let mut out = Vec::new();
                let queue = &self.queue;
                let copy =
                    |length: usize, out: &mut Vec<u8>| out.extend_from_slice(&queue[..length]);
                let Some(from) = self.sealing.next(queue.len(), 16 * 1024, &mut out, copy) else {
                    break;
                };
                let taken = cuts.next().unwrap().min(out.len() - from);
                let mut piece = &out[from..from + taken];
                while !piece.is_empty() {
                    self.client.read_tls(&mut piece).unwrap();
                }
                let state = self.client.process_new_packets();
                if self.failed {
                    state.unwrap_err();
                } else {
                    let length = state.unwrap().plaintext_bytes_to_read();
                    let start = self.client_received.len();
                    self.client_received.resize(start + length, 0);
                    std::io::Read::read_exact(
                        &mut self.client.reader(),
                        &mut self.client_received[start..],
                    )
                    .unwrap();
                }
                let done = self.sealing.sent(taken);
                self.queue.drain(..done);
                moved = true;
            }
            if !moved {
                return;
            }
        }
    }

    fn client_says(&mut self, bytes: &[u8]) {
        std::io::Write::write_all(&mut self.client.writer(), bytes).unwrap();
    }
}

const SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

#[test]
fn second_handshake_needs_no_signature() {
    for suite in SUITES {
        let pki = pki(suite);
        for expected in [(1, 0), (0, 1)] {
            let mut pair = Pair::new(&pki);
            pair.settle(&mut std::iter::repeat(usize::MAX));
            pair.client_says(b"hello");
            pair.settle(&mut std::iter::repeat(usize::MAX));
            assert_eq!(pair.server_received, b"hello");
            let counters = &pair.counters;
            assert_eq!(
                (counters.handshakes_full.get(), counters.handshakes_resumed.get()),
                expected
            );
        }
    }
}

#[test]
fn data_behind_the_handshake_is_not_lost() {
    let pki = pki(SUITES[0]);
    let mut pair = Pair::new(&pki);
    // rustls sends it together with its last message.
    pair.client_says(b"early");
    pair.settle(&mut std::iter::repeat(usize::MAX));
    assert_eq!(pair.server_received, b"early");
}

#[test]
fn client_without_our_protocol_gets_an_alert() {
    let mut pki = pki(SUITES[0]);
    Arc::make_mut(&mut pki.client).alpn_protocols = vec![b"h2".to_vec()];
    let mut pair = Pair::new(&pki);
    pair.settle(&mut std::iter::repeat(usize::MAX));
    assert!(pair.failed && pair.sealing.is_closed());
    assert_eq!(pair.counters.failed_protocol.get(), 1);
}

#[test]
fn something_else_gets_an_alert() {
    let pki = pki(SUITES[0]);
    let mut pair = Pair::new(&pki);
    pair.server_gets(b"\x16\x03\x01\x00\x05hello".to_vec());
    assert!(pair.failed && !pair.sealing.is_flushed());
}

#[test]
fn close_notify_is_understood() {
    let pki = pki(SUITES[0]);
    let mut pair = Pair::new(&pki);
    pair.settle(&mut std::iter::repeat(usize::MAX));
    pair.client.send_close_notify();
    pair.settle(&mut std::iter::repeat(usize::MAX));
    assert!(pair.closed);
    pair.sealing.close(Alert::CLOSE_NOTIFY);
    pair.settle(&mut std::iter::repeat(usize::MAX));
    let end = std::io::Read::read(&mut pair.client.reader(), &mut [0; 1]).unwrap();
    assert_eq!(end, 0, "a clean end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Both directions, with key updates of the client, cut at arbitrary bytes.
    #[test]
    fn both_sides_understand_each_other(
        suite in 0..3usize,
        steps in prop::collection::vec((0..4u8, 0..40_000usize), 1..12),
        cuts in prop::collection::vec(1..3_000usize, 1..40),
    ) {
        let pki = pki(SUITES[suite]);
        let mut pair = Pair::new(&pki);
        let mut cuts = cuts.into_iter().cycle();
        pair.settle(&mut cuts);
        let (mut said_by_client, mut said_by_server) = (Vec::new(), Vec::new());
        for (number, (what, length)) in steps.into_iter().enumerate() {
            let data: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
            match what {
                0 => pair.client.refresh_traffic_keys().unwrap(),
                1 => {
                    pair.client_says(&data);
                    said_by_client.extend(data);
                }
                _ => {
                    pair.queue.extend_from_slice(&data);
                    said_by_server.extend(data);
                }
            }
            pair.settle(&mut cuts);
        }
        prop_assert_eq!(pair.server_received, said_by_client);
        prop_assert_eq!(pair.client_received, said_by_server);
    }
}

/// Time of the server in one handshake, µs: the least of many, because everything else only adds to it.
fn handshake_us(pki: &Pki, mut server: impl FnMut(&[u8]) -> Vec<u8>) -> f64 {
    let name = "chat.example".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::clone(&pki.client), name).unwrap();
    let mut spent = std::time::Duration::ZERO;
    while client.wants_write() {
        let mut sent = Vec::new();
        client.write_tls(&mut sent).unwrap();
        let begun = std::time::Instant::now();
        let answer = server(&sent);
        spent += begun.elapsed();
        let mut answer = &answer[..];
        while !answer.is_empty() {
            client.read_tls(&mut answer).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    assert!(!client.is_handshaking());
    spent.as_secs_f64() * 1e6
}

#[test]
#[ignore = "a measurement"]
fn figures_of_handshakes() {
    let pki = pki(SUITES[0]);
    let fresh = |pki: &Pki| {
        let mut client = pki.client.as_ref().clone();
        client.resumption = Resumption::disabled();
        Pki { server: Arc::clone(&pki.server), client: Arc::new(client) }
    };
    let ours = |pki: &Pki| {
        let counters = Arc::default();
        let mut handshake = None;
        let mut input = Vec::new();
        handshake_us(pki, |bytes| {
            let begin = || ServerHandshake::begin(&pki.server, &counters).unwrap();
            let mut output = Vec::new();
            input.extend_from_slice(bytes);
            let handshake = handshake.get_or_insert_with(begin);
            if let HandshakeProgress::Done(secrets) = handshake.advance(&mut input, &mut output) {
                drop(std::hint::black_box(secrets.keys()));
            }
            output
        })
    };
    let theirs = |pki: &Pki| {
        let mut connection = None;
        handshake_us(pki, |mut bytes| {
            let begin = || rustls::ServerConnection::new(Arc::clone(&pki.server)).unwrap();
            let connection = connection.get_or_insert_with(begin);
            while !bytes.is_empty() {
                connection.read_tls(&mut bytes).unwrap();
                connection.process_new_packets().unwrap();
            }
            let mut output = Vec::new();
            while connection.wants_write() {
                connection.write_tls(&mut output).unwrap();
            }
            output
        })
    };
    let least = |pki: &Pki, run: &dyn Fn(&Pki) -> f64| {
        (0..2_000).map(|_| run(pki)).fold(f64::INFINITY, f64::min)
    };
    let once = fresh(&pki);
    ours(&pki); // Its tickets make the next ones resumed.
    println!(
        "full, ECDSA P-256: {:.0} µs, rustls {:.0} µs",
        least(&once, &ours),
        least(&once, &theirs)
    );
    println!("resumed: {:.0} µs, rustls {:.0} µs", least(&pki, &ours), least(&pki, &theirs));
}
