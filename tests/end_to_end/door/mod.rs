//! The ports: which requests and clients are accepted, and which are refused. Only the tests that
//! fill a queue need more than the binary (`delivery dev`).

mod admin;
mod limits;
mod slow;
mod streams;
mod upgrades;

use std::net::SocketAddr;

use crate::support::client::{Client, Received};

/// Asserts that the server still serves: a client connects, gets a pong, and closes cleanly.
#[track_caller]
fn serves_the_next_client(address: SocketAddr) {
    let mut client = Client::session(address, "next", "client");
    assert!(client.send(9, b"still there?"));
    assert_eq!(client.receive(), Received::Pong(b"still there?".to_vec()));
    client.close(1000);
    assert_eq!(client.receive_end(), Received::Closed(1000, String::new()));
}
