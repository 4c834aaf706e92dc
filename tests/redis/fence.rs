//! The fence of registrations: the scripts in a real Redis, against what must be true whatever is lost,
//! late or repeated.

use std::cell::RefCell;
use std::time::Duration;

use delivery::service::backends::redis::{DRAWN_AT_ONCE, Fence, FencedWrite, RegistrationKeys};
use proptest::prelude::*;
use redis::{Cmd, Connection, Value, cmd};
use tokio::time::Instant;

use super::server::{Options, Server};

const NODES: usize = 3;

/// What happens to a command.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answered,
    /// Carried out, but the node does not learn it.
    AnswerLost,
    /// Carried out at some later step.
    Late,
    Lost,
}

#[derive(Clone, Debug)]
enum Step {
    /// A client connects to a node, and the session draws its number.
    Admit(usize, Fate),
    /// A node does what is next for its session: draw again, register or refresh.
    Act(usize, Fate),
    /// A client ends its session.
    End(usize, Fate),
    /// A command that was late is carried out.
    CarryOut(usize),
    /// A replica copies both keys.
    Replicate,
    /// The replica takes over: all later writes are lost.
    FailOver,
}

fn fates() -> impl Strategy<Value = Fate> {
    prop_oneof![
        4 => Just(Fate::Answered),
        1 => Just(Fate::AnswerLost),
        2 => Just(Fate::Late),
        1 => Just(Fate::Lost),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..NODES, fates()).prop_map(|(node, fate)| Step::Admit(node, fate)),
        6 => (0..NODES, fates()).prop_map(|(node, fate)| Step::Act(node, fate)),
        2 => (0..NODES, fates()).prop_map(|(node, fate)| Step::End(node, fate)),
        3 => (0..8_usize).prop_map(Step::CarryOut),
        1 => Just(Step::Replicate),
        1 => Just(Step::FailOver),
    ];
    prop::collection::vec(step, 0..60)
}

/// A session as its node sees it.
#[derive(Clone, Debug)]
struct Session {
    /// Its place in the order of admissions, which no node knows.
    place: u64,
    /// When it was admitted, µs of the server. Its node knows how long ago that was.
    admitted: u64,
    fence: Option<Fence>,
    /// The fence of its predecessor on this node, which may still be registered.
    previous: Option<Fence>,
    registered: bool,
}

/// The values of both keys.
type Copied = (Option<String>, Vec<String>);

struct World<'a> {
    connection: &'a mut Connection,
    keys: RegistrationKeys,
    fence_key: String,
    /// The session that each node believes to be connected.
    sessions: [Option<Session>; NODES],
    admissions: u64,
    /// The newest session of all is connected to this node, and its registration was carried out and
    /// not lost since.
    holder: Option<usize>,
    /// The newest session of all was connected to this node, and its removal was carried out and not
    /// lost since.
    removed: Option<usize>,
    late: Vec<Cmd>,
    replica: Copied,
}

impl<'a> World<'a> {
    fn new(connection: &'a mut Connection) -> Self {
        cmd("FLUSHALL").exec(connection).unwrap();
        let keys = RegistrationKeys::new("alice", "phone");
        Self {
            connection,
            fence_key: "delivery:fence:{session:alice:phone}".into(),
            keys,
            sessions: [None, None, None],
            admissions: 0,
            holder: None,
            removed: None,
            late: Vec::new(),
            replica: (None, Vec::new()),
        }
    }

    fn instance(node: usize) -> String {
        format!("node-{node}")
    }

    fn registered(&mut self) -> Option<String> {
        cmd("GET").arg(self.keys.session()).query(self.connection).unwrap()
    }

    /// `None`: the node learns nothing. Also returns whether the command was carried out.
    fn run<T: redis::FromRedisValue>(&mut self, command: Cmd, fate: Fate) -> (bool, Option<T>) {
        match fate {
            Fate::Answered => (true, Some(command.query(self.connection).unwrap())),
            Fate::AnswerLost => {
                command.exec(self.connection).unwrap();
                (true, None)
            }
            Fate::Late => {
                self.late.push(command);
                (false, None)
            }
            Fate::Lost => (false, None),
        }
    }

    fn write(&mut self, command: Cmd, fate: Fate) -> (bool, Option<FencedWrite>) {
        let (carried_out, answer) = self.run(command, fate);
        (carried_out, answer.map(|answer| FencedWrite::answered(Ok(answer)).unwrap()))
    }

    /// The server's time, µs.
    fn time(&mut self) -> u64 {
        let (seconds, micros): (u64, u64) = cmd("TIME").query(self.connection).unwrap();
        seconds * 1_000_000 + micros
    }

    /// Draws a number at once.
    fn draw(&mut self, fate: Fate) -> Option<Fence> {
        let (_, answer) = self.run(self.keys.draw(), fate);
        let now = Instant::now();
        answer.map(|answer| Fence::drawn(Ok(answer), now, now).unwrap())
    }

    /// Draws a number late. Clock and age are shifted by the same time, so that the session counts as
    /// late and the test need not wait.
    fn draw_late(&mut self, admitted: u64, fate: Fate) -> Option<Fence> {
        let (_, answer) = self.run(self.keys.draw(), fate);
        let (number, now): (u64, u64) = answer?;
        let shift = 10 * DRAWN_AT_ONCE;
        let then = now + shift.as_micros() as u64;
        let text = |number: u64| Value::BulkString(number.to_string().into_bytes());
        let answer = Value::Array(vec![text(number), text(then)]);
        let start = Instant::now();
        let sent = start + Duration::from_micros(then - admitted);
        Some(Fence::drawn(Ok(answer), start, sent).unwrap())
    }

    fn is_newest(&self, session: &Session) -> bool {
        session.place == self.admissions
    }

    fn admit(&mut self, node: usize, fate: Fate) {
        self.admissions += 1;
        (self.holder, self.removed) = (None, None);
        // The older session of the same node is replaced there, without Redis.
        let old = self.sessions[node].take();
        let previous = old.and_then(|old| old.fence.or(old.previous));
        let (place, admitted) = (self.admissions, self.time());
        let fence = self.draw(fate);
        let session = Session { place, admitted, fence, previous, registered: false };
        self.sessions[node] = Some(session);
    }

    fn act(&mut self, node: usize, fate: Fate) {
        let Some(mut session) = self.sessions[node].take() else { return };
        let Some(fence) = session.fence else {
            session.fence = self.draw_late(session.admitted, fate);
            self.sessions[node] = Some(session);
            return;
        };
        let instance = Self::instance(node);
        let command = if session.registered {
            self.keys.refresh(&instance, fence)
        } else {
            self.keys.register(&instance, fence)
        };
        let (carried_out, answer) = self.write(command, fate);
        if self.is_newest(&session) && carried_out && !session.registered {
            self.holder = Some(node);
        }
        match answer {
            Some(FencedWrite::Newer) => {
                assert!(!self.is_newest(&session), "the newest session is closed as replaced");
                return;
            }
            Some(FencedWrite::Missing) => session.registered = false,
            Some(FencedWrite::Done | FencedWrite::New) => session.registered = true,
            None => {}
        }
        self.sessions[node] = Some(session);
    }

    fn end(&mut self, node: usize, fate: Fate) {
        let Some(session) = self.sessions[node].take() else { return };
        let newest = self.is_newest(&session);
        if newest {
            self.holder = None;
        }
        if let Some(fence) = session.fence.or(session.previous) {
            let command = self.keys.remove(&Self::instance(node), fence);
            let (carried_out, _) = self.write(command, fate);
            if newest && carried_out {
                self.removed = Some(node);
            }
        }
    }

    fn copy(&mut self) -> Copied {
        let holder = self.registered();
        let fence = cmd("HGETALL").arg(&self.fence_key).query(self.connection).unwrap();
        (holder, fence)
    }

    fn fail_over(&mut self) {
        (self.holder, self.removed) = (None, None);
        cmd("FLUSHALL").exec(self.connection).unwrap();
        let (holder, fence) = self.replica.clone();
        if let Some(holder) = holder {
            cmd("SET").arg(self.keys.session()).arg(holder).exec(self.connection).unwrap();
        }
        if !fence.is_empty() {
            cmd("HSET").arg(&self.fence_key).arg(fence).exec(self.connection).unwrap();
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Admit(node, fate) => self.admit(node, fate),
            Step::Act(node, fate) => self.act(node, fate),
            Step::End(node, fate) => self.end(node, fate),
            Step::CarryOut(which) => {
                if which < self.late.len() {
                    self.late.remove(which).exec(self.connection).unwrap();
                }
            }
            Step::Replicate => self.replica = self.copy(),
            Step::FailOver => self.fail_over(),
        }
        if let Some(node) = self.holder {
            assert_eq!(self.registered(), Some(Self::instance(node)), "after {step:?}");
        }
        if let Some(node) = self.removed {
            assert_ne!(self.registered(), Some(Self::instance(node)), "after {step:?}");
        }
    }

    /// Carries out all that is late, and lets each node do what it does at its refreshes.
    fn settle(&mut self) {
        for command in std::mem::take(&mut self.late) {
            command.exec(self.connection).unwrap();
        }
        // Draw, refresh, register again, refresh.
        for _ in 0..4 {
            for node in 0..NODES {
                self.act(node, Fate::Answered);
            }
        }
        let newest = |session: &Option<Session>| {
            session.as_ref().is_some_and(|session| session.place == self.admissions)
        };
        let Some(node) = self.sessions.iter().position(newest) else { return };
        assert_eq!(self.registered(), Some(Self::instance(node)), "the newest is registered");
        let open = self.sessions.iter().flatten().count();
        assert_eq!(open, 1, "the older sessions are closed");
    }
}

/// Promise: “The newest session of a device wins.”
#[test]
fn newest_session_wins_whatever_is_lost_late_or_repeated() {
    // A cluster also refuses a script whose keys are in two slots.
    let Some(server) = Server::start(Options { cluster: true, ..Options::default() }) else {
        return;
    };
    let connection = RefCell::new(server.connection());
    let usual = ProptestConfig::default();
    // Enough to find each fault that was planted in the scripts.
    let cases = 4 * usual.cases;
    let config = ProptestConfig { cases, failure_persistence: None, ..usual };
    proptest!(config, |(steps in steps())| {
        let mut connection = connection.borrow_mut();
        let mut world = World::new(&mut connection);
        for step in &steps {
            world.step(step);
        }
        world.settle();
    });
}

/// Draws at once.
fn fence(connection: &mut Connection, keys: &RegistrationKeys) -> Fence {
    let now = Instant::now();
    Fence::drawn(keys.draw().query(connection), now, now).unwrap()
}

fn write(connection: &mut Connection, command: &Cmd) -> FencedWrite {
    FencedWrite::answered(command.query(connection)).unwrap()
}

#[test]
fn numbers_grow_also_after_redis_has_lost_them() {
    let Some(server) = Server::start(Options::default()) else { return };
    let mut connection = server.connection();
    let keys = RegistrationKeys::new("alice", "phone");
    let mut last = None;
    for round in 0..200 {
        if round % 10 == 0 {
            cmd("FLUSHALL").exec(&mut connection).unwrap();
        }
        let drawn = Some(fence(&mut connection, &keys));
        assert!(drawn > last, "{drawn:?} after {last:?}");
        last = drawn;
    }
}

#[test]
fn writer_without_a_fence_is_newer_than_what_it_replaced() {
    let Some(server) = Server::start(Options::default()) else { return };
    let mut connection = server.connection();
    let keys = RegistrationKeys::new("alice", "phone");
    let ours = fence(&mut connection, &keys);
    assert_eq!(write(&mut connection, &keys.register("node-1", ours)), FencedWrite::New);
    // A Go node, or the presence service.
    cmd("SET").arg(keys.session()).arg("go-node").exec(&mut connection).unwrap();
    assert_eq!(write(&mut connection, &keys.refresh("node-1", ours)), FencedWrite::Newer);
    assert_eq!(write(&mut connection, &keys.register("node-1", ours)), FencedWrite::Newer);
    assert_eq!(write(&mut connection, &keys.remove("node-1", ours)), FencedWrite::Newer);
    let holder: String = cmd("GET").arg(keys.session()).query(&mut connection).unwrap();
    assert_eq!(holder, "go-node");
    // A session of ours that starts later replaces it.
    let later = fence(&mut connection, &keys);
    assert_eq!(write(&mut connection, &keys.register("node-1", later)), FencedWrite::Done);
}

#[test]
fn late_registration_of_a_session_that_has_ended_is_void() {
    let Some(server) = Server::start(Options::default()) else { return };
    let mut connection = server.connection();
    let keys = RegistrationKeys::new("alice", "phone");
    let ours = fence(&mut connection, &keys);
    assert_eq!(write(&mut connection, &keys.register("node-1", ours)), FencedWrite::New);
    assert_eq!(write(&mut connection, &keys.remove("node-1", ours)), FencedWrite::Done);
    assert_eq!(write(&mut connection, &keys.register("node-1", ours)), FencedWrite::Newer);
    assert_eq!(write(&mut connection, &keys.remove("node-1", ours)), FencedWrite::Missing);
    let exists: bool = cmd("EXISTS").arg(keys.session()).query(&mut connection).unwrap();
    assert!(!exists);
}

#[test]
fn fence_outlives_the_registration_and_then_expires() {
    let Some(server) = Server::start(Options::default()) else { return };
    let mut connection = server.connection();
    let keys = RegistrationKeys::new("alice", "phone");
    let ours = fence(&mut connection, &keys);
    write(&mut connection, &keys.register("node-1", ours));
    let mut lifetimes_s = || {
        let mut of = |key: &str| -> i64 { cmd("TTL").arg(key).query(&mut connection).unwrap() };
        (of(keys.session()), of("delivery:fence:{session:alice:phone}"))
    };
    let (registration, fence) = lifetimes_s();
    assert!((55..=60).contains(&registration) && (115..=120).contains(&fence));
}
