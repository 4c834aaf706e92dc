//! What a router does for its lanes besides routing.

use super::Router;
use crate::service::routing::router::claim::LaneClaim;
use crate::service::routing::router::in_flight::LaneKey;

/// Time between two rounds in which what is too old leaves the tails of quiet partitions, ms.
const TRIM_INTERVAL_MS: u64 = 1_000;

impl Router {
    /// Drops what is too old, also where no record arrives.
    pub(super) fn trim_tails(&mut self, now_ms: u64) {
        if now_ms < self.trimmed_at_ms {
            return;
        }
        self.trimmed_at_ms = now_ms + TRIM_INTERVAL_MS;
        let partitions = self.lanes.iter_mut().filter_map(|(_, lane)| lane.partition.as_mut());
        partitions.filter_map(|it| it.tail.as_mut()).for_each(|tail| tail.tail.trim(now_ms));
    }

    pub(super) fn replay_stored(&mut self, key: LaneKey) {
        let lane = self.lanes.get_mut(key.slot()).filter(|lane| lane.key == key);
        let claim = lane.and_then(|lane| lane.partition.as_mut()?.claim.as_mut());
        if let Some(claim) = claim {
            claim.replay_stored();
        }
    }

    pub(super) fn loss_stored(&mut self, key: LaneKey) {
        let lane = self.lanes.get_mut(key.slot()).filter(|lane| lane.key == key);
        let Some(partition) = lane.and_then(|lane| lane.partition.as_mut()) else { return };
        if partition.claim.as_mut().is_some_and(LaneClaim::loss_stored) {
            partition.committable.set(partition.window.committable());
        }
    }
}
