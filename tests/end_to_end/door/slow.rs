//! Ten thousand slow or silent clients beside a thousand honest ones.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use delivery_testkit::publisher::{Publisher, new_topic};

use super::serves_the_next_client;
use crate::support::fleet::{ClientId, Connect, Fleet, Received, dial};
use crate::support::node::NodeBuilder;
use crate::support::services::kafka_brokers;
use crate::support::tally::Tally;

const HONEST: usize = 1_000;
/// Clients of each kind: half a handshake, one byte per second, a stalled reader, a half-open peer.
const SLOW_OF_EACH: usize = 2_500;
/// Members of a room, all honest or all stalled.
const ROOM: usize = 50;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Resident memory of the process, bytes. One connection may hold its slot, its queue (128 references
/// to shared events), and the batch in flight.
const MEMORY_MAX: u64 = 400 << 20;

/// The slow clients that this test drives by hand.
struct Slow {
    half_sent: Vec<TcpStream>,
    byte_a_second: Vec<TcpStream>,
    request: Vec<u8>,
    sent: usize,
    next_byte_at: Instant,
}

impl Slow {
    fn connect(connect: &Connect) -> Self {
        let request = connect.request().into_bytes();
        let dial = |_| dial(connect).expect("the server accepts");
        let half_sent: Vec<_> = (0..SLOW_OF_EACH).map(dial).collect();
        for mut stream in &half_sent {
            stream.write_all(&request[..request.len() / 2]).expect("a fresh socket takes it");
        }
        let byte_a_second = (0..SLOW_OF_EACH).map(dial).collect();
        Self { half_sent, byte_a_second, request, sent: 0, next_byte_at: Instant::now() }
    }

    fn turn(&mut self) {
        if self.next_byte_at > Instant::now() {
            return;
        }
        self.next_byte_at += Duration::from_secs(1);
        let byte = self.request[self.sent..].first().copied();
        self.sent += 1;
        for stream in &mut self.byte_a_second {
            let _ = byte.map(|byte| stream.write_all(&[byte]));
        }
    }

    /// Those that the server has not terminated yet.
    fn left(&mut self) -> usize {
        for streams in [&mut self.half_sent, &mut self.byte_a_second] {
            streams.retain(|stream| {
                stream.set_nonblocking(true).expect("a socket");
                let mut buffer = [0; 512];
                loop {
                    match stream.peek(&mut buffer) {
                        Ok(0) => return false,
                        // The answer 408 before the end.
                        Ok(_) => {
                            let mut stream = stream;
                            let _ = std::io::Read::read(&mut stream, &mut buffer);
                        }
                        Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
                    }
                }
            });
        }
        self.half_sent.len() + self.byte_a_second.len()
    }
}

/// Rooms of `ROOM` users each, named after their first user.
fn rooms(kind: &str, users: usize) -> BTreeMap<String, Vec<String>> {
    let users: Vec<String> = (0..users).map(|number| format!("{kind}-{number}")).collect();
    users.chunks(ROOM).map(|room| (format!("room-of-{}", room[0]), room.to_vec())).collect()
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn honest_clients_notice_nothing_of_ten_thousand_slow_ones() {
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, "slow", 3);
    let node = NodeBuilder::serve()
        .kafka(&brokers, &topic)
        .set("HANDSHAKE_TIMEOUT", "10s")
        .set("PING_INTERVAL", "8s")
        .set("IDLE_TIMEOUT", "20s")
        .set("WRITE_TIMEOUT", "10s")
        .set("SO_SNDBUF", "4608")
        .start();
    let mut publisher = Publisher::new(&brokers, &topic);
    let honest_rooms = rooms("honest", HONEST);
    let stalled_rooms = rooms("stalled", SLOW_OF_EACH);
    for (room, members) in honest_rooms.iter().chain(&stalled_rooms) {
        publisher.created(room, members);
    }
    publisher.flush(Duration::from_secs(30));

    // Honest clients first, then all others.
    let mut fleet = Fleet::new();
    let connect = |user: &str| Connect::session(node.public, user, "phone");
    for user in honest_rooms.values().flatten() {
        fleet.connect(&connect(user)).expect("the server accepts");
    }
    for user in stalled_rooms.values().flatten() {
        let connect = Connect { receive_buffer: Some(2304), ..connect(user) };
        fleet.connect(&connect).expect("the server accepts");
    }
    for number in 0..SLOW_OF_EACH {
        let connect = Connect { answers_pings: false, ..connect(&format!("half-open-{number}")) };
        fleet.connect(&connect).expect("the server accepts");
    }
    let is_honest = |client: ClientId| client < HONEST;
    let stalled = HONEST..HONEST + SLOW_OF_EACH;
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut tallies = vec![Tally::default(); HONEST];
    let mut gone = Vec::new();
    while fleet.open_count() < HONEST + 2 * SLOW_OF_EACH {
        assert!(Instant::now() < deadline, "{} open", fleet.open_count());
        fleet.turn(Duration::from_millis(10), &mut |client, seen| {
            saw(client, &seen, is_honest(client), &mut tallies, &mut gone);
        });
    }
    // From here on the stalled clients read nothing.
    stalled.clone().for_each(|client| fleet.stall(client));
    let mut slow = Slow::connect(&connect("never-there"));

    // One message per second to every room until all slow clients have ended; then some more.
    let began = Instant::now();
    let (mut sequence, mut memory_peak, mut next_at) = (0, 0, began);
    let content = "x".repeat(500);
    let mut latency_max = Duration::ZERO;
    let mut last_published = began;
    loop {
        if next_at <= Instant::now() {
            next_at += Duration::from_millis(250);
            sequence += 1;
            for (room, members) in honest_rooms.iter().chain(&stalled_rooms) {
                publisher.message(room, sequence, &members[0], &content);
            }
            last_published = Instant::now();
            memory_peak = memory_peak.max(node.resident_bytes());
            let active = node.metrics().sum("websocket_connections_active", &[]);
            if active <= HONEST as f64 && slow.left() == 0 {
                break;
            }
            let limit = 2 * (HANDSHAKE_TIMEOUT + IDLE_TIMEOUT);
            assert!(began.elapsed() < limit, "{active} sessions are left");
        }
        slow.turn();
        fleet.turn(Duration::from_millis(10), &mut |client, seen| {
            saw(client, &seen, is_honest(client), &mut tallies, &mut gone);
        });
        if tallies.iter().all(|tally| tally.messages == sequence as u64) {
            latency_max = latency_max.max(last_published.elapsed());
        }
    }
    println!(
        "slow clients ended after {:.0} s; peak {} MiB; honest clients received each message within {:?}",
        began.elapsed().as_secs_f32(),
        memory_peak >> 20,
        latency_max
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    while tallies.iter().any(|tally| tally.messages < sequence as u64) {
        assert!(Instant::now() < deadline, "an honest client misses messages");
        fleet.turn(Duration::from_millis(10), &mut |client, seen| {
            saw(client, &seen, is_honest(client), &mut tallies, &mut gone);
        });
    }
    for tally in &tallies {
        assert_eq!(tally.messages, sequence as u64);
        for stream in tally.streams.values() {
            assert_eq!((stream.duplicates, stream.out_of_order), (0, 0));
        }
    }
    assert!(gone.iter().all(|client| !is_honest(*client)), "an honest client was dropped");
    assert!(memory_peak < MEMORY_MAX, "{} MiB", memory_peak >> 20);
    let metrics = node.metrics();
    let ended = |reason: &str| {
        metrics.sum("delivery_shard_ended_total", &[&format!("reason=\"{reason}\"")])
    };
    assert_eq!(ended("handshake_timeout"), 2.0 * SLOW_OF_EACH as f64);
    assert!(
        ended("queue_overflow") + ended("write_timeout") + ended("peer_silent")
            >= 2.0 * SLOW_OF_EACH as f64
    );
    serves_the_next_client(node.public);
}

fn saw(
    client: ClientId,
    seen: &Received,
    honest: bool,
    tallies: &mut [Tally],
    gone: &mut Vec<ClientId>,
) {
    match seen {
        Received::Binary(payload) if honest => {
            tallies[client].saw(payload);
        }
        Received::Closed(..) | Received::Ended | Received::Refused(..) => gone.push(client),
        _ => {}
    }
}
