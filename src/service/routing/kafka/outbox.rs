//! An ordered, bounded queue of records to a topic of the cluster, stored without a time limit.
//!
//! ```text
//!   send ──► outbox (bounds) ──► librdkafka: idempotent, one producer ──► partition
//!               ▲                        │
//!               │                        └─ a record failed for good: nothing more is accepted
//!               │                                          │
//!               └── a new producer repeats them in order ◄─┴─ every record that is not stored
//! ```
//!
//! librdkafka retries by itself what can be retried, in order. Some errors end that: the broker refuses a
//! record (no permission, no topic), or has forgotten the producer. With `enable.gapless.guarantee` no later
//! record is stored then. The outbox waits for the requests in flight, replaces the producer, and repeats
//! all records that are not acknowledged. Some of them may be stored twice, but never in another order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _, OwnedHeaders};
use rdkafka::producer::{
    BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig,
};

use crate::service::backends::outage::Outage;
use crate::service::cluster::ports::{HandOffStored, Queued};
use crate::service::routing::kafka::{
    ClusterLogCounters, KafkaConfig, KafkaStartError, client, spawn,
};

/// Largest record, bytes: key, value, headers and the framing that librdkafka adds.
pub const MESSAGE_BYTES_MAX: u64 = 8_000_000;
/// Memory per waiting record besides its bytes: librdkafka's (measured on `rd_kafka_msg_t` and its
/// headers) and the outbox's own.
pub(super) const WAITING_OVERHEAD_BYTES: u64 = client::RECORD_OVERHEAD_BYTES + 192;
/// librdkafka's `socket.timeout.ms`: when a request without an answer is repeated. Well below `NODE_TIMEOUT`, within
/// which a node has to renew its lease.
const ANSWER_TIMEOUT_MS: u64 = 10_000;
/// How long a failed producer may wait for the answers to its requests: above [`ANSWER_TIMEOUT_MS`], so that no
/// request is still on its way when its records are repeated.
const DRAIN_MAX: Duration = Duration::from_secs(15);
/// Timeout of one poll.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Pauses before a producer is replaced: the first, and the longest after repeated failures.
const REPLACE_PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(10)];

/// Bounds of an outbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutboxBounds {
    /// Waiting records.
    pub(super) records_max: u64,
    /// Their bytes, with [`WAITING_OVERHEAD_BYTES`] for each.
    pub(super) bytes_max: u64,
}

impl OutboxBounds {
    /// Memory of an outbox, bytes. While a producer is replaced, each record exists twice.
    pub(super) const fn memory(self) -> u64 {
        2 * self.bytes_max
    }
}

/// A record to send.
pub(super) struct OutboxRecord<'a> {
    pub(super) partition: i32,
    pub(super) key: Option<&'a [u8]>,
    pub(super) value: Option<&'a [u8]>,
    pub(super) headers: Option<OwnedHeaders>,
    /// Bytes of `headers`.
    pub(super) headers_bytes: usize,
    pub(super) stored: Option<HandOffStored>,
}

/// A record that was accepted and is not stored yet.
struct WaitingSend {
    /// Number of the record in this outbox. Grows in the order of the calls.
    sequence: u64,
    bytes: u64,
    stored: Option<HandOffStored>,
}

/// A record that a producer could not store.
struct UnsentRecord {
    partition: i32,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Option<OwnedHeaders>,
    waiting: Box<WaitingSend>,
}

impl UnsentRecord {
    fn new(message: &BorrowedMessage<'_>, waiting: Box<WaitingSend>) -> Self {
        Self {
            partition: message.partition(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: message.headers().map(|headers| headers.detach()),
            waiting,
        }
    }
}

/// What the outbox and the callbacks of its producers share.
struct OutboxState {
    topic: String,
    counters: Arc<ClusterLogCounters>,
    outage: Outage,
    waiting_records: AtomicU64,
    waiting_bytes: AtomicU64,
    /// Whether the present producer cannot go on.
    broken: AtomicBool,
    /// What has to be repeated, by its sequence.
    unsent: Mutex<BTreeMap<u64, UnsentRecord>>,
}

impl OutboxState {
    fn unsent(&self) -> MutexGuard<'_, BTreeMap<u64, UnsentRecord>> {
        self.unsent.lock().expect("no holder panics")
    }

    fn add(&self, bytes: u64) {
        self.waiting_records.fetch_add(1, Ordering::Relaxed);
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.counters.waiting.add(1);
        self.counters.waiting_bytes.add(bytes);
    }

    fn remove(&self, bytes: u64) {
        self.waiting_records.fetch_sub(1, Ordering::Relaxed);
        self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.counters.waiting.sub(1);
        self.counters.waiting_bytes.sub(bytes);
    }

    fn failed(&self, error: &KafkaError) {
        self.broken.store(true, Ordering::Release);
        if let Some(again) = self.outage.failed(tokio::time::Instant::now()) {
            let topic = &self.topic;
            // Checked at the start, so somebody has changed the topic.
            let hint = if is_too_large(error) {
                format!("; max.message.bytes of the topic must be at least {MESSAGE_BYTES_MAX}")
            } else {
                String::new()
            };
            tracing::warn!(%error, topic, "cannot store records; repeating them{again}{hint}");
        }
    }
}

struct OutboxContext(Arc<OutboxState>);

impl ClientContext for OutboxContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.counters.errors.add(1);
        tracing::debug!(%error, reason, topic = self.0.topic, "Kafka");
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) {
            self.0.failed(&error);
        }
    }
}

impl ProducerContext for OutboxContext {
    type DeliveryOpaque = Box<WaitingSend>;

    fn delivery(&self, result: &DeliveryResult<'_>, waiting: Box<WaitingSend>) {
        let state = &self.0;
        match result {
            Ok(_) => {
                state.remove(waiting.bytes);
                state.counters.stored.add(1);
                if let Some(back) = state.outage.succeeded(tokio::time::Instant::now()) {
                    tracing::info!(topic = state.topic, "records stored again {back}");
                }
                if let Some(stored) = waiting.stored {
                    stored();
                }
            }
            Err((error, message)) => {
                let purged = matches!(
                    error.rdkafka_error_code(),
                    Some(RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight)
                );
                if !purged {
                    state.counters.failed.add(1);
                    state.failed(error);
                }
                let sequence = waiting.sequence;
                state.unsent().insert(sequence, UnsentRecord::new(message, waiting));
            }
        }
    }
}

type OutboxProducer = BaseProducer<OutboxContext>;

/// Held while a record is queued, so that sequences and librdkafka's order agree.
struct Intake {
    producer: Arc<OutboxProducer>,
    next_sequence: u64,
    /// Whether records are accepted: not while a producer is replaced.
    accepts: bool,
}

struct OutboxShared {
    bounds: OutboxBounds,
    properties: ClientConfig,
    state: Arc<OutboxState>,
    intake: Mutex<Intake>,
    /// When to stop at the latest, once everything is stored.
    stop: Mutex<Option<Instant>>,
}

/// The queue to one topic.
pub(super) struct RecordOutbox {
    shared: Arc<OutboxShared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl RecordOutbox {
    /// An outbox to `topic`, which exists, with a thread of its own.
    pub(super) fn start(
        config: &KafkaConfig,
        topic: &str,
        linger_ms: u64,
        bounds: OutboxBounds,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        let properties = properties(config, linger_ms);
        let state = Arc::new(OutboxState {
            topic: topic.to_owned(),
            counters,
            outage: Outage::default(),
            waiting_records: AtomicU64::new(0),
            waiting_bytes: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            unsent: Mutex::default(),
        });
        let producer = producer(&properties, &state)?;
        let intake = Intake { producer: Arc::clone(&producer), next_sequence: 0, accepts: true };
        let shared = Arc::new(OutboxShared {
            bounds,
            properties,
            state,
            intake: Mutex::new(intake),
            stop: Mutex::default(),
        });
        let thread = spawn("kafka-outbox", {
            let shared = Arc::clone(&shared);
            move || shared.run(producer)
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Queues a record. Never blocks on the network.
    pub(super) fn send(&self, record: OutboxRecord<'_>) -> Queued {
        let OutboxRecord { partition, key, value, headers, headers_bytes, stored } = record;
        let content = (key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len)) as u64;
        let bytes = content + headers_bytes as u64 + WAITING_OVERHEAD_BYTES;
        if bytes > MESSAGE_BYTES_MAX {
            return Queued::TooLarge;
        }
        let OutboxShared { state, bounds, .. } = &*self.shared;
        let mut intake = self.shared.intake();
        let records = state.waiting_records.load(Ordering::Relaxed) + 1;
        let total = state.waiting_bytes.load(Ordering::Relaxed) + bytes;
        let accepts = intake.accepts && !state.broken.load(Ordering::Acquire);
        if !accepts || records > bounds.records_max || total > bounds.bytes_max {
            return Queued::Full;
        }
        let waiting = Box::new(WaitingSend { sequence: intake.next_sequence, bytes, stored });
        let record: BaseRecord<'_, [u8], [u8], Box<WaitingSend>> = BaseRecord {
            topic: &state.topic,
            partition: Some(partition),
            payload: value,
            key,
            timestamp: None,
            headers,
            delivery_opaque: waiting,
        };
        state.add(bytes);
        match intake.producer.send(record) {
            Ok(()) => {
                intake.next_sequence += 1;
                Queued::Accepted
            }
            Err((error, _)) => {
                state.remove(bytes);
                // `WAITING_OVERHEAD_BYTES` is more than librdkafka adds to a record.
                debug_assert!(!is_too_large(&error));
                state.failed(&error);
                Queued::Full
            }
        }
    }

    /// Whether no more than half of the bounds is used.
    pub(super) fn is_half_empty(&self) -> bool {
        let OutboxShared { state, bounds, .. } = &*self.shared;
        state.waiting_records.load(Ordering::Relaxed) <= bounds.records_max / 2
            && state.waiting_bytes.load(Ordering::Relaxed) <= bounds.bytes_max / 2
            && !state.broken.load(Ordering::Acquire)
    }

    /// Waits at most `grace` until all records are stored, and ends the thread. Returns the number of
    /// records that are not stored.
    pub(super) fn stop(&self, grace: Duration) -> u64 {
        *self.shared.stop.lock().expect("no holder panics") = Some(Instant::now() + grace);
        if let Some(thread) = self.thread.lock().expect("no holder panics").take() {
            thread.join().expect("a panic ends the process");
        }
        self.shared.state.waiting_records.load(Ordering::Relaxed)
    }
}

impl Drop for RecordOutbox {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

fn is_too_large(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge)
}

/// Properties of the producer of an outbox.
pub(super) fn properties(config: &KafkaConfig, linger_ms: u64) -> ClientConfig {
    let mut properties = client::common_properties(config);
    properties.set("linger.ms", linger_ms.to_string()).set("compression.type", "lz4");
    let mut properties = client::with_user_properties(properties, config);
    // The order and the promise of a record depend on these, so no setting changes them.
    properties
        .set("enable.idempotence", "true")
        .set("enable.gapless.guarantee", "true")
        .set("acks", "all")
        .set("message.timeout.ms", "0")
        .set("socket.timeout.ms", ANSWER_TIMEOUT_MS.to_string())
        .set("message.send.max.retries", i32::MAX.to_string())
        .set("max.in.flight.requests.per.connection", "5")
        .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
        // The outbox has its own bounds.
        .set("queue.buffering.max.messages", i32::MAX.to_string())
        .set("queue.buffering.max.kbytes", i32::MAX.to_string())
        // A topic that was deleted must not come back with the broker's defaults.
        .set("allow.auto.create.topics", "false");
    properties
}

fn producer(
    properties: &ClientConfig,
    state: &Arc<OutboxState>,
) -> Result<Arc<OutboxProducer>, KafkaError> {
    let context = OutboxContext(Arc::clone(state));
    BaseProducer::from_config_and_context(properties, context).map(Arc::new)
}

impl OutboxShared {
    fn intake(&self) -> MutexGuard<'_, Intake> {
        self.intake.lock().expect("no holder panics")
    }

    fn stop_at(&self) -> Option<Instant> {
        *self.stop.lock().expect("no holder panics")
    }

    /// Whether to give up now.
    fn is_over(&self) -> bool {
        let all_stored = self.state.waiting_records.load(Ordering::Relaxed) == 0;
        self.stop_at().is_some_and(|at| all_stored || Instant::now() >= at)
    }

    fn run(&self, mut producer: Arc<OutboxProducer>) {
        let mut pause = REPLACE_PAUSES[0];
        let mut replaced_at = Instant::now();
        while !self.is_over() {
            producer.poll(POLL_TIMEOUT);
            if !self.state.broken.load(Ordering::Acquire) {
                continue;
            }
            // A producer that worked for a while was not replaced in vain.
            if replaced_at.elapsed() > 2 * REPLACE_PAUSES[1] {
                pause = REPLACE_PAUSES[0];
            }
            self.drain(&producer);
            self.pause(pause);
            pause = (2 * pause).min(REPLACE_PAUSES[1]);
            replaced_at = Instant::now();
            match self::producer(&self.properties, &self.state) {
                Ok(new) => {
                    producer = new;
                    self.repeat(&producer);
                }
                Err(error) => self.state.failed(&error),
            }
        }
        self.intake().accepts = false;
    }

    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while Instant::now() < until && !self.is_over() {
            std::thread::sleep(POLL_TIMEOUT.min(pause));
        }
    }

    /// Waits for the answers to the requests in flight, and takes every record back that is not stored.
    fn drain(&self, producer: &OutboxProducer) {
        self.intake().accepts = false;
        let deadline = Instant::now() + DRAIN_MAX;
        while producer.in_flight_count() > 0 && Instant::now() < deadline && !self.is_over() {
            // Nothing more is sent. What librdkafka would retry returns to the queue, and is taken here.
            producer.purge(PurgeConfig::default().queue());
            producer.poll(Duration::from_millis(20));
        }
        producer.purge(PurgeConfig::default().queue().inflight());
        // Only runs the callbacks: no request is waited for.
        if let Err(error) = producer.flush(DRAIN_MAX) {
            tracing::error!(%error, topic = self.state.topic, "records of a producer are lost");
        }
    }

    /// Repeats through a new producer what is not stored, in order.
    fn repeat(&self, producer: &Arc<OutboxProducer>) {
        let state = &self.state;
        state.broken.store(false, Ordering::Release);
        state.counters.producers_replaced.add(1);
        loop {
            let Some((_, record)) = state.unsent().pop_first() else { break };
            let UnsentRecord { partition, key, value, headers, waiting } = record;
            let record: BaseRecord<'_, [u8], [u8], Box<WaitingSend>> = BaseRecord {
                topic: &state.topic,
                partition: Some(partition),
                payload: value.as_deref(),
                key: key.as_deref(),
                timestamp: None,
                headers,
                delivery_opaque: waiting,
            };
            if let Err((error, BaseRecord { headers, delivery_opaque: waiting, .. })) =
                producer.send(record)
            {
                let sequence = waiting.sequence;
                let record = UnsentRecord { partition, key, value, headers, waiting };
                state.unsent().insert(sequence, record);
                state.failed(&error);
                return;
            }
        }
        let mut intake = self.intake();
        let former = std::mem::replace(&mut intake.producer, Arc::clone(producer));
        intake.accepts = true;
        drop(intake);
        // Takes a while.
        drop(former);
    }
}
