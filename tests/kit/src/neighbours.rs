//! Fake conversation, message and presence services that keep their state in memory, record every
//! call, and fail, hang or answer late on demand.
//!
//! They run on a thread and a runtime of their own, so that tests with and without a runtime can
//! use them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use prost_types::Timestamp;
use tokio::sync::{oneshot, watch};
use tonic::{Code, Status};

use crate::proto::conversation::v1::{Conversation, Participant};
use crate::proto::message::v1::Message;
use crate::proto::presence::v1::{DeviceInfo, UserPresence};
use crate::services::{Answer, Neighbours, serve};

pub use crate::services::{Call, Method};

/// Limit for [`FakeNeighbours::until`].
const UNTIL_MAX: Duration = Duration::from_secs(30);

/// How a method answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// As the contract says.
    Normal,
    /// With this status, changing nothing.
    Failing(Code),
    /// Never, changing nothing.
    Hanging,
    /// As the contract says, after this time.
    Delayed(Duration),
    /// As the contract says, once another behaviour is set.
    Held,
}

/// State of the services, and the calls that they received.
#[derive(Debug, Default)]
pub struct NeighbourState {
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
    /// The highest value of `in_flight`, by method.
    pub in_flight_peak: HashMap<Method, usize>,
    /// Whether a list of conversations includes their members.
    pub lists_members: bool,
    /// Whether it includes them once more, with their roles.
    pub lists_roles: bool,
    behaviours: HashMap<Method, Behaviour>,
}

impl NeighbourState {
    /// Number of calls to a method.
    pub fn count(&self, method: Method) -> usize {
        self.calls.iter().filter(|call| call.method() == method).count()
    }

    /// Creates a conversation with `count` messages, sequences from 1.
    pub fn create(&mut self, conversation: &str, members: &[&str], count: i64) {
        let members = members.iter().map(|member| (*member).to_owned());
        self.members.entry(conversation.to_owned()).or_default().extend(members);
        let messages = (1..=count).map(|sequence| message(conversation, sequence));
        self.messages.entry(conversation.to_owned()).or_default().extend(messages);
    }

    fn behaviour(&self, method: Method) -> Behaviour {
        self.behaviours.get(&method).copied().unwrap_or(Behaviour::Normal)
    }

    /// Carries out a call as the contract says.
    fn answer(&mut self, call: Call) -> Result<Answer, Status> {
        Ok(match call {
            Call::Register { user, device, instance } => {
                self.registrations.insert((user, device), instance);
                Answer::Done
            }
            Call::Unregister { user, device } => {
                self.registrations.remove(&(user, device));
                Answer::Done
            }
            Call::Refresh { .. } => Answer::Done,
            Call::Devices { user } => Answer::Devices(self.devices_of(&user)),
            Call::Presence { users } => {
                let presence = |user_id: String| {
                    let devices = self.devices_of(&user_id);
                    let device_ids: Vec<_> = devices.into_iter().map(|d| d.device_id).collect();
                    UserPresence { user_id, online: !device_ids.is_empty(), device_ids }
                };
                Answer::Presence(users.into_iter().map(presence).collect())
            }
            Call::Members { conversation } => match self.members.get(&conversation) {
                Some(members) => Answer::Members(members.iter().cloned().collect()),
                None => return Err(Status::not_found("unknown")),
            },
            Call::List { user, .. } => {
                let listed = self.members.iter().filter(|(_, members)| members.contains(&user));
                let conversation = |(id, members): (&String, &BTreeSet<String>)| {
                    let named = members.iter().filter(|_| self.lists_members);
                    let with_roles = members.iter().filter(|_| self.lists_roles);
                    let participant =
                        |user: &String| Participant { user_id: user.clone(), role: 1 };
                    Conversation {
                        conversation_id: id.clone(),
                        participant_user_ids: named.cloned().collect(),
                        participants_with_roles: with_roles.map(participant).collect(),
                        ..Conversation::default()
                    }
                };
                Answer::Conversations(listed.map(conversation).collect())
            }
            Call::Sync { conversation, after, page_size } => {
                let messages = self.messages.get(&conversation).into_iter().flatten();
                let page = messages.filter(|message| message.sequence > after);
                let size = usize::try_from(page_size).unwrap_or(0);
                Answer::Messages(page.take(size).cloned().collect())
            }
        })
    }

    fn devices_of(&self, user: &str) -> Vec<DeviceInfo> {
        self.registrations
            .iter()
            .filter(|((of, _), _)| of == user)
            .map(|((_, device), instance)| DeviceInfo {
                device_id: device.clone(),
                instance_id: instance.clone(),
            })
            .collect()
    }
}

/// The message that [`NeighbourState::create`] puts at a sequence.
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

/// The state, and what wakes those that wait for a change of it.
#[derive(Debug, Default)]
struct SharedState {
    state: Mutex<NeighbourState>,
    changed: Condvar,
    changes: watch::Sender<u64>,
}

impl SharedState {
    fn lock(&self) -> MutexGuard<'_, NeighbourState> {
        self.state.lock().expect("no holder panics")
    }

    fn notify(&self) {
        self.changed.notify_all();
        self.changes.send_modify(|count| *count += 1);
    }
}

/// Counts a call as in flight until dropped, also when the caller gives up.
struct InFlight<'a>(&'a SharedState, Method);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        *self.0.lock().in_flight.entry(self.1).or_default() -= 1;
        self.0.notify();
    }
}

impl Neighbours for SharedState {
    /// Records the call, waits or fails as set, then answers from the state.
    async fn answer(&self, call: Call) -> Result<Answer, Status> {
        let method = call.method();
        let behaviour = {
            let mut state = self.lock();
            state.calls.push(call.clone());
            let behaviour = state.behaviour(method);
            let in_flight = state.in_flight.entry(method).or_default();
            *in_flight += 1;
            let in_flight = *in_flight;
            let peak = state.in_flight_peak.entry(method).or_default();
            *peak = in_flight.max(*peak);
            if behaviour == Behaviour::Normal {
                // Recorded and carried out under one lock: a test that sees the call also sees its
                // effect.
                *state.in_flight.entry(method).or_default() -= 1;
                let answer = state.answer(call);
                drop(state);
                self.notify();
                return answer;
            }
            behaviour
        };
        let _in_flight = InFlight(self, method);
        self.notify();
        match behaviour {
            Behaviour::Normal => unreachable!("answered above"),
            Behaviour::Failing(code) => return Err(Status::new(code, "set to fail")),
            Behaviour::Hanging => pending().await,
            Behaviour::Delayed(time) => tokio::time::sleep(time).await,
            Behaviour::Held => {
                let mut changes = self.changes.subscribe();
                while self.lock().behaviour(method) == Behaviour::Held {
                    changes.changed().await.expect("the sender is in self");
                }
            }
        }
        self.lock().answer(call)
    }
}

/// The running services. Stop when dropped.
pub struct FakeNeighbours {
    shared: Arc<SharedState>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeNeighbours {
    /// Starts them on a free port of the loopback interface.
    pub fn start() -> Self {
        Self::with_tls(None)
    }

    /// Starts them with TLS, with this certificate and key (PEM).
    pub fn with_tls(identity: Option<(String, String)>) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut services = Self { shared: Arc::default(), address, stop: None, thread: None };
        services.run(identity);
        services
    }

    fn run(&mut self, identity: Option<(String, String)>) {
        let listener = TcpListener::bind(self.address).expect("the port is free");
        self.address = listener.local_addr().expect("bound");
        let shared = Arc::clone(&self.shared);
        let (stop, stopped) = oneshot::channel();
        self.stop = Some(stop);
        self.thread = Some(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                tokio::select! {
                    served = serve(shared, listener, identity) => served.expect("served"),
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

    /// Stops them as a crash would; the state stays.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("served without a panic");
        }
    }

    /// Starts them again at the same address, without TLS.
    pub fn restart(&mut self) {
        self.stop();
        self.run(None);
    }

    /// Sets how a method answers from now on.
    pub fn set(&self, method: Method, behaviour: Behaviour) {
        self.shared.lock().behaviours.insert(method, behaviour);
        self.shared.notify();
    }

    /// The state, to read and to change.
    pub fn state(&self) -> MutexGuard<'_, NeighbourState> {
        self.shared.lock()
    }

    /// Blocks until the state is as `wanted`, for tests without a runtime.
    ///
    /// # Panics
    /// Not within `limit`.
    pub fn wait(&self, limit: Duration, wanted: impl Fn(&NeighbourState) -> bool) {
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, limit, |state| !wanted(state));
        let (state, result) = waited.expect("no holder panics");
        assert!(!result.timed_out(), "not within {limit:?}: {:?}", state.calls);
    }

    /// Waits until the state is as `wanted`, for tests with a runtime.
    ///
    /// # Panics
    /// Not within 30 s.
    pub async fn until(&self, wanted: impl Fn(&NeighbourState) -> bool) {
        let mut changes = self.shared.changes.subscribe();
        let wait = async {
            while !wanted(&self.shared.lock()) {
                changes.changed().await.expect("the sender is in self");
            }
        };
        if tokio::time::timeout(UNTIL_MAX, wait).await.is_err() {
            panic!("not within {UNTIL_MAX:?}: {:?}", self.shared.lock().calls);
        }
    }
}

impl Drop for FakeNeighbours {
    fn drop(&mut self) {
        self.stop();
    }
}
