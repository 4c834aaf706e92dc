//! A client that returns with its last cursor, whatever happens meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;

use tokio::sync::mpsc::Receiver;

use super::returning::{TAILS, append};
use super::world::{RouterWorld, With, message};
use crate::domain::cursor::Cursor;
use crate::domain::ids::ConversationPosition;
use crate::service::events::conversation_key::log_position;
use crate::service::routing::replays::ReplayedChunk;

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

/// Whatever is parked, blocked or dropped from the tail, and whenever the session ends: the client gets everything, in
/// the order of each conversation, and no event twice in one session.
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
