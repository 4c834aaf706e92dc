//! One HTTP/2 connection of the gRPC port: its calls, its deadlines and its end.
//!
//! Uses `h2` without `hyper`, which sets neither its limit of small frames nor a deadline for the preface. One task
//! does in turn:
//!
//! ```text
//!  read a portion ──► begin the calls in it ──► pass its frames to the inboxes ──► read the next portion
//! ```
//!
//! So what HTTP/2 holds of unread frames is what one portion contains, and no client can fill it up for the other
//! users of the connection. The calls run in tasks of their own.

use std::future::{Future, pending, poll_fn};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use h2::server::{Connection as Http2, SendResponse};
use h2::{Ping, PingPong, Reason, RecvStream};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::StreamExt as _;
use tonic::Status;
use tonic::codegen::{Service as _, http};
use tonic::service::Routes;

use super::limits::AddressPlace;
use super::requests::{Inbox, RequestBody, receive};
use super::responses::{Piece, SendRoom, send};
use super::socket::{Socket, SocketState, TcpSocket, Transport};
use super::tls::GrpcTls;
use super::unsent::{OwnUnsentEnds, UnsentEnds};
use super::{
    CALLS_REFUSED_PER_S_MAX, CONNECTION_SEND_BYTES, CONNECTION_WINDOW_BYTES, GrpcConfig,
    GrpcCounters, HEADERS_READ_MAX, STREAM_WINDOW_BYTES, STREAMS_PER_CONNECTION_MAX,
};
use crate::domain::close::EndReason;
use crate::domain::limiter::LimitExceeded;
use crate::service::runtime::places::{Places, Replaceable};
use crate::service::streams::hub::HubMetrics;

/// Time for a client to close its connection after it was told to.
const CLOSE_TIME: Duration = Duration::from_secs(5);
/// How long frames are ignored that a client sends on a stream that the server has ended.
const LATE_FRAMES: Duration = Duration::from_secs(5);

/// What all connections share.
pub(super) struct Shared {
    pub(super) config: GrpcConfig,
    pub(super) routes: Routes,
    pub(super) counters: Arc<GrpcCounters>,
    /// Those of the hub, which counts refused calls.
    pub(super) metrics: Arc<HubMetrics>,
    /// Those of all connections. A connection without a session is replaceable.
    pub(super) places: Arc<Places>,
    pub(super) unsent: Arc<UnsentEnds>,
    /// `None`: the port speaks plaintext.
    pub(super) tls: Option<Arc<GrpcTls>>,
}

/// Connection data for its calls.
#[derive(Clone, Debug)]
pub(super) struct ConnectionInfo(pub(super) Arc<ConnectionState>);

/// What a connection and its calls know of each other.
#[derive(Debug)]
pub(super) struct ConnectionState {
    /// The client's address.
    pub(super) address: IpAddr,
    /// How the connection ends.
    pub(super) socket: Arc<SocketState>,
    sessions: Mutex<Sessions>,
    places: Arc<Places>,
    /// Notified when the connection has to make room for another one.
    leave: Arc<Notify>,
}

#[derive(Debug)]
struct Sessions {
    open: usize,
    /// `None` while there are sessions.
    replaceable: Option<Replaceable>,
}

impl ConnectionState {
    fn new(
        address: IpAddr,
        socket: Arc<SocketState>,
        places: &Arc<Places>,
        (replaceable, leave): (Replaceable, Arc<Notify>),
    ) -> Self {
        Self {
            address,
            socket,
            sessions: Mutex::new(Sessions { open: 0, replaceable: Some(replaceable) }),
            places: Arc::clone(places),
            leave,
        }
    }

    /// A session has begun. While there is one, the connection makes room for no other. It ends when the guard is
    /// dropped.
    pub(super) fn session_begun(self: &Arc<Self>) -> SessionGuard {
        let mut sessions = self.sessions.lock().expect("no holder panics");
        sessions.open += 1;
        sessions.replaceable = None;
        SessionGuard(Arc::clone(self))
    }
}

/// An open session of a connection.
#[derive(Debug)]
pub(super) struct SessionGuard(Arc<ConnectionState>);

impl Drop for SessionGuard {
    fn drop(&mut self) {
        let state = &self.0;
        let mut sessions = state.sessions.lock().expect("no holder panics");
        sessions.open -= 1;
        if sessions.open == 0 {
            sessions.replaceable = Some(state.places.replaceable(Arc::clone(&state.leave)));
        }
    }
}

/// Serves one connection until it has ended. It makes room when `makes_room.1` is notified. `stop`: no new calls; ends
/// with the last one.
pub(super) async fn serve(
    shared: Arc<Shared>,
    stream: TcpStream,
    address: AddressPlace,
    makes_room: (Replaceable, Arc<Notify>),
    stop: watch::Receiver<bool>,
) {
    let socket = TcpSocket::new(stream);
    let state = ConnectionState::new(address.address(), socket.state(), &shared.places, makes_room);
    let handshake = handshake(&shared, socket);
    let http2 = tokio::select! {
        http2 = timeout(shared.config.handshake_timeout, handshake) => http2,
        () = state.leave.notified() => return shared.counters.grpc_connections_replaced.add(1),
    };
    match http2 {
        Ok(Some(http2)) => Connection::new(shared, Arc::new(state), address, http2).run(stop).await,
        Ok(None) => shared.counters.grpc_connections_malformed.add(1),
        Err(_) => shared.counters.grpc_connections_late.add(1),
    }
}

/// Waits for the handshake of TLS, if the port has it, and for the preface. `None`: there was none.
async fn handshake(shared: &Shared, socket: TcpSocket) -> Option<Http2<Socket, Piece>> {
    let state = socket.state();
    let transport: Box<dyn Transport> = match &shared.tls {
        None => Box::new(socket),
        Some(tls) => Box::new(tls.accept(socket, shared.config.handshake_timeout).await.ok()?),
    };
    http2().handshake(Socket::new(transport, state)).await.ok()
}

fn http2() -> h2::server::Builder {
    let streams = STREAMS_PER_CONNECTION_MAX as usize;
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .initial_window_size(STREAM_WINDOW_BYTES)
        // Each stream has its whole window, whatever the others use.
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(CONNECTION_SEND_BYTES)
        .max_header_list_size(HEADERS_READ_MAX)
        // Not exhausted by what one user does. What waits is bounded by the portions of the socket, and frames that are
        // ignored on a stream that has ended would use up a budget for ever.
        .data_frame_budget(usize::MAX)
        .max_pending_accept_reset_streams(streams)
        .max_concurrent_reset_streams(streams)
        .reset_stream_duration(LATE_FRAMES);
    builder
}

/// A connection whose preface has come.
struct Connection {
    shared: Arc<Shared>,
    state: Arc<ConnectionState>,
    address: AddressPlace,
    http2: Http2<Socket, Piece>,
    /// The connection has counted as a handshake, and so has its first call with it.
    has_called: bool,
    refused: RefusedCalls,
    unsent: OwnUnsentEnds,
    /// The socket takes nothing, and the node has too many ends of calls that wait for that.
    is_unread: bool,
    pings: PingPong,
    room: SendRoom,
    /// When the client must have answered the ping in flight.
    pong_due: Option<Instant>,
    /// One for each open stream.
    receivers: FuturesUnordered<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Since when there has been no stream.
    idle_since: Instant,
    /// When the connection is cut, after its client was told to close it.
    cut_at: Option<Instant>,
}

impl Connection {
    fn new(
        shared: Arc<Shared>,
        state: Arc<ConnectionState>,
        address: AddressPlace,
        mut http2: Http2<Socket, Piece>,
    ) -> Self {
        let pings = http2.ping_pong().expect("taken once");
        let idle_since = state.socket.opened_at();
        let receivers = FuturesUnordered::new();
        let room = SendRoom::new();
        let unsent = OwnUnsentEnds::new(&shared.unsent);
        Self {
            shared,
            state,
            address,
            http2,
            has_called: false,
            refused: RefusedCalls::default(),
            unsent,
            is_unread: false,
            pings,
            room,
            pong_due: None,
            receivers,
            idle_since,
            cut_at: None,
        }
    }

    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut stopping = false;
        let timer = sleep_until(self.next_deadline());
        tokio::pin!(timer);
        loop {
            let next = self.next_deadline();
            if next < timer.deadline() {
                timer.as_mut().reset(next);
            }
            if self.is_unread {
                return;
            }
            let is_pinged = self.pong_due.is_some();
            let Self { http2, receivers, pings, state, .. } = &mut self;
            // Biased: the next portion is read when all that is in this one has been passed on.
            tokio::select! {
                biased;
                call = http2.accept() => match call {
                    Some(Ok((request, respond))) => self.begin_call(request, respond),
                    Some(Err(_)) | None => return,
                },
                Some(_) = receivers.next(), if !receivers.is_empty() => {
                    if self.receivers.is_empty() {
                        self.idle_since = Instant::now();
                    }
                    self.call_ended();
                }
                () = state.leave.notified() => {
                    return self.shared.counters.grpc_connections_replaced.add(1);
                }
                () = stop_requested(&mut stop), if !stopping => {
                    stopping = true;
                    self.http2.graceful_shutdown();
                }
                pong = poll_fn(|context| pings.poll_pong(context)), if is_pinged => {
                    self.pong_due = None;
                    if pong.is_err() {
                        return;
                    }
                }
                () = &mut timer => {
                    if !self.on_deadline(Instant::now()) {
                        return;
                    }
                    timer.as_mut().reset(self.next_deadline());
                }
                // Blocked: there is one more deadline.
                () = block_changed(&state.socket) => {
                    if state.socket.blocked_since().is_none() {
                        self.unsent.sent();
                    }
                }
                () = next_portion(&state.socket) => {}
            }
        }
    }

    fn begin_call(&mut self, request: http::Request<RecvStream>, mut respond: SendResponse<Piece>) {
        // Before anything else: a call that the client has reset at once counts, too.
        if let Err(exceeded) = self.count_call() {
            return self.refuse(&exceeded, &mut respond);
        }
        let (head, mut stream) = request.into_parts();
        let inbox = Inbox::new(stream.flow_control().clone());
        let running = inbox.call();
        let mut request = http::Request::from_parts(head, RequestBody(Arc::clone(&inbox)));
        request.extensions_mut().insert(ConnectionInfo(Arc::clone(&self.state)));
        self.receivers.push(Box::pin(receive(stream, inbox)));
        let mut routes = self.shared.routes.clone();
        let room = self.room.clone();
        tokio::spawn(async move {
            let _running = running;
            let response = tokio::select! {
                biased;
                _ = poll_fn(|context| respond.poll_reset(context)) => return,
                response = routes.call(request) => response,
            };
            let Ok(response) = response;
            send(response, respond, &room).await;
        });
    }

    /// Counts a call as a handshake, except the first one.
    fn count_call(&mut self) -> Result<(), LimitExceeded> {
        self.shared.counters.grpc_streams.add(1);
        match std::mem::replace(&mut self.has_called, true) {
            true => self.address.count_handshake(),
            false => Ok(()),
        }
    }

    /// Refuses a call without a task of its own. Ends the connection if that is too often.
    fn refuse(&mut self, exceeded: &LimitExceeded, respond: &mut SendResponse<Piece>) {
        let counters = &self.shared.counters;
        let status = match exceeded {
            LimitExceeded::TotalRate => Status::unavailable("too many clients connect at once"),
            LimitExceeded::AddressRate | LimitExceeded::AddressConnections => {
                Status::resource_exhausted("too many handshakes from your address")
            }
        };
        counters.grpc_calls_refused_rate.add(1);
        self.shared.metrics.count_refused(status.code());
        // An error means that the client has reset the stream.
        let _ = respond.send_response(status.into_http(), true);
        self.call_ended();
        if self.refused.is_flood(self.address.now_ms()) {
            self.shared.counters.grpc_connections_flooded.add(1);
            self.state.socket.ended(EndReason::PeerAtFault);
            self.http2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
        }
    }

    /// Counts the end of a call, and that it is unsent if the socket takes nothing. Cuts the connection if the node has
    /// too many of these.
    fn call_ended(&mut self) {
        if self.state.socket.blocked_since().is_some() && !self.unsent.add() && !self.is_unread {
            self.is_unread = true;
            self.state.socket.ended(EndReason::WriteTimeout);
            self.shared.counters.grpc_connections_unread.add(1);
        }
    }

    /// When [`Connection::on_deadline`] has something to do, at the earliest.
    fn next_deadline(&self) -> Instant {
        let config = &self.shared.config;
        let ping =
            self.pong_due.unwrap_or(self.state.socket.received_at() + config.keepalive_interval);
        let idle = self.receivers.is_empty().then(|| self.idle_since + config.idle_timeout);
        let idle = idle.filter(|_| self.cut_at.is_none());
        [idle, self.cut_at, self.stalled_at()].into_iter().flatten().fold(ping, Instant::min)
    }

    /// When the socket has taken nothing for the write timeout.
    fn stalled_at(&self) -> Option<Instant> {
        Some(self.state.socket.blocked_since()? + self.shared.config.write_timeout)
    }

    /// Pings or closes the connection if it is time. Returns whether it is still open.
    fn on_deadline(&mut self, now: Instant) -> bool {
        let config = &self.shared.config;
        let counters = &self.shared.counters;
        if self.cut_at.is_some_and(|at| at <= now) {
            if self.receivers.is_empty() {
                return false;
            }
            // A call has come before the client was told. The connection ends with it.
            self.cut_at = Some(now + CLOSE_TIME);
        }
        if self.pong_due.is_some_and(|due| due <= now) {
            self.state.socket.ended(EndReason::PeerSilent);
            counters.grpc_connections_silent.add(1);
            return false;
        }
        if self.stalled_at().is_some_and(|at| at <= now) {
            self.state.socket.ended(EndReason::WriteTimeout);
            counters.grpc_connections_stalled.add(1);
            return false;
        }
        let idle = self.receivers.is_empty() && self.idle_since + config.idle_timeout <= now;
        if idle && self.cut_at.is_none() {
            counters.grpc_connections_idle.add(1);
            self.http2.graceful_shutdown();
            self.cut_at = Some(now + CLOSE_TIME);
        }
        let silent = self.state.socket.received_at() + config.keepalive_interval <= now;
        if self.pong_due.is_none() && silent {
            // An error means that the connection is closing.
            let _ = self.pings.send_ping(Ping::opaque());
            self.pong_due = Some(now + config.keepalive_timeout);
        }
        true
    }
}

/// Calls that were refused within a second of the clock that the handshake rates have.
#[derive(Debug, Default)]
struct RefusedCalls {
    second: u64,
    count: u32,
}

impl RefusedCalls {
    /// Counts one. Returns whether this is the first one above the limit.
    fn is_flood(&mut self, now_ms: u64) -> bool {
        let second = now_ms / 1_000;
        if self.second != second {
            *self = Self { second, count: 0 };
        }
        self.count += 1;
        self.count == CALLS_REFUSED_PER_S_MAX + 1
    }
}

async fn stop_requested(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        pending().await
    }
}

/// Is ready when HTTP/2 waits for a portion, and grants it. Asks at each poll: HTTP/2 may have read in the same one.
fn next_portion(socket: &SocketState) -> impl Future<Output = ()> {
    poll_fn(|_| if socket.grant_portion() { Poll::Ready(()) } else { Poll::Pending })
}

/// Is ready when the socket has begun or ceased to block. Asks at each poll, for the same reason.
fn block_changed(socket: &SocketState) -> impl Future<Output = ()> {
    poll_fn(|_| if socket.take_block_change() { Poll::Ready(()) } else { Poll::Pending })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_calls_of_a_proxy_are_no_flood() {
        let mut refused = RefusedCalls::default();
        for now_ms in [0, 999, 1_000, 2_999] {
            for _ in 0..CALLS_REFUSED_PER_S_MAX / 2 {
                assert!(!refused.is_flood(now_ms));
            }
        }
        let more = [(); CALLS_REFUSED_PER_S_MAX as usize].map(|()| refused.is_flood(2_000));
        assert_eq!(more.iter().filter(|is_flood| **is_flood).count(), 1);
    }
}
