//! One call of `Connect`: its handshake, its reader and its writer.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Request, Response, Status, Streaming};

use super::codec::EventCodec;
use super::connections::{Fate, Peer};
use super::{GrpcConfig, GrpcCounters};
use crate::domain::close::EndReason;
use crate::domain::command::{Hello, Secret};
use crate::domain::encoding::Encoding;
use crate::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};
use crate::service::events::proto::delivery::v1::DeliveryConnectRequest;
use crate::service::streams::hub::{Admitted, Delivery, HubHandle, Mention};

/// One request, bytes: four fields, three of them bounded ids.
pub const REQUEST_BYTES_MAX: usize = 4 * ID_BYTES_MAX;
/// The path of the one method.
const CONNECT: &str = "/realchat.delivery.v1.DeliveryApi/Connect";

/// `realchat.delivery.v1.DeliveryApi`. Written out instead of generated because its events come
/// encoded.
#[derive(Clone)]
pub(super) struct ConnectService {
    shared: Arc<Shared>,
}

struct Shared {
    config: GrpcConfig,
    hub: HubHandle,
    counters: Arc<GrpcCounters>,
}

impl ConnectService {
    pub(super) fn new(config: GrpcConfig, hub: HubHandle, counters: Arc<GrpcCounters>) -> Self {
        Self { shared: Arc::new(Shared { config, hub, counters }) }
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
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != CONNECT {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let mut grpc =
                Grpc::new(EventCodec).apply_max_message_size_config(Some(REQUEST_BYTES_MAX), None);
            Ok(grpc.streaming(service, request).await)
        })
    }
}

impl StreamingService<DeliveryConnectRequest> for ConnectService {
    type Response = Arc<Delivery>;
    type ResponseStream = Writer;
    type Future = BoxFuture<Response<Writer>, Status>;

    fn call(&mut self, request: Request<Streaming<DeliveryConnectRequest>>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.connect(request).await.map(Response::new) })
    }
}

impl Shared {
    async fn connect(
        self: Arc<Self>,
        request: Request<Streaming<DeliveryConnectRequest>>,
    ) -> Result<Writer, Status> {
        self.counters.grpc_calls.add(1);
        let deadline = self.config.handshake_timeout;
        let peer: Peer =
            request.extensions().get::<Peer>().expect("of a connection of ours").clone();
        let token = bearer(request.metadata());
        if token.as_ref().is_some_and(|token| token.expose().len() > TOKEN_BYTES_MAX) {
            return Err(self.malformed("the token is longer than 8 KiB"));
        }
        let mut requests = request.into_inner();
        let first = match timeout(deadline, requests.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(Ok(None)) => return Err(self.malformed("the first request names user and device")),
            Ok(Err(status)) => return Err(status),
            Err(_) => {
                self.counters.grpc_calls_late.add(1);
                return Err(Status::deadline_exceeded("no first request came in time"));
            }
        };
        self.counters.grpc_requests.add(1);
        self.check(&first)?;
        if first.device_id.is_empty() {
            return Err(self.malformed("missing user_id or device_id"));
        }
        let hello = Box::new(Hello {
            user_id: first.user_id.clone(),
            device_id: first.device_id.clone(),
            token,
            address: peer.address,
            encoding: Encoding::Stream,
        });
        let session = match timeout(deadline, self.hub.open(hello)).await {
            Ok(session) => Arc::new(session?),
            Err(_) => {
                self.counters.grpc_calls_late.add(1);
                return Err(Status::unavailable("the session was not admitted in time"));
            }
        };
        let writer_gone = Arc::new(Notify::new());
        let writer =
            Writer { session: Arc::clone(&session), gone: Arc::clone(&writer_gone), over: false };
        let reader = Reader { shared: self, session, requests, writer_gone, fate: peer.fate };
        tokio::spawn(reader.run(first));
        Ok(writer)
    }

    /// Whether a request is within its bounds.
    fn check(&self, request: &DeliveryConnectRequest) -> Result<(), Status> {
        let ids = [&request.user_id, &request.device_id, &request.conversation_id];
        if ids.iter().any(|id| id.len() > ID_BYTES_MAX) {
            return Err(self.malformed("an id is longer than 256 bytes"));
        }
        if ids.iter().any(|id| id.chars().any(char::is_control)) {
            return Err(self.malformed("an id holds a control character"));
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

/// The response stream. Polled by HTTP/2 only while the client's window for the stream is open.
pub(super) struct Writer {
    session: Arc<Admitted>,
    gone: Arc<Notify>,
    over: bool,
}

impl Stream for Writer {
    type Item = Result<Arc<Delivery>, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        self.session.outbox.poll_next(context, Instant::now()).map(|next| {
            match &next {
                Ok(delivery) => self.session.sent(delivery),
                Err(_) => self.over = true,
            }
            Some(next)
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.gone.notify_one();
    }
}

struct Reader {
    shared: Arc<Shared>,
    session: Arc<Admitted>,
    requests: Streaming<DeliveryConnectRequest>,
    writer_gone: Arc<Notify>,
    fate: Arc<Fate>,
}

impl Reader {
    async fn run(mut self, first: DeliveryConnectRequest) {
        let (user, device) = (first.user_id.clone(), first.device_id.clone());
        let config = &self.shared.config;
        let mut allowance = Allowance::new(config, Instant::now());
        let opening_until = Instant::now() + config.opening_max;
        let mut opening = true;
        let mut request = first;
        loop {
            if !self.handle(request, &mut allowance).await {
                return;
            }
            let pause = (Instant::now() + self.shared.config.opening_pause).min(opening_until);
            request = loop {
                // In this order: a client that reset its stream is told from one that vanished.
                tokio::select! {
                    biased;
                    next = self.requests.message() => match next {
                        Ok(Some(request)) => break request,
                        Ok(None) => return self.half_closed().await,
                        Err(status) => return self.failed(status).await,
                    },
                    () = self.writer_gone.notified() => return self.over().await,
                    () = sleep_until(pause), if opening => {
                        opening = false;
                        self.session.outbox.open_up(Instant::now());
                    }
                }
            };
            let names = |named: &str, bound: &str| named.is_empty() || named == bound;
            if !names(&request.user_id, &user) || !names(&request.device_id, &device) {
                let status = self.shared.malformed("a session keeps its user and device");
                return self.fault(status);
            }
        }
    }

    /// Returns whether the session goes on.
    async fn handle(&self, request: DeliveryConnectRequest, allowance: &mut Allowance) -> bool {
        self.shared.counters.grpc_requests.add(1);
        if !allowance.take(Instant::now()) {
            self.shared.counters.grpc_requests_too_many.add(1);
            self.fault(Status::resource_exhausted("too many requests"));
            return false;
        }
        if let Err(status) = self.shared.check(&request) {
            self.fault(status);
            return false;
        }
        if request.conversation_id.is_empty() {
            return true;
        }
        let DeliveryConnectRequest { conversation_id, last_received_sequence, .. } = request;
        match self.session.mention(conversation_id, last_received_sequence).await {
            Mention::Resume | Mention::Acknowledged => true,
            Mention::TooMany => {
                self.fault(Status::resource_exhausted("too many conversations in one session"));
                false
            }
        }
    }

    /// The client has nothing more to say; it goes on listening.
    async fn half_closed(self) {
        self.session.outbox.open_up(Instant::now());
        self.writer_gone.notified().await;
        self.over().await;
    }

    /// The stream has ended, for whatever reason. If it was ours, the hub knows a better one.
    async fn over(self) {
        self.session.ended(self.fate.of_stream().await);
    }

    async fn failed(self, status: Status) {
        match status.code() {
            Code::Cancelled => self.session.ended(EndReason::ClosedByPeer),
            // Said by our own decoder.
            Code::InvalidArgument | Code::OutOfRange => {
                self.shared.counters.grpc_calls_malformed.add(1);
                self.fault(status);
            }
            _ => self.over().await,
        }
    }

    fn fault(&self, status: Status) {
        self.session.ended(EndReason::PeerAtFault);
        self.session.end(status);
    }
}

/// How many requests a client may still send: a burst at first, then a steady rate.
struct Allowance {
    left: f64,
    burst: f64,
    per_s: f64,
    at: Instant,
}

impl Allowance {
    fn new(config: &GrpcConfig, now: Instant) -> Self {
        let burst = f64::from(config.requests_burst);
        Self { left: burst, burst, per_s: f64::from(config.requests_per_s), at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let grown = now.duration_since(self.at).as_secs_f64() * self.per_s;
        self.left = (self.left + grown).min(self.burst);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn allowance_is_a_burst_and_then_a_rate() {
        let config = GrpcConfig { requests_burst: 2, requests_per_s: 10, ..GrpcConfig::default() };
        let start = Instant::now();
        let mut allowance = Allowance::new(&config, start);
        let taken: Vec<bool> = [0, 0, 0, 99, 100, 100, 10_000, 10_000, 10_000]
            .map(|ms| allowance.take(start + Duration::from_millis(ms)))
            .into();
        assert_eq!(taken, [true, true, false, false, true, false, true, true, false]);
    }

    #[test]
    fn token_is_taken_from_a_bearer_authorization() {
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
