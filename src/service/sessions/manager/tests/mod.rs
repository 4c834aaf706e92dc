//! The manager with plain rings in place of shards, driven step by step without a clock.

mod missed;
mod operators;
mod with_cluster;
mod with_dependencies;
mod with_presence;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::state::SessionManager;
use super::{ManagerRequest, NodeState, SessionConfig, SessionCounters, SessionPorts, Shutdown};
use crate::domain::close::{CloseCode, EndReason};
use crate::domain::command::{Hello, Secret, ShardCommand, ShardReport};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, ShardId};
use crate::handoff::{Doorbell, PeerEnd, Pushed, ShardEnd, connect};
use crate::service::cluster::announcer::SessionAnnouncer;
use crate::service::cluster::missed::MissedSessions;
use crate::service::members::directory::{Directory, SessionIds};
use crate::service::sessions::auth::Authenticator;
use crate::service::sessions::catch_up::{CatchUpConfig, CatchUpReport, CatchUpService};
use crate::service::sessions::presence::Presence;

/// Slots of the command rings: few, so that they fill up.
const RING_SLOTS: usize = 4;

/// Dependencies of the manager under test.
struct Dependencies {
    auth: Arc<Authenticator>,
    presence: Presence,
    catch_up: CatchUpService,
    announcer: Option<Arc<SessionAnnouncer>>,
}

impl Default for Dependencies {
    fn default() -> Self {
        Self {
            auth: Authenticator::trust(),
            presence: Presence::off(),
            catch_up: CatchUpService::without_messages(CatchUpConfig::default(), Arc::default()),
            announcer: None,
        }
    }
}

impl Dependencies {
    fn ports(
        self,
        bell: Arc<Doorbell>,
        shards: Vec<PeerEnd>,
        directory: Arc<Directory>,
    ) -> SessionPorts {
        let Self { auth, presence, catch_up, announcer } = self;
        let missed = Arc::new(MissedSessions::new(Arc::clone(&directory), None, Arc::clone(&bell)));
        SessionPorts { bell, shards, directory, missed, announcer, auth, presence, catch_up }
    }
}

struct Bench {
    manager: SessionManager,
    shards: Vec<Option<ShardEnd>>,
    directory: Arc<Directory>,
    counters: Arc<SessionCounters>,
    /// Requests of other tasks to the manager.
    requests: mpsc::Receiver<ManagerRequest>,
    catch_ups: mpsc::Receiver<CatchUpReport>,
    /// The manager's time, advanced by the tests.
    clock: Instant,
    /// Keeps the manager's channel open.
    _requests_in: mpsc::Sender<ManagerRequest>,
}

impl Bench {
    fn new(shards: usize) -> Self {
        Self::with(shards, SessionConfig::default())
    }

    fn with(shards: usize, config: SessionConfig) -> Self {
        Self::with_dependencies(Dependencies::default(), shards, config)
    }

    fn with_dependencies(dependencies: Dependencies, shards: usize, config: SessionConfig) -> Self {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (ports, shards) = (0..shards)
            .map(|_| {
                let (port, shard) = connect([RING_SLOTS, 1024], &bell, &bell);
                (port, Some(shard))
            })
            .unzip();
        let directory = Arc::new(Directory::new());
        let counters = Arc::new(SessionCounters::default());
        let (requests_in, requests) = mpsc::channel(16);
        let (catch_ups_in, catch_ups) = mpsc::channel(16);
        let ports = dependencies.ports(bell, ports, Arc::clone(&directory));
        let manager = SessionManager::new(
            config,
            ports,
            Arc::clone(&counters),
            requests_in.downgrade(),
            catch_ups_in,
            watch::Sender::new(NodeState::Serving),
        );
        let _requests_in = requests_in;
        let clock = Instant::now();
        Self { manager, shards, directory, counters, requests, catch_ups, clock, _requests_in }
    }

    fn report(&mut self, shard: usize, report: ShardReport) {
        let pushed = self.shards[shard].as_mut().unwrap().reports.push(report);
        assert!(matches!(pushed, Pushed::Accepted));
        self.manager.take_reports();
    }

    fn open(&mut self, shard: usize, connection: ConnectionKey, user: &str, device: &str) {
        self.open_with(shard, connection, (user, device), None);
    }

    fn open_with(
        &mut self,
        shard: usize,
        connection: ConnectionKey,
        (user, device): (&str, &str),
        token: Option<Secret>,
    ) {
        let hello = Box::new(Hello {
            user_id: user.into(),
            device_id: device.into(),
            token,
            address: IpAddr::from([127, 0, 0, 1]),
            encoding: Encoding::Binary,
        });
        self.report(shard, ShardReport::Opened { connection, hello });
    }

    fn end(&mut self, shard: usize, connection: ConnectionKey) {
        self.report(shard, ShardReport::Ended { connection, why: EndReason::PeerGone });
    }

    /// All commands that the manager has sent to a shard, including those that waited for room.
    fn commands(&mut self, shard: usize) -> Vec<ShardCommand> {
        let mut all = Vec::new();
        loop {
            self.manager.flush();
            let before = all.len();
            let consumer = &mut self.shards[shard].as_mut().unwrap().commands;
            all.extend(std::iter::from_fn(|| consumer.pop()));
            if all.len() == before {
                return all;
            }
        }
    }

    fn admitted(&mut self, shard: usize, connection: ConnectionKey, user: &str, device: &str) {
        self.open(shard, connection, user, device);
        let commands = self.commands(shard);
        let [ShardCommand::Admit { connection: admitted }] = commands[..] else {
            panic!("{commands:?}");
        };
        assert_eq!(admitted, connection);
    }

    fn refused(&mut self, shard: usize) -> (u16, String) {
        let commands = self.commands(shard);
        let [ShardCommand::Refuse { ref refusal, .. }] = commands[..] else {
            panic!("{commands:?}");
        };
        (refusal.status, refusal.body.to_string())
    }

    fn says(&mut self, shard: usize, connection: ConnectionKey, text: &str) -> Vec<ShardCommand> {
        self.report(shard, ShardReport::Message { connection, text: text.into() });
        self.commands(shard)
    }

    fn order(&mut self, shutdown: Shutdown, now: Instant) -> oneshot::Receiver<()> {
        let (stopped, wait) = oneshot::channel();
        self.manager.on_shut_down(shutdown, stopped, now);
        wait
    }
}

fn key(slot: u32, generation: u32) -> ConnectionKey {
    ConnectionKey { slot, generation }
}

fn closes(commands: &[ShardCommand]) -> Vec<(ConnectionKey, CloseCode, String)> {
    let close = |command: &ShardCommand| match command {
        ShardCommand::Close { connection, close, .. } => {
            Some((*connection, close.code, close.reason.to_string()))
        }
        _ => None,
    };
    commands.iter().filter_map(close).collect()
}

#[test]
fn session_is_in_the_directory_from_its_admission_to_its_end() {
    let mut bench = Bench::new(2);
    bench.admitted(1, key(7, 3), "alice", "phone");
    let found = bench.directory.find(&SessionIds::new("alice", "phone")).unwrap();
    assert_eq!((found.shard, found.connection), (ShardId(1), key(7, 3)));
    bench.end(1, key(7, 3));
    assert!(bench.directory.is_empty());
    assert_eq!((bench.counters.admitted.get(), bench.counters.sessions.get()), (1, 0));
}

#[test]
fn missing_ids_are_refused_in_the_words_of_the_contract() {
    let mut bench = Bench::new(1);
    for (slot, (user, device)) in (0..).zip([("", "phone"), ("alice", ""), ("", "")]) {
        bench.open(0, key(slot, 0), user, device);
        assert_eq!(bench.refused(0), (400, "missing user_id or device_id".into()));
        bench.end(0, key(slot, 0));
    }
    assert!(bench.directory.is_empty());
    assert_eq!(bench.counters.refused_bad_request.get(), 3);
}

#[test]
fn newer_connection_wins_and_the_end_of_the_older_one_does_not_affect_it() {
    let mut bench = Bench::new(2);
    bench.admitted(0, key(1, 0), "alice", "phone");
    bench.admitted(1, key(1, 0), "alice", "phone");
    let closed = closes(&bench.commands(0));
    assert_eq!(closed, [(key(1, 0), CloseCode::SESSION_REPLACED, "session_replaced".into())]);
    assert_eq!(bench.counters.replaced.get(), 1);

    bench.end(0, key(1, 0));
    let found = bench.directory.find(&SessionIds::new("alice", "phone")).unwrap();
    assert_eq!(found.shard, ShardId(1));
    assert_eq!(bench.counters.sessions.get(), 1);
}

#[test]
fn session_is_closed_only_once() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(1, 0), "alice", "phone");
    bench.open(0, key(2, 0), "alice", "phone");
    bench.open(0, key(3, 0), "alice", "phone");
    let closed = closes(&bench.commands(0));
    assert_eq!(closed.iter().map(|closed| closed.0.slot).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn user_limit_does_not_count_replacements() {
    let config = SessionConfig { sessions_per_user_max: 2, ..SessionConfig::default() };
    let mut bench = Bench::with(1, config);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.admitted(0, key(1, 0), "alice", "desk");
    bench.open(0, key(2, 0), "alice", "fridge");
    assert_eq!(bench.refused(0).0, 429);
    bench.admitted(0, key(3, 0), "bob", "phone");
    bench.open(0, key(4, 0), "alice", "desk");
    let commands = bench.commands(0);
    assert!(matches!(commands[0], ShardCommand::Admit { .. }), "{commands:?}");
    bench.end(0, key(0, 0));
    bench.admitted(0, key(5, 0), "alice", "fridge");
}

#[test]
fn reports_about_earlier_uses_of_a_slot_change_nothing() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 5), "alice", "phone");
    bench.end(0, key(0, 4));
    bench.end(0, key(9, 0));
    assert_eq!(bench.directory.len(), 1);
    assert_eq!(bench.counters.reports_stale.get(), 2);
}

#[test]
fn stop_stops_every_shard_and_waits_for_all() {
    let mut bench = Bench::new(2);
    bench.admitted(0, key(0, 0), "alice", "phone");
    let mut wait = bench.order(Shutdown::Stop, Instant::now());
    for shard in 0..2 {
        let commands = bench.commands(shard);
        let [ShardCommand::StopAccepting, ShardCommand::Stop { ref close }] = commands[..] else {
            panic!("{commands:?}");
        };
        assert_eq!(close.code, CloseCode::GOING_AWAY);
    }
    bench.open(1, key(0, 0), "bob", "phone");
    assert_eq!(bench.refused(1).0, 503);
    bench.report(1, ShardReport::Stopped);
    assert_eq!(bench.manager.state(), NodeState::Stopping);
    assert!(wait.try_recv().is_err());
    bench.end(0, key(0, 0));
    bench.report(0, ShardReport::Stopped);
    assert_eq!(bench.manager.state(), NodeState::Stopped);
    assert!(wait.try_recv().is_ok());
}

#[test]
fn drain_closes_at_a_steady_pace_and_gives_each_session_a_wait() {
    let spread = Duration::from_millis(5000);
    let mut bench =
        Bench::with(2, SessionConfig { reconnect_spread: spread, ..SessionConfig::default() });
    for slot in 0..50 {
        bench.admitted(0, key(slot, 0), &format!("user-{slot}"), "phone");
        bench.admitted(1, key(slot, 0), &format!("other-{slot}"), "phone");
    }
    let begun = Instant::now();
    let _wait = bench.order(Shutdown::Drain(Duration::from_secs(10)), begun);
    assert_eq!(bench.manager.state(), NodeState::Draining);
    let mut closed = Vec::new();
    for tick in 1..10 {
        bench.manager.tick(begun + Duration::from_secs(tick), 0);
        let commands = [bench.commands(0), bench.commands(1)];
        closed.extend(commands.iter().flat_map(|commands| closes(commands)));
        assert_eq!(closed.len(), tick as usize * 10, "in {tick} s");
        assert_eq!(closes(&commands[0]).len(), closes(&commands[1]).len());
    }
    for (_, code, reason) in &closed {
        assert_eq!(*code, CloseCode::SERVICE_RESTART);
        let wait_ms: u128 = reason
            .strip_prefix("draining; reconnect in ")
            .unwrap()
            .strip_suffix(" ms")
            .unwrap()
            .parse()
            .unwrap();
        assert!(wait_ms <= spread.as_millis());
    }
    assert!(closed.iter().any(|one| one.2 != closed[0].2), "all waits are the same");

    bench.manager.tick(begun + Duration::from_secs(10), 0);
    let commands = [bench.commands(0), bench.commands(1)];
    closed.extend(commands.iter().flat_map(|commands| closes(commands)));
    assert_eq!(closed.len(), 100, "all closed at the end of the period");
    bench.manager.tick(begun + Duration::from_secs(11), 0);
    let commands = bench.commands(0);
    assert!(matches!(commands[..], [ShardCommand::Stop { .. }]), "{commands:?}");
}

#[test]
fn drain_ends_early_without_sessions() {
    let mut bench = Bench::new(1);
    let _wait = bench.order(Shutdown::Drain(Duration::from_secs(600)), Instant::now());
    assert_eq!(bench.manager.state(), NodeState::Stopping);
}

#[test]
fn sessions_of_a_lost_shard_end() {
    let mut bench = Bench::new(2);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.admitted(1, key(0, 0), "bob", "phone");
    bench.shards[0] = None;
    bench.manager.take_reports();
    assert_eq!(bench.directory.find(&SessionIds::new("alice", "phone")), None);
    assert_eq!(bench.directory.len(), 1);
    assert_eq!(bench.counters.shards_lost.get(), 1);
}

#[test]
fn session_goes_live_at_once_without_a_message_service() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    let answer = bench.says(0, key(0, 0), r#"{"last_sequences": {"c": 5}}"#);
    let [ShardCommand::GoLive { ref delivered, .. }] = answer[..] else { panic!("{answer:?}") };
    assert!(delivered.is_empty());
    // Contract §3: later messages are ignored.
    assert!(bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#).is_empty());
    assert!(bench.says(0, key(0, 0), "hello").is_empty());
    assert_eq!(bench.counters.messages_ignored.get(), 2);
}

#[test]
fn grpc_session_is_answered_for_each_conversation_it_names() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    for (conversation, after) in [("a", 0), ("b", 7)] {
        let conversation_key =
            crate::service::events::conversation_key::conversation_key(conversation);
        let connection = key(0, 0);
        let conversation = conversation.into();
        bench.report(0, ShardReport::Resume { connection, conversation, after });
        let answer = bench.commands(0);
        let [ShardCommand::GoLive { ref delivered, .. }] = answer[..] else {
            panic!("{answer:?}");
        };
        assert!(delivered.conversation == Some(conversation_key) && delivered.is_empty());
    }
}

#[test]
fn first_message_that_is_no_json_of_the_contract_closes_the_session() {
    for text in ["", "hello", "[]", r#"{"last_sequences": 5}"#] {
        let mut bench = Bench::new(1);
        bench.admitted(0, key(0, 0), "alice", "phone");
        let closed = closes(&bench.says(0, key(0, 0), text));
        assert_eq!(closed[0].1, CloseCode::NORMAL);
        assert!(closed[0].2.starts_with("first message: "), "{closed:?}");
        assert_eq!(bench.counters.first_messages_invalid.get(), 1);
    }
}

#[test]
fn first_message_without_positions_after_the_grace_is_a_late_resume_request() {
    for (text, expected) in [("{}", 1), ("null", 1), (r#"{"access_token": "x"}"#, 0), ("[]", 0)] {
        let mut bench = Bench::new(1);
        bench.admitted(0, key(0, 0), "alice", "phone");
        bench.report(0, ShardReport::GraceExpired { connection: key(0, 0) });
        bench.says(0, key(0, 0), text);
        assert_eq!(bench.counters.resumes_too_late.get(), expected, "{text}");
    }
}

#[test]
fn resume_request_after_the_grace_is_too_late() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.report(0, ShardReport::GraceExpired { connection: key(0, 0) });
    let closed = closes(&bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#));
    assert_eq!(closed[0].1, CloseCode::RESUME_TOO_LATE);
    assert_eq!(bench.counters.resumes_too_late.get(), 1);
}

#[test]
fn messages_of_a_closing_session_are_ignored() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.open(0, key(1, 0), "alice", "phone");
    bench.commands(0);
    assert!(bench.says(0, key(0, 0), r#"{"last_sequences": {}}"#).is_empty());
}
