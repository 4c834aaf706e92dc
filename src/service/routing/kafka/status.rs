//! What readiness and the metrics page ask of Kafka.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::service::routing::router::{CommittableOffset, TopicPartition};

/// How far a partition that this node reads is behind its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLag {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// Records appended and not yet done.
    pub lag: u64,
}

/// Written by the Kafka threads, read by the admin port.
#[derive(Debug, Default)]
pub struct KafkaStatus {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    connected: bool,
    following: bool,
    assigned: bool,
    last_error: Option<String>,
    partitions: HashMap<TopicPartition, Partition>,
}

#[derive(Debug)]
struct Partition {
    committable: Arc<CommittableOffset>,
    /// The partition's end as last heard.
    end: Option<i64>,
}

impl KafkaStatus {
    /// What is missing for this node to read events; `None`: nothing.
    pub fn missing(&self) -> Option<String> {
        let state = self.state();
        let what = if !state.connected {
            "no broker reached"
        } else if !state.following {
            "the membership topics are not read yet"
        } else if !state.assigned {
            "no partitions assigned yet"
        } else {
            return None;
        };
        Some(match &state.last_error {
            Some(error) => format!("{what} ({error})"),
            None => what.to_owned(),
        })
    }

    /// The lag of each partition that this node reads and of which the end is known.
    pub fn lags(&self) -> Vec<PartitionLag> {
        let state = self.state();
        let lags = state.partitions.iter().filter_map(|(log, partition)| {
            let behind = partition.end? - partition.committable.get()?;
            let lag = u64::try_from(behind).unwrap_or(0);
            Some(PartitionLag { topic: Arc::clone(&log.topic), partition: log.partition, lag })
        });
        lags.collect()
    }

    /// Partitions that this node reads.
    pub fn partitions(&self) -> usize {
        self.state().partitions.len()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    pub(super) fn reached(&self) {
        let mut state = self.state();
        state.connected = true;
        state.last_error = None;
    }

    pub(super) fn unreachable(&self, reason: String) {
        let mut state = self.state();
        state.connected = false;
        state.last_error = Some(reason);
    }

    /// As [`KafkaStatus::unreachable`]; returns whether the reason is a new one.
    pub(super) fn cannot_begin(&self, reason: String) -> bool {
        let mut state = self.state();
        state.connected = false;
        state.last_error.replace(reason.clone()) != Some(reason)
    }

    pub(super) fn following(&self, following: bool) {
        self.state().following = following;
    }

    /// The node has been told what it reads, which may be nothing.
    pub(super) fn assigned(&self) {
        self.state().assigned = true;
    }

    pub(super) fn unassigned(&self) {
        self.state().assigned = false;
    }

    pub(super) fn reads(
        &self,
        log: TopicPartition,
        committable: Arc<CommittableOffset>,
        end: Option<i64>,
    ) {
        self.state().partitions.insert(log, Partition { committable, end });
    }

    pub(super) fn reads_no_more(&self, log: &TopicPartition) {
        self.state().partitions.remove(log);
    }

    pub(super) fn ends_at(&self, log: &TopicPartition, end: i64) {
        if let Some(partition) = self.state().partitions.get_mut(log) {
            partition.end = Some(end);
        }
    }

    pub(super) fn stopped(&self) {
        *self.state() = State { last_error: Some("stopped".into()), ..State::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_names_the_first_thing_missing() {
        let status = KafkaStatus::default();
        assert!(status.missing().unwrap().contains("no broker"));
        status.reached();
        assert!(status.missing().unwrap().contains("membership"));
        status.following(true);
        assert!(status.missing().unwrap().contains("no partitions"));
        status.assigned();
        assert_eq!(status.missing(), None);
        status.unreachable("connection refused".into());
        assert_eq!(status.missing().unwrap(), "no broker reached (connection refused)");
    }

    #[test]
    fn lag_is_what_is_not_done() {
        let status = KafkaStatus::default();
        let log = TopicPartition { topic: "t".into(), topic_index: 0, partition: 2 };
        let committable = Arc::new(CommittableOffset::new(Some(5)));
        status.reads(log.clone(), Arc::clone(&committable), None);
        assert_eq!(status.lags(), []);
        status.ends_at(&log, 9);
        assert_eq!(status.lags()[0].lag, 4);
        status.ends_at(&log, 3);
        assert_eq!(status.lags()[0].lag, 0, "heard before the last records were read");
        status.reads_no_more(&log);
        assert_eq!(status.lags(), []);
    }
}
