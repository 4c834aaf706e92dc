//! Contract §4: no session takes the registry key of another.

use delivery_testkit::neighbours::FakeNeighbours;
use tonic::Code;

use super::nodes::Nodes;
use super::stream;
use crate::support::back_end::{event_type, receives_nothing, with_neighbours};
use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::node::{Node, NodeBuilder};

/// Asserts that both interfaces refuse these ids and name the bad one.
#[track_caller]
fn refuses(node: &Node, user: &str, device: &str, named: &str) {
    let reason = format!("{named} must not contain ':'");
    match Client::connect(&Connect::session(node.public, user, device)).receive() {
        Received::Refused(400, answer) => assert!(answer.contains(&reason), "{answer}"),
        other => panic!("{user} on {device}: not refused with 400: {other:?}"),
    }
    let status = stream::refused(node, stream::first(user, device));
    assert_eq!(status.code(), Code::InvalidArgument, "{user} on {device}: {status}");
    assert!(status.message().contains(&reason), "{status}");
}

/// Promise: “No two sessions share a registry key.”
#[test]
fn ids_that_could_share_a_key_are_refused_where_sessions_are_registered() {
    let neighbours = FakeNeighbours::start();
    let node = with_neighbours(NodeBuilder::dev(), &neighbours).start();
    refuses(&node, "a:b", "c", "user_id");
    refuses(&node, "a", "b:c", "device_id");
    let metrics = node.metrics();
    assert_eq!(metrics.sum("delivery_session_refused_reserved_ids_total", &[]), 4.0);
    let labels = ["path=\"/ws\"", "status=\"400\""];
    assert_eq!(metrics.sum("http_requests_total", &labels), 4.0);
    assert!(neighbours.state().registrations.is_empty());

    // Without a registry there are no keys to share.
    let alone = NodeBuilder::dev().start();
    let mut first = Client::session(alone.public, "a:b", "c");
    let _second = Client::session(alone.public, "a", "b:c");
    assert!(first.send(9, b"here"));
    assert_eq!(first.receive(), Received::Pong(b"here".to_vec()));
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn users_whose_keys_would_collide_are_refused_on_every_node() {
    let mut nodes = Nodes::new("collide");
    let user = nodes.user("a");
    let other = format!("{user}:b");
    let (first, second) = (nodes.builder(0).start(), nodes.builder(1).start());
    for node in [&first, &second] {
        refuses(node, &other, "c", "user_id");
        refuses(node, &user, "b:c", "device_id");
    }
    assert_eq!(nodes.registry.instance_of(&user, "b:c"), None);
    // A session of the user is not disturbed by the attempts.
    let mut session = Client::session(first.public, &user, "phone");
    nodes.registered(&user, 0);
    refuses(&second, &other, "phone", "user_id");
    nodes.back_end.publisher.created("collide-room", std::slice::from_ref(&user));
    event_type(&mut session);
    receives_nothing(&mut session, std::time::Duration::from_millis(100));
}
