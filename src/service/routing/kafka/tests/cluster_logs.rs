//! Both topics of the cluster as one part of a node. See `real` for the tests that need topics to be created.

use super::logs::{CollectedLog, CollectingReceiver, config};
use super::*;
use crate::service::cluster::ports::NodeEpoch;

pub(super) fn open(brokers: String, names: ClusterTopicNames) -> ClusterLogs {
    ClusterLogs::open(config(brokers), names, ClusterLogMetrics::default()).unwrap()
}

pub(super) fn follow(
    logs: &ClusterLogs,
    epoch: u64,
    log: &Arc<CollectedLog>,
    receiver: &Arc<CollectingReceiver>,
) -> Receiver<TopicsError> {
    let (failures, failed) = channel();
    let parts = ClusterLogParts {
        epoch: NodeEpoch(epoch),
        log: log.clone(),
        receiver: receiver.clone(),
        failed: Box::new(move |error| failures.send(error).unwrap()),
    };
    logs.follow(parts).unwrap();
    failed
}

#[test]
fn node_that_waits_for_brokers_stops_at_once() {
    let logs = open("127.0.0.1:1".into(), ClusterTopicNames::default());
    let failed = follow(&logs, 7, &Arc::default(), &Arc::default());
    until("reason", || logs.missing().is_some_and(|reason| reason.contains('(')));
    assert_eq!(logs.stop(PATIENCE), 0);
    assert!(failed.try_recv().is_err(), "not a failure");
}
