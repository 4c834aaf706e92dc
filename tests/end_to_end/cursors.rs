//! Clients that come back with a cursor, real nodes and a real Kafka (docs/websocket.md).

use std::net::SocketAddr;

use delivery::domain::cursor::Cursor;
use delivery_testkit::neighbours::Method;
use delivery_testkit::proto::message::v1::MessageSentEvent;
use delivery_testkit::proto::shared::v1::{EventEnvelope, EventType};
use prost::Message as _;
use serde_json::{Value, json};

use super::support::back_end::BackEnd;
use super::support::client::{Client, Received};
use super::support::fleet::Connect;
use super::support::node::{Node, NodeBuilder};
use super::support::services::redis_addr;
use super::support::wait::{SOON, until};

const ROOM: &str = "room";

/// A client that keeps its newest cursor.
struct CursorClient {
    client: Client,
    cursor: Option<String>,
    expired: Option<String>,
}

impl CursorClient {
    fn connect(address: SocketAddr, cursor: Option<&str>) -> Self {
        let first_message = json!({ "cursor": cursor, "last_sequences": {} }).to_string();
        let connect = Connect {
            first_message: Some(first_message),
            ..Connect::session(address, "alice", "phone")
        };
        Self { client: Client::opened(&connect), cursor: None, expired: None }
    }

    /// The next event.
    fn next(&mut self) -> EventEnvelope {
        loop {
            match self.client.receive() {
                Received::Binary(payload) => {
                    return EventEnvelope::decode(&*payload).expect("an EventEnvelope");
                }
                Received::Text(text) => self.text(&text),
                Received::Ping => {}
                other => panic!("not an event: {other:?}"),
            }
        }
    }

    fn text(&mut self, text: &str) {
        let text: Value = serde_json::from_str(text).expect("JSON");
        if let Some(cursor) = text.get("cursor") {
            self.cursor = Some(cursor.as_str().expect("a string").to_owned());
        }
        if let Some(why) = text.get("cursor_expired") {
            self.expired = Some(why.as_str().expect("a string").to_owned());
        }
    }

    /// Takes events until this message.
    fn until_message(&mut self, sequence: i64) -> Vec<String> {
        let mut events = Vec::new();
        loop {
            let event = name(&self.next());
            events.push(event);
            if events.last() == Some(&format!("message {sequence}")) {
                return events;
            }
        }
    }

    /// Waits for a cursor that was sent after everything before.
    fn next_cursor(&mut self) -> String {
        self.cursor = None;
        loop {
            match self.client.receive() {
                Received::Text(text) => self.text(&text),
                // Events may be repeated.
                Received::Ping | Received::Binary(_) => {}
                other => panic!("{other:?}"),
            }
            if let Some(cursor) = &self.cursor {
                return cursor.clone();
            }
        }
    }
}

fn name(event: &EventEnvelope) -> String {
    match event.event_type() {
        EventType::MessageSent => {
            let event = MessageSentEvent::decode(event.payload.clone()).expect("a message");
            format!("message {}", event.message.expect("has a message").sequence)
        }
        other => format!("{other:?}"),
    }
}

fn node(back_end: &BackEnd) -> NodeBuilder {
    back_end.node().set("ROUTING_MODE", "broadcast").set("CURSOR_INTERVAL", "200ms")
}

/// A connected client that has message 1 and a cursor that covers it. (One of the empty topic is used by this node
/// only.)
fn connected(back_end: &mut BackEnd, node: &Node) -> (CursorClient, String) {
    let mut alice = CursorClient::connect(node.public, None);
    alice.next_cursor();
    back_end.publisher.message(ROOM, 1, "bob", "hello");
    alice.until_message(1);
    loop {
        let cursor = alice.next_cursor();
        let positions = Cursor::from_text(&cursor).expect("a cursor");
        if positions.positions().iter().any(|position| position.next > 0) {
            return (alice, cursor);
        }
    }
}

/// What happens while the client is not connected: its events, in their order.
fn publish_while_away(back_end: &mut BackEnd) -> Vec<String> {
    back_end.publisher.message(ROOM, 2, "bob", "missed");
    back_end.publisher.deleted(ROOM, "message-1");
    back_end.publisher.receipt(ROOM, "bob", 2);
    back_end.publisher.message("of others", 7, "bob", "not for alice");
    back_end.publisher.membership(ROOM, "carol", true);
    back_end.publisher.message(ROOM, 4, "bob", "missed");
    back_end.publisher.flush(SOON);
    let expected =
        ["message 2", "MessageDeleted", "ReadReceiptUpdated", "MembershipChanged", "message 4"];
    expected.map(str::to_owned).to_vec()
}

/// What the client gets after its return until this message, without message 1, which may be repeated.
fn missed(alice: &mut CursorClient, until: i64) -> Vec<String> {
    let mut events = alice.until_message(until);
    events.retain(|event| event != "message 1");
    assert_eq!(alice.expired, None);
    events
}

fn calls(back_end: &BackEnd) -> usize {
    back_end.neighbours.state().count(Method::Sync)
}

/// The node has routed everything that was published.
fn wait_routed(back_end: &BackEnd, node: &Node) {
    let records = || node.metrics().sum("delivery_router_records_total", &[]);
    let sent = back_end.publisher.sent() as f64;
    until(SOON, "everything is routed", || (records() >= sent).then_some(()));
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn client_that_returns_to_its_node_gets_what_it_missed_and_nobody_is_asked() {
    let mut back_end = BackEnd::start("cursor", 3);
    back_end.neighbours.state().create(ROOM, &["alice", "bob"], 0);
    back_end.neighbours.state().create("of others", &["bob"], 0);
    let node = node(&back_end).start();
    let (mut alice, cursor) = connected(&mut back_end, &node);
    alice.client.abort();
    let mut expected = publish_while_away(&mut back_end);
    // What the node has routed goes to those who were members then.
    back_end.publisher.membership(ROOM, "alice", false);
    back_end.publisher.message(ROOM, 5, "bob", "after the removal");
    back_end.publisher.membership(ROOM, "alice", true);
    back_end.publisher.message(ROOM, 6, "bob", "after the return");
    back_end.publisher.flush(SOON);
    let change = "MembershipChanged".to_owned();
    expected.extend([change.clone(), change, "message 6".to_owned()]);
    wait_routed(&back_end, &node);
    let calls_before = calls(&back_end);
    let mut alice = CursorClient::connect(node.public, Some(&cursor));
    assert_eq!(missed(&mut alice, 6), expected);
    // It is live, and gets cursors again.
    let cursor = alice.next_cursor();
    back_end.publisher.message(ROOM, 7, "bob", "live");
    assert_eq!(alice.until_message(7), ["message 7"]);
    assert_eq!(calls(&back_end), calls_before, "of the message service");
    let mut again = CursorClient::connect(node.public, Some(&cursor));
    // The cursor may be a little older than what came before it.
    assert!(again.until_message(7).len() <= 4);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn client_that_returns_to_another_node_gets_what_it_missed() {
    let mut back_end = BackEnd::start("cursor-other", 2);
    back_end.neighbours.state().create(ROOM, &["alice", "bob"], 0);
    back_end.neighbours.state().create("of others", &["bob"], 0);
    let nodes = [node(&back_end).start(), node(&back_end).start()];
    let (mut alice, cursor) = connected(&mut back_end, &nodes[0]);
    let expected = publish_while_away(&mut back_end);
    alice.client.abort();
    let mut alice = CursorClient::connect(nodes[1].public, Some(&cursor));
    assert_eq!(missed(&mut alice, 4), expected);
}

/// Its tail is filled from Kafka.
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn client_of_a_node_that_was_killed_gets_what_it_missed_from_a_new_one() {
    let mut back_end = BackEnd::start("cursor-killed", 2);
    back_end.neighbours.state().create(ROOM, &["alice", "bob"], 0);
    back_end.neighbours.state().create("of others", &["bob"], 0);
    let mut first = node(&back_end).start();
    let (_alice, cursor) = connected(&mut back_end, &first);
    first.kill();
    let expected = publish_while_away(&mut back_end);
    let second = node(&back_end).start();
    let calls_before = calls(&back_end);
    let mut alice = CursorClient::connect(second.public, Some(&cursor));
    assert_eq!(missed(&mut alice, 4), expected);
    alice.next_cursor();
    assert_eq!(calls(&back_end), calls_before, "of the message service");
    assert!(second.metrics().sum("delivery_router_cursor_replays_total", &[]) >= 5.0);
}

/// A node of a group whose nodes hand over through the log.
fn group_node(back_end: &BackEnd) -> NodeBuilder {
    let topic = &back_end.topic;
    back_end
        .node()
        .set("ROUTING_MODE", "group")
        .set("CURSOR_INTERVAL", "200ms")
        .set("SESSIONS_TOPIC", format!("{topic}.sessions"))
        .set("HANDOFF_TOPIC", format!("{topic}.handoff"))
        .set("KAFKA_PROPERTIES", "session.timeout.ms=6000")
}

/// Nodes that share the partitions.
fn group(back_end: &BackEnd, partitions: f64) -> Vec<Node> {
    let mut nodes: Vec<_> = (0..2).map(|_| group_node(back_end).spawn()).collect();
    nodes.iter_mut().for_each(Node::wait_ready);
    let owned = |node: &Node| node.metrics().sum("delivery_router_partitions", &[]);
    until(SOON, "both own partitions", || {
        let owned: Vec<_> = nodes.iter().map(owned).collect();
        (owned.iter().all(|it| *it > 0.0) && owned.iter().sum::<f64>() == partitions).then_some(())
    });
    nodes
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn client_in_a_group_gets_what_it_missed_from_the_owners_on_whichever_node() {
    let mut back_end = BackEnd::start("cursor-group", 4);
    for room in [ROOM, "room-2", "room-3", "room-4", "room-5"] {
        back_end.neighbours.state().create(room, &["alice", "bob"], 0);
    }
    back_end.neighbours.state().create("of others", &["bob"], 0);
    let nodes = group(&back_end, 4.0);
    let (mut alice, cursor) = connected(&mut back_end, &nodes[0]);
    alice.client.abort();
    let expected = publish_while_away(&mut back_end);
    for room in ["room-2", "room-3", "room-4", "room-5"] {
        back_end.publisher.message(room, 9, "bob", "of another partition");
    }
    back_end.publisher.flush(SOON);
    let calls_before = calls(&back_end);
    for node in [1, 0] {
        let mut alice = CursorClient::connect(nodes[node].public, Some(&cursor));
        let (mut events, mut of_others) = (Vec::new(), 0);
        while events.len() < expected.len() || of_others < 4 {
            match name(&alice.next()) {
                event if event == "message 9" => of_others += 1,
                // What came shortly before the 101 may be repeated.
                event if event == "message 1" || events.contains(&event) => {}
                event => events.push(event),
            }
        }
        assert_eq!(alice.expired, None);
        assert_eq!(events, expected);
        alice.next_cursor();
        alice.client.abort();
    }
    assert_eq!(calls(&back_end), calls_before, "of the message service");
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn client_of_a_node_of_a_group_that_was_killed_gets_what_it_missed() {
    let mut back_end = BackEnd::start("cursor-owner", 4);
    back_end.neighbours.state().create(ROOM, &["alice", "bob"], 0);
    back_end.neighbours.state().create("of others", &["bob"], 0);
    let mut nodes = group(&back_end, 4.0);
    let (_alice, cursor) = connected(&mut back_end, &nodes[0]);
    nodes[0].kill();
    let expected = publish_while_away(&mut back_end);
    let mut alice = CursorClient::connect(nodes[1].public, Some(&cursor));
    assert_eq!(missed(&mut alice, 4), expected);
    alice.next_cursor();
}

/// Nodes that hand over through Redis keep no tails.
#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn cursor_counts_as_expired_where_redis_hands_over() {
    let mut back_end = BackEnd::start("cursor-redis", 2);
    back_end.neighbours.state().create(ROOM, &["alice", "bob"], 0);
    let broadcast = node(&back_end).start();
    let (mut alice, cursor) = connected(&mut back_end, &broadcast);
    alice.client.abort();
    let group =
        group_node(&back_end).set("HANDOFF", "redis").set("REDIS_ADDR", redis_addr()).start();
    let mut alice = CursorClient::connect(group.public, Some(&cursor));
    until(SOON, "told", || {
        if let Some(Received::Text(text)) = alice.client.receive_within(SOON) {
            alice.text(&text);
        }
        alice.expired.clone()
    });
    assert_eq!(alice.expired.as_deref(), Some("not_supported"));
    back_end.publisher.message(ROOM, 2, "bob", "live");
    alice.until_message(2);
}
