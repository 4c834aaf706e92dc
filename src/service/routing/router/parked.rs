//! Records that wait for the members of their conversation, while the rest of their partition proceeds.
//!
//! Records of one conversation stay in order: what follows a parked record waits behind it. Nothing is
//! committed past a parked record, because it stays in the window of its partition.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::service::routing::router::RouterConfig;
use crate::service::routing::router::record::{RawRecord, WaitingRecord};

/// Time between two attempts while no list of members has arrived, ms.
const RETRY_MS: u64 = 10;

/// The parked records of one lane.
#[derive(Debug, Default)]
pub(super) struct ParkedRecords {
    /// By conversation, each queue in the order of the partition and not empty.
    queues: BTreeMap<Arc<str>, VecDeque<WaitingRecord>>,
    records: usize,
    bytes: usize,
    /// [`Membership::arrivals`](crate::service::members::membership::Membership::arrivals) and the time, Unix
    /// time in ms, at the last attempt. `None`: an attempt is due.
    tried: Option<(u64, u64)>,
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
        let fronts = self.queues.values().filter_map(VecDeque::front);
        fronts.map(|waiting| waiting.record.offset).min()
    }

    /// The record with the highest offset below this one.
    pub(super) fn last_below(&self, offset: i64) -> Option<RawRecord<'_>> {
        let records = self.queues.values().flatten().map(|waiting| waiting.record.raw());
        records.filter(|parked| parked.offset < offset).max_by_key(|parked| parked.offset)
    }

    /// All offsets, in any order.
    pub(super) fn offsets(&self) -> impl Iterator<Item = i64> {
        self.queues.values().flatten().map(|waiting| waiting.record.offset)
    }

    pub(super) fn has(&self, conversation: &str) -> bool {
        self.queues.contains_key(conversation)
    }

    /// Whether the lane may take no more records, because any of them may have to be parked.
    pub(super) fn is_full(&self, config: &RouterConfig) -> bool {
        self.records >= config.parked_records_max || self.bytes >= config.parked_bytes_max
    }

    /// Parks a record behind those of its conversation. It was taken after all of them.
    pub(super) fn push(
        &mut self,
        conversation: Arc<str>,
        waiting: WaitingRecord,
        config: &RouterConfig,
    ) {
        self.records += 1;
        self.bytes += waiting.record.size();
        let queue = self.queues.entry(conversation).or_default();
        queue.push_back(waiting);
        if queue.len() > config.parked_of_conversation_max {
            self.tried = None;
        }
    }

    /// Whether to attempt to route them: a list has arrived, or some time has passed. Notes the attempt.
    pub(super) fn is_due(&mut self, arrivals: u64, now_ms: u64) -> bool {
        let is_due = !self.is_empty()
            && self.tried.is_none_or(|(seen, tried_ms)| {
                seen != arrivals || now_ms >= tried_ms + RETRY_MS || now_ms < tried_ms
            });
        if is_due {
            self.tried = Some((arrivals, now_ms));
        }
        is_due
    }

    /// The conversations, in any order.
    pub(super) fn names(&self) -> Vec<Arc<str>> {
        self.queues.keys().cloned().collect()
    }

    /// The first record of a conversation, and whether it has more than it may have.
    pub(super) fn front(
        &self,
        conversation: &str,
        config: &RouterConfig,
    ) -> Option<(&WaitingRecord, bool)> {
        let queue = self.queues.get(conversation)?;
        Some((queue.front()?, queue.len() > config.parked_of_conversation_max))
    }

    /// Takes the first record of a conversation.
    pub(super) fn pop(&mut self, conversation: &str) -> Option<WaitingRecord> {
        let queue = self.queues.get_mut(conversation)?;
        let waiting = queue.pop_front()?;
        if queue.is_empty() {
            self.queues.remove(conversation);
        }
        self.records -= 1;
        self.bytes -= waiting.record.size();
        Some(waiting)
    }
}
