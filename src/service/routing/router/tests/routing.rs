use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::world::{RouterWorld, With, changed, created, message};
use crate::handoff::Pushed;
use crate::service::backends::ports::{RouterInbox as _, RouterInput};
use crate::service::events::timestamp::unix_ms;
use crate::service::members::membership::Lookup;
use crate::service::routing::router::RouterHandle;

#[test]
fn record_goes_once_to_each_shard_and_is_done_when_all_have_reported() {
    let mut world = RouterWorld::new(With::default());
    let phone = world.connect("alice", "phone", 0);
    let desk = world.connect("alice", "desk", 1);
    let bob = world.connect("bob", "phone", 1);
    world.connect("eve", "phone", 1);
    let (log, committable) = world.assign(0);
    log.append(5, created("c", &["alice", "bob"]));
    log.append(7, message("c", 1));
    world.run_until_idle();

    let first = world.delivered(0);
    let second = world.delivered(1);
    assert_eq!(first.iter().map(|event| &event.slots[..]).collect::<Vec<_>>(), [[phone], [phone]]);
    assert_eq!(second.len(), 2);
    assert_eq!(second[1].slots, [desk, bob]);
    assert_eq!(second[1].value, message("c", 1), "unchanged");
    assert!(world.conversations.requested().is_empty(), "the creation event contains the members");

    assert_eq!(committable.get(), Some(0));
    world.report(1, second[1].ticket.unwrap());
    world.report(0, first[1].ticket.unwrap());
    world.report(0, first[0].ticket.unwrap());
    world.run_until_idle();
    assert_eq!(committable.get(), Some(0), "one shard has not sent the first");
    world.report(1, second[0].ticket.unwrap());
    world.run_until_idle();
    assert_eq!(committable.get(), Some(8));
    assert_eq!(world.counters.recipients.get(), 6);
}

#[test]
fn record_without_recipients_on_this_node_is_done_at_once() {
    let mut world = RouterWorld::new(With::default());
    world.conversations.set("c", &["zoe"]);
    let (log, committable) = world.assign(0);
    log.append(0, message("c", 1));
    world.until("done", |_| committable.get() == Some(1));
    assert_eq!(world.counters.deliveries.get(), 0);
}

#[test]
fn added_and_removed_users_get_their_event_and_the_removed_user_nothing_after_it() {
    let mut world = RouterWorld::new(With::default());
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 0));
    let (log, _) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, changed("c", "bob", true));
    log.append(2, message("c", 1));
    log.append(3, changed("c", "bob", false));
    world.run_until_idle();
    assert_eq!(world.taken(0), [vec![alice], vec![alice, bob], vec![alice, bob], vec![alice, bob]]);
    log.append(4, message("c", 2));
    world.run_until_idle();
    assert_eq!(world.taken(0), [[alice]]);
    // The record is read again, as by a new owner: the list does not go back.
    log.append(1, changed("c", "bob", true));
    log.append(5, message("c", 3));
    world.run_until_idle();
    assert_eq!(world.taken(0), [vec![alice, bob], vec![alice]]);
    assert_eq!(world.counters.records_repeated.get(), 1);
}

#[test]
fn change_of_an_uncached_conversation_fetches_the_complete_list() {
    let mut world = RouterWorld::new(With::default());
    let alice = world.connect("alice", "a", 0);
    let bob = world.connect("bob", "b", 0);
    world.conversations.set("c", &["alice", "bob"]);
    let (log, _) = world.assign(0);
    log.append(0, changed("c", "bob", true));
    log.append(1, message("c", 1));
    world.until("delivered", |world| world.counters.deliveries.get() == 2);
    assert_eq!(world.taken(0), [[alice, bob], [alice, bob]]);
}

#[test]
fn all_members_are_handed_to_other_nodes_and_the_offset_waits_for_the_hand_off() {
    let mut world = RouterWorld::new(With { nodes: true, ..With::default() });
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    log.append(1, changed("c", "carol", false));
    world.run_until_idle();
    assert_eq!(world.taken(0).len(), 2, "deliveries on this node do not wait for other nodes");
    world.run_until_idle();
    {
        let handed = world.nodes.handed.lock().unwrap();
        assert_eq!(
            handed[0],
            (created("c", &["alice", "bob"]).into(), vec!["alice".into(), "bob".into()])
        );
        assert_eq!(handed[1].1, ["alice", "bob", "carol"], "the removed user gets the event");
    }
    assert_eq!(committable.get(), Some(0));
    let done = world.nodes.pending.lock().unwrap().remove(0);
    done();
    world.run_until_idle();
    assert_eq!(committable.get(), Some(1));
    // The other node never answers, so the deadline passes.
    world.ahead_ms = 60_000;
    world.run_until_idle();
    assert_eq!(committable.get(), Some(2));
    assert_eq!(world.counters.forwards_expired.get(), 1);
}

#[test]
fn nothing_is_offered_to_other_nodes_while_none_can_exist() {
    let mut world = RouterWorld::new(With { nodes: true, ..With::default() });
    world.connect("alice", "a", 0);
    world.nodes.none.store(true, Ordering::Relaxed);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    world.run_until_idle();
    assert_eq!(world.taken(0).len(), 1);
    world.run_until_idle();
    assert_eq!(committable.get(), Some(1), "it waits for nobody");
    world.nodes.none.store(false, Ordering::Relaxed);
    log.append(1, message("c", 1));
    world.run_until_idle();
    let handed = world.nodes.handed.lock().unwrap();
    assert_eq!(handed.len(), 1);
    assert_eq!(handed[0].1, ["alice", "bob"]);
}

#[test]
fn record_that_is_not_offered_to_other_nodes_is_lost_for_its_members() {
    let with = With { nodes: true, forwards: Some(1), ..With::default() };
    let mut world = RouterWorld::new(with);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    log.append(1, message("c", 1));
    world.run_until_idle();
    assert_eq!(world.nodes.handed.lock().unwrap().len(), 1);
    assert_eq!(*world.nodes.lost.lock().unwrap(), ["alice", "bob"]);
    assert_eq!(world.counters.forwards_refused.get(), 1);
    let done = world.nodes.pending.lock().unwrap().remove(0);
    done();
    world.run_until_idle();
    assert_eq!(committable.get(), Some(2), "the lost one is not waited for");
}

#[test]
fn record_from_another_node_goes_to_sessions_of_this_node_only() {
    let mut world = RouterWorld::new(With { nodes: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    world.conversations.set("c", &["alice", "bob"]);
    let handle = RouterHandle::new(vec![world.control.clone()]);
    for sequence in 1..4 {
        let input = RouterInput::Remote { value: message("c", sequence).into() };
        assert_eq!(handle.send(input), Pushed::Accepted);
    }
    world.until("delivered", |world| world.counters.deliveries.get() == 3);
    let delivered = world.delivered(0);
    let values: Vec<_> = delivered.iter().map(|event| event.value.clone()).collect();
    assert_eq!(values, [message("c", 1), message("c", 2), message("c", 3)]);
    assert!(delivered.iter().all(|event| event.slots == [alice] && event.ticket.is_none()));
    assert!(world.nodes.handed.lock().unwrap().is_empty());
}

#[test]
fn removal_from_another_node_applies_before_it_is_read_from_kafka() {
    let mut world = RouterWorld::new(With::default());
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 0));
    let (log, _) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    world.run_until_idle();
    world.taken(0);
    world.conversations.set("c", &["alice"]);
    let handle = RouterHandle::new(vec![world.control.clone()]);
    for value in [changed("c", "bob", false), message("c", 1)] {
        assert_eq!(handle.send(RouterInput::Remote { value: value.into() }), Pushed::Accepted);
    }
    world.until("delivered", |world| world.counters.deliveries.get() == 3);
    assert_eq!(world.taken(0), [vec![alice, bob], vec![alice]]);
}

#[test]
fn event_for_given_users_needs_no_conversation() {
    let mut world = RouterWorld::new(With::default());
    let bob = world.connect("bob", "b", 1);
    world.connect("alice", "a", 0);
    let handle = RouterHandle::new(vec![world.control.clone()]);
    let value: Bytes = message("", 0).into();
    let users = vec![Arc::from("bob"), Arc::from("zoe")];
    assert_eq!(handle.send(RouterInput::ToUsers { value, users }), Pushed::Accepted);
    world.run_until_idle();
    assert_eq!(world.taken(1), [[bob]]);
    assert!(world.taken(0).is_empty());
}

#[test]
fn unknown_event_type_is_routed_by_the_record_key() {
    let mut world = RouterWorld::new(With { dead_letters: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append_at(1, 0, Some("c"), vec![0x08, 0x1f]);
    log.append_at(2, 0, None, vec![0x08, 0x1f]);
    log.append_at(3, 0, Some("c"), vec![0x0c]);
    log.append(4, message("c", 1));
    world.run_until_idle();
    assert_eq!(world.taken(0), [[alice], [alice], [alice]]);
    world.run_until_idle();
    assert_eq!(*world.dead_letters.0.lock().unwrap(), [(2, "no_conversation"), (3, "undecodable")]);
    assert_eq!(world.counters.records_undecodable.get(), 1);
    assert_eq!(committable.get(), Some(5));
}

/// A membership event without a user goes to the members, as every event does, and changes no list.
#[test]
fn membership_event_without_a_user_changes_no_list() {
    let mut world = RouterWorld::new(With::default());
    let alice = world.connect("alice", "phone", 0);
    let (log, _) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, changed("c", "", true));
    log.append(2, changed("c", "", false));
    world.run_until_idle();
    let delivered = world.delivered(0);
    assert_eq!(delivered.len(), 3);
    assert!(delivered.iter().all(|event| event.slots == [alice]));
    assert_eq!(delivered[1].value, changed("c", "", true), "unchanged");
    match world.membership.lookup("c", None, unix_ms()) {
        Lookup::Members(members) => assert_eq!(members.iter().collect::<Vec<_>>(), ["alice"]),
        other => panic!("{other:?}"),
    }
}
