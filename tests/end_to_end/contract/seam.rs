//! The transition from catch-up to live events when other nodes route some of them: events that are
//! routed before those nodes see the session arrive with the catch-up.

use std::collections::BTreeSet;
use std::time::Duration;

use delivery_testkit::neighbours::{Behaviour, Call, Method};
use delivery_testkit::publisher::message;

use super::nodes::Nodes;
use crate::support::back_end::resuming;
use crate::support::client::{Client, Received};
use crate::support::node::Node;
use crate::support::tally::Tally;
use crate::support::wait::{SOON, until};

const ROOMS: usize = 12;

fn room(number: usize) -> String {
    format!("seam-room-{number}")
}

fn caught_up(node: &Node, sessions: f64) {
    until(SOON, "the session has caught up", || {
        (node.metrics().sum("delivery_resume_completed_total", &[]) >= sessions).then_some(())
    });
}

/// Receives until every room has reached this sequence.
fn receive_up_to(client: &mut Client, tally: &mut Tally, last: i64) {
    while (0..ROOMS)
        .any(|number| tally.streams.get(&room(number)).is_none_or(|room| room.last < last))
    {
        match client.receive() {
            Received::Binary(payload) => drop(tally.saw(&payload)),
            Received::Ping => {}
            other => panic!("{other:?}"),
        }
    }
    for (room, stream) in &tally.streams {
        let (missing, duplicates) = (&stream.missing, stream.duplicates);
        assert!(missing.is_empty() && duplicates == 0, "{room}: {stream:?}");
    }
}

impl Nodes {
    /// The message service has a message before its event is published.
    fn say_in_every_room(&mut self, sequence: i64) {
        for number in 0..ROOMS {
            let stored = message(&room(number), sequence, "sender", "hello");
            let mut known = self.back_end.neighbours.state();
            known.messages.entry(room(number)).or_default().push(stored);
            drop(known);
            self.back_end.publisher.message(&room(number), sequence, "sender", "hello");
        }
    }
}

/// Promise: “A session that asks to resume misses no message.”
#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn events_routed_by_other_nodes_before_they_see_a_session_come_with_its_catch_up() {
    let mut nodes = Nodes::new("seam");
    let (alice, witnesses) = (nodes.user("alice"), [nodes.user("first"), nodes.user("second")]);
    for number in 0..ROOMS {
        let members = [alice.as_str(), witnesses[0].as_str(), witnesses[1].as_str()];
        nodes.back_end.neighbours.state().create(&room(number), &members, 3);
    }
    let start = |number| {
        nodes
            .builder(number)
            .set("PRESENCE_MODE", "service")
            // This test must not depend on time.
            .set("CALL_TIMEOUT", "1m")
            .set("REGISTRATION_WAIT", "5m")
            .start()
    };
    let (first, second) = (start(0), start(1));
    // The presence service of this test writes nothing to Redis. So each witness receives what its own
    // node routes, which shows the node of each partition.
    let mut witness = [
        Client::session(first.public, &witnesses[0], "phone"),
        Client::session(second.public, &witnesses[1], "phone"),
    ];
    caught_up(&first, 1.0);
    caught_up(&second, 1.0);
    let mut seen = [Tally::default(), Tally::default()];
    for (witness, seen) in witness.iter_mut().zip(&mut seen) {
        receive_up_to(witness, seen, 3);
    }

    nodes.back_end.neighbours.set(Method::Register, Behaviour::Held);
    let positions: Vec<_> = (0..ROOMS).map(|number| format!("\"{}\":1", room(number))).collect();
    let positions = format!("{{{}}}", positions.join(","));
    let mut session = resuming(second.public, &alice, "phone", &positions);
    let mut tally = Tally::default();
    for number in 0..ROOMS {
        tally.streams.entry(room(number)).or_default().last = 1;
    }
    receive_up_to(&mut session, &mut tally, 3);

    // Routed before any other node can see the session.
    nodes.say_in_every_room(4);
    let mut routed = [BTreeSet::new(), BTreeSet::new()];
    until(SOON, "every room's event has been routed", || {
        for number in 0..2 {
            while let Some(heard) = witness[number].receive_within(Duration::from_millis(50)) {
                if let Received::Binary(payload) = heard {
                    seen[number].saw(&payload);
                }
            }
            let has_it = seen[number].streams.iter().filter(|(_, stream)| stream.last == 4);
            routed[number] = has_it.map(|(room, _)| room.clone()).collect();
        }
        (routed[0].union(&routed[1]).count() == ROOMS).then_some(())
    });
    assert!(!routed[0].is_empty(), "the other node has its share: {routed:?}");

    // The presence service has written, but not answered yet: the other node may find the session, or
    // still have a cached answer that alice has none.
    nodes.registry.register(&alice, "phone", &nodes.instance(1));
    nodes.say_in_every_room(5);
    let in_flight = nodes.back_end.neighbours.state().in_flight[&Method::Register];
    assert_eq!(in_flight, 1, "the node still waits for the answer to its registration");
    assert_eq!(second.metrics().sum("delivery_resume_completed_total", &[]), 1.0);
    nodes.back_end.neighbours.set(Method::Register, Behaviour::Normal);
    receive_up_to(&mut session, &mut tally, 5);

    // From here on the session needs no message service.
    caught_up(&second, 2.0);
    let calls = nodes.back_end.neighbours.state().count(Method::Sync);
    for number in 0..ROOMS {
        nodes.back_end.publisher.message(&room(number), 6, "sender", "live");
    }
    receive_up_to(&mut session, &mut tally, 6);
    let known = nodes.back_end.neighbours.state();
    assert_eq!(known.count(Method::Sync), calls);
    let registered =
        Call::Register { user: alice.clone(), device: "phone".into(), instance: nodes.instance(1) };
    assert!(known.calls.contains(&registered));
    drop(known);
    assert_eq!(second.metrics().sum("delivery_resume_unreached_total", &[]), 0.0);
}
