//! Returns to a node that has filled its tails from Kafka, and knows no members.

use std::collections::BTreeMap;
use std::time::Instant;

use tokio::sync::mpsc::Receiver;

use super::world::{FakePartition, RouterWorld, With, created, message};
use crate::domain::cursor::{Cursor, CursorExpired, TopicId};
use crate::service::events::timestamp::unix_ms;
use crate::service::members::membership::{ReadBy, RecordPosition};
use crate::service::routing::replays::ReplayedChunk;
use crate::service::routing::router::TailFill;

const FILLED: With = With {
    no_service: false,
    gated: false,
    user_lists: true,
    nodes: false,
    dead_letters: false,
    window: None,
    event_bytes: None,
    parked: None,
    forwards: None,
    tails: Some((1 << 20, 3)),
};

fn append(log: &FakePartition, offset: i64, value: Vec<u8>) {
    log.append_at(offset, 1_000 + offset as u64, Some("key"), value);
}

/// A node that was started after these records, and a cursor from before them.
fn restarted(with: With, records: &[Vec<u8>]) -> (RouterWorld, Cursor) {
    let mut before = RouterWorld::new(FILLED);
    let (log, _) = before.assign(0);
    append(&log, 0, created("before", &["nobody"]));
    let cursor = before.cursor();
    let mut world = RouterWorld::new(with);
    let (log, _) = world.assign_from(0, 1 + records.len() as i64, Some(TailFill::new(0)));
    append(&log, 0, created("before", &["nobody"]));
    for (offset, record) in (1..).zip(records) {
        append(&log, offset, record.clone());
    }
    world.run_until_idle();
    (world, cursor)
}

type Returned = Result<Vec<(i32, i64)>, CursorExpired>;

fn all(world: &mut RouterWorld, users: &[&str], since: &Cursor) -> Vec<Returned> {
    let mut chunks: Vec<Receiver<ReplayedChunk>> =
        users.iter().map(|user| world.replay(user, since.clone())).collect();
    chunks.iter_mut().map(|chunks| world.replayed(chunks)).collect()
}

/// Promise: “A conversation whose members cannot be fetched holds up nobody who returns.”
#[test]
fn conversation_without_members_holds_up_nobody() {
    let records = [("x", 1), ("y", 1), ("x", 2), ("y", 2)].map(|(of, at)| message(of, at));
    // More users than conversations, and fewer: the members are requested first, or not at all.
    for users in [&["alice", "bob", "carol", "dave"][..], &["alice"], &["bob"]] {
        let (mut world, since) = restarted(FILLED, &records);
        world.conversations.set("x", &["alice", "bob"]);
        world.conversations.set("y", &["bob", "carol"]);
        world.conversations.failing_for.lock().unwrap().insert("y".into());
        let from = Instant::now();
        let got = all(&mut world, users, &since);
        let expected = |user: &&str| -> Returned {
            Ok(match *user {
                "alice" => vec![(0, 1), (0, 3)],
                "bob" => vec![(0, 1), (0, 2), (0, 3), (0, 4)],
                "carol" => vec![(0, 2), (0, 4)],
                _ => Vec::new(),
            })
        };
        assert_eq!(got, users.iter().map(expected).collect::<Vec<_>>());
        let waited_ms = world.ahead_ms + from.elapsed().as_millis() as u64;
        assert!(waited_ms < 30_000, "as long as records wait: {waited_ms} ms");
    }
}

/// Promise: “A node asks the conversation service at most once for each session that returns with a cursor”
#[test]
fn return_costs_at_most_one_request_for_each_session() {
    let names: Vec<String> = (0..100).map(|number| format!("c{number}")).collect();
    // Each of them twice: 20 chunks and more for each user.
    let records: Vec<_> = names.iter().chain(&names).map(|name| message(name, 7)).collect();
    let (mut world, since) = restarted(FILLED, &records);
    names.iter().for_each(|name| world.conversations.set(name, &["alice", "bob", "carol"]));
    let got = all(&mut world, &["alice", "bob", "carol", "dave"], &since);
    let every: Vec<_> = (1..=200).map(|offset| (0, offset)).collect();
    assert_eq!(got, [Ok(every.clone()), Ok(every.clone()), Ok(every), Ok(Vec::new())]);
    let mut listed = world.conversations.listed();
    listed.sort_unstable();
    assert_eq!(listed, ["alice", "bob", "carol", "dave"]);
    assert!(world.conversations.requested().is_empty());
}

/// The follower has read the creation of each conversation: nothing is requested, however long the tail is.
#[test]
fn return_costs_no_request_for_conversations_whose_members_are_known() {
    let names: Vec<String> = (0..100).map(|number| format!("c{number}")).collect();
    let records: Vec<_> = names.iter().cycle().take(2_500).map(|of| message(of, 7)).collect();
    let (mut world, since) = restarted(FILLED, &records);
    for (offset, name) in (0..).zip(&names) {
        let position = RecordPosition { topic: 1, partition: 0, offset };
        world.membership.created(name, &["alice"], ReadBy::Follower(position), unix_ms());
    }
    let got = all(&mut world, &["alice", "bob"], &since);
    assert_eq!(got, [Ok((1..=2_500).map(|at| (0, at)).collect()), Ok(Vec::new())]);
    assert!(world.conversations.requested().is_empty());
    assert!(world.conversations.listed().is_empty());
}

#[test]
fn members_of_few_conversations_are_requested_for_many_users() {
    let records = [message("x", 1), message("y", 1), message("x", 2)];
    let (mut world, since) = restarted(FILLED, &records);
    world.conversations.set("x", &["u0", "u1"]);
    world.conversations.set("y", &["u2"]);
    let users = ["u0", "u1", "u2", "u3", "u4"];
    let got = all(&mut world, &users, &since);
    let expected = [vec![1, 3], vec![1, 3], vec![2], vec![], vec![]];
    let expected = expected.map(|offsets| Ok(offsets.into_iter().map(|at| (0, at)).collect()));
    assert_eq!(got, expected);
    let mut requested = world.conversations.requested();
    requested.sort_unstable();
    assert_eq!(requested, ["x", "y"], "once each");
    assert!(world.conversations.listed().is_empty());
}

#[test]
fn only_the_user_whose_list_cannot_be_fetched_waits_and_expires() {
    let records: Vec<_> = (0..40).map(|number| message(&format!("c{number}"), 1)).collect();
    let (mut world, since) = restarted(FILLED, &records);
    world.conversations.set("c3", &["alice", "bob"]);
    world.conversations.failing_for.lock().unwrap().insert("bob".into());
    let mut bobs = world.replay("bob", since.clone());
    let got = all(&mut world, &["alice"], &since);
    assert_eq!(got, [Ok(vec![(0, 4)])]);
    assert!(world.ahead_ms < 29_000 && bobs.try_recv().is_err(), "this one waits");
    world.step_ms = 1_000;
    assert_eq!(world.replayed(&mut bobs), Err(CursorExpired::MembersUnknown));
    assert!(world.ahead_ms >= 29_000);
}

/// A list from before a partition was assigned may lack a conversation that was created in between.
#[test]
fn list_is_not_used_for_a_partition_that_was_assigned_later() {
    let records: Vec<_> = (0..40).map(|number| message(&format!("c{number}"), 1)).collect();
    let (mut world, since) = restarted(FILLED, &records);
    world.conversations.set("c3", &["alice"]);
    assert_eq!(all(&mut world, &["alice"], &since), [Ok(vec![(0, 4)])]);
    assert_eq!(all(&mut world, &["alice"], &since), [Ok(vec![(0, 4)])]);
    assert_eq!(world.conversations.listed(), ["alice"], "reused");
    world.conversations.set("c5", &["alice"]);
    world.assign(1);
    world.run_until_idle();
    assert_eq!(all(&mut world, &["alice"], &since), [Ok(vec![(0, 4), (0, 6)])]);
    assert_eq!(world.conversations.listed(), ["alice", "alice"]);
}

/// Whichever way is taken, users get what they would have got live.
#[test]
fn users_get_the_same_by_lists_and_by_members() {
    for seed in 0..20_u64 {
        let mut state = seed * 2 + 1;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let users = ["u0", "u1", "u2", "u3", "u4", "u5"];
        let conversations: Vec<(String, Vec<&'static str>)> = (0..=random(60))
            .map(|number| {
                let members = users.into_iter().filter(|_| random(3) == 0).collect();
                (format!("c{number}"), members)
            })
            .collect();
        let mut received: BTreeMap<&str, Vec<(i32, i64)>> = BTreeMap::new();
        let mut records = Vec::new();
        for offset in 1..=random(150) as i64 + 1 {
            let (name, members) = &conversations[random(conversations.len())];
            records.push(match random(10) {
                0 => created(name, members),
                _ => message(name, offset),
            });
            members.iter().for_each(|user| received.entry(user).or_default().push((0, offset)));
        }
        for user_lists in [true, false] {
            let (mut world, since) = restarted(With { user_lists, ..FILLED }, &records);
            for (name, members) in conversations.iter().filter(|(_, members)| !members.is_empty()) {
                world.conversations.set(name, members);
            }
            let from = since.get(TopicId::of("events"), 0).unwrap().next;
            assert_eq!(from, 1);
            let returning = &users[..random(users.len()) + 1];
            let got = all(&mut world, returning, &since);
            for (user, got) in returning.iter().zip(got) {
                let expected = received.get(user).cloned().unwrap_or_default();
                assert_eq!(got, Ok(expected), "seed {seed}, {user}, by lists: {user_lists}");
            }
        }
    }
}
