//! Positions of the lanes, and replays to sessions that return with a cursor.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;

use tokio::sync::mpsc::Receiver;

use super::world::{FakePartition, RouterWorld, With, changed, created, message};
use crate::domain::cursor::{Cursor, CursorExpired, LogPosition, TopicId, UNCHECKED};
use crate::domain::ids::ConversationPosition;
use crate::service::events::conversation_key::log_position;
use crate::service::members::membership::{ReadBy, RecordPosition};
use crate::service::routing::replays::ReplayedChunk;
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

/// An event of the log.
struct LoggedEvent {
    place: (i32, i64),
    conversation: String,
    position: ConversationPosition,
}

/// A client with one session at a time, which keeps its last cursor.
struct ReturningAlice {
    slot: Option<u32>,
    replay: Option<Receiver<ReplayedChunk>>,
    cursor: Cursor,
    got: BTreeSet<(i32, i64)>,
    /// What was replayed to the session, and what came live, each in its order.
    replayed: Vec<(i32, i64)>,
    live: Vec<(i32, i64)>,
    /// Cursors that expired, and replays that were complete.
    expired: usize,
    complete: usize,
}

impl ReturningAlice {
    fn connect(&mut self, world: &mut RouterWorld) {
        self.slot = Some(world.connect("alice", "phone", 0));
        self.replay = Some(world.replay("alice", self.cursor.clone()));
        (self.replayed, self.live) = (Vec::new(), Vec::new());
    }

    /// Live events are held during the replay, and what was replayed is not sent again.
    fn check_order(&self, places: &HashMap<Vec<u8>, LoggedEvent>) {
        let is_new = |place: &&(i32, i64)| !self.replayed.contains(place);
        let sent = self.replayed.iter().chain(self.live.iter().filter(is_new));
        let conversations: HashMap<_, _> =
            places.values().map(|event| (event.place, &event.conversation)).collect();
        let mut last = HashMap::new();
        for place in sent {
            let before = last.insert(conversations[place], *place);
            assert!(before < Some(*place), "{place:?} behind {before:?} of its conversation");
        }
    }

    fn disconnect(&mut self, world: &RouterWorld, places: &HashMap<Vec<u8>, LoggedEvent>) {
        self.check_order(places);
        if let Some(slot) = self.slot.take() {
            world.disconnect("alice", "phone", 0, slot);
        }
        self.replay = None;
    }

    /// Takes what the shard has got.
    fn receive(&mut self, world: &mut RouterWorld, places: &HashMap<Vec<u8>, LoggedEvent>) {
        for event in world.delivered(0) {
            if self.slot.is_some_and(|slot| event.slots.contains(&slot)) {
                let LoggedEvent { place, position, .. } = &places[&event.value];
                assert_eq!(
                    event.position,
                    Some(*position),
                    "what was replayed is recognised by it"
                );
                self.got.insert(*place);
                self.live.push(*place);
            }
            event.ticket.into_iter().for_each(|ticket| world.report(0, ticket));
        }
        let is_live = self.slot.is_some() && self.replay.is_none();
        if let Some(cursor) = world.routed.cursor().filter(|_| is_live) {
            self.cursor = cursor;
        }
    }

    /// Takes a chunk of the replay, if there is one. `all`: what catch-up by sequences would bring.
    fn pull(&mut self, world: &RouterWorld, all: &BTreeSet<(i32, i64)>) {
        let Some(replay) = &mut self.replay else { return };
        match world.try_next_chunk(replay) {
            None => return,
            Some(Ok(Some(records))) => {
                let places = records.iter().map(|record| (record.partition, record.offset));
                self.replayed.extend(places.clone());
                self.got.extend(places);
                return;
            }
            Some(Ok(None)) => self.complete += 1,
            Some(Err(_)) => {
                self.expired += 1;
                self.got.extend(all);
                // By sequences only messages come, and their order is not that of the log.
                (self.replayed, self.live) = (Vec::new(), Vec::new());
            }
        }
        self.replay = None;
    }
}

/// Whatever is parked, blocked or dropped from the tail, and whenever the session ends: the client gets everything, in the
/// order of each conversation, and no event twice in one session.
#[test]
fn client_that_returns_with_its_last_cursor_misses_nothing() {
    let (mut complete, mut expired, mut parked) = (0, 0, 0);
    for seed in 0..60_u64 {
        let mut state = seed * 2 + 1;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let bytes = [8_000, 1 << 20][random(2)];
        let mut world = RouterWorld::new(With { tails: Some((bytes, 2)), ..TAILS });
        let logs = [world.assign(0).0, world.assign(1).0];
        let (mut offsets, mut sequence) = ([0_i64; 2], 0);
        let (mut places, mut concerned) = (HashMap::new(), BTreeSet::new());
        let cursor = world.cursor();
        let mut alice = ReturningAlice {
            slot: None,
            replay: None,
            cursor,
            got: BTreeSet::new(),
            replayed: Vec::new(),
            live: Vec::new(),
            expired: 0,
            complete: 0,
        };
        let mut conversations = [Vec::new(), Vec::new()];
        for _ in 0..400 {
            match random(12) {
                0..4 => {
                    let partition = random(2);
                    sequence += 1;
                    // A conversation that is not known yet, or one of the last three.
                    let known: &mut Vec<String> = &mut conversations[partition];
                    let back = 1 + random(3);
                    if known.len() < back || random(4) == 0 {
                        known.push(format!("c{sequence}"));
                        let members: &[&str] =
                            if random(3) > 0 { &["alice", "bob"] } else { &["bob"] };
                        world.conversations.set(&known[known.len() - 1], members);
                    }
                    let conversation = known[known.len() - back.min(known.len())].clone();
                    let value = message(&conversation, sequence);
                    let place = (partition as i32, offsets[partition]);
                    let position = log_position("events", place.0, place.1);
                    if world.conversations.has(&conversation, "alice") {
                        concerned.insert(place);
                    }
                    places.insert(value.clone(), LoggedEvent { place, conversation, position });
                    append(&logs[partition], place.1, value);
                    offsets[partition] += 1 + random(2) as i64;
                }
                4 => {
                    let fails = random(2) == 0;
                    world.conversations.failing.store(fails, Ordering::Relaxed);
                }
                5 if alice.slot.is_none() => alice.connect(&mut world),
                5 if random(3) == 0 => alice.disconnect(&world, &places),
                6 | 7 => alice.receive(&mut world, &places),
                8 => {
                    for _ in 0..4 {
                        world.ahead_ms += 10;
                        world.turn();
                        alice.pull(&world, &concerned);
                    }
                }
                9 => world.ahead_ms += 100,
                _ => drop(world.turn()),
            }
            parked += world.counters.conversations_waiting.get();
        }
        world.conversations.failing.store(false, Ordering::Relaxed);
        if alice.slot.is_none() {
            alice.connect(&mut world);
        }
        for _ in 0..5_000 {
            world.ahead_ms += 5;
            world.turn();
            alice.receive(&mut world, &places);
            alice.pull(&world, &concerned);
            if alice.replay.is_none() && alice.got == concerned {
                break;
            }
        }
        alice.check_order(&places);
        let missed: Vec<_> = concerned.difference(&alice.got).collect();
        assert!(missed.is_empty(), "seed {seed}: {missed:?}");
        assert_eq!(alice.got, concerned, "seed {seed}: nothing else");
        (complete, expired) = (complete + alice.complete, expired + alice.expired);
    }
    assert!(complete > 100 && expired > 10 && parked > 100, "{complete} {expired} {parked}");
}
