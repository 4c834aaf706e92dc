use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;

use tokio::task::JoinHandle;
use tonic::Code;

use super::*;
use crate::domain::command::Refusal;
use crate::domain::encoding::Encoding;
use crate::domain::ids::ConversationKey;
use crate::service::streams::hub::testing::{Peer, event, rig};
use crate::service::streams::hub::{Admitted, HubHandle, OutboxLimits};

const STREAM: ConversationKey = ConversationKey(7);

fn hello() -> Box<Hello> {
    Box::new(Hello {
        user_id: "alice".into(),
        device_id: "desk".into(),
        token: None,
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        encoding: Encoding::Stream,
    })
}

fn opening(handle: &HubHandle) -> JoinHandle<Result<Admitted, Status>> {
    let handle = handle.clone();
    tokio::spawn(async move { handle.open(hello()).await })
}

/// Turns the hub until the session manager has a report; other tasks run between the turns.
async fn report(hub: &mut Hub, peer: &mut Peer) -> ShardReport {
    loop {
        hub.turn();
        if let Some(report) = peer.try_report() {
            return report;
        }
        tokio::task::yield_now().await;
    }
}

async fn admitted(hub: &mut Hub, handle: &HubHandle, manager: &mut Peer) -> Admitted {
    let opening = opening(handle);
    let ShardReport::Opened { connection, hello } = report(hub, manager).await else {
        panic!("not an opening");
    };
    assert_eq!((hello.user_id.as_str(), hello.device_id.as_str()), ("alice", "desk"));
    manager.send(ShardCommand::Admit { connection });
    hub.turn();
    let session = opening.await.unwrap().unwrap();
    session.outbox.open_up(Instant::now());
    session
}

fn key(session: &Admitted) -> ConnectionKey {
    session.connection
}

fn next(session: &Admitted) -> Result<Arc<Delivery>, Status> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match session.outbox.poll_next(&mut context, Instant::now()) {
        std::task::Poll::Ready(next) => next,
        std::task::Poll::Pending => panic!("nothing to send"),
    }
}

fn done(ticket: u64) -> Ticket {
    Ticket(NonZeroU64::new(ticket).unwrap())
}

fn assert_ended(report: &ShardReport, session: ConnectionKey, expected: EndReason) {
    match report {
        ShardReport::Ended { connection, why } => {
            assert_eq!((*connection, *why), (session, expected));
        }
        other => panic!("not an end: {other:?}"),
    }
}

#[tokio::test]
async fn delivery_is_done_when_the_last_stream_has_let_go_of_it() {
    let (handle, mut hub, [mut manager, mut router]) = rig(HubConfig::default(), 64);
    let first = admitted(&mut hub, &handle, &mut manager).await;
    let second = admitted(&mut hub, &handle, &mut manager).await;
    let recipients =
        [key(&first), key(&second)].map(|connection| (connection, Encoding::Stream)).into();
    router.send(ShardCommand::Deliver {
        event: Arc::new(event(STREAM, 1, b"one")),
        recipients: Recipients::Many(recipients),
        class: DeliveryClass::Live,
        ticket: Some(done(5)),
    });
    hub.turn();
    let taken = next(&first).unwrap();
    assert_eq!(taken.bytes(), b"one");
    drop(taken);
    hub.turn();
    assert!(router.try_report().is_none());
    // The second never reads it: its end is as good.
    drop(second);
    let ShardReport::Done { ticket } = report(&mut hub, &mut router).await else { panic!() };
    assert_eq!(ticket, done(5));
}

#[tokio::test]
async fn event_for_nobody_is_done_at_once() {
    let (handle, mut hub, [mut manager, mut router]) = rig(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let stale = ConnectionKey { generation: 9, ..key(&session) };
    router.deliver(stale, event(STREAM, 1, b"one"), DeliveryClass::Live, 1);
    router.deliver(key(&session), Event::new(None, 0), DeliveryClass::Live, 2);
    // The second at once: nothing of it was ever under way.
    for expected in [2, 1] {
        let ShardReport::Done { ticket } = report(&mut hub, &mut router).await else { panic!() };
        assert_eq!(ticket, done(expected));
    }
    assert_eq!(handle.metrics().counters.stream_events_stale.get(), 1);
    assert_eq!(handle.metrics().counters.stream_events_inexpressible.get(), 1);
}

#[tokio::test]
async fn refusal_reaches_the_caller_and_its_end_the_manager() {
    let (handle, mut hub, [mut manager, _router]) = rig(HubConfig::default(), 64);
    let opening = opening(&handle);
    let ShardReport::Opened { connection, .. } = report(&mut hub, &mut manager).await else {
        panic!();
    };
    let refusal = Refusal { status: 401, body: "token expired".into(), retry_after_s: None };
    manager.send(ShardCommand::Refuse { connection, refusal });
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::Refused);
    let status = opening.await.unwrap().err().unwrap();
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "token expired"));
}

#[tokio::test]
async fn replaced_session_gets_what_was_queued_and_then_aborted() {
    let (handle, mut hub, [mut manager, mut router]) = rig(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    router.deliver(key(&session), event(STREAM, 1, b"one"), DeliveryClass::Live, 0);
    hub.turn();
    manager.send(ShardCommand::Close {
        connection: key(&session),
        close: Close::new(CloseCode::SESSION_REPLACED, "session_replaced"),
        why: EndReason::ClosedByService,
    });
    hub.turn();
    assert!(next(&session).is_ok());
    assert_eq!(next(&session).unwrap_err().code(), Code::Aborted);
    assert!(manager.try_report().is_none());
    let connection = key(&session);
    drop(session);
    let ended = report(&mut hub, &mut manager).await;
    assert_ended(&ended, connection, EndReason::ClosedByService);
}

#[tokio::test]
async fn slow_reader_is_ended_and_everything_it_held_is_done() {
    let config = HubConfig {
        outbox: OutboxLimits { live_messages_max: 3, ..OutboxLimits::default() },
        ..HubConfig::default()
    };
    let (handle, mut hub, [mut manager, mut router]) = rig(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=4 {
        let event = event(STREAM, sequence, b"event");
        router.deliver(key(&session), event, DeliveryClass::Live, sequence as u64);
    }
    let mut tickets = Vec::new();
    for _ in 0..4 {
        let ShardReport::Done { ticket } = report(&mut hub, &mut router).await else { panic!() };
        tickets.push(ticket.0.get());
    }
    tickets.sort_unstable();
    assert_eq!(tickets, [1, 2, 3, 4]);
    assert_eq!(next(&session).unwrap_err().code(), Code::ResourceExhausted);
    let connection = key(&session);
    drop(session);
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::QueueOverflow);
    assert_eq!(handle.metrics().counters.stream_events_unsent.get(), 4);
    assert_eq!(hub.signals.deliveries(), 0);
}

#[tokio::test]
async fn stream_that_is_not_read_is_ended_after_the_stall_timeout() {
    let (handle, mut hub, [mut manager, mut router]) = rig(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    router.deliver(key(&session), event(STREAM, 1, b"one"), DeliveryClass::Live, 1);
    hub.turn();
    let timeout = hub.config.stall_timeout;
    hub.sweep(Instant::now() + timeout / 2);
    hub.turn();
    assert!(router.try_report().is_none());

    hub.sweep(Instant::now() + timeout);
    // Its delivery does not hold back anything any more,
    assert!(matches!(report(&mut hub, &mut router).await, ShardReport::Done { .. }));
    assert!(manager.try_report().is_none());
    // and the session is over even if its writer never runs again.
    hub.sweep(Instant::now() + timeout + hub.config.close_timeout);
    let ended = report(&mut hub, &mut manager).await;
    assert_ended(&ended, key(&session), EndReason::WriteTimeout);
    drop(session);
    hub.turn();
    assert!(manager.try_report().is_none(), "it ends once");
}

#[tokio::test]
async fn catch_up_that_nobody_completes_ends_its_stream() {
    let (handle, mut hub, [mut manager, _router]) = rig(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    session.mention("c".into(), 0).await;
    assert!(matches!(report(&mut hub, &mut manager).await, ShardReport::Resume { .. }));
    hub.sweep(Instant::now() + hub.config.catch_up_timeout / 2);
    hub.sweep(Instant::now() + hub.config.catch_up_timeout);
    assert_eq!(next(&session).unwrap_err().code(), Code::Unavailable);
    assert_eq!(handle.metrics().counters.stream_catch_up_timeouts.get(), 1);
}

#[tokio::test]
async fn deliveries_are_bounded_in_bytes_too() {
    let config = HubConfig { deliveries_bytes_max: 10, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = rig(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=3 {
        router.deliver(key(&session), event(STREAM, sequence, b"event"), DeliveryClass::Live, 0);
    }
    hub.turn();
    assert_eq!((hub.signals.deliveries(), hub.signals.bytes()), (2, 10));
}

#[tokio::test]
async fn caller_that_went_before_its_admission_leaves_no_session() {
    let (handle, mut hub, [mut manager, _router]) = rig(HubConfig::default(), 64);
    let opening = opening(&handle);
    let ShardReport::Opened { connection, .. } = report(&mut hub, &mut manager).await else {
        panic!();
    };
    opening.abort();
    assert!(opening.await.is_err());
    manager.send(ShardCommand::Admit { connection });
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::PeerGone);
    assert_eq!(handle.metrics().counters.stream_sessions.get(), 0);
    assert_eq!(hub.open, 0);
}

#[tokio::test]
async fn caller_that_waits_in_vain_is_forgotten() {
    let (handle, mut hub, [mut manager, _router]) = rig(HubConfig::default(), 64);
    let opening = opening(&handle);
    let ShardReport::Opened { connection, .. } = report(&mut hub, &mut manager).await else {
        panic!();
    };
    hub.sweep(Instant::now());
    assert!(manager.try_report().is_none(), "it still waits");
    opening.abort();
    assert!(opening.await.is_err());
    hub.sweep(Instant::now());
    let ended = report(&mut hub, &mut manager).await;
    assert_ended(&ended, connection, EndReason::HandshakeTimeout);
    manager.send(ShardCommand::Admit { connection });
    hub.turn();
    assert_eq!(handle.metrics().counters.stream_commands_stale.get(), 1);
}

#[tokio::test]
async fn full_house_and_closed_doors_refuse_without_asking() {
    let config = HubConfig { streams_max: 1, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, _router]) = rig(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let refused = opening(&handle);
    tokio::task::yield_now().await;
    hub.turn();
    assert_eq!(refused.await.unwrap().err().unwrap().code(), Code::ResourceExhausted);

    manager.send(ShardCommand::StopAccepting);
    hub.turn();
    assert!(!*handle.accepting().borrow());
    let refused = opening(&handle);
    tokio::task::yield_now().await;
    hub.turn();
    assert_eq!(refused.await.unwrap().err().unwrap().code(), Code::Unavailable);
    assert!(manager.try_report().is_none());
    drop(session);
}

#[tokio::test]
async fn reports_survive_a_full_ring_in_order() {
    let (handle, mut hub, [mut manager, _router]) = rig(HubConfig::default(), 2);
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(admitted(&mut hub, &handle, &mut manager).await);
    }
    let keys: Vec<_> = sessions.iter().map(key).collect();
    sessions.into_iter().for_each(drop);
    // Two fit; the other slots are not used again before their end is told.
    hub.turn();
    let waiting = opening(&handle);
    tokio::task::yield_now().await;
    hub.turn();
    for expected in keys {
        let ended = report(&mut hub, &mut manager).await;
        assert_ended(&ended, expected, EndReason::PeerGone);
    }
    assert!(matches!(report(&mut hub, &mut manager).await, ShardReport::Opened { .. }));
    waiting.abort();
}

#[tokio::test]
async fn bounded_number_of_deliveries_is_taken_in() {
    let config = HubConfig { deliveries_max: 2, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = rig(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=3 {
        router.deliver(key(&session), event(STREAM, sequence, b"e"), DeliveryClass::Live, 0);
    }
    assert!(!hub.turn(), "nothing to do until something is read");
    assert_eq!(hub.signals.deliveries(), 2);
    drop(next(&session).unwrap());
    hub.turn();
    assert_eq!(hub.signals.deliveries(), 2);
}

#[tokio::test]
async fn stop_ends_every_stream_and_says_so_to_every_peer() {
    let (handle, mut hub, [mut manager, mut router]) = rig(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let connection = key(&session);
    let running = tokio::spawn(hub.run());
    manager.send(ShardCommand::Stop {
        close: Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 100 ms"),
    });
    let status = std::future::poll_fn(|context| session.outbox.poll_next(context, Instant::now()))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "draining; reconnect in 100 ms");
    drop(session);
    assert_ended(&manager.report().await, connection, EndReason::Draining);
    assert!(matches!(manager.report().await, ShardReport::Stopped));
    assert!(matches!(router.report().await, ShardReport::Stopped));
    running.await.unwrap();
    assert_eq!(handle.open(hello()).await.err().unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn session_manager_that_is_gone_takes_the_streams_with_it() {
    let (handle, mut hub, [mut manager, router]) = rig(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let running = tokio::spawn(hub.run());
    drop(manager);
    let status = std::future::poll_fn(|context| session.outbox.poll_next(context, Instant::now()))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    drop(session);
    running.await.unwrap();
    drop(router);
}
