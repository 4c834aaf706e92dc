//! Contract §4: the calls to the presence service.

use delivery_testkit::neighbours::{Behaviour, Call, FakeNeighbours, Method};
use tonic::Code;

use crate::support::back_end::with_neighbours;
use crate::support::client::{Client, Received};
use crate::support::node::{Node, NodeBuilder};
use crate::support::wait::SOON;

fn node(neighbours: &FakeNeighbours) -> NodeBuilder {
    with_neighbours(NodeBuilder::dev(), neighbours).set("INSTANCE_ID", "node-under-test")
}

fn register(user: &str) -> Call {
    let (user, device) = (user.to_owned(), "phone".to_owned());
    Call::Register { user, device, instance: "node-under-test".into() }
}

fn unregister(user: &str) -> Call {
    Call::Unregister { user: user.into(), device: "phone".into() }
}

fn has(neighbours: &FakeNeighbours, call: &Call) {
    neighbours.wait(SOON, |known| known.calls.contains(call));
}

#[test]
fn session_is_registered_refreshed_and_unregistered() {
    let neighbours = FakeNeighbours::start();
    let node = node(&neighbours).set("PRESENCE_REFRESH", "1s").start();
    let mut alice = Client::session(node.public, "alice", "phone");
    has(&neighbours, &register("alice"));
    has(&neighbours, &Call::Refresh { user: "alice".into(), device: "phone".into() });
    alice.close(1000);
    alice.receive_end();
    has(&neighbours, &unregister("alice"));
    neighbours.wait(SOON, |known| known.registrations.is_empty());
}

#[test]
fn node_without_a_name_gets_one_at_each_start() {
    let neighbours = FakeNeighbours::start();
    let mut names = std::collections::BTreeSet::new();
    for number in 0..2 {
        let node = with_neighbours(NodeBuilder::dev(), &neighbours).set("INSTANCE_ID", "").start();
        let user = format!("user-{number}");
        let _session = Client::session(node.public, &user, "phone");
        let key = (user, "phone".to_owned());
        neighbours.wait(SOON, |known| known.registrations.contains_key(&key));
        names.insert(neighbours.state().registrations[&key].clone());
    }
    assert!(names.len() == 2 && names.iter().all(|name| !name.is_empty()), "{names:?}");
}

/// Connects and registers.
fn registered(node: &Node, neighbours: &FakeNeighbours, user: &str) -> Client {
    let client = Client::session(node.public, user, "phone");
    has(neighbours, &register(user));
    client
}

#[test]
fn every_kind_of_end_unregisters() {
    let neighbours = FakeNeighbours::start();
    let mut node = node(&neighbours)
        .set("PING_INTERVAL", "1s")
        .set("IDLE_TIMEOUT", "2s")
        .set("MESSAGE_BYTES_MAX", "1KiB")
        .start();

    let mut closed = registered(&node, &neighbours, "closed");
    closed.close(1000);
    has(&neighbours, &unregister("closed"));

    let mut gone = registered(&node, &neighbours, "gone");
    gone.abort();
    has(&neighbours, &unregister("gone"));

    let mut at_fault = registered(&node, &neighbours, "at-fault");
    at_fault.send(2, &[0; 2000]);
    has(&neighbours, &unregister("at-fault"));

    // Stays connected but answers no pings.
    let _silent = registered(&node, &neighbours, "silent");
    has(&neighbours, &unregister("silent"));

    let _stopped = registered(&node, &neighbours, "stopped");
    node.stop(SOON);
    has(&neighbours, &unregister("stopped"));
}

#[test]
fn end_of_a_replaced_session_does_not_unregister_its_successor() {
    let neighbours = FakeNeighbours::start();
    let node = node(&neighbours).start();
    let mut first = registered(&node, &neighbours, "alice");
    for _ in 0..10 {
        let second = Client::session(node.public, "alice", "phone");
        assert_eq!(first.receive_end(), Received::Closed(4000, "session_replaced".into()));
        first = second;
    }
    // The calls of a later session come after any call that the ends above caused.
    let mut marker = registered(&node, &neighbours, "marker");
    marker.close(1000);
    has(&neighbours, &unregister("marker"));
    let known = neighbours.state();
    assert!(!known.calls.contains(&unregister("alice")));
    assert!(known.registrations.contains_key(&("alice".to_owned(), "phone".to_owned())));
}

#[test]
fn session_that_opened_and_ended_during_a_presence_outage_costs_at_most_one_call() {
    let neighbours = FakeNeighbours::start();
    for method in [Method::Register, Method::Unregister, Method::Refresh] {
        neighbours.set(method, Behaviour::Failing(Code::Unavailable));
    }
    let node = node(&neighbours).start();
    for number in 0..50 {
        let mut client = Client::session(node.public, &format!("user-{number}"), "phone");
        client.close(1000);
        client.receive_end();
    }
    let stays = Client::session(node.public, "stays", "phone");
    neighbours.state().calls.clear();
    for method in [Method::Register, Method::Unregister, Method::Refresh] {
        neighbours.set(method, Behaviour::Normal);
    }
    has(&neighbours, &register("stays"));
    let known = neighbours.state();
    for number in 0..50 {
        let user = format!("user-{number}");
        let of_user = |call: &&Call| match call {
            Call::Register { user: of, .. } | Call::Unregister { user: of, .. } => *of == user,
            _ => false,
        };
        // The call in flight when presence came back, and at most one for the end.
        assert!(known.calls.iter().filter(of_user).count() <= 2, "{user}");
        assert!(!known.registrations.contains_key(&(user, "phone".to_owned())));
    }
    drop(known);
    drop(stays);
}

#[test]
fn hanging_presence_delays_nobody() {
    let neighbours = FakeNeighbours::start();
    for method in [Method::Register, Method::Unregister, Method::Refresh] {
        neighbours.set(method, Behaviour::Hanging);
    }
    let node = node(&neighbours).start();
    for number in 0..200 {
        let mut client = Client::session(node.public, &format!("user-{number}"), "phone");
        assert!(client.send(9, b"here"));
        assert_eq!(client.receive(), Received::Pong(b"here".to_vec()));
    }
    neighbours.wait(SOON, |known| known.count(Method::Register) >= 1);
    let known = neighbours.state();
    assert!(known.in_flight_peak[&Method::Register] <= 64, "bounded: {:?}", known.in_flight_peak);
}
