//! The nodes of the table: their leases, and their ends.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::{NodeAddress, SessionTable, WriterState};
use crate::service::backends::ports::LogNodes;
use crate::service::cluster::holder::SourcePartition;
use crate::service::cluster::nodes::EpochEnd;
use crate::service::cluster::ports::NodeEpoch;
use crate::service::cluster::wire::Lease;

impl SessionTable {
    /// The living node with this instance.
    pub fn node_of_instance(&self, instance: &str) -> Option<(NodeEpoch, Lease)> {
        let state = self.state();
        let mut living = state.nodes.living();
        living.find_map(|(epoch, info)| {
            let lease = info.lease.as_ref().filter(|lease| lease.instance == instance)?;
            Some((epoch, lease.clone()))
        })
    }

    /// Whether the epoch has ended, for ever.
    pub fn has_ended(&self, epoch: NodeEpoch) -> bool {
        self.state().nodes.ended(epoch).is_some()
    }

    /// Whether the topic was read to the end that it had, and the leases of all nodes are known of which
    /// sessions were read. If not, compaction has removed leases before that end, for later ones behind it.
    /// Nobody hands over to a node without a lease, so an owner that used the table would leave its sessions out.
    pub fn is_whole(&self) -> bool {
        self.state().is_whole
    }

    /// Ends the nodes without a lease, which would have renewed it meanwhile. Does nothing if the topic was not read to
    /// the end that it had.
    pub fn end_unleased(&self) {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.reached.is_none() {
            return;
        }
        for epoch in state.nodes.unleased().collect::<Vec<_>>() {
            self.end_epoch(state, epoch, EpochEnd::Stopped, None);
        }
        self.publish(state);
    }

    /// Shows how far the topic is read, once the table is whole.
    pub(super) fn publish(&self, state: &mut WriterState) {
        // Later a zombie may write sessions under an epoch that is forgotten.
        if !state.is_whole && state.reached.is_some() && state.nodes.unleased().next().is_none() {
            state.is_whole = true;
            state.nodes.renew_all();
        }
        if let Some(reached) = state.reached.filter(|_| state.is_whole) {
            self.read_to.store(reached, Ordering::Release);
        }
    }

    /// Whether this node removes what dead nodes have left: it has the lowest epoch.
    pub fn is_janitor(&self) -> bool {
        let state = self.state();
        let lowest = state.nodes.living().map(|(epoch, _)| epoch).min();
        state.own.is_some() && lowest == state.own
    }

    /// About how many records dead nodes have left in the topic since the last call.
    pub fn take_leftovers(&self) -> u64 {
        self.leftovers.swap(0, Ordering::Relaxed)
    }

    /// Some are still left.
    pub fn add_leftovers(&self, count: u64) {
        self.leftovers.fetch_add(count, Ordering::Relaxed);
    }

    /// The epochs that have ended for this reader, but have a later lease: not all readers agree. One for which
    /// compaction has left only that lease takes the epoch for alive.
    pub fn take_woken(&self) -> BTreeSet<NodeEpoch> {
        let mut state = self.state();
        if state.is_whole { std::mem::take(&mut state.woken) } else { BTreeSet::new() }
    }

    /// Whether the epoch lives, and its lease was read.
    pub fn has_lease(&self, epoch: NodeEpoch) -> bool {
        self.state().nodes.get(epoch).is_some_and(|info| info.lease.is_some())
    }

    /// The offset of the first lease of a living epoch.
    pub fn first_lease(&self, epoch: NodeEpoch) -> Option<i64> {
        let state = self.state();
        let info = state.nodes.get(epoch).filter(|info| info.lease.is_some())?;
        Some(info.since())
    }

    /// Leases that were read of a living epoch.
    pub fn renewals(&self, epoch: NodeEpoch) -> Option<u64> {
        self.state().nodes.get(epoch).map(|info| info.renewals)
    }

    /// The leases of all living nodes.
    pub fn leases(&self) -> Vec<(NodeEpoch, Lease)> {
        let state = self.state();
        let leases = state.nodes.living();
        leases.filter_map(|(epoch, info)| Some((epoch, info.lease.clone()?))).collect()
    }

    pub(super) fn end_epoch(
        &self,
        state: &mut WriterState,
        epoch: NodeEpoch,
        why: EpochEnd,
        by: Option<&Lease>,
    ) {
        if why == EpochEnd::Silent {
            self.counters.nodes_silent.add(1);
        }
        if let Some(info) = state.nodes.end(epoch, why) {
            // First, so that no owner hands over to it.
            self.set_address(info.index, None);
            self.remove_node(info.index);
            state.nodes.free(info.index);
            // Its lease.
            self.add_leftovers(u64::from(why != EpochEnd::Stopped));
            if state.own != Some(epoch)
                && let Some(Lease { instance, host, .. }) = info.lease
            {
                tracing::info!(instance, host, ?why, "another node has ended");
            }
        }
        if state.own == Some(epoch) {
            state.own = None;
            self.listener.ended(why, by);
        }
        self.counters.nodes.set(state.nodes.living().count() as u64);
    }

    pub(super) fn apply_lease(
        &self,
        state: &mut WriterState,
        epoch: NodeEpoch,
        offset: i64,
        lease: Lease,
    ) {
        if state.nodes.ended(epoch).is_some() {
            state.woken.insert(epoch);
        }
        if let Some((ended, why)) = state.nodes.renewed(epoch, offset, lease.clone()) {
            let rival = match why {
                EpochEnd::Refused => {
                    let mut living = state.nodes.living();
                    living.find_map(|(_, info)| {
                        info.lease.clone().filter(|its| its.instance == lease.instance)
                    })
                }
                _ => Some(lease.clone()),
            };
            self.end_epoch(state, ended, why, rival.as_ref());
        }
        let Some(info) = state.nodes.get(epoch) else { return };
        let (partition, answers_replays) = (lease.hand_off_partition, lease.answers_replays);
        let (node, address) = (info.index, NodeAddress { epoch, partition, answers_replays });
        self.set_address(node, Some(address));
        self.counters.nodes.set(state.nodes.living().count() as u64);
        let mut newcomers = self.newcomers.write().expect("no holder panics");
        for topic in &lease.routed {
            let known = self.config.topics.iter().position(|known| **known == *topic.topic);
            let Some(index) = known.and_then(|index| u16::try_from(index).ok()) else { continue };
            for position in &topic.partitions {
                let source = SourcePartition { topic: index, partition: position.partition };
                newcomers.stated(source, offset, position.next);
                newcomers.owned(source, position.generation, node);
            }
        }
    }

    pub(super) fn check_leases(&self, state: &mut WriterState) {
        let clock_ms = state.nodes.clock_ms();
        // At each record that can end an epoch, and not at times of this reader's own: an epoch ends for all
        // readers at the same record.
        // (In a first pass, leases can be compacted between the reader and the end.)
        if state.is_whole && clock_ms > state.leases_until_ms {
            let timeout_ms = self.config.node_timeout_ms;
            for (epoch, why) in state.nodes.silent(timeout_ms) {
                self.end_epoch(state, epoch, why, None);
            }
            state.leases_until_ms = state.nodes.none_silent_until(timeout_ms);
        }
        if clock_ms < state.pruned_ms + 1_000 {
            return;
        }
        state.pruned_ms = clock_ms;
        let mut newcomers = self.newcomers.write().expect("no holder panics");
        newcomers.prune(clock_ms);
        self.counters.newcomers.set(newcomers.len() as u64);
    }
}

impl LogNodes for SessionTable {
    fn has_lease(&self, instance: &str) -> bool {
        let state = self.state();
        state
            .nodes
            .living()
            .any(|(_, info)| info.lease.as_ref().is_some_and(|lease| lease.instance == instance))
    }

    fn own_renewals(&self) -> Option<u64> {
        let state = self.state();
        let info = state.nodes.get(state.own?).filter(|info| info.lease.is_some())?;
        Some(info.renewals)
    }
}
