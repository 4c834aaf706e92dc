//! `broadcast`: reads every partition from the end of the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::client::{self, Observer};
use crate::service::routing::kafka::{KafkaStartError, ReaderResources};
use crate::service::routing::router::{Assignment, CommittableOffset, TopicPartition};

/// Timeout of one poll.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Timeout of one request to the brokers.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Largest difference between the clocks of this node and the brokers, ms.
const CLOCK_SKEW_MS: u64 = 5_000;
/// Pause after a failed request.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

pub(super) struct BroadcastContext(Observer);

impl ClientContext for BroadcastContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.error(&error, reason);
    }

    fn stats_raw(&self, json: &[u8]) {
        self.0.statistics(json, |_, _| {});
    }
}

impl ConsumerContext for BroadcastContext {}

pub(super) struct BroadcastReader {
    shared: Arc<ReaderResources>,
    consumer: Arc<BaseConsumer<BroadcastContext>>,
    /// Number of known partitions per topic.
    known: HashMap<String, i32>,
    /// Start of this node minus the clock difference, Unix time in ms.
    started_at_ms: u64,
}

impl BroadcastReader {
    pub(super) fn new(shared: Arc<ReaderResources>) -> Result<Self, KafkaStartError> {
        // librdkafka requires a group. Nothing is committed to it, and no consumer joins it.
        let group = format!("{}.{}", shared.config.group, shared.config.client_id);
        let mut properties = client::consumer_properties(&shared.config, &group);
        properties.set("auto.offset.reset", "latest");
        let properties = client::with_user_properties(properties, &shared.config);
        let context = BroadcastContext(Observer { shared: Arc::clone(&shared) });
        let consumer = Arc::new(BaseConsumer::from_config_and_context(&properties, context)?);
        let started_at_ms = unix_ms().saturating_sub(CLOCK_SKEW_MS);
        Ok(Self { shared, consumer, known: HashMap::new(), started_at_ms })
    }

    pub(super) fn run(mut self) {
        let interval = Duration::from_millis(self.shared.config.discovery_interval_ms);
        let mut next = Instant::now();
        while !self.shared.is_stopping() {
            if Instant::now() >= next {
                let discovered = self.discover();
                if let Err(error) = &discovered {
                    self.shared.discovery_failed(error, !self.known.is_empty());
                }
                next = Instant::now() + if discovered.is_ok() { interval } else { RETRY_PAUSE };
            }
            if let Some(Err(error)) = self.consumer.poll(POLL_TIMEOUT) {
                // The error callback has counted and logged it.
                tracing::debug!(%error, "Kafka");
            }
        }
        self.stop();
    }

    /// Assigns new partitions: at the first discovery from their end, later from the first record
    /// appended since this node started.
    fn discover(&mut self) -> KafkaResult<()> {
        let shared = Arc::clone(&self.shared);
        // All requests are made before the first fetch: a broker answers a connection in order, so a
        // fetch that waits for records delays the requests behind it.
        let mut new = Vec::new();
        let mut counts = Vec::new();
        for topic in &shared.config.topics {
            let count = partition_count(&self.consumer, topic)?;
            let known = self.known.get(topic).copied();
            for partition in known.unwrap_or(0)..count {
                let Some(log) = shared.topic_partition(topic, partition) else { continue };
                let (_, end) = self.consumer.fetch_watermarks(topic, partition, REQUEST_TIMEOUT)?;
                let start = match known {
                    None => end,
                    Some(_) => self.first_since_start(topic, partition)?.unwrap_or(end),
                };
                new.push((log, start, end));
            }
            counts.push((topic.clone(), count.max(known.unwrap_or(0))));
        }
        // After a failure all of them are still new; `assign` skips those already assigned.
        for (log, start, end) in new {
            self.assign(log, start, end)?;
        }
        self.known.extend(counts);
        shared.status.assigned();
        shared.status.reached();
        Ok(())
    }

    /// The first offset appended since this node started. A partition that is new to this node may be
    /// old, because a broker that has just started may list no topics for a moment.
    fn first_since_start(&self, topic: &str, partition: i32) -> KafkaResult<Option<i64>> {
        let mut since = TopicPartitionList::new();
        let started = i64::try_from(self.started_at_ms).unwrap_or(i64::MAX);
        since.add_partition_offset(topic, partition, Offset::Offset(started))?;
        let found = self.consumer.offsets_for_times(since, REQUEST_TIMEOUT)?;
        Ok(match found.find_partition(topic, partition).map(|element| element.offset()) {
            Some(Offset::Offset(offset)) => Some(offset),
            _ => None,
        })
    }

    fn assign(&self, log: TopicPartition, start: i64, end: i64) -> KafkaResult<()> {
        if self.consumer.assignment()?.find_partition(&log.topic, log.partition).is_some() {
            return Ok(());
        }
        let source = self
            .shared
            .source(&self.consumer, &log)
            .ok_or_else(|| KafkaError::Subscription(format!("no queue for {log:?}")))?;
        let mut added = TopicPartitionList::new();
        added.add_partition_offset(&log.topic, log.partition, Offset::Offset(start))?;
        self.consumer.incremental_assign(&added)?;
        let committable = Arc::new(CommittableOffset::new(Some(start)));
        self.shared.status.add_partition(log.clone(), Arc::clone(&committable), Some(end));
        tracing::info!(topic = &*log.topic, partition = log.partition, start, "partition assigned");
        let router = self.shared.router(&log);
        router.assign(Assignment {
            log,
            source: Box::new(source),
            start: Some(start),
            committable,
            ownership: None,
        });
        Ok(())
    }

    /// Waits for records in flight, so that draining sessions receive them.
    fn stop(self) {
        let assigned = self.consumer.assignment().unwrap_or_default();
        let logs = self.shared.topic_partitions(&assigned);
        self.shared.revoke(&logs, self.shared.stop_grace());
    }
}

/// Number of partitions of a topic; 0 if it does not exist (yet).
pub(super) fn partition_count<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
) -> KafkaResult<i32> {
    let metadata = consumer.fetch_metadata(Some(topic), REQUEST_TIMEOUT)?;
    let count = metadata
        .topics()
        .iter()
        .find(|found| found.name() == topic)
        .map_or(0, |found| found.partitions().len());
    Ok(i32::try_from(count).unwrap_or(i32::MAX))
}
