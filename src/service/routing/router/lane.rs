//! What must stay in order: the records of one partition, or what other nodes handed over.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc::SyncSender;

use crate::domain::ids::ShardId;
use crate::service::members::membership::LogPosition;
use crate::service::routing::offsets::OffsetWindow;
use crate::service::routing::router::in_flight::{LaneKey, RecordId};
use crate::service::routing::router::record::{OwnedRecord, RawRecord, RecordSource};

/// How far a partition may be committed: written by its router, read by the Kafka thread.
#[derive(Debug)]
pub struct CommittableOffset(AtomicI64);

impl CommittableOffset {
    /// Nothing read yet: the offset to start from, if it is known.
    pub fn new(start: Option<i64>) -> Self {
        Self(AtomicI64::new(start.unwrap_or(UNKNOWN)))
    }

    /// The lowest offset that is not done; `None` if nothing has been read and nobody knows where
    /// reading starts.
    pub fn get(&self) -> Option<i64> {
        match self.0.load(Ordering::Acquire) {
            UNKNOWN => None,
            offset => Some(offset),
        }
    }

    pub(super) fn set(&self, committable: i64) {
        self.0.store(committable, Ordering::Release);
    }
}

/// No offset.
const UNKNOWN: i64 = -1;

/// One partition of one topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TopicPartition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// Its index, see [`LogPosition::topic`].
    pub topic_index: u16,
    /// The partition.
    pub partition: i32,
}

impl TopicPartition {
    /// An offset of this partition.
    pub fn position(&self, offset: i64) -> LogPosition {
        LogPosition { topic: self.topic_index, partition: self.partition, offset }
    }
}

/// A partition that is handed to a router.
pub struct Assignment {
    /// Which one.
    pub log: TopicPartition,
    /// Where its records come from.
    pub source: Box<dyn RecordSource>,
    /// The offset that `source` starts from, if it is known.
    pub start: Option<i64>,
    /// Where the router writes how far it has got.
    pub committable: Arc<CommittableOffset>,
}

impl std::fmt::Debug for Assignment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assignment").field("log", &self.log).finish_non_exhaustive()
    }
}

/// Where a waiting record came from.
#[derive(Debug)]
pub(super) enum Intake {
    /// The lane's partition.
    Partition(RecordId),
    /// Another node.
    OtherNode,
    /// Somebody who knows the recipients.
    ToUsers(Vec<Arc<str>>),
}

/// Why the record at the front of a lane waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// Its members are being asked for.
    Members,
    /// The ring to this shard is full.
    RingFull(ShardId),
    /// Too much is on its way to other nodes.
    HandOffs,
    /// The dead-letter producer takes nothing at the moment.
    DeadLetter,
}

/// A record that waits for its turn or for what it needs.
#[derive(Debug)]
pub(super) struct WaitingRecord {
    pub(super) record: OwnedRecord,
    pub(super) intake: Intake,
    /// When it came to the front, Unix time in ms; `None`: not yet.
    pub(super) since_ms: Option<u64>,
}

/// The partition part of a lane.
pub(super) struct PartitionLane {
    pub(super) log: TopicPartition,
    pub(super) source: Box<dyn RecordSource>,
    pub(super) window: OffsetWindow,
    pub(super) committable: Arc<CommittableOffset>,
    pub(super) revoked: Option<Revocation>,
}

/// The partition is to be given up: nothing more is taken, and who waits is released when all is done or
/// the time is over.
#[derive(Debug)]
pub(super) struct Revocation {
    pub(super) deadline_ms: u64,
    /// Whether all of it was done.
    pub(super) done: SyncSender<bool>,
}

impl PartitionLane {
    pub(super) fn takes(&self) -> bool {
        self.revoked.is_none() && self.window.has_room()
    }
}

/// See the module.
pub(super) struct Lane {
    pub(super) key: LaneKey,
    pub(super) log: Option<PartitionLane>,
    pub(super) blocked: Option<Blocked>,
    queue: VecDeque<WaitingRecord>,
    bytes: usize,
}

impl Lane {
    pub(super) fn new(key: LaneKey, log: Option<PartitionLane>) -> Self {
        Self { key, log, blocked: None, queue: VecDeque::new(), bytes: 0 }
    }

    pub(super) fn push(&mut self, pending: WaitingRecord) {
        self.bytes += pending.record.size();
        self.queue.push_back(pending);
    }

    /// The record at the front, and the partition.
    pub(super) fn front(&mut self) -> (Option<&mut WaitingRecord>, Option<&PartitionLane>) {
        (self.queue.front_mut(), self.log.as_ref())
    }

    /// All that wait, in order.
    pub(super) fn records(&self) -> impl Iterator<Item = RawRecord<'_>> {
        self.queue.iter().map(|pending| pending.record.raw())
    }

    pub(super) fn pop(&mut self) -> Option<WaitingRecord> {
        let pending = self.queue.pop_front()?;
        self.bytes -= pending.record.size();
        if self.queue.is_empty() {
            // A burst that waited leaves no memory behind.
            self.queue.shrink_to(16);
        }
        Some(pending)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Bytes of the records that wait.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
