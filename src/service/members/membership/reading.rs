//! How far the follower and the routers of this node have read each partition.
//!
//! ```text
//!             follower's start          follower          router
//! partition ──────┬────────────────────────┬─────────────────┬──────►
//!                 │ applied by the follower│                 │
//!                           ├──── lane ────┼────────────────►│
//!                       lane's start       applied by the router
//! ```
//!
//! Every change before a record has been applied if the follower has read beyond the record; or if the lane
//! that routes it started before the place that the follower has reached, so that the two leave no gap. A
//! router that started later waits for the follower.

use std::collections::HashMap;
use std::sync::RwLock;
use std::sync::atomic::{AtomicI64, Ordering};

use super::changes::RecordPosition;

/// Nobody follows the partition.
const NOT_FOLLOWED: i64 = -1;
/// Offsets that a router may be ahead of the follower. Beyond that it waits, so that the changes that only
/// routers have read are few.
const AHEAD_MAX: i64 = 10_000;

#[derive(Debug)]
struct PartitionReading {
    /// The next offset of the follower: every change before it has been applied.
    followed: AtomicI64,
    /// The first offset of the lane.
    lane_start: AtomicI64,
    /// The next offset of the lane.
    lane_next: AtomicI64,
}

impl Default for PartitionReading {
    fn default() -> Self {
        Self {
            followed: AtomicI64::new(NOT_FOLLOWED),
            lane_start: AtomicI64::new(i64::MAX),
            lane_next: AtomicI64::new(0),
        }
    }
}

/// The partitions that this node reads.
#[derive(Debug, Default)]
pub(super) struct ReadPositions(RwLock<HashMap<(u16, i32), PartitionReading>>);

impl ReadPositions {
    fn with<T>(&self, log: (u16, i32), act: impl FnOnce(&PartitionReading) -> T) -> Option<T> {
        self.0.read().expect("no holder panics").get(&log).map(act)
    }

    fn with_new(&self, log: (u16, i32), act: impl FnOnce(&PartitionReading)) {
        act(self.0.write().expect("no holder panics").entry(log).or_default());
    }

    /// The follower reads from here on.
    pub(super) fn follow_from(&self, position: RecordPosition) {
        self.with_new(position.log(), |it| it.followed.store(position.offset, Ordering::Release));
    }

    /// The follower has read this record, and applied it.
    pub(super) fn followed(&self, position: RecordPosition) {
        let next = position.offset + 1;
        self.with(position.log(), |it| it.followed.fetch_max(next, Ordering::Release));
    }

    /// A lane reads from here on.
    pub(super) fn lane_starts(&self, position: RecordPosition) {
        self.with_new(position.log(), |it| {
            it.lane_next.store(0, Ordering::Relaxed);
            it.lane_start.store(position.offset, Ordering::Release);
        });
    }

    /// Whether the follower has read this record.
    pub(super) fn is_followed(&self, position: RecordPosition) -> bool {
        let followed = |it: &PartitionReading| it.followed.load(Ordering::Acquire);
        self.with(position.log(), followed).is_some_and(|next| position.offset < next)
    }

    /// Whether every change up to this record, which a router routes, has been applied.
    pub(super) fn is_covered(&self, position: RecordPosition) -> bool {
        let is_covered = |it: &PartitionReading| {
            it.lane_next.fetch_max(position.offset + 1, Ordering::Relaxed);
            let followed = it.followed.load(Ordering::Acquire);
            let is_ahead_of_no_gap = || {
                it.lane_start.load(Ordering::Acquire) <= followed
                    && position.offset - followed <= AHEAD_MAX
            };
            followed == NOT_FOLLOWED || position.offset < followed || is_ahead_of_no_gap()
        };
        // Nobody else reads it.
        self.with(position.log(), is_covered).unwrap_or(true)
    }

    /// What was read is forgotten. The lanes continue, as if they started where they are.
    pub(super) fn clear(&self) {
        for reading in self.0.write().expect("no holder panics").values_mut() {
            *reading.followed.get_mut() = NOT_FOLLOWED;
            let start = (*reading.lane_start.get_mut()).max(*reading.lane_next.get_mut());
            *reading.lane_start.get_mut() = start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: i64) -> RecordPosition {
        RecordPosition { topic: 0, partition: 3, offset }
    }

    #[test]
    fn router_that_started_behind_the_follower_may_be_ahead_of_it() {
        let reading = ReadPositions::default();
        assert!(reading.is_covered(at(7)), "nobody follows it");
        reading.lane_starts(at(5));
        reading.follow_from(at(8));
        assert!(reading.is_covered(at(7)) && reading.is_followed(at(7)));
        assert!(reading.is_covered(at(8)) && !reading.is_followed(at(8)));
        assert!(reading.is_covered(at(8 + AHEAD_MAX)) && !reading.is_covered(at(9 + AHEAD_MAX)));
    }

    #[test]
    fn router_that_started_ahead_waits_for_the_follower() {
        let reading = ReadPositions::default();
        reading.follow_from(at(8));
        reading.lane_starts(at(10));
        assert!(!reading.is_covered(at(10)));
        reading.followed(at(8));
        assert!(!reading.is_covered(at(10)));
        reading.followed(at(9));
        assert!(reading.is_covered(at(10)) && reading.is_covered(at(11)));
    }

    #[test]
    fn lane_counts_as_started_where_it_was_when_the_follower_lost_its_place() {
        let reading = ReadPositions::default();
        reading.lane_starts(at(5));
        reading.follow_from(at(8));
        assert!(reading.is_covered(at(20)));
        reading.clear();
        reading.follow_from(at(15));
        assert!(reading.is_covered(at(14)) && !reading.is_covered(at(20)));
        reading.followed(at(20));
        assert!(reading.is_covered(at(22)));
    }
}
