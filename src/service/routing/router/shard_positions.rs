//! The positions that a router tells the shards.

use std::collections::BTreeMap;

use crate::domain::cursor::{LogPosition, TopicId};
use crate::service::routing::router::links::RouterLinks;

/// The positions that a router gives the shards: those of its lanes, and in group mode those that other owners have
/// passed.
#[derive(Debug, Default)]
pub(super) struct ShardPositions {
    /// What the shards have got last.
    told: BTreeMap<(TopicId, u32), LogPosition>,
    /// What they are to get.
    next: BTreeMap<(TopicId, u32), LogPosition>,
    /// A shard has missed something.
    is_owed: bool,
}

impl ShardPositions {
    /// Everything below this position was given to the shards. `is_for_all`: also what concerns the sessions that may
    /// get cursors and began last. If not, the position counts only if it is lower than the last one: another owner may
    /// have been ahead of this one.
    pub(super) fn passed(&mut self, position: LogPosition, is_for_all: bool) {
        let key = (position.topic, position.partition);
        let last = self.next.get(&key).or(self.told.get(&key));
        if is_for_all || last.is_some_and(|last| position.next < last.next) {
            self.next.insert(key, position);
        }
    }

    /// Whether the shards have a position of this partition.
    pub(super) fn has(&self, partition: (TopicId, u32)) -> bool {
        self.told.contains_key(&partition)
    }

    /// Gives the shards what has changed. Returns whether all of them have everything.
    pub(super) fn tell(&mut self, links: &mut RouterLinks) -> bool {
        let mut changed = Vec::new();
        for (key, position) in std::mem::take(&mut self.next) {
            if self.told.insert(key, position) != Some(position) {
                changed.push(position);
            }
        }
        if self.is_owed {
            changed = self.told.values().copied().collect();
        }
        self.is_owed = !changed.is_empty() && !links.tell_routed(&changed);
        !self.is_owed
    }
}
