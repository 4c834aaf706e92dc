//! Writer and reader of the sessions topic: who is where.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use rdkafka::message::{BorrowedMessage, Message as _};

use crate::service::cluster::ports::{Queued, SessionsLog, SessionsRecord, SessionsWriter};
use crate::service::cluster::wire::SessionsKey;
use crate::service::routing::kafka::outbox::{OutboxBounds, OutboxRecord, RecordOutbox};
use crate::service::routing::kafka::partition_reader::{
    LogStatus, POLL_TIMEOUT, PartitionReader, Polled,
};
use crate::service::routing::kafka::{ClusterLogCounters, KafkaConfig, KafkaStartError, spawn};

/// The only partition.
const PARTITION: i32 = 0;
/// Time that a record waits for others, ms.
pub const SESSIONS_LINGER_MS: u64 = 5;
/// Waiting records: the beginnings of 12 s at 10,000 a second.
const BOUNDS: OutboxBounds = OutboxBounds { records_max: 131_072, bytes_max: 80 << 20 };
/// Memory of the records that wait to be stored, bytes.
pub const SESSIONS_BYTES_MAX: u64 = BOUNDS.memory();
/// Records between two calls of [`SessionsLog::read_to`].
const BATCH_RECORDS: usize = 512;

/// Writes the sessions topic. Bounded; see [`SESSIONS_BYTES_MAX`].
pub struct SessionsOutbox(RecordOutbox);

impl SessionsOutbox {
    /// A writer of `topic`, which exists.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: &KafkaConfig,
        topic: &str,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        RecordOutbox::start(config, topic, SESSIONS_LINGER_MS, BOUNDS, counters).map(Self)
    }

    /// Waits at most `grace` until all records are stored. Returns the number of those that are not.
    /// Blocks. Nothing is stored afterwards.
    pub fn stop(&self, grace: Duration) -> u64 {
        self.0.stop(grace)
    }
}

impl SessionsWriter for SessionsOutbox {
    fn write(&self, key: &SessionsKey, value: Option<&[u8]>) -> bool {
        let queued = self.0.send(OutboxRecord {
            partition: PARTITION,
            key: Some(&key.encode_to_vec()),
            value,
            headers: None,
            headers_bytes: 0,
            stored: None,
        });
        // Ids are bounded, and a lease names the partitions of one node.
        debug_assert_ne!(queued, Queued::TooLarge);
        queued == Queued::Accepted
    }
}

/// Reads the sessions topic from its beginning, for ever, on a thread of its own.
pub struct SessionsReader {
    status: Arc<LogStatus>,
    stopping: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl SessionsReader {
    /// Starts to read `topic`, which exists, into `log`. Unreachable brokers are retried without end;
    /// [`SessionsReader::status`] shows it.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: &KafkaConfig,
        topic: &str,
        log: Arc<dyn SessionsLog>,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        let status = Arc::new(LogStatus::new(topic));
        let stopping = Arc::<AtomicBool>::default();
        let (status_of_reader, counted) = (Arc::clone(&status), Arc::clone(&counters));
        let reader = PartitionReader::new(config, topic, PARTITION, status_of_reader, counted)?;
        let follower = SessionsFollower {
            reader,
            log,
            counters,
            status: Arc::clone(&status),
            stopping: Arc::clone(&stopping),
        };
        let thread = spawn("kafka-sessions", move || follower.run())?;
        Ok(Self { status, stopping, thread: Mutex::new(Some(thread)) })
    }

    /// Whether the end that the topic had at the start is reached.
    pub fn status(&self) -> &Arc<LogStatus> {
        &self.status
    }

    /// Ends the thread. Blocks.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.thread.lock().expect("no holder panics").take() {
            thread.join().expect("a panic ends the process");
        }
    }
}

/// Why a reader has to start again from the beginning.
enum LostBy {
    /// Records were removed before it read them.
    Compaction,
    /// Its position is not in the topic any more, or the node stops.
    Topic,
}

struct SessionsFollower {
    reader: PartitionReader,
    log: Arc<dyn SessionsLog>,
    counters: Arc<ClusterLogCounters>,
    status: Arc<LogStatus>,
    stopping: Arc<AtomicBool>,
}

impl SessionsFollower {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn run(self) {
        while !self.is_stopping() {
            let Some((start, end)) = self.reader.try_start(|low, _| low) else { continue };
            let lost = self.follow(start, end);
            if !self.is_stopping() {
                self.status.set_following(false);
                match lost {
                    LostBy::Compaction => self.log.fell_behind(),
                    LostBy::Topic => self.log.restarted(),
                }
            }
        }
    }

    /// Reads from `start` until the position is lost or the node stops. `end`: the end offset when it
    /// was started.
    fn follow(&self, start: i64, end: i64) -> LostBy {
        let mut position = start;
        let mut reported = None;
        let mut batch = 0;
        while !self.is_stopping() {
            // Not to wait with an unreported batch: its last record may be what others wait for.
            let waits = position < end || reported == Some(position);
            let timeout = if waits { POLL_TIMEOUT } else { Duration::ZERO };
            let is_end = match self.reader.poll(timeout) {
                Polled::Record(message) => {
                    // Only compaction makes holes: there are no transactions in this topic.
                    if position >= end && message.offset() > position {
                        return LostBy::Compaction;
                    }
                    self.counters.read.add(1);
                    position = message.offset() + 1;
                    self.log.record(self.record(&message));
                    batch += 1;
                    false
                }
                Polled::End => {
                    // The last offsets may hold no record.
                    position = position.max(end);
                    true
                }
                Polled::Nothing => true,
                Polled::Lost | Polled::Gone => return LostBy::Topic,
            };
            // Before the end of the first pass the log is not whole: compaction has moved leases behind sessions.
            let is_due = is_end || batch >= BATCH_RECORDS;
            if is_due && position >= end && reported != Some(position) {
                batch = 0;
                reported = Some(position);
                self.log.read_to(position);
                self.status.set_following(true);
            }
        }
        LostBy::Topic
    }

    fn record(&self, message: &BorrowedMessage<'_>) -> SessionsRecord {
        // Epoch 0 is no epoch: an empty or foreign key.
        let key = message.key().and_then(|key| SessionsKey::decode(key).ok());
        let key = key.filter(|key| key.epoch != 0);
        if key.is_none() {
            self.counters.unreadable.add(1);
        }
        SessionsRecord {
            offset: message.offset(),
            appended_at_ms: message.timestamp().to_millis().unwrap_or(0),
            key,
            value: message.payload().map(Bytes::copy_from_slice),
        }
    }
}
