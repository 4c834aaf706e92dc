//! The port with real sockets and a hub whose peers are the test.

mod health;
mod limits;
mod tls;
mod unread;
mod windows;

use std::net::SocketAddr;

use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use self::tls::TestTls;
use super::*;
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::{DeliveryClass, Hello, Refusal, ShardCommand, ShardReport};
use crate::domain::ids::ConnectionKey;
use crate::domain::limiter::{ConnectionLimiter, ConnectionLimits};
use crate::service::events::conversation_key::conversation_key;
use crate::service::events::proto::delivery::v1::delivery_api_client::DeliveryApiClient;
use crate::service::events::proto::delivery::v1::{DeliveryConnectRequest, DeliveryEvent};
use crate::service::streams::hub::testing::{TestPeer, event, hub_with_peers};
use crate::service::streams::hub::{HubConfig, HubMetrics, OutboxLimits};

/// A running server, the peers of its hub, and a channel to it.
struct Port {
    manager: TestPeer,
    router: TestPeer,
    address: SocketAddr,
    channel: Channel,
    counters: Arc<GrpcCounters>,
    metrics: Arc<HubMetrics>,
    limiter: Arc<ConnectionLimiter>,
    drain: watch::Sender<bool>,
    shutdown: oneshot::Sender<()>,
    served: JoinHandle<Result<(), GrpcError>>,
}

impl Port {
    async fn open(config: GrpcConfig, hub_config: HubConfig) -> Self {
        Self::start(config, hub_config, ConnectionLimits::default(), true, None).await
    }

    /// A port whose clock stands still.
    async fn with_limits(limits: ConnectionLimits) -> Self {
        Self::start(GrpcConfig::default(), HubConfig::default(), limits, true, None).await
    }

    /// A port that accepts no token, and no call without one.
    async fn without_valid_tokens() -> Self {
        let limits = ConnectionLimits::default();
        Self::start(GrpcConfig::default(), HubConfig::default(), limits, false, None).await
    }

    async fn start(
        config: GrpcConfig,
        hub_config: HubConfig,
        limits: ConnectionLimits,
        valid: bool,
        tls: Option<&TestTls>,
    ) -> Self {
        let (handle, hub, [manager, router]) = hub_with_peers(hub_config, 4096);
        tokio::spawn(hub.run());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // Small, so that the kernel takes little for a client that does not read.
        set_socket_send_buffer_size(&listener, 4_608).unwrap();
        let address = listener.local_addr().unwrap();
        let counters = Arc::new(GrpcCounters::default());
        let metrics = Arc::clone(handle.metrics());
        let (shutdown, until) = oneshot::channel::<()>();
        let (drain, drained) = watch::channel(false);
        let limiter = Arc::new(ConnectionLimiter::new(limits));
        let refusal =
            || Refusal { status: 401, body: "no valid token".into(), retry_after_s: None };
        let ports = GrpcPorts {
            hub: handle,
            limits: AddressLimits::new(Arc::clone(&limiter), || 0),
            judge: Arc::new(move |_| if valid { Ok(()) } else { Err(refusal()) }),
            tls: tls.map(|tls| Arc::clone(&tls.port)),
        };
        let served = serve(config, listener, ports, Arc::clone(&counters), drained, async {
            let _ = until.await;
        });
        let served = tokio::spawn(served);
        let channel = tls::channel(tls, address).await;
        Self {
            manager,
            router,
            address,
            channel,
            counters,
            metrics,
            limiter,
            drain,
            shutdown,
            served,
        }
    }

    async fn default() -> Self {
        Self::open(GrpcConfig::default(), HubConfig::default()).await
    }

    fn call(&self, token: Option<&str>) -> Call {
        let (requests, receiver) = mpsc::channel(1024);
        let mut request = Request::new(ReceiverStream::new(receiver));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token.parse().unwrap());
        }
        let mut client = DeliveryApiClient::new(self.channel.clone());
        let answer =
            tokio::spawn(
                async move { client.connect(request).await.map(tonic::Response::into_inner) },
            );
        Call { requests, answer }
    }

    /// A call of alice that waits for the session manager.
    async fn requested(&mut self) -> (Call, ConnectionKey) {
        let call = self.call(None);
        call.send("alice", "desk", "", 0).await;
        (call, self.manager.opened().await)
    }

    /// An admitted session of alice.
    async fn session(&mut self) -> (ClientSession, ConnectionKey) {
        let (call, connection) = self.requested().await;
        self.manager.send(ShardCommand::Admit { connection });
        let events = call.answer.await.unwrap().unwrap();
        (ClientSession { requests: call.requests, events }, connection)
    }

    /// Asserts that the next report requests this catch-up.
    async fn assert_catch_up(&mut self, expected: (&str, i64)) {
        match self.manager.report().await {
            ShardReport::Resume { conversation, after, .. } => {
                assert_eq!((&*conversation, after), expected);
            }
            other => panic!("expected a catch-up: {other:?}"),
        }
    }

    /// The refused calls that were counted, by HTTP status.
    fn refused(&self) -> Vec<(u16, u64)> {
        self.metrics.refused().filter(|(_, calls)| *calls > 0).collect()
    }

    async fn ended(&mut self, session: ConnectionKey) -> EndReason {
        match self.manager.report().await {
            ShardReport::Ended { connection, why } if connection == session => why,
            other => panic!("expected its end: {other:?}"),
        }
    }
}

async fn channel(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

struct Call {
    requests: mpsc::Sender<DeliveryConnectRequest>,
    answer: JoinHandle<Result<Streaming<DeliveryEvent>, Status>>,
}

impl Call {
    async fn send(&self, user: &str, device: &str, conversation: &str, sequence: i64) {
        send_request(&self.requests, user, device, conversation, sequence).await;
    }

    async fn refused(self) -> Status {
        self.answer.await.unwrap().expect_err("must be refused")
    }
}

struct ClientSession {
    requests: mpsc::Sender<DeliveryConnectRequest>,
    events: Streaming<DeliveryEvent>,
}

impl ClientSession {
    async fn report_position(&self, conversation: &str, sequence: i64) {
        send_request(&self.requests, "", "", conversation, sequence).await;
    }

    async fn next(&mut self) -> Result<i64, Status> {
        let event = self.events.next().await.expect("a stream ends with a status");
        event.map(|event| event.sequence)
    }
}

async fn send_request(
    requests: &mpsc::Sender<DeliveryConnectRequest>,
    user: &str,
    device: &str,
    conversation: &str,
    sequence: i64,
) {
    let request = DeliveryConnectRequest {
        user_id: user.into(),
        device_id: device.into(),
        conversation_id: conversation.into(),
        last_received_sequence: sequence,
        cursor: None,
    };
    requests.send(request).await.unwrap();
}

fn message(conversation: &str, sequence: i64) -> crate::domain::event::Event {
    let encoded = prost::Message::encode_to_vec(&DeliveryEvent {
        conversation_id: conversation.into(),
        sequence,
        ..DeliveryEvent::default()
    });
    event(conversation_key(conversation), sequence, &encoded)
}

#[tokio::test]
async fn hello_carries_ids_token_and_address() {
    let mut port = Port::default().await;
    let call = port.call(Some("Bearer the-token"));
    call.send("alice", "desk", "", 0).await;
    let ShardReport::Opened { hello, .. } = port.manager.report().await else { panic!() };
    let Hello { user_id, device_id, token, address, .. } = *hello;
    assert_eq!((user_id.as_str(), device_id.as_str()), ("alice", "desk"));
    assert_eq!(token.unwrap().expose(), "the-token");
    assert!(address.is_loopback());
}

#[tokio::test]
async fn catch_up_changes_to_live_without_gap_or_duplicate() {
    let mut port = Port::default().await;
    let call = port.call(None);
    call.send("alice", "desk", "c", 1).await;
    let connection = port.manager.opened().await;
    // A live event before the session is admitted.
    port.router.deliver(connection, message("c", 3), DeliveryClass::Live, 1);
    port.manager.send(ShardCommand::Admit { connection });
    let events = call.answer.await.unwrap().unwrap();
    let mut session = ClientSession { requests: call.requests, events };

    port.assert_catch_up(("c", 1)).await;
    port.router.deliver(connection, message("c", 4), DeliveryClass::Live, 2);
    port.router.deliver(connection, message("other", 9), DeliveryClass::Live, 3);
    for sequence in [2, 3] {
        port.manager.deliver(connection, message("c", sequence), DeliveryClass::CatchUp, 7);
        assert_eq!(session.next().await.unwrap(), sequence);
        assert!(matches!(port.manager.report().await, ShardReport::Done { .. }));
    }
    port.manager.go_live(connection, conversation_key("c"), &[(2, 3)]);
    assert_eq!([session.next().await.unwrap(), session.next().await.unwrap()], [4, 9]);

    // A later position is an acknowledgement.
    session.report_position("c", 4).await;
    session.report_position("d", 0).await;
    port.assert_catch_up(("d", 0)).await;
}

/// Issue “From the log to the members”: what is committed late is no duplicate of what the client names.
#[tokio::test]
async fn live_event_is_sent_unless_catch_up_has_delivered_exactly_it() {
    let mut port = Port::default().await;
    let (mut session, connection) = port.session().await;
    session.report_position("c", 2).await;
    port.assert_catch_up(("c", 2)).await;
    port.manager.go_live(connection, conversation_key("c"), &[(4, 4)]);
    session.report_position("c", 9).await;
    // A client's requests are handled in order, so the ninth is acknowledged after this.
    session.report_position("above", i64::MAX).await;
    port.assert_catch_up(("above", i64::MAX)).await;
    port.manager.go_live(connection, conversation_key("above"), &[]);
    for (conversation, sequence) in [("c", 3), ("c", 4), ("c", 1), ("above", 1), ("c", 9)] {
        let event = message(conversation, sequence);
        port.router.deliver(connection, event, DeliveryClass::Live, 10);
    }
    for sequence in [3, 1, 1, 9] {
        assert_eq!(session.next().await.unwrap(), sequence);
    }
}

#[tokio::test]
async fn first_request_must_name_user_and_device() {
    let mut port = Port::default().await;
    let call = port.call(None);
    call.send("alice", "", "", 0).await;
    assert_eq!(call.refused().await.code(), Code::InvalidArgument);
    let call = port.call(None);
    drop(call.requests);
    let status = call.answer.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    // If the request names no user, the token may, so the session manager decides.
    let call = port.call(None);
    call.send("", "desk", "", 0).await;
    let connection = port.manager.opened().await;
    let refusal =
        Refusal { status: 400, body: "missing user_id or device_id".into(), retry_after_s: None };
    port.manager.send(ShardCommand::Refuse { connection, refusal });
    assert_eq!(call.refused().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn invalid_requests_are_the_clients_fault() {
    let mut port = Port::default().await;
    for (user, conversation, sequence) in
        [("", "c", -1), ("bob", "c", 0), ("", "x".repeat(257).as_str(), 0), ("", "c\n", 0)]
    {
        let (mut session, connection) = port.session().await;
        send_request(&session.requests, user, "", conversation, sequence).await;
        assert_eq!(session.next().await.unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(port.ended(connection).await, EndReason::PeerAtFault);
    }
    let (mut session, connection) = port.session().await;
    session.report_position(&"x".repeat(REQUEST_BYTES_MAX), 0).await;
    assert_eq!(session.next().await.unwrap_err().code(), Code::OutOfRange);
    assert_eq!(port.ended(connection).await, EndReason::PeerAtFault);
    let token = format!("Bearer {}", "x".repeat(9_000));
    let call = port.call(Some(&token));
    call.send("alice", "desk", "", 0).await;
    assert_eq!(call.refused().await.code(), Code::InvalidArgument);
    assert_eq!(port.counters.grpc_calls_malformed.get(), 6);
}

#[tokio::test]
async fn message_that_is_not_grpcs_ends_its_session_with_a_status() {
    for (message, code) in [
        (&[2, 0, 0, 0, 0][..], Code::Internal),
        (&[1, 0, 0, 0, 0], Code::Internal),
        (&[0, 0xff, 0, 0, 0], Code::OutOfRange),
        (&[0, 0, 0, 0, 1, 0xff], Code::InvalidArgument),
    ] {
        let mut port = Port::default().await;
        let stream = tokio::net::TcpStream::connect(port.address).await.unwrap();
        let (mut client, driven) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(driven);
        let request = http::Request::post("http://h/realchat.delivery.v1.DeliveryApi/Connect")
            .header("te", "trailers");
        let request = request.header("content-type", "application/grpc").body(()).unwrap();
        let (answer, mut body) = client.send_request(request, false).unwrap();
        let ids = DeliveryConnectRequest {
            user_id: "alice".into(),
            device_id: "desk".into(),
            ..DeliveryConnectRequest::default()
        };
        let ids = prost::Message::encode_to_vec(&ids);
        let first = [&[0, 0, 0, 0, ids.len() as u8], &ids[..]].concat();
        body.send_data(first.into(), false).unwrap();
        let connection = port.manager.opened().await;
        port.manager.send(ShardCommand::Admit { connection });
        let mut events = answer.await.unwrap().into_body();
        body.send_data(message.to_vec().into(), false).unwrap();
        while let Some(frame) = events.data().await {
            frame.unwrap();
        }
        let trailers = events.trailers().await.unwrap().expect("a status");
        assert_eq!(trailers["grpc-status"], (code as i32).to_string().as_str(), "{message:?}");
        assert_eq!(port.ended(connection).await, EndReason::PeerAtFault, "{message:?}");
    }
}

#[tokio::test]
async fn refusals_have_their_status() {
    let mut port = Port::default().await;
    for (http, code) in [
        (401, Code::Unauthenticated),
        (403, Code::PermissionDenied),
        (429, Code::ResourceExhausted),
        (503, Code::Unavailable),
    ] {
        let (call, connection) = port.requested().await;
        let refusal = Refusal { status: http, body: "why".into(), retry_after_s: None };
        port.manager.send(ShardCommand::Refuse { connection, refusal });
        let status = call.refused().await;
        assert_eq!((status.code(), status.message()), (code, "why"));
        assert_eq!(port.ended(connection).await, EndReason::Refused);
    }
    // The session manager counts them.
    assert_eq!(port.refused(), []);
}

#[tokio::test]
async fn replaced_session_ends_as_aborted() {
    let mut port = Port::default().await;
    let (mut session, connection) = port.session().await;
    port.manager.send(ShardCommand::Close {
        connection,
        close: Close::new(CloseCode::SESSION_REPLACED, "session_replaced"),
        why: EndReason::ClosedByService,
    });
    let status = session.next().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Aborted, "session_replaced"));
    assert_eq!(port.ended(connection).await, EndReason::ClosedByService);
}

#[tokio::test]
async fn cancelled_stream_and_lost_connection_have_different_reasons() {
    let mut port = Port::default().await;
    let (session, connection) = port.session().await;
    drop(session);
    assert_eq!(port.ended(connection).await, EndReason::ClosedByPeer);

    // A relay closes the client's socket without ending the stream.
    let (address, cut) = relay(port.address, Cut::Close).await;
    port.channel = channel(address).await;
    let (session, connection) = port.session().await;
    cut.send(()).unwrap();
    let why = port.ended(connection).await;
    assert!(matches!(why, EndReason::PeerGone | EndReason::PeerReset), "{why:?}");
    drop(session);
}

/// What a relay does with its sockets when it is cut.
#[derive(Clone, Copy, PartialEq)]
enum Cut {
    /// Closes them.
    Close,
    /// Keeps them open and reads nothing, like a lost network.
    Silence,
}

/// A relay in front of the port, and the sender that cuts it.
async fn relay(behind: SocketAddr, cut: Cut) -> (SocketAddr, oneshot::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (cut_now, cut_requested) = oneshot::channel();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(behind).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
            _ = cut_requested => {}
        }
        if cut == Cut::Silence {
            std::future::pending::<()>().await;
        }
    });
    (address, cut_now)
}

#[tokio::test]
async fn peer_that_does_not_answer_pings_is_disconnected() {
    let config = GrpcConfig {
        keepalive_interval: Duration::from_millis(50),
        keepalive_timeout: Duration::from_millis(50),
        ..GrpcConfig::default()
    };
    let mut port = Port::open(config, HubConfig::default()).await;
    let (address, cut) = relay(port.address, Cut::Silence).await;
    port.channel = channel(address).await;
    let (_session, connection) = port.session().await;
    cut.send(()).unwrap();
    assert_eq!(port.ended(connection).await, EndReason::PeerSilent);
}

#[tokio::test]
async fn half_closed_client_still_receives_events() {
    let mut port = Port::default().await;
    let (session, connection) = port.session().await;
    let ClientSession { requests, mut events } = session;
    drop(requests);
    for sequence in 1..=3 {
        port.router.deliver(connection, message("c", sequence), DeliveryClass::Live, 1);
        assert_eq!(events.next().await.unwrap().unwrap().sequence, sequence);
    }
}

#[tokio::test]
async fn stream_without_reads_is_closed_and_its_deliveries_are_done() {
    let limits =
        OutboxLimits { live_messages_max: 16, hold_messages_max: 16, ..OutboxLimits::default() };
    let hub_config = HubConfig { outbox: limits, ..HubConfig::default() };
    let mut port = Port::open(GrpcConfig::default(), hub_config).await;
    let (mut session, connection) = port.session().await;
    let (stream, large) = (conversation_key("c"), vec![0; 64 * 1024]);
    let encoded = prost::Message::encode_to_vec(&DeliveryEvent {
        conversation_id: String::from_utf8(large).unwrap(),
        ..DeliveryEvent::default()
    });
    // More than the HTTP/2 windows and the limit can hold together.
    for sequence in 1..=100 {
        port.router.deliver(connection, event(stream, sequence, &encoded), DeliveryClass::Live, 1);
    }
    for _ in 0..100 {
        assert!(matches!(port.router.report().await, ShardReport::Done { .. }));
    }
    let status = loop {
        if let Err(status) = session.next().await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(port.ended(connection).await, EndReason::QueueOverflow);
}

#[tokio::test]
async fn shutdown_waits_for_the_streams_and_then_returns() {
    let mut port = Port::default().await;
    let (mut session, connection) = port.session().await;
    port.shutdown.send(()).unwrap();
    port.manager.send(ShardCommand::Close {
        connection,
        close: Close::new(CloseCode::SERVICE_RESTART, "draining; reconnect in 5 ms"),
        why: EndReason::Draining,
    });
    assert_eq!(session.next().await.unwrap_err().code(), Code::Unavailable);
    port.served.await.unwrap().unwrap();
}
