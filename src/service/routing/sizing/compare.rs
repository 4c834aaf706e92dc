//! From how many nodes on `group` costs less than `broadcast`.

use super::{ClusterLoad, GroupCosts, RecordFlow};

/// Clusters up to this size are compared.
pub const NODES_COMPARED_MAX: u32 = 1_000;

/// The least number of nodes from which on `group` costs less than `broadcast`, up to [`NODES_COMPARED_MAX`]. `None`:
/// not with any number of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turning {
    /// Records that a node reads.
    pub records: Option<u32>,
    /// Bytes that a node reads.
    pub bytes: Option<u32>,
    /// CPU of a node.
    pub cpu: Option<u32>,
    /// Bytes per second that the brokers take, replicate and send, together.
    pub brokers: Option<u32>,
}

/// What the brokers do besides storing the events, which is the same in both modes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BrokerCosts {
    /// Written by nodes.
    pub written: RecordFlow,
    /// Bytes per second from broker to broker.
    pub replicated: f64,
    /// Sent to nodes.
    pub sent: RecordFlow,
}

impl BrokerCosts {
    /// Bytes per second on the brokers' network.
    pub fn bytes(&self) -> f64 {
        self.written.bytes + self.replicated + self.sent.bytes
    }
}

impl ClusterLoad {
    /// What the brokers do in `group` mode.
    pub fn brokers_group(&self, group: &GroupCosts) -> BrokerCosts {
        let written = group.hand_offs() + group.sessions();
        let sent = group.read() + self.membership();
        BrokerCosts {
            written,
            replicated: written.bytes * (self.replication - 1.0),
            sent: sent * self.nodes,
        }
    }

    /// What the brokers do in `broadcast` mode.
    pub fn brokers_broadcast(&self) -> BrokerCosts {
        let sent = (self.broadcast().read + self.membership()) * self.nodes;
        BrokerCosts { written: RecordFlow::default(), replicated: 0.0, sent }
    }

    /// This load on another number of nodes, with four partitions of the hand-off topic per node.
    pub fn with_nodes(&self, nodes: u32) -> Self {
        let nodes = f64::from(nodes);
        Self { nodes, hand_off_partitions: 4.0 * nodes, ..self.clone() }
    }

    /// From how many nodes on `group` costs less.
    pub fn turning(&self) -> Turning {
        let mut last = [None; 4];
        // From the largest cluster down, until `group` costs more.
        let mut open = [true; 4];
        for nodes in (2..=NODES_COMPARED_MAX).rev() {
            let load = self.with_nodes(nodes);
            let (group, broadcast) = (load.group(), load.broadcast());
            let brokers = (load.brokers_group(&group).bytes(), load.brokers_broadcast().bytes());
            let pairs = [
                (group.read().records, broadcast.read.records),
                (group.read().bytes, broadcast.read.bytes),
                (group.cpu, broadcast.cpu),
                brokers,
            ];
            for ((open, last), (group, broadcast)) in open.iter_mut().zip(&mut last).zip(pairs) {
                *open &= group < broadcast;
                if *open {
                    *last = Some(nodes);
                }
            }
        }
        let [records, bytes, cpu, brokers] = last;
        Turning { records, bytes, cpu, brokers }
    }
}
