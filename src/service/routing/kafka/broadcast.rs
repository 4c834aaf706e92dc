//! `broadcast`: reads every partition from the end of the log, and those that appear later from their start
//! ([`catalogue`](super::catalogue)).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::catalogue::{KnownPartition, Origin, REQUEST_TIMEOUT};
use crate::service::routing::kafka::client::{self, Observer};
use crate::service::routing::kafka::source::SourceState;
use crate::service::routing::kafka::starts::{self, LogBounds, StartRule};
use crate::service::routing::kafka::{KafkaStartError, ReaderResources};
use crate::service::routing::router::{Assignment, CommittableOffset, TailFill, TopicPartition};

/// Timeout of one poll.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Pause after a failed request.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long a partition that is assigned again waits for its records in flight.
const REVOKE_GRACE: Duration = Duration::from_millis(100);

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

/// A partition that is read.
struct ReadPartition {
    incarnation: u64,
    source: Arc<SourceState>,
    committable: Arc<CommittableOffset>,
}

/// A partition to be read.
struct NextPartition {
    log: TopicPartition,
    incarnation: u64,
    rule: StartRule,
    bounds: LogBounds,
}

pub(super) struct BroadcastReader {
    shared: Arc<ReaderResources>,
    consumer: Arc<BaseConsumer<BroadcastContext>>,
    read: HashMap<TopicPartition, ReadPartition>,
}

impl BroadcastReader {
    pub(super) fn new(shared: Arc<ReaderResources>) -> Result<Self, KafkaStartError> {
        // librdkafka requires a group. Nothing is committed to it, and no consumer joins it.
        let group = format!("{}.{}", shared.config.group, shared.config.client_id);
        let properties = client::consumer_properties(&shared.config, &group);
        let mut properties = client::with_user_properties(properties, &shared.config);
        // A position that is not in the log: see `mend`.
        properties.set("auto.offset.reset", "error");
        // A tail is filled when the end is reached, also if the last offsets hold no record.
        properties.set("enable.partition.eof", "true");
        let context = BroadcastContext(Observer { shared: Arc::clone(&shared) });
        let consumer = Arc::new(BaseConsumer::from_config_and_context(&properties, context)?);
        Ok(Self { shared, consumer, read: HashMap::new() })
    }

    pub(super) fn run(mut self) {
        let mut next = Instant::now();
        while !self.shared.is_stopping() {
            if Instant::now() >= next {
                next = Instant::now() + RETRY_PAUSE;
                if let Err(error) = self.discover() {
                    self.shared.discovery_failed(&error, !self.read.is_empty());
                }
            }
            self.mend();
            if let Some(Err(error)) = self.consumer.poll(POLL_TIMEOUT) {
                // The error callback has counted and logged it.
                tracing::debug!(%error, "Kafka");
            }
        }
        self.stop();
    }

    /// Reads the partitions that the catalogue has and this node does not read, and no longer those that it
    /// has not.
    fn discover(&mut self) -> KafkaResult<()> {
        let shared = Arc::clone(&self.shared);
        for (log, read) in &self.read {
            // A log that ends before the position is another one.
            if let Some(position) = read.committable.get() {
                shared.catalogue.reached(log, read.incarnation, position);
            }
            shared.catalogue.set_refused(log, read.source.is_refused());
        }
        shared.look(&self.consumer)?;
        if !shared.catalogue.is_complete() {
            return Ok(());
        }
        let known = shared.catalogue.partitions();
        let is_current = |log: &TopicPartition, read: &ReadPartition| {
            let mut known = known.iter();
            known.any(|known| known.log == *log && known.incarnation == read.incarnation)
        };
        let outdated = self.read.iter().filter(|(log, read)| !is_current(log, read));
        let outdated: Vec<_> = outdated.map(|(log, _)| log.clone()).collect();
        outdated.iter().try_for_each(|log| self.release(log).map(drop))?;
        let new: Vec<_> =
            known.into_iter().filter(|known| !self.read.contains_key(&known.log)).collect();
        self.assign_new(new)?;
        shared.status.assigned();
        Ok(())
    }

    fn assign_new(&mut self, new: Vec<KnownPartition>) -> KafkaResult<()> {
        if new.is_empty() {
            return Ok(());
        }
        let logs: Vec<_> = new.iter().map(|known| known.log.clone()).collect();
        let bounds = starts::bounds(&self.consumer, &logs, REQUEST_TIMEOUT)?;
        let next = new.into_iter().filter_map(|KnownPartition { log, origin, incarnation }| {
            let bounds = *bounds.get(&log)?;
            let rule = match origin {
                Origin::Old => StartRule::End,
                Origin::New => StartRule::Start,
                Origin::Since(ms) => StartRule::Since(ms),
            };
            Some(NextPartition { log, incarnation, rule, bounds })
        });
        self.assign_all(next.collect())
    }

    /// Starts to read these partitions. All requests are made before the first fetch: a broker answers a
    /// connection in order, so a fetch that waits for records delays the requests behind it.
    fn assign_all(&mut self, all: Vec<NextPartition>) -> KafkaResult<()> {
        let rules: Vec<_> = all.iter().map(|it| (it.log.clone(), it.rule, it.bounds)).collect();
        let chosen = starts::choose(&self.consumer, &rules, REQUEST_TIMEOUT)?;
        let known = all.iter().filter_map(|it| Some((&it.log, *chosen.get(&it.log)?)));
        let starts: Vec<_> = known.collect();
        let fill_from =
            self.shared.fill_from(&self.consumer, &starts, self.read.len() + starts.len());
        let starts: Vec<_> = starts.into_iter().map(|(log, start)| (log.clone(), start)).collect();
        for ((log, start), fill_from) in starts.into_iter().zip(fill_from) {
            let next = all.iter().find(|it| it.log == log).expect("one of them");
            self.assign(log, (fill_from, start), next.bounds.end, next.incarnation)?;
        }
        Ok(())
    }

    fn assign(
        &mut self,
        log: TopicPartition,
        (fill_from, start): (i64, i64),
        end: i64,
        incarnation: u64,
    ) -> KafkaResult<()> {
        let source = self
            .shared
            .source(&self.consumer, &log)
            .ok_or_else(|| KafkaError::Subscription(format!("no queue for {log:?}")))?;
        let mut added = TopicPartitionList::new();
        added.add_partition_offset(&log.topic, log.partition, Offset::Offset(fill_from))?;
        self.consumer.incremental_assign(&added)?;
        let committable = Arc::new(CommittableOffset::new(Some(start)));
        let (fill, counted) = (TailFill::new(fill_from), Arc::clone(&committable));
        self.shared.status.add_partition(log.clone(), counted, Some(end), Some(&fill));
        tracing::info!(topic = &*log.topic, partition = log.partition, start, "partition assigned");
        let read = ReadPartition {
            incarnation,
            source: Arc::clone(source.state()),
            committable: Arc::clone(&committable),
        };
        self.read.insert(log.clone(), read);
        let router = self.shared.router(&log);
        router.assign(Assignment {
            log,
            source: Box::new(source),
            start: Some(start),
            fill: Some(fill),
            committable,
            ownership: None,
        });
        Ok(())
    }

    /// Takes a partition back from its router. Returns the lowest offset that is not done.
    fn release(&mut self, log: &TopicPartition) -> KafkaResult<Option<i64>> {
        self.shared.revoke(std::slice::from_ref(log), REVOKE_GRACE);
        let mut removed = TopicPartitionList::new();
        removed.add_partition(&log.topic, log.partition);
        self.consumer.incremental_unassign(&removed)?;
        let read = self.read.remove(log);
        tracing::info!(topic = &*log.topic, partition = log.partition, "partition released");
        Ok(read.and_then(|read| read.committable.get()))
    }

    /// Reads on where it is possible if the position is not in the log.
    fn mend(&mut self) {
        let lost = self.read.iter().filter(|(_, read)| read.source.is_lost());
        let logs: Vec<_> = lost.map(|(log, _)| log.clone()).collect();
        if logs.is_empty() {
            return;
        }
        if let Err(error) = self.mend_all(&logs)
            && let Some(again) = self.shared.errors.failed(tokio::time::Instant::now())
        {
            tracing::warn!(%error, "cannot find the start of a partition; retrying{again}");
            std::thread::sleep(POLL_TIMEOUT);
        }
    }

    fn mend_all(&mut self, logs: &[TopicPartition]) -> KafkaResult<()> {
        let bounds = starts::bounds(&self.consumer, logs, REQUEST_TIMEOUT)?;
        for log in logs {
            let (Some(&bounds), Some(read)) = (bounds.get(log), self.read.get(log)) else {
                continue;
            };
            let (incarnation, position) = (read.incarnation, read.committable.get());
            let position = position.unwrap_or(bounds.start);
            let (rule, gone) = bounds.resume(position, unix_ms());
            let is_other = position > bounds.end;
            // Before the first record behind the gap is read.
            if let Some(gone) = gone.filter(|_| !is_other) {
                self.shared.lost_records(log, gone);
            }
            if is_other {
                // `discover` reports it, and reads the other log.
                self.shared.catalogue.reached(log, incarnation, position);
                self.shared.catalogue.look_soon();
                self.shared.look(&self.consumer)?;
                continue;
            }
            self.release(log)?;
            let log = log.clone();
            self.assign_all(vec![NextPartition { log, incarnation, rule, bounds }])?;
        }
        Ok(())
    }

    /// Waits for records in flight, so that draining sessions receive them.
    fn stop(self) {
        let assigned = self.consumer.assignment().unwrap_or_default();
        let logs = self.shared.topic_partitions(&assigned);
        self.shared.revoke(&logs, self.shared.stop_grace());
    }
}
