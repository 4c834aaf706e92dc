//! What operators do: list sessions, close them, revoke tokens.

use serde_json::json;

use super::super::operators::OperatorRequest;
use super::super::{ListPlace, RevocationsFull, RevokedTokens, SessionList};
use super::with_dependencies::{auth, now_s, secret, sign};
use super::*;

fn list(bench: &mut Bench, user: Option<&str>, from: ListPlace, max: usize) -> SessionList {
    let (answer, mut wait) = oneshot::channel();
    let user = user.map(Box::from);
    bench.manager.on_operator_request(OperatorRequest::List { user, from, max, answer });
    wait.try_recv().unwrap()
}

/// The whole list in parts of `max`, as users.
fn listed(bench: &mut Bench, max: usize) -> Vec<String> {
    let mut users = Vec::new();
    let mut next = Some(ListPlace::default());
    while let Some(from) = next {
        let part = list(bench, None, from, max);
        assert!(part.sessions.len() <= max);
        users.extend(part.sessions.into_iter().map(|session| session.user));
        next = part.next;
    }
    users
}

fn close(bench: &mut Bench, user: &str, device: Option<&str>) -> usize {
    let (answer, mut wait) = oneshot::channel();
    let (user, device) = (user.into(), device.map(Box::from));
    bench.manager.on_operator_request(OperatorRequest::Close { user, device, answer });
    wait.try_recv().unwrap()
}

/// Revokes, and closes all sessions concerned, one at a time.
fn revoke(bench: &mut Bench, user: Option<&str>, before_s: u64) -> Result<usize, RevocationsFull> {
    let of = || user.map(Box::from);
    let (answer, mut wait) = oneshot::channel();
    let revoked = RevokedTokens::new(user, before_s, before_s).unwrap();
    bench.manager.on_operator_request(OperatorRequest::Revoke { revoked, answer });
    wait.try_recv().unwrap()?;
    let (mut closed, mut next) = (0, Some(ListPlace::default()));
    while let Some(from) = next {
        let (answer, mut wait) = oneshot::channel();
        let max = 1;
        let request = OperatorRequest::CloseRevoked { user: of(), from, max, answer };
        bench.manager.on_operator_request(request);
        let (more, rest) = wait.try_recv().unwrap();
        assert!(more <= max);
        (closed, next) = (closed + more, rest);
    }
    Ok(closed)
}

/// A token that was issued then; `None`: it does not say.
fn token(user: &str, issued_s: Option<u64>) -> Secret {
    sign(&json!({ "sub": user, "exp": now_s() + 600, "iat": issued_s }))
}

fn with_tokens() -> Bench {
    Bench::with_dependencies(auth(&secret()), 1, SessionConfig::default())
}

#[test]
fn list_has_each_open_session_once_in_parts_of_any_size() {
    let mut bench = Bench::new(2);
    let mut users: Vec<String> = Vec::new();
    // Slots without a session, beyond what one request looks at, and one shard with fewer slots.
    for (shard, slot) in [(0, 0), (1, 0), (0, 1), (0, 7), (1, 2), (0, 5_000)] {
        let user = format!("user-{shard}-{slot}");
        bench.admitted(shard, key(slot, 3), &user, "phone");
        users.push(user);
    }
    // Not admitted, and being closed.
    bench.open(0, key(2, 0), "", "phone");
    assert_eq!(bench.refused(0).0, 400);
    bench.admitted(0, key(3, 0), "gone", "phone");
    assert_eq!(close(&mut bench, "gone", None), 1);
    users.sort();
    let part = list(&mut bench, None, ListPlace::default(), usize::MAX);
    assert!(part.next.is_some(), "one request looks at all places");
    for max in 1..=users.len() + 1 {
        let mut found = listed(&mut bench, max);
        found.sort();
        assert_eq!(found, users, "{max} at a time");
    }
}

#[test]
fn row_shows_who_where_since_when_and_what_it_gets() {
    let mut bench = with_tokens();
    let exp = now_s() + 600;
    bench.manager.tick(bench.clock, 1_000);
    bench.open_with(0, key(0, 0), ("", "phone"), Some(token("alice", Some(900))));
    let only = |bench: &mut Bench| {
        let mut list = list(bench, Some("alice"), ListPlace::default(), 10);
        assert_eq!((list.sessions.len(), list.next), (1, None));
        list.sessions.remove(0)
    };
    let row = only(&mut bench);
    assert_eq!((&*row.user, &*row.device, row.state), ("alice", "phone", "waiting"));
    assert_eq!((row.client, row.since_s), (IpAddr::from([127, 0, 0, 1]), 1_000));
    assert_eq!(row.token_issued_s, Some(900));
    assert!(row.token_expires_s.is_some_and(|at| at >= exp));
    bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#);
    assert_eq!(only(&mut bench).state, "live");
    assert!(list(&mut bench, Some("bob"), ListPlace::default(), 10).sessions.is_empty());
}

#[test]
fn list_of_a_user_continues_where_it_ended() {
    let mut bench = Bench::new(2);
    for (shard, slot) in [(0, 5), (1, 1), (0, 1), (1, 9)] {
        bench.admitted(shard, key(slot, 0), "alice", &format!("{shard}-{slot}"));
    }
    let mut devices = Vec::new();
    let mut next = Some(ListPlace::default());
    while let Some(from) = next {
        let part = list(&mut bench, Some("alice"), from, 3);
        devices.extend(part.sessions.into_iter().map(|session| session.device));
        next = part.next;
    }
    assert_eq!(devices, ["0-1", "1-1", "0-5", "1-9"]);
}

#[test]
fn operator_closes_one_device_or_all_of_a_user() {
    let mut bench = Bench::new(1);
    for (slot, user, device) in
        [(0, "alice", "phone"), (1, "alice", "desk"), (2, "alice", "car"), (3, "bob", "phone")]
    {
        bench.admitted(0, key(slot, 0), user, device);
    }
    let closed = |bench: &mut Bench| {
        let closes = closes(&bench.commands(0));
        for (_, code, reason) in &closes {
            assert_eq!((*code, &**reason), (CloseCode::GOING_AWAY, "closed by the operator"));
        }
        closes.iter().map(|(key, ..)| key.slot).collect::<Vec<_>>()
    };
    assert_eq!(close(&mut bench, "alice", Some("desk")), 1);
    assert_eq!(closed(&mut bench), [1]);
    assert_eq!(close(&mut bench, "alice", Some("desk")), 0, "it is being closed");
    assert_eq!(close(&mut bench, "alice", Some("none")), 0);
    assert_eq!(close(&mut bench, "alice", None), 2);
    assert_eq!(closed(&mut bench), [0, 2]);
    assert_eq!(close(&mut bench, "carol", None), 0);
    assert_eq!(bench.counters.closed_by_operator.get(), 3);
}

/// Promise: “A revoked token gives no session.”
#[test]
fn session_with_a_revoked_token_is_closed_and_does_not_return_with_it() {
    let mut bench = with_tokens();
    let sessions =
        [("alice", Some(100)), ("alice", Some(200)), ("alice", None), ("bob", Some(100))];
    for (slot, (user, issued_s)) in (0..).zip(sessions) {
        let device = format!("device-{slot}");
        bench.open_with(0, key(slot, 0), ("", &device), Some(token(user, issued_s)));
    }
    bench.commands(0);
    assert_eq!(revoke(&mut bench, Some("alice"), 200), Ok(2));
    let reason = "token revoked".to_owned();
    let of = |slot| (key(slot, 0), CloseCode::TOKEN_EXPIRED, reason.clone());
    assert_eq!(closes(&bench.commands(0)), [of(0), of(2)]);
    // Also for a device that has no session.
    for (slot, issued_s) in [(10, Some(199)), (11, None)] {
        bench.open_with(0, key(slot, 0), ("", "new"), Some(token("alice", issued_s)));
        let (status, body) = bench.refused(0);
        assert_eq!((status, &*body), (401, "access token was revoked: get a fresh one"));
    }
    for (slot, user, issued_s) in [(12, "alice", 200), (13, "bob", 100)] {
        bench.open_with(0, key(slot, 0), ("", "new"), Some(token(user, Some(issued_s))));
        assert!(matches!(bench.commands(0)[..], [ShardCommand::Admit { .. }]), "{user}");
    }
    assert_eq!(bench.counters.refused_revoked.get(), 2);
    assert_eq!(bench.counters.tokens_revoked.get(), 2);
    // Repeated, it closes nothing more. For everybody, it closes the rest of the older ones.
    assert_eq!(revoke(&mut bench, Some("alice"), 200), Ok(0));
    assert_eq!(revoke(&mut bench, None, 200), Ok(2));
    bench.manager.tick(bench.clock, now_s());
    assert_eq!(bench.counters.revocations.get(), 2);
}

#[test]
fn revoked_token_renews_no_session() {
    let mut bench = with_tokens();
    bench.open_with(0, key(0, 0), ("", "phone"), Some(token("alice", Some(300))));
    bench.commands(0);
    assert_eq!(revoke(&mut bench, Some("alice"), 200), Ok(0));
    let says = |bench: &mut Bench, issued_s| {
        let text = json!({ "access_token": token("alice", Some(issued_s)).expose() });
        let commands = bench.says(0, key(0, 0), &text.to_string());
        let found = commands.iter().find_map(|command| match command {
            ShardCommand::SendText { text, .. } => Some(text.clone()),
            _ => None,
        });
        found.expect("an answer")
    };
    assert!(says(&mut bench, 199).contains("revoked"));
    assert!(says(&mut bench, 400).contains("token_expires_at"));
    // The session has the newer token now.
    assert_eq!(revoke(&mut bench, Some("alice"), 400), Ok(0));
    assert_eq!(revoke(&mut bench, Some("alice"), 401), Ok(1));
}

#[tokio::test]
async fn token_that_is_revoked_while_it_is_checked_is_refused() {
    let mut bench = with_dependencies::with_public_key();
    let token = with_dependencies::rs256("alice", now_s() + 600);
    bench.open_with(0, key(0, 0), ("alice", "phone"), Some(token));
    let checked = bench.requests.recv().await.unwrap();
    assert_eq!(revoke(&mut bench, Some("alice"), 200), Ok(0));
    bench.manager.on_request(checked);
    assert_eq!(bench.refused(0).0, 401);
}

#[test]
fn tokens_that_are_revoked_at_the_start_are_refused_from_the_first_session_on() {
    let revoked = vec![RevokedTokens::new(Some("alice"), 200, now_s()).unwrap()];
    let config = SessionConfig { revoked, ..SessionConfig::default() };
    let mut bench = Bench::with_dependencies(auth(&secret()), 1, config);
    bench.open_with(0, key(0, 0), ("", "phone"), Some(token("alice", Some(199))));
    assert_eq!(bench.refused(0).0, 401);
    bench.open_with(0, key(1, 0), ("", "phone"), Some(token("alice", Some(200))));
    assert!(matches!(bench.commands(0)[..], [ShardCommand::Admit { .. }]));
}
