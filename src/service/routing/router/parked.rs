//! Records that wait for the members of their conversation, while the rest of their partition proceeds.
//!
//! Records of one conversation stay in order: what follows a parked record waits behind it. Nothing is
//! committed past a parked record, because it stays in the window of its partition.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::service::routing::router::RouterConfig;
use crate::service::routing::router::record::{RawRecord, WaitingRecord};

/// Time between two attempts while a record waits for something else than its members (room in a ring, memory), ms.
const RETRY_MS: u64 = 10;

/// The parked records of one conversation.
#[derive(Debug)]
struct ParkedQueue {
    /// In the order of the partition, at least one.
    records: VecDeque<WaitingRecord>,
    /// When the first of them is attempted again though no list has arrived, steady time in ms.
    retry_ms: u64,
}

/// The parked records of one lane.
///
/// An attempt costs about 3 µs, and there can be as many conversations as records. So a conversation is attempted when
/// a list of members has arrived, or when its own time has come, and not each time the router turns.
#[derive(Debug, Default)]
pub(super) struct ParkedRecords {
    /// By conversation.
    queues: BTreeMap<Arc<str>, ParkedQueue>,
    records: usize,
    bytes: usize,
    /// The lowest time at which a conversation is attempted again, or a lower one.
    retry_ms: u64,
    /// [`Membership::arrivals`](crate::service::members::membership::Membership::arrivals) at the last attempt.
    arrivals: Option<u64>,
}

impl ParkedRecords {
    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Records.
    pub(super) fn len(&self) -> usize {
        self.records
    }

    /// Conversations.
    pub(super) fn conversations(&self) -> usize {
        self.queues.len()
    }

    /// The lowest offset.
    pub(super) fn lowest(&self) -> Option<i64> {
        let fronts = self.queues.values().filter_map(|queue| queue.records.front());
        fronts.map(|waiting| waiting.record.offset).min()
    }

    /// The record with the highest offset below this one.
    pub(super) fn last_below(&self, offset: i64) -> Option<RawRecord<'_>> {
        let below = self.queues.values().filter_map(|queue| {
            let below = queue.records.partition_point(|waiting| waiting.record.offset < offset);
            Some(queue.records[below.checked_sub(1)?].record.raw())
        });
        below.max_by_key(|parked| parked.offset)
    }

    /// All offsets, in any order.
    pub(super) fn offsets(&self) -> impl Iterator<Item = i64> {
        let records = self.queues.values().flat_map(|queue| &queue.records);
        records.map(|waiting| waiting.record.offset)
    }

    pub(super) fn has(&self, conversation: &str) -> bool {
        self.queues.contains_key(conversation)
    }

    /// Whether the lane may take no more records, because any of them may have to be parked.
    pub(super) fn is_full(&self, config: &RouterConfig) -> bool {
        self.records >= config.parked_records_max || self.bytes >= config.parked_bytes_max
    }

    /// Parks a record behind those of its conversation. It was taken after all of them. If it is the first, it is
    /// attempted again at `retry_ms`.
    pub(super) fn push(
        &mut self,
        conversation: Arc<str>,
        waiting: WaitingRecord,
        retry_ms: u64,
        config: &RouterConfig,
    ) {
        if self.is_empty() {
            (self.retry_ms, self.arrivals) = (u64::MAX, None);
        }
        self.records += 1;
        self.bytes += waiting.record.size();
        let new = || ParkedQueue { records: VecDeque::new(), retry_ms };
        let queue = self.queues.entry(conversation).or_insert_with(new);
        queue.records.push_back(waiting);
        if queue.records.len() > config.parked_of_conversation_max {
            queue.retry_ms = 0;
        }
        self.retry_ms = self.retry_ms.min(queue.retry_ms);
    }

    /// When an attempt is due though no list has arrived, steady time in ms. `None`: nothing is parked.
    pub(super) fn retry_ms(&self) -> Option<u64> {
        (!self.is_empty()).then_some(self.retry_ms)
    }

    /// The conversations to attempt now, in any order: all if a list has arrived since the last attempt, or if
    /// `is_all`; otherwise those whose time has come. The caller states when each is attempted again
    /// ([`ParkedRecords::retry_at`]).
    pub(super) fn take_due(&mut self, arrivals: u64, is_all: bool, now_ms: u64) -> Vec<Arc<str>> {
        let is_all = is_all || self.arrivals.replace(arrivals) != Some(arrivals);
        if self.is_empty() || !is_all && now_ms < self.retry_ms {
            return Vec::new();
        }
        self.retry_ms = u64::MAX;
        let mut due = Vec::new();
        for (conversation, queue) in &self.queues {
            if is_all || queue.retry_ms <= now_ms {
                due.push(Arc::clone(conversation));
            } else {
                self.retry_ms = self.retry_ms.min(queue.retry_ms);
            }
        }
        due
    }

    /// The members of the conversation are not known yet: it is attempted again at this time, steady time in ms.
    pub(super) fn retry_at(&mut self, conversation: &str, retry_ms: u64) {
        if let Some(queue) = self.queues.get_mut(conversation) {
            queue.retry_ms = retry_ms;
            self.retry_ms = self.retry_ms.min(retry_ms);
        }
    }

    /// The attempts were broken off, because a record waits for something else than its members: all are attempted
    /// again soon.
    pub(super) fn retry_soon(&mut self, now_ms: u64) {
        self.retry_ms = now_ms + RETRY_MS;
        self.queues.values_mut().for_each(|queue| queue.retry_ms = now_ms + RETRY_MS);
    }

    /// The first record of a conversation, and whether it has more than it may have.
    pub(super) fn front(
        &self,
        conversation: &str,
        config: &RouterConfig,
    ) -> Option<(&WaitingRecord, bool)> {
        let queue = &self.queues.get(conversation)?.records;
        Some((queue.front()?, queue.len() > config.parked_of_conversation_max))
    }

    /// Takes the first record of a conversation.
    pub(super) fn pop(&mut self, conversation: &str) -> Option<WaitingRecord> {
        let queue = &mut self.queues.get_mut(conversation)?.records;
        let waiting = queue.pop_front()?;
        if queue.is_empty() {
            self.queues.remove(conversation);
        }
        self.records -= 1;
        self.bytes -= waiting.record.size();
        Some(waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::routing::router::record::{Intake, OwnedRecord};

    fn park(parked: &mut ParkedRecords, conversation: &str, retry_ms: u64) {
        let record = OwnedRecord::of_value(bytes::Bytes::new());
        let waiting = WaitingRecord { record, intake: Intake::OtherNode, since_ms: Some(0) };
        parked.push(conversation.into(), waiting, retry_ms, &RouterConfig::default());
    }

    fn due(parked: &mut ParkedRecords, arrivals: u64, now_ms: u64) -> Vec<String> {
        parked.take_due(arrivals, false, now_ms).iter().map(ToString::to_string).collect()
    }

    /// Beside a thousand conversations without members each turn of the router would attempt all of them.
    #[test]
    fn conversation_is_attempted_when_a_list_has_arrived_or_its_time_has_come() {
        let mut parked = ParkedRecords::default();
        assert_eq!((parked.retry_ms(), due(&mut parked, 0, 0).len()), (None, 0));
        park(&mut parked, "a", 100);
        park(&mut parked, "b", 5_000);
        park(&mut parked, "b", u64::MAX);
        // A list may have arrived between the look-up and this.
        assert_eq!(due(&mut parked, 7, 1), ["a", "b"]);
        parked.retry_at("a", 101);
        parked.retry_at("b", 5_000);
        (2..101).for_each(|now_ms| assert_eq!(due(&mut parked, 7, now_ms), [""; 0], "{now_ms}"));
        assert_eq!(parked.retry_ms(), Some(101));
        assert_eq!(due(&mut parked, 7, 101), ["a"]);
        parked.retry_at("a", 9_000);
        assert_eq!(parked.retry_ms(), Some(5_000));
        assert_eq!(due(&mut parked, 8, 102), ["a", "b"], "a list has arrived");
        parked.retry_soon(102);
        assert_eq!(due(&mut parked, 8, 102), [""; 0]);
        assert_eq!(due(&mut parked, 8, 112), ["a", "b"], "there was no room for what was due");
        // One that has too many, and one whose partition has no room left.
        parked.retry_at("a", 9_000);
        parked.retry_at("b", 9_000);
        assert_eq!(parked.take_due(8, true, 113).len(), 2);
        parked.retry_at("a", 9_000);
        parked.retry_at("b", 9_000);
        (0..RouterConfig::default().parked_of_conversation_max)
            .for_each(|_| park(&mut parked, "b", u64::MAX));
        assert_eq!(due(&mut parked, 8, 114), ["b"]);
    }
}
