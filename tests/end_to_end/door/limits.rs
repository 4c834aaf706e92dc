//! Every limit of the public port through a real socket: a violation is answered as documented and
//! counted, and the next client is served.

use std::io::Write as _;
use std::time::Duration;

use delivery_testkit::publisher::{Publisher, new_topic};

use super::serves_the_next_client;
use crate::support::client::{Client, Received};
use crate::support::fleet::{Connect, Fleet, dial, masked_frame};
use crate::support::node::{Node, NodeBuilder};
use crate::support::services::kafka_brokers;
use crate::support::wait::{SOON, until};

/// Connects, expects an HTTP answer other than 101, and returns the whole answer.
#[track_caller]
fn refused(node: &Node, user: &str, device: &str) -> (u16, String) {
    match Client::connect(&Connect::session(node.public, user, device)).receive() {
        Received::Refused(status, answer) => (status, answer),
        other => panic!("not refused: {other:?}"),
    }
}

/// Asserts the status of a refusal that says when to try again.
#[track_caller]
fn is_temporary((status, answer): (u16, String), expected: u16) {
    assert_eq!(status, expected, "{answer}");
    let value = answer.lines().find_map(|line| line.strip_prefix("Retry-After: "));
    let seconds: u32 = value.expect("has Retry-After").trim().parse().expect("seconds");
    assert!(seconds >= 1);
}

#[track_caller]
fn connects_again(node: &Node, what: &str) {
    until(SOON, what, || {
        let mut next = Client::connect(&Connect::session(node.public, "d", "1"));
        matches!(next.receive(), Received::Open(_)).then_some(())
    });
}

/// Waits until the sum of this counter over the shards is at least `least`.
#[track_caller]
fn counted(node: &Node, counter: &str, labels: &[&str], least: f64) {
    until(SOON, counter, || (node.metrics().sum(counter, labels) >= least).then_some(()));
}

#[track_caller]
fn ended(node: &Node, reason: &str) {
    let label = format!("reason=\"{reason}\"");
    counted(node, "delivery_shard_ended_total", &[&label], 1.0);
}

/// The third connection is refused until one of the first two has ended.
fn two_connections(setting: &str, status: u16, counter: &str) {
    let node = NodeBuilder::dev().set(setting, 2).start();
    let mut first = Client::session(node.public, "a", "1");
    let _second = Client::session(node.public, "b", "1");
    is_temporary(refused(&node, "c", "1"), status);
    counted(&node, counter, &[], 1.0);
    first.close(1000);
    first.receive_end();
    connects_again(&node, "the slot is free again");
}

#[test]
fn connections_in_all() {
    two_connections("CONNECTIONS_MAX", 503, "delivery_shard_refused_full_total");
}

#[test]
fn connections_of_one_user() {
    let node = NodeBuilder::dev().set("CONNECTIONS_PER_USER", 2).start();
    let mut first = Client::session(node.public, "a", "1");
    let _second = Client::session(node.public, "a", "2");
    is_temporary(refused(&node, "a", "3"), 429);
    counted(&node, "delivery_session_refused_user_limit_total", &[], 1.0);
    // The same device again replaces its session and is not counted as another one.
    let _again = Client::session(node.public, "a", "1");
    assert_eq!(first.receive_end(), Received::Closed(4000, "session_replaced".into()));
    serves_the_next_client(node.public);
}

#[test]
fn connections_from_one_address() {
    let counter = "delivery_shard_refused_address_count_total";
    two_connections("CONNECTIONS_PER_ADDRESS", 429, counter);
}

/// Connects until one attempt is refused, and then until one is accepted again.
fn handshake_rate(setting: &str, status: u16, counter: &str) {
    let node = NodeBuilder::dev().set(setting, 2).start();
    let answer = (0..100)
        .find_map(|number| {
            let connect = Connect::session(node.public, "a", &number.to_string());
            match Client::connect(&connect).receive() {
                Received::Refused(status, answer) => Some((status, answer)),
                _ => None,
            }
        })
        .expect("one is refused");
    is_temporary(answer, status);
    counted(&node, counter, &[], 1.0);
    connects_again(&node, "the rate allows another");
}

#[test]
fn handshakes_each_second_in_all() {
    handshake_rate("HANDSHAKES_PER_SECOND", 503, "delivery_shard_refused_total_rate_total");
}

#[test]
fn handshakes_each_second_from_one_address() {
    let counter = "delivery_shard_refused_address_rate_total";
    handshake_rate("HANDSHAKES_PER_SECOND_PER_ADDRESS", 429, counter);
}

#[test]
fn messages_each_second() {
    let node = NodeBuilder::dev().set("INBOUND_MESSAGES_PER_SECOND", 5).start();
    let mut client = Client::session(node.public, "chatty", "phone");
    for _ in 0..200 {
        if !client.send_text("hello") {
            break;
        }
    }
    assert!(matches!(client.receive_end(), Received::Closed(1008, reason) if !reason.is_empty()));
    counted(&node, "delivery_shard_inbound_rate_exceeded_total", &[], 1.0);
    ended(&node, "peer_at_fault");
    serves_the_next_client(node.public);
}

/// A byte now and then keeps a connection from being idle, but not its message from being overdue.
#[test]
fn time_of_a_message() {
    let node = NodeBuilder::dev().set("MESSAGE_TIMEOUT", "1s").start();
    let mut slow = Client::session(node.public, "slow", "phone");
    // The header of a text of 65,000 bytes.
    slow.stream().write_all(&[0x81, 0xfe, 0xfd, 0xe8, 0, 0, 0, 0]).unwrap();
    let closed = until(SOON, "the slow client is closed", || {
        // Once it is closed, this may fail.
        let _ = slow.stream().write_all(b"x");
        slow.receive_within(Duration::from_millis(50))
    });
    assert!(matches!(closed, Received::Closed(1008, reason) if !reason.is_empty()));
    counted(&node, "delivery_shard_message_timeouts_total", &[], 1.0);
    ended(&node, "peer_at_fault");
    serves_the_next_client(node.public);
}

#[test]
fn bytes_each_second() {
    let node = NodeBuilder::dev()
        .set("INBOUND_BYTES_PER_SECOND", "4KiB")
        .set("INBOUND_MESSAGES_PER_SECOND", 65_535)
        .start();
    let mut client = Client::session(node.public, "wordy", "phone");
    for _ in 0..200 {
        if !client.send(2, &[0; 1000]) {
            break;
        }
    }
    assert!(matches!(client.receive_end(), Received::Closed(1008, reason) if !reason.is_empty()));
    counted(&node, "delivery_shard_inbound_rate_exceeded_total", &[], 1.0);
    serves_the_next_client(node.public);
}

#[test]
fn size_of_a_message() {
    let node = NodeBuilder::dev().set("MESSAGE_BYTES_MAX", "1KiB").start();
    let mut whole = Client::session(node.public, "a", "phone");
    whole.send(2, &[0; 1025]);
    assert!(matches!(whole.receive_end(), Received::Closed(1009, _)));

    let mut in_parts = Client::session(node.public, "b", "phone");
    let parts = [masked_frame(false, 2, &[0; 600]), masked_frame(false, 0, &[0; 600])].concat();
    in_parts.stream().write_all(&parts).expect("a fresh socket takes it");
    assert!(matches!(in_parts.receive_end(), Received::Closed(1009, _)));

    // The announced length alone is refused; nothing is allocated for it.
    let mut announced = Client::session(node.public, "c", "phone");
    announced
        .stream()
        .write_all(&[0x82, 0xff, 0, 0, 0x10, 0, 0, 0, 0, 0, 1, 2, 3, 4])
        .expect("a fresh socket takes it");
    assert!(matches!(announced.receive_end(), Received::Closed(1009, _)));

    let mut allowed = Client::session(node.public, "d", "phone");
    assert!(allowed.send(2, &[0; 1024]));
    allowed.send(9, b"");
    assert_eq!(allowed.receive(), Received::Pong(Vec::new()));
    serves_the_next_client(node.public);
}

#[test]
fn time_for_the_handshake() {
    let node = NodeBuilder::dev().set("HANDSHAKE_TIMEOUT", "500ms").start();
    let connect = Connect::session(node.public, "late", "phone");
    let mut stream = dial(&connect).expect("the server accepts");
    stream.write_all(&connect.request().as_bytes()[..40]).expect("a fresh socket takes it");
    let mut client = Client::adopt(stream);
    assert!(matches!(client.receive(), Received::Refused(408, _)));
    counted(&node, "delivery_shard_handshake_timeouts_total", &[], 1.0);
    ended(&node, "handshake_timeout");

    // A client that sends nothing at all is terminated too.
    let mut silent = Client::adopt(dial(&connect).expect("the server accepts"));
    assert!(matches!(silent.receive(), Received::Refused(408, _) | Received::Ended));
    serves_the_next_client(node.public);
}

#[test]
fn silence_after_the_handshake() {
    let node = NodeBuilder::dev().set("PING_INTERVAL", "1s").set("IDLE_TIMEOUT", "3s").start();
    let mut fleet = Fleet::new();
    let alive = Connect::session(node.public, "alive", "phone");
    let dead = Connect::session(node.public, "dead", "phone");
    let alive = fleet.connect(&alive).expect("the server accepts");
    let dead = Connect { answers_pings: false, ..dead };
    let dead = fleet.connect(&dead).expect("the server accepts");
    let mut pings = [0, 0];
    let mut dead_at = None;
    // Until the client that answers is pinged again after the other one has ended.
    until(SOON, "the silent one is dropped, the other is not", || {
        fleet.turn(Duration::from_millis(50), &mut |client, seen| match seen {
            Received::Open(_) => {}
            Received::Ping => pings[client] += 1,
            Received::Ended | Received::Closed(..) if client == dead => {
                dead_at = Some(pings[alive])
            }
            other => panic!("client {client}: {other:?}"),
        });
        dead_at.is_some_and(|at| pings[alive] > at + 1).then_some(())
    });
    assert!(pings[dead] >= 1, "it was asked before it was dropped");
    ended(&node, "peer_silent");
    serves_the_next_client(node.public);
}

#[test]
fn time_for_the_answer_to_a_close_frame() {
    let node =
        NodeBuilder::dev().set("CLOSE_TIMEOUT", "300ms").set("MESSAGE_BYTES_MAX", "1KiB").start();
    let client = Client::session(node.public, "rude", "phone");
    let mut stream = client.stream().try_clone().expect("a second handle");
    // Too large: the server closes with 1009, and this client never answers.
    stream.write_all(&masked_frame(true, 2, &[0; 2000])).expect("a fresh socket takes it");
    ended(&node, "peer_at_fault");
    let active = || node.metrics().sum("websocket_connections_active", &[]);
    until(SOON, "the connection has ended", || (active() == 0.0).then_some(()));
    serves_the_next_client(node.public);
}

#[test]
fn origins() {
    let node =
        NodeBuilder::dev().set("ORIGINS", "https://chat.example.com,https://*.example.org").start();
    let from = |origin: &str| {
        let connect = Connect::session(node.public, "a", "browser");
        let headers =
            if origin.is_empty() { String::new() } else { format!("Origin: {origin}\r\n") };
        Client::connect(&Connect { headers, ..connect }).receive()
    };
    for allowed in ["https://chat.example.com", "https://www.example.org"] {
        assert!(matches!(from(allowed), Received::Open(_)), "{allowed}");
    }
    for refused in ["https://evil.example", "http://chat.example.com", "null"] {
        assert!(matches!(from(refused), Received::Refused(403, _)), "{refused}");
    }
    serves_the_next_client(node.public);
}

#[test]
fn echo_is_off_unless_switched_on() {
    let node = NodeBuilder::dev().set("ECHO", false).start();
    let connect = Connect { target: "/echo".into(), ..Connect::session(node.public, "", "") };
    assert!(matches!(Client::connect(&connect).receive(), Received::Refused(404, _)));
    let node = NodeBuilder::dev().start();
    let connect = Connect { address: node.public, first_message: None, ..connect };
    let mut client = Client::opened(&connect);
    client.send_text("hello");
    assert_eq!(client.receive(), Received::Text("hello".into()));
    client.send(2, &[7; 300]);
    assert_eq!(client.receive(), Received::Binary(vec![7; 300]));
}

/// A node with a real Kafka, and one conversation of `stalled` and `honest`.
fn node_with_a_room(node: NodeBuilder) -> (Node, Publisher) {
    let brokers = kafka_brokers();
    let topic = new_topic(&brokers, "limits", 1);
    let node = node.kafka(&brokers, &topic).start();
    let mut publisher = Publisher::new(&brokers, &topic);
    publisher.created("room", &["stalled".into(), "honest".into()]);
    (node, publisher)
}

/// Publishes until the stalled client's session has ended.
fn stalls(node: &Node, publisher: &mut Publisher, content: &str, reason: &str) {
    let mut honest = Client::session(node.public, "honest", "phone");
    assert!(matches!(honest.receive(), Received::Binary(_)), "the creation");
    let connect = Connect::session(node.public, "stalled", "phone");
    // Opened, and then not read.
    let mut stalled = Client::opened(&Connect { receive_buffer: Some(2304), ..connect });
    let label = format!("reason=\"{reason}\"");
    let has_ended = || node.metrics().sum("delivery_shard_ended_total", &[&label]) >= 1.0;
    let mut sequence = 0;
    until(Duration::from_secs(60), reason, || {
        for _ in 0..16 {
            sequence += 1;
            publisher.message("room", sequence, "honest", content);
            assert!(
                matches!(honest.receive(), Received::Binary(_)),
                "the honest one notices nothing"
            );
        }
        has_ended().then_some(())
    });
    assert!(matches!(stalled.receive_end(), Received::Closed(1011, _) | Received::Ended));
    serves_the_next_client(node.public);
}

/// Promise: “Nothing is dropped silently.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn messages_waiting_for_a_slow_reader() {
    let (node, mut publisher) = node_with_a_room(NodeBuilder::serve().set("SO_SNDBUF", "4608"));
    stalls(&node, &mut publisher, &"x".repeat(500), "queue_overflow");
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn bytes_waiting_for_a_slow_reader() {
    let (node, mut publisher) = node_with_a_room(
        NodeBuilder::serve()
            .set("SO_SNDBUF", "4608")
            .set("QUEUE_MESSAGES_MAX", 32_766)
            .set("QUEUE_BYTES_MAX", "16KiB"),
    );
    stalls(&node, &mut publisher, &"x".repeat(1000), "queue_overflow");
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn time_without_progress_of_a_send() {
    let (node, mut publisher) = node_with_a_room(
        NodeBuilder::serve()
            .set("SO_SNDBUF", "4608")
            .set("WRITE_TIMEOUT", "1s")
            .set("QUEUE_MESSAGES_MAX", 32_766)
            .set("QUEUE_BYTES_MAX", "1GiB"),
    );
    stalls(&node, &mut publisher, &"x".repeat(500), "write_timeout");
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn client_without_a_first_message_goes_live_after_the_grace() {
    let (node, mut publisher) = node_with_a_room(NodeBuilder::serve().set("RESUME_GRACE", "1s"));
    let connect = Connect::session(node.public, "honest", "phone");
    let mut client = Client::opened(&Connect { first_message: None, ..connect });
    publisher.message("room", 1, "stalled", "held, then released");
    publisher.flush(SOON);
    let mut messages = 0;
    while messages < 1 {
        let Received::Binary(payload) = client.receive() else { panic!("not an event") };
        messages += u64::from(crate::support::tally::Tally::default().saw(&payload).is_some());
    }
    // Late events are reported, not silently dropped.
    client.send_text(r#"{"last_sequences":{}}"#);
    assert!(matches!(client.receive_end(), Received::Closed(4408, _)));
}
