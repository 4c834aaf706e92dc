//! Issue “Guarantees”, show 4: every client is stalled and Kafka runs at full speed. Memory stays below
//! the bound that the node calculates from its settings; once the clients read again, nothing is lost.

use std::time::{Duration, Instant};

use delivery_testkit::proto::delivery::v1::delivery_api_client::DeliveryApiClient;
use delivery_testkit::proto::delivery::v1::{DeliveryConnectRequest, DeliveryEvent};
use delivery_testkit::publisher::{Publisher, new_topic};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Request, Streaming};

use super::support::fleet::{Connect, Fleet, Received};
use super::support::node::{Node, NodeBuilder};
use super::support::services::kafka_brokers;
use super::support::tally::Tally;
use super::support::wait::until;

const ROOMS: usize = 200;
const MEMBERS: usize = 5;
const SESSIONS: usize = ROOMS * MEMBERS;
/// Twice the limit of the shard.
const EVENTS: usize = 64 * 1024;
const EVENT_BYTES: usize = 2 * 1024;
/// Flow-control window of a gRPC client, bytes.
const STREAM_WINDOW: u32 = 16 * 1024;
/// The intake has stopped when no event was taken in for this long.
const STANDS_STILL: Duration = Duration::from_secs(3);
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

    /// Reads each to its last message, and asserts order and no duplicates.
    fn read(&mut self, last: i64) -> Vec<JoinHandle<()>> {
        let events = std::mem::take(&mut self.events).into_iter();
        let read = |mut events: Streaming<DeliveryEvent>| async move {
            let mut sequence = 0;
            while sequence < last {
                let event = events.message().await.expect("it goes on").expect("not its end");
                if event.message.is_some() {
                    assert_eq!(event.sequence, sequence + 1);
                    sequence = event.sequence;
                }
            }
        };
        events.map(|events| self.runtime.spawn(read(events))).collect()
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn stalled_clients_pause_kafka_within_the_memory_bound_and_lose_nothing() {
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
        let connect = Connect { receive_buffer: Some(2304), ..connect };
        fleet.connect(&connect).expect("the server accepts");
    }
    let mut tallies = vec![Tally::default(); SESSIONS];
    let mut ended = Vec::new();
    let mut turn = |fleet: &mut Fleet| {
        fleet.turn(Duration::from_millis(10), &mut |client, seen| match seen {
            Received::Binary(payload) => {
                tallies[client].saw(&payload);
            }
            Received::Open(_) | Received::Ping => {}
            other => ended.push(format!("client {client}: {other:?}")),
        });
        assert!(ended.is_empty(), "{ended:?}");
        tallies.iter().map(|tally| tally.messages).sum::<u64>()
    };
    let deadline = Instant::now() + PROGRESS_WITHIN;
    while fleet.open_count() < SESSIONS {
        assert!(Instant::now() < deadline, "{} open", fleet.open_count());
        turn(&mut fleet);
    }

    let mut streams = Streams::connect(&node, (0..ROOMS).map(streaming));

    (0..SESSIONS).for_each(|client| fleet.stall(client));
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
    // The first bound that is reached stops the intake: the shard takes nothing for a while, although
    // the topic has more.
    let mut taken = (0.0, Instant::now());
    until(PROGRESS_WITHIN, "the shard takes no more", || {
        peak = peak.max(node.resident_bytes());
        let now_taken = node.metrics().sum("delivery_shard_events_taken_total", &[]);
        if now_taken > taken.0 {
            taken = (now_taken, Instant::now());
        }
        (taken.1.elapsed() > STANDS_STILL).then_some(())
    });
    assert!(taken.0 < EVENTS as f64, "everything was taken in: nothing pressed back");
    let metrics = node.metrics();
    let bound = metrics.sum("delivery_memory_bound_bytes", &[]) as u64;
    let events_bound = metrics.sum("delivery_memory_bound_bytes", &["part=\"events\""]);
    let events = metrics.sum("delivery_router_event_bytes", &[]);
    assert!(events > 0.0 && events <= events_bound, "{events} of {events_bound}");
    assert!(metrics.sum("delivery_stream_deliveries", &[]) > 0.0, "no stream holds anything");
    peak = peak.max(node.resident_bytes());

    (0..SESSIONS).for_each(|client| fleet.unstall(client));
    let last = |number: usize| (EVENTS + ROOMS - 1 - number) / ROOMS;
    let reading = streams.read(last(ROOMS - 1) as i64);
    let expected = (EVENTS * MEMBERS) as u64;
    let mut progress = (0, Instant::now());
    loop {
        let received = turn(&mut fleet);
        if received == expected {
            break;
        }
        if received > progress.0 {
            progress = (received, Instant::now());
        }
        assert!(progress.1.elapsed() < PROGRESS_WITHIN, "stalled at {received} of {expected}");
    }
    peak = peak.max(node.resident_bytes());
    for stream in reading {
        let done = async { tokio::time::timeout(PROGRESS_WITHIN, stream).await };
        let done = streams.runtime.block_on(done);
        done.expect("in time").expect("every message, in order");
    }
    println!("events {} MiB of {} MiB", events as u64 >> 20, events_bound as u64 >> 20);
    println!("peak {} MiB, bound {} MiB", peak >> 20, bound >> 20);
    assert!(peak <= bound, "{peak} bytes resident, {bound} promised");
    for tally in &tallies {
        for stream in tally.streams.values() {
            assert_eq!((stream.duplicates, stream.out_of_order, stream.missing.len()), (0, 0, 0));
        }
    }
}
