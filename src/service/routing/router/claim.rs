//! A claimed partition, as its lane keeps it.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use crate::service::cluster::holder::{RoutedPosition, SessionSerial, SourcePartition};
use crate::service::routing::router::RouterCounters;
use crate::service::routing::router::partition::{CommittableTable, TopicPartition};

/// How long the records of a partition wait for its new owner before that is logged, ms.
const HELD_BACK_WARNING_MS: u64 = 10_000;

/// The ownership of a partition.
#[derive(Clone, Debug)]
pub struct Ownership {
    /// Grows with each owner.
    pub generation: i64,
    /// The first offset to route. Earlier records of the source only fill the tail.
    pub start: i64,
    /// Beginnings below this offset of the sessions topic are applied.
    pub table: i64,
    /// Hand-offs to this node below this offset have to be delivered before a record is routed.
    pub barrier: i64,
    /// Beginnings below this offset are applied, and their replays are stored. Written by the router, read
    /// by the Kafka thread for its commits.
    pub settled: Arc<CommittableTable>,
    /// The next offset to route. Written by the router, read for the lease.
    pub routed: Arc<AtomicI64>,
    /// If records are gone that nobody has read: the first of them. Above `start`: the log has lost its last records.
    /// The sessions of this node are closed already. What the other nodes are told is stored before the first record is
    /// routed, and only then the partition has a committable offset.
    pub lost_from: Option<i64>,
}

/// The position of a record that a lane routes.
#[derive(Clone, Copy, Debug)]
pub(super) struct LanePosition {
    pub(super) at: RoutedPosition,
    /// Sessions of this node that were admitted later are newer than the lane.
    pub(super) direct_after: SessionSerial,
}

/// A claim, as a lane keeps it.
pub(super) struct LaneClaim {
    pub(super) ownership: Ownership,
    /// Beginnings below this offset are applied.
    pub(super) applied: i64,
    /// Replays that are not stored yet.
    pub(super) replays: usize,
    /// Nodes that were told of lost records, if that is not stored yet.
    pub(super) losses: usize,
    /// Where the replay to a newcomer continues, which found no room: the offset of its beginning, and the
    /// first offset that was not replayed to it.
    pub(super) paused_replay: Option<(i64, i64)>,
    /// The newcomer whose replay is blocked, by the offset of its beginning, and since when, steady time in ms.
    blocked_newcomer: Option<(i64, u64)>,
    /// Sessions of this node that were admitted later are newer than the lane.
    pub(super) direct_after: SessionSerial,
    held_back: Option<HeldBack>,
    /// The offsets of the parked records, ascending.
    parked: Vec<i64>,
}

/// Records of a partition are not routed yet. Counted while it exists.
struct HeldBack {
    /// Steady time, ms.
    since_ms: u64,
    is_warned: bool,
    counters: Arc<RouterCounters>,
}

impl Drop for HeldBack {
    fn drop(&mut self) {
        self.counters.partitions_held_back.sub(1);
    }
}

impl LaneClaim {
    pub(super) fn new(ownership: Ownership, direct_after: SessionSerial) -> Self {
        Self {
            direct_after,
            applied: ownership.table,
            replays: 0,
            losses: 0,
            paused_replay: None,
            blocked_newcomer: None,
            held_back: None,
            parked: Vec::new(),
            ownership,
        }
    }

    /// Whether everything that was handed over to this node before it became the owner is delivered.
    pub(super) fn has_barrier_behind(&self, handed_to: i64) -> bool {
        handed_to >= self.ownership.barrier
    }

    /// Whether records may be routed: everything that was handed over to this node before it became the owner
    /// is delivered, and its table has what the former owner had applied. (A table that is read again is
    /// behind for a while.)
    pub(super) fn may_route(&self, handed_to: i64, read_to: i64) -> bool {
        self.has_barrier_behind(handed_to) && read_to >= self.applied
    }

    /// [`LaneClaim::may_route`], shown by a metric, and in the log if it lasts.
    pub(super) fn may_take(
        &mut self,
        log: &TopicPartition,
        (handed_to, read_to): (i64, i64),
        now_ms: u64,
        counters: &Arc<RouterCounters>,
    ) -> bool {
        if self.may_route(handed_to, read_to) {
            self.held_back = None;
            return true;
        }
        let held = self.held_back.get_or_insert_with(|| {
            counters.partitions_held_back.add(1);
            HeldBack { since_ms: now_ms, is_warned: false, counters: Arc::clone(counters) }
        });
        if !held.is_warned && now_ms >= held.since_ms + HELD_BACK_WARNING_MS {
            held.is_warned = true;
            let (barrier, applied) = (self.ownership.barrier, self.applied);
            tracing::warn!(
                topic = &*log.topic,
                partition = log.partition,
                "records wait, because this node is behind: hand-offs to it are delivered to {handed_to} of \
                 {barrier}, the sessions topic is read to {read_to} of {applied}"
            );
        }
        false
    }

    /// The offsets of the parked records, ascending: what is routed meanwhile goes past them.
    pub(super) fn parked(&self) -> &[i64] {
        &self.parked
    }

    pub(super) fn park(&mut self, offset: i64) {
        if let Err(index) = self.parked.binary_search(&offset) {
            self.parked.insert(index, offset);
        }
    }

    pub(super) fn unpark(&mut self, offset: i64) {
        if let Ok(index) = self.parked.binary_search(&offset) {
            self.parked.remove(index);
        }
    }

    /// Whether the other nodes have to be told first that records are gone, or what they are told is not stored yet.
    pub(super) fn owes_loss(&self) -> bool {
        self.ownership.lost_from.is_some() || self.losses > 0
    }

    /// What one other node is told is stored. Returns whether that was the last.
    pub(super) fn loss_stored(&mut self) -> bool {
        self.losses -= 1;
        !self.owes_loss()
    }

    pub(super) fn replay_stored(&mut self) {
        self.replays -= 1;
        self.settle();
    }

    /// Since when the replays to the session that began at `begin` are blocked, steady time in ms.
    pub(super) fn blocked_since(&mut self, begin: i64, now_ms: u64) -> u64 {
        let blocked = self.blocked_newcomer.filter(|(blocked, _)| *blocked == begin);
        self.blocked_newcomer.replace(blocked.unwrap_or((begin, now_ms)));
        blocked.map_or(now_ms, |(_, since_ms)| since_ms)
    }

    /// States that beginnings below `applied` are applied.
    pub(super) fn apply(&mut self, applied: i64) {
        self.applied = applied;
        self.paused_replay = self.paused_replay.filter(|(begin, _)| *begin >= applied);
        self.settle();
    }

    fn settle(&self) {
        if self.replays == 0 {
            self.ownership.settled.set(self.applied);
        }
    }

    /// The position of a record that is routed now.
    pub(super) fn at(&self, log: &TopicPartition, offset: i64) -> RoutedPosition {
        RoutedPosition {
            source: source_of(log),
            offset,
            generation: self.ownership.generation,
            table: self.applied,
        }
    }

    /// The position of a record that is routed now, and what holds for the sessions of this node.
    pub(super) fn routes(&self, log: &TopicPartition, offset: i64) -> LanePosition {
        LanePosition { at: self.at(log, offset), direct_after: self.direct_after }
    }
}

pub(super) fn source_of(log: &TopicPartition) -> SourcePartition {
    SourcePartition { topic: log.topic_index, partition: log.partition }
}
