//! A claimed partition whose node is behind.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use crate::service::cluster::holder::SessionSerial;
use crate::service::routing::router::claim::{LaneClaim, Ownership};
use crate::service::routing::router::{CommittableTable, RouterCounters, TopicPartition};

#[test]
fn partition_is_held_back_until_hand_offs_and_table_are_there() {
    let log = TopicPartition { topic: "events".into(), topic_index: 0, partition: 3 };
    let counters = Arc::<RouterCounters>::default();
    let claim = || {
        let ownership = Ownership {
            generation: 2,
            start: 100,
            table: 50,
            barrier: 20,
            settled: Arc::new(CommittableTable::new(50)),
            routed: Arc::new(AtomicI64::new(100)),
            lost_from: None,
        };
        LaneClaim::new(ownership, SessionSerial(0))
    };
    let held_back = || counters.partitions_held_back.get();
    let mut first = claim();
    for (now_ms, read) in [(1_000, (0, 0)), (2_000, (19, 50)), (20_000, (20, 49))] {
        assert!(!first.may_take(&log, read, now_ms, &counters), "{read:?}");
        assert_eq!(held_back(), 1);
    }
    let mut second = claim();
    assert!(!second.may_take(&log, (0, 0), 0, &counters));
    assert_eq!(held_back(), 2);
    assert!(first.may_take(&log, (20, 50), 21_000, &counters));
    assert_eq!(held_back(), 1);
    // The table is read again.
    assert!(!first.may_take(&log, (21, 0), 22_000, &counters));
    assert_eq!(held_back(), 2);
    drop((first, second));
    assert_eq!(held_back(), 0);
}
