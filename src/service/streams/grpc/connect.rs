//! A call of `Connect`: handshake, request reader and event stream.

use std::convert::Infallible;
use std::error::Error as _;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Request, Response, Status, Streaming};

use super::codec::EventCodec;
use super::connection::{ConnectionInfo, ConnectionState, SessionGuard};
use super::{GrpcConfig, GrpcCounters, GrpcPorts, HEADER_BYTES_MAX};
use crate::domain::close::EndReason;
use crate::domain::command::{Hello, Secret};
use crate::domain::cursor::CURSOR_BYTES_MAX;
use crate::domain::encoding::Encoding;
use crate::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};
use crate::service::events::proto::delivery::v1::DeliveryConnectRequest;
use crate::service::runtime::places::Places;
use crate::service::streams::hub::{
    Delivery, NotAdmitted, PositionReport, StreamSession, of_refusal,
};

/// Longest request, bytes: three ids, a number and a cursor.
pub const REQUEST_BYTES_MAX: usize = 4 * ID_BYTES_MAX + CURSOR_BYTES_MAX;
/// Path of the only method.
const CONNECT: &str = "/realchat.delivery.v1.DeliveryApi/Connect";

/// `realchat.delivery.v1.DeliveryApi`. Not generated, because its events are already encoded.
#[derive(Clone)]
pub(super) struct ConnectService {
    handler: Arc<ConnectHandler>,
}

/// Handles the calls. Holds what they share.
struct ConnectHandler {
    config: GrpcConfig,
    ports: GrpcPorts,
    counters: Arc<GrpcCounters>,
    /// Places of calls that wait for their first request.
    waiting: Arc<Places>,
}

impl ConnectService {
    pub(super) fn new(config: GrpcConfig, ports: GrpcPorts, counters: Arc<GrpcCounters>) -> Self {
        let waiting = Places::new(config.calls_waiting_max);
        Self { handler: Arc::new(ConnectHandler { config, ports, counters, waiting }) }
    }
}

impl NamedService for ConnectService {
    const NAME: &'static str = "realchat.delivery.v1.DeliveryApi";
}

impl Service<http::Request<Body>> for ConnectService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let handler = Arc::clone(&self.handler);
        let is_counted = Arc::new(AtomicBool::new(false));
        let call =
            ConnectCall { handler: Arc::clone(&handler), is_counted: Arc::clone(&is_counted) };
        Box::pin(async move {
            let response = if request.uri().path() != CONNECT {
                Status::unimplemented("no such method").into_http()
            } else if header_bytes(request.headers()) > HEADER_BYTES_MAX as usize {
                handler.malformed("the metadata is larger than 16 KiB").into_http()
            } else {
                Grpc::new(EventCodec)
                    .apply_max_message_size_config(Some(REQUEST_BYTES_MAX), None)
                    .streaming(call, request)
                    .await
            };
            // Headers with a status are all of a response.
            if let Some(status) = Status::from_header_map(response.headers())
                && !is_counted.load(Ordering::Relaxed)
            {
                handler.ports.hub.metrics().count_refused(status.code());
            }
            Ok(response)
        })
    }
}

/// Size of header fields as HTTP/2 counts it, bytes (RFC 9113 §6.5.2).
fn header_bytes(fields: &http::HeaderMap) -> usize {
    fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// One call.
struct ConnectCall {
    handler: Arc<ConnectHandler>,
    /// The session manager has counted its end.
    is_counted: Arc<AtomicBool>,
}

impl StreamingService<DeliveryConnectRequest> for ConnectCall {
    type Response = Arc<Delivery>;
    type ResponseStream = EventStream;
    type Future = BoxFuture<Response<EventStream>, Status>;

    fn call(&mut self, request: Request<Streaming<DeliveryConnectRequest>>) -> Self::Future {
        let (handler, is_counted) = (Arc::clone(&self.handler), Arc::clone(&self.is_counted));
        Box::pin(async move { handler.connect(request, &is_counted).await })
    }
}

impl ConnectHandler {
    async fn connect(
        self: Arc<Self>,
        request: Request<Streaming<DeliveryConnectRequest>>,
        is_counted: &AtomicBool,
    ) -> Result<Response<EventStream>, Status> {
        self.counters.grpc_calls.add(1);
        let deadline = self.config.handshake_timeout;
        let ConnectionInfo(connection) =
            request.extensions().get().cloned().expect("set for every call");
        let token = bearer(request.metadata());
        if token.as_ref().is_some_and(|token| token.expose().len() > TOKEN_BYTES_MAX) {
            return Err(self.malformed("the token is longer than 8 KiB"));
        }
        let mut requests = request.into_inner();
        let first = self.first_request(&mut requests, token.as_ref()).await?;
        self.counters.grpc_requests.add(1);
        self.check(&first)?;
        if first.device_id.is_empty() {
            return Err(self.malformed("missing user_id or device_id"));
        }
        let hello = Box::new(Hello {
            user_id: first.user_id.clone(),
            device_id: first.device_id.clone(),
            token,
            address: connection.address,
            encoding: Encoding::Stream,
        });
        let session = match timeout(deadline, self.ports.hub.open(hello)).await {
            Ok(Ok(session)) => Arc::new(session),
            Ok(Err(refused)) => {
                is_counted.store(matches!(refused, NotAdmitted::Refused(_)), Ordering::Relaxed);
                return Err(refused.into());
            }
            Err(_) => {
                self.counters.grpc_calls_late.add(1);
                return Err(Status::unavailable("the session was not admitted in time"));
            }
        };
        let outbox = Arc::clone(&session.outbox);
        let events = EventStream {
            session: Arc::clone(&session),
            dropped: Arc::new(Notify::new()),
            ended: false,
            _guard: connection.session_begun(),
        };
        let stream_dropped = Arc::clone(&events.dropped);
        let reader = RequestReader { handler: self, session, requests, stream_dropped, connection };
        tokio::spawn(reader.run(first));
        let mut response = Response::new(events);
        response.extensions_mut().insert(outbox);
        Ok(response)
    }

    /// The first request, if it comes in time. Unless it is here already, the token is judged before: otherwise a
    /// client without a valid one could keep its call open until the deadline.
    async fn first_request(
        &self,
        requests: &mut Streaming<DeliveryConnectRequest>,
        token: Option<&Secret>,
    ) -> Result<DeliveryConnectRequest, Status> {
        let judged = async {
            match (self.ports.judge)(token) {
                Ok(()) => pending().await,
                Err(refusal) => refusal,
            }
        };
        let leave = Arc::new(Notify::new());
        let replaced = || {
            self.counters.grpc_calls_replaced.add(1);
            Status::resource_exhausted("too many calls wait for their first request")
        };
        let _place = self.waiting.take(&leave).await.ok_or_else(replaced)?;
        let first = tokio::select! {
            biased;
            first = requests.message() => first?,
            refusal = judged => {
                self.counters.grpc_calls_refused_token.add(1);
                return Err(of_refusal(&refusal));
            }
            () = leave.notified() => return Err(replaced()),
            () = sleep(self.config.handshake_timeout) => {
                self.counters.grpc_calls_late.add(1);
                return Err(Status::deadline_exceeded("no first request came in time"));
            }
        };
        first.ok_or_else(|| self.malformed("the first request must name user and device"))
    }

    /// Checks that a request is valid.
    fn check(&self, request: &DeliveryConnectRequest) -> Result<(), Status> {
        let ids = [&request.user_id, &request.device_id, &request.conversation_id];
        if ids.iter().any(|id| id.len() > ID_BYTES_MAX) {
            return Err(self.malformed("an id is longer than 256 bytes"));
        }
        if ids.iter().any(|id| id.chars().any(char::is_control)) {
            return Err(self.malformed("an id contains a control character"));
        }
        if request.last_received_sequence < 0 {
            return Err(self.malformed("last_received_sequence is negative"));
        }
        Ok(())
    }

    fn malformed(&self, what: &'static str) -> Status {
        self.counters.grpc_calls_malformed.add(1);
        Status::invalid_argument(what)
    }
}

/// The bearer token of a call (RFC 6750 §2.1; the scheme is not case-sensitive).
fn bearer(metadata: &MetadataMap) -> Option<Secret> {
    let (scheme, token) = metadata.get("authorization")?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Secret::new(token.trim().to_owned()))
}

/// The response stream, which is the writer of the session. HTTP/2 polls it only while the client's
/// window of the stream is open.
pub(super) struct EventStream {
    session: Arc<StreamSession>,
    dropped: Arc<Notify>,
    ended: bool,
    _guard: SessionGuard,
}

impl Stream for EventStream {
    type Item = Result<Arc<Delivery>, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.session.outbox.poll_next(context, Instant::now()).map(|next| {
            match &next {
                Ok(delivery) => self.session.sent(delivery),
                Err(_) => self.ended = true,
            }
            Some(next)
        })
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.dropped.notify_one();
    }
}

struct RequestReader {
    handler: Arc<ConnectHandler>,
    session: Arc<StreamSession>,
    requests: Streaming<DeliveryConnectRequest>,
    stream_dropped: Arc<Notify>,
    connection: Arc<ConnectionState>,
}

impl RequestReader {
    async fn run(mut self, mut first: DeliveryConnectRequest) {
        if let Some(cursor) = first.cursor.take() {
            self.session.resume_since(cursor.into_boxed_slice()).await;
        }
        let (user, device) = (first.user_id.clone(), first.device_id.clone());
        let config = &self.handler.config;
        let mut rate = TokenBucket::new(config, Instant::now());
        let opening_until = Instant::now() + config.opening_max;
        let mut opening = true;
        let mut request = first;
        loop {
            if !self.handle(request, &mut rate).await {
                return;
            }
            let pause = (Instant::now() + self.handler.config.opening_pause).min(opening_until);
            request = loop {
                // Biased: a reset by the client must win over the drop of the stream that follows it.
                tokio::select! {
                    biased;
                    next = self.requests.message() => match next {
                        Ok(Some(request)) => break request,
                        Ok(None) => return self.half_closed().await,
                        Err(status) => return self.request_failed(status),
                    },
                    () = self.stream_dropped.notified() => return self.stream_ended(),
                    () = sleep_until(pause), if opening => {
                        opening = false;
                        self.session.outbox.opening_done(Instant::now());
                    }
                }
            };
            self.handler.counters.grpc_requests.add(1);
            let same = |named: &str, bound: &str| named.is_empty() || named == bound;
            if !same(&request.user_id, &user) || !same(&request.device_id, &device) {
                let status = self.handler.malformed("a session keeps its user and device");
                return self.session.close_at_fault(status);
            }
        }
    }

    /// Returns whether the session continues.
    async fn handle(&self, request: DeliveryConnectRequest, rate: &mut TokenBucket) -> bool {
        if !rate.take(Instant::now()) {
            self.handler.counters.grpc_requests_too_many.add(1);
            self.session.close_at_fault(Status::resource_exhausted("too many requests"));
            return false;
        }
        if let Err(status) = self.handler.check(&request) {
            self.session.close_at_fault(status);
            return false;
        }
        if request.conversation_id.is_empty() {
            return true;
        }
        let DeliveryConnectRequest { conversation_id, last_received_sequence, .. } = request;
        match self.session.report_position(conversation_id, last_received_sequence).await {
            PositionReport::CatchUp | PositionReport::Acknowledged => true,
            PositionReport::TooMany => {
                let reason = "too many conversations in one session";
                self.session.close_at_fault(Status::resource_exhausted(reason));
                false
            }
        }
    }

    /// The client sends no more requests but still receives events.
    async fn half_closed(self) {
        self.session.outbox.opening_done(Instant::now());
        self.stream_dropped.notified().await;
        self.stream_ended();
    }

    /// Records why the stream ended. If the hub closed it, the hub's reason counts.
    fn stream_ended(&self) {
        self.session.ended(self.connection.socket.reason_of_stream());
    }

    fn request_failed(&self, status: Status) {
        let is_of_http2 = status.source().is_some_and(|source| source.is::<h2::Error>());
        match status.code() {
            Code::Cancelled => self.session.ended(EndReason::ClosedByPeer),
            _ if is_of_http2 => self.stream_ended(),
            // The decoder does not understand the message, and nothing behind it.
            _ => {
                self.handler.counters.grpc_calls_malformed.add(1);
                self.session.close_at_fault(status);
            }
        }
    }
}

/// Rate limit of a client's requests: a burst, then a steady rate.
struct TokenBucket {
    tokens: f64,
    burst: f64,
    per_s: f64,
    updated_at: Instant,
}

impl TokenBucket {
    fn new(config: &GrpcConfig, now: Instant) -> Self {
        let burst = f64::from(config.requests_burst);
        Self { tokens: burst, burst, per_s: f64::from(config.requests_per_s), updated_at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let refill = now.duration_since(self.updated_at).as_secs_f64() * self.per_s;
        self.tokens = (self.tokens + refill).min(self.burst);
        self.updated_at = now;
        let available = self.tokens >= 1.0;
        if available {
            self.tokens -= 1.0;
        }
        available
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn token_bucket_allows_a_burst_and_then_a_rate() {
        let config = GrpcConfig { requests_burst: 2, requests_per_s: 10, ..GrpcConfig::default() };
        let start = Instant::now();
        let mut rate = TokenBucket::new(&config, start);
        let taken: Vec<bool> = [0, 0, 0, 99, 100, 100, 10_000, 10_000, 10_000]
            .map(|ms| rate.take(start + Duration::from_millis(ms)))
            .into();
        assert_eq!(taken, [true, true, false, false, true, false, true, true, false]);
    }

    #[test]
    fn bearer_token_is_read_from_authorization() {
        let token = |value: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("authorization", value.parse().unwrap());
            bearer(&metadata).map(|token| token.expose().to_owned())
        };
        assert_eq!(token("Bearer abc"), Some("abc".into()));
        assert_eq!(token("bearer abc"), Some("abc".into()));
        assert_eq!(token("Basic abc"), None);
        assert!(bearer(&MetadataMap::new()).is_none());
    }
}
