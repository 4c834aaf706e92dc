//! The router: turns records into deliveries. A node has R router threads; each has some of the
//! partitions, and a ring pair to every shard.
//!
//! ```text
//!  partitions ──poll──► lane ┐                                  ┌─► ring to shard 0
//!  (Kafka)              lane ├─► members → sessions → encode ───┼─► ring to shard 1
//!  other nodes ─inbox─► lane ┘   (shared)  (shared)             └─► other nodes
//!                                                    ◄── Done ──────
//!  committable offsets ◄── window per partition ◄── tickets in flight
//! ```
//!
//! A *lane* keeps records in order. A record whose members are unknown is *parked*: it and the later records of its
//! conversation wait, and the rest of the partition goes on. A record that cannot be routed for another reason (ring
//! full) blocks its lane and no other. A blocked lane, and one with as many parked records as it may have, takes no
//! more records from its partition. The partition's bounded fetch queue then fills, and librdkafka fetches no more.
//! This is the back pressure: no record is dropped, and no buffer is unbounded.

mod answers;
mod audience;
mod claim;
mod core;
pub mod dead_letter;
mod delivering;
mod giving_up;
pub mod holding;
mod in_flight;
mod lane;
mod lane_tail;
mod links;
pub mod owner;
mod parked;
mod partition;
mod record;
mod replay;
mod replay_pass;
mod replay_requests;
mod replays_elsewhere;
mod replays_here;
mod returning;
mod shard_positions;
mod thread;
mod turn;
mod unready;

use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::time::Duration;

use crate::counters;
use crate::domain::budget::EventBudget;
use crate::handoff::{Doorbell, PeerEnd, Pushed};
use crate::service::backends::ports::{RemoteNodes, RouterInbox, RouterInput};
use crate::service::cluster::ports::ArrivedHandOffs;
use crate::service::cluster::tail::TailBudget;
use crate::service::events::encode::CompressionConfig;
use crate::service::events::envelope::{self, EventBody};
use crate::service::members::directory::Directory;
use crate::service::members::membership::Membership;
use crate::service::members::user_lists::UserLists;
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::dead_letter::DeadLetterSink;
use crate::service::routing::router::holding::{HandOffInput, ReadTo};
use crate::service::routing::router::lane::Revocation;
use crate::service::routing::router::owner::ClusterParts;
use crate::service::routing::router::returning::ReplayInput;
use crate::service::runtime::clock::steady_ms;

pub use crate::service::routing::router::answers::ReplayAnswers;
pub use crate::service::routing::router::claim::Ownership;
pub use crate::service::routing::router::lane::Assignment;
pub use crate::service::routing::router::lane_tail::TailFill;
pub use crate::service::routing::router::partition::{
    CommittableOffset, CommittableTable, TopicPartition,
};
pub use crate::service::routing::router::record::{RawRecord, RecordSource};
pub use crate::service::routing::router::replay_requests::ReplayChunkMax;
pub use crate::service::routing::router::replays_elsewhere::GroupReplays;
pub use crate::service::routing::router::replays_here::RouterReplays;
pub use crate::service::routing::router::thread::Router;

/// Memory of one record in flight besides its event, bytes. Twice the entries, because the tables
/// grow by doubling.
pub const RECORD_UNDER_WAY_BYTES: usize = 2 * (OffsetWindow::ENTRY_BYTES + in_flight::ENTRY_BYTES);

/// Bounds and times of one router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    /// Records of one partition that are taken and not yet committable.
    pub window_records_max: usize,
    /// Records of one partition that may be parked, until their members are known.
    pub parked_records_max: usize,
    /// The same in bytes; one record may exceed it.
    pub parked_bytes_max: usize,
    /// Records of one conversation that may be parked. Beyond it the oldest is given up, so that one conversation does
    /// not use what all of its partition share.
    pub parked_of_conversation_max: usize,
    /// Members from which on the connected members of a conversation are cached.
    pub large_members: usize,
    /// Memory of these caches, bytes.
    pub audience_bytes_max: usize,
    /// Records of one lane that are routed before the next lane is served.
    pub batch_max: usize,
    /// How long a record waits while its members cannot be fetched, ms.
    pub route_retry_max_ms: u64,
    /// Without a conversation service: how long after its append a record of an unknown conversation
    /// waits for the creation event, which may arrive later on another partition, ms.
    pub creation_wait_ms: u64,
    /// Hand-offs to other nodes in flight. Beyond it they are refused and counted.
    pub forwards_max: usize,
    /// How long a hand-off may hold back the offset of its record, ms. It never delays a delivery.
    pub forward_deadline_ms: u64,
    /// Inputs from other nodes and from presence that may wait in the inbox. The same bounds apply to
    /// hand-offs through the log.
    pub inbox_slots: usize,
    /// Their bytes. The same bound applies once more to inputs that wait in lanes for members. One
    /// input may exceed it.
    pub inbox_bytes_max: usize,
    /// When to compress.
    pub compression: CompressionConfig,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            window_records_max: 8192,
            parked_records_max: 1_024,
            parked_bytes_max: 1 << 20,
            parked_of_conversation_max: 256,
            large_members: 512,
            audience_bytes_max: 128 << 20,
            batch_max: 128,
            route_retry_max_ms: 30_000,
            creation_wait_ms: 2_000,
            forwards_max: 8192,
            forward_deadline_ms: 5_000,
            inbox_slots: 4096,
            inbox_bytes_max: 32 << 20,
            compression: CompressionConfig::default(),
        }
    }
}

/// Shortest time between two warnings about records; the counters count every one.
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

counters! {
    /// Metrics of one router.
    pub struct RouterCounters of Counter {
        Counter records: "Records taken from partitions.",
        Counter remote_records: "Records that other nodes handed off to this node.",
        Counter user_events: "Events with a given list of recipients (presence).",
        Counter deliveries: "Events pushed to shards, once per event and shard.",
        Counter recipients: "Recipients of the events pushed to shards.",
        Counter records_undecodable: "Records skipped because they are not an event envelope.",
        Counter records_without_conversation: "Records skipped because they name no conversation.",
        Counter records_conversation_absent: "Records skipped because the conversation service reports that their conversation does not exist.",
        Counter records_members_unknown: "Records skipped because their members are unknown and no conversation service is configured.",
        Counter records_members_unavailable: "Records skipped because their members were not known in time: the conversation service did not return them, or the membership changes before the record were not read.",
        Counter events_reduced: "Events that JSON or DeliveryEvent cannot hold as they are: JSON clients got the payload as base64, gRPC clients only its position.",
        Counter records_repeated: "Times that a partition went back to an earlier offset.",
        Counter remote_given_up: "Records from other nodes that could not be routed.",
        Counter dead_letters: "Records sent to the dead-letter topic.",
        Counter forwards: "Records handed off to other nodes.",
        Counter forwards_refused: "Hand-offs to other nodes refused because too many were in flight.",
        Counter forwards_expired: "Hand-offs to other nodes that were not finished at their deadline.",
        Counter hand_offs: "Records handed over to another node through the log, once per record and node.",
        Counter hand_offs_too_large: "Records too large to be handed over: the sessions that need them are closed with 4409.",
        Counter hand_offs_received: "Hand-offs received through the log.",
        Counter hand_offs_late: "Hand-offs of a former owner, and records of a lane that has lost its partition: discarded.",
        Counter hand_offs_unreadable: "Hand-offs that could not be read: of a topic that this node does not know, or undecodable.",
        Counter replays: "Records replayed from the tail to sessions that had just begun.",
        Counter cursor_replays: "Records replayed from the tail to sessions that returned with a cursor.",
        Counter replay_passes: "Passes over the tails for sessions that returned with a cursor. One pass serves all that wait.",
        Gauge sessions_replaying: "Sessions that wait for records from the tails.",
        Counter gaps: "Sessions for which the tail did not reach back far enough: closed with 4409.",
        Gauge tail_records: "Records in the tails.",
        Gauge audiences: "Large conversations whose connected members are cached.",
        Gauge audience_bytes: "Memory of the connected members of large conversations and of their lists of members, bytes.",
        Counter audience_look_ups: "Times that every member of a large conversation was looked up, to cache those that are connected.",
        Counter audience_evictions: "Large conversations whose connected members were evicted to stay within the memory bound.",
        Counter waits_for_members: "Records that had to wait because their members were unknown.",
        Gauge conversations_waiting: "Conversations whose records wait for their members, while the rest of their partition goes on.",
        Counter records_not_awaited: "Records whose offset does not wait any more until all sockets have taken them, because they would hold up their partition.",
        Counter waits_for_room: "Times that a lane was blocked because the ring to a shard was full.",
        Counter waits_for_hand_offs: "Times that a lane was blocked because the queue to other nodes was full.",
        Counter waits_for_memory: "Times that a lane was not served because the events in flight used all their memory.",
        Gauge partitions: "Partitions that this router reads.",
        Gauge partitions_held_back: "Partitions whose records wait because this node is behind: with the hand-offs to it, or with the table of sessions.",
        Gauge records_under_way: "Records in flight: not yet reported done by shards or other nodes.",
        Gauge records_waiting: "Records waiting in lanes.",
    }
}

/// Dependencies of a router.
pub struct RouterParts {
    /// Bounds and times.
    pub config: RouterConfig,
    /// Metrics.
    pub counters: Arc<RouterCounters>,
    /// Memory of the live events in rings, shards and the gRPC hub together. At its bound the routers stop routing.
    pub budget: Arc<EventBudget>,
    /// The doorbell that wakes the router.
    pub bell: Arc<Doorbell>,
    /// A ring pair with every shard, indexed by shard number.
    pub links: Vec<PeerEnd>,
    /// The sessions of this node.
    pub directory: Arc<Directory>,
    /// The members of conversations.
    pub membership: Arc<Membership>,
    /// The conversations of users who return. `None`: the members of each conversation are requested instead.
    pub user_lists: Option<Arc<UserLists>>,
    /// Other nodes that are reached through Redis. `None` in `broadcast` mode, where every node reads every
    /// partition.
    pub remote: Option<Arc<dyn RemoteNodes>>,
    /// Hand-off through the log. `remote` are then the nodes without it.
    pub cluster: Option<ClusterParts>,
    /// Bounds of the tails. `None`: this node keeps none.
    pub tails: Option<Arc<TailBudget>>,
    /// Where unroutable records go. `None`: they are counted and skipped.
    pub dead_letters: Option<Arc<dyn DeadLetterSink>>,
}

/// Commands to a router.
enum LaneCommand {
    Assign(Assignment),
    Revoke(TopicPartition, Revocation),
    /// Take the hand-offs to this node from here.
    TakeHandOffs(Arc<dyn ArrivedHandOffs>),
    Stop,
}

/// Controls one router: its partitions, its inbox and its thread's end.
#[derive(Clone)]
pub struct RouterControl {
    lanes: Sender<LaneCommand>,
    hand_offs: SyncSender<HandOffInput>,
    /// Bytes waiting in `hand_offs`.
    hand_off_bytes: Arc<AtomicUsize>,
    read_to: Arc<ReadTo>,
    replays: Sender<ReplayInput>,
    inbox: SyncSender<RouterInput>,
    /// Bytes waiting in `inbox`.
    inbox_bytes: Arc<AtomicUsize>,
    inbox_bytes_max: usize,
    bell: Arc<Doorbell>,
}

struct ControlReceivers {
    lanes: Receiver<LaneCommand>,
    hand_offs: Receiver<HandOffInput>,
    hand_off_bytes: Arc<AtomicUsize>,
    read_to: Arc<ReadTo>,
    inbox: Receiver<RouterInput>,
    inbox_bytes: Arc<AtomicUsize>,
    replays: Receiver<ReplayInput>,
}

fn control(bell: Arc<Doorbell>, config: &RouterConfig) -> (RouterControl, ControlReceivers) {
    let (lanes_sender, lanes) = channel();
    let (inbox_sender, inbox) = sync_channel(config.inbox_slots);
    let (replays_sender, replays) = channel();
    let (hand_offs_sender, hand_offs) = sync_channel(config.inbox_slots);
    let (inbox_bytes, hand_off_bytes) = (Arc::<AtomicUsize>::default(), Arc::default());
    let read_to = Arc::<ReadTo>::default();
    let control = RouterControl {
        lanes: lanes_sender,
        hand_offs: hand_offs_sender,
        hand_off_bytes: Arc::clone(&hand_off_bytes),
        read_to: Arc::clone(&read_to),
        replays: replays_sender,
        inbox: inbox_sender,
        inbox_bytes: Arc::clone(&inbox_bytes),
        inbox_bytes_max: config.inbox_bytes_max,
        bell,
    };
    let receivers =
        ControlReceivers { lanes, hand_offs, hand_off_bytes, read_to, inbox, inbox_bytes, replays };
    (control, receivers)
}

impl RouterControl {
    /// Assigns a partition to the router.
    pub fn assign(&self, assignment: Assignment) {
        self.command(LaneCommand::Assign(assignment));
    }

    /// Revokes a partition. The router takes no more of its records, waits at most `grace` for those
    /// in flight, and a second for those that only sockets have not taken, and drops the source. The receiver then gets
    /// whether the next owner need not repeat any; it is disconnected if the router has ended. After that the
    /// partition's committable offset does not change.
    pub fn revoke(&self, log: TopicPartition, grace: Duration) -> Receiver<bool> {
        let (sender, released) = sync_channel(1);
        let since_ms = steady_ms();
        let deadline_ms = since_ms + grace.as_millis() as u64;
        let revocation = Revocation { since_ms, deadline_ms, released: sender };
        self.command(LaneCommand::Revoke(log, revocation));
        released
    }

    /// The router takes the hand-offs to this node from `log` whenever the doorbell that this returns is rung.
    fn take_hand_offs(&self, log: Arc<dyn ArrivedHandOffs>) -> Arc<Doorbell> {
        self.command(LaneCommand::TakeHandOffs(log));
        Arc::clone(&self.bell)
    }

    /// Asks for a part of a replay. If the router has ended, the answer is never given.
    fn replay(&self, input: ReplayInput) {
        let _ = self.replays.send(input);
        self.bell.ring();
    }

    /// Ends the router's thread.
    pub fn stop(&self) {
        self.command(LaneCommand::Stop);
    }

    fn command(&self, command: LaneCommand) {
        // If the router has ended, the command is dropped, and with it the sender of any answer.
        let _ = self.lanes.send(command);
        self.bell.ring();
    }

    /// The doorbell that sources ring when a record arrives.
    pub fn bell(&self) -> &Arc<Doorbell> {
        &self.bell
    }
}

/// The routers' inboxes, for inputs from other nodes and from presence. Inputs about one conversation
/// (or one user's presence) go to the same router and so stay in order.
#[derive(Clone)]
pub struct RouterHandle {
    routers: Arc<[RouterControl]>,
}

impl RouterHandle {
    /// The inboxes of all routers of the node, at least one.
    pub fn new(routers: Vec<RouterControl>) -> Self {
        assert!(!routers.is_empty());
        Self { routers: routers.into() }
    }
}

impl RouterInbox for RouterHandle {
    fn send(&self, input: RouterInput) -> Pushed<RouterInput> {
        let router = &self.routers[order_of(&input) % self.routers.len()];
        let bytes = input.bytes();
        // Counted before sending, because the router may subtract immediately.
        let waiting = router.inbox_bytes.fetch_add(bytes, Ordering::Relaxed);
        if waiting > 0 && waiting + bytes > router.inbox_bytes_max {
            router.inbox_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Pushed::Full(input);
        }
        let sent = router.inbox.try_send(input);
        if sent.is_err() {
            router.inbox_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        match sent {
            Ok(()) => {
                router.bell.ring();
                Pushed::Accepted
            }
            Err(TrySendError::Full(input)) => Pushed::Full(input),
            Err(TrySendError::Disconnected(input)) => Pushed::Closed(input),
        }
    }
}

/// Hash of the conversation or user. Inputs with the same hash are routed in order.
fn order_of(input: &RouterInput) -> usize {
    static HASHER: std::sync::LazyLock<std::hash::RandomState> =
        std::sync::LazyLock::new(std::hash::RandomState::new);
    let (RouterInput::Remote { value } | RouterInput::ToUsers { value, .. }) = input;
    // An undecodable input may go to any router, which counts it.
    let subject = envelope::decode(value).ok().and_then(|record| match record.body {
        EventBody::PresenceUpdated { user } => Some(user),
        _ => record.conversation(),
    });
    HASHER.hash_one(subject.unwrap_or_default()) as usize
}

#[cfg(test)]
pub(crate) mod tests;
