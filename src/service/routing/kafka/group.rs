//! `group`: reads the partitions that the consumer group assigns to this node, and commits offsets.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::base_consumer::BaseConsumer;
use rdkafka::consumer::{CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::Message as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;

use crate::service::routing::kafka::client::{self, Observer};
use crate::service::routing::kafka::{KafkaStartError, ReaderResources};
use crate::service::routing::router::{Assignment, CommittableOffset, TopicPartition};

/// Timeout of one poll.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Timeout of one request to the brokers during a rebalance, while the group waits for this node.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Polls before leaving the group, at most. Each ends early if a rebalance interrupts it.
const SETTLE_POLLS_MAX: u32 = 10;

/// A partition assigned to this node.
struct OwnedPartition {
    committable: Arc<CommittableOffset>,
    /// The last offset sent to the broker for commit. Commits are asynchronous; the statistics show
    /// what the broker has accepted.
    sent: Option<i64>,
}

pub(super) struct GroupContext {
    observer: Observer,
    /// Set once, after the consumer is created. The callbacks split partition queues off it.
    consumer: OnceLock<Weak<BaseConsumer<GroupContext>>>,
    owned: Mutex<HashMap<TopicPartition, OwnedPartition>>,
}

impl ClientContext for GroupContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.observer.error(&error, reason);
    }

    fn stats_raw(&self, json: &[u8]) {
        let mut owned = self.owned();
        self.observer.statistics(json, |log, committed| {
            // Not accepted, or still in flight: the next commit sends it again.
            if let Some(owned) = owned.get_mut(&log)
                && owned.sent.is_some_and(|sent| sent != committed)
            {
                owned.sent = None;
                self.shared().counters.commits_repeated.add(1);
            }
        });
    }
}

impl ConsumerContext for GroupContext {
    /// Called from `poll`. The group waits until it returns.
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        what: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        self.shared().counters.rebalances.add(1);
        let result = match what {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                self.assign(consumer, partitions)
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => {
                self.revoke(consumer, partitions)
            }
            other => {
                let error = KafkaError::Rebalance(other.into());
                tracing::warn!(%error, "rebalance failed");
                consumer.unassign()
            }
        };
        if let Err(error) = result {
            self.shared().counters.errors.add(1);
            tracing::warn!(%error, "cannot apply the rebalance");
        }
    }
}

impl GroupContext {
    fn shared(&self) -> &ReaderResources {
        &self.observer.shared
    }

    fn owned(&self) -> std::sync::MutexGuard<'_, HashMap<TopicPartition, OwnedPartition>> {
        self.owned.lock().expect("no holder panics")
    }

    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &mut TopicPartitionList,
    ) -> KafkaResult<()> {
        self.set_start_offsets(consumer, partitions);
        // The queues are split off before the first fetch: see `PartitionSource::new`.
        let sources: Vec<_> = partitions
            .elements()
            .iter()
            .filter_map(|element| {
                let log = self.shared().topic_partition(element.topic(), element.partition())?;
                let start = match element.offset() {
                    Offset::Offset(start) => Some(start),
                    _ => None,
                };
                let source = self.shared().source(&self.consumer.get()?.upgrade()?, &log)?;
                Some((log, start, source))
            })
            .collect();
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_assign(partitions)?,
            RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.assign(partitions)?,
        }
        for (log, start, source) in sources {
            let committable = Arc::new(CommittableOffset::new(start));
            let owned = OwnedPartition { committable: Arc::clone(&committable), sent: None };
            self.owned().insert(log.clone(), owned);
            let shared = self.shared();
            shared.status.add_partition(log.clone(), Arc::clone(&committable), None);
            tracing::info!(
                topic = &*log.topic,
                partition = log.partition,
                start,
                "partition assigned"
            );
            let router = shared.router(&log);
            router.assign(Assignment { log, source: Box::new(source), start, committable });
        }
        self.shared().status.assigned();
        self.shared().status.reached();
        Ok(())
    }

    /// Sets the start offset of each partition: the committed offset, or the end if there is none.
    /// That offset is committed, even if no record is read before the next restart. If the brokers
    /// do not answer, the offset stays unset and librdkafka retries.
    fn set_start_offsets(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &mut TopicPartitionList,
    ) {
        let committed = match consumer.committed_offsets(partitions.clone(), REQUEST_TIMEOUT) {
            Ok(committed) => committed,
            Err(error) => {
                tracing::warn!(%error, "cannot fetch committed offsets");
                return;
            }
        };
        for element in committed.elements() {
            let (topic, partition) = (element.topic(), element.partition());
            let start = match element.offset() {
                committed @ Offset::Offset(_) => committed,
                _ => match consumer.fetch_watermarks(topic, partition, REQUEST_TIMEOUT) {
                    Ok((_, high)) => Offset::Offset(high),
                    Err(error) => {
                        tracing::warn!(%error, topic, partition, "cannot fetch the offsets of a partition");
                        continue;
                    }
                },
            };
            if let Err(error) = partitions.set_partition_offset(topic, partition, start) {
                tracing::warn!(%error, topic, partition, "cannot set the start offset");
            }
        }
    }

    fn revoke(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &TopicPartitionList,
    ) -> KafkaResult<()> {
        // Lost: another node may already read these partitions, so this node neither waits nor commits.
        let lost = consumer.assignment_lost();
        let shared = self.shared();
        let grace = if shared.is_stopping() {
            shared.stop_grace()
        } else {
            Duration::from_millis(shared.config.revoke_grace_ms)
        };
        self.release(consumer, &shared.topic_partitions(partitions), lost, grace);
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_unassign(partitions)?,
            RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.unassign()?,
        }
        if lost {
            shared.status.unassigned();
        }
        Ok(())
    }

    /// Takes partitions back from the routers and commits their offsets.
    fn release(
        &self,
        consumer: &BaseConsumer<Self>,
        logs: &[TopicPartition],
        lost: bool,
        grace: Duration,
    ) {
        let shared = self.shared();
        let grace = if lost { Duration::ZERO } else { grace };
        // Not owned: released before the consumer was closed, see `GroupReader::stop`.
        let logs: Vec<_> =
            logs.iter().filter(|log| self.owned().contains_key(log)).cloned().collect();
        let unfinished = shared.revoke(&logs, grace);
        shared.counters.partitions_left_unfinished.add(unfinished);
        for log in &logs {
            tracing::info!(
                topic = &*log.topic,
                partition = log.partition,
                lost,
                "partition released"
            );
        }
        if !lost {
            self.commit(consumer, |log| logs.contains(log), CommitMode::Sync);
        }
        let mut owned = self.owned();
        logs.iter().for_each(|log| drop(owned.remove(log)));
    }

    /// Commits the offsets of the owned partitions that `which` selects. `Async` skips offsets already
    /// sent; `Sync`, the last commit of a partition, does not.
    fn commit(
        &self,
        consumer: &BaseConsumer<Self>,
        which: impl Fn(&TopicPartition) -> bool,
        mode: CommitMode,
    ) {
        let mut offsets = TopicPartitionList::new();
        for (log, owned) in self.owned().iter_mut().filter(|(log, _)| which(log)) {
            let Some(offset) = owned.committable.get() else { continue };
            let is_last = matches!(mode, CommitMode::Sync);
            if owned.sent == Some(offset) && !is_last {
                continue;
            }
            owned.sent = Some(offset);
            let to_commit = Offset::Offset(offset);
            if let Err(error) = offsets.add_partition_offset(&log.topic, log.partition, to_commit) {
                tracing::warn!(%error, topic = &*log.topic, "cannot commit an offset");
            }
        }
        if offsets.count() == 0 {
            return;
        }
        match consumer.commit(&offsets, mode) {
            Ok(()) => self.shared().counters.commits.add(1),
            Err(error) => {
                self.shared().counters.commits_failed.add(1);
                if let Some(again) = self.shared().errors.failed(tokio::time::Instant::now()) {
                    tracing::warn!(%error, "cannot commit offsets{again}");
                }
            }
        }
    }
}

pub(super) struct GroupReader {
    shared: Arc<ReaderResources>,
    consumer: Arc<BaseConsumer<GroupContext>>,
}

impl GroupReader {
    pub(super) fn new(shared: Arc<ReaderResources>) -> Result<Self, KafkaStartError> {
        let mut properties = client::consumer_properties(&shared.config, &shared.config.group);
        properties
            .set("partition.assignment.strategy", "cooperative-sticky")
            // Only for offsets that retention has deleted.
            .set("auto.offset.reset", "earliest")
            .set("session.timeout.ms", "15000")
            // How soon a node notices a rebalance, which delays the whole group.
            .set("heartbeat.interval.ms", "1000");
        let properties = client::with_user_properties(properties, &shared.config);
        let context = GroupContext {
            observer: Observer { shared: Arc::clone(&shared) },
            consumer: OnceLock::new(),
            owned: Mutex::default(),
        };
        let consumer = Arc::new(BaseConsumer::from_config_and_context(&properties, context)?);
        let weak = Arc::downgrade(&consumer);
        consumer.context().consumer.set(weak).expect("set once");
        Ok(Self { shared, consumer })
    }

    pub(super) fn run(self) {
        let topics: Vec<_> = self.shared.config.topics.iter().map(String::as_str).collect();
        if let Err(error) = self.consumer.subscribe(&topics) {
            tracing::error!(%error, "cannot subscribe to the topics; consuming nothing");
            return;
        }
        let interval = Duration::from_millis(self.shared.config.commit_interval_ms);
        let mut next_commit = Instant::now() + interval;
        while !self.shared.is_stopping() {
            self.poll();
            if Instant::now() >= next_commit {
                self.consumer.context().commit(&self.consumer, |_| true, CommitMode::Async);
                next_commit = Instant::now() + interval;
            }
        }
        self.stop();
    }

    fn poll(&self) {
        match self.consumer.poll(POLL_TIMEOUT) {
            None => {}
            // Must not happen: every queue is split off before the first fetch. The record is not
            // committed, so the next owner of the partition reads it.
            Some(Ok(message)) => {
                self.shared.counters.errors.add(1);
                let (topic, partition) = (message.topic(), message.partition());
                tracing::error!(topic, partition, "record outside of its partition queue");
            }
            // The error callback has counted and logged it.
            Some(Err(error)) => tracing::debug!(%error, "Kafka"),
        }
    }

    /// Waits for records in flight, commits, and leaves the group.
    ///
    /// librdkafka leaves the group when the consumer is closed, which is when its last reference is
    /// dropped. Two faults of librdkafka 2.12 have to be avoided, after which the member stays until its
    /// session times out, and its partitions wait:
    ///
    /// - If partitions are still being unassigned at that moment, it closes without leaving
    ///   (`rd_kafka_cgrp_incr_unassign_done` does not finish the unassignment of a terminating group).
    ///   So nothing is unassigned here: the routers give the partitions back, and closing the consumer
    ///   unassigns them.
    /// - If nothing is assigned, closing has nothing to unassign, and does not leave either. To
    ///   unsubscribe before makes it leave.
    fn stop(self) {
        self.settle();
        let context = self.consumer.context();
        let owned: Vec<_> = context.owned().keys().cloned().collect();
        let lost = self.consumer.assignment_lost();
        // The routers drop the partition queues, each of which holds a reference.
        context.release(&self.consumer, &owned, lost, self.shared.stop_grace());
        if owned.is_empty() {
            self.consumer.unsubscribe();
        }
    }

    /// Polls until no rebalance interrupts a poll, so that no unassignment is in progress.
    fn settle(&self) {
        let rebalances = || self.shared.counters.rebalances.get();
        for _ in 0..SETTLE_POLLS_MAX {
            let before = rebalances();
            self.poll();
            if rebalances() == before {
                return;
            }
        }
    }
}
