//! What a cluster costs, computed: what its nodes write and read, in `group` mode through the log and in `broadcast`
//! mode. `delivery sizing` prints it, `docs/sizing.md` explains it.
//!
//! The bytes are those of our encoders (`records`), the number of hand-offs follows from how members spread over
//! nodes (`spread`), and the rates from constants of the code. The simulation runs the real code and compares
//! (`routing::simulation::calm`).
//!
//! Averages in calm weather: no node starts, dies or falls behind. Not included: commits of offsets (one request per
//! node and second), the janitor, and everything that costs the same in both modes (deliveries to clients, calls of
//! other services).

mod compare;
mod records;
mod spread;
mod table;
mod unit_costs;

use std::ops::{Add, AddAssign, Mul};

use crate::service::cluster::newcomers::NEWCOMERS_MAX;
use crate::service::cluster::nodes::RENEWAL_MS;
use crate::service::routing::kafka::{MESSAGE_BYTES_MAX, SESSIONS_LINGER_MS};
use crate::service::routing::router::owner::PASSED_INTERVAL_MS;

pub use compare::{BrokerCosts, NODES_COMPARED_MAX, Turning};
pub use spread::{MemberSessions, named_users, nodes_beside, other_nodes};
pub use table::{SessionsTopic, TopicRecords, table_bytes};
pub use unit_costs::UnitCosts;

/// Conversations of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConversationSize {
    /// Members of each.
    pub members: f64,
    /// Their share of the records. The shares are relative to their sum.
    pub share: f64,
}

/// What a cluster has to carry.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterLoad {
    /// Nodes.
    pub nodes: f64,
    /// Users who have a session.
    pub users: f64,
    /// Sessions of the members of conversations.
    pub sessions: MemberSessions,
    /// Records of the topics of events per second.
    pub records: f64,
    /// Bytes of the value of such a record.
    pub value_bytes: usize,
    /// The share of the records that are in membership topics, which every node reads in both modes.
    pub membership_share: f64,
    /// Sizes of the conversations to which the records belong.
    pub conversations: Vec<ConversationSize>,
    /// Sessions that begin per second. As many end.
    pub connects: f64,
    /// Partitions of the topics of events, all together.
    pub partitions: f64,
    /// Partitions of the hand-off topic.
    pub hand_off_partitions: f64,
    /// Routers of a node.
    pub routers: f64,
    /// Replication factor of all topics.
    pub replication: f64,
    /// What the sessions topic keeps.
    pub sessions_topic: SessionsTopic,
    /// `TAIL_AGE`, s.
    pub tail_age_s: f64,
    /// Time until all nodes have applied a record of the sessions topic, s.
    pub lag_s: f64,
    /// What single operations cost.
    pub unit_costs: UnitCosts,
}

/// Records and bytes per second. The bytes are those in Kafka before compression, batches included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RecordFlow {
    /// Records per second.
    pub records: f64,
    /// Bytes per second.
    pub bytes: f64,
}

impl RecordFlow {
    /// `records` per second of `bytes` each, of which `together` are in a batch.
    fn new(records: f64, bytes: f64, together: f64) -> Self {
        Self { records, bytes: records * (bytes + records::BATCH_BYTES / together) }
    }
}

impl Add for RecordFlow {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { records: self.records + other.records, bytes: self.bytes + other.bytes }
    }
}

impl AddAssign for RecordFlow {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Mul<f64> for RecordFlow {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { records: self.records * factor, bytes: self.bytes * factor }
    }
}

/// Records of conversations of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SizeCosts {
    /// The size.
    pub size: ConversationSize,
    /// Hand-offs of one record.
    pub hand_offs: f64,
    /// Users that each of them names.
    pub named: f64,
    /// Bytes of each of them, without the batch.
    pub bytes: f64,
    /// Whether it is larger than a hand-off may be: sessions are closed with 4409 instead.
    pub is_too_large: bool,
}

/// Costs of the hand-off through the log. Those that are written are of the whole cluster, those that are read of
/// one node.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupCosts {
    /// By size of the conversation.
    pub sizes: Vec<SizeCosts>,
    /// Written: records for users on other nodes.
    pub live: RecordFlow,
    /// Written: replays to sessions that began.
    pub replays: RecordFlow,
    /// Written: what tells nodes what has passed.
    pub passed: RecordFlow,
    /// Written: beginnings of sessions.
    pub begun: RecordFlow,
    /// Written: ends of sessions.
    pub ended: RecordFlow,
    /// Written: leases.
    pub leases: RecordFlow,
    /// Read by a node: its partitions.
    pub read_source: RecordFlow,
    /// Read by a node: hand-offs to it.
    pub read_own: RecordFlow,
    /// Read by a node: hand-offs to others in its partition.
    pub read_foreign: RecordFlow,
    /// Read by a node: the sessions topic.
    pub read_sessions: RecordFlow,
    /// CPU of a node for all this, cores.
    pub cpu: f64,
}

impl GroupCosts {
    /// Hand-offs that the cluster writes.
    pub fn hand_offs(&self) -> RecordFlow {
        self.live + self.replays + self.passed
    }

    /// Records of the sessions topic that the cluster writes.
    pub fn sessions(&self) -> RecordFlow {
        self.begun + self.ended + self.leases
    }

    /// What a node reads.
    pub fn read(&self) -> RecordFlow {
        self.read_source + self.read_own + self.read_foreign + self.read_sessions
    }
}

/// Costs of `broadcast` mode, of one node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BroadcastCosts {
    /// Read: all partitions.
    pub read: RecordFlow,
    /// CPU for it, cores.
    pub cpu: f64,
}

/// Memory of a node, bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryCosts {
    /// The table of sessions.
    pub table: f64,
    /// The tails, if `TAIL_BYTES` allows it.
    pub tails: f64,
    /// How long beginnings are kept for owners: `TAIL_AGE`, or less because only so many are kept, s.
    pub newcomers_s: f64,
}

/// Average number of records in a batch, for records that arrive at `rate` per second at a producer that waits
/// for `linger_ms` after the first.
fn together(rate: f64, linger_ms: u64) -> f64 {
    1.0 + rate * linger_ms as f64 / 1_000.0
}

impl ClusterLoad {
    /// Costs of the hand-off through the log.
    pub fn group(&self) -> GroupCosts {
        let nodes = self.nodes;
        let sizes = self.sizes();
        let rates: Vec<f64> = sizes.iter().map(|it| self.rate_of(it.size) * it.hand_offs).collect();
        let replays = self.replays();
        let passed = self.passed();
        // None waits for another, and a batch is for one partition. Only above some thousand hand-offs per second
        // and node do several collect while the requests before them are in flight.
        let in_batch = 1.0;
        let mut live = RecordFlow::default();
        for (rate, size) in rates.iter().zip(&sizes) {
            live += RecordFlow::new(*rate, size.bytes, in_batch);
        }
        let owned_by_router = self.partitions / nodes / self.routers;
        let replays = RecordFlow::new(replays, records::replay(self.value_bytes), in_batch);
        let passed = RecordFlow::new(passed, records::passed(owned_by_router), in_batch);
        let leases = nodes * 1_000.0 / RENEWAL_MS as f64;
        let changes = 2.0 * self.connects + leases;
        let with = together(changes / nodes, SESSIONS_LINGER_MS);
        let hand_offs = live + replays + passed;
        let mut costs = GroupCosts {
            live,
            replays,
            passed,
            begun: RecordFlow::new(self.connects, records::begun(), with),
            ended: RecordFlow::new(self.connects, records::ended(), with),
            leases: RecordFlow::new(leases, records::lease(self.partitions / nodes), with),
            read_source: self.source() * (1.0 / nodes),
            read_own: hand_offs * (1.0 / nodes),
            read_foreign: hand_offs * (nodes_beside(nodes, self.hand_off_partitions) / nodes),
            read_sessions: RecordFlow::default(),
            cpu: 0.0,
            sizes,
        };
        costs.read_sessions = costs.sessions();
        costs.cpu = self.unit_costs.group(self, &costs);
        costs
    }

    /// Costs of `broadcast` mode.
    pub fn broadcast(&self) -> BroadcastCosts {
        BroadcastCosts { read: self.source(), cpu: self.unit_costs.broadcast(self) }
    }

    /// What a node reads for its membership cache, in both modes.
    pub fn membership(&self) -> RecordFlow {
        self.source() * self.membership_share
    }

    /// Memory of a node.
    pub fn memory(&self) -> MemoryCosts {
        let source = self.source();
        let kept = NEWCOMERS_MAX as f64 / self.connects.max(f64::MIN_POSITIVE);
        MemoryCosts {
            table: table_bytes(self.sessions_online()),
            tails: source.bytes / self.nodes * self.tail_age_s,
            newcomers_s: kept.min(self.tail_age_s),
        }
    }

    /// Sessions of all users.
    pub fn sessions_online(&self) -> f64 {
        self.users * self.sessions.devices
    }

    /// Members of the conversation of a record, on average.
    pub fn members(&self) -> f64 {
        self.conversations.iter().map(|it| self.share_of(*it) * it.members).sum()
    }

    /// The share of the records that belong to conversations of this size.
    fn share_of(&self, size: ConversationSize) -> f64 {
        size.share / self.conversations.iter().map(|it| it.share).sum::<f64>()
    }

    fn rate_of(&self, size: ConversationSize) -> f64 {
        self.records * self.share_of(size)
    }

    /// All records of the topics of events. Their batches are those of their producers, and not counted.
    fn source(&self) -> RecordFlow {
        RecordFlow {
            records: self.records,
            bytes: self.records * records::source(self.value_bytes),
        }
    }

    fn sizes(&self) -> Vec<SizeCosts> {
        let sizes = self.conversations.iter().map(|size| {
            let hand_offs = other_nodes(self.nodes, size.members, self.sessions);
            let all_named = named_users(self.nodes, size.members, self.sessions);
            let named = if hand_offs > 0.0 { all_named / hand_offs } else { 0.0 };
            let bytes = records::live(self.value_bytes, named);
            let is_too_large = bytes > MESSAGE_BYTES_MAX as f64;
            SizeCosts { size: *size, hand_offs, named, bytes, is_too_large }
        });
        sizes.collect()
    }

    /// Replays per second: to a session that begins, the records of its user since the last lease of the owner
    /// that its node had read, up to the time when the owner knows of the session. A lease is half a renewal old.
    fn replays(&self) -> f64 {
        let window_s = RENEWAL_MS as f64 / 2_000.0 + 2.0 * self.lag_s;
        self.connects * self.records_of_a_user() * window_s * (1.0 - 1.0 / self.nodes)
    }

    /// Records per second that concern a user who is online.
    pub fn records_of_a_user(&self) -> f64 {
        self.records * self.members() * self.sessions.online / self.users
    }

    /// Each router that has partitions tells each other node on which sessions have begun, at most once in an
    /// interval.
    fn passed(&self) -> f64 {
        let interval_s = PASSED_INTERVAL_MS as f64 / 1_000.0;
        let routers = (self.nodes * self.routers).min(self.partitions);
        let begun_on_a_node = self.connects / self.nodes * interval_s;
        let owed = (self.nodes - 1.0) * (1.0 - (-begun_on_a_node).exp());
        routers * owed / interval_s
    }
}

#[cfg(test)]
mod tests;
