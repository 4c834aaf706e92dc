//! Issue “A citizen of RealChat”, show 3: ten thousand sessions disconnect at once and reconnect within
//! five seconds.

use std::time::{Duration, Instant};

use delivery_testkit::neighbours::{Behaviour, Method};
use delivery_testkit::publisher::message;

use crate::support::back_end::BackEnd;
use crate::support::fleet::{Connect, Fleet, Received};
use crate::support::node::Node;
use crate::support::tally::{Tally, resume_request};

const SESSIONS: usize = 10_000;
const ROOM: usize = 20;
const BACK_WITHIN: Duration = Duration::from_secs(5);
const SETTLED_WITHIN: Duration = Duration::from_secs(180);
/// Time that a neighbour takes to answer.
const ANSWER_TIME: Duration = Duration::from_millis(5);
/// Default of `RESUME_CALLS_MAX`.
const RESUME_CALLS_MAX: usize = 64;
/// Calls that presence may have in flight.
const PRESENCE_CALLS_MAX: usize = 64;

struct Storm {
    back_end: BackEnd,
    fleet: Fleet,
    /// Session of each client: the first `SESSIONS` clients, then those that reconnected.
    tallies: Vec<Tally>,
    sequence: i64,
}

impl Storm {
    fn user(session: usize) -> String {
        format!("user-{session}")
    }

    fn rooms() -> impl Iterator<Item = String> {
        (0..SESSIONS / ROOM).map(|room| format!("room-{room}"))
    }

    fn connect(&mut self, node: &Node, session: usize) {
        let first_message = Some(resume_request(&self.tallies[session]));
        let connect = Connect::session(node.public, &Self::user(session), "phone");
        self.fleet.connect(&Connect { first_message, ..connect }).expect("the server accepts");
    }

    /// Publishes one message to every room. The message service has it before that.
    fn publish(&mut self) {
        self.sequence += 1;
        for room in Self::rooms() {
            let stored = message(&room, self.sequence, "user-0", "hello");
            self.back_end.neighbours.state().messages.entry(room.clone()).or_default().push(stored);
            self.back_end.publisher.message(&room, self.sequence, "user-0", "hello");
        }
    }

    fn turn(&mut self) {
        let Self { fleet, tallies, .. } = self;
        fleet.turn(Duration::from_millis(10), &mut |client, seen| match seen {
            Received::Binary(payload) => {
                tallies[client % SESSIONS].saw(&payload);
            }
            Received::Open(_) | Received::Ping => {}
            other => panic!("client {client}: {other:?}"),
        });
    }

    fn until_all_have_all(&mut self) {
        let deadline = Instant::now() + SETTLED_WITHIN;
        let sequence = self.sequence as u64;
        while self.tallies.iter().any(|tally| tally.messages < sequence) {
            let behind = || self.tallies.iter().filter(|tally| tally.messages < sequence).count();
            assert!(Instant::now() < deadline, "{} sessions miss something", behind());
            self.turn();
        }
    }
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn ten_thousand_sessions_that_disconnect_at_once_reconnect_without_loss() {
    let back_end = BackEnd::start("storm", 3);
    for room in 0..SESSIONS / ROOM {
        let members = (0..ROOM).map(|member| Storm::user(room * ROOM + member)).collect();
        back_end.neighbours.state().members.insert(format!("room-{room}"), members);
    }
    // Here all clients connect from one address.
    let node = back_end.node().set("HANDSHAKES_PER_SECOND_PER_ADDRESS", "0").start();
    // Answers take some time, as over a network; otherwise no calls would be in flight.
    for method in
        [Method::Register, Method::Unregister, Method::Refresh, Method::List, Method::Sync]
    {
        back_end.neighbours.set(method, Behaviour::Delayed(ANSWER_TIME));
    }
    let tallies = vec![Tally::default(); SESSIONS];
    let mut storm = Storm { back_end, fleet: Fleet::new(), tallies, sequence: 0 };
    for session in 0..SESSIONS {
        storm.connect(&node, session);
        if session % 200 == 0 {
            storm.turn();
        }
    }
    storm.publish();
    storm.until_all_have_all();
    let registered = |known: &delivery_testkit::neighbours::NeighbourState| {
        known.registrations.len() == SESSIONS
    };
    storm.back_end.neighbours.wait(SETTLED_WITHIN, registered);
    {
        let mut known = storm.back_end.neighbours.state();
        known.calls.clear();
        known.in_flight_peak.clear();
    }

    (0..SESSIONS).for_each(|client| storm.fleet.abort(client));
    storm.publish();
    let began = Instant::now();
    for session in 0..SESSIONS {
        storm.connect(&node, session);
        // Spread over the five seconds, with events of their rooms in between.
        while began.elapsed() < BACK_WITHIN.mul_f64(session as f64 / SESSIONS as f64) {
            storm.turn();
        }
        if session % (SESSIONS / 5) == 0 {
            storm.publish();
        }
    }
    let back_after = began.elapsed();
    storm.until_all_have_all();
    let settled_after = began.elapsed();
    storm.back_end.neighbours.wait(SETTLED_WITHIN, registered);

    let known = storm.back_end.neighbours.state();
    println!("{SESSIONS} back after {back_after:.1?}, all caught up after {settled_after:.1?}");
    for method in [
        Method::Register,
        Method::Unregister,
        Method::Refresh,
        Method::List,
        Method::Sync,
        Method::Members,
    ] {
        let peak = known.in_flight_peak.get(&method).copied().unwrap_or(0);
        println!("{method:?}: {} calls, at most {peak} in flight", known.count(method));
        let bound = match method {
            Method::List | Method::Sync => RESUME_CALLS_MAX,
            _ => PRESENCE_CALLS_MAX,
        };
        assert!(peak <= bound, "{method:?}: {peak} in flight");
    }
    // A session that reconnects costs at most one call to unregister and one to register.
    assert!(known.count(Method::Register) + known.count(Method::Unregister) <= 2 * SESSIONS);
    drop(known);
    for tally in &storm.tallies {
        assert_eq!(tally.messages, storm.sequence as u64, "nothing twice");
        for stream in tally.streams.values() {
            assert_eq!((stream.duplicates, stream.out_of_order, stream.missing.len()), (0, 0, 0));
        }
    }
}
