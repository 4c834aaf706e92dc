//! From where partitions are read, so that their tails hold what precedes their first record to route.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::cluster::tail::TailBudget;
use crate::service::routing::router::TopicPartition;

/// Memory of the smallest record in a tail, bytes: its entry, its ids and its key. No tail can hold more
/// records than its bytes divided by this.
const TAIL_RECORD_BYTES_MIN: u64 = 128;
/// So many offsets more are read, for the check of the record before the first one of the tail: a cursor of a quiet
/// partition is compared with it. More than one, because a transaction ends with an offset that holds no record.
const OFFSETS_BEFORE: i64 = 4;

/// How far back partitions are read, to fill their tails.
#[derive(Clone, Copy, Debug)]
pub(super) struct TailBounds {
    /// Append time of the first record, Unix time in ms.
    pub(super) since_ms: i64,
    /// Bytes of the tail of one partition.
    pub(super) bytes: u64,
}

impl TailBounds {
    /// The bounds now, if this node keeps so many tails.
    pub(super) fn of(budget: &TailBudget, tails: usize, now_ms: u64) -> Self {
        let since_ms = now_ms.saturating_sub(budget.age_max_ms());
        Self {
            since_ms: i64::try_from(since_ms).unwrap_or(i64::MAX),
            bytes: budget.bytes_max() / tails.max(1) as u64,
        }
    }

    /// The first offset to read of a partition that is routed from `start` on. `low`, `since` and `end`: its
    /// lowest offset, the first offset with an append time in the bounds, and its end; `None`: not known.
    fn fill_from(self, start: i64, low: Option<i64>, since: Option<i64>, end: Option<i64>) -> i64 {
        // A log that ends before the committed offset was created again: nothing of it was routed.
        let (Some(low), Some(since), Some(end)) = (low, since, end) else { return start };
        if end < start || low >= start {
            return start;
        }
        let records = i64::try_from(self.bytes / TAIL_RECORD_BYTES_MIN).unwrap_or(i64::MAX);
        let first = since.max(start.saturating_sub(records)).min(start);
        first.saturating_sub(OFFSETS_BEFORE).max(low)
    }
}

/// For each partition and its first offset to route the first offset to read: at most its start, and what precedes it
/// fills the tail. If the brokers do not answer, tails begin empty. Blocks for three requests.
pub(super) fn fill_from<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    starts: &[(&TopicPartition, i64)],
    bounds: TailBounds,
    timeout: Duration,
) -> Vec<i64> {
    let offsets_at = |when: Offset| {
        let mut list = TopicPartitionList::with_capacity(starts.len());
        for (log, _) in starts {
            list.add_partition_offset(&log.topic, log.partition, when)?;
        }
        consumer.offsets_for_times(list, timeout)
    };
    let found = [Offset::Beginning, Offset::Offset(bounds.since_ms.max(0)), Offset::End]
        .map(|when| offsets_at(when).inspect_err(|error| tracing::debug!(%error, "empty tails")));
    let fill_from = starts.iter().map(|(log, start)| {
        let known = found.each_ref().map(|list| {
            let found = list.as_ref().ok()?.find_partition(&log.topic, log.partition)?;
            found.error().ok()?;
            match found.offset() {
                Offset::Offset(offset) => Some(offset),
                // No record is as young.
                Offset::End => Some(i64::MAX),
                _ => None,
            }
        });
        bounds.fill_from(*start, known[0], known[1], known[2])
    });
    fill_from.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_filled_within_its_age_its_bytes_and_the_log() {
        let bounds = TailBounds { since_ms: 0, bytes: 100 * TAIL_RECORD_BYTES_MIN };
        let fill_from = |low, since, end| bounds.fill_from(500, Some(low), Some(since), Some(end));
        assert_eq!(fill_from(0, 450, 600), 446, "age, and what precedes it");
        assert_eq!(fill_from(0, 100, 600), 396, "bytes");
        assert_eq!(fill_from(470, 450, 600), 470, "retention");
        assert_eq!(fill_from(448, 450, 600), 448, "retention");
        assert_eq!(fill_from(0, 550, 600), 496, "nothing before the start is young enough");
        assert_eq!(fill_from(0, i64::MAX, 500), 496, "nothing is young enough");
        assert_eq!(fill_from(510, 510, 600), 500, "the start was deleted");
        assert_eq!(fill_from(500, 500, 600), 500, "nothing precedes the start");
        assert_eq!(fill_from(0, 0, 20), 500, "created again: everything is routed");
        assert_eq!(bounds.fill_from(500, Some(0), None, Some(600)), 500, "not known");
    }
}
