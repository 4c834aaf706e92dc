//! Contract §7: nobody connects as somebody else.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use delivery_testkit::publisher::new_topic;
use delivery_testkit::token::sign_hs256;
use rustix::process::Signal;
use serde_json::json;

use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::node::{Node, NodeBuilder};
use crate::support::services::kafka_brokers;
use crate::support::wait::{SOON, until};

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

const NEXT_SECRET: &str = "the next key for tests of at least thirty-two bytes";

/// Replaces a file as Kubernetes and editors do: nobody reads half of it.
fn replace(path: &Path, content: &str) {
    let next = path.with_extension("next");
    std::fs::write(&next, content).unwrap();
    std::fs::rename(next, path).unwrap();
}

/// Whether a token that is signed with this secret is accepted. The session is a new one.
fn accepts(node: &Node, secret: &str) -> bool {
    let token = sign_hs256(&claims("bob", Duration::from_secs(600)), secret);
    match with_user(node, "bob", &token) {
        Received::Open(_) => true,
        Received::Refused(401, _) => false,
        other => panic!("{other:?}"),
    }
}

fn with_user(node: &Node, user: &str, token: &str) -> Received {
    let headers = format!("Authorization: Bearer {token}\r\n");
    Client::connect(&Connect { headers, ..Connect::session(node.public, user, "d") }).receive()
}

fn assert_alive(client: &mut Client) {
    assert!(client.send(9, b"alive"));
    assert_eq!(client.receive(), Received::Pong(b"alive".to_vec()));
}

#[test]
fn secrets_of_a_file_are_replaced_with_an_overlap_and_sessions_stay() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secrets");
    std::fs::write(&file, SECRET).unwrap();
    let node =
        NodeBuilder::dev().set("AUTH_MODE", "jwt").set("JWT_SECRET_FILE", file.display()).start();
    let headers = format!("Authorization: Bearer {}\r\n", token("alice"));
    let mut session =
        Client::opened(&Connect { headers, ..Connect::session(node.public, "alice", "d") });
    assert!(accepts(&node, SECRET) && !accepts(&node, NEXT_SECRET));
    let wait_for = |what, done: &dyn Fn() -> bool| until(SOON, what, || done().then_some(()));

    replace(&file, &format!("{NEXT_SECRET}\n{SECRET}\n"));
    wait_for("the next secret counts", &|| accepts(&node, NEXT_SECRET));
    assert!(accepts(&node, SECRET), "the old one still counts");
    replace(&file, "too short");
    wait_for("the file is refused", &|| {
        node.log().contains("has a secret in line 1 that is shorter")
    });
    assert!(!node.log().contains("too short"), "a log names no secret");
    assert!(accepts(&node, SECRET) && accepts(&node, NEXT_SECRET));
    replace(&file, NEXT_SECRET);
    wait_for("the old secret counts no more", &|| !accepts(&node, SECRET));
    assert!(accepts(&node, NEXT_SECRET));
    assert_alive(&mut session);
    let metrics = node.metrics();
    assert_eq!(metrics.sum("delivery_auth_key_reloads_total", &[]), 2.0);
    assert_eq!(metrics.sum("delivery_auth_key_reload_failures_total", &[]), 1.0);
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn hang_up_reads_the_keys_again_and_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secrets");
    std::fs::write(&file, SECRET).unwrap();
    let brokers = kafka_brokers();
    let mut node = NodeBuilder::serve()
        .kafka(&brokers, &new_topic(&brokers, "hang-up", 1))
        .set("AUTH_MODE", "jwt")
        .set("JWT_SECRET_FILE", file.display())
        .start();
    let headers = format!("Authorization: Bearer {}\r\n", token("alice"));
    let mut session =
        Client::opened(&Connect { headers, ..Connect::session(node.public, "alice", "d") });
    replace(&file, NEXT_SECRET);
    node.signal(Signal::HUP);
    until(SOON, "the next secret counts", || accepts(&node, NEXT_SECRET).then_some(()));
    assert!(!accepts(&node, SECRET));
    assert!(node.log().contains("SIGHUP"), "{}", node.log());
    assert_alive(&mut session);
    assert!(node.stop(SOON).success());
}

#[test]
fn hang_up_stops_dev_in_order() {
    let mut node = NodeBuilder::dev().start();
    let mut session = Client::opened(&Connect::session(node.public, "alice", "d"));
    node.signal(Signal::HUP);
    assert!(matches!(session.receive_end(), Received::Closed(1001, _)));
    assert_eq!(until(SOON, "the node exits", || node.ended()).code(), Some(0));
}

/// As `nohup` starts it. And without tokens nothing is said of keys.
#[test]
fn hang_up_does_not_stop_dev_that_ignores_it() {
    let node = NodeBuilder::dev().set("JWT_SECRET", "short").under("trap '' HUP").start();
    let mut session = Client::opened(&Connect::session(node.public, "alice", "d"));
    node.signal(Signal::HUP);
    until(SOON, "it has noticed", || node.log().contains("SIGHUP").then_some(()));
    assert_alive(&mut session);
    assert!(!node.log().contains("the keys of tokens"), "{}", node.log());
}

/// Nothing else than the environment that RealChat documents for development (contract §5).
#[test]
fn published_development_secret_starts_with_a_warning() {
    let secret = "dev-secret-change-me-in-prod";
    let node = NodeBuilder::dev().set("AUTH_MODE", "jwt").set("JWT_SECRET", secret).start();
    assert!(accepts(&node, secret));
    let log = node.log();
    assert!(log.contains("WARN") && log.contains("RealChat's documents"), "{log}");
    assert!(!log.contains(secret), "{log}");
    assert_eq!(node.metrics().sum("delivery_auth_development_secret", &[]), 1.0);
}

#[test]
fn node_is_not_ready_and_answers_503_until_keys_were_fetched() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    // No key that can be used.
    let document = Arc::new(Mutex::new(r#"{"keys":[]}"#.to_owned()));
    let served = Arc::clone(&document);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 4096]);
            let body = served.lock().unwrap().clone();
            let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length";
            let _ = write!(stream, "{head}: {}\r\n\r\n{body}", body.len());
        }
    });
    let mut node = NodeBuilder::dev().set("AUTH_MODE", "jwt").set("JWKS_URL", url).spawn();
    let not_ready = || node.get("/health/ready").filter(|it| it.body.contains("JWKS_URL"));
    assert_eq!(until(SOON, "the admin port answers", not_ready).status, 503);
    let header = BASE64URL.encode(r#"{"alg":"ES256","kid":"a"}"#);
    let claims = BASE64URL.encode(claims("bob", SOON).to_string());
    let token = format!("{header}.{claims}.{}", BASE64URL.encode([1; 64]));
    let said = refused(with_user(&node, "bob", &token), 503);
    assert!(said.contains("keys could not be fetched"), "{said}");
    let key = json!({ "kty": "EC", "kid": "a", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0" });
    *document.lock().unwrap() = json!({ "keys": [key] }).to_string();
    node.wait_ready();
    refused(with_user(&node, "bob", &token), 401);
}

#[test]
fn node_refuses_to_start_without_a_key() {
    let mut node =
        NodeBuilder::serve().set("AUTH_MODE", "jwt").set("KAFKA_BROKERS", "127.0.0.1:9").spawn();
    let status = until(Duration::from_secs(20), "it ends", || node.ended());
    assert!(!status.success());
    assert!(node.log().to_lowercase().contains("jwt_secret"), "{}", node.log());
}

#[test]
fn trust_is_a_choice_with_a_warning() {
    let node = NodeBuilder::dev().set("AUTH_MODE", "trust").start();
    assert!(node.log().contains("trust"), "{}", node.log());
}
