//! Contract §1, `DeliveryApi.Connect`: gRPC sessions.

use delivery_testkit::neighbours::{Call, FakeNeighbours, Method};
use delivery_testkit::proto::delivery::v1::DeliveryConnectRequest;
use delivery_testkit::proto::shared::v1::EventType;
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::back_end::{BackEnd, event_type, with_neighbours};
use crate::support::client::{Client, Received};
use crate::support::node::{Node, NodeBuilder};
use crate::support::stream::{Stream, first, health};
use crate::support::wait::SOON;

/// The status of a session that is not admitted, from the call or from the stream.
#[track_caller]
pub(super) fn refused(node: &Node, request: DeliveryConnectRequest) -> Status {
    match Stream::connect(node, request) {
        Err(status) => status,
        Ok(mut stream) => stream.receive().expect_err("not admitted"),
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn stream_gets_messages_as_they_are_sent() {
    let mut back_end = BackEnd::start("stream", 1);
    let node = back_end.node().start();
    let mut alice = Stream::connect(&node, first("alice", "phone")).expect("admitted");
    let mut beside = Client::session(node.public, "alice", "desk");
    back_end.neighbours.wait(SOON, |known| known.registrations.len() == 2);
    back_end.publisher.created("room", &["alice".into()]);
    assert_eq!(event_type(&mut beside), EventType::ConversationCreated);
    for sequence in 1..=3 {
        back_end.publisher.message("room", sequence, "alice", "hello");
    }
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = alice.receive().expect("open");
        assert_eq!(event.conversation_id, "room");
        if let Some(message) = event.message {
            assert_eq!((message.sequence, message.content.as_str()), (event.sequence, "hello"));
            seen.push(event.sequence);
        }
    }
    assert_eq!(seen, [1, 2, 3]);
}

/// Promise: “No client is refused while load balancers notice.”
#[test]
fn stream_is_admitted_and_served_during_the_drain_delay() {
    let neighbours = FakeNeighbours::start();
    neighbours.state().create("room", &["alice"], 3);
    let builder = with_neighbours(NodeBuilder::dev(), &neighbours);
    let node = builder.set("DRAIN_DELAY", "10m").start();
    assert_eq!(node.post("/admin/drain").expect("an answer").status, 202);
    assert_eq!(node.get("/health/ready").expect("an answer").status, 503);
    let request =
        DeliveryConnectRequest { conversation_id: "room".into(), ..first("alice", "phone") };
    let mut alice = Stream::connect(&node, request).expect("admitted");
    for sequence in 1..=3 {
        assert_eq!(alice.receive().expect("open").sequence, sequence);
    }
}

#[test]
fn conversation_named_for_the_first_time_is_resumed_from_its_sequence() {
    let neighbours = FakeNeighbours::start();
    neighbours.state().create("room", &["alice"], 150);
    let node = with_neighbours(NodeBuilder::dev(), &neighbours).start();
    let request = DeliveryConnectRequest {
        conversation_id: "room".into(),
        last_received_sequence: 40,
        ..first("alice", "phone")
    };
    let mut alice = Stream::connect(&node, request.clone()).expect("admitted");
    for sequence in 41..=150 {
        let event = alice.receive().expect("open");
        assert_eq!((event.conversation_id.as_str(), event.sequence), ("room", sequence));
    }
    // Named again, it is an acknowledgement: nothing is fetched.
    let pages = neighbours.state().count(Method::Sync);
    alice.send(DeliveryConnectRequest { last_received_sequence: 150, ..request });
    neighbours.state().create("second", &["alice"], 1);
    alice.send(DeliveryConnectRequest {
        conversation_id: "second".into(),
        ..first("alice", "phone")
    });
    let event = alice.receive().expect("open");
    assert_eq!((event.conversation_id.as_str(), event.sequence), ("second", 1));
    let known = neighbours.state();
    let of_room =
        |call: &&Call| matches!(call, Call::Sync { conversation, .. } if conversation == "room");
    assert_eq!(known.calls.iter().filter(of_room).count(), pages);
}

#[test]
fn stream_and_socket_replace_each_other() {
    let neighbours = FakeNeighbours::start();
    let node = with_neighbours(NodeBuilder::dev(), &neighbours).start();
    let mut socket = Client::session(node.public, "alice", "phone");
    let mut stream = Stream::connect(&node, first("alice", "phone")).expect("admitted");
    assert_eq!(socket.receive_end(), Received::Closed(4000, "session_replaced".into()));
    let _socket = Client::session(node.public, "alice", "phone");
    assert_eq!(stream.receive().expect_err("replaced").code(), Code::Aborted);
    neighbours.wait(SOON, |known| known.registrations.len() == 1);
    assert_eq!(neighbours.state().count(Method::Unregister), 0);
}

#[test]
fn statuses_say_what_is_wrong() {
    let node = NodeBuilder::dev().set("CONNECTIONS_PER_USER", 1).start();
    assert_eq!(refused(&node, first("", "phone")).code(), Code::InvalidArgument);
    assert_eq!(refused(&node, first("alice", "")).code(), Code::InvalidArgument);
    let _first = Client::session(node.public, "alice", "phone");
    assert_eq!(refused(&node, first("alice", "desk")).code(), Code::ResourceExhausted);

    let node = NodeBuilder::dev()
        .set("AUTH_MODE", "jwt")
        .set("JWT_SECRET", "a key for tests of at least thirty-two bytes")
        .start();
    assert_eq!(refused(&node, first("alice", "phone")).code(), Code::Unauthenticated);
}

#[test]
fn health_service_answers_serving() {
    let node = NodeBuilder::dev().start();
    assert_eq!(health(&node), ServingStatus::Serving);
}
