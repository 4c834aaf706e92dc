//! The Kafka consumers: which partitions this node reads, and up to which offset.
//!
//! ```text
//!             ┌─ thread "kafka" ─────────────────────────┐
//!  brokers ──►│ assignment, commits, lag, readiness      │
//!     │       └───┬──────────────────────────▲───────────┘
//!     │           │ a queue per partition    │ committable offset of each
//!     ├───────────▼─────────────┐            │
//!     │  routers poll their own partitions ──┘
//!     │
//!     └──► thread "kafka-members": reads the membership topics on every node, for the
//!          membership cache only (`follower`)
//! ```
//!
//! * `group`: the nodes of a consumer group share the partitions (cooperative rebalancing). Each
//!   commits the offsets of its own partitions only.
//! * `broadcast`: every node reads every partition from the end of the log and commits nothing.
//!
//! All of them find the partitions in one `catalogue`, and `starts` says from where each is read.
//!
//! Each router polls the queues of its partitions itself. A partition that is not polled delays no
//! other.

mod broadcast;
mod catalogue;
mod claims;
mod client;
mod cluster_logs;
mod dead_letters;
mod fills;
mod follower;
mod group;
mod hand_off_reader;
mod hand_off_topic;
mod janitor;
mod outbox;
mod owned_partitions;
mod partition_reader;
mod sessions_topic;
mod source;
mod starts;
mod status;
mod topic_specs;
mod topics;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::topic_partition_list::TopicPartitionList;

use crate::counters;
use crate::service::backends::outage::Outage;
use crate::service::cluster::tail::TailBudget;
use crate::service::events::timestamp::unix_ms;
use crate::service::members::membership::Membership;
use crate::service::routing::kafka::catalogue::{Catalogue, REQUEST_TIMEOUT, TopicChange};
use crate::service::routing::kafka::fills::TailBounds;
use crate::service::routing::kafka::source::PartitionSource;
use crate::service::routing::kafka::starts::LogLoss;
use crate::service::routing::router::{RouterControl, TopicPartition};

pub use crate::service::routing::kafka::catalogue::TopicTrouble;
pub use crate::service::routing::kafka::client::{consumer_properties, partition_bytes_max};
pub use crate::service::routing::kafka::cluster_logs::{
    ClusterLogMetrics, ClusterLogParts, ClusterLogs,
};
pub use crate::service::routing::kafka::dead_letters::{DEAD_LETTERS_BYTES_MAX, DeadLetterTopic};
pub use crate::service::routing::kafka::hand_off_reader::HandOffReader;
pub use crate::service::routing::kafka::hand_off_topic::{
    HAND_OFF_BYTES_MAX, HAND_OFF_LINGER_MS, HandOffOutbox, hand_off_headers,
    hand_off_producer_properties,
};
pub use crate::service::routing::kafka::janitor::{JANITOR_BYTES_MAX, SessionsJanitor};
pub use crate::service::routing::kafka::outbox::MESSAGE_BYTES_MAX;
pub use crate::service::routing::kafka::owned_partitions::{
    ClaimBarrier, ClaimParts, OwnedPartitions,
};
pub use crate::service::routing::kafka::partition_reader::{LOG_READER_BYTES_MAX, LogStatus};
pub use crate::service::routing::kafka::sessions_topic::{
    SESSIONS_BYTES_MAX, SESSIONS_LINGER_MS, SessionsOutbox, SessionsReader,
};
pub use crate::service::routing::kafka::status::{KafkaStatus, PartitionLag};
pub use crate::service::routing::kafka::topic_specs::{ClusterTopicNames, sessions_property};
pub use crate::service::routing::kafka::topics::{ClusterTopics, TopicsError, ensure_topics};

/// How several nodes share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingMode {
    /// A consumer group shares the partitions; records are handed off to the nodes of other users.
    Group,
    /// Every node reads every partition and serves its own sessions.
    Broadcast,
}

/// Settings of the Kafka consumers. All but `brokers` have defaults.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// Bootstrap brokers, `host:port`, separated by commas.
    pub brokers: String,
    /// Topics of events.
    pub topics: Vec<String>,
    /// Those of them that carry membership events; empty: see [`KafkaConfig::membership_topics`].
    pub membership: Vec<String>,
    /// How several nodes share the work.
    pub mode: RoutingMode,
    /// The consumer group.
    pub group: String,
    /// `client.id`: this node's name.
    pub client_id: String,
    /// Properties of librdkafka; they override the defaults of Delivery.
    pub properties: Vec<(String, String)>,
    /// Time between two commits, ms.
    pub commit_interval_ms: u64,
    /// How long a revoked partition waits for its records in flight, ms. The whole group waits
    /// during this time. Claimed partitions wait for 100 ms.
    pub revoke_grace_ms: u64,
    /// Time between two searches for new partitions, ms.
    pub discovery_interval_ms: u64,
    /// Fetched and not yet taken by a router, KiB per partition; one fetch may exceed it.
    pub prefetch_kib: u32,
    /// Whether the header `traceparent` is read.
    pub tracing: bool,
}

impl KafkaConfig {
    /// The defaults, for these brokers.
    pub fn new(brokers: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            topics: vec!["messaging.events.v1".into(), "conversation.events.v1".into()],
            membership: Vec::new(),
            mode: RoutingMode::Broadcast,
            group: "delivery-service-group".into(),
            client_id: "delivery".into(),
            properties: Vec::new(),
            commit_interval_ms: 1_000,
            revoke_grace_ms: 5_000,
            discovery_interval_ms: 5_000,
            prefetch_kib: 4_096,
            tracing: false,
        }
    }

    /// The topics of events, in the order of their indices ([`TopicPartition::topic_index`]).
    pub fn topics_by_index(&self) -> Vec<Arc<str>> {
        let mut topics = self.topics.clone();
        topics.sort_unstable();
        topics.dedup();
        topics.into_iter().map(Arc::from).collect()
    }

    /// Topics of membership events: as configured, or those of `topics` with a part that starts with
    /// `conversation` (parts are separated by `.`, `-` and `_`), or all of them if there are none.
    pub fn membership_topics(&self) -> Vec<String> {
        if !self.membership.is_empty() {
            return self.membership.clone();
        }
        let is_named = |topic: &&String| {
            topic.split(['.', '-', '_']).any(|part| part.starts_with("conversation"))
        };
        let named: Vec<_> = self.topics.iter().filter(is_named).cloned().collect();
        if named.is_empty() { self.topics.clone() } else { named }
    }
}

counters! {
    /// Metrics of the Kafka consumers and of the dead-letter producer.
    pub struct KafkaCounters of SharedCounter {
        Counter rebalances: "Rebalances of the consumer group.",
        Counter partitions_left_unfinished: "Partitions released with records in flight, which their next owner sends again.",
        Counter commits: "Offset commits requested.",
        Counter commits_repeated: "Offset commits repeated because the broker did not show the offset as committed.",
        Counter commits_failed: "Failed commits. After the last commit of a partition failed, its next owner sends the records since the previous commit again.",
        Counter claims: "Partitions claimed: their generation is committed.",
        Counter claims_failed: "Partitions that could not be claimed at an attempt. They are not routed until they are claimed or revoked.",
        Gauge partitions_unclaimed: "Partitions assigned to this node that are not claimed yet.",
        Counter errors: "Errors that librdkafka reported. It recovers by itself.",
        Counter membership_records: "Records read for the membership cache.",
        Counter membership_records_undecodable: "Records of membership topics that are not an event envelope.",
        Counter membership_restarts: "Times that the offset in a membership topic was lost and the member lists were rebuilt.",
        Counter records_expired: "Records that Kafka deleted before this node read them. All sessions that may need them are closed with 4409.",
        Counter logs_lost: "Times that records of a topic of events were gone before they were read: expired, or the topic was deleted or has lost its last records. All sessions are closed with 4409.",
        Counter dead_letters_stored: "Records stored in the dead-letter topic.",
        Counter dead_letters_failed: "Records that could not be stored in the dead-letter topic: skipped.",
    }
}

counters! {
    /// Metrics of the writer and the reader of one topic of the cluster.
    pub struct ClusterLogCounters of SharedCounter {
        Counter stored: "Records stored, repetitions included.",
        Counter failed: "Records that the broker refused. They are repeated until they are stored.",
        Counter producers_replaced: "Producers replaced after an error that ends the order of their records.",
        Gauge waiting: "Records that are not stored yet.",
        Gauge waiting_bytes: "Memory of the records that are not stored yet.",
        Counter read: "Records read.",
        Counter skipped: "Records read that are for other nodes.",
        Counter unreadable: "Records read that have another format, and are ignored.",
        Counter tombstones: "Records of dead nodes that this node removed.",
        Counter restarts: "Times that the position in the topic was lost.",
        Counter errors: "Errors that librdkafka reported. It recovers by itself.",
    }
}

/// Why the consumers could not be started.
#[derive(Debug, thiserror::Error)]
pub enum KafkaStartError {
    /// librdkafka refuses a property: a mistake in the settings.
    #[error("Kafka client: {0}")]
    Client(#[from] rdkafka::error::KafkaError),
    /// A thread could not be started.
    #[error("Kafka thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the consumers need besides their configuration.
pub struct KafkaParts {
    /// The routers, at least one.
    pub routers: Vec<RouterControl>,
    /// The members of conversations.
    pub membership: Arc<Membership>,
    /// The state of the consumers, for readiness.
    pub status: Arc<KafkaStatus>,
    /// Metrics.
    pub counters: Arc<KafkaCounters>,
    /// Bounds of the tails, which say how far back partitions are read. `None`: this node keeps none.
    pub tails: Option<Arc<TailBudget>>,
    /// How partitions are claimed, in `group` mode; `None`: they are not.
    pub claims: Option<ClaimParts>,
    /// Called if records were gone before they were read: every session to which this node delivers or hands
    /// over may have missed one. (To other nodes with hand-off through the log, the routers tell it.)
    pub missed: Box<dyn Fn() + Send + Sync>,
}

/// What the Kafka threads share.
struct ReaderResources {
    config: KafkaConfig,
    parts: KafkaParts,
    topics: Vec<Arc<str>>,
    catalogue: Catalogue,
    /// Unix time in ms.
    started_at_ms: u64,
    /// Limit the rate of the log lines about each topic.
    troubles: Vec<Outage>,
    /// Limit the rate of the log lines of all clients: one for connection errors, one for other
    /// errors.
    connections: Outage,
    errors: Outage,
    stopping: AtomicBool,
    /// How long to wait for records in flight when the node stops.
    stop_grace: Mutex<Duration>,
}

impl std::ops::Deref for ReaderResources {
    type Target = KafkaParts;

    fn deref(&self) -> &KafkaParts {
        &self.parts
    }
}

impl ReaderResources {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn stop_grace(&self) -> Duration {
        *self.stop_grace.lock().expect("no holder panics")
    }

    fn topic_partition(&self, topic: &str, partition: i32) -> Option<TopicPartition> {
        let index = self.topics.iter().position(|known| **known == *topic)?;
        Some(TopicPartition {
            topic: Arc::clone(&self.topics[index]),
            topic_index: u16::try_from(index).ok()?,
            partition,
        })
    }

    fn topic_partitions(&self, list: &TopicPartitionList) -> Vec<TopicPartition> {
        let elements = list.elements();
        let known = elements
            .iter()
            .filter_map(|element| self.topic_partition(element.topic(), element.partition()));
        known.collect()
    }

    /// The records of a partition, for its router. See [`PartitionSource::new`].
    fn source<C: ConsumerContext>(
        &self,
        consumer: &Arc<BaseConsumer<C>>,
        log: &TopicPartition,
    ) -> Option<PartitionSource<C>> {
        let bell = Arc::clone(self.router(log).bell());
        PartitionSource::new(consumer, &log.topic, log.partition, bell, self.config.tracing)
    }

    /// The first offset to read of partitions that are routed from these offsets on, so that their tails are filled.
    fn fill_from<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        starts: &[(&TopicPartition, i64)],
        tails: usize,
    ) -> Vec<i64> {
        match &self.tails {
            Some(budget) => {
                let bounds = TailBounds::of(budget, tails, unix_ms());
                fills::fill_from(consumer, starts, bounds, REQUEST_TIMEOUT)
            }
            None => starts.iter().map(|(_, start)| *start).collect(),
        }
    }

    /// Takes partitions back from their routers. Waits at most `grace` (and a second for the routers'
    /// answers) for records in flight. Returns the number of partitions that still had some.
    fn revoke(&self, logs: &[TopicPartition], grace: Duration) -> u64 {
        let answers: Vec<_> =
            logs.iter().map(|log| self.router(log).revoke(log.clone(), grace)).collect();
        let mut unfinished = 0;
        for (log, answer) in logs.iter().zip(answers) {
            // An error means that the router has ended and holds nothing.
            let finished = answer.recv_timeout(grace + Duration::from_secs(1));
            unfinished += u64::from(finished == Ok(false));
            self.status.remove_partition(log);
        }
        unfinished
    }

    /// Asks the brokers about the topics, if that is due, and reports what has happened.
    fn look<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
    ) -> Result<(), rdkafka::error::KafkaError> {
        let looked = self.catalogue.look(consumer, unix_ms);
        let troubles = self.catalogue.troubles();
        let now = tokio::time::Instant::now();
        for (topic, outage) in self.topics.iter().zip(&self.troubles) {
            match troubles.iter().find(|(troubled, _)| troubled == topic) {
                Some((_, trouble)) => {
                    if let Some(again) = outage.failed(now) {
                        tracing::warn!("KAFKA_TOPICS: {}{again}", trouble.of(topic));
                    }
                }
                None => {
                    if let Some(back) = outage.succeeded(now) {
                        tracing::info!("KAFKA_TOPICS: the topic {topic} can be read {back}");
                    }
                }
            }
        }
        self.status.set_troubles(troubles);
        let Some(changes) = looked? else { return Ok(()) };
        self.status.reached();
        for change in changes {
            let (topic, what) = match &change {
                TopicChange::Deleted(topic) => (topic, "was deleted"),
                TopicChange::Replaced(topic) => {
                    (topic, "was created again, or has lost its last records")
                }
            };
            self.lost_log(topic, what);
        }
        Ok(())
    }

    /// Records of this topic may be gone that nobody has read.
    fn lost_log(&self, topic: &str, what: &str) {
        self.counters.logs_lost.add(1);
        let closed = match self.claims {
            Some(_) => "this node ends, with its sessions",
            None => "sessions may have missed events and are closed with 4409",
        };
        tracing::error!(topic, "the topic {what}: {closed}");
        (self.missed)();
        if let Some(claims) = &self.claims {
            (claims.failed)(format!(
                "KAFKA_TOPICS: the topic {topic} {what}: all nodes have to start again"
            ));
        }
    }

    /// Records of this partition were gone before they were read.
    fn lost_records(&self, log: &TopicPartition, lost: LogLoss) {
        self.counters.logs_lost.add(1);
        let (topic, partition) = (&*log.topic, log.partition);
        match lost {
            LogLoss::Expired(records) => {
                self.counters.records_expired.add(records);
                tracing::error!(
                    topic,
                    partition,
                    records,
                    "Kafka deleted records before they were read: sessions may have missed events and are closed \
                     with 4409"
                );
            }
            LogLoss::Truncated => tracing::error!(
                topic,
                partition,
                "the partition ends before the position of its reader: sessions may have missed events and are \
                 closed with 4409"
            ),
        }
        (self.missed)();
    }

    /// Logs that the partitions could not be listed. A warning only before the first success, because
    /// later only the search for new partitions has failed.
    fn discovery_failed(&self, error: &rdkafka::error::KafkaError, consuming: bool) {
        if consuming {
            tracing::debug!(%error, "cannot list partitions");
        } else if self.status.cannot_start(error.to_string()) {
            tracing::warn!(%error, "cannot start consuming; retrying");
        }
    }

    /// The router of a partition.
    fn router(&self, log: &TopicPartition) -> &RouterControl {
        let number = usize::from(log.topic_index) + log.partition.unsigned_abs() as usize;
        &self.routers[number % self.routers.len()]
    }
}

/// The running Kafka threads. They end with [`Kafka::stop`].
pub struct Kafka {
    shared: Arc<ReaderResources>,
    threads: Vec<JoinHandle<()>>,
}

impl Kafka {
    /// Starts consuming. Unreachable brokers are not an error: they
    /// are retried without end, and `status` shows it.
    ///
    /// With [`KafkaParts::claims`], in `group` mode, each owner of a partition commits with a generation of its own.
    /// The group is joined after [`OwnedPartitions::join`], and the assignment strategy is `cooperative-sticky`,
    /// whatever [`KafkaConfig::properties`] say.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(config: KafkaConfig, parts: KafkaParts) -> Result<Self, KafkaStartError> {
        assert!(!parts.routers.is_empty());
        let topics = config.topics_by_index();
        let interval = Duration::from_millis(config.discovery_interval_ms);
        let shared = Arc::new(ReaderResources {
            parts,
            catalogue: Catalogue::new(topics.clone(), interval),
            started_at_ms: unix_ms(),
            troubles: topics.iter().map(|_| Outage::default()).collect(),
            topics,
            connections: Outage::default(),
            errors: Outage::default(),
            stopping: AtomicBool::new(false),
            stop_grace: Mutex::new(Duration::from_millis(config.revoke_grace_ms)),
            config,
        });
        // The membership topics first: records are routed only when every membership change is applied.
        let (followed, following) = std::sync::mpsc::sync_channel(1);
        let follower = follower::Follower::new(Arc::clone(&shared))?;
        let mut threads = vec![spawn("kafka-members", move || follower.run(&followed))?];
        let reader: Box<dyn FnOnce() + Send> = match shared.config.mode {
            RoutingMode::Group => {
                let reader = group::GroupReader::new(Arc::clone(&shared))?;
                Box::new(move || reader.run())
            }
            RoutingMode::Broadcast => {
                let reader = broadcast::BroadcastReader::new(Arc::clone(&shared))?;
                Box::new(move || reader.run())
            }
        };
        threads.push(spawn("kafka", move || {
            // An error means that the follower has ended, because the node stops.
            if following.recv().is_ok() {
                reader();
            }
        })?);
        Ok(Self { shared, threads })
    }

    /// Waits at most `grace` for records in flight, commits, leaves the group and ends the threads.
    /// Blocks.
    pub fn stop(self, grace: Duration) {
        *self.shared.stop_grace.lock().expect("no holder panics") = grace;
        self.shared.stopping.store(true, Ordering::Release);
        for thread in self.threads {
            thread.join().expect("a panic ends the process");
        }
        self.shared.status.stopped();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}

#[cfg(test)]
mod tests;
