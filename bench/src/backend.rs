//! The back end around a node in the load runs: conversation, message and presence services that
//! compute their answers and keep one bit per session, and the producer of the events in Kafka.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use delivery_testkit::proto::conversation::v1::Conversation;
use delivery_testkit::proto::message::v1::Message;
use delivery_testkit::proto::presence::v1::{DeviceInfo, UserPresence};
use delivery_testkit::publisher::{Publisher, create_topics};
use delivery_testkit::services::{Answer, Call, Neighbours, serve};
use serde::Serialize;
use tonic::Status;

use crate::clock::now_ns;
use crate::control::Pushed;
use crate::generator::{Generator, PushPlan, conversation};
use crate::names;
use crate::payload::{self, Stamp, creation};

/// Partitions of each topic, as in a deployment.
const PARTITIONS: i32 = 3;
/// Properties of the producers beyond those of the tests.
const PRODUCER: [(&str, &str); 2] =
    [("linger.ms", "1"), ("queue.buffering.max.messages", "100000")];
/// Pause before the next look at which events are due.
const POLL: Duration = Duration::from_micros(200);
/// Events taken from the generator at a time.
const BATCH: usize = 256;
/// For the broker to acknowledge everything.
const FLUSH_MAX: Duration = Duration::from_secs(120);

/// The topics of a run; no other run uses them.
#[derive(Clone, Debug)]
pub struct Topics {
    /// Message events.
    pub messages: String,
    /// Conversation events.
    pub conversations: String,
}

/// Sessions registered with the presence service, and the calls that it received.
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

/// Calls that the conversation and the message service received.
#[derive(Debug, Default)]
struct NeighbourCalls {
    members: AtomicU64,
    lists: AtomicU64,
    syncs: AtomicU64,
}

/// Calls to the three services since they started.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CallCounts {
    /// For the members of a conversation.
    pub members: u64,
    /// For the conversations of a user.
    pub lists: u64,
    /// For the messages of a conversation.
    pub syncs: u64,
    /// To register a session.
    pub registrations: u64,
    /// To unregister a session.
    pub unregistrations: u64,
}

/// State of the presence service.
#[derive(Debug, Default)]
struct Registrations {
    /// One bit per session: whether it is registered.
    bits: Vec<u64>,
    /// The instance of the last registration; there is one node.
    instance: String,
    counts: PresenceCounts,
}

impl Registrations {
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

    fn contains(&self, session: usize) -> bool {
        self.bits.get(session / 64).is_some_and(|word| word & (1 << (session % 64)) != 0)
    }
}

/// The three services.
#[derive(Debug, Default)]
struct Services {
    registrations: Mutex<Registrations>,
    /// Generator of the published events. The message service has an event before Kafka does.
    published: Mutex<Option<Generator>>,
    calls: NeighbourCalls,
}

impl Services {
    fn registrations(&self) -> MutexGuard<'_, Registrations> {
        self.registrations.lock().expect("no holder panics")
    }

    fn published(&self) -> MutexGuard<'_, Option<Generator>> {
        self.published.lock().expect("no holder panics")
    }

    /// Members of each conversation, and conversations with the same members.
    fn shape(&self) -> (usize, usize) {
        let published = self.published();
        let plan = published.as_ref().map(Generator::plan);
        plan.map_or((1, 1), |plan| (plan.group, plan.each))
    }

    /// Index of a conversation among those of the current size.
    fn index_of(&self, id: &str) -> Result<usize, Status> {
        let first = conversation(self.shape().0, 0);
        payload::conversation_number(id)
            .and_then(|number| number.checked_sub(first))
            .ok_or_else(|| Status::not_found("no conversation of this load"))
    }

    /// Members of the conversation at `index`.
    fn members(&self, index: usize) -> Vec<String> {
        let (group, each) = self.shape();
        let first = index / each * group;
        (first..first + group).map(names::user).collect()
    }

    /// The conversations of a session.
    fn conversations(&self, session: usize) -> Vec<Conversation> {
        let (group, each) = self.shape();
        let first = session / group * each;
        let members = self.members(first);
        let one = |index| Conversation {
            conversation_id: payload::conversation_id(conversation(group, index)),
            participant_user_ids: members.clone(),
            ..Conversation::default()
        };
        (first..first + each).map(one).collect()
    }

    fn messages(&self, id: &str, after: i64, page_size: i32) -> Result<Vec<Message>, Status> {
        let index = self.index_of(id)?;
        let published = self.published();
        let Some(generator) = published.as_ref() else { return Ok(Vec::new()) };
        let after = u64::try_from(after).unwrap_or(0);
        let page = u64::try_from(page_size).unwrap_or(0);
        let last = generator.last_sequence(index).min(after + page);
        let message = |sequence| {
            let intended_ns = generator.due_of(index, sequence).unwrap_or_else(now_ns);
            Message {
                message_id: "m".to_owned(),
                conversation_id: id.to_owned(),
                sender_user_id: "u".to_owned(),
                sequence: sequence as i64,
                metadata_json: Stamp { sequence, intended_ns }.text(),
                ..Message::default()
            }
        };
        Ok((after + 1..=last).map(message).collect())
    }
}

impl Neighbours for Services {
    async fn answer(&self, call: Call) -> Result<Answer, Status> {
        let session_of = |user: &str| {
            names::number(user).ok_or_else(|| Status::invalid_argument("no user of this load"))
        };
        Ok(match call {
            Call::Register { user, instance, .. } => {
                let mut registrations = self.registrations();
                registrations.set(session_of(&user)?, true);
                registrations.counts.registrations += 1;
                if registrations.instance != instance {
                    registrations.instance = instance;
                }
                Answer::Done
            }
            Call::Unregister { user, .. } => {
                let mut registrations = self.registrations();
                registrations.set(session_of(&user)?, false);
                registrations.counts.unregistrations += 1;
                Answer::Done
            }
            Call::Refresh { user, .. } => {
                let mut registrations = self.registrations();
                registrations.counts.refreshes += 1;
                if !registrations.contains(session_of(&user)?) {
                    return Err(Status::not_found("not registered"));
                }
                Answer::Done
            }
            Call::Devices { user } => {
                let session = session_of(&user)?;
                let registrations = self.registrations();
                let device = registrations.contains(session).then(|| DeviceInfo {
                    device_id: names::device(session),
                    instance_id: registrations.instance.clone(),
                });
                Answer::Devices(device.into_iter().collect())
            }
            Call::Presence { users } => {
                let registrations = self.registrations();
                let presence = |user_id: String| {
                    let session = session_of(&user_id)?;
                    let online = registrations.contains(session);
                    let device_ids = online.then(|| names::device(session)).into_iter().collect();
                    Ok(UserPresence { user_id, online, device_ids })
                };
                Answer::Presence(users.into_iter().map(presence).collect::<Result<_, Status>>()?)
            }
            Call::Members { conversation } => {
                self.calls.members.fetch_add(1, Ordering::Relaxed);
                Answer::Members(self.members(self.index_of(&conversation)?))
            }
            Call::List { user, .. } => {
                self.calls.lists.fetch_add(1, Ordering::Relaxed);
                Answer::Conversations(self.conversations(session_of(&user)?))
            }
            Call::Sync { conversation, after, page_size } => {
                self.calls.syncs.fetch_add(1, Ordering::Relaxed);
                Answer::Messages(self.messages(&conversation, after, page_size)?)
            }
        })
    }
}

/// Counts the calls to the services of a back end, from any thread.
#[derive(Clone, Debug)]
pub struct Calls(Arc<Services>);

impl Calls {
    /// Calls so far.
    pub fn counts(&self) -> CallCounts {
        let NeighbourCalls { members, lists, syncs } = &self.0.calls;
        let PresenceCounts { registrations, unregistrations, .. } = self.0.registrations().counts;
        CallCounts {
            members: members.load(Ordering::Relaxed),
            lists: lists.load(Ordering::Relaxed),
            syncs: syncs.load(Ordering::Relaxed),
            registrations,
            unregistrations,
        }
    }
}

/// The running services and the producers.
pub struct Backend {
    /// Address of the three services.
    pub address: SocketAddr,
    /// The topics of the events.
    pub topics: Topics,
    sessions: usize,
    services: Arc<Services>,
    messages: Publisher,
    conversations: Publisher,
    /// Sizes of the conversations that have been created.
    prepared: Vec<(usize, usize)>,
    _runtime: tokio::runtime::Runtime,
}

impl Backend {
    /// Starts the services on a free port and creates the topics, for this many sessions.
    ///
    /// # Errors
    /// The port, a thread or a topic is not available.
    pub fn start(brokers: &str, sessions: usize) -> io::Result<Self> {
        let run = std::process::id();
        let topics = Topics {
            messages: format!("messaging.events.v1-{run}"),
            conversations: format!("conversation.events.v1-{run}"),
        };
        create_topics(brokers, &[&topics.messages, &topics.conversations], PARTITIONS, &[])?;
        let publisher = |topic: &str| Publisher::with_settings(brokers, topic, &PRODUCER);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let services = Arc::new(Services::default());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let served = serve(Arc::clone(&services), listener, None);
        runtime.spawn(async move { served.await.expect("served") });
        Ok(Self {
            address,
            sessions,
            services,
            messages: publisher(&topics.messages),
            conversations: publisher(&topics.conversations),
            topics,
            prepared: Vec::new(),
            _runtime: runtime,
        })
    }

    /// Sessions and calls of the presence service.
    pub fn presence(&self) -> PresenceCounts {
        self.services.registrations().counts
    }

    /// Counts the calls that the services receive.
    pub fn calls(&self) -> Calls {
        Calls(Arc::clone(&self.services))
    }

    /// Publishes the conversations that a plan needs. Returns whether there was anything to do.
    pub fn prepare(&mut self, plan: PushPlan) -> bool {
        if self.prepared.contains(&(plan.group, plan.each)) {
            return false;
        }
        self.prepared.push((plan.group, plan.each));
        // No events yet, but members.
        let none = PushPlan { events: 0, ..plan };
        *self.services.published() = Some(Generator::new(none, self.sessions));
        for index in 0..(self.sessions / plan.group).max(1) * plan.each {
            let first = index / plan.each * plan.group;
            let members = first..(first + plan.group).min(self.sessions);
            let number = conversation(plan.group, index);
            let value = creation(number, members.map(names::user));
            self.conversations.publish_bytes(&payload::conversation_id(number), &value);
        }
        self.conversations.flush(FLUSH_MAX);
        true
    }

    /// Publishes the events of a plan. Sequences continue from the previous plan of the same size.
    pub fn push(&mut self, plan: PushPlan) -> Pushed {
        let started_ns = now_ns();
        {
            let mut published = self.services.published();
            let before = published.as_ref().map_or(0, Generator::total);
            *published = Some(Generator::after(before, plan, self.sessions));
        }
        let mut due = VecDeque::new();
        loop {
            {
                let mut published = self.services.published();
                let generator = published.as_mut().expect("set above");
                while due.len() < BATCH
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
                let key = payload::conversation_id(item.conversation);
                self.messages.publish_bytes(&key, &item.value);
            }
        }
        self.messages.flush(FLUSH_MAX);
        Pushed {
            messages: plan.events * plan.group.min(self.sessions) as u64,
            elapsed_ns: now_ns() - started_ns,
            ..Pushed::default()
        }
    }
}
