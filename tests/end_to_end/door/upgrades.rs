//! Sends every request of the table through a real socket. An honest client is served after each.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::serves_the_next_client;
use crate::support::node::NodeBuilder;
use crate::support::wait::SOON;
use crate::upgrade_cases::cases;

/// Sends the bytes and reads the head of the answer; the whole answer if it is a refusal.
fn answer(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("the server accepts");
    stream.set_read_timeout(Some(SOON)).expect("a socket");
    // The server may close before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => {
                answer.extend_from_slice(format!("\r\n({error})").as_bytes());
                break;
            }
        }
        if answer.starts_with(b"HTTP/1.1 101 ") && answer.windows(4).any(|end| end == b"\r\n\r\n") {
            break;
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn unusual_and_hostile_requests_are_answered_and_the_next_client_is_served() {
    let node = NodeBuilder::dev().set("ORIGINS", "*").start();
    let mut findings = Vec::new();
    let mut cases = cases();
    assert!(cases.len() >= 150);
    for case in &mut cases {
        if case.name == "token instead of a user" {
            // Valid, but this node reads no tokens, so the request names no user.
            (case.status, case.contains) = (400, "missing user_id or device_id");
        }
        let answer = answer(node.public, &case.request);
        let status = answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
        if status != Some(case.status) || !answer.contains(case.contains) {
            findings.push(format!(
                "{}: not {} {:?} but {answer:?}",
                case.name, case.status, case.contains
            ));
        }
        serves_the_next_client(node.public);
    }
    assert!(findings.is_empty(), "{} of {}:\n{}", findings.len(), cases.len(), findings.join("\n"));
    let metrics = node.metrics();
    let refused = metrics.sum("delivery_shard_requests_refused_total", &[]);
    let expected = cases.iter().filter(|case| !matches!(case.status, 101 | 404 | 405)).count();
    assert!(refused >= expected as f64, "{refused} refused are counted, of {expected}");
}

/// `dev` checks no tokens, and a browser reaches it: no page of another site may act as its developer.
#[test]
fn dev_accepts_pages_of_this_machine_only() {
    use crate::support::client::{Client, Received};
    use crate::support::fleet::Connect;

    let node = NodeBuilder::dev().start();
    let from = |origin: &str| {
        let connect = Connect::session(node.public, "alice", "d");
        let headers =
            if origin.is_empty() { String::new() } else { format!("Origin: {origin}\r\n") };
        Client::connect(&Connect { headers, ..connect }).receive()
    };
    for origin in
        ["", "http://localhost:5173", "http://127.0.0.1:8093", "http://[::1]", "https://localhost"]
    {
        assert!(matches!(from(origin), Received::Open(_)), "{origin}");
    }
    for origin in [
        "https://example.com",
        "null",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
    ] {
        let heard = from(origin);
        let Received::Refused(403, said) = heard else { panic!("{origin}: {heard:?}") };
        assert!(said.contains("setting `origins`"), "{said}");
    }
}

#[test]
fn bytes_that_follow_the_request_at_once_are_not_lost() {
    use crate::support::client::{Client, Received};
    use crate::support::fleet::{Connect, Fleet, dial, masked_frame};

    let node = NodeBuilder::dev().start();
    let connect = Connect::session(node.public, "eager", "phone");
    let mut bytes = connect.request().into_bytes();
    bytes.extend(masked_frame(true, 9, b"in the same segment"));
    let mut stream = dial(&connect).expect("the server accepts");
    stream.write_all(&bytes).expect("a fresh socket takes it");
    let mut fleet = Fleet::new();
    fleet.adopt(stream, None, true).expect("a socket");
    let mut ponged = false;
    crate::support::wait::until(SOON, "the ping is answered", || {
        fleet.turn(Duration::from_millis(50), &mut |_, seen| {
            ponged |= seen == Received::Pong(b"in the same segment".into());
        });
        ponged.then_some(())
    });

    // The same, one byte at a time.
    let mut stream = dial(&connect).expect("the server accepts");
    for byte in bytes {
        stream.write_all(&[byte]).expect("a fresh socket takes it");
    }
    let mut client = Client::adopt(stream);
    assert!(matches!(client.receive(), Received::Open(_)));
    assert_eq!(client.receive(), Received::Pong(b"in the same segment".to_vec()));
}
