use std::sync::atomic::Ordering;
use std::time::Duration;

use super::world::{RING_SLOTS, RouterWorld, With, created, message, name};
use crate::service::events::timestamp::unix_ms;

/// Promise: “A conversation whose members cannot be fetched holds up no other:”
#[test]
fn unknown_conversation_waits_in_order_and_nothing_else_does() {
    let mut world = RouterWorld::new(With { gated: true, ..With::default() });
    world.connect("alice", "a", 0);
    world.conversations.set("slow", &["alice"]);
    world.conversations.set("later", &["alice"]);
    let (log, committable) = world.assign(0);
    log.append(0, message("slow", 1));
    log.append(1, created("known", &["alice"]));
    log.append(2, message("later", 1));
    log.append(3, message("slow", 2));
    log.append(4, message("known", 1));
    world.until("requested", |world| world.conversations.requested().len() == 2);
    // Once each, also for the second record.
    assert_eq!(world.conversations.requested(), ["slow", "later"]);
    let values = |world: &mut RouterWorld| -> Vec<_> {
        let delivered = world.delivered(0);
        for ticket in delivered.iter().filter_map(|event| event.ticket) {
            world.report(0, ticket);
        }
        delivered.into_iter().map(|event| event.value).collect()
    };
    assert_eq!(values(&mut world), [created("known", &["alice"]), message("known", 1)]);
    world.run_until_idle();
    assert_eq!(world.counters.conversations_waiting.get(), 2);
    assert_eq!(committable.get(), Some(0), "nothing is committed past a parked record");

    world.conversations.open(1);
    world.until("delivered", |world| world.counters.deliveries.get() == 4);
    assert_eq!(values(&mut world), [message("slow", 1), message("slow", 2)]);
    world.until("committable", |_| committable.get() == Some(2));
    world.conversations.open(1);
    world.until("delivered", |world| world.counters.deliveries.get() == 5);
    assert_eq!(values(&mut world), [message("later", 1)]);
    world.until("all committable", |_| committable.get() == Some(5));
    assert_eq!(world.counters.conversations_waiting.get(), 0);
}

/// Each is given up 30 s after it was read, not one after the other.
#[test]
fn parked_records_wait_at_the_same_time() {
    let mut world = RouterWorld::new(With { dead_letters: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let (log, committable) = world.assign(0);
    for (offset, conversation) in [(0, "x"), (1, "y"), (2, "x"), (3, "x")] {
        log.append(offset, message(conversation, offset));
    }
    log.append(4, created("d", &["alice"]));
    world.run_until_idle();
    assert_eq!(world.taken(0), [[alice]], "at once");
    world.ahead_ms = 29_000;
    world.run_until_idle();
    assert!(world.dead_letters.0.lock().unwrap().is_empty());
    world.ahead_ms = 31_000;
    world.run_until_idle();
    assert_eq!(world.dead_letters.0.lock().unwrap().len(), 4);
    world.until("committable", |_| committable.get() == Some(5));
}

#[test]
fn conversation_with_too_many_parked_records_gives_up_its_oldest() {
    let with = With { dead_letters: true, parked: Some((100, 3)), ..With::default() };
    let mut world = RouterWorld::new(with);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let (log, _) = world.assign(0);
    log.append(0, message("other", 0));
    for offset in 1..=5 {
        log.append(offset, message("busy", offset));
    }
    world.run_until_idle();
    let given_up = [(1, "members_unavailable"), (2, "members_unavailable")];
    assert_eq!(*world.dead_letters.0.lock().unwrap(), given_up);
    assert_eq!(world.counters.records_waiting.get(), 4);
}

#[test]
fn partition_with_as_many_parked_records_as_it_may_have_is_not_read() {
    let mut world = RouterWorld::new(With { parked: Some((2, 9)), ..With::default() });
    let alice = world.connect("alice", "a", 0);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let (log, _) = world.assign(0);
    log.append(0, message("x", 1));
    log.append(1, message("y", 1));
    log.append(2, created("d", &["alice"]));
    world.run_until_idle();
    assert_eq!((log.len(), world.taken(0).len()), (1, 0));
    world.conversations.set("x", &["alice"]);
    world.conversations.set("y", &["alice"]);
    world.conversations.failing.store(false, Ordering::Relaxed);
    world.until("delivered", |world| world.counters.deliveries.get() == 3);
    assert_eq!(world.taken(0), [[alice], [alice], [alice]]);
}

/// A record may hold back the offset of its partition only as far as the window reaches.
#[test]
fn parked_record_at_the_end_of_the_window_is_given_up() {
    let with = With { dead_letters: true, window: Some(4), ..With::default() };
    let mut world = RouterWorld::new(with);
    let alice = world.connect("alice", "a", 0);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let (log, committable) = world.assign(0);
    log.append(0, message("x", 1));
    log.append(1, created("d", &["alice"]));
    for offset in 2..8 {
        log.append(offset, message("d", offset));
    }
    let mut delivered = 0;
    while delivered < 7 {
        world.run_until_idle();
        let taken = world.taken(0);
        assert!(!taken.is_empty() && taken.iter().all(|slots| slots == &[alice]));
        delivered += taken.len();
    }
    assert_eq!(*world.dead_letters.0.lock().unwrap(), [(0, "members_unavailable")]);
    world.until("committable", |_| committable.get() == Some(8));
}

#[test]
fn failed_request_for_members_is_retried_and_the_record_is_routed() {
    let mut world = RouterWorld::new(With::default());
    let alice = world.connect("alice", "a", 0);
    world.conversations.set("c", &["alice"]);
    world.conversations.failing.store(true, Ordering::Relaxed);
    let (log, _) = world.assign(0);
    log.append(0, message("c", 1));
    world.until("requested three times", |world| world.conversations.requested().len() >= 3);
    world.conversations.failing.store(false, Ordering::Relaxed);
    world.until("delivered", |world| world.counters.deliveries.get() == 1);
    assert_eq!(world.taken(0), [[alice]]);
}

#[test]
fn unroutable_record_is_given_up_after_the_configured_time() {
    for dead_letters in [true, false] {
        let mut world = RouterWorld::new(With { dead_letters, ..With::default() });
        let alice = world.connect("alice", "a", 0);
        world.conversations.failing.store(true, Ordering::Relaxed);
        let (log, committable) = world.assign(0);
        log.append(0, message("c", 1));
        log.append(1, created("d", &["alice"]));
        world.until("requested", |world| !world.conversations.requested().is_empty());
        assert_eq!(world.taken(0), [[alice]]);
        world.ahead_ms = 29_000;
        world.run_until_idle();
        assert_eq!(committable.get(), Some(0));
        world.ahead_ms = 31_000;
        world.run_until_idle();
        assert_eq!(committable.get(), Some(2));
        assert_eq!(world.counters.records_members_unavailable.get(), 1);
        let expected = if dead_letters { vec![(0, "members_unavailable")] } else { vec![] };
        assert_eq!(*world.dead_letters.0.lock().unwrap(), expected);
    }
}

#[test]
fn record_of_a_nonexistent_conversation_is_skipped_at_once() {
    let mut world = RouterWorld::new(With::default());
    let (log, committable) = world.assign(0);
    log.append(0, message("ghost", 1));
    world.until("passed", |_| committable.get() == Some(1));
    assert_eq!(world.counters.records_conversation_absent.get(), 1);
}

#[test]
fn without_a_conversation_service_a_record_waits_for_a_later_creation_event() {
    let mut world = RouterWorld::new(With { no_service: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    let (messages, committable) = world.assign(0);
    let (conversations, _) = world.assign(1);
    messages.append(0, message("c", 1));
    world.run_until_idle();
    assert_eq!(committable.get(), Some(0), "the creation event may still arrive");
    conversations.append(0, created("c", &["alice"]));
    world.run_until_idle();
    assert_eq!(world.taken(0), [[alice], [alice]]);

    messages.append(1, message("never", 1));
    messages.append_at(2, unix_ms() - 10_000, None, message("never", 2));
    world.run_until_idle();
    assert_eq!(world.counters.records_members_unknown.get(), 0);
    world.ahead_ms = 2_001;
    world.run_until_idle();
    assert_eq!(world.counters.records_members_unknown.get(), 2);
    world.until("passed", |_| committable.get() == Some(3));

    // A publisher whose clock is an hour ahead blocks its partition no longer than others.
    messages.append_at(3, unix_ms() + 3_600_000, None, message("never", 3));
    world.run_until_idle();
    assert_eq!(committable.get(), Some(3));
    world.ahead_ms += 2_001;
    world.until("passed", |_| committable.get() == Some(4));
}

#[test]
fn full_ring_blocks_its_partitions_until_it_has_room() {
    let mut world = RouterWorld::new(With::default());
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 1));
    let (full, _) = world.assign(0);
    let (free, _) = world.assign(1);
    full.append(0, created("c", &["alice"]));
    free.append(0, created("d", &["bob"]));
    for offset in 1..=2 * RING_SLOTS as i64 {
        full.append(offset, message("c", offset));
    }
    world.run_until_idle();
    free.append(1, message("d", 1));
    world.run_until_idle();
    assert_eq!(world.taken(1), [[bob], [bob]]);
    // One record waits in the lane, the rest in the partition.
    assert_eq!(full.len(), 2 * RING_SLOTS + 1 - RING_SLOTS - 1);
    assert_eq!(world.counters.records_waiting.get(), 1);
    let mut received = 0;
    while received < 2 * RING_SLOTS + 1 {
        let taken = world.taken(0);
        assert!(!taken.is_empty() && taken.iter().all(|slots| slots == &[alice]));
        received += taken.len();
        world.run_until_idle();
    }
    assert_eq!(received, 2 * RING_SLOTS + 1);
}

#[test]
fn memory_of_events_in_flight_is_bounded() {
    let mut world = RouterWorld::new(With { event_bytes: Some(1), ..With::default() });
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 1));
    let (log, _) = world.assign(0);
    let (other, _) = world.assign(1);
    log.append(0, created("c", &["alice"]));
    world.run_until_idle();
    other.append(0, created("d", &["bob"]));
    world.run_until_idle();
    assert_eq!(other.len(), 1, "one event may exceed the bound, and no other follows it");
    assert!(world.budget.charged() > 0);
    assert!(world.counters.waits_for_memory.get() > 0);
    // The shard drops the event, which frees its memory.
    assert_eq!(world.taken(0), [[alice]]);
    world.run_until_idle();
    assert_eq!(world.taken(1), [[bob]]);
    world.run_until_idle();
    assert_eq!(world.budget.charged(), 0);
}

#[test]
fn window_bounds_the_records_in_flight() {
    let mut world = RouterWorld::new(With { window: Some(2), ..With::default() });
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, message("c", 1));
    log.append(2, message("c", 2));
    world.run_until_idle();
    assert_eq!(log.len(), 1);
    assert_eq!(world.taken(0).len(), 2);
    world.run_until_idle();
    assert_eq!((log.len(), committable.get()), (0, Some(2)));
}

// Promise: “A client that does not read holds up no partition:”
#[test]
fn full_window_waits_for_sockets_for_a_second() {
    let with = With { window: Some(2), ..With::default() };
    let mut world = RouterWorld::new(with);
    let (alice, bob) = (world.connect("alice", "a", 0), world.connect("bob", "b", 1));
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, created("d", &["bob"]));
    for offset in 2..=4 {
        log.append(offset, message("d", offset));
    }
    world.run_until_idle();
    assert_eq!(world.taken(1), [[bob]]);
    world.run_until_idle();
    assert_eq!((world.taken(1).len(), committable.get()), (0, Some(0)));
    world.ahead_ms += 1_000;
    world.run_until_idle();
    let mut to_bob = 0;
    while to_bob < 3 {
        to_bob += world.taken(1).len();
        world.run_until_idle();
    }
    assert_eq!((log.len(), committable.get()), (0, Some(5)));
    assert_eq!(world.counters.records_not_awaited.get(), 1);
    // Its report changes nothing any more.
    assert_eq!(world.taken(0), [[alice]]);
    world.run_until_idle();
    assert_eq!(committable.get(), Some(5));
}

#[test]
fn full_window_waits_for_other_nodes() {
    let with = With { window: Some(1), nodes: true, ..With::default() };
    let mut world = RouterWorld::new(with);
    let alice = world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    log.append(1, message("c", 1));
    world.run_until_idle();
    world.ahead_ms += 2_000;
    world.run_until_idle();
    assert_eq!((log.len(), committable.get()), (1, Some(0)), "its hand-off is not done");
    let done = world.nodes.pending.lock().unwrap().remove(0);
    done();
    world.run_until_idle();
    assert_eq!((log.len(), committable.get()), (0, Some(1)), "only a socket has not taken it");
    assert_eq!(world.taken(0), [[alice], [alice]]);
}

#[test]
fn revoked_partition_waits_for_sockets_for_a_second() {
    let mut world = RouterWorld::new(With::default());
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, message("c", 1));
    world.run_until_idle();
    let released = world.control.revoke(name(0), Duration::from_secs(60));
    world.run_until_idle();
    assert!(released.try_recv().is_err());
    world.ahead_ms += 1_001;
    world.run_until_idle();
    assert_eq!((released.try_recv(), committable.get()), (Ok(true), Some(2)));
}

#[test]
fn revoked_partition_finishes_its_records_in_flight_and_leaves_the_rest() {
    let mut world = RouterWorld::new(With { gated: true, ..With::default() });
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    log.append(1, message("unknown", 1));
    log.append(2, message("c", 1));
    world.run_until_idle();
    let released = world.control.revoke(name(0), Duration::from_secs(60));
    world.run_until_idle();
    assert!(released.try_recv().is_err(), "the first record is in flight");
    log.append(3, message("c", 2));
    world.taken(0);
    world.run_until_idle();
    assert_eq!(released.try_recv(), Ok(true));
    assert_eq!(committable.get(), Some(1), "for the next owner");
    assert_eq!(log.len(), 1, "nothing more is taken");
    // Revoking an unknown partition returns at once.
    let released = world.control.revoke(name(0), Duration::from_secs(60));
    world.run_until_idle();
    assert!(released.try_recv().is_ok());
}

#[test]
fn revoked_partition_is_released_at_its_deadline() {
    let mut world = RouterWorld::new(With::default());
    world.connect("alice", "a", 0);
    let (log, committable) = world.assign(0);
    log.append(0, created("c", &["alice"]));
    world.run_until_idle();
    let delivered = world.delivered(0);
    let released = world.control.revoke(name(0), Duration::from_millis(500));
    world.run_until_idle();
    assert!(released.try_recv().is_err());
    world.ahead_ms = 501;
    world.run_until_idle();
    assert_eq!(released.try_recv(), Ok(false));
    // The late report is ignored; it does not affect the partition that reuses the slot.
    let (_, successor) = world.assign(1);
    world.report(0, delivered[0].ticket.unwrap());
    world.run_until_idle();
    assert_eq!((committable.get(), successor.get()), (Some(0), Some(0)));
    assert_eq!(world.counters.records_under_way.get(), 0);
}

#[test]
fn backlog_waits_for_room_to_other_nodes() {
    let mut world = RouterWorld::new(With { nodes: true, ..With::default() });
    let alice = world.connect("alice", "a", 0);
    let (log, _) = world.assign(0);
    log.append(0, created("c", &["alice", "bob"]));
    world.run_until_idle();
    assert_eq!(world.taken(0), [[alice]]);
    world.nodes.full.store(true, Ordering::Relaxed);
    log.append(1, message("c", 1));
    log.append(2, message("c", 2));
    world.run_until_idle();
    assert!(world.taken(0).is_empty(), "no session may get it twice, so none gets it yet");
    assert_eq!(world.nodes.handed.lock().unwrap().len(), 1);
    assert_eq!(world.counters.waits_for_hand_offs.get(), 1);
    world.nodes.full.store(false, Ordering::Relaxed);
    world.run_until_idle();
    assert_eq!(world.taken(0), [[alice], [alice]]);
    assert_eq!(world.nodes.handed.lock().unwrap().len(), 3);
}
