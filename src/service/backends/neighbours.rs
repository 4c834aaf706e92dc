//! gRPC clients of the neighbours: the conversation, message and presence services (contract §1).
//!
//! Each has one HTTP/2 channel. It connects at the first call and reconnects by itself. Every call
//! has a deadline. There are no retries: only the caller can judge whether one is worthwhile. If a
//! peer disappears without a reset, TCP keeps the dead connection for as long as it retransmits. So
//! a new channel replaces it after a few calls in a row without an answer.

use std::future::Future;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use tokio::time::{Instant, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::service::backends::outage::Outage;
use crate::service::backends::ports::{
    BoxFuture, ConversationListing, ConversationSource, MessageSource, NeighbourError,
};
use crate::service::events::proto::conversation::v1::conversation_api_client::ConversationApiClient;
use crate::service::events::proto::conversation::v1::{
    Conversation, GetConversationRequest, ListConversationsRequest,
};
use crate::service::events::proto::message::v1::message_api_client::MessageApiClient;
use crate::service::events::proto::message::v1::{Message, SyncMessagesRequest};
use crate::service::events::proto::presence::v1::presence_api_client::PresenceApiClient;
use crate::service::events::proto::presence::v1::{
    DeviceInfo, GetUserDevicesRequest, RefreshSessionRequest, RegisterSessionRequest,
    UnregisterSessionRequest,
};

/// Maximum size of an answer, bytes: enough for the member list of a very large conversation or a
/// page of large messages. A larger answer is rejected while it arrives.
pub const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Calls in a row without an answer after which the connection is replaced.
const UNANSWERED_CALLS_MAX: u32 = 3;
/// Added to the deadline in the request. tonic enforces that deadline on this side too, and its
/// error would look like an answer of the neighbour, so our own must come first.
const DEADLINE_MARGIN: Duration = Duration::from_millis(50);
/// Minimum time between two replacements, so that a slow neighbour does not get many new
/// connections.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(5);

/// Address and timeouts of one neighbour.
#[derive(Clone, Debug)]
pub struct NeighbourConfig {
    /// `http://host:port` without TLS, `https://host:port` with TLS.
    pub url: String,
    /// Trusted roots for `https`, PEM; `None`: the public web's.
    pub root_certificates: Option<Vec<u8>>,
    /// Deadline of one call, connecting included.
    pub call_timeout: Duration,
    /// Time to establish a connection.
    pub connect_timeout: Duration,
    /// Interval of HTTP/2 pings while calls are in flight and nothing arrives. Idle connections use
    /// TCP keepalive instead, because gRPC servers by default treat idle HTTP/2 pings as abuse.
    pub keepalive_interval: Duration,
    /// Time for the answer to a ping.
    pub keepalive_timeout: Duration,
}

impl NeighbourConfig {
    /// Defaults: 2 s per call, 2 s to connect, a ping after 20 s, 5 s for its answer.
    pub fn new(url: String) -> Self {
        Self {
            url,
            root_certificates: None,
            call_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(5),
        }
    }

    fn endpoint(&self) -> Result<Endpoint, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(self.url.clone())?
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(self.keepalive_interval))
            .tcp_keepalive_interval(Some(self.keepalive_timeout))
            .http2_keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .keep_alive_while_idle(false);
        if !self.url.starts_with("https://") {
            return Ok(endpoint);
        }
        let tls = ClientTlsConfig::new();
        endpoint.tls_config(match &self.root_certificates {
            Some(roots) => tls.ca_certificate(Certificate::from_pem(roots)),
            None => tls.with_webpki_roots(),
        })
    }
}

crate::counters! {
    /// Calls to one neighbour.
    pub struct NeighbourCounters of SharedCounter {
        Counter calls: "Calls started",
        Counter failures: "Calls that failed, timed out or were refused",
        Counter timeouts: "Calls without an answer before the deadline",
        Gauge in_flight: "Calls in flight",
        Counter renewals: "Connections replaced because calls got no answer",
    }
}

/// The channel to one neighbour.
struct NeighbourLink {
    endpoint: Endpoint,
    channel: RwLock<Channel>,
    call_timeout: Duration,
    /// Calls in a row without an answer.
    unanswered: AtomicU32,
    renewed: Mutex<Instant>,
    outage: Outage,
    counters: Arc<NeighbourCounters>,
}

/// Decrements the gauge when the call ends or its future is dropped.
struct InFlight<'a>(&'a NeighbourCounters);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.sub(1);
    }
}

impl NeighbourLink {
    fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        let endpoint = config.endpoint()?;
        Ok(Self {
            channel: RwLock::new(endpoint.connect_lazy()),
            endpoint,
            call_timeout: config.call_timeout,
            unanswered: AtomicU32::new(0),
            renewed: Mutex::new(Instant::now()),
            outage: Outage::default(),
            counters,
        })
    }

    /// Makes one call with its deadline. The request contains the deadline too.
    async fn call<Q, A, F>(
        &self,
        question: Q,
        ask: impl FnOnce(Channel, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.counters.calls.add(1);
        self.counters.in_flight.add(1);
        let _in_flight = InFlight(&self.counters);
        let channel = self.channel.read().expect("no holder panics").clone();
        let mut request = Request::new(question);
        request.set_timeout(self.call_timeout + DEADLINE_MARGIN);
        match timeout(self.call_timeout, ask(channel, request)).await {
            Ok(answer) => {
                self.unanswered.store(0, Ordering::Relaxed);
                match &answer {
                    Err(status) if status.code() == Code::Unavailable => {
                        self.note_failure(status.message())
                    }
                    Ok(_) | Err(_) => self.note_answer(),
                }
                answer.map(Response::into_inner).inspect_err(|_| self.counters.failures.add(1))
            }
            Err(_) => {
                self.counters.failures.add(1);
                self.counters.timeouts.add(1);
                if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 >= UNANSWERED_CALLS_MAX {
                    self.note_failure("no answer in time");
                    self.renew();
                }
                Err(Status::deadline_exceeded("no answer in time"))
            }
        }
    }

    /// Host and port, for the log. They hold no secret.
    fn address(&self) -> String {
        let uri = self.endpoint.uri();
        let port = uri.port_u16().map_or_else(String::new, |port| format!(":{port}"));
        format!("{}{port}", uri.host().unwrap_or_default())
    }

    fn note_failure(&self, why: &str) {
        if let Some(report) = self.outage.failed(Instant::now()) {
            tracing::warn!(service = self.address(), why, "service unreachable{report}");
        }
    }

    fn note_answer(&self) {
        if let Some(recovery) = self.outage.succeeded(Instant::now()) {
            tracing::info!(service = self.address(), "service reachable again {recovery}");
        }
    }

    /// Opens a new connection for later calls. Calls in flight keep the old one.
    fn renew(&self) {
        let mut renewed = self.renewed.lock().expect("no holder panics");
        if renewed.elapsed() < RENEWAL_INTERVAL {
            return;
        }
        *renewed = Instant::now();
        self.unanswered.store(0, Ordering::Relaxed);
        *self.channel.write().expect("no holder panics") = self.endpoint.connect_lazy();
        self.counters.renewals.add(1);
    }
}

impl From<Status> for NeighbourError {
    fn from(status: Status) -> Self {
        match status.code() {
            // Services also use these codes for a malformed id and for one that the user may not
            // see.
            Code::NotFound | Code::InvalidArgument | Code::PermissionDenied => Self::NotFound,
            code => Self::Unavailable(format!("{code:?}")),
        }
    }
}

/// Sets `x-user-id`, the user on whose behalf the call is made (contract §3). An id that is not a
/// valid header value is sent in the message only.
fn on_behalf<Q>(user: &str, mut request: Request<Q>) -> Request<Q> {
    if let Ok(value) = MetadataValue::<Ascii>::try_from(user) {
        request.metadata_mut().insert("x-user-id", value);
    }
    request
}

/// The client of one neighbour; clones share the connection. `Api`: the client that tonic
/// generates.
#[derive(Clone)]
pub struct Neighbour<Api> {
    link: Arc<NeighbourLink>,
    api: PhantomData<Api>,
}

impl<Api> Neighbour<Api> {
    /// Connects at the first call. Needs a tokio runtime.
    ///
    /// # Errors
    /// The URL or the certificates are malformed.
    pub fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        let link = Arc::new(NeighbourLink::new(config, counters)?);
        Ok(Self { link, api: PhantomData })
    }
}

/// The conversation service.
pub type ConversationService = Neighbour<ConversationApiClient<Channel>>;

impl ConversationSource for ConversationService {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Vec<Arc<str>>, NeighbourError>> {
        let link = Arc::clone(&self.link);
        Box::pin(async move {
            let question = GetConversationRequest { conversation_id: conversation.to_string() };
            let answer = link
                .call(question, |channel, request| async move {
                    let mut client = ConversationApiClient::new(channel)
                        .max_decoding_message_size(ANSWER_BYTES_MAX);
                    client.get_conversation(request).await
                })
                .await?;
            // The answer's own list is the complete one. A service that fills only the list within
            // the conversation is supported too.
            let mut members = answer.participant_user_ids;
            if members.is_empty()
                && let Some(conversation) = answer.conversation
            {
                members = conversation.participant_user_ids;
            }
            Ok(members.into_iter().map(Arc::from).collect())
        })
    }
}

impl ConversationListing for ConversationService {
    fn conversations_of(
        &self,
        user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        let link = Arc::clone(&self.link);
        Box::pin(async move {
            let question = ListConversationsRequest { user_id: user.to_string() };
            let answer = link.call(question, |channel, request| async move {
                let mut client =
                    ConversationApiClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                client.list_conversations(on_behalf(&user, request)).await
            });
            Ok(answer.await?.conversations)
        })
    }
}

/// The message service.
pub type MessageService = Neighbour<MessageApiClient<Channel>>;

impl MessageSource for MessageService {
    fn messages_after(
        &self,
        user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        let link = Arc::clone(&self.link);
        Box::pin(async move {
            let question = SyncMessagesRequest {
                conversation_id: conversation.to_string(),
                after_sequence: after,
                page_size: i32::from(page_size),
            };
            let answer = link.call(question, |channel, request| async move {
                let mut client =
                    MessageApiClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                client.sync_messages(on_behalf(&user, request)).await
            });
            Ok(answer.await?.messages)
        })
    }
}

/// The presence service.
pub type PresenceService = Neighbour<PresenceApiClient<Channel>>;

impl PresenceService {
    /// `RegisterSession`.
    ///
    /// # Errors
    /// The status of the service, or `DEADLINE_EXCEEDED`.
    pub async fn register(&self, user: &str, device: &str, instance: &str) -> Result<(), Status> {
        let question = RegisterSessionRequest {
            user_id: user.to_owned(),
            device_id: device.to_owned(),
            instance_id: instance.to_owned(),
        };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).register_session(request).await
        };
        self.link.call(question, ask).await.map(drop)
    }

    /// `UnregisterSession`.
    ///
    /// # Errors
    /// See [`PresenceService::register`].
    pub async fn unregister(&self, user: &str, device: &str) -> Result<(), Status> {
        let question =
            UnregisterSessionRequest { user_id: user.to_owned(), device_id: device.to_owned() };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).unregister_session(request).await
        };
        self.link.call(question, ask).await.map(drop)
    }

    /// `RefreshSession`.
    ///
    /// # Errors
    /// See [`PresenceService::register`].
    pub async fn refresh(&self, user: &str, device: &str) -> Result<(), Status> {
        let question =
            RefreshSessionRequest { user_id: user.to_owned(), device_id: device.to_owned() };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).refresh_session(request).await
        };
        self.link.call(question, ask).await.map(drop)
    }

    /// `GetUserDevices`.
    ///
    /// # Errors
    /// See [`PresenceService::register`].
    pub async fn devices(&self, user: &str) -> Result<Vec<DeviceInfo>, Status> {
        let question = GetUserDevicesRequest { user_id: user.to_owned() };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).get_user_devices(request).await
        };
        self.link.call(question, ask).await.map(|answer| answer.devices)
    }
}

#[cfg(test)]
mod tests {
    use delivery_testkit::neighbours::{Behaviour, Call, FakeNeighbours, Method};

    use super::*;

    fn config(url: String) -> NeighbourConfig {
        NeighbourConfig { call_timeout: Duration::from_secs(20), ..NeighbourConfig::new(url) }
    }

    fn counters() -> Arc<NeighbourCounters> {
        Arc::new(NeighbourCounters::default())
    }

    #[tokio::test]
    async fn requests_are_those_of_the_contract() {
        let fake = FakeNeighbours::start();
        fake.state().create("c", &["alice", "bob"], 3);
        let config = config(fake.url());
        let conversations = ConversationService::new(&config, counters()).unwrap();
        let messages = MessageService::new(&config, counters()).unwrap();
        let presence = PresenceService::new(&config, counters()).unwrap();

        let members = conversations.members("c".into()).await.unwrap();
        assert_eq!(members, [Arc::from("alice"), Arc::from("bob")]);
        let listed = conversations.conversations_of("bob".into()).await.unwrap();
        assert_eq!(listed[0].conversation_id, "c");
        let page = messages.messages_after("bob".into(), "c".into(), 1, 100).await.unwrap();
        assert_eq!(page.iter().map(|message| message.sequence).collect::<Vec<_>>(), [2, 3]);
        presence.register("bob", "phone", "node-1").await.unwrap();
        presence.refresh("bob", "phone").await.unwrap();
        assert_eq!(presence.devices("bob").await.unwrap()[0].instance_id, "node-1");
        presence.unregister("bob", "phone").await.unwrap();

        let (user, device) = ("bob".to_owned(), "phone".to_owned());
        let expected = [
            Call::Members { conversation: "c".into() },
            Call::List { user: user.clone(), on_behalf_of: Some("bob".into()) },
            Call::Sync { conversation: "c".into(), after: 1, page_size: 100 },
            Call::Register {
                user: user.clone(),
                device: device.clone(),
                instance: "node-1".into(),
            },
            Call::Refresh { user: user.clone(), device: device.clone() },
            Call::Devices { user: user.clone() },
            Call::Unregister { user, device },
        ];
        assert_eq!(fake.state().calls, expected);
    }

    #[tokio::test]
    async fn permanent_answer_differs_from_a_failure() {
        let fake = FakeNeighbours::start();
        let counters = counters();
        let service = ConversationService::new(&config(fake.url()), Arc::clone(&counters)).unwrap();
        assert_eq!(service.members("c".into()).await, Err(NeighbourError::NotFound));
        fake.set(Method::Members, Behaviour::Failing(Code::Internal));
        let failed = service.members("c".into()).await;
        assert_eq!(failed, Err(NeighbourError::Unavailable("Internal".into())));
        assert_eq!((counters.calls.get(), counters.failures.get()), (2, 2));
        assert_eq!(counters.in_flight.get(), 0);
    }

    #[tokio::test]
    async fn hanging_neighbour_costs_the_deadline_and_finally_the_connection() {
        let fake = FakeNeighbours::start();
        fake.state().create("c", &["alice"], 0);
        fake.set(Method::Members, Behaviour::Hanging);
        let counters = counters();
        let config =
            NeighbourConfig { call_timeout: Duration::from_millis(50), ..config(fake.url()) };
        let service = ConversationService::new(&config, Arc::clone(&counters)).unwrap();
        *service.link.renewed.lock().unwrap() -= RENEWAL_INTERVAL;
        for _ in 0..UNANSWERED_CALLS_MAX {
            let late = service.members("c".into()).await;
            assert_eq!(late, Err(NeighbourError::Unavailable("DeadlineExceeded".into())));
        }
        assert_eq!(counters.timeouts.get(), u64::from(UNANSWERED_CALLS_MAX));
        assert_eq!(counters.renewals.get(), 1);
        assert_eq!(counters.in_flight.get(), 0);
        // The fake notices that the calls are cancelled.
        fake.until(|known| known.in_flight[&Method::Members] == 0).await;
    }

    #[tokio::test]
    async fn cancelled_call_leaves_the_gauge() {
        let fake = FakeNeighbours::start();
        fake.set(Method::Members, Behaviour::Hanging);
        let counters = counters();
        let service = ConversationService::new(&config(fake.url()), Arc::clone(&counters)).unwrap();
        let call = tokio::spawn(service.members("c".into()));
        fake.until(|known| known.count(Method::Members) == 1).await;
        assert_eq!(counters.in_flight.get(), 1);
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        assert_eq!(counters.in_flight.get(), 0);
    }

    #[tokio::test]
    async fn neighbour_that_restarts_is_reached_again() {
        let mut fake = FakeNeighbours::start();
        fake.state().create("c", &["alice"], 0);
        let service = ConversationService::new(&config(fake.url()), counters()).unwrap();
        assert!(service.members("c".into()).await.is_ok());
        fake.stop();
        assert!(service.members("c".into()).await.is_err());
        fake.restart();
        // The broken connection may cost one more call.
        let again = match service.members("c".into()).await {
            Err(_) => service.members("c".into()).await,
            members => members,
        };
        assert!(again.is_ok());
    }

    #[tokio::test]
    async fn https_means_tls_and_a_trusted_certificate() {
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = certified.cert.pem();
        let key = certified.signing_key.serialize_pem();
        let fake = FakeNeighbours::with_tls(Some((certificate.clone(), key)));
        fake.state().create("c", &["alice"], 0);
        let url = format!("https://localhost:{}", fake.address().port());
        let trusting = NeighbourConfig {
            root_certificates: Some(certificate.into_bytes()),
            ..config(url.clone())
        };
        let service = ConversationService::new(&trusting, counters()).unwrap();
        assert!(service.members("c".into()).await.is_ok());
        let untrusting = ConversationService::new(&config(url), counters()).unwrap();
        assert!(untrusting.members("c".into()).await.is_err());
    }

    #[test]
    fn user_id_that_is_no_header_value_gets_no_header() {
        let asked = on_behalf("al\u{ef}ce\n", Request::new(()));
        assert!(asked.metadata().get("x-user-id").is_none());
    }
}
