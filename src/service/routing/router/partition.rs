//! A partition, and what its router reports of it to the Kafka thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::service::members::membership::RecordPosition;

/// The offset up to which a partition may be committed. Written by its router, read by the Kafka
/// thread.
#[derive(Debug)]
pub struct CommittableOffset {
    committable: AtomicI64,
    /// The offset behind the last record that was taken.
    next: AtomicI64,
}

impl CommittableOffset {
    /// Before the first record: the start offset, if it is known.
    pub fn new(start: Option<i64>) -> Self {
        let start = start.unwrap_or(UNKNOWN);
        Self { committable: AtomicI64::new(start), next: AtomicI64::new(start) }
    }

    /// The lowest offset that is not done. `None`: nothing was read yet, and the start offset is not
    /// known.
    pub fn get(&self) -> Option<i64> {
        match self.committable.load(Ordering::Acquire) {
            UNKNOWN => None,
            offset => Some(offset),
        }
    }

    pub(super) fn set(&self, committable: i64) {
        self.committable.store(committable, Ordering::Release);
    }

    /// The offset behind the last record that the router has taken, or the start offset.
    pub fn next(&self) -> i64 {
        self.next.load(Ordering::Relaxed)
    }

    pub(in crate::service::routing) fn set_next(&self, next: i64) {
        self.next.store(next, Ordering::Relaxed);
    }
}

/// Stands for "no offset".
const UNKNOWN: i64 = -1;

/// The offset in the sessions topic that the next commits of a partition state as their table: the
/// replays of all sessions below it are acknowledged. Written by the partition's router, read by the
/// Kafka thread. It and [`CommittableOffset`] may be read at different times: each is valid with every
/// earlier or later value of the other, because a successor that starts with an older offset or table only
/// repeats records.
#[derive(Debug)]
pub struct CommittableTable(AtomicI64);

impl CommittableTable {
    /// The table that the partition's claim states.
    pub fn new(table: i64) -> Self {
        Self(AtomicI64::new(table))
    }

    /// The table of the next commits.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Acquire)
    }

    /// Sets the table of the next commits. It never falls.
    pub fn set(&self, table: i64) {
        self.0.fetch_max(table, Ordering::AcqRel);
    }
}

/// One partition of one topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TopicPartition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The topic's index, see [`RecordPosition::topic`].
    pub topic_index: u16,
    /// The partition.
    pub partition: i32,
}

impl TopicPartition {
    /// The position of an offset in this partition.
    pub fn position(&self, offset: i64) -> RecordPosition {
        RecordPosition { topic: self.topic_index, partition: self.partition, offset }
    }
}
