//! The first message of a client, and what of it differs from the Go service (`docs/contract.md`).

use delivery_testkit::neighbours::{Call, FakeNeighbours, Method};

use crate::support::back_end::{message, with_neighbours};
use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::node::{Node, NodeBuilder};
use crate::support::wait::{SOON, until};

const TEXT: u8 = 1;
const BINARY: u8 = 2;

fn start() -> (FakeNeighbours, Node) {
    let neighbours = FakeNeighbours::start();
    neighbours.state().create("room", &["alice"], 3);
    let node = with_neighbours(NodeBuilder::dev(), &neighbours).start();
    (neighbours, node)
}

/// A session whose client has said nothing yet.
fn silent(node: &Node, device: &str) -> Client {
    let connect = Connect::session(node.public, "alice", device);
    Client::opened(&Connect { first_message: None, ..connect })
}

/// The sequence after which the room is requested when this is the first message.
fn requested_after(opcode: u8, text: &str) -> i64 {
    let (neighbours, node) = start();
    let mut alice = silent(&node, "phone");
    assert!(alice.send(opcode, text.as_bytes()));
    neighbours.wait(SOON, |known| known.count(Method::Sync) > 0);
    let known = neighbours.state();
    let after = known.calls.iter().find_map(|call| match call {
        Call::Sync { after, .. } => Some(*after),
        _ => None,
    });
    drop(known);
    let after = after.expect("was counted");
    for sequence in after + 1..=3 {
        assert_eq!(message(&mut alice), ("room".into(), sequence));
    }
    after
}

/// Issue “From the log to the members”: “`{}`, `null` and `{"last_sequences":null}` return everything from
/// 0” in the Go service, “and nothing here”. They are what a client sends that omits empty fields.
#[test]
fn first_message_without_positions_returns_everything_from_0() {
    for text in [
        "{}",
        "null",
        r#"{"last_sequences":null}"#,
        r#"{"last_sequences":{}}"#,
        r#"{"access_token":""}"#,
        r#"{"typing":true}"#,
    ] {
        assert_eq!(requested_after(TEXT, text), 0, "{text}");
    }
}

#[test]
fn sequence_is_a_number_a_string_or_null() {
    for (value, after) in [("2", 2), (r#""2""#, 2), ("null", 0), ("-7", 0)] {
        let text = format!(r#"{{"last_sequences":{{"room":{value}}}}}"#);
        assert_eq!(requested_after(TEXT, &text), after, "{value}");
    }
}

#[test]
fn first_message_may_be_binary() {
    assert_eq!(requested_after(BINARY, r#"{"last_sequences":{"room":1}}"#), 1);
}

#[test]
fn key_in_another_case_is_another_key() {
    assert_eq!(requested_after(TEXT, r#"{"Last_Sequences":{"room":2}}"#), 0, "repeated, not lost");
}

/// Contract §3: “A first message that is no such JSON closes the connection (1000).”
#[test]
fn first_message_that_is_no_such_json_closes_the_connection_with_1000() {
    let (neighbours, node) = start();
    let invalid: [(u8, &[u8]); 8] = [
        (TEXT, b""),
        (TEXT, b"hello"),
        (TEXT, b"[]"),
        (TEXT, br#"{"last_sequences":"#),
        (TEXT, br#"{"last_sequences":[]}"#),
        (TEXT, br#"{"last_sequences":{"room":1.5}}"#),
        (TEXT, br#"{"last_sequences":{},"last_sequences":{}}"#),
        (BINARY, b"\xff\xfe"),
    ];
    for (number, (opcode, payload)) in invalid.into_iter().enumerate() {
        let mut alice = silent(&node, &format!("device-{number}"));
        assert!(alice.send(opcode, payload));
        let Received::Closed(1000, reason) = alice.receive_end() else { panic!("not 1000") };
        assert!(reason.starts_with("first message: "), "{reason}");
    }
    assert_eq!(neighbours.state().count(Method::Sync), 0);
}

#[test]
fn more_conversations_than_can_be_named_close_the_connection_with_a_reason() {
    let node = NodeBuilder::dev().start();
    let named: Vec<_> = (0..4097).map(|number| format!(r#""{number}":0"#)).collect();
    let mut alice = silent(&node, "phone");
    assert!(alice.send_text(&format!(r#"{{"last_sequences":{{{}}}}}"#, named.join(","))));
    let Received::Closed(1000, reason) = alice.receive_end() else { panic!("not 1000") };
    assert!(reason.contains("4096"), "{reason}");
}

#[test]
fn first_message_after_the_grace_closes_the_connection_with_4408() {
    for text in ["{}", r#"{"last_sequences":{"room":1}}"#] {
        let node = NodeBuilder::dev().set("RESUME_GRACE", "0s").start();
        let mut alice = silent(&node, "phone");
        until(SOON, "the grace is over", || {
            let over = node.metrics().sum("delivery_shard_grace_expired_total", &[]) == 1.0;
            over.then_some(())
        });
        assert!(alice.send_text(text));
        assert!(matches!(alice.receive_end(), Received::Closed(4408, _)), "{text}");
    }
}
