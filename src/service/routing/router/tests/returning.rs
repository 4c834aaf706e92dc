//! Positions of the lanes, and replays to sessions that return with a cursor.

use std::sync::atomic::Ordering;

use super::world::{FakePartition, RouterWorld, With, changed, created, message};
use crate::domain::cursor::{Cursor, CursorExpired, LogPosition, TopicId, UNCHECKED};
use crate::service::members::membership::{ReadBy, RecordPosition};
use crate::service::routing::router::TailFill;

pub(super) const TAILS: With = With {
    no_service: false,
    gated: false,
    user_lists: false,
    nodes: false,
    dead_letters: false,
    window: None,
    event_bytes: None,
    parked: None,
    forwards: None,
    tails: Some((1 << 20, 3)),
};

pub(super) fn append(log: &FakePartition, offset: i64, value: Vec<u8>) {
    log.append_at(offset, 1_000 + offset as u64, Some("key"), value);
}

pub(super) fn with(cursor: &Cursor, change: impl Fn(&mut LogPosition)) -> Cursor {
    let mut positions = cursor.positions().to_vec();
    change(&mut positions[0]);
    Cursor::of_sorted(&positions).unwrap()
}

pub(super) fn next(cursor: &Cursor) -> Vec<i64> {
    cursor.positions().iter().map(|position| position.next).collect()
}

/// A position counts what every shard was given: what waits for its members, or for room, holds it back.
#[test]
fn position_is_the_lowest_offset_that_is_not_given_to_the_shards() {
    let mut world = RouterWorld::new(With { gated: true, ..TAILS });
    world.connect("alice", "a", 0);
    world.conversations.set("slow", &["alice"]);
    let (log, _) = world.assign(0);
    assert_eq!(next(&world.cursor()), [0]);
    append(&log, 0, created("known", &["alice"]));
    append(&log, 1, message("slow", 1));
    append(&log, 2, message("known", 1));
    world.until("requested", |world| world.conversations.requested().len() == 1);
    assert_eq!(next(&world.cursor()), [1], "parked");
    world.conversations.open(1);
    world.until("delivered", |world| world.counters.deliveries.get() == 3);
    assert_eq!(next(&world.cursor()), [3]);
    // The ring has four slots.
    (3..9).for_each(|offset| append(&log, offset, message("known", offset)));
    world.ahead_ms += 1_000;
    world.run_until_idle();
    let deliveries = world.counters.deliveries.get();
    assert!(deliveries < 9, "{deliveries}");
    assert_eq!(world.taken(0).len(), 4);
    let held = world.routed.cursor().unwrap();
    assert!(next(&held)[0] <= 7, "{held:?}");
    world.until("delivered", |world| {
        world.taken(0);
        world.counters.deliveries.get() == 9
    });
    assert_eq!(next(&world.cursor()), [9]);
}

/// A session gets exactly what it would have got live: an oracle routes the same records.
#[test]
fn session_gets_what_it_missed_in_the_order_of_each_partition() {
    for seed in 0..30_u64 {
        let mut state = seed * 2 + 1;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let mut world = RouterWorld::new(TAILS);
        let logs = [world.assign(0).0, world.assign(1).0];
        let users = ["u0", "u1", "u2", "u3", "u4"];
        let mut members: Vec<Vec<&str>> = Vec::new();
        let mut received: Vec<(&str, i32, i64)> = Vec::new();
        let mut cursors = vec![world.cursor()];
        let mut offsets = [0_i64; 2];
        for step in 0..120 {
            let conversation = random(6).min(members.len());
            let partition = conversation % 2;
            let mut audience: Vec<&str>;
            let name = format!("c{conversation}");
            let value = if conversation == members.len() {
                members.push(users.into_iter().filter(|_| random(2) == 0).collect());
                audience = members[conversation].clone();
                created(&name, &audience)
            } else if random(4) == 0 {
                let user = users[random(5)];
                let list = &mut members[conversation];
                let is_added = !list.contains(&user);
                if is_added {
                    list.push(user);
                } else {
                    list.retain(|member| *member != user);
                }
                audience = list.clone();
                audience.push(user);
                audience.sort_unstable();
                audience.dedup();
                changed(&name, user, is_added)
            } else {
                audience = members[conversation].clone();
                message(&name, step)
            };
            append(&logs[partition], offsets[partition], value);
            received
                .extend(audience.iter().map(|user| (*user, partition as i32, offsets[partition])));
            // The log has holes.
            offsets[partition] += 1 + random(2) as i64;
            if random(9) == 0 {
                cursors.push(world.cursor());
            }
        }
        world.cursor();
        // All in one pass, as after a restart of a node.
        let returning: Vec<_> = (0..12)
            .map(|_| {
                let (user, since) = (users[random(5)], cursors[random(cursors.len())].clone());
                (user, since.clone(), world.replay(user, since))
            })
            .collect();
        for (user, since, mut chunks) in returning {
            let mut replayed = world.replayed(&mut chunks).unwrap();
            let is_missed = |&&(to, partition, offset): &&(&str, i32, i64)| {
                let position = since.get(TopicId::of("events"), partition.unsigned_abs());
                to == user && offset >= position.map_or(0, |position| position.next)
            };
            let missed = received.iter().filter(is_missed);
            let mut missed: Vec<_> = missed.map(|&(_, at, offset)| (at, offset)).collect();
            for partition in 0..2 {
                let of = |all: &[(i32, i64)]| -> Vec<i64> {
                    all.iter().filter(|(at, _)| *at == partition).map(|(_, at)| *at).collect()
                };
                assert_eq!(of(&replayed), of(&missed), "seed {seed}, {user}, {partition}");
            }
            replayed.sort_unstable();
            missed.sort_unstable();
            assert_eq!(replayed, missed, "seed {seed}");
        }
    }
}

#[test]
fn cursor_of_another_log_or_without_a_topic_expires() {
    let mut world = RouterWorld::new(TAILS);
    let (log, _) = world.assign(0);
    append(&log, 0, created("c", &["alice"]));
    append(&log, 1, message("c", 1));
    let cursor = world.cursor();
    append(&log, 2, message("c", 2));
    let mut expect = |since: Cursor, expected: Result<Vec<(i32, i64)>, CursorExpired>| {
        let mut chunks = world.replay("alice", since);
        assert_eq!(world.replayed(&mut chunks), expected);
    };
    expect(cursor.clone(), Ok(vec![(0, 2)]));
    expect(with(&cursor, |it| it.check ^= 2), Err(CursorExpired::OtherLog));
    // Alone its partition does not show that it is of this log.
    expect(with(&cursor, |it| it.check = UNCHECKED), Err(CursorExpired::Unverified));
    expect(with(&cursor, |it| it.topic = TopicId(1)), Err(CursorExpired::NewTopic));
    // A partition that is not read.
    let mut positions = cursor.positions().to_vec();
    positions.push(LogPosition { partition: 1, ..positions[0] });
    expect(Cursor::of_sorted(&positions).unwrap(), Err(CursorExpired::Unverified));
    // A topic that is not configured any more.
    positions[1].topic = TopicId(u32::MAX);
    positions[1].partition = 0;
    expect(Cursor::of_sorted(&positions).unwrap(), Ok(vec![(0, 2)]));
}

/// Another node may have been ahead of this one.
#[test]
fn cursor_that_is_ahead_is_waited_for() {
    let mut world = RouterWorld::new(TAILS);
    let (log, _) = world.assign(0);
    append(&log, 0, created("c", &["alice"]));
    append(&log, 1, message("c", 1));
    let cursor = world.cursor();
    let ahead = with(&cursor, |it| it.next = 3);
    let mut chunks = world.replay("alice", ahead.clone());
    world.until("checked", |world| world.counters.sessions_replaying.get() == 1);
    for _ in 0..3 {
        world.ahead_ms += 1_000;
        world.turn();
        assert!(chunks.try_recv().is_err());
    }
    append(&log, 2, message("c", 2));
    append(&log, 3, message("c", 3));
    // It is the check of the wrong record.
    assert_eq!(world.replayed(&mut chunks), Err(CursorExpired::OtherLog));
    let cursor = world.cursor();
    world.step_ms = 1_000;
    let mut chunks = world.replay("alice", with(&cursor, |it| it.next = 9));
    assert_eq!(
        world.replayed(&mut chunks),
        Err(CursorExpired::Unverified),
        "the log ends before it, or this node lags"
    );
    let mut chunks = world.replay("alice", cursor);
    assert_eq!(world.replayed(&mut chunks), Ok(Vec::new()));
}

#[test]
fn cursor_below_the_tail_is_too_old_and_a_slow_session_is_overtaken() {
    let mut world = RouterWorld::new(With { tails: Some((20_000, 1)), ..TAILS });
    let (log, _) = world.assign(0);
    append(&log, 0, created("c", &["alice"]));
    let mut offset = 1;
    let mut fill = |world: &mut RouterWorld, count: i64| {
        for _ in 0..count {
            append(&log, offset, message("c", offset));
            offset += 1;
        }
        world.run_until_idle();
    };
    fill(&mut world, 20);
    let cursor = world.cursor();
    fill(&mut world, 20);
    let mut chunks = world.replay("alice", cursor.clone());
    let first = world.next_chunk(&mut chunks).unwrap().unwrap();
    assert_eq!(first[0].offset, cursor.positions()[0].next);
    fill(&mut world, 1_000);
    let error = loop {
        match world.next_chunk(&mut chunks) {
            Ok(chunk) => assert!(chunk.is_some(), "complete, with a gap"),
            Err(error) => break error,
        }
    };
    assert_eq!(error, CursorExpired::Overtaken);
    let mut chunks = world.replay("alice", cursor);
    assert_eq!(world.replayed(&mut chunks), Err(CursorExpired::TooOld));
}

/// After a restart: the tail is filled from Kafka, and who received its records is requested.
#[test]
fn filled_tail_is_replayed_and_nothing_of_it_is_delivered() {
    for user_lists in [false, true] {
        filled_tail(With { user_lists, ..TAILS });
    }
}

fn filled_tail(with_tails: With) {
    let mut world = RouterWorld::new(with_tails);
    world.connect("alice", "a", 0);
    world.conversations.set("c", &["alice"]);
    world.conversations.set("d", &["bob"]);
    let (log, _) = world.assign_from(0, 14, Some(TailFill::new(10)));
    let values = ["c", "d", "c", "c", "c"].into_iter().zip(0..);
    for (conversation, at) in values {
        append(&log, 10 + at, message(conversation, at));
    }
    let mut before = RouterWorld::new(TAILS);
    let (earlier, _) = before.assign_from(0, 10, None);
    append(&earlier, 10, created("c", &["alice"]));
    let cursor = before.cursor();
    assert_eq!(next(&cursor), [11]);

    world.until("delivered", |world| world.counters.deliveries.get() == 1);
    assert_eq!(world.delivered(0)[0].value, message("c", 4));
    assert_eq!(next(&world.cursor()), [15]);
    let mut chunks = world.replay("alice", cursor.clone());
    assert_eq!(world.replayed(&mut chunks), Ok(vec![(0, 12), (0, 13), (0, 14)]));
    let mut chunks = world.replay("bob", cursor.clone());
    assert_eq!(world.replayed(&mut chunks), Ok(vec![(0, 11)]));
    if with_tails.user_lists {
        assert!(world.conversations.listed().len() <= 2);
    } else {
        assert_eq!(world.conversations.requested(), ["c", "d"], "once each");
    }

    // Alice joined or left something since: in which of these records she had a part is not certain.
    let position = RecordPosition { topic: 1, partition: 0, offset: 7 };
    world.membership.changed("x", "alice", false, ReadBy::Follower(position));
    let mut chunks = world.replay("alice", cursor.clone());
    assert_eq!(world.replayed(&mut chunks), Err(CursorExpired::MembersUnknown));
    let mut chunks = world.replay("bob", cursor.clone());
    assert_eq!(world.replayed(&mut chunks), Ok(vec![(0, 11)]));
    // Of what this node has routed itself it is.
    let mut chunks = world.replay("alice", with(&cursor, |position| position.next = 14));
    assert_ne!(world.replayed(&mut chunks), Err(CursorExpired::MembersUnknown));

    // A change names a user, who may be in the list or not.
    let mut changes = RouterWorld::new(with_tails);
    changes.conversations.set("c", &["alice"]);
    let (log, _) = changes.assign_from(0, 14, Some(TailFill::new(10)));
    append(&log, 10, message("c", 0));
    append(&log, 11, changed("c", "bob", true));
    append(&log, 12, changed("c", "bob", false));
    append(&log, 13, changed("c", "alice", true));
    changes.run_until_idle();
    let mut chunks = changes.replay("alice", cursor.clone());
    assert_eq!(changes.replayed(&mut chunks), Ok(vec![(0, 11), (0, 12), (0, 13)]));
    let mut chunks = changes.replay("bob", cursor.clone());
    assert_eq!(changes.replayed(&mut chunks), Ok(vec![(0, 11), (0, 12)]));

    // A quiet partition: only the check of its last record is there.
    let mut quiet = RouterWorld::new(with_tails);
    let (log, _) = quiet.assign_from(0, 11, Some(TailFill::new(10)));
    append(&log, 10, message("c", 0));
    quiet.run_until_idle();
    let mut chunks = quiet.replay("alice", cursor.clone());
    assert_eq!(quiet.replayed(&mut chunks), Ok(Vec::new()));

    // The conversation service does not answer.
    let mut failing = RouterWorld::new(with_tails);
    failing.conversations.failing.store(true, Ordering::Relaxed);
    let (log, _) = failing.assign_from(0, 12, Some(TailFill::new(10)));
    append(&log, 10, message("c", 0));
    append(&log, 11, message("c", 1));
    failing.run_until_idle();
    failing.step_ms = 1_000;
    let mut chunks = failing.replay("alice", cursor);
    assert_eq!(failing.replayed(&mut chunks), Err(CursorExpired::MembersUnknown));
}
