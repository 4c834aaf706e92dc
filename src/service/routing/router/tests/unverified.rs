//! How a node finds out whether a cursor is of its log (docs/websocket.md, *When one expires*).

use std::sync::atomic::Ordering;

use super::returning::{TAILS, append, next, with};
use super::world::{FakePartition, RouterWorld, created, message};
use crate::domain::cursor::{Cursor, CursorExpired, LogPosition};
use crate::service::routing::router::TailFill;

/// A node that began this many ms later.
fn later(ms: u64) -> RouterWorld {
    let mut world = RouterWorld::new(TAILS);
    world.ahead_ms += ms;
    world
}

fn replayed(world: &mut RouterWorld, since: &Cursor) -> Result<Vec<(i32, i64)>, CursorExpired> {
    let mut chunks = world.replay("alice", since.clone());
    world.replayed(&mut chunks)
}

fn fill(log: &FakePartition, records: i64) {
    append(log, 0, created("c", &["alice"]));
    (1..records).for_each(|offset| append(log, offset, message("c", offset)));
}

/// “Or the topic was empty then and is not any more: only the node that has read it since knows that it was not created
/// again.”
#[test]
fn cursor_of_an_empty_topic_is_used_only_by_the_node_that_has_read_it_since() {
    let mut world = RouterWorld::new(TAILS);
    let log = world.assign(0).0;
    let empty = world.cursor();
    assert_eq!(next(&empty), [0]);
    let mut still_empty = later(60_000);
    still_empty.assign(0);
    still_empty.run_until_idle();
    assert_eq!(replayed(&mut still_empty, &empty), Ok(Vec::new()), "a topic that nobody uses");
    fill(&log, 2);
    assert_eq!(replayed(&mut world, &empty), Ok(vec![(0, 0), (0, 1)]));

    // What the former topic got is missed.
    let mut again = later(60_000);
    fill(&again.assign(0).0, 1);
    again.run_until_idle();
    assert_eq!(replayed(&mut again, &empty), Err(CursorExpired::Unverified));

    // The topic was not empty: another partition shows that it is the same one.
    let logs = [world.assign(1).0, world.assign(2).0];
    fill(&logs[0], 1);
    let mut cursor = world.cursor();
    assert_eq!(next(&cursor), [2, 1, 0]);
    let mut other = later(60_000);
    (0..3)
        .zip([2, 1, 1])
        .for_each(|(partition, records)| fill(&other.assign(partition).0, records));
    other.run_until_idle();
    assert_eq!(replayed(&mut other, &cursor), Ok(vec![(2, 0)]));
    // Also for a partition that was added since.
    cursor = Cursor::of_sorted(&cursor.positions()[..2]).unwrap();
    assert_eq!(replayed(&mut other, &cursor), Ok(vec![(2, 0)]));
    // It is certain that this is another one.
    let changed = with(&cursor, |position| position.check ^= 2);
    assert_eq!(replayed(&mut other, &changed), Err(CursorExpired::OtherLog));
}

/// “in no partition of a topic does the node know the record before the position: it is deleted, or older than the
/// tail”.
#[test]
fn cursor_behind_deleted_records_is_unverified_or_too_old() {
    let mut before = RouterWorld::new(TAILS);
    let log = before.assign(0).0;
    fill(&log, 3);
    let edge = before.cursor();
    assert_eq!(next(&edge), [3]);
    // A restarted node, whose log begins at 3 now.
    let mut world = later(60_000);
    let log = world.assign_from(0, 3, None).0;
    append(&log, 3, message("c", 3));
    world.conversations.set("c", &["alice"]);
    world.until("routed", |world| world.counters.records.get() == 1);
    assert_eq!(replayed(&mut world, &edge), Err(CursorExpired::Unverified));
    let earlier = with(&edge, |position| position.next = 2);
    assert_eq!(replayed(&mut world, &earlier), Err(CursorExpired::TooOld));
    // A restarted node that has read a record before the position.
    let mut world = later(60_000);
    let log = world.assign_from(0, 3, Some(TailFill::new(2))).0;
    append(&log, 2, message("c", 2));
    world.run_until_idle();
    assert_eq!(replayed(&mut world, &edge), Ok(Vec::new()));
}

/// A record that waits for its members shows as well of which log it is.
#[test]
fn cursor_behind_a_parked_record_is_verified_by_it() {
    let mut ahead = RouterWorld::new(TAILS);
    fill(&ahead.assign(0).0, 3);
    let cursor = ahead.cursor();
    assert_eq!(next(&cursor), [3]);
    let mut world = later(60_000);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let log = world.assign(0).0;
    append(&log, 0, created("of others", &["bob"]));
    append(&log, 1, message("c", 1));
    append(&log, 2, message("c", 2));
    append(&log, 3, message("of others", 1));
    world.until("parked", |world| world.counters.conversations_waiting.get() == 1);
    assert_eq!(next(&world.cursor()), [1]);
    assert_eq!(replayed(&mut world, &cursor), Ok(Vec::new()), "the client has both");
    let changed = with(&cursor, |position| position.check ^= 2);
    assert_eq!(replayed(&mut world, &changed), Err(CursorExpired::OtherLog));
}

/// “Records leave the tail when they are older than `TAIL_AGE`, also in a quiet partition”.
#[test]
fn records_of_a_quiet_partition_leave_the_tail_in_time() {
    let mut world = RouterWorld::new(TAILS);
    let log = world.assign(0).0;
    fill(&log, 1);
    let old = world.cursor();
    append(&log, 1, message("c", 1));
    let newest = world.cursor();
    assert_eq!(replayed(&mut world, &old), Ok(vec![(0, 1)]));
    assert_eq!(world.counters.tail_records.get(), 2);
    // The age of a tail of these tests is a minute.
    world.ahead_ms += 62_000;
    world.turn();
    world.turn();
    assert_eq!(world.counters.tail_records.get(), 0);
    assert_eq!(replayed(&mut world, &old), Err(CursorExpired::TooOld));
    assert_eq!(replayed(&mut world, &newest), Ok(Vec::new()), "nothing has happened since");
    let of_another_log: Vec<_> =
        newest.positions().iter().map(|it| LogPosition { check: it.check ^ 2, ..*it }).collect();
    let of_another_log = Cursor::of_sorted(&of_another_log).unwrap();
    assert_eq!(replayed(&mut world, &of_another_log), Err(CursorExpired::OtherLog));
}
