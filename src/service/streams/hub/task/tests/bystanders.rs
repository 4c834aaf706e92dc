//! What a stream that is read at once waits for others that are not, and who waits for a full hub.

use std::collections::VecDeque;

use super::*;
use crate::domain::budget::EventBudget;
use crate::domain::wait_allowance::WAIT_MS_MAX;

const TURN: Duration = Duration::from_millis(10);

/// What all clients together make an event wait at most, with the precision of these tests.
const LATE_MAX: Duration = Duration::from_millis(WAIT_MS_MAX + 40);

/// The client's window lets out what the writer has, and the writer takes the next event, if there is one.
fn let_out_one(session: &StreamSession) {
    session.outbox.let_out(0, Instant::now());
    if let Some(Ok(taken)) = try_next(session) {
        session.sent(&taken);
        session.outbox.let_out(taken.bytes().len(), Instant::now());
    }
}

/// How late an event was that was taken at once, while two readers took one event every 400 ms.
async fn latest_beside_slow_readers(deliveries_max: usize) -> Duration {
    let config = HubConfig { deliveries_max, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let mut slow = Vec::new();
    for _ in 0..2 {
        slow.push(admitted(&mut hub, &handle, &mut manager).await);
    }
    let bystander = admitted(&mut hub, &handle, &mut manager).await;
    let (mut made, mut unrouted) = (VecDeque::new(), VecDeque::new());
    let mut latest = Duration::ZERO;
    for turn in 0..2_000 {
        if turn % 10 == 0 {
            unrouted.extend(slow.iter().map(key));
            unrouted.push_back(key(&bystander));
            made.push_back(Instant::now());
        }
        while router.has_room()
            && let Some(to) = unrouted.pop_front()
        {
            router.deliver(to, event(STREAM, turn, b"event"), DeliveryClass::Live, 1);
        }
        hub.turn();
        while router.try_report().is_some() {}
        while let Some(taken) = try_next(&bystander) {
            drop(taken.expect("it is not closed"));
            let made_at = made.pop_front().expect("one was made for it");
            latest = latest.max(made_at.elapsed());
        }
        if turn % 40 == 0 {
            slow.iter().for_each(let_out_one);
        }
        tokio::time::advance(TURN).await;
    }
    assert!(made.len() <= 20, "{} have not arrived", made.len());
    assert!(handle.metrics().counters.stream_closed_for_room.get() > 0);
    latest
}

#[tokio::test(start_paused = true)]
async fn readers_that_fill_the_hub_are_closed_and_delay_nobody() {
    assert!(latest_beside_slow_readers(100).await <= TURN);
}

/// They fill it before the hub can close them.
#[tokio::test(start_paused = true)]
async fn readers_that_fill_the_hub_at_once_delay_others_by_an_eighth_of_a_second() {
    let latest = latest_beside_slow_readers(8).await;
    assert!(latest > TURN, "{latest:?} late");
    assert!(latest <= LATE_MAX, "{latest:?} late");
}

/// Each of them takes an event every 300 ms and has no more than a few in its queue, but together they use the room up.
/// The ring has many times as much for them, which fills the room again whenever some are closed.
#[tokio::test(start_paused = true)]
async fn many_readers_with_short_queues_delay_others_by_an_eighth_of_a_second() {
    let config = HubConfig { deliveries_max: 40, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 4_096);
    let mut slow = Vec::new();
    for _ in 0..30 {
        slow.push(admitted(&mut hub, &handle, &mut manager).await);
    }
    let bystander = admitted(&mut hub, &handle, &mut manager).await;
    let mut made = VecDeque::new();
    for turn in 0..500 {
        for number in 0..3 {
            let to = key(&slow[(3 * turn as usize + number) % slow.len()]);
            router.deliver(to, event(STREAM, turn, b"event"), DeliveryClass::Live, 1);
        }
        router.deliver(key(&bystander), event(STREAM, turn, b"event"), DeliveryClass::Live, 1);
        made.push_back(Instant::now());
        hub.turn();
        while router.try_report().is_some() {}
        while let Some(taken) = try_next(&bystander) {
            drop(taken.expect("it is not closed"));
            let late = made.pop_front().expect("one was made for it").elapsed();
            assert!(late <= LATE_MAX, "{late:?} late in turn {turn}");
        }
        slow.iter().skip(turn as usize % 30).step_by(30).for_each(let_out_one);
        tokio::time::advance(TURN).await;
    }
    assert!(made.is_empty(), "{} have not arrived", made.len());
    assert!(handle.metrics().counters.stream_closed_for_room.get() > 0);
}

/// Two events wait for a window, and the others for a writer that does not run.
#[tokio::test(start_paused = true)]
async fn full_hub_closes_nobody_while_its_writers_do_not_run() {
    let config = HubConfig { deliveries_max: 16, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let busy = admitted(&mut hub, &handle, &mut manager).await;
    let slow = admitted(&mut hub, &handle, &mut manager).await;
    for (session, events) in [(&slow, 3), (&busy, 16)] {
        for sequence in 1..=events {
            let event = event(STREAM, sequence, b"event");
            router.deliver(key(session), event, DeliveryClass::Live, 1);
        }
        hub.turn();
        let_out_one(&slow);
    }
    for _ in 0..200 {
        hub.turn();
        tokio::time::advance(TURN).await;
    }
    assert!(hub.is_full());
    assert_eq!(handle.metrics().counters.stream_closed_for_room.get(), 0);
}

/// A reader that takes one event every ten milliseconds, of two that it gets, keeps its queue nearly full. It makes
/// the others wait for an eighth of a second, and a fifth of the time, and then it is closed.
#[tokio::test(start_paused = true)]
async fn steady_reader_makes_others_wait_no_more_than_it_may() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 8);
    let slow = admitted(&mut hub, &handle, &mut manager).await;
    let bystander = admitted(&mut hub, &handle, &mut manager).await;
    let (mut made, mut unrouted) = (VecDeque::new(), VecDeque::new());
    let mut latest = Duration::ZERO;
    for turn in 0..1_000 {
        unrouted.extend(std::iter::repeat_n(key(&slow), [2, 100][usize::from(turn == 0)]));
        unrouted.push_back(key(&bystander));
        made.push_back(Instant::now());
        while router.has_room()
            && let Some(to) = unrouted.pop_front()
        {
            router.deliver(to, event(STREAM, turn, b"event"), DeliveryClass::Live, 1);
            hub.turn();
        }
        hub.turn();
        while router.try_report().is_some() {}
        while let Some(taken) = try_next(&bystander) {
            bystander.sent(&taken.expect("it is not closed"));
            latest = latest.max(made.pop_front().expect("one was made for it").elapsed());
        }
        if let Some(Ok(taken)) = try_next(&slow) {
            slow.sent(&taken);
        }
        tokio::time::advance(TURN).await;
    }
    assert!(made.len() <= 1, "{} have not arrived", made.len());
    assert!(latest > TURN && latest <= LATE_MAX, "{latest:?} late");
    assert_eq!(handle.metrics().counters.stream_overflows.get(), 1);
}

/// A burst comes before the writer has run. It reads as soon as it runs.
#[tokio::test(start_paused = true)]
async fn burst_ends_no_stream_that_is_read() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 512);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let mut routed = 0;
    let mut taken = 0;
    while taken < 5_000 {
        while router.has_room() && routed < 5_000 {
            routed += 1;
            router.deliver(key(&session), event(STREAM, routed, b"e"), DeliveryClass::Live, 1);
        }
        while hub.turn() {}
        let before = taken;
        while let Some(next) = try_next(&session) {
            session.sent(&next.expect("it is not closed"));
            taken += 1;
        }
        assert!(taken > before, "the hub takes no more");
        while router.try_report().is_some() {}
    }
}

/// Streams that catch up hold as much as they may. The one that holds most is closed, and nobody waits.
#[tokio::test(start_paused = true)]
async fn streams_that_catch_up_make_no_others_wait() {
    let config = HubConfig { deliveries_max: 40, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let mut catching_up = Vec::new();
    for conversation in ["a", "b"] {
        let session = admitted(&mut hub, &handle, &mut manager).await;
        session.report_position(conversation.into(), 0).await;
        assert!(matches!(report(&mut hub, &mut manager).await, ShardReport::Resume { .. }));
        catching_up.push((session, conversation_key(conversation)));
    }
    let bystander = admitted(&mut hub, &handle, &mut manager).await;
    let budget = EventBudget::new(1 << 20);
    let mut held = 0;
    let closed = || handle.metrics().counters.stream_closed_in_catch_up_for_room.get();
    for sequence in (1..).take_while(|_| closed() == 0) {
        let (session, conversation) = &catching_up[usize::from(sequence % 4 == 0)];
        let event = event(*conversation, sequence, b"event").charged_to(&budget);
        router.deliver(key(session), event, DeliveryClass::Live, 0);
        router.deliver(
            key(&bystander),
            testing::event(STREAM, sequence, b"event"),
            DeliveryClass::Live,
            0,
        );
        hub.turn();
        assert_eq!(next(&bystander).unwrap().event().position.unwrap().sequence, sequence);
        held = held.max(hub.notices.held.events());
        assert_eq!(budget.charged(), 0, "what is held is not charged to the routers");
    }
    assert_eq!(held, 10);
    let (most, fewest) = (&catching_up[0].0, &catching_up[1].0);
    assert_eq!(next(most).unwrap_err().code(), Code::Unavailable);
    assert!(try_next(fewest).is_none(), "it is not closed");
}

/// The commands of the session manager are what empties a full hub.
#[tokio::test]
async fn full_hub_takes_the_commands_of_the_session_manager() {
    let config = HubConfig { deliveries_max: 2, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=3 {
        router.deliver(key(&session), event(STREAM, sequence, b"e"), DeliveryClass::Live, 0);
    }
    hub.turn();
    assert!(hub.is_full());
    manager.send(ShardCommand::Close {
        connection: key(&session),
        close: Close::new(CloseCode::SESSION_REPLACED, "session_replaced"),
        why: EndReason::ClosedByService,
    });
    assert!(hub.has_commands(), "it does not sleep");
    hub.turn();
    for _ in 0..2 {
        drop(next(&session).unwrap());
    }
    assert_eq!(next(&session).unwrap_err().code(), Code::Aborted);
}
