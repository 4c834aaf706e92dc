//! Conversation, message and presence service in one: speaks the contract, records what it is asked,
//! and fails, hangs or answers late when told to. Runs on a thread and a runtime of its own, so that
//! tests with and without a runtime use it alike.
//!
//! Also compiled into the library's unit tests, where `delivery` is the crate itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use delivery::service::events::proto::conversation::v1::conversation_api_server::{
    ConversationApi, ConversationApiServer,
};
use delivery::service::events::proto::conversation::v1::{
    Conversation, GetConversationRequest, GetConversationResponse, ListConversationsRequest,
    ListConversationsResponse,
};
use delivery::service::events::proto::message::v1::message_api_server::{
    MessageApi, MessageApiServer,
};
use delivery::service::events::proto::message::v1::{
    Message, SyncMessagesRequest, SyncMessagesResponse,
};
use delivery::service::events::proto::presence::v1::presence_api_server::{
    PresenceApi, PresenceApiServer,
};
use delivery::service::events::proto::presence::v1::{
    DeviceInfo, GetPresenceRequest, GetPresenceResponse, GetUserDevicesRequest,
    GetUserDevicesResponse, RefreshSessionRequest, RefreshSessionResponse, RegisterSessionRequest,
    RegisterSessionResponse, UnregisterSessionRequest, UnregisterSessionResponse, UserPresence,
};
use delivery::service::events::timestamp::Timestamp;
use tokio::sync::{oneshot, watch};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Code, Request, Response, Status};

/// A method of the three services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Method {
    Register,
    Unregister,
    Refresh,
    Devices,
    Presence,
    Members,
    List,
    Sync,
}

/// One call as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Register { user: String, device: String, instance: String },
    Unregister { user: String, device: String },
    Refresh { user: String, device: String },
    Devices { user: String },
    Presence { users: Vec<String> },
    Members { conversation: String },
    List { user: String, on_behalf_of: Option<String> },
    Sync { conversation: String, after: i64, page_size: i32 },
}

impl Call {
    /// Which method was called.
    pub fn method(&self) -> Method {
        match self {
            Self::Register { .. } => Method::Register,
            Self::Unregister { .. } => Method::Unregister,
            Self::Refresh { .. } => Method::Refresh,
            Self::Devices { .. } => Method::Devices,
            Self::Presence { .. } => Method::Presence,
            Self::Members { .. } => Method::Members,
            Self::List { .. } => Method::List,
            Self::Sync { .. } => Method::Sync,
        }
    }
}

/// How a method answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As the contract says.
    Well,
    /// With this status, having done nothing.
    Failing(Code),
    /// Never, having done nothing.
    Hanging,
    /// As the contract says, after this time.
    Late(Duration),
    /// As the contract says, but not before it is told to behave otherwise.
    Held,
}

/// What the services know and have been asked.
#[derive(Debug, Default)]
pub struct Known {
    /// Every call received, in order.
    pub calls: Vec<Call>,
    /// Members by conversation.
    pub members: BTreeMap<String, BTreeSet<String>>,
    /// Messages by conversation, ascending.
    pub messages: BTreeMap<String, Vec<Message>>,
    /// Instances by user and device.
    pub registrations: BTreeMap<(String, String), String>,
    /// Calls received and not yet answered, by method.
    pub in_flight: HashMap<Method, usize>,
    /// The most there were at once, by method.
    pub in_flight_peak: HashMap<Method, usize>,
    manners: HashMap<Method, Manner>,
}

impl Known {
    /// How often a method was called.
    pub fn count(&self, method: Method) -> usize {
        self.calls.iter().filter(|call| call.method() == method).count()
    }

    /// Creates a conversation with `count` messages, sequences from 1.
    pub fn converse(&mut self, conversation: &str, members: &[&str], count: i64) {
        let members = members.iter().map(|member| (*member).to_owned());
        self.members.entry(conversation.to_owned()).or_default().extend(members);
        for sequence in 1..=count {
            let message = message(conversation, sequence);
            self.messages.entry(conversation.to_owned()).or_default().push(message);
        }
    }
}

/// The message that [`Known::converse`] puts at a sequence.
pub fn message(conversation: &str, sequence: i64) -> Message {
    Message {
        message_id: format!("{conversation}/{sequence}"),
        conversation_id: conversation.to_owned(),
        sender_user_id: "sender".to_owned(),
        sequence,
        message_type: "text".to_owned(),
        content: format!("message {sequence} of {conversation}"),
        sent_at: Some(Timestamp { seconds: 1_700_000_000 + sequence, nanos: 0 }),
        ..Message::default()
    }
}

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    changed: Condvar,
    changes: watch::Sender<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no holder panics")
    }

    fn told(&self) {
        self.changed.notify_all();
        self.changes.send_modify(|count| *count += 1);
    }
}

/// Takes a call off the gauge, also when the caller gives up.
struct InFlight<'a>(&'a Shared, Method);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        *self.0.lock().in_flight.entry(self.1).or_default() -= 1;
        self.0.told();
    }
}

#[derive(Clone)]
struct Services(Arc<Shared>);

impl Services {
    /// Records the call, behaves as told, then answers from what is known.
    async fn answer<A>(
        &self,
        call: Call,
        answer: impl FnOnce(&mut Known) -> Result<A, Status>,
    ) -> Result<Response<A>, Status> {
        let method = call.method();
        let manner = {
            let mut known = self.0.lock();
            known.calls.push(call);
            let in_flight = known.in_flight.entry(method).or_default();
            *in_flight += 1;
            let in_flight = *in_flight;
            let peak = known.in_flight_peak.entry(method).or_default();
            *peak = in_flight.max(*peak);
            let manner = known.manners.get(&method).copied().unwrap_or(Manner::Well);
            if manner == Manner::Well {
                // Recorded and carried out at once: whoever sees the call sees what it did.
                *known.in_flight.entry(method).or_default() -= 1;
                let answer = answer(&mut known).map(Response::new);
                drop(known);
                self.0.told();
                return answer;
            }
            manner
        };
        let _in_flight = InFlight(&self.0, method);
        self.0.told();
        match manner {
            Manner::Well => unreachable!("answered above"),
            Manner::Failing(code) => return Err(Status::new(code, "told to fail")),
            Manner::Hanging => pending().await,
            Manner::Late(after) => tokio::time::sleep(after).await,
            Manner::Held => {
                let mut changes = self.0.changes.subscribe();
                while self.0.lock().manners.get(&method) == Some(&Manner::Held) {
                    changes.changed().await.expect("the sender lives as long as we do");
                }
            }
        }
        answer(&mut self.0.lock()).map(Response::new)
    }
}

#[tonic::async_trait]
impl PresenceApi for Services {
    async fn register_session(
        &self,
        request: Request<RegisterSessionRequest>,
    ) -> Result<Response<RegisterSessionResponse>, Status> {
        let RegisterSessionRequest { user_id: user, device_id: device, instance_id: instance } =
            request.into_inner();
        let key = (user.clone(), device.clone());
        let call = Call::Register { user, device, instance: instance.clone() };
        self.answer(call, move |known| {
            known.registrations.insert(key, instance);
            Ok(RegisterSessionResponse {})
        })
        .await
    }

    async fn unregister_session(
        &self,
        request: Request<UnregisterSessionRequest>,
    ) -> Result<Response<UnregisterSessionResponse>, Status> {
        let UnregisterSessionRequest { user_id: user, device_id: device } = request.into_inner();
        let key = (user.clone(), device.clone());
        self.answer(Call::Unregister { user, device }, move |known| {
            known.registrations.remove(&key);
            Ok(UnregisterSessionResponse {})
        })
        .await
    }

    async fn refresh_session(
        &self,
        request: Request<RefreshSessionRequest>,
    ) -> Result<Response<RefreshSessionResponse>, Status> {
        let RefreshSessionRequest { user_id: user, device_id: device } = request.into_inner();
        let call = Call::Refresh { user, device };
        self.answer(call, |_| Ok(RefreshSessionResponse {})).await
    }

    async fn get_user_devices(
        &self,
        request: Request<GetUserDevicesRequest>,
    ) -> Result<Response<GetUserDevicesResponse>, Status> {
        let user = request.into_inner().user_id;
        self.answer(Call::Devices { user: user.clone() }, move |known| {
            let devices = known
                .registrations
                .iter()
                .filter(|((of, _), _)| *of == user)
                .map(|((_, device), instance)| DeviceInfo {
                    device_id: device.clone(),
                    instance_id: instance.clone(),
                })
                .collect();
            Ok(GetUserDevicesResponse { devices })
        })
        .await
    }

    async fn get_presence(
        &self,
        request: Request<GetPresenceRequest>,
    ) -> Result<Response<GetPresenceResponse>, Status> {
        let users = request.into_inner().user_ids;
        self.answer(Call::Presence { users: users.clone() }, move |known| {
            let presence = |user: String| {
                let devices = known.registrations.keys().filter(|(of, _)| *of == user);
                let device_ids: Vec<_> = devices.map(|(_, device)| device.clone()).collect();
                UserPresence { user_id: user, online: !device_ids.is_empty(), device_ids }
            };
            Ok(GetPresenceResponse { presences: users.into_iter().map(presence).collect() })
        })
        .await
    }
}

#[tonic::async_trait]
impl ConversationApi for Services {
    async fn get_conversation(
        &self,
        request: Request<GetConversationRequest>,
    ) -> Result<Response<GetConversationResponse>, Status> {
        let id = request.into_inner().conversation_id;
        self.answer(Call::Members { conversation: id.clone() }, move |known| {
            let members = known.members.get(&id).ok_or_else(|| Status::not_found("unknown"))?;
            Ok(GetConversationResponse {
                conversation: Some(Conversation { conversation_id: id, ..Conversation::default() }),
                participant_user_ids: members.iter().cloned().collect(),
            })
        })
        .await
    }

    async fn list_conversations(
        &self,
        request: Request<ListConversationsRequest>,
    ) -> Result<Response<ListConversationsResponse>, Status> {
        let on_behalf_of = request
            .metadata()
            .get("x-user-id")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let user = request.into_inner().user_id;
        self.answer(Call::List { user: user.clone(), on_behalf_of }, move |known| {
            let conversations = known
                .members
                .iter()
                .filter(|(_, members)| members.contains(&user))
                .map(|(id, _)| Conversation {
                    conversation_id: id.clone(),
                    ..Conversation::default()
                })
                .collect();
            Ok(ListConversationsResponse { conversations })
        })
        .await
    }
}

#[tonic::async_trait]
impl MessageApi for Services {
    async fn sync_messages(
        &self,
        request: Request<SyncMessagesRequest>,
    ) -> Result<Response<SyncMessagesResponse>, Status> {
        let SyncMessagesRequest { conversation_id: id, after_sequence: after, page_size } =
            request.into_inner();
        let call = Call::Sync { conversation: id.clone(), after, page_size };
        self.answer(call, move |known| {
            let messages = known.messages.get(&id).into_iter().flatten();
            let page = messages.filter(|message| message.sequence > after);
            let size = usize::try_from(page_size).unwrap_or(0);
            Ok(SyncMessagesResponse { messages: page.take(size).cloned().collect() })
        })
        .await
    }
}

/// The running services. Stops when dropped.
pub struct FakeNeighbours {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeNeighbours {
    /// Starts them on a free port of the loopback interface.
    pub fn start() -> Self {
        Self::with_tls(None)
    }

    /// The same over TLS, with this certificate and key (PEM).
    pub fn with_tls(identity: Option<(String, String)>) -> Self {
        let shared = Arc::new(Shared {
            known: Mutex::default(),
            changed: Condvar::new(),
            changes: watch::Sender::new(0),
        });
        let mut services = Self {
            shared,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            stop: None,
            thread: None,
        };
        services.run(identity);
        services
    }

    fn run(&mut self, identity: Option<(String, String)>) {
        let listener = std::net::TcpListener::bind(self.address).expect("the port is free");
        listener.set_nonblocking(true).expect("a socket");
        self.address = listener.local_addr().expect("bound");
        let services = Services(Arc::clone(&self.shared));
        let (stop, stopped) = oneshot::channel();
        self.stop = Some(stop);
        self.thread = Some(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                let mut server = Server::builder();
                if let Some((certificate, key)) = identity {
                    let tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key));
                    server = server.tls_config(tls).expect("a certificate");
                }
                let serving = server
                    .add_service(PresenceApiServer::new(services.clone()))
                    .add_service(ConversationApiServer::new(services.clone()))
                    .add_service(MessageApiServer::new(services))
                    .serve_with_incoming(TcpIncoming::from(listener));
                // Dropping the runtime closes every connection at once, as a crash would.
                tokio::select! {
                    served = serving => served.expect("served"),
                    _ = stopped => {}
                }
            });
        }));
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `host:port`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Goes away as a crash would; what is known stays.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("served without a panic");
        }
    }

    /// Comes back at the same address.
    pub fn restart(&mut self) {
        self.stop();
        self.run(None);
    }

    /// How a method answers from now on.
    pub fn set(&self, method: Method, manner: Manner) {
        self.shared.lock().manners.insert(method, manner);
        self.shared.told();
    }

    /// What is known, to look at and to change.
    pub fn known(&self) -> MutexGuard<'_, Known> {
        self.shared.lock()
    }

    /// Waits, for tests without a runtime, until what is known is as wanted.
    ///
    /// # Panics
    /// It has not come to that within `limit`.
    pub fn wait(&self, limit: Duration, wanted: impl Fn(&Known) -> bool) {
        let known = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(known, limit, |known| !wanted(known));
        let (known, result) = waited.expect("no holder panics");
        assert!(!result.timed_out(), "not within {limit:?}: {:?}", known.calls);
    }

    /// Waits, in a task, until what is known is as wanted.
    ///
    /// # Panics
    /// It has not come to that within 30 s.
    pub async fn until(&self, wanted: impl Fn(&Known) -> bool) {
        let mut changes = self.shared.changes.subscribe();
        let wait = async {
            while !wanted(&self.shared.lock()) {
                changes.changed().await.expect("the sender lives as long as we do");
            }
        };
        if tokio::time::timeout(Duration::from_secs(30), wait).await.is_err() {
            panic!("not within 30 s: {:?}", self.shared.lock().calls);
        }
    }
}

impl Drop for FakeNeighbours {
    fn drop(&mut self) {
        self.stop();
    }
}
