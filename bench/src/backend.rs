//! What stands around a node: the conversation, message and presence service, which answer from
//! arithmetic and keep a bit per session, and the producer of the events in Kafka.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use delivery::service::events::proto::conversation::v1::conversation_api_server::{
    ConversationApi, ConversationApiServer,
};
use delivery::service::events::proto::conversation::v1::{
    Conversation, GetConversationRequest, GetConversationResponse, ListConversationsRequest,
    ListConversationsResponse,
};
use delivery::service::events::proto::message::v1::message_api_server::{MessageApi, MessageApiServer};
use delivery::service::events::proto::message::v1::{Message, SyncMessagesRequest, SyncMessagesResponse};
use delivery::service::events::proto::presence::v1::presence_api_server::{PresenceApi, PresenceApiServer};
use delivery::service::events::proto::presence::v1::{
    DeviceInfo, GetPresenceRequest, GetPresenceResponse, GetUserDevicesRequest,
    GetUserDevicesResponse, RefreshSessionRequest, RefreshSessionResponse, RegisterSessionRequest,
    RegisterSessionResponse, UnregisterSessionRequest, UnregisterSessionResponse, UserPresence,
};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use serde::Serialize;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::clock::now_ns;
use crate::control::Pushed;
use crate::generator::{Generator, Plan, conversation};
use crate::names;
use crate::payload::{self, Stamp, creation};

/// Partitions of the topics, as deployments have them.
const PARTITIONS: i32 = 3;
/// Between two looks at what is due, and at a full producer.
const POLL: Duration = Duration::from_micros(200);
/// For the broker to acknowledge everything.
const FLUSH_MAX: Duration = Duration::from_secs(120);

/// The topics of a run, which no other run uses.
#[derive(Clone, Debug)]
pub struct Topics {
    /// Of messages.
    pub messages: String,
    /// Of conversations.
    pub conversations: String,
}

/// What the presence service holds and was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PresenceCounts {
    /// Sessions registered now.
    pub registered: u64,
    /// Calls to register.
    pub registrations: u64,
    /// Calls to refresh.
    pub refreshes: u64,
    /// Calls to unregister.
    pub unregistrations: u64,
}

#[derive(Debug, Default)]
struct Registry {
    /// By session: whether it is registered.
    bits: Vec<u64>,
    instance: String,
    counts: PresenceCounts,
}

impl Registry {
    fn set(&mut self, session: usize, registered: bool) {
        let (word, bit) = (session / 64, 1 << (session % 64));
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        let was = self.bits[word] & bit != 0;
        if registered {
            self.bits[word] |= bit;
        } else {
            self.bits[word] &= !bit;
        }
        self.counts.registered += u64::from(registered && !was);
        self.counts.registered -= u64::from(was && !registered);
    }

    fn holds(&self, session: usize) -> bool {
        self.bits.get(session / 64).is_some_and(|word| word & (1 << (session % 64)) != 0)
    }
}

#[derive(Debug, Default)]
struct Shared {
    registry: Mutex<Registry>,
    /// What has been published, and is: the message service knows it before Kafka does.
    published: Mutex<Option<Generator>>,
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().expect("no holder panics")
    }

    fn published(&self) -> MutexGuard<'_, Option<Generator>> {
        self.published.lock().expect("no holder panics")
    }
}

/// Records that the broker has acknowledged, or not.
#[derive(Debug, Default)]
struct Acknowledged {
    records: AtomicU64,
    failed: AtomicU64,
}

#[derive(Clone, Debug)]
struct Context(Arc<Acknowledged>);

impl rdkafka::ClientContext for Context {}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let counter = if result.is_ok() { &self.0.records } else { &self.0.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// See the module.
pub struct Backend {
    /// Where the three services are served.
    pub address: SocketAddr,
    /// Where the events go.
    pub topics: Topics,
    sessions: usize,
    shared: Arc<Shared>,
    producer: ThreadedProducer<Context>,
    acknowledged: Arc<Acknowledged>,
    sent: u64,
    /// Sizes of conversations that have been made.
    prepared: Vec<usize>,
    _runtime: tokio::runtime::Runtime,
}

impl Backend {
    /// Starts the services on a free port and makes topics on these brokers, for so many sessions.
    ///
    /// # Errors
    /// A port, a thread or a topic cannot be had.
    pub fn start(brokers: &str, sessions: usize) -> io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let shared = Arc::new(Shared::default());
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let services = Services(Arc::clone(&shared));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            Server::builder()
                .add_service(PresenceApiServer::new(services.clone()))
                .add_service(ConversationApiServer::new(services.clone()))
                .add_service(MessageApiServer::new(services))
                .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
                .await
                .expect("served");
        });
        let topics = runtime.block_on(make_topics(brokers)).map_err(io::Error::other)?;
        let acknowledged = Arc::new(Acknowledged::default());
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("linger.ms", "1")
            .set("queue.buffering.max.messages", "100000")
            .set("message.timeout.ms", "300000")
            .create_with_context(Context(Arc::clone(&acknowledged)))
            .map_err(io::Error::other)?;
        let prepared = Vec::new();
        let _runtime = runtime;
        let sent = 0;
        Ok(Self {
            address,
            topics,
            sessions,
            shared,
            producer,
            acknowledged,
            sent,
            prepared,
            _runtime,
        })
    }

    /// What presence holds.
    pub fn presence(&self) -> PresenceCounts {
        self.shared.registry().counts
    }

    /// Publishes the conversations that a plan needs. Returns whether there was anything to do.
    pub fn prepare(&mut self, plan: Plan) -> bool {
        if self.prepared.contains(&plan.group) {
            return false;
        }
        self.prepared.push(plan.group);
        *self.shared.published() = None;
        let topic = self.topics.conversations.clone();
        for at in 0..(self.sessions / plan.group).max(1) {
            let first = at * plan.group;
            let members = first..(first + plan.group).min(self.sessions);
            let number = conversation(plan.group, at);
            self.send(&topic, number, &creation(number, members.map(names::user)));
        }
        self.flush();
        true
    }

    /// Publishes the events of a plan, going on where an earlier one of the same kind ended.
    pub fn push(&mut self, plan: Plan) -> Pushed {
        let started_ns = now_ns();
        {
            let mut published = self.shared.published();
            let before = published.as_ref().map_or(0, Generator::total);
            *published = Some(Generator::after(before, plan, self.sessions));
        }
        let topic = self.topics.messages.clone();
        let mut due = VecDeque::new();
        loop {
            {
                let mut published = self.shared.published();
                let generator = published.as_mut().expect("put there above");
                while due.len() < 256
                    && let Some(item) = generator.next_due()
                {
                    due.push_back(item);
                }
                if due.is_empty() && generator.is_finished() {
                    break;
                }
            }
            if due.is_empty() {
                std::thread::sleep(POLL);
            }
            for item in due.drain(..) {
                self.send(&topic, item.conversation, &item.value);
            }
        }
        self.flush();
        Pushed {
            messages: plan.events * plan.group.min(self.sessions) as u64,
            elapsed_ns: now_ns() - started_ns,
            generator_ns: 0,
            retries: 0,
            sends: None,
        }
    }

    fn send(&mut self, topic: &str, conversation: usize, value: &[u8]) {
        let key = payload::conversation_id(conversation);
        loop {
            match self.producer.send(BaseRecord::to(topic).key(&key).payload(value)) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                    std::thread::sleep(POLL);
                }
                Err((error, _)) => panic!("publishing: {error}"),
            }
        }
        self.sent += 1;
    }

    fn flush(&self) {
        self.producer.flush(FLUSH_MAX).expect("the broker acknowledges in time");
        let deadline = Instant::now() + FLUSH_MAX;
        while self.acknowledged.records.load(Ordering::Relaxed) < self.sent {
            assert_eq!(self.acknowledged.failed.load(Ordering::Relaxed), 0, "records that failed");
            assert!(Instant::now() < deadline, "the broker acknowledges in time");
            std::thread::sleep(POLL);
        }
    }
}

async fn make_topics(brokers: &str) -> Result<Topics, String> {
    let run = std::process::id();
    let topics = Topics {
        messages: format!("messaging.events.v1-{run}"),
        conversations: format!("conversation.events.v1-{run}"),
    };
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .map_err(|error| error.to_string())?;
    let new = [&topics.messages, &topics.conversations]
        .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)));
    let made = admin.create_topics(&new, &AdminOptions::new()).await;
    for result in made.map_err(|error| error.to_string())? {
        result.map_err(|(name, error)| format!("topic {name}: {error}"))?;
    }
    Ok(topics)
}

#[derive(Clone)]
struct Services(Arc<Shared>);

/// The session of a user's name.
fn session_of(user: &str) -> Result<usize, Status> {
    names::number(user).ok_or_else(|| Status::invalid_argument("no user of this load"))
}

#[tonic::async_trait]
impl PresenceApi for Services {
    async fn register_session(
        &self,
        request: Request<RegisterSessionRequest>,
    ) -> Result<Response<RegisterSessionResponse>, Status> {
        let request = request.into_inner();
        let session = session_of(&request.user_id)?;
        let mut registry = self.0.registry();
        registry.set(session, true);
        registry.counts.registrations += 1;
        if registry.instance != request.instance_id {
            registry.instance = request.instance_id;
        }
        Ok(Response::new(RegisterSessionResponse {}))
    }

    async fn unregister_session(
        &self,
        request: Request<UnregisterSessionRequest>,
    ) -> Result<Response<UnregisterSessionResponse>, Status> {
        let session = session_of(&request.into_inner().user_id)?;
        let mut registry = self.0.registry();
        registry.set(session, false);
        registry.counts.unregistrations += 1;
        Ok(Response::new(UnregisterSessionResponse {}))
    }

    async fn refresh_session(
        &self,
        request: Request<RefreshSessionRequest>,
    ) -> Result<Response<RefreshSessionResponse>, Status> {
        let session = session_of(&request.into_inner().user_id)?;
        let mut registry = self.0.registry();
        registry.counts.refreshes += 1;
        if registry.holds(session) {
            Ok(Response::new(RefreshSessionResponse {}))
        } else {
            Err(Status::not_found("not registered"))
        }
    }

    async fn get_user_devices(
        &self,
        request: Request<GetUserDevicesRequest>,
    ) -> Result<Response<GetUserDevicesResponse>, Status> {
        let session = session_of(&request.into_inner().user_id)?;
        let registry = self.0.registry();
        let device = DeviceInfo {
            device_id: names::device(session),
            instance_id: registry.instance.clone(),
        };
        let devices = if registry.holds(session) { vec![device] } else { Vec::new() };
        Ok(Response::new(GetUserDevicesResponse { devices }))
    }

    async fn get_presence(
        &self,
        request: Request<GetPresenceRequest>,
    ) -> Result<Response<GetPresenceResponse>, Status> {
        let registry = self.0.registry();
        let presences = request.into_inner().user_ids.into_iter().map(|user_id| {
            let session = session_of(&user_id)?;
            let online = registry.holds(session);
            let device_ids = if online { vec![names::device(session)] } else { Vec::new() };
            Ok(UserPresence { user_id, online, device_ids })
        });
        let presences = presences.collect::<Result<_, Status>>()?;
        Ok(Response::new(GetPresenceResponse { presences }))
    }
}

impl Services {
    /// The number, among those of the present size, of a conversation, and that size.
    fn place(&self, id: &str) -> Result<(usize, usize), Status> {
        let published = self.0.published();
        let group = published.as_ref().map_or(1, Generator::group);
        payload::conversation_number(id)
            .and_then(|number| number.checked_sub(conversation(group, 0)))
            .map(|at| (at, group))
            .ok_or_else(|| Status::not_found("no conversation of this load"))
    }
}

#[tonic::async_trait]
impl ConversationApi for Services {
    async fn get_conversation(
        &self,
        request: Request<GetConversationRequest>,
    ) -> Result<Response<GetConversationResponse>, Status> {
        let conversation_id = request.into_inner().conversation_id;
        let (at, group) = self.place(&conversation_id)?;
        let members = (at * group..(at + 1) * group).map(names::user);
        Ok(Response::new(GetConversationResponse {
            participant_user_ids: members.collect(),
            conversation: Some(Conversation { conversation_id, ..Conversation::default() }),
        }))
    }

    async fn list_conversations(
        &self,
        request: Request<ListConversationsRequest>,
    ) -> Result<Response<ListConversationsResponse>, Status> {
        let session = session_of(&request.into_inner().user_id)?;
        let group = self.0.published().as_ref().map_or(1, Generator::group);
        let at = session / group;
        let one = Conversation {
            conversation_id: payload::conversation_id(conversation(group, at)),
            participant_user_ids: (at * group..(at + 1) * group).map(names::user).collect(),
            ..Conversation::default()
        };
        Ok(Response::new(ListConversationsResponse { conversations: vec![one] }))
    }
}

#[tonic::async_trait]
impl MessageApi for Services {
    async fn sync_messages(
        &self,
        request: Request<SyncMessagesRequest>,
    ) -> Result<Response<SyncMessagesResponse>, Status> {
        let SyncMessagesRequest { conversation_id, after_sequence, page_size } =
            request.into_inner();
        let (at, _) = self.place(&conversation_id)?;
        let published = self.0.published();
        let Some(generator) = published.as_ref() else {
            return Ok(Response::new(SyncMessagesResponse::default()));
        };
        let after = u64::try_from(after_sequence).unwrap_or(0);
        let page = u64::try_from(page_size).unwrap_or(0);
        let last = generator.last_sequence(at).min(after + page);
        let message = |sequence| {
            let intended_ns = generator.due_of(at, sequence).unwrap_or_else(now_ns);
            Message {
                message_id: "m".to_owned(),
                conversation_id: conversation_id.clone(),
                sender_user_id: "u".to_owned(),
                sequence: sequence as i64,
                metadata_json: Stamp { sequence, intended_ns }.text(),
                ..Message::default()
            }
        };
        let messages = (after + 1..=last).map(message).collect();
        Ok(Response::new(SyncMessagesResponse { messages }))
    }
}
