//! `delivery admin` against real nodes: what it lists and closes is compared with what the clients see.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::UNIX_EPOCH;

use delivery_testkit::admin::request;
use delivery_testkit::token::sign_hs256;
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::client::{Client, Received};
use crate::support::fleet::Connect;
use crate::support::node::{Node, NodeBuilder, binary};
use crate::support::stream::{Stream, first, health};
use crate::support::wait::{SOON, until};

const SECRET: &str = "a key for tests of at least thirty-two bytes";
const TOKEN: &str = "a-token-for-tests-of-at-least-32-bytes";

fn node(name: &str) -> NodeBuilder {
    NodeBuilder::dev().set("INSTANCE_ID", name)
}

fn with_tokens(name: &str) -> Node {
    node(name).set("AUTH_MODE", "jwt").set("JWT_SECRET", SECRET).start()
}

fn now() -> u64 {
    UNIX_EPOCH.elapsed().expect("after 1970").as_secs()
}

/// A token that was issued then.
fn token(user: &str, issued: u64) -> String {
    let claims = json!({ "sub": user, "iat": issued, "exp": now() + 600 });
    sign_hs256(&claims, SECRET)
}

/// Runs `delivery admin` for these nodes.
fn admin(nodes: &[&Node], arguments: &[&str]) -> Output {
    let nodes = nodes.iter().flat_map(|node| ["--admin".to_owned(), node.admin.to_string()]);
    let mut command = Command::new(binary());
    command.env_clear().arg("admin").args(arguments).args(nodes);
    command.output().expect("it starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// What it printed, if it has succeeded.
#[track_caller]
fn printed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn json_lines(output: &Output) -> Vec<Value> {
    let lines = printed(output);
    lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// What it complained about, if it has failed.
#[track_caller]
fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    text(&output.stderr)
}

/// The named fields of each row, sorted.
fn fields(rows: &[Value], names: [&str; 4]) -> Vec<[String; 4]> {
    let of = |row: &Value| names.map(|name| row[name].as_str().unwrap_or("?").to_owned());
    let mut all: Vec<_> = rows.iter().map(of).collect();
    all.sort();
    all
}

fn opened(node: &Node, user: &str, device: &str, token: &str) -> Client {
    let headers = format!("Authorization: Bearer {token}\r\n");
    Client::opened(&Connect { headers, ..Connect::session(node.public, user, device) })
}

#[test]
fn sessions_of_both_protocols_are_listed_and_closed() {
    let (one, two) = (node("node-1").start(), node("node-2").start());
    let mut phone = Client::session(one.public, "alice", "phone");
    let mut bob = Client::session(one.public, "bob", "phone");
    let json = Connect {
        headers: "Sec-WebSocket-Protocol: realchat.v1.json\r\n".into(),
        ..Connect::session(two.public, "alice", "tablet")
    };
    let mut tablet = Client::opened(&json);
    let mut desk = Stream::connect(&one, first("alice", "desk")).expect("admitted");
    let seen = || admin(&[&one, &two], &["sessions", "--json"]);
    let all = until(SOON, "all four are admitted and live", || {
        let rows = json_lines(&seen());
        (rows.len() == 4 && rows.iter().all(|row| row["state"] != "catching_up")).then_some(rows)
    });
    let names = ["device", "user", "node", "protocol"];
    let expected = [
        ["desk", "alice", "node-1", "grpc"],
        ["phone", "alice", "node-1", "websocket"],
        ["phone", "bob", "node-1", "websocket"],
        ["tablet", "alice", "node-2", "websocket"],
    ];
    assert_eq!(fields(&all, names), expected);
    for row in &all {
        assert_eq!(row["address"], "127.0.0.1", "{row}");
        assert!(row["since"].as_str().is_some_and(|time| time.ends_with('Z')), "{row}");
        assert_eq!(row["encoding"] == "json", row["device"] == "tablet", "{row}");
    }
    let of_bob = json_lines(&admin(&[&one, &two], &["sessions", "--user", "bob", "--json"]));
    assert_eq!(fields(&of_bob, names), expected[2..3]);
    let table = printed(&admin(&[&one], &["sessions", "--limit", "2"]));
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(lines[0].starts_with("USER ") && lines[0].contains("  NODE"), "{table}");
    // Each column begins at the same place.
    assert_eq!(lines[0].find("NODE"), lines[1].find("node-1"), "{table}");

    let closed = json_lines(&admin(&[&one, &two], &["close", "--user", "alice", "--json"]));
    assert_eq!(
        closed,
        [json!({"closed": 2, "node": "node-1"}), json!({"closed": 1, "node": "node-2"})]
    );
    let reason = "closed by the operator";
    for client in [&mut phone, &mut tablet] {
        assert_eq!(client.receive_end(), Received::Closed(1001, reason.into()));
    }
    let status = desk.receive().expect_err("closed");
    assert_eq!((status.code(), status.message()), (Code::Unavailable, reason));
    // Bob's stays, until it is closed by name.
    assert!(bob.send(9, b"still there?"));
    assert_eq!(bob.receive(), Received::Pong(b"still there?".to_vec()));
    let one_device = ["close", "--user", "bob", "--device"];
    let table = printed(&admin(&[&one], &[&one_device[..], &["none"]].concat()));
    assert_eq!(table, "NODE    CLOSED\nnode-1  0\n");
    printed(&admin(&[&one], &[&one_device[..], &["phone"]].concat()));
    assert_eq!(bob.receive_end(), Received::Closed(1001, reason.into()));
    let log = one.log();
    assert!(log.contains("admin: sessions closed") && log.contains("loopback"), "{log}");
    // The clients may return at once.
    let _phone = Client::session(one.public, "alice", "phone");
}

/// Promise: “A revoked token gives no session.”
#[test]
fn revoked_tokens_end_the_sessions_of_all_nodes_and_admit_nobody() {
    let (one, two) = (with_tokens("node-1"), with_tokens("node-2"));
    let old = token("alice", now() - 100);
    let mut phone = opened(&one, "alice", "phone", &old);
    let mut tablet = opened(&two, "alice", "tablet", &old);
    let mut desk =
        Stream::connect_with(&one, first("alice", "desk"), Some(&old)).expect("admitted");
    let mut bob = opened(&one, "bob", "phone", &token("bob", now() - 100));
    until(SOON, "the stream is admitted", || {
        (one.metrics().sum("delivery_session_sessions", &[]) == 3.0).then_some(())
    });

    // Of both nodes at once; repeated, it finds nothing more.
    for (first, second) in [(2, 1), (0, 0)] {
        let rows = json_lines(&admin(&[&one, &two], &["revoke", "--user", "alice", "--json"]));
        assert_eq!((&rows[0]["closed"], &rows[1]["closed"]), (&json!(first), &json!(second)));
    }
    for client in [&mut phone, &mut tablet] {
        assert_eq!(client.receive_end(), Received::Closed(4401, "token revoked".into()));
    }
    let status = desk.receive().expect_err("closed");
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "token revoked"));
    for node in [&one, &two] {
        let headers = format!("Authorization: Bearer {old}\r\n");
        let connect = Connect { headers, ..Connect::session(node.public, "alice", "other") };
        let Received::Refused(401, answer) = Client::connect(&connect).receive() else {
            panic!("admitted");
        };
        assert!(answer.contains("revoked"), "{answer}");
        let refused = match Stream::connect_with(node, first("alice", "other"), Some(&old)) {
            Ok(mut stream) => stream.receive().expect_err("not admitted"),
            Err(status) => status,
        };
        assert_eq!(refused.code(), Code::Unauthenticated);
        opened(node, "alice", "phone", &token("alice", now()));
    }
    assert!(bob.send(9, b"still there?"));
    assert_eq!(bob.receive(), Received::Pong(b"still there?".to_vec()));

    let before = (now() - 50).to_string();
    let paced = ["revoke", "--everybody", "--per-second", "10", "--before", &before];
    printed(&admin(&[&one], &paced));
    assert_eq!(bob.receive_end(), Received::Closed(4401, "token revoked".into()));
    let metrics = one.metrics();
    assert_eq!(metrics.sum("delivery_session_tokens_revoked_total", &[]), 3.0);
    assert_eq!(metrics.sum("delivery_session_refused_revoked_total", &[]), 2.0);
}

#[test]
fn file_of_revocations_outlasts_a_restart_and_is_followed() {
    let file = path("revocations");
    std::fs::write(&file, format!("{} alice\n", now() - 50)).expect("writable");
    let node = node("node-1").set("AUTH_MODE", "jwt").set("JWT_SECRET", SECRET);
    let node = node.set("REVOCATIONS_FILE", file.display()).start();
    let refused = |user: &str| {
        let headers = format!("Authorization: Bearer {}\r\n", token(user, now() - 100));
        let connect = Connect { headers, ..Connect::session(node.public, user, "phone") };
        matches!(Client::connect(&connect).receive(), Received::Refused(401, _))
    };
    assert!(refused("alice"));
    let mut bob = opened(&node, "bob", "phone", &token("bob", now() - 100));
    std::fs::write(&file, format!("{} *\n", now() - 60)).expect("writable");
    assert_eq!(bob.receive_end(), Received::Closed(4401, "token revoked".into()));
    assert!(refused("bob"));
    std::fs::remove_file(&file).expect("it is there");
    until(SOON, "the failure is counted", || {
        let failures = "delivery_auth_revocation_reload_failures_total";
        (node.metrics().sum(failures, &[]) >= 1.0).then_some(())
    });
    assert!(refused("bob"));
}

#[test]
fn errors_say_what_to_do() {
    let node = node("node-1").start();
    let gone = NodeBuilder::dev().spawn().admin;
    let arguments = ["sessions", "--admin", &gone.to_string()];
    // One node that does not answer fails the command, but the others are asked.
    let output = admin(&[&node], &arguments);
    let why = complaint(&output);
    assert!(why.contains("is a node running"), "{why}");
    assert!(why.contains("1 of 2 nodes failed"), "{why}");
    assert!(text(&output.stdout).starts_with("USER"), "{}", text(&output.stdout));
    let why = complaint(&admin(&[&node], &["revoke", "--user", "alice"]));
    assert!(why.contains("409: AUTH_MODE=trust"), "{why}");
    let why = complaint(&admin(&[&node], &["drain", "--admin", "127.0.0.1:1"]));
    assert!(why.contains("names 2 nodes: name one"), "{why}");
    assert_eq!(admin(&[&node], &["close"]).status.code(), Some(2));
    assert_eq!(admin(&[&node], &["revoke"]).status.code(), Some(2));
}

/// A path of the test's own.
fn path(name: &str) -> PathBuf {
    let name = format!("operators-{}-{name}", std::process::id());
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn token_or_socket_is_needed_where_the_node_has_a_token() {
    let (file, socket) =
        (path("token"), std::env::temp_dir().join(format!("delivery-{}.sock", std::process::id())));
    std::fs::write(&file, format!("{TOKEN}\n")).expect("writable");
    let node = node("node-1")
        .set("ADMIN_TOKEN_FILE", file.display())
        .set("ADMIN_SOCKET", socket.display());
    let mut node = node.start();
    let why = complaint(&admin(&[&node], &["sessions"]));
    assert!(why.contains("401: admin token required"), "{why}");
    let with_file = ["sessions", "--token-file", file.to_str().expect("UTF-8")];
    printed(&admin(&[&node], &with_file));
    let unix = format!("unix:{}", socket.display());
    printed(&admin(&[], &["sessions", "--admin", &unix]));
    // Neither health nor metrics need it.
    assert_eq!(node.get("/health/ready").expect("an answer").status, 200);
    assert_eq!(request(node.admin, "POST", "/admin/drain").expect("an answer").status, 401);
    assert!(node.metrics().sum("delivery_admin_requests_denied_total", &[]) >= 2.0);

    // The file is replaced while the node runs.
    let new = format!("{TOKEN}-2");
    std::fs::write(&file, format!("{new}\n")).expect("writable");
    let old = ["sessions", "--token", TOKEN];
    until(SOON, "the old token is refused", || {
        (admin(&[&node], &old).status.code() == Some(1)).then_some(())
    });
    printed(&admin(&[&node], &with_file));
    let log = node.log();
    assert!(!log.contains(TOKEN), "logged");

    assert!(socket.exists());
    printed(&admin(&[&node], &["drain", "--token", &new]));
    let status = until(SOON, "it has exited", || node.ended());
    assert!(status.success(), "{status}");
    assert!(!socket.exists(), "the file goes with its process");
    std::fs::remove_file(file).expect("it is there");
}

#[test]
fn drain_is_cancelled_until_sessions_are_closed() {
    let mut node = node("node-1").set("DRAIN_DELAY", "10m").start();
    let mut alice = Client::session(node.public, "alice", "phone");
    let why = complaint(&admin(&[&node], &["undrain"]));
    assert!(why.contains("409: the node does not drain"), "{why}");
    for _ in 0..2 {
        let table = printed(&admin(&[&node], &["drain"]));
        assert!(table.contains("node-1  draining"), "{table}");
        let answer = node.get("/health/ready").expect("an answer");
        assert_eq!((answer.status, answer.body.trim()), (503, "not ready: draining"));
        assert_eq!(node.metrics().sum("delivery_draining", &[]), 1.0);
        let has_health = |wanted| (health(&node) == wanted).then_some(());
        until(SOON, "it is not serving", || has_health(ServingStatus::NotServing));
        printed(&admin(&[&node], &["undrain"]));
        assert_eq!(node.get("/health/ready").expect("an answer").status, 200);
        assert_eq!(node.metrics().sum("delivery_draining", &[]), 0.0);
        until(SOON, "it is serving", || has_health(ServingStatus::Serving));
    }
    until(SOON, "the node goes on", || {
        let log = node.log();
        (log.matches("the drain was cancelled").count() == 2).then_some(())
    });
    assert!(alice.send(9, b"still there?"));
    assert_eq!(alice.receive(), Received::Pong(b"still there?".to_vec()));
    let _bob = Client::session(node.public, "bob", "phone");

    // A signal cannot be taken back, also if the drain was requested before.
    printed(&admin(&[&node], &["drain"]));
    node.signal(Signal::TERM);
    until(SOON, "the node has noticed the signal", || {
        let output = admin(&[&node], &["undrain"]);
        text(&output.stderr).contains("409: the node was told to stop by a signal").then_some(())
    });
    assert_eq!(node.ended(), None);
}

/// A node without a drain delay: nothing could be cancelled.
#[test]
fn requested_delay_can_be_cancelled_and_ends_with_a_signal() {
    let mut node = node("node-1").set("DRAIN_DELAY", "0s").start();
    let with_delay = ["drain", "--delay", "10m"];
    printed(&admin(&[&node], &with_delay));
    assert_eq!(node.get("/health/ready").expect("an answer").status, 503);
    let mut alice = Client::session(node.public, "alice", "phone");
    printed(&admin(&[&node], &["undrain"]));
    assert_eq!(node.get("/health/ready").expect("an answer").status, 200);
    printed(&admin(&[&node], &with_delay));
    node.signal(Signal::TERM);
    assert_eq!(alice.receive_end(), Received::Closed(1001, "server stopping".into()));
    let status = until(SOON, "it has exited", || node.ended());
    assert!(status.success(), "{status}");
}
