//! Sessions that have missed events (`docs/guarantees.md`, “When events are missed”).

use super::*;
use crate::domain::cursor::Cursor;
use crate::domain::ids::SessionAddress;
use crate::service::backends::ports::MissedEvents as _;
use crate::service::routing::replays::{ReplayReader, TailReplays};

const REASON: &str = "events missed";

fn admit_many(bench: &mut Bench, count: u32) {
    for slot in 0..count {
        bench.admitted(0, key(slot, 0), &format!("user-{slot}"), "phone");
    }
}

/// Ticks, and returns what the shard is told.
fn tick(bench: &mut Bench) -> Vec<ShardCommand> {
    bench.clock += Duration::from_millis(100);
    bench.manager.tick(bench.clock, 0);
    bench.commands(0)
}

/// Promise: “A session that has missed events gets nothing more but its close frame.”
#[test]
fn session_that_has_missed_events_gets_nothing_more_but_its_close_frame() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.admitted(0, key(1, 0), "bob", "phone");
    bench.manager.missed.missed_by_user("alice");
    assert_eq!(bench.directory.sessions_of("alice", |_| {}), 0, "before the manager knows");
    bench.manager.take_missed();
    let answer = bench.says(0, key(0, 0), r#"{"last_sequences": {"c": 5}}"#);
    assert!(answer.is_empty(), "{answer:?}");
    let closed = closes(&tick(&mut bench));
    assert_eq!(closed, [(key(0, 0), CloseCode::EVENTS_MISSED, REASON.into())]);
    assert!(tick(&mut bench).is_empty(), "closed once");
    assert_eq!(bench.directory.len(), 1, "the other one stays");
    bench.end(0, key(0, 0));
    assert_eq!(bench.counters.sessions.get(), 1);
    assert_eq!(bench.counters.events_missed.get(), 1);
}

/// A cursor must not cover what its session has missed: the shard gets no answer to its fence before the session
/// manager has withdrawn every session that had left the directory.
#[tokio::test]
async fn fence_is_answered_behind_the_sessions_that_have_left() {
    let mut bench = Bench::new(1);
    bench.manager.catch_up.set_replays(Arc::new(NothingMissed));
    for (slot, user) in [(0, "alice"), (1, "bob"), (2, "carol")] {
        bench.admitted(0, key(slot, 0), user, "phone");
    }
    for slot in 0..2 {
        bench.says(0, key(slot, 0), r#"{"cursor": null}"#);
        for _ in 0..2 {
            let step = bench.catch_ups.recv().await.unwrap();
            bench.manager.on_catch_up_report(step);
        }
        let begun = bench.commands(0);
        let [ShardCommand::GoLive { .. }, ShardCommand::SendCursors { connection }] = begun[..]
        else {
            panic!("{begun:?}");
        };
        assert_eq!(connection, key(slot, 0));
    }
    bench.manager.missed.missed_by_user("alice");
    bench.manager.missed.missed_by_user("carol");
    bench.report(0, ShardReport::Fence);
    let answer = bench.commands(0);
    let [ShardCommand::StopCursors { connection }, ShardCommand::Fence] = answer[..] else {
        panic!("{answer:?}");
    };
    assert_eq!(connection, key(0, 0), "carol gets no cursors");
    bench.open(0, key(3, 0), "bob", "phone");
    bench.report(0, ShardReport::Fence);
    let answer = bench.commands(0);
    let closed_at = answer.iter().position(|it| matches!(it, ShardCommand::Close { .. }));
    let fence_at = answer.iter().position(|it| matches!(it, ShardCommand::Fence));
    assert!(closed_at.is_some() && closed_at < fence_at, "{answer:?}");
}

struct NothingMissed;

impl TailReplays for NothingMissed {
    fn replay(&self, _: SessionAddress, _: Arc<str>, _: Option<Cursor>) -> ReplayReader {
        ReplayReader::new(std::iter::empty())
    }
}

#[test]
fn session_known_by_its_address_leaves_the_directory_and_is_closed_once() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    let address = bench.directory.find(&SessionIds::new("alice", "phone")).unwrap();
    bench.manager.missed.missed(address);
    bench.manager.missed.missed(address);
    bench.manager.take_missed();
    assert!(bench.directory.is_empty());
    bench.manager.missed.missed(address);
    assert_eq!(closes(&tick(&mut bench)).len(), 1);
    bench.end(0, key(0, 0));
    bench.manager.missed.missed(address);
    bench.admitted(0, key(0, 1), "alice", "phone");
    assert!(tick(&mut bench).is_empty(), "another session has the slot");
}

/// Promise: “No storm after a gap.”
#[test]
fn closes_are_paced_and_sessions_admitted_later_are_not_concerned() {
    let mut bench = Bench::new(1);
    admit_many(&mut bench, 950);
    bench.manager.missed.missed_by_all();
    bench.admitted(0, key(950, 0), "later", "phone");
    let mut closed = Vec::new();
    for passed in 1..=10 {
        closed.extend(closes(&tick(&mut bench)));
        assert_eq!(closed.len(), (passed * 100).min(950), "after {passed} ticks");
    }
    assert!(
        closed.iter().all(|(key, code, _)| key.slot < 950 && *code == CloseCode::EVENTS_MISSED)
    );
    assert_eq!(bench.counters.events_missed_waiting.get(), 0);
    assert_eq!(bench.directory.len(), 1);
}

#[test]
fn newer_connection_replaces_a_session_that_waits_for_its_close() {
    let mut bench = Bench::new(2);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.manager.missed.missed_by_all();
    bench.manager.take_missed();
    bench.admitted(1, key(0, 0), "alice", "phone");
    assert_eq!(closes(&bench.commands(0))[0].1, CloseCode::SESSION_REPLACED);
    assert!(tick(&mut bench).is_empty());
    bench.end(0, key(0, 0));
    assert_eq!(bench.directory.len(), 1, "the newer one stays");
    assert_eq!(bench.counters.events_missed.get(), 0);
}

#[test]
fn session_may_end_before_the_manager_knows_that_it_has_missed_events() {
    let mut bench = Bench::new(1);
    bench.admitted(0, key(0, 0), "alice", "phone");
    bench.manager.missed.missed_by_all();
    bench.end(0, key(0, 0));
    assert!(tick(&mut bench).is_empty());
    assert_eq!(bench.counters.sessions.get(), 0);
    assert_eq!(bench.manager.open_sessions(), 0);
}

/// Promise: “No storm after a gap.”
#[test]
fn drain_paces_sessions_that_wait_for_their_close_as_well() {
    let mut bench = Bench::new(1);
    admit_many(&mut bench, 200);
    bench.manager.missed.missed_by_all();
    bench.manager.take_missed();
    let begun = bench.clock;
    let _wait = bench.order(Shutdown::Drain(Duration::from_secs(10)), begun);
    bench.commands(0);
    for second in 1..=9 {
        bench.manager.tick(begun + Duration::from_secs(second), 0);
        let closed = closes(&bench.commands(0));
        assert_eq!(closed.len(), 20, "second {second}");
        assert!(closed.iter().all(|closed| closed.1 == CloseCode::SERVICE_RESTART));
    }
}
