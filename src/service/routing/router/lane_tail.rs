//! The tail of a lane's partition, as the lane fills it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::domain::cursor::{TopicId, start_check};
use crate::service::cluster::tail::{PartitionTail, TailAudience, TailBudget, TailRecord};
use crate::service::routing::router::partition::TopicPartition;
use crate::service::routing::router::record::RawRecord;

/// How the tail of a partition is filled.
#[derive(Clone, Debug)]
pub struct TailFill {
    /// The first offset of the source, at most the first one to route: the records between the two only fill the
    /// tail.
    pub from: i64,
    /// Whether that is done. Written by the router.
    pub filled: Arc<AtomicBool>,
}

impl TailFill {
    /// A tail that is to be filled from this offset on.
    pub fn new(from: i64) -> Self {
        Self { from, filled: Arc::default() }
    }
}

/// The tail of a lane.
pub(super) struct LaneTail {
    pub(super) tail: PartitionTail,
    /// Whether it holds what the source has before `start`.
    filled: Arc<AtomicBool>,
    /// The first offset to route.
    start: i64,
    /// It is known who received each record from here on.
    resolved_from: i64,
    pub(super) topic: TopicId,
    /// The check of position 0.
    pub(super) start_check: u32,
}

impl LaneTail {
    /// The tail of a lane that routes from `start` on, and reads its partition since `now_ms`.
    pub(super) fn new(
        log: &TopicPartition,
        fill: Option<TailFill>,
        start: i64,
        budget: &Arc<TailBudget>,
        now_ms: u64,
    ) -> Self {
        let TailFill { from, filled } = fill.unwrap_or_else(|| TailFill::new(start));
        if from >= start {
            filled.store(true, Ordering::Release);
        }
        let tail = PartitionTail::new(from.min(start), Arc::clone(budget));
        let (topic, start_check) = (TopicId::of(&log.topic), start_check(now_ms));
        Self { tail, filled, start, resolved_from: start, topic, start_check }
    }

    /// Whether it holds what the source has before the first offset to route.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Relaxed)
    }

    /// Records below this offset were not routed by this lane.
    pub(super) fn routed_from(&self) -> i64 {
        self.start
    }

    /// Searches the records at or above `from` and below `to`. Returns whether it is not known who received one of
    /// them. What is found to be known is not searched again.
    pub(super) fn find_unresolved(&mut self, from: i64, to: i64) -> bool {
        let end = to.min(self.resolved_from);
        if from >= end {
            return false;
        }
        let is_unresolved = self.tail.unresolved(from, end).next().is_some();
        if !is_unresolved && end == self.resolved_from {
            self.resolved_from = from;
        }
        is_unresolved
    }

    /// The source has no more records to fill it.
    pub(super) fn set_filled(&self) {
        self.filled.store(true, Ordering::Release);
    }

    /// Puts a record before `start` into the tail, until the tail is filled. Returns false for every other
    /// record: it has to be routed. (A partition that was created again begins below `start` again.)
    pub(super) fn fills(&mut self, raw: RawRecord<'_>, now_ms: u64) -> bool {
        if self.is_filled() {
            return false;
        }
        let is_before = raw.offset < self.start;
        if is_before {
            self.tail.push(record(raw), None, now_ms);
        }
        if raw.offset + 1 >= self.start {
            self.set_filled();
        }
        is_before
    }

    /// Puts a record that is routed, or given up, into the tail: at the end, or if it was `parked`, at its place among
    /// the records that were routed before it. `audience`: who received it; `None`: nobody, because it was given up.
    /// Then its value is not kept.
    pub(super) fn remember(
        &mut self,
        raw: RawRecord<'_>,
        audience: Option<&TailAudience>,
        was_parked: bool,
        now_ms: u64,
    ) {
        let nobody = TailAudience::default();
        let record = match audience {
            Some(_) => record(raw),
            None => TailRecord { value: &[], ..record(raw) },
        };
        let audience = Some(audience.unwrap_or(&nobody));
        if was_parked {
            self.tail.insert(record, audience, now_ms);
        } else {
            self.tail.push(record, audience, now_ms);
        }
    }
}

fn record(raw: RawRecord<'_>) -> TailRecord<'_> {
    let RawRecord { offset, appended_at_ms, key, value, .. } = raw;
    TailRecord { offset, appended_at_ms, key, value }
}
