use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::timeout;

use super::conversations::{FakeConversations, FakeSource};
use crate::domain::budget::EventBudget;
use crate::domain::command::{ShardCommand, ShardReport, Ticket};
use crate::domain::cursor::{Cursor, CursorExpired, RoutedPositions};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, ConversationPosition, SessionAddress, ShardId};
use crate::handoff::{Doorbell, Pushed, ShardEnd, connect};
use crate::service::backends::ports::{ForwardDone, Forwarding, RemoteNodes};
use crate::service::cluster::tail::TailBudget;
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::conversation::v1::{
    Conversation, ConversationCreatedEvent, MembershipChangedEvent,
};
use crate::service::events::proto::message::v1::{Message, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventType;
use crate::service::events::timestamp::unix_ms;
use crate::service::members::directory::{Directory, SessionIds};
use crate::service::members::membership::{Membership, MembershipConfig, MembershipCounters};
use crate::service::members::user_lists::{UserLists, UserListsConfig};
use crate::service::routing::replays::{ReplayedChunk, TailReplays as _};
use crate::service::routing::router::dead_letter::{DeadLetter, DeadLetterDone, DeadLetterSink};
use crate::service::routing::router::{
    Assignment, CommittableOffset, RawRecord, RecordSource, ReplayChunkMax, Router, RouterConfig,
    RouterControl, RouterCounters, RouterParts, RouterReplays, TailFill, TopicPartition,
};
use crate::service::runtime::backoff::Backoff;

pub(super) const RING_SLOTS: usize = 4;
const SHARDS: u16 = 2;

/// Other nodes: keeps the records handed off; the test reports them done.
#[derive(Default)]
pub(super) struct FakeNodes {
    pub(super) handed: Mutex<Vec<(Bytes, Vec<String>)>>,
    pub(super) pending: Mutex<Vec<ForwardDone>>,
    /// Users whose records were not offered.
    pub(super) lost: Mutex<Vec<String>>,
    /// Whether the queue to other nodes is full.
    pub(super) full: AtomicBool,
    /// Whether there is none.
    pub(super) none: AtomicBool,
}

impl RemoteNodes for FakeNodes {
    fn may_exist(&self) -> bool {
        !self.none.load(Ordering::Relaxed)
    }

    fn forward(&self, value: &[u8], users: &[&str], done: ForwardDone) -> Forwarding {
        self.handed
            .lock()
            .unwrap()
            .push((Bytes::copy_from_slice(value), users.iter().map(|id| id.to_string()).collect()));
        self.pending.lock().unwrap().push(done);
        Forwarding::Pending
    }

    fn lost(&self, users: &[&str]) {
        self.lost.lock().unwrap().extend(users.iter().map(|id| id.to_string()));
    }

    fn lost_by_all(&self) {
        self.lost.lock().unwrap().push("all".to_owned());
    }

    fn has_room(&self) -> bool {
        !self.full.load(Ordering::Relaxed)
    }
}

/// A dead-letter sink: keeps the offset and label of each, stored at once.
#[derive(Default)]
pub(super) struct FakeDeadLetters(pub(super) Mutex<Vec<(i64, &'static str)>>);

impl DeadLetterSink for FakeDeadLetters {
    fn send(&self, letter: DeadLetter<'_>, done: DeadLetterDone) -> bool {
        self.0.lock().unwrap().push((letter.raw.offset, letter.reason.label()));
        done();
        true
    }
}

/// A partition: the test appends, the router reads.
#[derive(Clone, Default)]
pub(super) struct FakePartition(Arc<Mutex<VecDeque<Appended>>>);

#[derive(Debug)]
struct Appended {
    offset: i64,
    at_ms: u64,
    key: Option<String>,
    value: Vec<u8>,
}

impl FakePartition {
    pub(super) fn append(&self, offset: i64, value: Vec<u8>) {
        self.append_at(offset, unix_ms(), None, value);
    }

    pub(super) fn append_at(&self, offset: i64, at_ms: u64, key: Option<&str>, value: Vec<u8>) {
        let key = key.map(String::from);
        self.0.lock().unwrap().push_back(Appended { offset, at_ms, key, value });
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl RecordSource for FakePartition {
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool {
        let Some(record) = self.0.lock().unwrap().pop_front() else { return false };
        take(RawRecord {
            offset: record.offset,
            appended_at_ms: record.at_ms,
            key: record.key.as_ref().map(String::as_bytes),
            value: &record.value,
            traceparent: None,
        });
        true
    }
}

/// One delivery as a shard sees it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DeliveredEvent {
    /// Its position in the log.
    pub(super) position: Option<ConversationPosition>,
    /// The slots of the recipients, sorted.
    pub(super) slots: Vec<u32>,
    /// The record's value, from the binary frame (short ones only).
    pub(super) value: Vec<u8>,
    pub(super) ticket: Option<Ticket>,
}

pub(super) struct RouterWorld {
    pub(super) router: Router,
    pub(super) control: RouterControl,
    pub(super) membership: Arc<Membership>,
    pub(super) counters: Arc<RouterCounters>,
    pub(super) budget: Arc<EventBudget>,
    pub(super) conversations: Arc<FakeConversations>,
    pub(super) nodes: Arc<FakeNodes>,
    pub(super) dead_letters: Arc<FakeDeadLetters>,
    pub(super) shards: Vec<ShardEnd>,
    directory: Arc<Directory>,
    bell: Arc<Doorbell>,
    slots: u32,
    /// Added to the clock.
    pub(super) ahead_ms: u64,
    /// So much more is added while a chunk of a replay is waited for.
    pub(super) step_ms: u64,
    /// What the first shard was told to be routed.
    pub(super) routed: RoutedPositions,
    replays: Arc<RouterReplays>,
    runtime: tokio::runtime::Runtime,
}

#[derive(Clone, Copy, Default)]
pub(super) struct With {
    /// No conversation service.
    pub(super) no_service: bool,
    /// The conversation service answers only when the gate is opened.
    pub(super) gated: bool,
    /// The conversation service is asked for the conversations of users who return.
    pub(super) user_lists: bool,
    /// Other nodes.
    pub(super) nodes: bool,
    /// A dead-letter topic.
    pub(super) dead_letters: bool,
    /// Bound of a partition's window, records.
    pub(super) window: Option<usize>,
    /// Bound of the memory of events in flight, bytes.
    pub(super) event_bytes: Option<u64>,
    /// Bounds of the parked records: of a partition, and of a conversation.
    pub(super) parked: Option<(usize, usize)>,
    /// Hand-offs to other nodes in flight.
    pub(super) forwards: Option<usize>,
    /// Bound of the tails, bytes, and records of a chunk of a replay. `None`: there are none.
    pub(super) tails: Option<(u64, usize)>,
}

impl RouterWorld {
    pub(super) fn new(with: With) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build();
        let runtime = runtime.unwrap();
        let gate = with.gated.then(|| tokio::sync::Semaphore::new(0));
        let conversations = Arc::new(FakeConversations { gate, ..FakeConversations::default() });
        let source =
            (!with.no_service).then(|| Arc::new(FakeSource(Arc::clone(&conversations))) as Arc<_>);
        let membership = Membership::new(
            MembershipConfig {
                backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(2)),
                ..MembershipConfig::default()
            },
            source,
            runtime.handle().clone(),
            Arc::<MembershipCounters>::default(),
        );
        membership.follow();
        let user_lists = with.user_lists.then(|| {
            let listing = Arc::new(FakeSource(Arc::clone(&conversations)));
            let config = UserListsConfig {
                backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(2)),
                ..UserListsConfig::default()
            };
            UserLists::new(config, listing, Arc::clone(&membership), runtime.handle().clone())
        });
        let bell = Arc::new(Doorbell::new().unwrap());
        let (links, shards) = (0..SHARDS)
            .map(|_| connect([RING_SLOTS, 64], &Arc::new(Doorbell::new().unwrap()), &bell))
            .unzip();
        let (nodes, dead_letters) =
            (Arc::<FakeNodes>::default(), Arc::<FakeDeadLetters>::default());
        let directory = Arc::new(Directory::new());
        let counters = Arc::<RouterCounters>::default();
        let budget = EventBudget::new(with.event_bytes.unwrap_or(1 << 28));
        let defaults = RouterConfig::default();
        let (parked, of_conversation) = with
            .parked
            .unwrap_or((defaults.parked_records_max, defaults.parked_of_conversation_max));
        let (router, control) = Router::new(RouterParts {
            config: RouterConfig {
                parked_records_max: parked,
                parked_of_conversation_max: of_conversation,
                window_records_max: with.window.unwrap_or(defaults.window_records_max),
                forwards_max: with.forwards.unwrap_or(defaults.forwards_max),
                ..defaults
            },
            counters: Arc::clone(&counters),
            budget: Arc::clone(&budget),
            bell: Arc::clone(&bell),
            links,
            directory: Arc::clone(&directory),
            membership: Arc::clone(&membership),
            user_lists,
            remote: with.nodes.then(|| Arc::clone(&nodes) as Arc<_>),
            cluster: None,
            tails: with.tails.map(|(bytes, _)| TailBudget::new(bytes, 60_000)),
            dead_letters: with.dead_letters.then(|| Arc::clone(&dead_letters) as Arc<_>),
        });
        let records = with.tails.map_or(1, |(_, records)| records);
        let topics = [name(0).topic];
        let max = ReplayChunkMax { records, bytes: 100_000 };
        let replays = RouterReplays::new(vec![control.clone()], &topics, max);
        Self {
            router,
            control,
            membership,
            counters,
            budget,
            conversations,
            nodes,
            dead_letters,
            shards,
            directory,
            bell,
            slots: 0,
            ahead_ms: 0,
            step_ms: 1,
            routed: RoutedPositions::default(),
            replays: Arc::new(replays),
            runtime,
        }
    }

    /// Connects a session of `user` on `shard`; returns its slot.
    pub(super) fn connect(&mut self, user: &str, device: &str, shard: u16) -> u32 {
        self.slots += 1;
        let address = SessionAddress {
            shard: ShardId(shard),
            encoding: Encoding::Binary,
            connection: ConnectionKey { slot: self.slots, generation: 0 },
        };
        assert_eq!(self.directory.insert(SessionIds::new(user, device), address), None);
        self.slots
    }

    /// The session has ended.
    pub(super) fn disconnect(&self, user: &str, device: &str, shard: u16, slot: u32) {
        let address = SessionAddress {
            shard: ShardId(shard),
            encoding: Encoding::Binary,
            connection: ConnectionKey { slot, generation: 0 },
        };
        self.directory.remove(&SessionIds::new(user, device), address);
    }

    /// Assigns a partition to the router.
    pub(super) fn assign(&self, partition: i32) -> (FakePartition, Arc<CommittableOffset>) {
        self.assign_from(partition, 0, None)
    }

    /// Assigns a partition that is routed from `start` on.
    pub(super) fn assign_from(
        &self,
        partition: i32,
        start: i64,
        fill: Option<TailFill>,
    ) -> (FakePartition, Arc<CommittableOffset>) {
        let (log, committable) =
            (FakePartition::default(), Arc::new(CommittableOffset::new(Some(start))));
        self.control.assign(Assignment {
            log: name(partition),
            source: Box::new(log.clone()),
            start: Some(start),
            fill,
            committable: Arc::clone(&committable),
            ownership: None,
        });
        (log, committable)
    }

    /// One turn. Returns whether anything progressed.
    pub(super) fn turn(&mut self) -> bool {
        match self.router.turn(unix_ms() + self.ahead_ms) {
            ControlFlow::Continue(moved) => moved,
            ControlFlow::Break(()) => panic!("stopped"),
        }
    }

    /// Turns until nothing progresses.
    pub(super) fn run_until_idle(&mut self) {
        for _ in 0..1000 {
            if !self.turn() {
                return;
            }
        }
        panic!("never idle");
    }

    /// Turns, with sleeps on the doorbell, until `reached`.
    pub(super) fn until(&mut self, what: &str, reached: impl Fn(&mut Self) -> bool) {
        for _ in 0..2000 {
            self.run_until_idle();
            if reached(self) {
                return;
            }
            self.bell.about_to_sleep();
            if !self.turn() && !reached(self) {
                self.bell.wait(5);
            }
            self.bell.awake();
        }
        panic!("never: {what}");
    }

    /// Takes the deliveries from a shard's ring.
    pub(super) fn delivered(&mut self, shard: usize) -> Vec<DeliveredEvent> {
        let mut delivered = Vec::new();
        while let Some(command) = self.shards[shard].commands.pop() {
            let (event, recipients, ticket) = match command {
                ShardCommand::Deliver { event, recipients, ticket, .. } => {
                    (event, recipients, ticket)
                }
                ShardCommand::Routed { positions } => {
                    if shard == 0 {
                        self.routed.update(&positions);
                    }
                    continue;
                }
                command => panic!("{command:?}"),
            };
            let mut slots: Vec<_> = recipients.iter().map(|(key, _)| key.slot).collect();
            slots.sort_unstable();
            let value = event.frame(Encoding::Binary).unwrap()[2..].to_vec();
            let position = event.log_position;
            delivered.push(DeliveredEvent { slots, value, position, ticket });
        }
        delivered
    }

    /// Takes the deliveries from a shard's ring, reports them done and returns their slots.
    pub(super) fn taken(&mut self, shard: usize) -> Vec<Vec<u32>> {
        let delivered = self.delivered(shard);
        for ticket in delivered.iter().filter_map(|event| event.ticket) {
            self.report(shard, ticket);
        }
        delivered.into_iter().map(|event| event.slots).collect()
    }

    /// The next positions that the first shard is told.
    pub(super) fn cursor(&mut self) -> Cursor {
        self.ahead_ms += 1_000;
        self.run_until_idle();
        (0..self.shards.len()).for_each(|shard| drop(self.taken(shard)));
        self.run_until_idle();
        self.routed.cursor().expect("partitions are assigned")
    }

    /// Starts a replay, which goes on while the router turns. The receiver gets each chunk, and takes them one by one.
    pub(super) fn replay(&self, user: &str, since: Cursor) -> Receiver<ReplayedChunk> {
        let address = SessionAddress {
            shard: ShardId(0),
            encoding: Encoding::Binary,
            connection: ConnectionKey { slot: 0, generation: 0 },
        };
        let mut reader = self.replays.replay(address, user.into(), Some(since));
        let (sender, chunks) = channel(1);
        self.runtime.spawn(async move {
            loop {
                let chunk = reader.next().await;
                let is_last = !matches!(chunk, Ok(Some(_)));
                if sender.send(chunk).await.is_err() || is_last {
                    return;
                }
            }
        });
        chunks
    }

    /// The next chunk of a replay.
    pub(super) fn next_chunk(&mut self, chunks: &mut Receiver<ReplayedChunk>) -> ReplayedChunk {
        for _ in 0..5_000 {
            self.turn();
            let wait = async { timeout(Duration::from_millis(1), chunks.recv()).await };
            if let Ok(chunk) = self.runtime.block_on(wait) {
                return chunk.expect("the replay has not ended");
            }
            self.ahead_ms += self.step_ms;
        }
        panic!("never: a chunk");
    }

    /// The next chunk of a replay, if it is there.
    pub(super) fn try_next_chunk(
        &self,
        chunks: &mut Receiver<ReplayedChunk>,
    ) -> Option<ReplayedChunk> {
        let wait = async { timeout(Duration::from_micros(100), chunks.recv()).await };
        self.runtime.block_on(wait).ok().map(|chunk| chunk.expect("the replay has not ended"))
    }

    /// Partition and offset of all records of a replay.
    pub(super) fn replayed(
        &mut self,
        chunks: &mut Receiver<ReplayedChunk>,
    ) -> Result<Vec<(i32, i64)>, CursorExpired> {
        let mut all = Vec::new();
        while let Some(records) = self.next_chunk(chunks)? {
            assert!(!records.is_empty());
            all.extend(records.iter().map(|record| (record.partition, record.offset)));
        }
        Ok(all)
    }

    pub(super) fn report(&mut self, shard: usize, ticket: Ticket) {
        assert!(matches!(
            self.shards[shard].reports.push(ShardReport::Done { ticket }),
            Pushed::Accepted
        ));
    }
}

pub(super) fn name(partition: i32) -> TopicPartition {
    TopicPartition { topic: "events".into(), topic_index: 0, partition }
}

pub(crate) fn message(conversation: &str, sequence: i64) -> Vec<u8> {
    let message = Message { conversation_id: conversation.into(), sequence, ..Message::default() };
    let event = MessageSentEvent { message: Some(message) };
    encode_envelope(EventType::MessageSent, None, event.encode_to_vec())
}

pub(crate) fn created(conversation: &str, members: &[&str]) -> Vec<u8> {
    let event = ConversationCreatedEvent {
        conversation: Some(Conversation {
            conversation_id: conversation.into(),
            ..Conversation::default()
        }),
        participant_user_ids: members.iter().map(|id| id.to_string()).collect(),
    };
    encode_envelope(EventType::ConversationCreated, None, event.encode_to_vec())
}

pub(crate) fn changed(conversation: &str, user: &str, added: bool) -> Vec<u8> {
    let event = MembershipChangedEvent {
        conversation_id: conversation.into(),
        user_id: user.into(),
        added,
    };
    encode_envelope(EventType::MembershipChanged, None, event.encode_to_vec())
}
