use std::sync::atomic::Ordering;
use std::time::Duration;

use super::world::{RING_SLOTS, RouterWorld, With, created, message, name};
use crate::service::events::timestamp::unix_ms;

#[test]
fn unknown_conversation_holds_its_partition_in_order_and_no_other() {
    let mut world = RouterWorld::new(With { gated: true, ..With::default() });
    world.connect("alice", "a", 0);
    world.conversations.set("slow", &["alice"]);
    world.conversations.set("later", &["alice"]);
    let (first, _) = world.assign(0);
    let (second, _) = world.assign(1);
    first.append(0, message("slow", 1));
    first.append(1, created("known", &["alice"]));
    first.append(2, message("later", 1));
    first.append(3, message("slow", 2));
    second.append(0, created("other", &["alice"]));
    world.until("asked", |world| world.conversations.asked().len() == 2);
    // Once each, also the one behind the front.
    assert_eq!(world.conversations.asked(), ["slow", "later"]);
    let delivered = world.delivered(0);
    assert_eq!(delivered.len(), 1);
    assert_eq!(delivered[0].value, created("other", &["alice"]));

    world.conversations.open(2);
    world.until("delivered", |world| world.counters.deliveries.get() == 5);
    let values: Vec<_> = world.delivered(0).into_iter().map(|event| event.value).collect();
    let sent =
        [message("slow", 1), created("known", &["alice"]), message("later", 1), message("slow", 2)];
    assert_eq!(values, sent);
}

#[test]
fn service_that_fails_is_asked_again_and_the_record_then_routed() {
    let mut world = RouterWorld::new(With::default());
    let alice = world.connect("alice", "a", 0);
    world.conversations.set("c", &["alice"]);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let (log, _) = world.assign(0);
    log.append(0, message("c", 1));
    world.until("asked three times", |world| world.conversations.asked().len() >= 3);
    world.conversations.failing.store(false, Ordering::Relaxed);
    world.until("delivered", |world| world.counters.deliveries.get() == 1);
    assert_eq!(world.taken(0), [[alice]]);
}

#[test]
fn record_that_cannot_be_routed_is_given_up_after_the_stated_time() {
    for letters in [true, false] {
        let mut world = RouterWorld::new(With { letters, ..With::default() });
        let alice = world.connect("alice", "a", 0);
        world.conversations.failing.store(true, Ordering::Relaxed);
        let (log, committable) = world.assign(0);
        log.append(0, message("c", 1));
        log.append(1, created("d", &["alice"]));
        world.until("asked", |world| !world.conversations.asked().is_empty());
        assert!(world.taken(0).is_empty());
        world.ahead_ms = 29_000;
        world.settle();
        assert!(world.taken(0).is_empty());
        world.ahead_ms = 31_000;
        world.settle();
        assert_eq!(world.taken(0), [[alice]]);
        world.settle();
        assert_eq!(committable.get(), Some(2));
        assert_eq!(world.counters.records_members_unavailable.get(), 1);
        let expected = if letters { vec![(0, "members_unavailable")] } else { vec![] };
        assert_eq!(*world.letters.0.lock().unwrap(), expected);
    }
}

#[test]
fn conversation_that_does_not_exist_is_passed_at_once() {
    let mut world = RouterWorld::new(With::default());
    let (log, committable) = world.assign(0);
    log.append(0, message("ghost", 1));
    world.until("passed", |_| committable.get() == Some(1));
    assert_eq!(world.counters.records_conversation_absent.get(), 1);
}

#[test]
fn without_a_conversation_service_a_creation_that_is_read_later_is_waited_for() {
    let mut world = RouterWorld::new(With { alone: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    let (messages, committable) = world.assign(0);
    let (conversations, _) = world.assign(1);
    messages.append(0, message("c", 1));
    world.settle();
    assert_eq!(committable.get(), Some(0), "its creation may still come");
    conversations.append(0, created("c", &["alice"]));
    world.settle();
    assert_eq!(world.taken(0), [[alice], [alice]]);

    messages.append(1, message("never", 1));
    messages.append_at(2, unix_ms() - 10_000, None, message("never", 2));
    world.settle();
    assert_eq!(world.counters.records_members_unknown.get(), 0);
    world.ahead_ms = 2_001;
    world.settle();
    assert_eq!(world.counters.records_members_unknown.get(), 2);
    world.until("passed", |_| committable.get() == Some(3));

    // A publisher whose clock is an hour ahead holds up its partition no longer.
    messages.append_at(3, unix_ms() + 3_600_000, None, message("never", 3));
    world.settle();
    assert_eq!(committable.get(), Some(3));
    world.ahead_ms += 2_001;
    world.until("passed", |_| committable.get() == Some(4));
}

#[test]
fn full_ring_stops_its_partitions_and_room_lets_them_go_on() {
    let mut world = RouterWorld::new(With::default());
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 1));
    let (full, _) = world.assign(0);
    let (free, _) = world.assign(1);
    full.append(0, created("c", &["alice"]));
    free.append(0, created("d", &["bob"]));
    for offset in 1..=2 * RING_SLOTS as i64 {
        full.append(offset, message("c", offset));
    }
    world.settle();
    free.append(1, message("d", 1));
    world.settle();
    assert_eq!(world.taken(1), [[bob], [bob]]);
    // One record waits in the lane, the rest in the partition.
    assert_eq!(full.len(), 2 * RING_SLOTS + 1 - RING_SLOTS - 1);
    assert_eq!(world.counters.records_waiting.get(), 1);
    let mut received = 0;
    while received < 2 * RING_SLOTS + 1 {
        let taken = world.taken(0);
        assert!(!taken.is_empty() && taken.iter().all(|slots| slots == &[alice]));
        received += taken.len();
        world.settle();
    }
    assert_eq!(received, 2 * RING_SLOTS + 1);
}

#[test]
fn events_under_way_take_no_more_memory_than_they_may() {
    let mut world = RouterWorld::new(With { event_bytes: Some(1), ..With::default() });
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 1));
    let (log, _) = world.assign(0);
    let (other, _) = world.assign(1);
    log.append(0, created("c", &["alice"]));
    world.settle();
    other.append(0, created("d", &["bob"]));
    world.settle();
    assert_eq!(other.len(), 1, "one may go beyond, and nothing follows it");
    assert!(world.counters.event_bytes.get() > 0);
    assert!(world.counters.waits_for_memory.get() > 0);
    // Whoever has it in hand lets go of it.
    assert_eq!(world.taken(0), [[alice]]);
    world.settle();
    assert_eq!(world.taken(1), [[bob]]);
    world.settle();
    assert_eq!(world.counters.event_bytes.get(), 0);
}

#[test]
fn window_bounds_what_is_under_way() {
    let mut world = RouterWorld::new(With { window: Some(2), ..With::default() });
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, message("c", 1));
    log.append(2, message("c", 2));
    world.settle();
    assert_eq!(log.len(), 1);
    assert_eq!(world.taken(0).len(), 2);
    world.settle();
    assert_eq!((log.len(), committable.get()), (0, Some(2)));
}

#[test]
fn revoked_partition_finishes_what_is_under_way_and_leaves_the_rest() {
    let mut world = RouterWorld::new(With { gated: true, ..With::default() });
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, message("unknown", 1));
    log.append(2, message("c", 1));
    world.settle();
    let released = world.control.revoke(name(0), Duration::from_secs(60));
    world.settle();
    assert!(released.try_recv().is_err(), "the first is under way");
    log.append(3, message("c", 2));
    world.taken(0);
    world.settle();
    assert_eq!(released.try_recv(), Ok(true));
    assert_eq!(committable.get(), Some(1), "for the next owner");
    assert_eq!(log.len(), 1, "nothing more is taken");
    // Who asks for what is not there is released at once.
    let released = world.control.revoke(name(0), Duration::from_secs(60));
    world.settle();
    assert!(released.try_recv().is_ok());
}

#[test]
fn revoked_partition_is_let_go_when_its_time_is_over() {
    let mut world = RouterWorld::new(With::default());
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    world.settle();
    let delivered = world.delivered(0);
    let released = world.control.revoke(name(0), Duration::from_secs(1));
    world.settle();
    assert!(released.try_recv().is_err());
    world.ahead_ms = 2_000;
    world.settle();
    assert_eq!(released.try_recv(), Ok(false));
    // Its report comes too late to count, and harms nobody who has the number of the lane now.
    let (_, successor) = world.assign(1);
    world.report(0, delivered[0].ticket.unwrap());
    world.settle();
    assert_eq!((committable.get(), successor.get()), (Some(0), Some(0)));
    assert_eq!(world.counters.records_under_way.get(), 0);
}

#[test]
fn backlog_waits_for_other_nodes_that_get_on() {
    let mut world = RouterWorld::new(With { nodes: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    let (log, _) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    world.settle();
    assert_eq!(world.taken(0), [[alice]]);
    world.nodes.full.store(true, Ordering::Relaxed);
    log.append(1, message("c", 1));
    log.append(2, message("c", 2));
    world.settle();
    assert!(world.taken(0).is_empty(), "nobody is served twice, so nobody is served yet");
    assert_eq!(world.nodes.handed.lock().unwrap().len(), 1);
    assert_eq!(world.counters.waits_for_hand_offs.get(), 1);
    world.nodes.full.store(false, Ordering::Relaxed);
    world.settle();
    assert_eq!(world.taken(0), [[alice], [alice]]);
    assert_eq!(world.nodes.handed.lock().unwrap().len(), 3);
}
