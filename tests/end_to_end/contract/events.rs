//! Contract §2 and §3: which events each session receives, and their bytes.

use std::time::Duration;

use delivery_testkit::neighbours::{Behaviour, Method};
use delivery_testkit::proto::message::v1::MessageSentEvent;
use delivery_testkit::proto::shared::v1::EventType;
use delivery_testkit::publisher::{envelope, message as new_message};
use prost::Message as _;

use crate::support::back_end::{BackEnd, event, event_type, message, receives_nothing};
use crate::support::client::{Client, Received};
use crate::support::node::Node;
use crate::support::wait::{SOON, until};

/// Long enough for an event that must not arrive to arrive.
const A_WHILE: Duration = Duration::from_millis(500);

fn names(users: &[&str]) -> Vec<String> {
    users.iter().map(|user| (*user).to_owned()).collect()
}

/// A node whose conversation service has this conversation, and a session of alice.
fn with_alice(name: &str, known: &[(&str, &[&str])]) -> (BackEnd, Node, Client) {
    let back_end = BackEnd::start(name, 1);
    for (conversation, members) in known {
        back_end.neighbours.state().create(conversation, members, 0);
    }
    let node = back_end.node().start();
    let alice = Client::session(node.public, "alice", "phone");
    (back_end, node, alice)
}

/// Promise: “At least once to every session that stays.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn message_reaches_every_member_on_every_device_the_sender_included() {
    let mut back_end = BackEnd::start("members", 1);
    let node = back_end.node().start();
    let session = |user, device| Client::session(node.public, user, device);
    let mut members =
        [session("alice", "phone"), session("alice", "desk"), session("bob", "phone")];
    let mut stranger = session("mallory", "phone");
    back_end.publisher.created("room", &names(&["alice", "bob"]));
    back_end.publisher.message("room", 1, "alice", "hello");
    for member in &mut members {
        assert_eq!(event_type(member), EventType::ConversationCreated);
        assert_eq!(message(member), ("room".into(), 1));
    }
    receives_nothing(&mut stranger, A_WHILE);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn unknown_conversation_is_fetched_once() {
    let (mut back_end, _node, mut alice) = with_alice("unknown", &[("old", &["alice", "bob"])]);
    for sequence in 1..=20 {
        back_end.publisher.message("old", sequence, "bob", "hello");
    }
    for sequence in 1..=20 {
        assert_eq!(message(&mut alice), ("old".into(), sequence));
    }
    assert_eq!(back_end.neighbours.state().count(Method::Members), 1);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn added_member_receives_the_event_that_adds_them_and_all_later_ones() {
    let (mut back_end, node, mut alice) = with_alice("added", &[]);
    let mut carol = Client::session(node.public, "carol", "phone");
    back_end.publisher.created("room", &names(&["alice", "bob"]));
    back_end.publisher.message("room", 1, "alice", "before");
    assert_eq!(event_type(&mut alice), EventType::ConversationCreated);
    assert_eq!(message(&mut alice), ("room".into(), 1));
    back_end.publisher.membership("room", "carol", true);
    back_end.publisher.message("room", 2, "alice", "after");
    for member in [&mut carol, &mut alice] {
        assert_eq!(event_type(member), EventType::MembershipChanged);
        assert_eq!(message(member), ("room".into(), 2));
    }
}

/// Promise: “Members are complete or unknown.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn member_added_while_the_list_is_not_cached_does_not_hide_the_others() {
    // As in a real back end, the conversation service has the new member before it publishes.
    let (mut back_end, node, mut alice) =
        with_alice("added-uncached", &[("old", &["alice", "bob", "carol"])]);
    let mut carol = Client::session(node.public, "carol", "phone");
    back_end.publisher.membership("old", "carol", true);
    back_end.publisher.message("old", 1, "alice", "hello");
    for member in [&mut alice, &mut carol] {
        assert_eq!(event_type(member), EventType::MembershipChanged);
        assert_eq!(message(member), ("old".into(), 1));
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn removed_member_receives_the_event_that_removes_them_and_no_later_one() {
    let (mut back_end, node, mut alice) = with_alice("removed", &[]);
    let mut bob = Client::session(node.public, "bob", "phone");
    back_end.publisher.created("room", &names(&["alice", "bob"]));
    back_end.publisher.membership("room", "bob", false);
    for sequence in 1..=5 {
        back_end.publisher.message("room", sequence, "alice", "gone");
    }
    back_end.publisher.created("other", &names(&["bob"]));
    assert_eq!(event_type(&mut bob), EventType::ConversationCreated);
    assert_eq!(event_type(&mut bob), EventType::MembershipChanged);
    // The same partition: an event of the room would have arrived before this one.
    assert_eq!(event_type(&mut bob), EventType::ConversationCreated);
    assert_eq!(event_type(&mut alice), EventType::ConversationCreated);
    assert_eq!(event_type(&mut alice), EventType::MembershipChanged);
    assert_eq!(message(&mut alice), ("room".into(), 1));
    receives_nothing(&mut bob, A_WHILE);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn bytes_are_those_of_the_record() {
    let (mut back_end, _node, mut alice) = with_alice("bytes", &[]);
    back_end.publisher.created("room", &names(&["alice"]));
    event(&mut alice);
    // With an unknown field: 15, varint, 5.
    let mut value =
        envelope(EventType::MessageDeleted, vec![10, 4, b'r', b'o', b'o', b'm']).encode_to_vec();
    value.extend([0x78, 5]);
    back_end.publisher.publish_bytes("room", &value);
    assert_eq!(event(&mut alice).0, value);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn deletions_and_receipts_reach_the_members() {
    let (mut back_end, _node, mut alice) = with_alice("kinds", &[]);
    back_end.publisher.created("room", &names(&["alice", "bob"]));
    back_end.publisher.message("room", 1, "bob", "hello");
    back_end.publisher.receipt("room", "alice", 1);
    back_end.publisher.deleted("room", "room-1");
    for expected in [
        EventType::ConversationCreated,
        EventType::MessageSent,
        EventType::ReadReceiptUpdated,
        EventType::MessageDeleted,
    ] {
        assert_eq!(event_type(&mut alice), expected);
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn record_that_cannot_be_decoded_is_counted_logged_and_skipped() {
    let (mut back_end, node, mut alice) = with_alice("garbage", &[]);
    back_end.publisher.publish_bytes("room", b"\xff\xff\xff no envelope");
    back_end.publisher.created("room", &names(&["alice"]));
    assert_eq!(event_type(&mut alice), EventType::ConversationCreated);
    // Lines are written in the background.
    until(SOON, "the log names topic, partition and offset", || {
        let log = node.log();
        let mut lines = log.lines();
        lines.any(|line| line.contains(&back_end.topic) && line.contains("offset")).then_some(())
    });
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn unroutable_conversation_stalls_only_its_own_partition() {
    let mut back_end = BackEnd::start("stalls", 16);
    back_end.neighbours.state().create("lost", &["alice"], 0);
    back_end.neighbours.set(Method::Members, Behaviour::Hanging);
    let node = back_end.node().set("CALL_TIMEOUT", "300ms").start();
    let mut alice = Client::session(node.public, "alice", "phone");
    back_end.publisher.message("lost", 1, "alice", "waits");
    back_end.neighbours.wait(SOON, |known| known.count(Method::Members) >= 2);
    // Other partitions progress: all of these rooms arrive, except those in the partition of `lost`.
    for number in 0..64 {
        back_end.publisher.created(&format!("room-{number}"), &names(&["alice"]));
    }
    let mut created = 0;
    while created < 48 {
        assert_eq!(event_type(&mut alice), EventType::ConversationCreated);
        created += 1;
    }
    back_end.neighbours.set(Method::Members, Behaviour::Normal);
    until(SOON, "the waiting message arrives", || {
        (event_type(&mut alice) == EventType::MessageSent).then_some(())
    });
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn trace_id_of_a_record_is_in_the_log() {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut back_end = BackEnd::start("traced", 1);
    back_end.neighbours.state().create("room", &["alice"], 0);
    let node = back_end
        .node()
        .set("TRACING_ENABLED", "true")
        .set("LOG_LEVEL", "info,delivery::service::routing::router=debug")
        .start();
    let mut alice = Client::session(node.public, "alice", "phone");
    let sent = MessageSentEvent { message: Some(new_message("room", 1, "alice", "traced")) };
    let value = envelope(EventType::MessageSent, sent.encode_to_vec()).encode_to_vec();
    back_end.publisher.publish_with("room", &value, &[("traceparent", TRACE)]);
    assert_eq!(event(&mut alice).0, value);
    until(SOON, "the log names the trace", || {
        let log = node.log();
        log.lines().any(|line| line.contains(TRACE) && line.contains("room")).then_some(())
    });
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn events_cause_no_calls_to_presence() {
    let (mut back_end, _node, mut alice) =
        with_alice("unasked", &[("room", &["alice", "bob", "carol"])]);
    back_end.neighbours.wait(SOON, |known| known.count(Method::Register) == 1);
    for sequence in 1..=100 {
        back_end.publisher.message("room", sequence, "alice", "hello");
    }
    for sequence in 1..=100 {
        assert_eq!(message(&mut alice), ("room".into(), sequence));
    }
    let known = back_end.neighbours.state();
    assert_eq!(
        known.count(Method::Devices) + known.count(Method::Presence),
        0,
        "{:?}",
        known.calls
    );
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn burst_does_not_close_a_fast_reader_as_slow() {
    const BURST: i64 = 2_000;
    let (mut back_end, _node, mut alice) = with_alice("burst", &[("room", &["alice"])]);
    // Wait until the session is live: a burst during catch-up is bounded otherwise.
    back_end.publisher.message("room", 1, "alice", "hello");
    assert_eq!(message(&mut alice), ("room".into(), 1));
    for sequence in 2..=BURST {
        back_end.publisher.message("room", sequence, "alice", "hello");
    }
    for sequence in 2..=BURST {
        assert_eq!(message(&mut alice), ("room".into(), sequence));
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn later_messages_of_a_client_are_ignored() {
    let (mut back_end, _node, mut alice) = with_alice("meaningless", &[]);
    for text in ["hello", "{}", r#"{"unknown": 1}"#, "[]", "{\"last_sequences\":"] {
        assert!(alice.send_text(text));
    }
    assert!(alice.send(2, b"binary too"));
    back_end.publisher.created("room", &names(&["alice"]));
    assert_eq!(event_type(&mut alice), EventType::ConversationCreated);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn stopping_node_closes_its_sessions_and_exits_with_zero() {
    let (back_end, mut node, mut alice) = with_alice("stop", &[]);
    back_end.neighbours.wait(SOON, |known| known.registrations.len() == 1);
    let status = node.stop(SOON);
    assert!(matches!(alice.receive_end(), Received::Closed(1001, _)));
    assert!(status.success(), "{status}");
    back_end.neighbours.wait(SOON, |known| known.registrations.is_empty());
}
