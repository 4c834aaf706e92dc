//! Lanes: queues of records that must be routed in order. Each partition has one; records from other
//! nodes share a few. In a partition, records of one conversation stay in order; one whose members are not known is
//! parked, and the others go on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use crate::domain::ids::ShardId;
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::claim::{LaneClaim, Ownership};
use crate::service::routing::router::in_flight::LaneKey;
use crate::service::routing::router::lane_tail::{LaneTail, TailFill};
use crate::service::routing::router::parked::ParkedRecords;
use crate::service::routing::router::partition::{CommittableOffset, TopicPartition};
use crate::service::routing::router::record::{RawRecord, RecordSource, WaitingRecord};

/// Assigns a partition to a router.
pub struct Assignment {
    /// The partition.
    pub log: TopicPartition,
    /// Its records.
    pub source: Box<dyn RecordSource>,
    /// The first offset to route, if it is known.
    pub start: Option<i64>,
    /// How the tail is filled before. `None`: `source` begins at `start`.
    pub fill: Option<TailFill>,
    /// Updated by the router.
    pub committable: Arc<CommittableOffset>,
    /// The ownership, if hand-offs go through the log.
    pub ownership: Option<Ownership>,
}

impl std::fmt::Debug for Assignment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assignment").field("log", &self.log).finish_non_exhaustive()
    }
}

/// What blocks the record at the front of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// The members are not known yet. (Only records from other nodes wait for them in a lane.)
    Members,
    /// The ring to this shard is full.
    RingFull(ShardId),
    /// The queue to the other nodes is full.
    HandOffs,
    /// The dead-letter sink is full.
    DeadLetter,
}

/// The partition of a lane.
pub(super) struct PartitionLane {
    pub(super) log: TopicPartition,
    pub(super) source: Box<dyn RecordSource>,
    pub(super) window: OffsetWindow,
    pub(super) committable: Arc<CommittableOffset>,
    pub(super) revocation: Option<Revocation>,
    pub(super) claim: Option<LaneClaim>,
    /// `None`: this node keeps none.
    pub(super) tail: Option<LaneTail>,
}

/// An order to release a partition: the lane takes no more records and is removed once all its
/// records are done or the deadline has passed.
#[derive(Debug)]
pub(super) struct Revocation {
    /// Steady time, ms.
    pub(super) since_ms: u64,
    /// Steady time, ms.
    pub(super) deadline_ms: u64,
    /// Receives whether all records were done.
    pub(super) released: SyncSender<bool>,
}

impl PartitionLane {
    /// Whether the next record may be taken.
    pub(super) fn may_take(&self) -> bool {
        self.revocation.is_none() && self.window.has_room()
    }
}

/// A queue of records that are routed in order.
pub(super) struct Lane {
    pub(super) key: LaneKey,
    /// `None`: records from other nodes and from presence.
    pub(super) partition: Option<PartitionLane>,
    /// What blocks the front record; `None`: nothing known.
    pub(super) blocked: Option<Blocked>,
    queue: VecDeque<WaitingRecord>,
    bytes: usize,
    /// Records of the partition that left the queue, because their members are not known.
    pub(super) parked: ParkedRecords,
}

impl Lane {
    pub(super) fn new(key: LaneKey, partition: Option<PartitionLane>) -> Self {
        Self {
            key,
            partition,
            blocked: None,
            queue: VecDeque::new(),
            bytes: 0,
            parked: ParkedRecords::default(),
        }
    }

    pub(super) fn push(&mut self, waiting: WaitingRecord) {
        self.bytes += waiting.record.size();
        self.queue.push_back(waiting);
    }

    /// The record at the front, and the lane's partition.
    pub(super) fn front(&mut self) -> (Option<&mut WaitingRecord>, Option<&PartitionLane>) {
        (self.queue.front_mut(), self.partition.as_ref())
    }

    /// The record at the front, and the tail of the lane's partition.
    pub(super) fn front_and_tail(&mut self) -> Option<(RawRecord<'_>, &mut LaneTail)> {
        let waiting = self.queue.front()?;
        Some((waiting.record.raw(), self.partition.as_mut()?.tail.as_mut()?))
    }

    /// The tail of the lane's partition.
    pub(super) fn tail(&self) -> Option<&LaneTail> {
        self.partition.as_ref()?.tail.as_ref()
    }

    /// The waiting records, in order.
    pub(super) fn records(&self) -> impl Iterator<Item = RawRecord<'_>> {
        self.queue.iter().map(|waiting| waiting.record.raw())
    }

    pub(super) fn pop(&mut self) -> Option<WaitingRecord> {
        let waiting = self.queue.pop_front()?;
        self.bytes -= waiting.record.size();
        if self.queue.is_empty() {
            // Returns the memory of a burst.
            self.queue.shrink_to(16);
        }
        Some(waiting)
    }

    /// The offset of the first record of the partition that is neither routed nor parked yet.
    pub(super) fn next_offset(&self) -> Option<i64> {
        let waiting = self.queue.front().map(|waiting| waiting.record.offset);
        waiting.or_else(|| self.partition.as_ref().map(|partition| partition.window.next()))
    }

    pub(super) fn is_revoked(&self) -> bool {
        self.partition.as_ref().is_some_and(|partition| partition.revocation.is_some())
    }

    /// Whether no record waits to be the next one.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Waiting and parked records.
    pub(super) fn len(&self) -> usize {
        self.queue.len() + self.parked.len()
    }

    /// Bytes of the waiting records.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
