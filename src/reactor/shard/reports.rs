//! Reports to the service side. A report whose ring is full waits, in order. The number of waiting
//! reports is bounded: at the bound, the shard stops the work that causes new ones.

use std::sync::Arc;

use super::{SESSION_MANAGER, Shard};
use crate::domain::command::ShardReport;
use crate::handoff::{Producer, SpillingProducer};
use crate::reactor::counters::ShardCounters;
use crate::uring::Kernel;

/// Waiting reports to the session manager at which the shard stops accepting and receiving. From
/// then on only the ends of existing connections add reports: at most one per slot.
pub const PENDING_REPORTS_MAX: usize = 1024;

/// The report rings. Those to routers are bounded by the events that the shard may have, one report each.
#[derive(Debug)]
pub(super) struct Reports {
    peers: Vec<SpillingProducer<ShardReport>>,
    counters: Arc<ShardCounters>,
    stopped: bool,
}

impl Reports {
    pub(super) fn new(rings: Vec<Producer<ShardReport>>, counters: Arc<ShardCounters>) -> Self {
        let peers = rings.into_iter().map(SpillingProducer::from).collect();
        Self { peers, counters, stopped: false }
    }

    /// Sends a report to this peer, behind the reports that wait.
    pub(super) fn push(&mut self, peer: usize, report: ShardReport) {
        let waits = self.peers[peer].push(report);
        self.counters.counts.reports_delayed.add(u64::from(waits));
    }

    /// Pushes waiting reports as long as they fit, and wakes the peers.
    pub(super) fn publish(&mut self) {
        for (number, peer) in self.peers.iter_mut().enumerate() {
            peer.flush();
            if number == SESSION_MANAGER {
                peer.publish();
            } else {
                // A router does not need a report before its next record. At low rates, waking it
                // would double its wakeups and commit offsets no earlier.
                peer.publish_quietly();
            }
        }
    }

    /// Whether any report waits.
    pub(super) fn has_pending(&self) -> bool {
        self.peers.iter().any(|peer| peer.waiting() > 0)
    }

    /// Whether so many reports wait for the session manager that nothing may cause another.
    pub(super) fn is_backlogged(&self) -> bool {
        self.pending_for_manager() >= PENDING_REPORTS_MAX
    }

    /// Reports to the session manager that wait for room.
    pub(super) fn pending_for_manager(&self) -> usize {
        self.peers[SESSION_MANAGER].waiting()
    }

    /// Whether the end of the shard has been reported or waits to be.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Reports the end of the shard to all peers, behind everything else. Returns whether all
    /// reports are in the rings.
    pub(super) fn stop(&mut self) -> bool {
        if !std::mem::replace(&mut self.stopped, true) {
            for peer in 0..self.peers.len() {
                self.push(peer, ShardReport::Stopped);
            }
            self.publish();
        }
        !self.has_pending()
    }
}

impl<K: Kernel> Shard<K> {
    /// Reports the deliveries that are done.
    pub(super) fn report_done(&mut self) {
        for reply_to in self.tally.take_done() {
            self.reports
                .push(usize::from(reply_to.peer), ShardReport::Done { ticket: reply_to.ticket });
        }
    }
}
