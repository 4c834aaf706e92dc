//! What the checks ask a simulated node.

use super::{SimulatedNode, SimulatedRouter};
use crate::domain::counters::CounterSet as _;
use crate::service::cluster::lease::LeaseState;
use crate::service::cluster::ports::NodeEpoch;
use crate::service::routing::simulation::ClusterSummary;
use crate::service::routing::simulation::logs::Logs;

/// Counters of routers that the summary shows.
const COUNTED: [&str; 9] = [
    "audience_look_ups",
    "audience_evictions",
    "gaps",
    "replays",
    "hand_offs_late",
    "hand_offs_too_large",
    "waits_for_members",
    "waits_for_room",
    "waits_for_hand_offs",
];

impl SimulatedNode {
    /// The epoch of the node, if it lives as far as the node knows.
    pub(in crate::service::routing::simulation) fn living(&self) -> Option<NodeEpoch> {
        (*self.keeper.state() == LeaseState::Living).then(|| self.table.own_epoch())
    }

    /// Whether the node, which has read the whole sessions topic, takes this epoch for dead.
    pub(in crate::service::routing::simulation) fn takes_for_dead(&self, epoch: NodeEpoch) -> bool {
        !self.table.has_lease(epoch)
    }

    /// Whether the node must stop because another one has its instance.
    pub(in crate::service::routing::simulation) fn gives_way(&self) -> bool {
        matches!(self.keeper.state(), LeaseState::InUse(_))
    }

    /// Adds what the node has counted.
    pub(in crate::service::routing::simulation) fn count(&self, summary: &mut ClusterSummary) {
        for SimulatedRouter { counters, .. } in &self.routers {
            counters.visit(&mut |_, name, _, count| {
                if COUNTED.contains(&name) {
                    summary.count_many(name, count);
                }
            });
        }
        summary.count_many("tables read again", self.table_counters.restarts.get());
        summary.count_many("losses of all sessions of a node", self.manager.losses());
        for (what, count) in &*self.sink.counts.lock().expect("one thread") {
            summary.count_many(what, *count);
        }
    }

    /// Whether everything is read, stored and acknowledged, besides what its routers do.
    pub(in crate::service::routing::simulation) fn rests(&self, logs: &Logs) -> bool {
        self.living().is_some()
            && self.table.is_whole()
            && self.sink.queue.lock().expect("one thread").is_empty()
            && self.unacknowledged.is_empty()
            && self.hand_offs_read == logs.hand_offs[self.hand_off_partition].end()
    }

    /// Whether records wait for their members in the router of this partition.
    pub(in crate::service::routing::simulation) fn has_parked(&self, partition: usize) -> bool {
        let router = &self.routers[partition % self.routers.len()];
        router.counters.conversations_waiting.get() > 0
    }

    /// What a person wants to know about a node that misbehaves.
    pub(in crate::service::routing::simulation) fn describe(&self, logs: &Logs) -> String {
        let owned: Vec<_> = self.commits();
        format!(
            "life {}: sessions topic {} of {}, hand-offs {} of {}, sink {}, unacknowledged {}, stalled {:?}, \
             {:?}, table used to {}, owns {owned:?}",
            self.life,
            self.sessions_read,
            logs.sessions.len(),
            self.hand_offs_read,
            logs.hand_offs[self.hand_off_partition].end(),
            self.sink.queue.lock().expect("one thread").len(),
            self.unacknowledged.len(),
            self.stall,
            self.keeper.state(),
            self.table.next_offset(),
        )
    }
}
