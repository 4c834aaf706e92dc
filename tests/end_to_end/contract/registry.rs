//! Contract §4: no session takes the registry key of another.

use delivery_testkit::neighbours::FakeNeighbours;
use tonic::Code;

use super::nodes::Nodes;
use super::stream;
use crate::support::back_end::{event_type, receives_nothing, with_neighbours};
use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::node::{Node, NodeBuilder};
use crate::support::proxy::Proxy;
use crate::support::services::redis_addr;
use crate::support::stream::first;
use crate::support::wait::{SOON, until};

/// Asserts that both interfaces refuse these ids and name the bad one.
#[track_caller]
fn refuses(node: &Node, user: &str, device: &str, named: &str) {
    let reason = format!("{named} must not contain ':'");
    match Client::connect(&Connect::session(node.public, user, device)).receive() {
        Received::Refused(400, answer) => assert!(answer.contains(&reason), "{answer}"),
        other => panic!("{user} on {device}: not refused with 400: {other:?}"),
    }
    let status = stream::refused(node, first(user, device));
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

/// A node that reaches Redis through a proxy, and another that reaches it directly.
struct CutOff {
    nodes: Nodes,
    proxy: Proxy,
    first: Node,
    second: Node,
}

impl CutOff {
    fn start(name: &'static str) -> Self {
        let nodes = Nodes::new(name);
        let proxy = Proxy::start(redis_addr().parse().expect("an address"));
        let often = |builder: NodeBuilder| builder.set("PRESENCE_REFRESH", "1s");
        let first = often(nodes.builder(0).set("REDIS_ADDR", proxy.address)).start();
        let second = often(nodes.builder(1)).start();
        Self { nodes, proxy, first, second }
    }

    /// Waits until a write of the first node is late: it was sent, and is not answered.
    fn is_late(&self) {
        until(SOON, "a write of the node that is cut off fails", || {
            let failures = self.first.metrics().sum("delivery_presence_failures_total", &[]);
            (failures >= 1.0).then_some(())
        });
    }

    /// Lets the late writes through. The older session must lose, the newer must stay.
    fn newer_wins(mut self, user: &str, mut old: Client, mut new: Client) {
        self.proxy.heal();
        assert_eq!(old.receive_end(), Received::Closed(4000, "session_replaced".into()));
        assert_eq!(self.nodes.registry.instance_of(user, "phone"), Some(self.nodes.instance(1)));
        assert!(self.nodes.registry.devices_of(user).contains("phone"));
        let replaced =
            |node: &Node| node.metrics().sum("delivery_session_replaced_elsewhere_total", &[]);
        assert_eq!((replaced(&self.first), replaced(&self.second)), (1.0, 0.0));
        let members = [user.to_owned()];
        self.nodes.back_end.publisher.created(&format!("{user}-room"), &members);
        event_type(&mut new);
    }
}

/// Promise: “The newest session of a device wins.”
#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn older_session_whose_registration_comes_late_does_not_win() {
    let mut cut_off = CutOff::start("late-register");
    let user = cut_off.nodes.user("alice");
    cut_off.proxy.cut();
    let old = Client::session(cut_off.first.public, &user, "phone");
    cut_off.is_late();
    let new = Client::session(cut_off.second.public, &user, "phone");
    cut_off.nodes.registered(&user, 1);
    cut_off.newer_wins(&user, old, new);
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn older_session_whose_refresh_comes_late_does_not_win() {
    let mut cut_off = CutOff::start("late-refresh");
    let user = cut_off.nodes.user("alice");
    let old = Client::session(cut_off.first.public, &user, "phone");
    cut_off.nodes.registered(&user, 0);
    cut_off.proxy.cut();
    cut_off.is_late();
    let new = Client::session(cut_off.second.public, &user, "phone");
    cut_off.nodes.registered(&user, 1);
    cut_off.newer_wins(&user, old, new);
}
