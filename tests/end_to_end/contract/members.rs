//! The members of conversations: large ones, and a conversation service that refuses or lags.

use delivery_testkit::neighbours::{Behaviour, Method};
use tonic::Code;

use crate::support::back_end::{BackEnd, message, resuming};
use crate::support::client::Client;
use crate::support::wait::SOON;

/// Promise: “A conversation of 100,000 members is fetched.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn user_of_two_conversations_of_100_000_members_catches_up_and_gets_their_events() {
    let mut back_end = BackEnd::start("large", 1);
    let others: Vec<String> =
        (0..100_000).map(|n| format!("{n:08x}-0000-4000-8000-000000000000")).collect();
    let mut members: Vec<&str> = others.iter().map(String::as_str).collect();
    members.push("alice");
    {
        let mut state = back_end.neighbours.state();
        state.create("one", &members, 2);
        state.create("two", &members, 2);
        // Beyond 8 MiB: each user in the list twice.
        (state.lists_members, state.lists_roles) = (true, true);
    }
    // A test build decodes slowly.
    let node = back_end.node().set("CALL_TIMEOUT", "30s").start();
    let mut alice = resuming(node.public, "alice", "phone", "{}");
    let mut caught_up: Vec<_> = (0..4).map(|_| message(&mut alice)).collect();
    caught_up.sort_unstable();
    let expected = [("one", 1), ("one", 2), ("two", 1), ("two", 2)];
    assert_eq!(caught_up, expected.map(|(of, sequence)| (of.to_owned(), sequence)));
    for conversation in ["one", "two"] {
        back_end.publisher.message(conversation, 3, "bob", "live");
        assert_eq!(message(&mut alice), (conversation.to_owned(), 3));
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn records_wait_for_a_service_that_refuses_and_none_is_lost() {
    let mut back_end = BackEnd::start("refused", 1);
    let node = back_end.node().start();
    let mut alice = Client::session(node.public, "alice", "phone");
    let codes = [Code::PermissionDenied, Code::Unauthenticated, Code::InvalidArgument];
    for (number, code) in (0..).zip(codes) {
        let conversation = format!("room-{number}");
        back_end.neighbours.set(Method::Members, Behaviour::Failing(code));
        back_end.neighbours.state().create(&conversation, &["alice"], 0);
        let asked = back_end.neighbours.state().count(Method::Members);
        for sequence in 1..=5 {
            back_end.publisher.message(&conversation, sequence, "bob", "hello");
        }
        back_end.neighbours.wait(SOON, |known| known.count(Method::Members) >= asked + 3);
        back_end.neighbours.set(Method::Members, Behaviour::Normal);
        for sequence in 1..=5 {
            assert_eq!(message(&mut alice), (conversation.clone(), sequence), "{code:?}");
        }
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn conversation_that_a_replica_does_not_have_yet_is_asked_for_once_more() {
    let mut back_end = BackEnd::start("lagging", 1);
    let node = back_end.node().start();
    let mut alice = Client::session(node.public, "alice", "phone");
    back_end.neighbours.set(Method::Members, Behaviour::Failing(Code::NotFound));
    back_end.neighbours.state().create("room", &["alice"], 0);
    back_end.publisher.message("room", 1, "bob", "hello");
    back_end.neighbours.wait(SOON, |known| known.count(Method::Members) == 1);
    back_end.neighbours.set(Method::Members, Behaviour::Normal);
    assert_eq!(message(&mut alice), ("room".into(), 1));
}
