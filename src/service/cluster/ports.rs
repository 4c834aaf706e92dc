//! Traits between the cluster's state machines, the routers, and the Kafka clients.

use std::sync::Arc;

use bytes::Bytes;

use super::wire::hand_off_header::Content;
use super::wire::{HandOffHeader, ReplayedRecord, SessionsKey};
use crate::handoff::{Doorbell, Pushed};

/// One run of one node. Random, so it is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeEpoch(pub u64);

/// A record of the sessions topic.
#[derive(Clone, Debug)]
pub struct SessionsRecord {
    /// Its offset.
    pub offset: i64,
    /// Append time by the clock of the partition's leader, Unix time in ms.
    pub appended_at_ms: i64,
    /// Its key. `None`: not readable, counted and otherwise ignored.
    pub key: Option<SessionsKey>,
    /// A serialized `Lease` or `SessionBegun`; `None`: a tombstone.
    pub value: Option<Bytes>,
}

/// Receives the sessions topic. Called from one thread, in the order of the log.
pub trait SessionsLog: Send + Sync + 'static {
    /// The next record.
    fn record(&self, record: SessionsRecord);

    /// Every record below this offset was passed. Called once the end that the topic had at the start is
    /// reached, and after each batch of records from then on. Not before: compaction has moved leases behind
    /// the sessions of their nodes.
    fn read_to(&self, next: i64);

    /// The position in the topic was lost (retention, truncation): forget everything, the topic is read
    /// from its start again.
    fn restarted(&self);

    /// Compaction has removed records before this node read them, because it read too late: the topic is read
    /// from its start again. The node cannot know whether others took it for dead meanwhile, so its epoch ends.
    fn fell_behind(&self);
}

/// Whether a record was queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an ignored refusal is a lost record"]
pub enum Queued {
    /// It will be stored.
    Accepted,
    /// The queue is full. Nothing was queued; the caller tries again later.
    Full,
    /// The record is larger than the topic allows, and never fits.
    TooLarge,
}

/// Writes the sessions topic.
pub trait SessionsWriter: Send + Sync + 'static {
    /// Queues a record; `value` `None` is a tombstone. Records are stored in the order of the calls, and
    /// retried without a time limit. Never blocks. `false`: the queue is full, and nothing was queued.
    fn write(&self, key: &SessionsKey, value: Option<&[u8]>) -> bool;
}

/// A record for another node.
#[derive(Clone, Copy, Debug)]
pub struct OutgoingHandOff<'a> {
    /// The node.
    pub target: NodeEpoch,
    /// The partition of the hand-off topic that it reads.
    pub partition: i32,
    /// What it is.
    pub header: &'a HandOffHeader,
    /// Key of the source record.
    pub key: Option<&'a [u8]>,
    /// Value of the source record.
    pub value: &'a [u8],
}

/// Called once, when a hand-off is stored. Not called if the process ends first.
pub type HandOffStored = Box<dyn FnOnce() + Send + Sync>;

/// Stores hand-offs.
pub trait HandOffSink: Send + Sync + 'static {
    /// Queues a hand-off, which is retried without a time limit. Hand-offs to one node are stored in the
    /// order of the calls. After some errors several are stored again, in the same order. Never blocks.
    /// `stored` is called only if the answer is [`Queued::Accepted`].
    fn send(&self, hand_off: OutgoingHandOff<'_>, stored: HandOffStored) -> Queued;

    /// Whether the queue has room for the hand-offs of one more record to every node. Other routers may
    /// take that room meanwhile.
    fn has_room(&self) -> bool;
}

/// A hand-off to this node.
#[derive(Clone, Debug, PartialEq)]
pub struct IncomingHandOff {
    /// What it is.
    pub header: HandOffHeader,
    /// Value of the source record.
    pub value: Bytes,
}

impl IncomingHandOff {
    /// Memory that it holds, bytes.
    pub fn bytes(&self) -> usize {
        let users = match &self.header.content {
            Some(Content::Live(users) | Content::Missed(users)) => &*users.ids,
            _ => &[],
        };
        let users: usize = users.iter().map(|user| size_of::<String>() + user.len()).sum();
        let replayed = match &self.header.content {
            Some(Content::ReplayAnswer(answer)) => &*answer.records,
            _ => &[],
        };
        let replayed: usize = replayed
            .iter()
            .map(|record| size_of::<ReplayedRecord>() + record.topic.len() + record.value.len())
            .sum();
        size_of::<Self>() + self.header.topic.len() + users + replayed + self.value.len()
    }
}

/// The hand-offs that have arrived, for a receiver that takes them on a thread of its own.
pub trait ArrivedHandOffs: Send + Sync + 'static {
    /// Calls [`HandOffReceiver::receive`] and [`HandOffReceiver::read_to`] for at most `max` records. Never blocks.
    /// Returns whether there were any.
    fn take(&self, max: usize) -> bool;
}

/// Receives the hand-offs to this node, in the order of the log.
pub trait HandOffReceiver: Send + Sync + 'static {
    /// Called once, before the first record. If it returns a doorbell, that is rung when records have arrived,
    /// and its owner calls [`ArrivedHandOffs::take`]. Otherwise another thread does so at once.
    fn opened(&self, log: Arc<dyn ArrivedHandOffs>) -> Option<Arc<Doorbell>> {
        drop(log);
        None
    }

    /// Never blocks. `Full`: the caller offers it again later, and reads no further meanwhile.
    fn receive(&self, hand_off: IncomingHandOff) -> Pushed<IncomingHandOff>;

    /// Every hand-off below this offset of the node's partition was received. Called after each batch of
    /// records, also if none was for this node.
    fn read_to(&self, next: i64);

    /// Records for this node were deleted before it read them: its sessions have missed events.
    fn missed(&self);

    /// The topic was deleted. One of the same name that is there later has other offsets, so nothing that was learned
    /// from this one holds any more.
    fn gone(&self);
}
