//! The public port: what comes in, and what is kept out. Needs nothing but the binary (`delivery dev`),
//! except where a queue must be filled.

mod limits;
mod slow;
mod upgrades;

use std::net::SocketAddr;

use crate::support::client::{Client, Heard};

/// The server still serves: an honest client connects, is answered a ping, and leaves in good order.
#[track_caller]
fn serves_the_next_client(address: SocketAddr) {
    let mut client = Client::session(address, "next", "client");
    assert!(client.send(9, b"still there?"));
    assert_eq!(client.hear(), Heard::Pong(b"still there?".to_vec()));
    client.close(1000);
    assert_eq!(client.hear_end(), Heard::Closed(1000, String::new()));
}
