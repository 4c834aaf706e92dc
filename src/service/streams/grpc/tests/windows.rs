//! Clients whose flow-control window is closed.

use super::*;

/// More than the window of [`Port::unread_session`].
const LARGE: usize = 128 * 1024;

impl Port {
    /// A session whose client has read nothing and has a part of an event, because its window let no more out. What is
    /// queued for it must be sent or dropped at once when it is closed.
    async fn unread_session() -> (Self, ClientSession, ConnectionKey) {
        let outbox = OutboxLimits { live_messages_max: 16, ..OutboxLimits::default() };
        let hub = HubConfig { close_timeout: Duration::ZERO, outbox, ..HubConfig::default() };
        let mut port = Self::open(GrpcConfig::default(), hub).await;
        let client = Channel::from_shared(format!("http://{}", port.address)).unwrap();
        port.channel = client.initial_stream_window_size(65_535).connect().await.unwrap();
        let (session, connection) = port.session().await;
        port.router.deliver(connection, large(1), DeliveryClass::Live, 1);
        // The writer has taken it.
        assert!(matches!(port.router.report().await, ShardReport::Done { .. }));
        (port, session, connection)
    }

    /// The session has ended although its client reads nothing, and so has its stream: nothing more of the event comes.
    async fn assert_resets_the_stream(
        mut self,
        mut session: ClientSession,
        connection: ConnectionKey,
        why: EndReason,
    ) {
        assert_eq!(self.ended(connection).await, why);
        let status = session.next().await.expect_err("the event is not whole");
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    }
}

fn large(sequence: i64) -> crate::domain::event::Event {
    message(&"c".repeat(LARGE), sequence)
}

#[tokio::test]
async fn session_with_a_closed_window_is_reset_when_it_is_replaced() {
    let (mut port, session, connection) = Port::unread_session().await;
    let close = Close::new(CloseCode::SESSION_REPLACED, "session_replaced");
    let why = EndReason::ClosedByService;
    port.manager.send(ShardCommand::Close { connection, close, why });
    port.assert_resets_the_stream(session, connection, why).await;
}

#[tokio::test]
async fn session_with_a_closed_window_is_reset_when_it_overflows() {
    let (mut port, session, connection) = Port::unread_session().await;
    for sequence in 2..=18 {
        port.router.deliver(connection, large(sequence), DeliveryClass::Live, 1);
    }
    port.assert_resets_the_stream(session, connection, EndReason::QueueOverflow).await;
}

#[tokio::test]
async fn session_with_a_closed_window_is_reset_when_its_client_is_at_fault() {
    let (port, session, connection) = Port::unread_session().await;
    send_request(&session.requests, "bob", "", "", 0).await;
    port.assert_resets_the_stream(session, connection, EndReason::PeerAtFault).await;
}

#[tokio::test]
async fn session_with_a_closed_window_is_reset_when_the_node_stops() {
    let (mut port, session, connection) = Port::unread_session().await;
    let close = Close::new(CloseCode::GOING_AWAY, "server stopping");
    port.manager.send(ShardCommand::Stop { close });
    port.assert_resets_the_stream(session, connection, EndReason::Draining).await;
}
