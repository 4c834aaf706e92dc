//! Kafka: who reads what, and how far.
//!
//! ```text
//!             ┌─ thread "kafka" ─────────────────────────┐
//!  brokers ──►│ assignment, commits, lag, readiness      │
//!     │       └───┬──────────────────────────▲───────────┘
//!     │           │ a queue per partition    │ how far each is done
//!     ├───────────▼─────────────┐            │
//!     │  routers poll their own partitions ──┘
//!     │
//!     └──► thread "kafka-members": reads the membership topics on every node, for the
//!          membership cache alone (`follower`)
//! ```
//!
//! * `group`: the partitions are shared by the nodes of a consumer group (cooperative rebalancing).
//!   What is done is committed, for partitions that are ours, and for no other.
//! * `broadcast`: this node reads every partition from the end of the log and commits nothing.
//!
//! Records never pass through a thread of ours on their way to a router: each router polls the
//! queues of its partitions, and one that does not poll holds up its own partition only.

mod broadcast;
mod client;
mod dead_letters;
mod follower;
mod group;
mod source;
mod status;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::counters;
use crate::service::backends::outage::Outage;
use crate::service::members::membership::Membership;
use crate::service::routing::router::{RouterControl, TopicPartition};

pub use crate::service::routing::kafka::client::{consumer_properties, partition_bytes_max};
pub use crate::service::routing::kafka::dead_letters::{DEAD_LETTERS_BYTES_MAX, DeadLetterTopic};
pub use crate::service::routing::kafka::status::{KafkaStatus, PartitionLag};

/// How several nodes share the work (design decision 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingMode {
    /// A consumer group shares the partitions; other nodes are told of what concerns their users.
    Group,
    /// Every node reads everything and serves its own sessions.
    Broadcast,
}

/// Where a group begins in a partition of which it has committed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstOffset {
    /// At its end. From then on the place is kept, also if nothing is read before the next restart.
    End,
    /// At its beginning.
    Beginning,
}

/// What this node reads, and how. All but the brokers have defaults.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// Brokers to begin with, `host:port`, separated by commas.
    pub brokers: String,
    /// Topics with the events.
    pub topics: Vec<String>,
    /// Those of them that membership events come in. Empty: those named `conversation…`, or all if
    /// none is.
    pub membership_topics: Vec<String>,
    /// How the work is shared.
    pub mode: RoutingMode,
    /// The consumer group.
    pub group: String,
    /// Where the group begins.
    pub first_offset: FirstOffset,
    /// `client.id`: this node's name.
    pub client_id: String,
    /// More properties for librdkafka; they win over ours.
    pub properties: Vec<(String, String)>,
    /// Between two commits, ms.
    pub commit_interval_ms: u64,
    /// How long what is under way may finish when a partition is taken away, ms. The whole
    /// group waits meanwhile.
    pub revoke_grace_ms: u64,
    /// Between two looks for new partitions, ms.
    pub discovery_interval_ms: u64,
    /// Fetched and not yet taken by a router, KiB per partition; one fetch may go beyond.
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
            membership_topics: Vec::new(),
            mode: RoutingMode::Broadcast,
            group: "delivery-service-group".into(),
            first_offset: FirstOffset::End,
            client_id: "delivery".into(),
            properties: Vec::new(),
            commit_interval_ms: 1_000,
            revoke_grace_ms: 5_000,
            discovery_interval_ms: 5_000,
            prefetch_kib: 4_096,
            tracing: false,
        }
    }

    fn membership_topics(&self) -> Vec<String> {
        if !self.membership_topics.is_empty() {
            return self.membership_topics.clone();
        }
        let named: Vec<_> =
            self.topics.iter().filter(|topic| topic.starts_with("conversation")).cloned().collect();
        if named.is_empty() { self.topics.clone() } else { named }
    }
}

counters! {
    /// Counted by the Kafka threads and by dead letters.
    pub struct KafkaCounters of SharedCounter {
        Counter rebalances: "Times that the group changed who reads what.",
        Counter partitions_left_unfinished: "Partitions given up with records under way, for the next owner to send again.",
        Counter commits: "Commits of offsets that the broker was asked for.",
        Counter commits_repeated: "Offsets of partitions asked for again because they did not show as committed.",
        Counter commits_failed: "Commits at the end of a partition (or of everything) that failed: its next owner sends again what was done since the last one.",
        Counter errors: "Errors that librdkafka reported, each once; it recovers by itself.",
        Counter membership_records: "Records read for the membership cache.",
        Counter membership_records_undecodable: "Records of membership topics that are not an event envelope.",
        Counter membership_restarts: "Times that the membership log was lost to this node and its cache began anew.",
        Counter dead_letters_stored: "Records stored in the dead-letter topic.",
        Counter dead_letters_failed: "Records that the dead-letter topic did not take: passed.",
    }
}

/// Why reading could not be started. The configuration's fault.
#[derive(Debug, thiserror::Error)]
pub enum KafkaStartError {
    /// librdkafka refuses a property.
    #[error("Kafka client: {0}")]
    Client(#[from] rdkafka::error::KafkaError),
    /// The process cannot have another thread.
    #[error("Kafka thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the threads share.
struct Shared {
    config: KafkaConfig,
    routers: Vec<RouterControl>,
    membership: Arc<Membership>,
    status: Arc<KafkaStatus>,
    counters: Arc<KafkaCounters>,
    topics: Vec<Arc<str>>,
    /// What the log says of connections, of all clients together, and of other errors.
    connections: Outage,
    errors: Outage,
    stopping: AtomicBool,
    /// How long what is under way may finish at the end.
    stop_grace: Mutex<Duration>,
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn log_name(&self, topic: &str, partition: i32) -> Option<TopicPartition> {
        let index = self.topics.iter().position(|known| **known == *topic)?;
        Some(TopicPartition {
            topic: Arc::clone(&self.topics[index]),
            topic_index: u16::try_from(index).ok()?,
            partition,
        })
    }

    /// The brokers did not say which partitions there are. That matters as long as this keeps the node
    /// from reading at all; later it is only the look for new ones that failed.
    fn not_told(&self, error: &rdkafka::error::KafkaError, reading: bool) {
        if reading {
            tracing::debug!(%error, "partitions not told");
        } else if self.status.cannot_begin(error.to_string()) {
            tracing::warn!(%error, "reading cannot begin; this is tried until it can");
        }
    }

    /// The router that a partition belongs to.
    fn router(&self, log: &TopicPartition) -> &RouterControl {
        let number = usize::from(log.topic_index) + log.partition.unsigned_abs() as usize;
        &self.routers[number % self.routers.len()]
    }
}

/// Reading. Ends with [`Kafka::stop`].
pub struct Kafka {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Kafka {
    /// Starts reading for these routers, at least one. Brokers that cannot be reached are no error:
    /// they are tried again for ever, and `status` tells.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: KafkaConfig,
        routers: Vec<RouterControl>,
        membership: Arc<Membership>,
        status: Arc<KafkaStatus>,
        counters: Arc<KafkaCounters>,
    ) -> Result<Self, KafkaStartError> {
        assert!(!routers.is_empty());
        let mut topics = config.topics.clone();
        topics.extend(config.membership_topics());
        topics.sort_unstable();
        topics.dedup();
        let shared = Arc::new(Shared {
            routers,
            membership,
            status,
            counters,
            topics: topics.into_iter().map(Arc::from).collect(),
            connections: Outage::default(),
            errors: Outage::default(),
            stopping: AtomicBool::new(false),
            stop_grace: Mutex::new(Duration::from_millis(config.revoke_grace_ms)),
            config,
        });
        // The membership log first: records are routed only once every change is seen.
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
            // An error: the follower has ended because everything does.
            if following.recv().is_ok() {
                reader();
            }
        })?);
        Ok(Self { shared, threads })
    }

    /// Lets what is under way finish for at most `grace`, commits it, leaves the group and ends the
    /// threads. Blocks.
    pub fn stop(self, grace: Duration) {
        *self.shared.stop_grace.lock().expect("no holder panics") = grace;
        self.shared.stopping.store(true, Ordering::Release);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a Kafka thread has panicked");
            }
        }
        self.shared.status.stopped();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}

#[cfg(test)]
mod tests;
