//! `group`: reads the partitions that the consumer group assigns to this node, and commits offsets.
//!
//! A partition is read and routed only once it is known where it [starts](super::starts), and with
//! [`ClaimParts`](crate::service::routing::kafka::ClaimParts) once it is claimed. Until then it is part of the group's
//! assignment, but not of the consumer's, and the poll loop tries it again. (With an eager assignment strategy, which
//! has no incremental assignment, the member joins again.)

mod claiming;
mod starting;

use std::collections::{HashMap, HashSet};
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

use crate::service::routing::kafka::claims::Claim;
use crate::service::routing::kafka::client::{self, Observer};
use crate::service::routing::kafka::source::{PartitionSource, SourceState};
use crate::service::routing::kafka::starts::GroupStart;
use crate::service::routing::kafka::{KafkaStartError, ReaderResources};
use crate::service::routing::router::Ownership;
use crate::service::routing::router::{
    Assignment, CommittableOffset, CommittableTable, TailFill, TopicPartition,
};

/// Timeout of one poll.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Timeout of one request to the brokers during a rebalance, while the group waits for this node.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Like [`KafkaConfig::revoke_grace_ms`](crate::service::routing::kafka::KafkaConfig), for claimed partitions.
/// Short, because nothing depends on it: holders discard what the next owner repeats. And the longer wait would
/// be used up in every roll of the nodes, because the records of a session are done only when it has caught
/// up, while the partitions that other nodes have released stay without an owner.
const CLAIMED_REVOKE_GRACE: Duration = Duration::from_millis(100);
/// Polls before leaving the group, at most. Each ends early if a rebalance interrupts it.
const SETTLE_POLLS_MAX: u32 = 10;
/// Pause after a failed claim.
const CLAIM_PAUSE: Duration = Duration::from_millis(500);

/// A partition that this node reads.
struct OwnedPartition {
    committable: Arc<CommittableOffset>,
    source: Arc<SourceState>,
    /// Since when the group reads the topic, Unix time in ms; 0: for ever.
    since_ms: u64,
    /// See the catalogue.
    incarnation: u64,
    /// Generation of this owner; 0 without claims.
    generation: i64,
    table: Arc<CommittableTable>,
    /// The last offset and table sent to the broker for commit. Commits are asynchronous; the
    /// statistics show which offset the broker has accepted.
    sent: Option<(i64, i64)>,
}

pub(super) struct GroupContext {
    observer: Observer,
    /// Set once, after the consumer is created. The callbacks split partition queues off it.
    consumer: OnceLock<Weak<BaseConsumer<GroupContext>>>,
    owned: Mutex<HashMap<TopicPartition, OwnedPartition>>,
    /// Assigned by the group, and not read yet.
    unclaimed: Mutex<HashSet<TopicPartition>>,
    /// Their committed offsets are of a former log.
    replaced: Mutex<HashSet<TopicPartition>>,
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
                && owned.sent.is_some_and(|(sent, _)| sent != committed)
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

    fn unclaimed(&self) -> std::sync::MutexGuard<'_, HashSet<TopicPartition>> {
        self.unclaimed.lock().expect("no holder panics")
    }

    fn replaced(&self) -> std::sync::MutexGuard<'_, HashSet<TopicPartition>> {
        self.replaced.lock().expect("no holder panics")
    }

    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &mut TopicPartitionList,
    ) -> KafkaResult<()> {
        let shared = self.shared();
        self.unclaimed().extend(shared.topic_partitions(partitions));
        let is_eager = !is_incremental(consumer);
        // The group waits for an answer, also if nothing is read.
        if self.start_unclaimed(consumer)? == 0 {
            if is_eager {
                consumer.assign(&TopicPartitionList::new())?;
            } else {
                consumer.incremental_assign(&TopicPartitionList::new())?;
            }
        }
        shared.status.reached();
        Ok(())
    }

    /// Gives a partition that is being fetched to its router. `claimed`: the first offset of the source, and the
    /// ownership.
    fn route(
        &self,
        start: GroupStart,
        claimed: Option<(i64, Ownership)>,
        source: PartitionSource<Self>,
    ) {
        let (fill_from, ownership) = claimed.unzip();
        let GroupStart { log, offset, since_ms, .. } = start;
        // If the other nodes have to be told of a loss, nothing is committed before.
        let is_lost = ownership.as_ref().is_some_and(|ownership| ownership.lost_from.is_some());
        let committable = Arc::new(CommittableOffset::new((!is_lost).then_some(offset)));
        let generation = ownership.as_ref().map_or(0, |ownership| ownership.generation);
        let table = match &ownership {
            Some(ownership) => Arc::clone(&ownership.settled),
            None => Arc::new(CommittableTable::new(0)),
        };
        let shared = self.shared();
        let owned = OwnedPartition {
            committable: Arc::clone(&committable),
            source: Arc::clone(source.state()),
            since_ms,
            incarnation: shared.catalogue.partition(&log).map_or(0, |known| known.incarnation),
            generation,
            table,
            sent: None,
        };
        self.owned().insert(log.clone(), owned);
        self.replaced().remove(&log);
        let fill = fill_from.map(TailFill::new);
        shared.status.add_partition(log.clone(), Arc::clone(&committable), None, fill.as_ref());
        let (topic, partition) = (&*log.topic, log.partition);
        tracing::info!(topic, partition, start = offset, generation, "partition assigned");
        if let (Some(claims), Some(ownership)) = (&shared.claims, &ownership) {
            claims.owned.add(log.clone(), generation, Arc::clone(&ownership.routed));
        }
        let router = shared.router(&log);
        let (source, start) = (Box::new(source), Some(offset));
        router.assign(Assignment { log, source, start, fill, committable, ownership });
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
        } else if shared.claims.is_some() {
            CLAIMED_REVOKE_GRACE
        } else {
            Duration::from_millis(shared.config.revoke_grace_ms)
        };
        let mut logs = shared.topic_partitions(partitions);
        // What was not started is not read.
        logs.retain(|log| !self.unclaimed().remove(log) && self.owned().contains_key(log));
        self.update_unclaimed();
        self.release(consumer, &logs, lost, grace);
        if is_incremental(consumer) {
            consumer.incremental_unassign(&list_of(&logs))?;
        } else {
            consumer.unassign()?;
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
        logs.iter().for_each(|log| self.forget(log));
    }

    /// A partition is not read any more.
    fn forget(&self, log: &TopicPartition) {
        self.owned().remove(log);
        if let Some(claims) = &self.shared().claims {
            claims.owned.remove(log);
        }
    }

    /// Commits the offsets of the owned partitions that `which` selects. `Async` skips offsets already
    /// sent; `Sync`, the last commit of a partition, does not.
    fn commit(
        &self,
        consumer: &BaseConsumer<Self>,
        which: impl Fn(&TopicPartition) -> bool,
        mode: CommitMode,
    ) {
        let claims = self.shared().claims.is_some();
        // A lost member has no identity, and a group without members accepts commits of anybody.
        if claims && consumer.assignment_lost() {
            return;
        }
        let mut offsets = TopicPartitionList::new();
        for (log, owned) in self.owned().iter_mut().filter(|(log, _)| which(log)) {
            let Some(offset) = owned.committable.get() else { continue };
            let claim = Claim { generation: owned.generation, table: owned.table.get() };
            let is_last = matches!(mode, CommitMode::Sync);
            if owned.sent == Some((offset, claim.table)) && !is_last {
                continue;
            }
            owned.sent = Some((offset, claim.table));
            let mut element = offsets.add_partition(&log.topic, log.partition);
            element.set_metadata(if claims {
                claim.metadata(owned.since_ms)
            } else {
                format!("s={}", owned.since_ms)
            });
            if let Err(error) = element.set_offset(Offset::Offset(offset)) {
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

/// Whether the group assigns and revokes partitions one by one.
fn is_incremental(consumer: &BaseConsumer<GroupContext>) -> bool {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => true,
        RebalanceProtocol::Eager | RebalanceProtocol::None => false,
    }
}

fn list_of(logs: &[TopicPartition]) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(logs.len());
    for log in logs {
        list.add_partition(&log.topic, log.partition);
    }
    list
}

pub(super) struct GroupReader {
    shared: Arc<ReaderResources>,
    consumer: Arc<BaseConsumer<GroupContext>>,
}

impl GroupReader {
    pub(super) fn new(shared: Arc<ReaderResources>) -> Result<Self, KafkaStartError> {
        let properties = client::consumer_properties(&shared.config, &shared.config.group);
        let defaults = [
            ("partition.assignment.strategy", "cooperative-sticky"),
            ("session.timeout.ms", "15000"),
            // How soon a node notices a rebalance, which delays the whole group.
            ("heartbeat.interval.ms", "1000"),
        ];
        let mut properties =
            client::with_properties_of_member(properties, &shared.config, &defaults);
        // A position that is not in the log: see `GroupReader::mend`.
        properties.set("auto.offset.reset", "error");
        if shared.claims.is_some() {
            // A tail is filled when the end is reached, also if the last offsets hold no record.
            properties.set("enable.partition.eof", "true");
            if !client::uses_consumer_protocol(&shared.config) {
                // Partitions are claimed one by one: an eager assignment replaces all of them at once.
                properties.set("partition.assignment.strategy", "cooperative-sticky");
            }
        }
        let context = GroupContext {
            observer: Observer { shared: Arc::clone(&shared) },
            consumer: OnceLock::new(),
            owned: Mutex::default(),
            unclaimed: Mutex::default(),
            replaced: Mutex::default(),
        };
        let consumer = Arc::new(BaseConsumer::from_config_and_context(&properties, context)?);
        let weak = Arc::downgrade(&consumer);
        consumer.context().consumer.set(weak).expect("set once");
        Ok(Self { shared, consumer })
    }

    pub(super) fn run(self) {
        if !self.may_join() {
            return;
        }
        // Partitions that are assigned before this are not known to be old.
        while !self.shared.catalogue.is_complete() {
            if self.shared.is_stopping() {
                return;
            }
            self.look();
            self.poll();
        }
        self.subscribe();
        let interval = Duration::from_millis(self.shared.config.commit_interval_ms);
        let mut next_commit = Instant::now() + interval;
        let mut next_claim = Instant::now();
        while !self.shared.is_stopping() {
            self.poll();
            if Instant::now() >= next_claim {
                self.look();
                self.mend();
                self.claim_again();
                next_claim = Instant::now() + CLAIM_PAUSE;
            }
            if Instant::now() >= next_commit {
                self.consumer.context().commit(&self.consumer, |_| true, CommitMode::Async);
                next_commit = Instant::now() + interval;
            }
        }
        self.stop();
    }

    /// Waits until this node may join the group. Returns false if it stops before.
    fn may_join(&self) -> bool {
        let Some(claims) = &self.shared.claims else { return true };
        while !claims.owned.may_join() {
            if self.shared.is_stopping() {
                return false;
            }
            std::thread::sleep(POLL_TIMEOUT);
        }
        true
    }

    fn subscribe(&self) {
        let topics: Vec<_> = self.shared.config.topics.iter().map(String::as_str).collect();
        if let Err(error) = self.consumer.subscribe(&topics) {
            tracing::error!(%error, "cannot subscribe to the topics; consuming nothing");
        }
    }

    fn claim_again(&self) {
        let context = self.consumer.context();
        if context.unclaimed().is_empty() {
            return;
        }
        if !is_incremental(&self.consumer) {
            self.consumer.unsubscribe();
            self.subscribe();
            return;
        }
        if let Err(error) = context.start_unclaimed(&self.consumer) {
            self.shared.counters.errors.add(1);
            tracing::warn!(%error, "cannot read the claimed partitions");
        }
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
