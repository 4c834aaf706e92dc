//! `group`: the partitions that the group gives this node, and commits of what is done.

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
use crate::service::routing::kafka::source::PartitionSource;
use crate::service::routing::kafka::{FirstOffset, KafkaStartError, Shared};
use crate::service::routing::router::{Assignment, CommittableOffset, TopicPartition};

/// One wait for events of the client.
const POLL: Duration = Duration::from_millis(100);
/// One question to the brokers while the group waits for this node.
const ASK: Duration = Duration::from_secs(5);
/// How long leaving the group may take.
const LEAVE: Duration = Duration::from_secs(5);

/// A partition that is ours.
struct Owned {
    committable: Arc<CommittableOffset>,
    /// What the broker was last asked to commit. It does not answer in between; the statistics tell
    /// what it has accepted.
    sent: Option<i64>,
}

pub(super) struct GroupContext {
    observer: Observer,
    /// Set once, after the consumer is made; the callbacks need it shared to split off queues.
    consumer: OnceLock<Weak<BaseConsumer<GroupContext>>>,
    owned: Mutex<HashMap<TopicPartition, Owned>>,
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
            // Sent and not accepted, or still on its way: it is sent once more.
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
    /// Called by whoever polls the consumer; the group waits until it returns.
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
                tracing::warn!(%error, "the group gives no partitions");
                consumer.unassign()
            }
        };
        if let Err(error) = result {
            self.shared().counters.errors.add(1);
            tracing::warn!(%error, "rebalance");
        }
    }
}

impl GroupContext {
    fn shared(&self) -> &Shared {
        &self.observer.shared
    }

    fn owned(&self) -> std::sync::MutexGuard<'_, HashMap<TopicPartition, Owned>> {
        self.owned.lock().expect("no holder panics")
    }

    fn logs(&self, partitions: &TopicPartitionList) -> Vec<TopicPartition> {
        partitions
            .elements()
            .iter()
            .filter_map(|element| self.shared().log_name(element.topic(), element.partition()))
            .collect()
    }

    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &mut TopicPartitionList,
    ) -> KafkaResult<()> {
        self.find_places(consumer, partitions);
        // The queues are split off before anything is fetched: see `PartitionSource::new`.
        let sources: Vec<_> = partitions
            .elements()
            .iter()
            .filter_map(|element| {
                let log = self.shared().log_name(element.topic(), element.partition())?;
                let start = match element.offset() {
                    Offset::Offset(start) => Some(start),
                    _ => None,
                };
                let source = self.source(&log)?;
                Some((log, start, source))
            })
            .collect();
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_assign(partitions)?,
            RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.assign(partitions)?,
        }
        for (log, start, source) in sources {
            let committable = Arc::new(CommittableOffset::new(start));
            let owned = Owned { committable: Arc::clone(&committable), sent: None };
            self.owned().insert(log.clone(), owned);
            let shared = self.shared();
            shared.status.reads(log.clone(), Arc::clone(&committable), None);
            tracing::info!(topic = &*log.topic, partition = log.partition, start, "assigned");
            let router = shared.router(&log);
            router.assign(Assignment { log, source: Box::new(source), start, committable });
        }
        self.shared().status.assigned();
        self.shared().status.reached();
        Ok(())
    }

    /// Puts into the list where each partition is read from: where the group stands, or else where it
    /// begins. If the broker does not tell, librdkafka asks it until it does.
    fn find_places(&self, consumer: &BaseConsumer<Self>, partitions: &mut TopicPartitionList) {
        let committed = match consumer.committed_offsets(partitions.clone(), ASK) {
            Ok(committed) => committed,
            Err(error) => {
                tracing::warn!(%error, "committed offsets not told");
                return;
            }
        };
        for element in committed.elements() {
            let (topic, partition) = (element.topic(), element.partition());
            let place = match element.offset() {
                committed @ Offset::Offset(_) => committed,
                _ => match consumer.fetch_watermarks(topic, partition, ASK) {
                    Ok((low, high)) => Offset::Offset(match self.shared().config.first_offset {
                        FirstOffset::Beginning => low,
                        FirstOffset::End => high,
                    }),
                    Err(error) => {
                        tracing::warn!(%error, topic, partition, "end of the log not told");
                        continue;
                    }
                },
            };
            if let Err(error) = partitions.set_partition_offset(topic, partition, place) {
                tracing::warn!(%error, topic, partition, "place not set");
            }
        }
    }

    fn source(&self, log: &TopicPartition) -> Option<PartitionSource<Self>> {
        let consumer = self.consumer.get()?.upgrade()?;
        let shared = self.shared();
        let bell = Arc::clone(shared.router(log).bell());
        let tracing = shared.config.tracing;
        PartitionSource::new(&consumer, &log.topic, log.partition, bell, tracing)
    }

    fn revoke(
        &self,
        consumer: &BaseConsumer<Self>,
        partitions: &TopicPartitionList,
    ) -> KafkaResult<()> {
        // Lost without being asked: somebody else may read them by now, so nothing is awaited and
        // nothing committed.
        let lost = consumer.assignment_lost();
        let shared = self.shared();
        let grace = if shared.is_stopping() {
            *shared.stop_grace.lock().expect("no holder panics")
        } else {
            Duration::from_millis(shared.config.revoke_grace_ms)
        };
        self.give_up(consumer, self.logs(partitions), lost, grace);
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_unassign(partitions)?,
            RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.unassign()?,
        }
        if lost {
            shared.status.unassigned();
        }
        Ok(())
    }

    /// Takes partitions back from the routers and commits how far they got.
    fn give_up(
        &self,
        consumer: &BaseConsumer<Self>,
        logs: Vec<TopicPartition>,
        lost: bool,
        grace: Duration,
    ) {
        let shared = self.shared();
        let grace = if lost { Duration::ZERO } else { grace };
        let told: Vec<_> =
            logs.iter().map(|log| shared.router(log).revoke(log.clone(), grace)).collect();
        for (log, told) in logs.iter().zip(told) {
            if told.recv_timeout(grace + Duration::from_secs(1)) == Ok(false) {
                shared.counters.partitions_left_unfinished.add(1);
            }
            shared.status.reads_no_more(log);
            tracing::info!(topic = &*log.topic, partition = log.partition, lost, "given up");
        }
        if !lost {
            self.commit(consumer, |log| logs.contains(log), CommitMode::Sync);
        }
        let mut owned = self.owned();
        logs.iter().for_each(|log| drop(owned.remove(log)));
    }

    /// Commits what is done of the partitions that are ours and that `which` picks: what is new of
    /// it, or at the end (`Sync`) all of it.
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
            let place = Offset::Offset(offset);
            if let Err(error) = offsets.add_partition_offset(&log.topic, log.partition, place) {
                tracing::warn!(%error, topic = &*log.topic, "offset not taken");
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
                    tracing::warn!(%error, "offsets not committed{again}");
                }
            }
        }
    }
}

pub(super) struct GroupReader {
    shared: Arc<Shared>,
    consumer: Arc<BaseConsumer<GroupContext>>,
}

impl GroupReader {
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self, KafkaStartError> {
        let mut properties = client::consumer_properties(&shared.config, &shared.config.group);
        properties
            .set("partition.assignment.strategy", "cooperative-sticky")
            // Only for places that retention has taken away.
            .set("auto.offset.reset", "earliest")
            .set("session.timeout.ms", "15000")
            // How soon a node hears that the group is changing: what the others wait for.
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
            tracing::error!(%error, "topics not accepted: nothing is read");
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
        match self.consumer.poll(POLL) {
            None => {}
            // Every queue is split off before it is filled. Were one not, its partition would stand
            // still: nothing of it is committed, and the next owner reads it.
            Some(Ok(message)) => {
                self.shared.counters.errors.add(1);
                let (topic, partition) = (message.topic(), message.partition());
                tracing::error!(topic, partition, "record outside of its partition's queue");
            }
            // The error callback has counted it and told of it.
            Some(Err(error)) => tracing::debug!(%error, "Kafka"),
        }
    }

    /// Drains, commits, leaves the group: the callback for what is revoked does the work.
    fn stop(self) {
        self.consumer.unsubscribe();
        let deadline =
            Instant::now() + *self.shared.stop_grace.lock().expect("no holder panics") + LEAVE;
        while Instant::now() < deadline && !self.consumer.context().owned().is_empty() {
            self.poll();
        }
        let left: Vec<_> = self.consumer.context().owned().keys().cloned().collect();
        if !left.is_empty() {
            let context = self.consumer.context();
            context.give_up(&self.consumer, left, false, Duration::ZERO);
        }
    }
}
