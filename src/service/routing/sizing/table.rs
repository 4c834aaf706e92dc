//! The table of sessions in memory, and the sessions topic that a starting node reads.

use super::ClusterLoad;
use crate::service::cluster::nodes::RENEWAL_MS;
use crate::service::cluster::table::{PARTS, SLOT_BYTES};

/// Memory of the table with this many sessions, bytes. Each of its parts doubles when seven eighths are in use.
pub fn table_bytes(sessions: f64) -> f64 {
    let slots = (sessions / PARTS as f64 * 8.0 / 7.0).ceil().max(4.0) as u64;
    (PARTS * SLOT_BYTES) as f64 * slots.next_power_of_two() as f64
}

/// What the sessions topic keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SessionsTopic {
    /// For how long it is not compacted, s: at most `max.compaction.lag.ms`.
    pub uncompacted_s: f64,
    /// How long the ends of sessions are kept after that, s: `delete.retention.ms`.
    pub ends_kept_s: f64,
}

/// The content of the sessions topic, records.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopicRecords {
    /// Beginnings of sessions that have not ended.
    pub begun: f64,
    /// Ends that are kept.
    pub ended: f64,
    /// Records that are not compacted yet.
    pub uncompacted: f64,
}

impl TopicRecords {
    /// All.
    pub fn total(self) -> f64 {
        self.begun + self.ended + self.uncompacted
    }
}

impl ClusterLoad {
    /// What a starting node reads from the sessions topic.
    ///
    /// One end is kept for each device and node on which it had a session that ended in that time. A device is taken to
    /// connect again at once, to any node.
    pub fn sessions_topic(&self) -> TopicRecords {
        let SessionsTopic { uncompacted_s, ends_kept_s } = self.sessions_topic;
        let devices = self.sessions_online();
        let sessions_of_a_device = self.connects / devices * ends_kept_s;
        let nodes_left = (self.nodes - 1.0) * (1.0 - (-sessions_of_a_device / self.nodes).exp());
        let leases = self.nodes * 1_000.0 / RENEWAL_MS as f64;
        TopicRecords {
            begun: devices,
            ended: devices * nodes_left,
            uncompacted: (2.0 * self.connects + leases) * uncompacted_s,
        }
    }

    /// Time until a new node has read the sessions topic, s.
    pub fn ready_s(&self) -> f64 {
        self.sessions_topic().total() * self.unit_costs.ready_s
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prost::Message as _;

    use super::*;
    use crate::service::cluster::holder::SessionSerial;
    use crate::service::cluster::nodes::EpochEnd;
    use crate::service::cluster::ports::{SessionsLog as _, SessionsRecord};
    use crate::service::cluster::table::{SessionTable, TableConfig, TableListener};
    use crate::service::cluster::wire::{Lease, SessionBegun, SessionsKey};

    struct Deaf;

    impl TableListener for Deaf {
        fn begun(&self, _: SessionSerial, _: i64) {}
        fn replaced(&self, _: &str, _: &str, _: SessionSerial) {}
        fn ended(&self, _: EpochEnd, _: Option<&Lease>) {}
    }

    #[test]
    fn parts_of_the_table_double() {
        let part = (PARTS * SLOT_BYTES) as f64;
        // At most seven eighths of the slots are used: 57,344 of 65,536.
        assert_eq!(table_bytes(57_344.0 * 256.0), 65_536.0 * part);
        assert_eq!(table_bytes(57_345.0 * 256.0), 131_072.0 * part);
    }

    #[test]
    fn computed_memory_is_that_of_the_table() {
        let config = TableConfig {
            topics: Vec::new(),
            node_timeout_ms: 60_000,
            newcomers_age_ms: 10_000,
            beginnings_max: 1,
        };
        let table = SessionTable::new(config, Arc::new(Deaf), Arc::default());
        // Between 896 and 1,792 entries in each part, however the hash falls.
        let sessions = 1_300 * PARTS as i64;
        for offset in 0..sessions {
            let key = SessionsKey { epoch: 1, user: offset.to_string(), device: "d".into() };
            let begun = SessionBegun { serial: 1, as_of: 0 };
            let value = Some(begun.encode_to_vec().into());
            table.record(SessionsRecord { offset, appended_at_ms: offset, key: Some(key), value });
        }
        let ratio = table.bytes() as f64 / table_bytes(sessions as f64);
        assert!((ratio - 1.0).abs() < 0.01, "{} B, computed {ratio} of it", table.bytes());
    }
}
