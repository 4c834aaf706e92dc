//! Contract §7: nobody connects as somebody else.

use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use delivery_testkit::token::sign_hs256;
use serde_json::json;

use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::node::{Node, NodeBuilder};

const SECRET: &str = "a key for tests of at least thirty-two bytes";

fn now() -> u64 {
    UNIX_EPOCH.elapsed().expect("after 1970").as_secs()
}

fn node() -> NodeBuilder {
    NodeBuilder::dev()
        .set("AUTH_MODE", "jwt")
        .set("JWT_SECRET", SECRET)
        .set("JWT_ISSUER", "realchat-auth")
        .set("JWT_AUDIENCE", "realchat")
        .set("JWT_LEEWAY", "0s")
}

fn claims(user: &str, lives_for: Duration) -> serde_json::Value {
    json!({
        "sub": user, "iss": "realchat-auth", "aud": "realchat",
        "iat": now(), "exp": now() + lives_for.as_secs(),
    })
}

fn token(user: &str) -> String {
    sign_hs256(&claims(user, Duration::from_secs(600)), SECRET)
}

/// Connects as alice's phone with these additional header lines and query parameters.
fn with(node: &Node, headers: &str, query: &str) -> Received {
    let connect = Connect::session(node.public, "alice", "phone");
    let target = format!("{}{query}", connect.target);
    Client::connect(&Connect { headers: headers.into(), target, ..connect }).receive()
}

fn bearer(node: &Node, token: &str) -> Received {
    with(node, &format!("Authorization: Bearer {token}\r\n"), "")
}

/// A session of alice whose token expires in 3 s.
fn short_session(node: &Node, device: &str) -> Client {
    let token = sign_hs256(&claims("alice", Duration::from_secs(3)), SECRET);
    let headers = format!("Authorization: Bearer {token}\r\n");
    Client::opened(&Connect { headers, ..Connect::session(node.public, "alice", device) })
}

#[track_caller]
fn refused(heard: Received, expected: u16) -> String {
    match heard {
        Received::Refused(status, answer) if status == expected => answer,
        other => panic!("not refused with {expected}: {other:?}"),
    }
}

#[test]
fn token_is_taken_from_header_query_and_subprotocol() {
    let node = node().start();
    let token = token("alice");
    assert!(matches!(bearer(&node, &token), Received::Open(_)));
    assert!(matches!(with(&node, "", &format!("&access_token={token}")), Received::Open(_)));
    let offered = format!("Sec-WebSocket-Protocol: realchat.v1, bearer.{token}\r\n");
    let Received::Open(head) = with(&node, &offered, "") else { panic!("refused") };
    assert!(head.contains("Sec-WebSocket-Protocol: realchat.v1\r\n"), "{head}");
    assert!(!head.contains(&token), "the token is not sent back");
    let log = node.log();
    assert!(!log.contains(&token) && !log.contains(SECRET), "logged");
}

#[test]
fn user_id_may_be_left_out() {
    let node = node().start();
    let connect = Connect::session(node.public, "", "phone");
    let target = "/ws?device_id=phone".into();
    let headers = format!("Authorization: Bearer {}\r\n", token("alice"));
    let heard = Client::connect(&Connect { target, headers, ..connect }).receive();
    assert!(matches!(heard, Received::Open(_)), "{heard:?}");
}

#[test]
fn nobody_connects_as_somebody_else() {
    let node = node().start();
    let answer = refused(bearer(&node, &token("mallory")), 403);
    assert!(answer.contains("subject"), "{answer}");
    assert!(!answer.contains("mallory"), "{answer}");
}

#[test]
fn token_that_does_not_hold_is_refused() {
    let node = node().start();
    let with_claim = |name: &str, value: serde_json::Value| {
        let mut claims = claims("alice", Duration::from_secs(600));
        claims[name] = value;
        sign_hs256(&claims, SECRET)
    };
    let unsigned = {
        let part = |text: &str| BASE64URL.encode(text);
        let claims = claims("alice", Duration::from_secs(600)).to_string();
        format!("{}.{}.", part(r#"{"alg":"none","typ":"JWT"}"#), part(&claims))
    };
    let cases = [
        ("another key", sign_hs256(&claims("alice", Duration::from_secs(600)), "some other key")),
        ("expired", with_claim("exp", json!(now() - 10))),
        ("not yet valid", with_claim("nbf", json!(now() + 600))),
        ("another issuer", with_claim("iss", json!("elsewhere"))),
        ("another audience", with_claim("aud", json!("elsewhere"))),
        ("no expiry", with_claim("exp", json!(null))),
        ("unsigned", unsigned),
        ("no token", "abc".into()),
    ];
    for (what, token) in cases {
        let Received::Refused(401, answer) = bearer(&node, &token) else { panic!("{what}: taken") };
        assert!(!answer.contains(&token), "{what}: shown");
    }
    let answer = refused(with(&node, "", ""), 401);
    assert!(answer.contains("access token required"), "{answer}");
}

#[test]
fn session_ends_when_its_token_expires() {
    let node = node().start();
    let mut client = short_session(&node, "phone");
    assert_eq!(client.receive_end(), Received::Closed(4401, "token expired".into()));
}

#[test]
fn fresh_token_keeps_the_session() {
    let node = node().start();
    let mut client = short_session(&node, "phone");
    let somebody_else = json!({ "access_token": token("mallory") }).to_string();
    assert!(client.send_text(&somebody_else));
    let Received::Text(answer) = client.receive() else { panic!("no answer") };
    assert!(answer.contains("error"), "{answer}");
    assert!(client.send_text(&json!({ "access_token": token("alice") }).to_string()));
    let Received::Text(answer) = client.receive() else { panic!("no answer") };
    assert!(answer.contains("token_expires_at"), "{answer}");
    // The first token expires; a second session with an equally short token shows when.
    let mut second = short_session(&node, "desk");
    assert!(matches!(second.receive_end(), Received::Closed(4401, _)));
    assert!(client.send(9, b"still here"));
    assert_eq!(client.receive(), Received::Pong(b"still here".to_vec()));
}

#[test]
fn node_refuses_to_start_without_a_key() {
    let mut node =
        NodeBuilder::serve().set("AUTH_MODE", "jwt").set("KAFKA_BROKERS", "127.0.0.1:9").spawn();
    let status = crate::support::wait::until(Duration::from_secs(20), "it ends", || node.ended());
    assert!(!status.success());
    assert!(node.log().to_lowercase().contains("jwt_secret"), "{}", node.log());
}

#[test]
fn trust_is_a_choice_with_a_warning() {
    let node = NodeBuilder::dev().set("AUTH_MODE", "trust").start();
    assert!(node.log().contains("trust"), "{}", node.log());
}
