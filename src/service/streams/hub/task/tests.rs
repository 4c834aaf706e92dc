mod bystanders;

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;

use tokio::task::JoinHandle;
use tonic::Code;

use prost::Message as _;

use super::*;
use crate::domain::caught_up::{CaughtUp, SequenceRun};
use crate::domain::command::Refusal;
use crate::domain::cursor::{Cursor, LogPosition, TopicId, UNCHECKED};
use crate::domain::encoding::Encoding;
use crate::domain::ids::ConversationKey;
use crate::service::events::conversation_key::conversation_key;
use crate::service::events::proto::delivery::v1::DeliveryEvent;
use crate::service::streams::hub::testing::{self, TestPeer, event, hub_with_peers};
use crate::service::streams::hub::{HubHandle, OutboxLimits, StreamSession};

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

fn opening(handle: &HubHandle) -> JoinHandle<Result<StreamSession, Status>> {
    let handle = handle.clone();
    tokio::spawn(async move { handle.open(hello()).await.map_err(Status::from) })
}

/// Runs turns of the hub until the peer has a report. Other tasks run between the turns.
async fn report(hub: &mut Hub, peer: &mut TestPeer) -> ShardReport {
    loop {
        hub.turn();
        if let Some(report) = peer.try_report() {
            return report;
        }
        tokio::task::yield_now().await;
    }
}

/// A call of [`HubHandle::open`] that waits for the session manager.
async fn requested(
    hub: &mut Hub,
    handle: &HubHandle,
    manager: &mut TestPeer,
) -> (JoinHandle<Result<StreamSession, Status>>, ConnectionKey) {
    let opening = opening(handle);
    let ShardReport::Opened { connection, hello } = report(hub, manager).await else {
        panic!("expected an opening");
    };
    assert_eq!((hello.user_id.as_str(), hello.device_id.as_str()), ("alice", "desk"));
    (opening, connection)
}

async fn admitted(hub: &mut Hub, handle: &HubHandle, manager: &mut TestPeer) -> StreamSession {
    let (opening, connection) = requested(hub, handle, manager).await;
    manager.send(ShardCommand::Admit { connection });
    hub.turn();
    let session = opening.await.unwrap().unwrap();
    session.outbox.opening_done(Instant::now());
    session
}

fn key(session: &StreamSession) -> ConnectionKey {
    session.connection
}

fn next(session: &StreamSession) -> Result<Arc<Delivery>, Status> {
    try_next(session).expect("something to send")
}

fn try_next(session: &StreamSession) -> Option<Result<Arc<Delivery>, Status>> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match session.outbox.poll_next(&mut context, Instant::now()) {
        std::task::Poll::Ready(next) => Some(next),
        std::task::Poll::Pending => None,
    }
}

/// The ticket of the next report, which must be `Done`.
async fn done(hub: &mut Hub, peer: &mut TestPeer) -> u64 {
    match report(hub, peer).await {
        ShardReport::Done { ticket } => ticket.0.get(),
        other => panic!("expected a delivery: {other:?}"),
    }
}

async fn closed_with(session: &StreamSession) -> Status {
    std::future::poll_fn(|context| session.outbox.poll_next(context, Instant::now()))
        .await
        .unwrap_err()
}

fn assert_ended(report: &ShardReport, session: ConnectionKey, expected: EndReason) {
    match report {
        ShardReport::Ended { connection, why } => {
            assert_eq!((*connection, *why), (session, expected));
        }
        other => panic!("expected an end: {other:?}"),
    }
}

#[tokio::test]
async fn delivery_is_done_when_the_last_stream_drops_it() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 64);
    let first = admitted(&mut hub, &handle, &mut manager).await;
    let second = admitted(&mut hub, &handle, &mut manager).await;
    let recipients = [key(&first), key(&second)].map(|connection| (connection, Encoding::Stream));
    router.send(ShardCommand::Deliver {
        event: Arc::new(event(STREAM, 1, b"one")),
        recipients: Recipients::new(&recipients, None),
        class: DeliveryClass::Live,
        ticket: NonZeroU64::new(5).map(Ticket),
    });
    hub.turn();
    let taken = next(&first).unwrap();
    assert_eq!(taken.bytes(), b"one");
    drop(taken);
    hub.turn();
    assert!(router.try_report().is_none());
    // The second stream ends without reading the event.
    drop(second);
    assert_eq!(done(&mut hub, &mut router).await, 5);
}

#[tokio::test]
async fn event_without_recipients_is_done_at_once() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let stale = ConnectionKey { generation: 9, ..key(&session) };
    router.deliver(stale, event(STREAM, 1, b"one"), DeliveryClass::Live, 1);
    router.deliver(key(&session), Event::new(None, 0), DeliveryClass::Live, 2);
    // The second is done first: it has no encoding for a stream.
    for expected in [2, 1] {
        assert_eq!(done(&mut hub, &mut router).await, expected);
    }
    assert_eq!(handle.metrics().counters.stream_events_stale.get(), 1);
    assert_eq!(handle.metrics().counters.stream_events_inexpressible.get(), 1);
}

#[tokio::test]
async fn refusal_reaches_the_caller_and_the_manager_gets_its_end() {
    let (handle, mut hub, [mut manager, _router]) = hub_with_peers(HubConfig::default(), 64);
    let (opening, connection) = requested(&mut hub, &handle, &mut manager).await;
    let refusal = Refusal { status: 401, body: "token expired".into(), retry_after_s: None };
    manager.send(ShardCommand::Refuse { connection, refusal });
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::Refused);
    let status = opening.await.unwrap().err().unwrap();
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "token expired"));
}

#[tokio::test]
async fn replaced_session_gets_queued_events_and_then_aborted() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 64);
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
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::ClosedByService);
}

#[tokio::test]
async fn slow_reader_is_closed_and_its_deliveries_are_done() {
    let config = HubConfig {
        outbox: OutboxLimits { live_messages_max: 3, ..OutboxLimits::default() },
        ..HubConfig::default()
    };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=4 {
        let event = event(STREAM, sequence, b"event");
        router.deliver(key(&session), event, DeliveryClass::Live, sequence as u64);
    }
    let mut tickets = Vec::new();
    for _ in 0..4 {
        tickets.push(done(&mut hub, &mut router).await);
    }
    tickets.sort_unstable();
    assert_eq!(tickets, [1, 2, 3, 4]);
    assert_eq!(next(&session).unwrap_err().code(), Code::ResourceExhausted);
    let connection = key(&session);
    drop(session);
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::QueueOverflow);
    assert_eq!(handle.metrics().counters.stream_events_unsent.get(), 4);
    assert_eq!(hub.notices.queued.events(), 0);
}

#[tokio::test]
async fn stream_without_reads_is_closed_after_the_stall_timeout() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    router.deliver(key(&session), event(STREAM, 1, b"one"), DeliveryClass::Live, 1);
    hub.turn();
    let timeout = hub.config.stall_timeout;
    hub.sweep(Instant::now() + timeout / 2);
    hub.turn();
    assert!(router.try_report().is_none());

    hub.sweep(Instant::now() + timeout);
    // The delivery of the stalled stream is reported done.
    assert_eq!(done(&mut hub, &mut router).await, 1);
    assert!(manager.try_report().is_none());
    // Its session ends even if its writer never runs again.
    hub.sweep(Instant::now() + timeout + hub.config.close_timeout);
    assert_ended(&report(&mut hub, &mut manager).await, key(&session), EndReason::WriteTimeout);
    drop(session);
    hub.turn();
    assert!(manager.try_report().is_none(), "the session ends once");
}

#[tokio::test]
async fn catch_up_that_never_completes_closes_its_stream() {
    let (handle, mut hub, [mut manager, _router]) = hub_with_peers(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    session.report_position("c".into(), 0).await;
    assert!(matches!(report(&mut hub, &mut manager).await, ShardReport::Resume { .. }));
    hub.sweep(Instant::now() + hub.config.catch_up_timeout / 2);
    hub.sweep(Instant::now() + hub.config.catch_up_timeout);
    assert_eq!(next(&session).unwrap_err().code(), Code::Unavailable);
    assert_eq!(handle.metrics().counters.stream_catch_up_timeouts.get(), 1);
}

#[tokio::test]
async fn deliveries_are_limited_in_bytes() {
    // Room for one event and a half: the second may exceed it.
    let config = HubConfig { deliveries_bytes_max: 1_000, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=3 {
        router.deliver(key(&session), event(STREAM, sequence, b"event"), DeliveryClass::Live, 0);
    }
    hub.turn();
    assert_eq!(hub.notices.queued.events(), 2);
    assert_eq!(hub.notices.queued.cost(), 2 * (5 + Event::OVERHEAD_BYTES));
}

#[tokio::test]
async fn caller_that_is_gone_at_its_admission_leaves_no_session() {
    let (handle, mut hub, [mut manager, _router]) = hub_with_peers(HubConfig::default(), 64);
    let (opening, connection) = requested(&mut hub, &handle, &mut manager).await;
    opening.abort();
    assert!(opening.await.is_err());
    manager.send(ShardCommand::Admit { connection });
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::PeerGone);
    assert_eq!(handle.metrics().counters.stream_sessions.get(), 0);
    assert_eq!(hub.open, 0);
}

#[tokio::test]
async fn request_of_a_caller_that_is_gone_is_removed() {
    let (handle, mut hub, [mut manager, _router]) = hub_with_peers(HubConfig::default(), 64);
    let (opening, connection) = requested(&mut hub, &handle, &mut manager).await;
    hub.sweep(Instant::now());
    assert!(manager.try_report().is_none(), "the caller still waits");
    opening.abort();
    assert!(opening.await.is_err());
    hub.sweep(Instant::now());
    assert_ended(&report(&mut hub, &mut manager).await, connection, EndReason::HandshakeTimeout);
    manager.send(ShardCommand::Admit { connection });
    hub.turn();
    assert_eq!(handle.metrics().counters.stream_commands_stale.get(), 1);
}

#[tokio::test]
async fn hub_that_is_full_or_not_accepting_refuses_by_itself() {
    let config = HubConfig { streams_max: 1, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, _router]) = hub_with_peers(config, 64);
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
    let (handle, mut hub, [mut manager, _router]) = hub_with_peers(HubConfig::default(), 2);
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(admitted(&mut hub, &handle, &mut manager).await);
    }
    let keys: Vec<_> = sessions.iter().map(key).collect();
    sessions.into_iter().for_each(drop);
    // Two reports fit into the ring. The other slots are reused only after their end is reported.
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
async fn deliveries_are_limited_in_number() {
    let config = HubConfig { deliveries_max: 2, ..HubConfig::default() };
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(config, 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    for sequence in 1..=3 {
        router.deliver(key(&session), event(STREAM, sequence, b"e"), DeliveryClass::Live, 0);
    }
    assert!(!hub.turn(), "no command is taken until an event is read");
    assert_eq!(hub.notices.queued.events(), 2);
    drop(next(&session).unwrap());
    hub.turn();
    assert_eq!(hub.notices.queued.events(), 2);
}

#[tokio::test]
async fn stop_closes_every_stream_and_is_reported_to_every_peer() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let connection = key(&session);
    let running = tokio::spawn(hub.run());
    manager.send(ShardCommand::Stop {
        close: Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 100 ms"),
    });
    let status = closed_with(&session).await;
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "draining; reconnect in 100 ms");
    drop(session);
    assert_ended(&manager.report().await, connection, EndReason::Draining);
    assert!(matches!(manager.report().await, ShardReport::Stopped));
    assert!(matches!(router.report().await, ShardReport::Stopped));
    running.await.unwrap();
    let refused = handle.open(hello()).await.err().unwrap();
    assert_eq!(Status::from(refused).code(), Code::Unavailable);
}

#[tokio::test]
async fn dropped_session_manager_closes_all_streams() {
    let (handle, mut hub, [mut manager, router]) = hub_with_peers(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let running = tokio::spawn(hub.run());
    drop(manager);
    let status = closed_with(&session).await;
    assert_eq!(status.code(), Code::Unavailable);
    drop(session);
    running.await.unwrap();
    drop(router);
}

/// What the writer takes next, as the client reads it.
fn next_event(session: &StreamSession) -> DeliveryEvent {
    let delivery = next(session).unwrap();
    session.sent(&delivery);
    DeliveryEvent::decode(delivery.bytes()).unwrap()
}

fn message_of(sequence: i64) -> Event {
    let event = DeliveryEvent { sequence, ..DeliveryEvent::default() };
    testing::event(STREAM, sequence, &event.encode_to_vec())
}

fn routed(router: &mut TestPeer, next: i64) {
    let position = LogPosition { topic: TopicId(1), partition: 0, next, check: UNCHECKED };
    router.send(ShardCommand::Routed { positions: Box::new([position]) });
}

/// Answers the fence of the hub.
async fn fence(hub: &mut Hub, manager: &mut TestPeer) {
    assert!(matches!(report(hub, manager).await, ShardReport::Fence));
    manager.send(ShardCommand::Fence);
    hub.turn();
}

/// `docs/grpc.md`: “It is behind every event that it covers.”
#[tokio::test(start_paused = true)]
async fn stream_that_resumes_from_a_cursor_gets_what_it_missed_then_live_events_then_cursors() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 128);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let connection = key(&session);
    session.resume_since(Box::from(*b"cursor")).await;
    let ShardReport::ResumeSince { cursor, .. } = report(&mut hub, &mut manager).await else {
        panic!("expected a resume request");
    };
    assert_eq!(&*cursor, b"cursor");
    // Live events are held, also those that are replayed as well.
    for sequence in [2, 3] {
        router.deliver(connection, message_of(sequence), DeliveryClass::Live, 0);
    }
    manager.deliver(connection, message_of(1), DeliveryClass::CatchUp, 0);
    manager.deliver(connection, message_of(2), DeliveryClass::CatchUp, 0);
    routed(&mut router, 4);
    let run = |sequence| SequenceRun { conversation: STREAM, first: sequence, last: sequence };
    let delivered = Box::new(CaughtUp::new(None, vec![run(1), run(2)]));
    manager.send(ShardCommand::GoLive { connection, delivered });
    manager.send(ShardCommand::SendCursors { connection });
    fence(&mut hub, &mut manager).await;
    let sequences = [(); 3].map(|()| next_event(&session).sequence);
    assert_eq!(sequences, [1, 2, 3]);
    let event = next_event(&session);
    let cursor = Cursor::decode(&event.cursor).unwrap();
    assert_eq!(cursor.positions()[0].next, 4);
    assert_eq!(event, DeliveryEvent { cursor: event.cursor.clone(), ..DeliveryEvent::default() });

    // After a burst, and before a close that the server announces.
    for sequence in 4..70 {
        router.deliver(connection, message_of(sequence), DeliveryClass::Live, 0);
    }
    hub.turn();
    (4..70).for_each(|sequence| assert_eq!(next_event(&session).sequence, sequence));
    hub.turn();
    // The router tells its position later.
    routed(&mut router, 70);
    tokio::time::advance(Duration::from_secs(2)).await;
    fence(&mut hub, &mut manager).await;
    let newest = next_event(&session).cursor;
    assert_eq!(Cursor::decode(&newest).unwrap().positions()[0].next, 70);
    manager.send(ShardCommand::Close {
        connection,
        close: Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 0 ms"),
        why: EndReason::Draining,
    });
    hub.turn();
    assert_eq!(next_event(&session).cursor, newest);
    assert_eq!(next(&session).unwrap_err().code(), Code::Unavailable);
    assert_eq!(hub.metrics.counters.stream_cursors_sent.get(), 3);
}

#[tokio::test(start_paused = true)]
async fn stream_gets_no_cursor_while_it_is_behind_or_after_it_has_left_the_directory() {
    let (handle, mut hub, [mut manager, mut router]) = hub_with_peers(HubConfig::default(), 64);
    let session = admitted(&mut hub, &handle, &mut manager).await;
    let connection = key(&session);
    session.resume_since(Box::default()).await;
    assert!(matches!(report(&mut hub, &mut manager).await, ShardReport::ResumeSince { .. }));
    manager.send(ShardCommand::GoLive { connection, delivered: Box::default() });
    manager.send(ShardCommand::SendCursors { connection });
    // The client names a conversation, whose messages are missing.
    session.report_position("room".into(), 3).await;
    assert!(matches!(report(&mut hub, &mut manager).await, ShardReport::Resume { .. }));
    routed(&mut router, 4);
    fence(&mut hub, &mut manager).await;
    let is_idle = |session: &StreamSession| {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        session.outbox.poll_next(&mut context, Instant::now()).is_pending()
    };
    assert!(is_idle(&session), "a cursor would cover what the catch-up has not sent");
    manager.go_live(connection, conversation_key("room"), &[]);
    hub.turn();
    hub.sweep(Instant::now());
    hub.turn();
    assert!(!next_event(&session).cursor.is_empty(), "it was owed");
    routed(&mut router, 5);
    manager.send(ShardCommand::StopCursors { connection });
    tokio::time::advance(Duration::from_secs(60)).await;
    hub.turn();
    manager.send(ShardCommand::Fence);
    hub.turn();
    assert!(is_idle(&session), "it has left the directory");
}
