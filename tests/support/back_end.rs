//! The back end of a node in a RealChat deployment: Kafka, and the neighbours of the contract.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use delivery_testkit::neighbours::FakeNeighbours;
use delivery_testkit::proto::message::v1::MessageSentEvent;
use delivery_testkit::proto::shared::v1::{EventEnvelope, EventType};
use delivery_testkit::publisher::{Publisher, new_topic};
use prost::Message as _;

use super::client::{Client, Received};
use super::fleet::Connect;
use super::node::NodeBuilder;
use super::services::kafka_brokers;

/// A running back end.
pub struct BackEnd {
    /// Kafka brokers.
    pub brokers: String,
    /// The topic; no other test uses it.
    pub topic: String,
    /// The producer of the events.
    pub publisher: Publisher,
    /// The conversation, message and presence services.
    pub neighbours: FakeNeighbours,
}

impl BackEnd {
    /// Uses the Kafka of the environment, with one new topic of this many partitions.
    pub fn start(name: &str, partitions: i32) -> Self {
        let brokers = kafka_brokers();
        let topic = new_topic(&brokers, name, partitions);
        let publisher = Publisher::new(&brokers, &topic);
        Self { publisher, brokers, topic, neighbours: FakeNeighbours::start() }
    }

    /// A node with the addresses of this back end.
    pub fn node(&self) -> NodeBuilder {
        with_neighbours(NodeBuilder::serve(), &self.neighbours).kafka(&self.brokers, &self.topic)
    }
}

/// Sets the addresses of the neighbours.
pub fn with_neighbours(node: NodeBuilder, neighbours: &FakeNeighbours) -> NodeBuilder {
    node.set("MSG_SVC_ADDR", neighbours.address())
        .set("CONV_SVC_ADDR", neighbours.address())
        .set("PRESENCE_SVC_ADDR", neighbours.address())
}

/// Opens a session that resumes from these positions, `{"conversation": sequence, …}`.
pub fn resuming(address: SocketAddr, user: &str, device: &str, positions: &str) -> Client {
    let first_message = Some(format!(r#"{{"last_sequences":{positions}}}"#));
    Client::opened(&Connect { first_message, ..Connect::session(address, user, device) })
}

/// The next event of a client: its bytes, and decoded.
#[track_caller]
pub fn event(client: &mut Client) -> (Vec<u8>, EventEnvelope) {
    loop {
        match client.receive() {
            Received::Binary(payload) => {
                let envelope = EventEnvelope::decode(&*payload).expect("an EventEnvelope");
                return (payload, envelope);
            }
            Received::Ping => {}
            other => panic!("not an event: {other:?}"),
        }
    }
}

/// The next event, which must be a message: its conversation and sequence.
#[track_caller]
pub fn message(client: &mut Client) -> (String, i64) {
    let (_, envelope) = event(client);
    assert_eq!(envelope.event_type(), EventType::MessageSent);
    let event = MessageSentEvent::decode(envelope.payload).expect("a MessageSentEvent");
    let message = event.message.expect("has a message");
    (message.conversation_id, message.sequence)
}

/// The type of the next event.
#[track_caller]
pub fn event_type(client: &mut Client) -> EventType {
    event(client).1.event_type()
}

/// Asserts that no event arrives for this long. Where possible, expect a later event instead.
#[track_caller]
pub fn receives_nothing(client: &mut Client, time: Duration) {
    let deadline = Instant::now() + time;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        match client.receive_within(left) {
            None | Some(Received::Ping) => {}
            Some(other) => panic!("received {other:?}"),
        }
    }
}
