//! The services that Delivery asks by gRPC: conversation, message and presence (contract §1).
//!
//! Each has one HTTP/2 channel that connects when it is first needed and again when it broke. Every
//! call has a deadline; nothing here retries, because only the asker knows what a retry is worth.
//! A peer that is gone without a word (no answer, no reset) would keep its dead connection for as
//! long as TCP tries: after a few calls in a row without any answer the channel is made anew.

use std::future::Future;
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

/// One answer of a neighbour, bytes: the member list of a very large conversation, or a page of
/// large messages. A larger one is refused while it arrives.
pub const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Calls in a row without any answer after which the connection is given up.
const SILENT_CALLS_MAX: u32 = 3;
/// How much later than ours the deadline is that a neighbour is told.
const DEADLINE_TOLD_LATER: Duration = Duration::from_millis(50);
/// Between two channels made anew: a neighbour that is merely slow is not stormed.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(5);

/// How to reach one neighbour.
#[derive(Clone, Debug)]
pub struct NeighbourConfig {
    /// `http://host:port` in the clear, `https://host:port` with TLS.
    pub url: String,
    /// Roots to trust for `https`, PEM; `None`: the public web's.
    pub root_certificates: Option<Vec<u8>>,
    /// For one call, connecting included.
    pub call_timeout: Duration,
    /// For a connection to be made.
    pub connect_timeout: Duration,
    /// Between HTTP/2 pings while calls are under way and nothing comes. Idle connections are not
    /// pinged over HTTP/2: gRPC servers by default take that for abuse; TCP keepalive does it.
    pub keepalive_interval: Duration,
    /// For a ping to be answered.
    pub keepalive_timeout: Duration,
}

impl NeighbourConfig {
    /// The defaults for a URL: 2 s for a call, 2 s to connect, a ping after 20 s, 5 s to answer it.
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
        Counter calls: "Calls begun",
        Counter failures: "Calls that failed, timed out or were refused",
        Counter timeouts: "Calls that were not answered in time",
        Gauge in_flight: "Calls under way",
        Counter renewals: "Connections given up because nothing was answered",
    }
}

/// The channel to one neighbour.
struct Link {
    endpoint: Endpoint,
    channel: RwLock<Channel>,
    call_timeout: Duration,
    /// Calls in a row without an answer.
    silent: AtomicU32,
    renewed: Mutex<Instant>,
    outage: Outage,
    counters: Arc<NeighbourCounters>,
}

/// Takes a call off the gauge, also when its future is dropped.
struct InFlight<'a>(&'a NeighbourCounters);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.sub(1);
    }
}

impl Link {
    fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        let endpoint = config.endpoint()?;
        Ok(Self {
            channel: RwLock::new(endpoint.connect_lazy()),
            endpoint,
            call_timeout: config.call_timeout,
            silent: AtomicU32::new(0),
            renewed: Mutex::new(Instant::now()),
            outage: Outage::default(),
            counters,
        })
    }

    /// One call with its deadline; the neighbour is told the deadline too, a little later: tonic
    /// keeps it on this side as well, and its word would look like the neighbour's.
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
        request.set_timeout(self.call_timeout + DEADLINE_TOLD_LATER);
        match timeout(self.call_timeout, ask(channel, request)).await {
            Ok(answer) => {
                self.silent.store(0, Ordering::Relaxed);
                match &answer {
                    Err(status) if status.code() == Code::Unavailable => {
                        self.away(status.message())
                    }
                    Ok(_) | Err(_) => self.answers(),
                }
                answer.map(Response::into_inner).inspect_err(|_| self.counters.failures.add(1))
            }
            Err(_) => {
                self.counters.failures.add(1);
                self.counters.timeouts.add(1);
                if self.silent.fetch_add(1, Ordering::Relaxed) + 1 >= SILENT_CALLS_MAX {
                    self.away("no answer in time");
                    self.renew();
                }
                Err(Status::deadline_exceeded("no answer in time"))
            }
        }
    }

    /// For the log: host and port, which name the neighbour and hold no secret.
    fn address(&self) -> String {
        let uri = self.endpoint.uri();
        let port = uri.port_u16().map_or_else(String::new, |port| format!(":{port}"));
        format!("{}{port}", uri.host().unwrap_or_default())
    }

    fn away(&self, why: &str) {
        if let Some(again) = self.outage.failed(Instant::now()) {
            tracing::warn!(service = self.address(), why, "a service does not answer{again}");
        }
    }

    fn answers(&self) {
        if let Some(back) = self.outage.works(Instant::now()) {
            tracing::info!(service = self.address(), "a service answers again {back}");
        }
    }

    /// Leaves the present connection to the calls that are on it, and begins another.
    fn renew(&self) {
        let mut renewed = self.renewed.lock().expect("no holder panics");
        if renewed.elapsed() < RENEWAL_INTERVAL {
            return;
        }
        *renewed = Instant::now();
        self.silent.store(0, Ordering::Relaxed);
        *self.channel.write().expect("no holder panics") = self.endpoint.connect_lazy();
        self.counters.renewals.add(1);
    }
}

/// What an asker makes of a failure: some are the answer.
fn failure(status: &Status) -> NeighbourError {
    match status.code() {
        // Also what services say of an id that cannot be one, or that is not the user's business.
        Code::NotFound | Code::InvalidArgument | Code::PermissionDenied => NeighbourError::NotFound,
        code => NeighbourError::Unavailable(format!("{code:?}")),
    }
}

/// `x-user-id`: on whose behalf (contract §3). Ids that cannot be a header value go as they are
/// in the message alone.
fn on_behalf<Q>(user: &str, mut request: Request<Q>) -> Request<Q> {
    if let Ok(value) = MetadataValue::<Ascii>::try_from(user) {
        request.metadata_mut().insert("x-user-id", value);
    }
    request
}

/// The conversation service.
#[derive(Clone)]
pub struct ConversationService(Arc<Link>);

impl ConversationService {
    /// Connects when first asked. Needs a tokio runtime.
    ///
    /// # Errors
    /// The URL or the certificates are malformed.
    pub fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        Ok(Self(Arc::new(Link::new(config, counters)?)))
    }
}

impl ConversationSource for ConversationService {
    fn members(&self, conversation: Arc<str>) -> BoxFuture<Result<Vec<Arc<str>>, NeighbourError>> {
        let link = Arc::clone(&self.0);
        Box::pin(async move {
            let question = GetConversationRequest { conversation_id: conversation.to_string() };
            let answer = link
                .call(question, |channel, request| async move {
                    let mut client = ConversationApiClient::new(channel)
                        .max_decoding_message_size(ANSWER_BYTES_MAX);
                    client.get_conversation(request).await
                })
                .await
                .map_err(|status| failure(&status))?;
            // The list beside the conversation is the full one; a service that fills only the
            // conversation's own list is understood too.
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
        let link = Arc::clone(&self.0);
        Box::pin(async move {
            let question = ListConversationsRequest { user_id: user.to_string() };
            let answer = link.call(question, |channel, request| async move {
                let mut client =
                    ConversationApiClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                client.list_conversations(on_behalf(&user, request)).await
            });
            match answer.await {
                Ok(answer) => Ok(answer.conversations),
                Err(status) => Err(failure(&status)),
            }
        })
    }
}

/// The message service.
#[derive(Clone)]
pub struct MessageService(Arc<Link>);

impl MessageService {
    /// Connects when first asked. Needs a tokio runtime.
    ///
    /// # Errors
    /// The URL or the certificates are malformed.
    pub fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        Ok(Self(Arc::new(Link::new(config, counters)?)))
    }
}

impl MessageSource for MessageService {
    fn messages_after(
        &self,
        user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        let link = Arc::clone(&self.0);
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
            match answer.await {
                Ok(answer) => Ok(answer.messages),
                Err(status) => Err(failure(&status)),
            }
        })
    }
}

/// The presence service.
#[derive(Clone)]
pub struct PresenceService(Arc<Link>);

impl PresenceService {
    /// Connects when first asked. Needs a tokio runtime.
    ///
    /// # Errors
    /// The URL or the certificates are malformed.
    pub fn new(
        config: &NeighbourConfig,
        counters: Arc<NeighbourCounters>,
    ) -> Result<Self, tonic::transport::Error> {
        Ok(Self(Arc::new(Link::new(config, counters)?)))
    }

    /// `RegisterSession`.
    ///
    /// # Errors
    /// The service's status, or `DEADLINE_EXCEEDED`; so for all calls here.
    pub async fn register(&self, user: &str, device: &str, instance: &str) -> Result<(), Status> {
        let question = RegisterSessionRequest {
            user_id: user.to_owned(),
            device_id: device.to_owned(),
            instance_id: instance.to_owned(),
        };
        let ask = |channel, request| async move {
            PresenceApiClient::new(channel).register_session(request).await
        };
        self.0.call(question, ask).await.map(drop)
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
        self.0.call(question, ask).await.map(drop)
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
        self.0.call(question, ask).await.map(drop)
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
        self.0.call(question, ask).await.map(|answer| answer.devices)
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
    async fn questions_are_those_of_the_contract() {
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
    async fn answer_that_will_not_change_is_told_from_a_failure() {
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
    async fn hanging_neighbour_costs_the_deadline_and_in_the_end_the_connection() {
        let fake = FakeNeighbours::start();
        fake.state().create("c", &["alice"], 0);
        fake.set(Method::Members, Behaviour::Hanging);
        let counters = counters();
        let config =
            NeighbourConfig { call_timeout: Duration::from_millis(50), ..config(fake.url()) };
        let service = ConversationService::new(&config, Arc::clone(&counters)).unwrap();
        *service.0.renewed.lock().unwrap() -= RENEWAL_INTERVAL;
        for _ in 0..SILENT_CALLS_MAX {
            let late = service.members("c".into()).await;
            assert_eq!(late, Err(NeighbourError::Unavailable("DeadlineExceeded".into())));
        }
        assert_eq!(counters.timeouts.get(), u64::from(SILENT_CALLS_MAX));
        assert_eq!(counters.renewals.get(), 1);
        assert_eq!(counters.in_flight.get(), 0);
        // The fake learns that nobody waits any more.
        fake.until(|known| known.in_flight[&Method::Members] == 0).await;
    }

    #[tokio::test]
    async fn abandoned_call_leaves_the_gauge() {
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
    async fn neighbour_that_comes_back_is_reached_again() {
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
        let strangers = ConversationService::new(&config(url), counters()).unwrap();
        assert!(strangers.members("c".into()).await.is_err());
    }

    #[test]
    fn user_that_is_no_header_value_is_asked_for_all_the_same() {
        let asked = on_behalf("al\u{ef}ce\n", Request::new(()));
        assert!(asked.metadata().get("x-user-id").is_none());
    }
}
