//! Most clients are stalled and Kafka runs at full speed (issue “Guarantees”, show 4; issue “No client can hold up
//! another”). Memory stays below the bound that the node calculates from its settings. The clients that read get
//! everything, and those that do not are closed.

use std::time::{Duration, Instant};

use delivery_testkit::proto::delivery::v1::delivery_api_client::DeliveryApiClient;
use delivery_testkit::proto::delivery::v1::{DeliveryConnectRequest, DeliveryEvent};
use delivery_testkit::publisher::{Publisher, new_topic};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Streaming};

use super::support::fleet::{Connect, Fleet, Received};
use super::support::node::{Node, NodeBuilder};
use super::support::services::kafka_brokers;
use super::support::tally::Tally;

const ROOMS: usize = 200;
const MEMBERS: usize = 5;
const SESSIONS: usize = ROOMS * MEMBERS;
/// Twice the limit of the shard.
const EVENTS: usize = 64 * 1024;
const EVENT_BYTES: usize = 2 * 1024;
/// Flow-control window of a gRPC client, bytes.
const STREAM_WINDOW: u32 = 16 * 1024;
/// The code of a socket that ended without a close frame (RFC 6455 §7.1.5).
const NO_CLOSE_FRAME: u16 = 1006;
const PROGRESS_WITHIN: Duration = Duration::from_secs(120);

/// gRPC sessions that read nothing at first, each on its own connection.
struct Streams {
    runtime: Runtime,
    /// A stream ends when its requests end.
    _requests: Vec<mpsc::Sender<DeliveryConnectRequest>>,
    events: Vec<Streaming<DeliveryEvent>>,
}

impl Streams {
    fn connect(node: &Node, users: impl Iterator<Item = String>) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("http://{}", node.grpc)).expect("an address");
        let endpoint = endpoint
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAM_WINDOW);
        let mut streams = Self { runtime, _requests: Vec::new(), events: Vec::new() };
        for user_id in users {
            let (requests, receiver) = mpsc::channel(1);
            let first = DeliveryConnectRequest {
                user_id,
                device_id: "phone".into(),
                ..DeliveryConnectRequest::default()
            };
            let events = streams.runtime.block_on(async {
                requests.send(first).await.expect("room");
                let channel = endpoint.connect().await.expect("the server accepts");
                let mut client = DeliveryApiClient::new(channel);
                client.connect(Request::new(ReceiverStream::new(receiver))).await
            });
            streams._requests.push(requests);
            streams.events.push(events.expect("admitted").into_inner());
        }
        streams
    }

    /// Reads each to its last message or to its end, and asserts order, no duplicates, and that the end says why.
    fn read(&mut self, last: i64) -> Vec<JoinHandle<()>> {
        let events = std::mem::take(&mut self.events).into_iter();
        let read = |mut events: Streaming<DeliveryEvent>| async move {
            let mut sequence = 0;
            while sequence < last {
                let event = match events.message().await {
                    Ok(event) => event.expect("a status"),
                    Err(status) => {
                        return assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    }
                };
                if event.message.is_some() {
                    assert_eq!(event.sequence, sequence + 1);
                    sequence = event.sequence;
                }
            }
        };
        events.map(|events| self.runtime.spawn(read(events))).collect()
    }
}

/// A burst of one conversation is much more than a session may queue. Its members read.
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn burst_of_one_conversation_ends_nobody_who_reads() {
    const BURST: i64 = 20_000;
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, "burst", 1);
    let node = NodeBuilder::serve().kafka(&brokers, &topic).start();
    let mut publisher = Publisher::new(&brokers, &topic);
    publisher.created("room", &["alice".to_owned(), "bob".to_owned()]);
    publisher.flush(PROGRESS_WITHIN);
    let mut fleet = Fleet::new();
    fleet.connect(&Connect::session(node.public, "alice", "phone")).expect("the server accepts");
    let mut clients = Clients { tallies: vec![Tally::default()], closed: vec![None] };
    let deadline = Instant::now() + PROGRESS_WITHIN;
    while fleet.open_count() < 1 {
        assert!(Instant::now() < deadline, "not open");
        clients.turn(&mut fleet);
    }
    let mut streams = Streams::connect(&node, ["bob".to_owned()].into_iter());
    let mut to_bob = streams.events.remove(0);
    let reading = streams.runtime.spawn(async move {
        let mut sequence = 0;
        while sequence < BURST {
            let event = to_bob.message().await.expect("not closed").expect("not ended");
            if event.message.is_some() {
                assert_eq!(event.sequence, sequence + 1);
                sequence = event.sequence;
            }
        }
    });
    let publishing = std::thread::spawn(move || {
        for sequence in 1..=BURST {
            publisher.message("room", sequence, "alice", "hello");
        }
        publisher.flush(PROGRESS_WITHIN);
    });
    let mut received = 0;
    while received < BURST as u64 {
        received = clients.turn(&mut fleet);
        assert_eq!(clients.closed, [None], "{received} received");
        assert!(Instant::now() < deadline, "{received} received");
    }
    publishing.join().expect("published");
    let read = async { tokio::time::timeout(PROGRESS_WITHIN, reading).await };
    streams.runtime.block_on(read).expect("in time").expect("every message, in order");
}

/// What the WebSocket clients received.
struct Clients {
    tallies: Vec<Tally>,
    /// The code that each one was closed with.
    closed: Vec<Option<u16>>,
}

impl Clients {
    /// Reads for a moment. Returns the number of messages that have reached bystanders.
    fn turn(&mut self, fleet: &mut Fleet) -> u64 {
        fleet.turn(Duration::from_millis(10), &mut |client, seen| match seen {
            Received::Binary(payload) => {
                self.tallies[client].saw(&payload);
            }
            Received::Open(_) | Received::Ping => {}
            Received::Closed(code, _) => self.closed[client] = Some(code),
            // It has not read for so long that its close frame was given up.
            Received::Ended => self.closed[client] = Some(NO_CLOSE_FRAME),
            other => panic!("client {client}: {other:?}"),
        });
        self.tallies.iter().step_by(MEMBERS).map(|tally| tally.messages).sum()
    }
}

/// One client in each room reads.
fn is_bystander(session: usize) -> bool {
    session.is_multiple_of(MEMBERS)
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn stalled_clients_stay_within_the_memory_bound_and_hold_up_nobody() {
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, "back-pressure", 3);
    let node = NodeBuilder::serve()
        .kafka(&brokers, &topic)
        .set("CONNECTIONS_MAX", SESSIONS + 50)
        .set("QUEUE_MESSAGES_MAX", 32_766)
        .set("QUEUE_BYTES_MAX", "1GiB")
        .set("SHARD_EVENT_BYTES_MAX", "64MiB")
        .set("KAFKA_PREFETCH", "16MiB")
        .set("SO_SNDBUF", "4608")
        .set("WRITE_TIMEOUT", "10m")
        .start();
    let mut publisher = Publisher::new(&brokers, &topic);
    let user = |session: usize| format!("user-{session}");
    // One in each room, in addition to the WebSocket clients.
    let streaming = |number: usize| format!("streaming-{number}");
    let room = |number: usize| format!("room-{number}");
    for number in 0..ROOMS {
        let mut members: Vec<_> =
            (0..MEMBERS).map(|member| user(number * MEMBERS + member)).collect();
        members.push(streaming(number));
        publisher.created(&room(number), &members);
    }
    publisher.flush(PROGRESS_WITHIN);

    let mut fleet = Fleet::new();
    for session in 0..SESSIONS {
        let connect = Connect::session(node.public, &user(session), "phone");
        let receive_buffer = (!is_bystander(session)).then_some(2304);
        let connect = Connect { receive_buffer, ..connect };
        fleet.connect(&connect).expect("the server accepts");
    }
    let mut clients =
        Clients { tallies: vec![Tally::default(); SESSIONS], closed: vec![None; SESSIONS] };
    let deadline = Instant::now() + PROGRESS_WITHIN;
    while fleet.open_count() < SESSIONS {
        assert!(Instant::now() < deadline, "{} open", fleet.open_count());
        clients.turn(&mut fleet);
    }

    let mut streams = Streams::connect(&node, (0..ROOMS).map(streaming));

    let stalled = || (0..SESSIONS).filter(|session| !is_bystander(*session));
    stalled().for_each(|client| fleet.stall(client));
    let content = "x".repeat(EVENT_BYTES);
    for event in 0..EVENTS {
        let number = event % ROOMS;
        publisher.message(
            &room(number),
            (event / ROOMS + 1) as i64,
            &user(number * MEMBERS),
            &content,
        );
    }
    publisher.flush(PROGRESS_WITHIN);
    let mut peak = 0;
    let mut events = 0.0;
    let mut progress = (0, Instant::now());
    let events_bound = node.metrics().sum("delivery_memory_bound_bytes", &["part=\"events\""]);
    while progress.0 < EVENTS as u64 {
        let received = clients.turn(&mut fleet);
        if received > progress.0 {
            progress = (received, Instant::now());
        }
        assert!(progress.1.elapsed() < PROGRESS_WITHIN, "{received} of {EVENTS} events");
        peak = peak.max(node.resident_bytes());
        let metrics = node.metrics();
        events = metrics.sum("delivery_router_event_bytes", &[]).max(events);
    }
    assert!(events > 0.0 && events <= events_bound, "{events} of {events_bound}");
    let metrics = node.metrics();
    let bound = metrics.sum("delivery_memory_bound_bytes", &[]) as u64;
    assert!(metrics.sum("delivery_shard_closed_for_room_total", &[]) > 0.0);
    assert!(metrics.sum("delivery_stream_closed_for_room_total", &[]) > 0.0);

    // Those that were stalled get everything now, or have ended.
    stalled().for_each(|client| fleet.unstall(client));
    let last = |number: usize| (EVENTS + ROOMS - 1 - number) / ROOMS;
    let reading = streams.read(last(ROOMS - 1) as i64);
    let deadline = Instant::now() + PROGRESS_WITHIN;
    let mut waiting: Vec<_> = stalled().collect();
    while !waiting.is_empty() {
        clients.turn(&mut fleet);
        waiting.retain(|client| {
            let received = clients.tallies[*client].messages;
            received < last(client / MEMBERS) as u64 && clients.closed[*client].is_none()
        });
        assert!(Instant::now() < deadline, "{} have neither", waiting.len());
    }
    let closed = &clients.closed;
    let is_told = |code: &u16| [1011, NO_CLOSE_FRAME].contains(code);
    assert!(closed.iter().flatten().all(is_told), "{closed:?}");
    assert!(closed.iter().step_by(MEMBERS).all(Option::is_none), "a client that reads was closed");
    peak = peak.max(node.resident_bytes());
    for stream in reading {
        let done = async { tokio::time::timeout(PROGRESS_WITHIN, stream).await };
        let done = streams.runtime.block_on(done);
        done.expect("in time").expect("every message, in order");
    }
    println!("events {} MiB of {} MiB", events as u64 >> 20, events_bound as u64 >> 20);
    println!("peak {} MiB, bound {} MiB", peak >> 20, bound >> 20);
    assert!(peak <= bound, "{peak} bytes resident, {bound} promised");
    for tally in &clients.tallies {
        for stream in tally.streams.values() {
            assert_eq!((stream.duplicates, stream.out_of_order, stream.missing.len()), (0, 0, 0));
        }
    }
}
