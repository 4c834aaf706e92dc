//! What the group reader and the rest of a cluster node exchange: the barrier of a claim, the positions of
//! the partitions that this node owns, and when it may join the group.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::service::cluster::table::SessionTable;
use crate::service::cluster::wire::{PartitionPosition, TopicPositions};
use crate::service::routing::router::TopicPartition;

/// The hand-offs to this node, as far as a claim depends on them.
pub trait ClaimBarrier: Send + Sync + 'static {
    /// The end offset of the node's hand-off partition now. A partition that is claimed before the call is
    /// routed only once everything below it was delivered on this node. May block for a few seconds. `None`:
    /// not known now; the caller asks again later.
    fn end_offset(&self) -> Option<i64>;
}

/// What a node needs to claim its partitions, in `group` mode with hand-off through the log.
#[derive(Clone)]
pub struct ClaimParts {
    /// The hand-offs to this node.
    pub barrier: Arc<dyn ClaimBarrier>,
    /// The partitions of this node.
    pub owned: Arc<OwnedPartitions>,
    /// The table of this node.
    pub table: Arc<SessionTable>,
    /// The topic from which it is read.
    pub sessions_topic: String,
    /// Called with the reason if a topic of events was deleted, created again, or has lost its last records.
    /// Holders discard records below the positions that they remember, so all nodes have to start again.
    pub failed: Arc<dyn Fn(String) + Send + Sync>,
}

/// A partition that this node owns.
#[derive(Debug)]
struct OwnedPosition {
    generation: i64,
    /// The next offset to route, as its router says.
    routed: Arc<AtomicI64>,
}

/// The partitions that this node has claimed, and whether it may claim any.
#[derive(Debug, Default)]
pub struct OwnedPartitions {
    positions: Mutex<HashMap<TopicPartition, OwnedPosition>>,
    may_join: AtomicBool,
}

impl OwnedPartitions {
    /// Lets the node join the group: its table is read and its lease is stored. Before that it would own
    /// partitions without a lease that states their positions.
    pub fn join(&self) {
        self.may_join.store(true, Ordering::Release);
    }

    pub(super) fn may_join(&self) -> bool {
        self.may_join.load(Ordering::Acquire)
    }

    /// The next offset to route of each partition, for the lease: sorted, by topic. The order of the calls is
    /// that of the positions: a later call never returns a lower one of the same generation.
    pub fn positions(&self) -> Vec<TopicPositions> {
        let mut topics: Vec<TopicPositions> = Vec::new();
        for (log, OwnedPosition { generation, routed }) in &*self.guard() {
            let position = PartitionPosition {
                partition: log.partition,
                next: routed.load(Ordering::Acquire),
                generation: *generation,
                parked: Vec::new(),
                check: 0,
            };
            match topics.iter_mut().find(|known| *known.topic == *log.topic) {
                Some(known) => known.partitions.push(position),
                None => topics.push(TopicPositions {
                    topic: log.topic.to_string(),
                    partitions: vec![position],
                }),
            }
        }
        topics.sort_unstable_by(|one, other| one.topic.cmp(&other.topic));
        for topic in &mut topics {
            topic.partitions.sort_unstable_by_key(|position| position.partition);
        }
        topics
    }

    pub(super) fn len(&self) -> usize {
        self.guard().len()
    }

    pub(super) fn add(&self, log: TopicPartition, generation: i64, routed: Arc<AtomicI64>) {
        self.guard().insert(log, OwnedPosition { generation, routed });
    }

    pub(super) fn remove(&self, log: &TopicPartition) {
        self.guard().remove(log);
    }

    fn guard(&self) -> MutexGuard<'_, HashMap<TopicPartition, OwnedPosition>> {
        self.positions.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_of_the_routers_by_topic() {
        let owned = OwnedPartitions::default();
        let log = |topic: &str, partition| TopicPartition {
            topic: topic.into(),
            topic_index: 0,
            partition,
        };
        let routed = Arc::new(AtomicI64::new(5));
        owned.add(log("b", 1), 3, Arc::clone(&routed));
        owned.add(log("b", 0), 4, Arc::new(AtomicI64::new(7)));
        owned.add(log("a", 2), 1, Arc::default());
        routed.store(6, Ordering::Release);
        let found: Vec<_> = owned
            .positions()
            .into_iter()
            .flat_map(|topic| {
                let name = topic.topic;
                topic
                    .partitions
                    .into_iter()
                    .map(move |at| (name.clone(), at.partition, at.next, at.generation))
            })
            .collect();
        let expected = [("a", 2, 0, 1), ("b", 0, 7, 4), ("b", 1, 6, 3)]
            .map(|(topic, partition, next, g)| (topic.to_owned(), partition, next, g));
        assert_eq!(found, expected);
        owned.remove(&log("b", 1));
        assert_eq!(owned.len(), 2);
    }
}
