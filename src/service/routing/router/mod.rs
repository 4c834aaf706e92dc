//! From records to sessions: one of R threads, each with some of the partitions and a ring pair to
//! every shard.
//!
//! ```text
//!  partitions ──poll──► lane ┐                                  ┌─► ring to shard 0
//!  (Kafka)              lane ├─► members → sessions → encode ───┼─► ring to shard 1
//!  other nodes ─inbox─► lane ┘   (shared)  (shared)             └─► other nodes (never waited for)
//!                                                    ◄── Done ──────
//!  committable offsets ◄── window per partition ◄── tickets
//! ```
//!
//! A *lane* keeps order: its first record is routed before its second. What cannot be routed yet
//! (members unknown, ring full) waits at the front of its lane; the other lanes go on. A lane that
//! waits takes nothing from its partition, apart from a look ahead so that unknown members are
//! asked for before their records reach the front; the partition's own bounded fetch queue then
//! fills, and the broker is asked for no more. That is the back pressure: nothing is paused
//! by call, dropped or buffered without bound.

mod core;
pub mod dead_letter;
mod in_flight;
mod lane;
mod links;
mod record;
mod thread;
mod turn;

use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::time::Duration;

use crate::counters;
use crate::handoff::{Doorbell, Pushed};
use crate::service::backends::ports::{RemoteNodes, RouterInbox, RouterInput};
use crate::service::events::encode::CompressionConfig;
use crate::service::events::envelope::{self, EventBody};
use crate::service::members::directory::Directory;
use crate::service::members::membership::Membership;
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::dead_letter::DeadLetterSink;
use crate::service::routing::router::lane::Revocation;

pub use crate::service::routing::router::lane::{Assignment, CommittableOffset, TopicPartition};
pub use crate::service::routing::router::links::ShardLink;
pub use crate::service::routing::router::record::{RawRecord, RecordSource};
pub use crate::service::routing::router::thread::Router;

/// Memory of one record that is under way beside its event, bytes. Windows grow by doubling.
pub const RECORD_UNDER_WAY_BYTES: usize = 2 * (OffsetWindow::ENTRY_BYTES + in_flight::ENTRY_BYTES);

/// Bounds and times of one router. All have defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    /// Records of one partition that may be under way (taken, not yet committable).
    pub window_records_max: usize,
    /// Records of a waiting lane that are read ahead to ask for their members.
    pub lookahead_records_max: usize,
    /// The same in bytes; one record may go beyond.
    pub lookahead_bytes_max: usize,
    /// Memory of the events on their way to sockets, in rings, shards and hub together, bytes; one
    /// may go beyond. At the bound nothing more is routed.
    pub event_bytes_max: u64,
    /// Records of one lane that are routed before the next lane has its turn.
    pub batch_max: usize,
    /// How long a record whose members cannot be had waits at the front of its lane, ms.
    pub route_retry_max_ms: u64,
    /// How long after its append a record of a conversation that nobody can be asked about waits
    /// for the creation event, which may stand in a partition that is read a little later, ms.
    pub creation_wait_ms: u64,
    /// Hand-offs to other nodes under way. More are not made, and counted.
    pub forwards_max: usize,
    /// How long a hand-off may hold up the offset of its record, ms. It never holds up a delivery.
    pub forward_deadline_ms: u64,
    /// Inputs from elsewhere than Kafka that may wait.
    pub inbox_slots: usize,
    /// Their bytes, and again those of the inputs that were taken in and wait for members; one may go
    /// beyond.
    pub inbox_bytes_max: usize,
    /// When to compress.
    pub compression: CompressionConfig,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            window_records_max: 8192,
            lookahead_records_max: 256,
            lookahead_bytes_max: 1 << 20,
            event_bytes_max: 256 << 20,
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

counters! {
    /// Counted by one router.
    pub struct RouterCounters of Counter {
        Counter records: "Records taken from partitions.",
        Counter remote_records: "Records that other nodes handed over.",
        Counter user_events: "Events that came with their recipients (presence).",
        Counter deliveries: "Events pushed to shards: one for each event and shard concerned.",
        Counter recipients: "Sessions that events were pushed for.",
        Counter records_undecodable: "Records that are not an event envelope: skipped.",
        Counter records_without_conversation: "Records that name no conversation: passed.",
        Counter records_conversation_absent: "Records of conversations that the conversation service does not know: passed.",
        Counter records_members_unknown: "Records whose members are unknown and nobody can be asked: passed.",
        Counter records_members_unavailable: "Records given up because the conversation service did not answer in time.",
        Counter records_repeated: "Partitions that went back to an offset already taken.",
        Counter remote_given_up: "Records that other nodes handed over and that could not be routed.",
        Counter dead_letters: "Records given to the dead-letter topic.",
        Counter forwards: "Records handed to the nodes of other users.",
        Counter forwards_refused: "Records not handed to other nodes because too many hand-offs were under way.",
        Counter forwards_expired: "Hand-offs to other nodes that had not ended at their deadline.",
        Counter waits_for_members: "Attempt that a lane began to wait for the members of a conversation.",
        Counter waits_for_room: "Attempt that a record found the ring to a shard full.",
        Counter waits_for_hand_offs: "Attempt that a record found too many hand-offs to other nodes under way.",
        Counter waits_for_memory: "Looks at a partition that was not read because the events under way took all their memory.",
        Gauge partitions: "Partitions that this router reads.",
        Gauge records_under_way: "Records that shards or other nodes have not yet reported done.",
        Gauge records_waiting: "Records that wait in lanes.",
        Gauge event_bytes: "Memory of the events on their way to sockets.",
    }
}

/// What a router is made of.
pub struct RouterParts {
    /// Its bounds.
    pub config: RouterConfig,
    /// What it counts.
    pub counters: Arc<RouterCounters>,
    /// The bell that shards, Kafka and everybody else wake it with.
    pub bell: Arc<Doorbell>,
    /// A ring pair with every shard, by shard number.
    pub links: Vec<ShardLink>,
    /// Who is connected.
    pub directory: Arc<Directory>,
    /// Who belongs to what.
    pub membership: Arc<Membership>,
    /// Other nodes; `None` in `broadcast` mode, where every node reads everything itself.
    pub remote: Option<Arc<dyn RemoteNodes>>,
    /// Where records go that cannot be routed; `None`: they are counted and passed.
    pub dead_letters: Option<Arc<dyn DeadLetterSink>>,
}

/// What a router is released about partitions.
enum LaneCommand {
    Assign(Assignment),
    Revoke(TopicPartition, Revocation),
    Stop,
}

/// The Kafka thread's and the application's end of one router.
#[derive(Clone)]
pub struct RouterControl {
    lanes: Sender<LaneCommand>,
    inbox: SyncSender<RouterInput>,
    /// Bytes of what waits in `inbox`.
    inbox_bytes: Arc<AtomicUsize>,
    inbox_bytes_max: usize,
    bell: Arc<Doorbell>,
}

struct ControlReceivers {
    lanes: Receiver<LaneCommand>,
    inbox: Receiver<RouterInput>,
    inbox_bytes: Arc<AtomicUsize>,
}

fn control(bell: Arc<Doorbell>, config: &RouterConfig) -> (RouterControl, ControlReceivers) {
    let (lanes_sender, lanes) = channel();
    let (inbox_sender, inbox) = sync_channel(config.inbox_slots);
    let inbox_bytes = Arc::<AtomicUsize>::default();
    let control = RouterControl {
        lanes: lanes_sender,
        inbox: inbox_sender,
        inbox_bytes: Arc::clone(&inbox_bytes),
        inbox_bytes_max: config.inbox_bytes_max,
        bell,
    };
    (control, ControlReceivers { lanes, inbox, inbox_bytes })
}

impl RouterControl {
    /// Gives the router a partition.
    pub fn assign(&self, assignment: Assignment) {
        self.command(LaneCommand::Assign(assignment));
    }

    /// Takes a partition back. The router takes nothing more from it at once, lets what is under way
    /// finish for at most `grace`, and drops its source. The receiver is released when that is so (or
    /// the router has ended), and whether all of it was finished; from then on the partition's
    /// committable does not change.
    pub fn revoke(&self, log: TopicPartition, grace: Duration) -> Receiver<bool> {
        let (done, released) = sync_channel(1);
        let deadline_ms = crate::service::events::timestamp::unix_ms() + grace.as_millis() as u64;
        self.command(LaneCommand::Revoke(log, Revocation { deadline_ms, done }));
        released
    }

    /// Ends the router's thread.
    pub fn stop(&self) {
        self.command(LaneCommand::Stop);
    }

    fn command(&self, command: LaneCommand) {
        // A router that has ended takes nothing, and whoever waits for an answer gets none.
        let _ = self.lanes.send(command);
        self.bell.ring();
    }

    /// The bell that wakes the router when a source has something.
    pub fn bell(&self) -> &Arc<Doorbell> {
        &self.bell
    }
}

/// The way into the routers from elsewhere than Kafka. Inputs about one conversation (or one user's
/// presence) go to one router, and so stay in order.
#[derive(Clone)]
pub struct RouterHandle {
    routers: Arc<[RouterControl]>,
}

impl RouterHandle {
    /// In front of all routers of the node; at least one.
    pub fn new(routers: Vec<RouterControl>) -> Self {
        assert!(!routers.is_empty());
        Self { routers: routers.into() }
    }
}

impl RouterInbox for RouterHandle {
    fn send(&self, input: RouterInput) -> Pushed<RouterInput> {
        let router = &self.routers[order_of(&input) % self.routers.len()];
        let bytes = input.bytes();
        // Counted first: whoever takes it out subtracts at once.
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

/// Inputs of equal number are routed in the order they came.
fn order_of(input: &RouterInput) -> usize {
    static HASHER: std::sync::LazyLock<std::hash::RandomState> =
        std::sync::LazyLock::new(std::hash::RandomState::new);
    let (RouterInput::Remote { value } | RouterInput::ToUsers { value, .. }) = input;
    // What cannot be decoded is counted by whichever router gets it.
    let subject = envelope::decode(value).ok().and_then(|record| match record.body {
        EventBody::PresenceUpdated { user } => Some(user),
        _ => record.conversation(),
    });
    HASHER.hash_one(subject.unwrap_or_default()) as usize
}

#[cfg(test)]
pub(crate) mod tests;
