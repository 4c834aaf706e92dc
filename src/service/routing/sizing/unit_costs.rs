//! What single operations cost, as `bench/cluster` measured them.

use super::{ClusterLoad, GroupCosts};

/// CPU time of single operations. Measured on one machine (`docs/sizing.md` says which): another one differs, so
/// measure there what matters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnitCosts {
    /// To read a record from Kafka, to decode it and to find its members, s.
    pub route_s: f64,
    /// To look for a member among the sessions of the node, s.
    pub member_s: f64,
    /// To look for a member among the sessions of all nodes besides, and to name it to its node, s.
    pub remote_member_s: f64,
    /// To write a hand-off, s.
    pub hand_off_s: f64,
    /// To read a hand-off to this node, s.
    pub take_s: f64,
    /// To read and skip a hand-off to another node, s.
    pub skip_s: f64,
    /// To read a record of the sessions topic and to apply it, s.
    pub session_s: f64,
    /// A reader that has something to do in every millisecond, cores.
    pub reader: f64,
    /// A producer that has something to do in every millisecond, cores.
    pub writer: f64,
    /// Time, not CPU time, in which a starting node reads and applies a record of the sessions topic, s.
    pub ready_s: f64,
}

impl Default for UnitCosts {
    fn default() -> Self {
        Self {
            route_s: 2.2e-6,
            member_s: 75e-9,
            remote_member_s: 560e-9,
            hand_off_s: 5.7e-6,
            take_s: 1.4e-6,
            skip_s: 1.15e-6,
            session_s: 2.5e-6,
            reader: 0.095,
            writer: 0.3,
            ready_s: 2.75e-6,
        }
    }
}

/// The share of the milliseconds in which something happens that happens this often per second.
fn busy(per_second: f64) -> f64 {
    1.0 - (-per_second / 1_000.0).exp()
}

impl UnitCosts {
    /// Those of a machine that takes `factor` times as long.
    pub fn times(self, factor: f64) -> Self {
        Self {
            route_s: self.route_s * factor,
            member_s: self.member_s * factor,
            remote_member_s: self.remote_member_s * factor,
            hand_off_s: self.hand_off_s * factor,
            take_s: self.take_s * factor,
            skip_s: self.skip_s * factor,
            session_s: self.session_s * factor,
            reader: self.reader * factor,
            writer: self.writer * factor,
            ready_s: self.ready_s * factor,
        }
    }

    /// CPU of a node in `group` mode, cores.
    pub(super) fn group(&self, load: &ClusterLoad, costs: &GroupCosts) -> f64 {
        let members = load.records / load.nodes * load.members();
        let named: f64 =
            costs.sizes.iter().map(|it| load.rate_of(it.size) * it.hand_offs * it.named).sum();
        let hand_offs = costs.hand_offs().records / load.nodes;
        let own_sessions = costs.sessions().records / load.nodes;
        let hand_offs_read = costs.read_own.records + costs.read_foreign.records;
        self.reader
            * (busy(costs.read_source.records)
                + busy(hand_offs_read)
                + busy(costs.read_sessions.records))
            + self.writer * (busy(hand_offs) + busy(own_sessions))
            + costs.read_source.records * self.route_s
            + members * (self.member_s + self.remote_member_s)
            + hand_offs * self.hand_off_s
            + costs.read_own.records * self.take_s
            + named / load.nodes * self.member_s
            + costs.read_foreign.records * self.skip_s
            + costs.read_sessions.records * self.session_s
    }

    /// CPU of a node in `broadcast` mode, cores.
    pub(super) fn broadcast(&self, load: &ClusterLoad) -> f64 {
        self.reader * busy(load.records)
            + load.records * (self.route_s + load.members() * self.member_s)
    }
}
