//! The records of the sessions topic for a made-up cluster.

use delivery::service::members::beginnings::Beginnings;
use std::sync::Arc;

use delivery::service::cluster::holder::SessionSerial;
use delivery::service::cluster::nodes::EpochEnd;
use delivery::service::cluster::ports::{NodeEpoch, SessionsLog, SessionsRecord};
use delivery::service::cluster::table::{SessionTable, TableConfig, TableListener};
use delivery::service::cluster::wire::{
    Lease, PartitionPosition, SessionBegun, SessionsKey, TopicPositions,
};
use prost::Message as _;

use crate::names::{device, user};

/// The topic of events.
pub(super) const TOPIC: &str = "conversation.events.v1";
/// Partitions of the topic that each node owns.
const OWNED: i32 = 4;

/// The epoch of node `number`.
pub(super) fn epoch(number: usize) -> NodeEpoch {
    NodeEpoch(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(number as u64 + 1))
}

/// The key and the value of a lease.
pub(super) fn lease(node: usize) -> (SessionsKey, Vec<u8>) {
    let key = SessionsKey { epoch: epoch(node).0, ..SessionsKey::default() };
    let position = |partition| PartitionPosition {
        parked: Vec::new(),
        partition,
        next: 1 << 35,
        generation: 1 << 40,
        check: 1 << 31,
    };
    let routed = TopicPositions {
        topic: TOPIC.into(),
        partitions: (0..OWNED).map(|it| position(node as i32 * OWNED + it)).collect(),
    };
    let lease = Lease {
        instance: format!("delivery-7d9c5b6f4-{node:05}"),
        hand_off_partition: node as i32,
        version: "0.1.0".into(),
        host: format!("delivery-7d9c5b6f4-{node:05}"),
        routed: vec![routed],
        ..Lease::default()
    };
    (key, lease.encode_to_vec())
}

/// The key and the value of the beginning of session `number`, one of `nodes` nodes.
pub(super) fn begun(number: usize, nodes: usize) -> (SessionsKey, Vec<u8>) {
    let key =
        SessionsKey { epoch: epoch(number % nodes).0, user: user(number), device: device(number) };
    let begun = SessionBegun { serial: 5_000_000, as_of: 50_000_000_000 };
    (key, begun.encode_to_vec())
}

struct Deaf;

impl TableListener for Deaf {
    fn begun(&self, _: SessionSerial, _: i64) {}
    fn replaced(&self, _: &str, _: &str, _: SessionSerial) {}
    fn ended(&self, _: EpochEnd, _: Option<&Lease>) {}
}

/// A table that keeps newcomers for `TAIL_AGE`, as by default.
pub(super) fn table() -> Arc<SessionTable> {
    let config = TableConfig {
        topics: vec![TOPIC.into()],
        node_timeout_ms: 60_000,
        newcomers_age_ms: 300_000,
        beginnings_max: Beginnings::KEPT_MAX,
    };
    Arc::new(SessionTable::new(config, Arc::new(Deaf), Arc::default()))
}

/// Applies `sessions` beginnings on `nodes` nodes, with leases every 2 s at 5,000 beginnings a second. Calls
/// `batch` for every 100,000 records, with a function that applies them.
pub(super) fn fill(
    table: &SessionTable,
    sessions: usize,
    nodes: usize,
    mut batch: impl FnMut(usize, &mut dyn FnMut()),
) {
    const BATCH: usize = 100_000;
    let mut offset = 0;
    for from in (0..sessions).step_by(BATCH) {
        let mut records = Vec::with_capacity(BATCH + 100);
        for number in from..sessions.min(from + BATCH) {
            if number % 10_000 == 0 {
                records.extend((0..nodes).map(|node| (number, lease(node))));
            }
            records.push((number, begun(number, nodes)));
        }
        let records: Vec<_> = records
            .into_iter()
            .map(|(number, (key, value))| (number, key.encode_to_vec(), value))
            .collect();
        let count = records.len();
        batch(count, &mut || {
            for (number, key, value) in &records {
                let record = SessionsRecord {
                    offset,
                    appended_at_ms: *number as i64 / 5,
                    key: SessionsKey::decode(&**key).ok(),
                    value: Some(value.clone().into()),
                };
                table.record(record);
                offset += 1;
            }
        });
        table.read_to(offset);
    }
}
