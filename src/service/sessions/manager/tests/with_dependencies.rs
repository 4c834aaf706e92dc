//! The manager with its dependencies: authentication, catch-up.

use std::sync::Arc;
use std::time::Duration;

use delivery_testkit::neighbours::{Behaviour, FakeNeighbours, Method};
use serde_json::{Value, json};

use super::super::SessionManager;
use super::*;
use crate::domain::caught_up::SequenceRun;
use crate::domain::command::{DeliveryClass, Ticket};
use crate::service::backends::neighbours::{
    ConversationService, MessageService, NeighbourConfig, NeighbourCounters,
};
use crate::service::events::conversation_key::conversation_key;
use crate::service::events::timestamp::unix_ms;
use crate::service::sessions::auth::tests::Signer;
use crate::service::sessions::auth::{AuthCounters, ClaimRules, OwnKeys};
use crate::service::sessions::catch_up::{CatchUpConfig, CatchUpCounters, ReadAccess};

const SECRET: &str = "a secret of these tests, of 32 bytes or more";
const PEM: &[u8] = include_bytes!("../../auth/testdata/rsa_public.pem");
/// Leeway of the tokens under test, seconds.
const LEEWAY_S: u64 = 30;

pub(super) fn auth(own: &OwnKeys) -> Dependencies {
    let rules = ClaimRules { issuer: None, audience: None, leeway: Duration::from_secs(LEEWAY_S) };
    let auth = Authenticator::jwt(own, Vec::new(), rules, Arc::<AuthCounters>::default()).unwrap();
    Dependencies { auth, ..Dependencies::default() }
}

fn claims(user: &str, exp: u64) -> Value {
    json!({ "sub": user, "exp": exp })
}

pub(super) fn sign(claims: &Value) -> Secret {
    Signer::hs256(SECRET).sign(None, claims)
}

pub(super) fn hs256(user: &str, exp: u64) -> Secret {
    sign(&claims(user, exp))
}

pub(super) fn rs256(user: &str, exp: u64) -> Secret {
    Signer::rsa().sign(None, &claims(user, exp))
}

pub(super) fn secret() -> OwnKeys {
    OwnKeys { secrets: vec![Secret::new(SECRET.into())], pem: None }
}

fn with_secret() -> Bench {
    Bench::with_dependencies(auth(&secret()), 1, SessionConfig::default())
}

pub(super) fn with_public_key() -> Bench {
    Bench::with_dependencies(
        auth(&OwnKeys { secrets: Vec::new(), pem: Some(PEM.to_vec()) }),
        1,
        SessionConfig::default(),
    )
}

pub(super) fn now_s() -> u64 {
    unix_ms() / 1000
}

/// Checks every token, with two ticks a whole sweep apart.
fn sweep(bench: &mut Bench, unix_s: u64) -> Vec<ShardCommand> {
    for _ in 0..2 {
        bench.clock += Duration::from_secs(10);
        bench.manager.tick(bench.clock, unix_s);
    }
    bench.commands(0)
}

fn fresh_token(bench: &mut Bench, token: &Secret) -> Vec<ShardCommand> {
    let text = json!({ "access_token": token.expose() }).to_string();
    bench.says(0, key(0, 0), &text)
}

fn text_of(commands: &[ShardCommand]) -> Value {
    let [ShardCommand::SendText { text, .. }] = commands else { panic!("{commands:?}") };
    serde_json::from_str(text).unwrap()
}

/// Admits a session with a token and sends its first message.
fn admit_with(bench: &mut Bench, token: Secret) {
    bench.open_with(0, key(0, 0), ("", "phone"), Some(token));
    assert!(matches!(bench.commands(0)[..], [ShardCommand::Admit { .. }]));
    let live = bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#);
    assert!(matches!(live[..], [ShardCommand::GoLive { .. }]));
}

#[test]
fn token_decides_who_is_admitted() {
    let mut bench = with_secret();
    let exp = now_s() + 600;
    for (slot, user, token, status) in [
        (0, "alice", None, 401),
        (1, "alice", Some(Secret::new("rubbish".into())), 401),
        (2, "alice", Some(hs256("alice", 5)), 401),
        (3, "bob", Some(hs256("alice", exp)), 403),
    ] {
        bench.open_with(0, key(slot, 0), (user, "phone"), token);
        assert_eq!(bench.refused(0).0, status);
    }
    assert!(bench.directory.is_empty());
    bench.open_with(0, key(4, 0), ("", "phone"), Some(hs256("alice", exp)));
    assert!(matches!(bench.commands(0)[..], [ShardCommand::Admit { .. }]));
    assert!(bench.directory.find(&SessionIds::new("alice", "phone")).is_some());
    assert_eq!(bench.counters.refused_unauthorized.get(), 3);
    assert_eq!(bench.counters.refused_forbidden.get(), 1);
}

#[tokio::test]
async fn slow_token_check_runs_in_a_task_and_finds_its_connection() {
    let mut bench = with_public_key();
    for (slot, user) in [(0, "alice"), (1, "bob"), (2, "carol")] {
        let token = rs256(user, now_s() + 600);
        bench.open_with(0, key(slot, 7), (user, "phone"), Some(token));
    }
    assert!(bench.commands(0).is_empty(), "not admitted before the check");
    // Bob disconnects during the check, and another connection takes the slot.
    bench.end(0, key(1, 7));
    bench.open_with(0, key(1, 8), ("dave", "phone"), None);
    assert_eq!(bench.refused(0).0, 401);
    for _ in 0..3 {
        let request = bench.requests.recv().await.unwrap();
        bench.manager.on_request(request);
    }
    let admitted: Vec<_> = (bench.commands(0).iter())
        .map(|command| match command {
            ShardCommand::Admit { connection } => *connection,
            command => panic!("{command:?}"),
        })
        .collect();
    assert_eq!(admitted.len(), 2);
    assert!(admitted.contains(&key(0, 7)) && admitted.contains(&key(2, 7)));
    assert_eq!(bench.directory.len(), 2);
}

#[test]
fn session_ends_with_its_token() {
    let mut bench = with_secret();
    let exp = now_s() + 600;
    admit_with(&mut bench, hs256("alice", exp));
    assert!(sweep(&mut bench, exp + LEEWAY_S - 1).is_empty());
    let closed = closes(&sweep(&mut bench, exp + LEEWAY_S));
    assert_eq!(closed, [(key(0, 0), CloseCode::TOKEN_EXPIRED, "token expired".into())]);
    assert!(sweep(&mut bench, exp + LEEWAY_S + 1).is_empty(), "closed once");
    assert_eq!(bench.counters.tokens_expired.get(), 1);
}

#[test]
fn fresh_token_in_time_keeps_the_session() {
    let mut bench = with_secret();
    let exp = now_s() + 600;
    admit_with(&mut bench, hs256("alice", exp));
    let answer = fresh_token(&mut bench, &hs256("alice", exp + 1000));
    assert_eq!(text_of(&answer), json!({ "token_expires_at": exp + 1000 + LEEWAY_S }));
    assert!(sweep(&mut bench, exp + LEEWAY_S + 1).is_empty());
    assert!(!closes(&sweep(&mut bench, exp + 1000 + LEEWAY_S + 1)).is_empty());
}

#[test]
fn invalid_fresh_token_changes_nothing() {
    let mut bench = with_secret();
    let exp = now_s() + 600;
    admit_with(&mut bench, hs256("alice", exp));
    for token in [hs256("bob", exp + 1000), hs256("alice", 5), Secret::new("rubbish".into())] {
        let answer = text_of(&fresh_token(&mut bench, &token));
        let error = answer["error"].as_str().unwrap();
        assert!(!error.contains(token.expose()), "{error}");
    }
    assert_eq!(bench.counters.tokens_refused.get(), 3);
    assert!(!closes(&sweep(&mut bench, exp + LEEWAY_S + 1)).is_empty());
}

#[tokio::test]
async fn session_whose_fresh_token_is_in_check_does_not_expire() {
    let mut bench = with_public_key();
    let exp = now_s() + 600;
    bench.open_with(0, key(0, 0), ("alice", "phone"), Some(rs256("alice", exp)));
    let request = bench.requests.recv().await.unwrap();
    bench.manager.on_request(request);
    bench.commands(0);
    let text = json!({ "access_token": rs256("alice", exp + 1000).expose(), "last_sequences": {} });
    let live = bench.says(0, key(0, 0), &text.to_string());
    assert!(matches!(live[..], [ShardCommand::GoLive { .. }]), "{live:?}");
    assert!(sweep(&mut bench, exp + LEEWAY_S + 1).is_empty());
    // A second token during the check of the first is ignored.
    assert!(fresh_token(&mut bench, &rs256("alice", exp)).is_empty());
    let request = bench.requests.recv().await.unwrap();
    bench.manager.on_request(request);
    let answer = text_of(&bench.commands(0));
    assert_eq!(answer, json!({ "token_expires_at": exp + 1000 + LEEWAY_S }));
}

fn with_catch_up(fake: &FakeNeighbours, config: CatchUpConfig) -> Bench {
    let neighbour = NeighbourConfig::new(fake.url());
    let counters = Arc::<NeighbourCounters>::default;
    let service = Arc::new(ConversationService::new(&neighbour, counters()).unwrap());
    let messages = Arc::new(MessageService::new(&neighbour, counters()).unwrap());
    let access = ReadAccess::Checked { listing: service.clone(), source: service };
    let counters = Arc::<CatchUpCounters>::default();
    let catch_up = CatchUpService::new(config, messages, access, counters);
    Bench::with_dependencies(
        Dependencies { catch_up, ..Dependencies::default() },
        1,
        SessionConfig::default(),
    )
}

/// Issue “From the log to the members”: “`{}`, `null` and `{"last_sequences":null}` return everything
/// from 0” in the Go service, “as a client that omits empty fields would expect”.
#[tokio::test]
async fn first_message_without_positions_requests_everything() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 2);
    let mut bench = with_catch_up(&fake, CatchUpConfig::default());
    let firsts =
        ["{}", "null", r#"{"last_sequences":null}"#, r#"{"access_token":"x"}"#, r#"{"more":[]}"#];
    for (slot, text) in (0..).zip(firsts) {
        let device = format!("device-{slot}");
        bench.admitted(0, key(slot, 0), "alice", &device);
        bench.says(0, key(slot, 0), text);
        let (sequences, _) = chunk(&caught_up(&mut bench).await);
        assert_eq!(sequences, [1, 2], "{text}");
        bench.end(0, key(slot, 0));
    }
}

/// The next step of a catch-up, as commands.
async fn caught_up(bench: &mut Bench) -> Vec<ShardCommand> {
    let step = bench.catch_ups.recv().await.unwrap();
    bench.manager.on_catch_up_report(step);
    bench.commands(0)
}

/// The sequences of a chunk and the ticket of its last message.
fn chunk(commands: &[ShardCommand]) -> (Vec<i64>, Ticket) {
    let mut sequences = Vec::new();
    let mut last = None;
    for command in commands {
        let ShardCommand::Deliver { event, class: DeliveryClass::CatchUp, ticket, .. } = command
        else {
            panic!("{command:?}");
        };
        assert!(last.is_none(), "the ticket is on the last");
        sequences.push(event.position.unwrap().sequence);
        last = *ticket;
    }
    (sequences, last.expect("a ticket on the last"))
}

#[tokio::test]
async fn catch_up_is_sent_in_chunks_and_ends_with_go_live() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 10);
    let config = CatchUpConfig { chunk_messages_max: 4, ..CatchUpConfig::default() };
    let mut bench = with_catch_up(&fake, config);
    bench.admitted(0, key(0, 0), "alice", "phone");
    let answer = bench.says(0, key(0, 0), r#"{"last_sequences": {"c": 2}}"#);
    assert!(answer.is_empty(), "{answer:?}");
    for expected in [vec![3, 4, 5, 6], vec![7, 8, 9, 10]] {
        let (sequences, ticket) = chunk(&caught_up(&mut bench).await);
        assert_eq!(sequences, expected);
        bench.report(0, ShardReport::Done { ticket });
    }
    let go_live = caught_up(&mut bench).await;
    let [ShardCommand::GoLive { ref delivered, .. }] = go_live[..] else { panic!("{go_live:?}") };
    let run = SequenceRun { conversation: conversation_key("c"), first: 3, last: 10 };
    assert_eq!(delivered.runs(), [run]);
    // A second request is ignored.
    assert!(bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#).is_empty());
}

#[tokio::test]
async fn failed_catch_up_closes_the_session_with_the_reason() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 10);
    fake.set(Method::Sync, Behaviour::Failing(tonic::Code::Internal));
    let mut bench =
        with_catch_up(&fake, CatchUpConfig { attempts_max: 1, ..CatchUpConfig::default() });
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#);
    let closed = closes(&caught_up(&mut bench).await);
    assert_eq!(closed[0].1, CloseCode::TRY_AGAIN_LATER);
    assert!(closed[0].2.contains("message service"));
}

#[tokio::test]
async fn end_of_a_session_aborts_its_catch_up() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 10);
    fake.set(Method::Sync, Behaviour::Hanging);
    let mut bench = with_catch_up(&fake, CatchUpConfig::default());
    for replaced in [false, true] {
        bench.admitted(0, key(0, 0), "alice", "phone");
        bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#);
        fake.until(|state| state.in_flight.get(&Method::Sync) == Some(&1)).await;
        if replaced {
            bench.open(0, key(1, 0), "alice", "phone");
        } else {
            bench.end(0, key(0, 0));
        }
        fake.until(|state| state.in_flight[&Method::Sync] == 0).await;
    }
}

#[tokio::test]
async fn chunk_for_a_session_that_has_ended_is_not_delivered() {
    let fake = FakeNeighbours::start();
    fake.state().create("c", &["alice"], 10);
    let mut bench = with_catch_up(&fake, CatchUpConfig::default());
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#);
    let step = bench.catch_ups.recv().await.unwrap();
    bench.end(0, key(0, 0));
    bench.admitted(0, key(0, 1), "bob", "phone");
    bench.manager.on_catch_up_report(step);
    assert!(bench.commands(0).is_empty(), "bob has taken the slot");
}

#[tokio::test]
async fn grpc_session_catches_up_as_many_conversations_at_once_as_others_and_all_in_the_end() {
    let fake = FakeNeighbours::start();
    let names: Vec<_> = (0..20).map(|n| format!("c-{n}")).collect();
    names.iter().for_each(|name| fake.state().create(name, &["alice"], 3));
    fake.set(Method::Sync, Behaviour::Hanging);
    let config = CatchUpConfig::default();
    let at_once = config.steps_at_once;
    assert!(at_once < names.len());
    let mut bench = with_catch_up(&fake, config);
    bench.admitted(0, key(0, 0), "alice", "phone");
    for name in &names {
        let (connection, conversation) = (key(0, 0), name.as_str().into());
        bench.report(0, ShardReport::Resume { connection, conversation, after: 3 });
    }
    fake.until(|state| state.in_flight.get(&Method::Sync) == Some(&at_once)).await;
    assert_eq!(fake.state().count(Method::Members), at_once, "the others are queued");
    fake.set(Method::Sync, Behaviour::Normal);
    // The hanging calls reach their deadline and are retried.
    let mut released = Vec::new();
    while released.len() < names.len() {
        for command in caught_up(&mut bench).await {
            let ShardCommand::GoLive { delivered, .. } = command else { panic!("{command:?}") };
            released.push(delivered.conversation);
        }
    }
    assert!(names.iter().all(|name| released.contains(&Some(conversation_key(name)))));
}

/// A shard that opens connections, counts admissions, and stops when ordered to.
fn run_shard(mut shard: ShardEnd, sessions: u32) {
    for slot in 0..sessions {
        let hello = Box::new(Hello {
            user_id: format!("user-{slot}"),
            device_id: "phone".into(),
            token: None,
            address: IpAddr::from([127, 0, 0, 1]),
            encoding: Encoding::Binary,
        });
        let mut report = ShardReport::Opened { connection: key(slot, 0), hello };
        while let Pushed::Full(back) = shard.reports.push(report) {
            shard.reports.publish();
            std::thread::yield_now();
            report = back;
        }
    }
    shard.reports.publish();
    let mut admitted = 0;
    loop {
        match shard.commands.pop() {
            Some(ShardCommand::Admit { .. }) => admitted += 1,
            Some(ShardCommand::Stop { .. }) => break,
            Some(_) => {}
            None => std::thread::yield_now(),
        }
    }
    assert_eq!(admitted, sessions);
    assert!(matches!(shard.reports.push(ShardReport::Stopped), Pushed::Accepted));
    shard.reports.publish();
}

#[tokio::test]
async fn manager_task_wakes_for_its_shards_and_ends_with_them() {
    const SESSIONS: u32 = 500;
    let bell = Arc::new(Doorbell::new().unwrap());
    let mut ports = Vec::new();
    let mut threads = Vec::new();
    for _ in 0..2 {
        let shard_bell = Arc::new(Doorbell::new().unwrap());
        let (port, shard) = connect([RING_SLOTS, 64], &shard_bell, &bell);
        ports.push(port);
        threads.push(std::thread::spawn(move || run_shard(shard, SESSIONS)));
    }
    let directory = Arc::new(Directory::new());
    let ports = Dependencies::default().ports(bell, ports, Arc::clone(&directory));
    let counters = Arc::new(SessionCounters::default());
    let config = SessionConfig::default();
    let handle = SessionManager::spawn(config, ports, Arc::clone(&counters)).unwrap();
    assert_eq!(handle.state(), NodeState::Serving);
    while counters.admitted.get() < 2 * u64::from(SESSIONS) {
        tokio::task::yield_now().await;
    }
    // Both shards have the same users and devices: the newer sessions stay.
    assert_eq!(directory.len(), SESSIONS as usize);
    handle.shut_down(Shutdown::Stop).await;
    assert_eq!(handle.state(), NodeState::Stopped);
    assert!(directory.is_empty());
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // Once more, after the manager has ended.
    handle.shut_down(Shutdown::Stop).await;
}
