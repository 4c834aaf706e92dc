//! The state of the Kafka consumers, for readiness and metrics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::service::routing::kafka::catalogue::TopicTrouble;
use crate::service::routing::router::{CommittableOffset, TailFill, TopicPartition};

/// The lag of a partition that this node reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLag {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition.
    pub partition: i32,
    /// End offset minus committable offset, records.
    pub lag: u64,
}

/// The state of the Kafka consumers. Written by the Kafka threads, read by the admin port.
#[derive(Debug, Default)]
pub struct KafkaStatus {
    state: Mutex<ConsumerState>,
}

#[derive(Debug, Default)]
struct ConsumerState {
    connected: bool,
    following: bool,
    assigned: bool,
    /// When partitions were assigned first.
    assigned_at: Option<Instant>,
    /// The tails are filled, or were waited for long enough. Those of partitions that are assigned later are not
    /// waited for.
    filled: bool,
    last_error: Option<String>,
    /// The topics of events that cannot be read.
    troubles: Vec<(Arc<str>, TopicTrouble)>,
    partitions: HashMap<TopicPartition, PartitionState>,
}

/// Where a partition ends, for its lag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PartitionEnd {
    /// The offset behind the last one.
    At(i64),
    /// Behind the last record that its router has taken. What the log has there is nothing that a reader gets: markers
    /// of transactions, and records of those that were aborted.
    Taken,
}

#[derive(Debug)]
struct PartitionState {
    committable: Arc<CommittableOffset>,
    /// The last known end offset.
    end: Option<PartitionEnd>,
    /// Whether its tail is filled. `None`: it has none.
    filled: Option<Arc<AtomicBool>>,
}

/// How long readiness waits for the tails at most, from the first assignment on: a partition without a leader must not
/// keep the node from serving the others.
const FILL_WAIT_MAX: Duration = Duration::from_secs(30);

impl ConsumerState {
    /// Notes whether all tails are filled, and returns whether they were once. Live events wait until the tail of their
    /// partition is filled, so no client should come before.
    fn note_filled(&mut self) -> bool {
        let is_late = self.assigned_at.is_some_and(|at| at.elapsed() >= FILL_WAIT_MAX);
        let mut filled = self.partitions.values().filter_map(|it| it.filled.as_ref());
        self.filled |= is_late || filled.all(|filled| filled.load(Ordering::Acquire));
        self.filled
    }
}

impl KafkaStatus {
    /// Why this node does not consume events; `None`: it does.
    pub fn missing(&self) -> Option<String> {
        let mut state = self.state();
        let what = if !state.connected {
            "no broker reached"
        } else if !state.troubles.is_empty() {
            let topics = state.troubles.iter().map(|(topic, trouble)| trouble.of(topic));
            return Some(format!("KAFKA_TOPICS: {}", topics.collect::<Vec<_>>().join(", ")));
        } else if !state.following {
            "the membership topics are not read yet"
        } else if !state.assigned {
            "no partitions assigned yet"
        } else if !state.note_filled() {
            "the events of the last minutes are not read yet"
        } else {
            return None;
        };
        Some(match &state.last_error {
            Some(error) => format!("{what} ({error})"),
            None => what.to_owned(),
        })
    }

    /// The lag of each partition whose end offset is known.
    pub fn lags(&self) -> Vec<PartitionLag> {
        let state = self.state();
        let lags = state.partitions.iter().filter_map(|(log, partition)| {
            let end = match partition.end? {
                PartitionEnd::At(end) => end,
                PartitionEnd::Taken => partition.committable.next(),
            };
            let behind = end - partition.committable.get()?;
            let lag = u64::try_from(behind).unwrap_or(0);
            Some(PartitionLag { topic: Arc::clone(&log.topic), partition: log.partition, lag })
        });
        lags.collect()
    }

    /// The topics of events that cannot be read, and why.
    pub fn troubles(&self) -> Vec<(Arc<str>, TopicTrouble)> {
        self.state().troubles.clone()
    }

    /// Partitions that this node reads.
    pub fn partitions(&self) -> usize {
        self.state().partitions.len()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, ConsumerState> {
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

    /// Like [`KafkaStatus::unreachable`]. Returns whether the reason is new.
    pub(super) fn cannot_start(&self, reason: String) -> bool {
        let mut state = self.state();
        state.connected = false;
        state.last_error.replace(reason.clone()) != Some(reason)
    }

    pub(super) fn set_troubles(&self, troubles: Vec<(Arc<str>, TopicTrouble)>) {
        self.state().troubles = troubles;
    }

    pub(super) fn set_following(&self, following: bool) {
        self.state().following = following;
    }

    /// The partitions of this node are known. There may be none.
    pub(super) fn assigned(&self) {
        let mut state = self.state();
        state.assigned = true;
        state.assigned_at.get_or_insert_with(Instant::now);
    }

    pub(super) fn unassigned(&self) {
        self.state().assigned = false;
    }

    pub(super) fn add_partition(
        &self,
        log: TopicPartition,
        committable: Arc<CommittableOffset>,
        end: Option<i64>,
        fill: Option<&TailFill>,
    ) {
        let filled = fill.map(|fill| Arc::clone(&fill.filled));
        self.state()
            .partitions
            .insert(log, PartitionState { committable, end: end.map(PartitionEnd::At), filled });
    }

    pub(super) fn remove_partition(&self, log: &TopicPartition) {
        self.state().partitions.remove(log);
    }

    pub(super) fn set_end_offset(&self, log: &TopicPartition, end: PartitionEnd) {
        if let Some(partition) = self.state().partitions.get_mut(log) {
            partition.end = Some(end);
        }
    }

    pub(super) fn stopped(&self) {
        *self.state() =
            ConsumerState { last_error: Some("stopped".into()), ..ConsumerState::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_names_the_first_missing_condition() {
        let status = KafkaStatus::default();
        assert!(status.missing().unwrap().contains("no broker"));
        status.reached();
        status.set_troubles(vec![
            ("a".into(), TopicTrouble::Missing),
            ("b".into(), TopicTrouble::Forbidden),
        ]);
        assert_eq!(
            status.missing().unwrap(),
            "KAFKA_TOPICS: the topic a does not exist, this node may not read the topic b"
        );
        status.set_troubles(Vec::new());
        assert!(status.missing().unwrap().contains("membership"));
        status.set_following(true);
        assert!(status.missing().unwrap().contains("no partitions"));
        let log = TopicPartition { topic: "a".into(), topic_index: 0, partition: 0 };
        let fill = TailFill::new(5);
        status.add_partition(log, Arc::new(CommittableOffset::new(None)), None, Some(&fill));
        status.assigned();
        assert!(status.missing().unwrap().contains("last minutes"));
        fill.filled.store(true, Ordering::Release);
        assert_eq!(status.missing(), None);
        fill.filled.store(false, Ordering::Release);
        assert_eq!(status.missing(), None, "of a partition that is assigned later");
        status.unreachable("connection refused".into());
        assert_eq!(status.missing().unwrap(), "no broker reached (connection refused)");
    }

    #[test]
    fn lag_counts_the_records_that_are_not_done() {
        let status = KafkaStatus::default();
        let log = TopicPartition { topic: "t".into(), topic_index: 0, partition: 2 };
        let committable = Arc::new(CommittableOffset::new(Some(5)));
        status.add_partition(log.clone(), Arc::clone(&committable), None, None);
        assert_eq!(status.lags(), []);
        status.set_end_offset(&log, PartitionEnd::At(9));
        assert_eq!(status.lags()[0].lag, 4);
        status.set_end_offset(&log, PartitionEnd::At(3));
        assert_eq!(status.lags()[0].lag, 0, "an end offset older than the last records");
        status.set_end_offset(&log, PartitionEnd::Taken);
        committable.set_next(7);
        assert_eq!(status.lags()[0].lag, 2, "taken, and not done");
        status.remove_partition(&log);
        assert_eq!(status.lags(), []);
    }
}
