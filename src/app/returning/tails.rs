//! The model of the tails: the last records of each partition. Each conversation has its own partition.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use super::service::{CONVERSATIONS, ModelRecord};
use crate::domain::cursor::{Cursor, CursorExpired, LogPosition, TopicId, UNCHECKED};
use crate::domain::ids::SessionAddress;
use crate::reactor::simulation::random::Random;
use crate::service::routing::replays::{
    PendingChunk, ReplayChunks, ReplayReader, ReplayedChunk, ReplayedRecord, TailReplays,
};

const TOPIC: TopicId = TopicId(1);

/// A next offset for each partition.
pub(super) type Offsets = [i64; CONVERSATIONS];

/// The positions of a cursor.
pub(super) fn offsets(cursor: &Cursor) -> Offsets {
    let at = |partition| cursor.get(TOPIC, partition as u32).map_or(0, |it| it.next);
    std::array::from_fn(at)
}

#[derive(Debug, Default)]
struct PartitionModel {
    /// The records with their offsets.
    records: VecDeque<(i64, Bytes)>,
    /// Records below this offset are gone.
    from: i64,
    next: i64,
}

/// The tails of all partitions.
#[derive(Debug)]
pub(super) struct ModelTails {
    partitions: Mutex<[PartitionModel; CONVERSATIONS]>,
    random: Mutex<Random>,
}

impl ModelTails {
    pub(super) fn new(seed: u64) -> Self {
        Self { partitions: Mutex::default(), random: Mutex::new(Random::new(seed)) }
    }

    fn partitions(&self) -> MutexGuard<'_, [PartitionModel; CONVERSATIONS]> {
        self.partitions.lock().expect("no holder panics")
    }

    /// The router routes a record.
    pub(super) fn routes(&self, record: &ModelRecord) {
        let partition = &mut self.partitions()[record.conversation];
        partition.records.push_back((partition.next, Bytes::copy_from_slice(&record.value)));
        partition.next += 1;
    }

    /// The oldest records of a partition are dropped.
    pub(super) fn trims(&self, random: &mut Random) {
        let partition = &mut self.partitions()[random.below(CONVERSATIONS)];
        for _ in 0..random.below(partition.records.len() + 1) {
            partition.records.pop_front();
        }
        partition.from = partition.records.front().map_or(partition.next, |(offset, _)| *offset);
    }

    /// What is routed.
    pub(super) fn positions(&self) -> Box<[LogPosition]> {
        let at =
            |(partition, next)| LogPosition { topic: TOPIC, partition, next, check: UNCHECKED };
        (0..).zip(self.partitions().iter().map(|it| it.next)).map(at).collect()
    }

    fn draw(&self, from: u64, to: u64) -> u64 {
        self.random.lock().expect("no holder panics").between(from, to)
    }
}

/// The tails as catch-up sees them.
pub(super) struct ModelReplays(pub(super) Arc<ModelTails>);

impl TailReplays for ModelReplays {
    fn replay(&self, _: SessionAddress, _: Arc<str>, since: Option<Cursor>) -> ReplayReader {
        let tails = Arc::clone(&self.0);
        ReplayReader::new(ModelReplay { tails, since: since.as_ref().map(offsets), end: None })
    }
}

struct ModelReplay {
    tails: Arc<ModelTails>,
    /// What the session has; `None`: it wants nothing.
    since: Option<Offsets>,
    /// What was routed when the positions were checked: later records come live.
    end: Option<Offsets>,
}

impl ReplayChunks for ModelReplay {
    fn next(&mut self) -> PendingChunk<'_> {
        Box::pin(async {
            sleep(Duration::from_millis(self.tails.draw(0, 6))).await;
            self.pull()
        })
    }
}

impl ModelReplay {
    fn pull(&mut self) -> ReplayedChunk {
        let Some(since) = &mut self.since else { return Ok(None) };
        let most = self.tails.draw(1, 6) as usize;
        let partitions = self.tails.partitions();
        let is_gone = (0..CONVERSATIONS).any(|it| since[it] < partitions[it].from);
        let end = match self.end {
            None if is_gone => return Err(CursorExpired::TooOld),
            None => *self.end.insert(std::array::from_fn(|it| partitions[it].next)),
            Some(end) => end,
        };
        for (number, partition) in partitions.iter().enumerate() {
            if since[number] >= end[number] {
                continue;
            }
            if since[number] < partition.from {
                return Err(CursorExpired::Overtaken);
            }
            let wanted = since[number]..end[number];
            let records = partition.records.iter().filter(|(offset, _)| wanted.contains(offset));
            let records: Vec<_> = records.take(most).map(|it| replayed(number, it)).collect();
            since[number] += records.len() as i64;
            return Ok(Some(records));
        }
        Ok(None)
    }
}

fn replayed(partition: usize, (offset, value): &(i64, Bytes)) -> ReplayedRecord {
    ReplayedRecord {
        topic: "events".into(),
        partition: partition as i32,
        offset: *offset,
        appended_at_ms: 1,
        key: None,
        value: value.clone(),
    }
}
