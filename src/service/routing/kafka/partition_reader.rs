//! Reads one partition of a topic of the cluster, without a group: from where the caller says, for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::time::Instant;

use crate::service::backends::outage::Outage;
use crate::service::routing::kafka::client::{self, partition_bytes_max};
use crate::service::routing::kafka::source::PartitionTap;
use crate::service::routing::kafka::{ClusterLogCounters, KafkaConfig, KafkaStartError};

/// Fetched and not yet taken, KiB.
const PREFETCH_KIB: u32 = 4_096;
/// Memory of the reader of a topic of the cluster, bytes.
pub const LOG_READER_BYTES_MAX: u64 = partition_bytes_max(PREFETCH_KIB);
/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout of one poll.
pub(super) const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Time between two questions to the brokers whether a topic still exists, and how long they have to deny it: a
/// broker that has just started may not know it yet.
const EXISTENCE_INTERVAL: Duration = Duration::from_secs(1);
const GONE_AFTER: Duration = Duration::from_secs(5);
/// Pause after a failed request.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Whether a topic of the cluster is read, for readiness.
#[derive(Debug)]
pub struct LogStatus {
    topic: String,
    state: Mutex<LogState>,
}

#[derive(Debug, Default)]
struct LogState {
    following: bool,
    last_error: Option<String>,
}

impl LogStatus {
    pub(super) fn new(topic: &str) -> Self {
        Self { topic: topic.to_owned(), state: Mutex::default() }
    }

    /// Why this node does not follow the topic; `None`: it does. (That the brokers are unreachable later
    /// is part of [`KafkaStatus::missing`](crate::service::routing::kafka::KafkaStatus::missing).)
    pub fn missing(&self) -> Option<String> {
        let state = self.state();
        if state.following {
            return None;
        }
        let error = state.last_error.as_ref().map(|error| format!(" ({error})"));
        let error = error.unwrap_or_default();
        Some(format!("the topic {} is not read to its end yet{error}", self.topic))
    }

    fn state(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().expect("no holder panics")
    }

    pub(super) fn set_following(&self, following: bool) {
        let mut state = self.state();
        state.following = following;
        state.last_error = None;
    }

    fn failed(&self, error: &KafkaError) {
        self.state().last_error = Some(error.to_string());
    }
}

pub(super) struct LogContext {
    topic: String,
    counters: Arc<ClusterLogCounters>,
    outage: Outage,
    /// Whether a broker has said that the topic does not exist.
    may_be_gone: AtomicBool,
}

impl ClientContext for LogContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        self.counters.errors.add(1);
        if is_unknown_topic(error.rdkafka_error_code()) {
            self.may_be_gone.store(true, Ordering::Release);
        }
        if let Some(again) = self.outage.failed(Instant::now()) {
            tracing::warn!(%error, reason, topic = self.topic, "cannot read{again}");
        }
    }
}

impl ConsumerContext for LogContext {}

/// What a poll has found.
pub(super) enum Polled<'a> {
    Record(BorrowedMessage<'a>),
    /// Everything that the partition had when it was started was read, also if its last offsets hold no
    /// records (compaction, transaction markers).
    End,
    /// The position is not in the log: retention, or a lost tail of the log. Nothing is read until the
    /// partition is started again.
    Lost,
    /// The topic does not exist any more. If there is one with its name later, it is another one.
    Gone,
    Nothing,
}

pub(super) struct PartitionReader {
    consumer: Arc<BaseConsumer<LogContext>>,
    topic: String,
    partition: i32,
    status: Arc<LogStatus>,
    existence: Mutex<Existence>,
}

/// What the brokers say about the existence of a topic that may be gone.
#[derive(Debug, Default)]
struct Existence {
    asked: Option<Instant>,
    missing_since: Option<Instant>,
}

impl PartitionReader {
    pub(super) fn new(
        config: &KafkaConfig,
        topic: &str,
        partition: i32,
        status: Arc<LogStatus>,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        let config = KafkaConfig { prefetch_kib: PREFETCH_KIB, ..config.clone() };
        // librdkafka requires a group. Nothing is committed to it, and no consumer joins it.
        let group = format!("{}.{}.{topic}", config.group, config.client_id);
        let mut properties = client::consumer_properties(&config, &group);
        properties.set("statistics.interval.ms", "0");
        let mut properties = client::with_user_properties(properties, &config);
        properties
            .set("enable.partition.eof", "true")
            // A lost position means missed records.
            .set("auto.offset.reset", "error")
            // The topic exists. If a broker denies that, it is asked again here, not for 30 s in librdkafka.
            .set("topic.metadata.propagation.max.ms", "1000")
            // A transaction that somebody leaves open must not hide what follows.
            .set("isolation.level", "read_uncommitted");
        let context = LogContext {
            topic: topic.to_owned(),
            counters,
            outage: Outage::default(),
            may_be_gone: AtomicBool::new(false),
        };
        let consumer = Arc::new(BaseConsumer::from_config_and_context(&properties, context)?);
        Ok(Self {
            consumer,
            topic: topic.to_owned(),
            partition,
            status,
            existence: Mutex::default(),
        })
    }

    /// The lowest offset and the end offset.
    pub(super) fn watermarks(&self) -> KafkaResult<(i64, i64)> {
        self.consumer.fetch_watermarks(&self.topic, self.partition, REQUEST_TIMEOUT)
    }

    /// Reads on from `offset`, whatever was read before. What is fetched already is dropped.
    pub(super) fn start(&self, offset: i64) -> KafkaResult<()> {
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition_offset(&self.topic, self.partition, Offset::Offset(offset))?;
        self.consumer.assign(&list)
    }

    /// Starts at the offset that `choose` picks from the lowest offset and the end offset. Returns it and
    /// the end offset. `None`: failed, and `RETRY_PAUSE` was waited for.
    pub(super) fn try_start(&self, choose: impl Fn(i64, i64) -> i64) -> Option<(i64, i64)> {
        let started = self.watermarks().and_then(|(low, end)| {
            let start = choose(low, end);
            self.start(start)?;
            Ok((start, end))
        });
        match started {
            Ok(started) => Some(started),
            Err(error) => {
                self.status.failed(&error);
                let context = self.consumer.context();
                if let Some(again) = context.outage.failed(Instant::now()) {
                    tracing::warn!(%error, topic = self.topic, "cannot start reading; retrying{again}");
                }
                std::thread::sleep(RETRY_PAUSE);
                None
            }
        }
    }

    /// Whether all brokers that answered in the last seconds denied that the topic exists.
    fn is_gone(&self) -> bool {
        let context = self.consumer.context();
        if !context.may_be_gone.load(Ordering::Acquire) {
            return false;
        }
        let mut existence = self.existence.lock().expect("no holder panics");
        let now = Instant::now();
        if existence.asked.is_some_and(|asked| now.duration_since(asked) < EXISTENCE_INTERVAL) {
            return false;
        }
        existence.asked = Some(now);
        let Ok(metadata) = self.consumer.fetch_metadata(Some(&self.topic), REQUEST_TIMEOUT) else {
            return false;
        };
        let found = metadata.topics().iter().find(|found| found.name() == self.topic);
        let error = found.and_then(|found| found.error()).map(RDKafkaErrorCode::from);
        if found.is_some() && !is_unknown_topic(error) {
            context.may_be_gone.store(false, Ordering::Release);
            *existence = Existence::default();
            return false;
        }
        now.duration_since(*existence.missing_since.get_or_insert(now)) >= GONE_AFTER
    }

    /// Takes the records from now on, which [`PartitionReader::poll`] then no longer returns. See
    /// [`PartitionTap::new`]: to be called before the partition is started.
    pub(super) fn tap(
        &self,
        notify: impl Fn() + Send + Sync + 'static,
    ) -> Result<LogTap, KafkaStartError> {
        let tap = PartitionTap::new(&self.consumer, &self.topic, self.partition, notify);
        let tap = tap.ok_or_else(|| {
            KafkaError::Subscription(format!("no queue for {}[{}]", self.topic, self.partition))
        })?;
        Ok(LogTap(tap))
    }

    pub(super) fn poll(&self, timeout: Duration) -> Polled<'_> {
        match self.consumer.poll(timeout) {
            None if self.is_gone() => Polled::Gone,
            polled => self.classified(polled),
        }
    }

    fn classified<'a>(&self, polled: Option<KafkaResult<BorrowedMessage<'a>>>) -> Polled<'a> {
        match polled {
            None => Polled::Nothing,
            Some(Ok(message)) => {
                let context = self.consumer.context();
                if let Some(back) = context.outage.succeeded(Instant::now()) {
                    tracing::info!(topic = self.topic, "reading again {back}");
                }
                Polled::Record(message)
            }
            Some(Err(KafkaError::PartitionEOF(_))) => Polled::End,
            Some(Err(error)) => {
                if !is_position_lost(&error) {
                    // The error callback has counted and logged it.
                    return Polled::Nothing;
                }
                self.consumer.context().counters.restarts.add(1);
                tracing::warn!(%error, topic = self.topic, "position lost");
                Polled::Lost
            }
        }
    }
}

/// The records of the partition of a reader.
pub(super) struct LogTap(PartitionTap<LogContext>);

impl LogTap {
    /// What has arrived. Never blocks, and never finds that the topic is gone: [`PartitionReader::poll`] does.
    pub(super) fn poll(&mut self, reader: &PartitionReader) -> Polled<'_> {
        reader.classified(self.0.poll())
    }
}

fn is_unknown_topic(code: Option<RDKafkaErrorCode>) -> bool {
    use RDKafkaErrorCode::{UnknownPartition, UnknownTopic, UnknownTopicOrPartition};
    matches!(code, Some(UnknownTopicOrPartition | UnknownTopic | UnknownPartition))
}

fn is_position_lost(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::AutoOffsetReset
                | RDKafkaErrorCode::OffsetOutOfRange
                | RDKafkaErrorCode::LogTruncation
        )
    )
}
