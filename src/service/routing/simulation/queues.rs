//! What a node of the simulated cluster has queued for the two topics, and what it says of its partitions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use prost::Message as _;

use super::logs::{Commit, StoredHandOff, TOPIC};
use crate::service::cluster::ports::{
    HandOffSink, HandOffStored, OutgoingHandOff, Queued, SessionsWriter,
};
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::cluster::wire::{
    HandOffHeader, PartitionPosition, SessionsKey, TopicPositions,
};
use crate::service::routing::router::{CommittableOffset, CommittableTable};

/// Hand-offs that a node may have queued.
const SINK_MAX: usize = 60;
/// Of these, left for the hand-offs of one record.
const SINK_RESERVE: usize = 8;
/// Records for the sessions topic that a node may have queued.
const WRITES_MAX: usize = 6;

/// What a hand-off is.
fn kind(header: &HandOffHeader) -> &'static str {
    match &header.content {
        None => "hand-offs without content",
        Some(Content::Live(_)) => "hand-offs, live",
        Some(Content::Replay(_)) => "hand-offs, replay",
        Some(Content::Gap(_)) => "hand-offs, gap",
        Some(Content::Passed(_)) => "hand-offs, passed",
        Some(Content::ReplayRequest(_)) => "hand-offs, replay request",
        Some(Content::ReplayAnswer(_)) => "hand-offs, replay answer",
        Some(Content::Missed(users)) if users.ids.is_empty() => "hand-offs, missed by all",
        Some(Content::Missed(_)) => "hand-offs, missed",
        Some(Content::MissedRange(_)) => "hand-offs, missed range",
        Some(Content::Lost(_)) => "hand-offs, lost",
    }
}

pub(super) struct SimulatedSink {
    pub(super) queue: Mutex<VecDeque<(i32, StoredHandOff, HandOffStored)>>,
    /// Hand-offs by kind.
    pub(super) counts: Mutex<BTreeMap<&'static str, u64>>,
    bytes_max: usize,
}

impl SimulatedSink {
    /// Takes records of at most `bytes_max`.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { queue: Mutex::default(), counts: Mutex::default(), bytes_max }
    }
}

impl HandOffSink for SimulatedSink {
    fn send(&self, hand_off: OutgoingHandOff<'_>, stored: HandOffStored) -> Queued {
        let mut queue = self.queue.lock().expect("one thread");
        if queue.len() >= SINK_MAX {
            return Queued::Full;
        }
        // Without the offsets of parked records. They are at most a few KiB, and real topics take 8 MiB at least.
        let parked =
            HandOffHeader { parked: hand_off.header.parked.clone(), ..HandOffHeader::default() };
        let header = hand_off.header.encoded_len() - parked.encoded_len();
        if header + hand_off.value.len() > self.bytes_max {
            return Queued::TooLarge;
        }
        *self.counts.lock().expect("one thread").entry(kind(hand_off.header)).or_default() += 1;
        let record = StoredHandOff {
            to: hand_off.target,
            header: hand_off.header.clone(),
            value: hand_off.value.to_vec().into(),
        };
        queue.push_back((hand_off.partition, record, stored));
        Queued::Accepted
    }

    fn has_room(&self) -> bool {
        self.queue.lock().expect("one thread").len() + SINK_RESERVE < SINK_MAX
    }
}

/// The queue of the sessions topic.
#[derive(Default)]
pub(super) struct SessionsQueue(pub(super) Mutex<VecDeque<(SessionsKey, Option<Vec<u8>>)>>);

impl SessionsWriter for SessionsQueue {
    fn write(&self, key: &SessionsKey, value: Option<&[u8]>) -> bool {
        let mut queue = self.0.lock().expect("one thread");
        let has_room = queue.len() < WRITES_MAX;
        if has_room {
            queue.push_back((key.clone(), value.map(<[u8]>::to_vec)));
        }
        has_room
    }
}

/// The partitions that the node owns, with their generations and the next offsets to route.
pub(super) type RoutedCells = Arc<Mutex<BTreeMap<usize, (i64, Arc<AtomicI64>)>>>;

pub(super) fn positions(cells: &RoutedCells) -> TopicPositions {
    let cells = cells.lock().expect("one thread");
    let partitions = cells.iter().map(|(partition, (generation, next))| PartitionPosition {
        partition: *partition as i32,
        next: next.load(Ordering::Acquire),
        generation: *generation,
        parked: Vec::new(),
        check: 0,
    });
    TopicPositions { topic: TOPIC.into(), partitions: partitions.collect() }
}

/// A partition that the node owns, as far as it knows.
pub(super) struct OwnedPartition {
    pub(super) generation: i64,
    pub(super) committable: Arc<CommittableOffset>,
    pub(super) settled: Arc<CommittableTable>,
    pub(super) routed: Arc<AtomicI64>,
    /// Whether the position of its source has expired.
    pub(super) has_expired: Arc<AtomicBool>,
}

impl OwnedPartition {
    /// `None`: the other nodes are not told yet of what was lost before.
    pub(super) fn commit(&self) -> Option<Commit> {
        let (table, offset) = (self.settled.get(), self.committable.get()?);
        Some(Commit { table, offset, generation: self.generation })
    }
}
