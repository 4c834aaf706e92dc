//! Writer and reader of the hand-off topic: records for the sessions of other nodes.
//!
//! | header | value |
//! | --- | --- |
//! | `to` | the epoch of the node, 8 bytes, big endian: a reader skips the records of others without decoding |
//! | `hand-off` | a `HandOffHeader` (`proto/delivery/cluster/v1/cluster.proto`) |

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaResult;
use rdkafka::message::{BorrowedMessage, Header, Headers as _, Message as _, OwnedHeaders};

use crate::handoff::Pushed;
use crate::service::cluster::ports::{
    HandOffReceiver, HandOffSink, HandOffStored, IncomingHandOff, NodeEpoch, OutgoingHandOff,
    Queued,
};
use crate::service::cluster::wire::HandOffHeader;
use crate::service::routing::kafka::outbox::{self, OutboxBounds, OutboxRecord, RecordOutbox};
use crate::service::routing::kafka::partition_reader::{
    LogStatus, POLL_TIMEOUT, PartitionReader, Polled,
};
use crate::service::routing::kafka::{ClusterLogCounters, KafkaConfig, KafkaStartError, spawn};

const TO: &str = "to";
const HAND_OFF: &str = "hand-off";
/// Time that a record waits for others, ms. Part of the latency of every event on another node.
pub const HAND_OFF_LINGER_MS: u64 = 1;
/// Waiting records. [`HandOffSink::has_room`] leaves half of each for the routers that have begun a
/// record.
const BOUNDS: OutboxBounds = OutboxBounds { records_max: 131_072, bytes_max: 128 << 20 };
/// Memory of the hand-offs that wait to be stored, bytes.
pub const HAND_OFF_BYTES_MAX: u64 = BOUNDS.memory();
/// Records between two calls of [`HandOffReceiver::read_to`].
const BATCH_RECORDS: usize = 512;
/// Pause while the receiver is full.
const FULL_PAUSE: Duration = Duration::from_millis(1);
/// A partition that is silent for this long before a barrier is read is started again: see
/// [`HandOffReader::end_offset`].
const SILENCE_BEFORE_PROBE: Duration = Duration::from_millis(500);

/// Properties of the producer of hand-offs. librdkafka's `CONFIGURATION.md` describes each.
pub fn hand_off_producer_properties(config: &KafkaConfig) -> ClientConfig {
    outbox::properties(config, HAND_OFF_LINGER_MS)
}

/// The headers of a hand-off, and their bytes.
pub fn hand_off_headers(target: NodeEpoch, header: &HandOffHeader) -> (OwnedHeaders, usize) {
    let header = header.encode_to_vec();
    let headers = OwnedHeaders::new_with_capacity(2)
        .insert(Header { key: TO, value: Some(&target.0.to_be_bytes()) })
        .insert(Header { key: HAND_OFF, value: Some(&header) });
    (headers, TO.len() + size_of::<u64>() + HAND_OFF.len() + header.len())
}

/// Stores hand-offs. Bounded; see [`HAND_OFF_BYTES_MAX`].
pub struct HandOffOutbox(RecordOutbox);

impl HandOffOutbox {
    /// A writer of `topic`, which exists.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: &KafkaConfig,
        topic: &str,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        RecordOutbox::start(config, topic, HAND_OFF_LINGER_MS, BOUNDS, counters).map(Self)
    }

    /// Waits at most `grace` until all hand-offs are stored. Returns the number of those that are not.
    /// Blocks. Nothing is stored afterwards.
    pub fn stop(&self, grace: Duration) -> u64 {
        self.0.stop(grace)
    }
}

impl HandOffSink for HandOffOutbox {
    fn send(&self, hand_off: OutgoingHandOff<'_>, stored: HandOffStored) -> Queued {
        let OutgoingHandOff { target, partition, header, key, value } = hand_off;
        let (headers, headers_bytes) = hand_off_headers(target, header);
        self.0.send(OutboxRecord {
            partition,
            key,
            value: Some(value),
            headers: Some(headers),
            headers_bytes,
            stored: Some(stored),
        })
    }

    fn has_room(&self) -> bool {
        self.0.is_half_empty()
    }
}

/// What the thread of the reader and its owner share.
struct HandOffProgress {
    epoch: AtomicU64,
    /// Every record of this node below it was delivered to the receiver; -1: not started.
    delivered: AtomicI64,
    /// An end offset that somebody waits for.
    awaited: AtomicI64,
    stopping: AtomicBool,
}

/// Reads the hand-offs to this node from one partition, on a thread of its own: from the end that the
/// partition has when the reader starts.
pub struct HandOffReader {
    partition: i32,
    status: Arc<LogStatus>,
    progress: Arc<HandOffProgress>,
    reader: Arc<PartitionReader>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl HandOffReader {
    /// Starts to read `partition` of `topic`, which exists, for the node `epoch`. Unreachable brokers are
    /// retried without end; [`HandOffReader::status`] shows it.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: &KafkaConfig,
        topic: &str,
        partition: i32,
        epoch: NodeEpoch,
        receiver: Arc<dyn HandOffReceiver>,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        let status = Arc::new(LogStatus::new(topic));
        let (status_of_reader, counted) = (Arc::clone(&status), Arc::clone(&counters));
        let reader = PartitionReader::new(config, topic, partition, status_of_reader, counted)?;
        let reader = Arc::new(reader);
        let progress = Arc::new(HandOffProgress {
            epoch: AtomicU64::new(epoch.0),
            delivered: AtomicI64::new(-1),
            awaited: AtomicI64::new(-1),
            stopping: AtomicBool::new(false),
        });
        let follower = HandOffFollower {
            reader: Arc::clone(&reader),
            receiver,
            counters,
            status: Arc::clone(&status),
            progress: Arc::clone(&progress),
        };
        let thread = spawn("kafka-hand-off", move || follower.run())?;
        Ok(Self { partition, status, progress, reader, thread: Mutex::new(Some(thread)) })
    }

    /// The partition that is read.
    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// Whether the partition is read. Only then may others know of this node: what is stored earlier is
    /// not delivered.
    pub fn status(&self) -> &Arc<LogStatus> {
        &self.status
    }

    /// Takes a new epoch. Records for the former one that are not offered yet are skipped.
    pub fn set_epoch(&self, epoch: NodeEpoch) {
        self.progress.epoch.store(epoch.0, Ordering::Release);
    }

    /// The end offset of the partition now, for a barrier: what is stored before this call is below it.
    /// The receiver's [`HandOffReceiver::read_to`] reaches it. Blocks for at most 3 s.
    ///
    /// The last offsets of a partition may hold no record, and nothing arrives for them. So a partition
    /// that is silent below an end offset that was asked for is started again at its position, which
    /// reports its end.
    ///
    /// # Errors
    /// The brokers do not answer.
    pub fn end_offset(&self) -> KafkaResult<i64> {
        let (_, end) = self.reader.watermarks()?;
        self.progress.awaited.fetch_max(end, Ordering::AcqRel);
        Ok(end)
    }

    /// Whether every record below an end offset was delivered to the receiver. Never blocks.
    pub fn has_delivered(&self, end: i64) -> bool {
        self.progress.delivered.load(Ordering::Acquire) >= end
    }

    /// Ends the thread. Blocks.
    pub fn stop(&self) {
        self.progress.stopping.store(true, Ordering::Release);
        let thread = self.thread.lock().expect("no holder panics").take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the reader of the hand-off topic panicked");
        }
    }
}

struct HandOffFollower {
    reader: Arc<PartitionReader>,
    receiver: Arc<dyn HandOffReceiver>,
    counters: Arc<ClusterLogCounters>,
    status: Arc<LogStatus>,
    progress: Arc<HandOffProgress>,
}

impl HandOffFollower {
    fn is_stopping(&self) -> bool {
        self.progress.stopping.load(Ordering::Acquire)
    }

    fn run(self) {
        let mut from_end = true;
        while !self.is_stopping() {
            let started = self.reader.try_start(|low, end| if from_end { end } else { low });
            let Some((start, _)) = started else { continue };
            if !from_end {
                // The records from where it was to here are lost, and some of them may be for this node.
                self.receiver.missed();
            }
            self.status.set_following(true);
            self.follow(start);
            if !self.is_stopping() {
                from_end = false;
                // An end offset that was asked for may lie above that of a topic that was lost.
                self.progress.awaited.store(-1, Ordering::Release);
            }
        }
    }

    /// Reads from `position` until the position is lost or the node stops.
    fn follow(&self, mut position: i64) {
        let mut quiet_since = Instant::now();
        // The end that is known to exist since before the partition was started again.
        let mut probed = None;
        let mut reported = None;
        let mut batch = 0;
        while !self.is_stopping() {
            // Not to wait with an unreported batch: its last record may be what others wait for.
            let timeout = if reported == Some(position) { POLL_TIMEOUT } else { Duration::ZERO };
            let is_end = match self.reader.poll(timeout) {
                Polled::Record(message) => {
                    quiet_since = Instant::now();
                    if !self.take(&message) {
                        return;
                    }
                    position = message.offset() + 1;
                    batch += 1;
                    false
                }
                Polled::End => {
                    position = position.max(probed.take().unwrap_or(position));
                    true
                }
                Polled::Lost => return,
                Polled::Gone => {
                    self.receiver.gone();
                    return;
                }
                Polled::Nothing => {
                    let awaited = self.progress.awaited.load(Ordering::Acquire);
                    if awaited > position && quiet_since.elapsed() >= SILENCE_BEFORE_PROBE {
                        quiet_since = Instant::now();
                        probed = self.reader.start(position).is_ok().then_some(awaited);
                    }
                    true
                }
            };
            if (is_end || batch >= BATCH_RECORDS) && reported != Some(position) {
                batch = 0;
                reported = Some(position);
                self.progress.delivered.store(position, Ordering::Release);
                self.receiver.read_to(position);
            }
        }
    }

    /// Delivers a record if it is for this node. Waits while the receiver is full. `false`: the node stops.
    fn take(&self, message: &BorrowedMessage<'_>) -> bool {
        self.counters.read.add(1);
        let is_mine =
            |to: [u8; 8]| u64::from_be_bytes(to) == self.progress.epoch.load(Ordering::Acquire);
        let Some(to) = header(message, TO).and_then(|to| to.try_into().ok()) else {
            self.counters.unreadable.add(1);
            return true;
        };
        if !is_mine(to) {
            self.counters.skipped.add(1);
            return true;
        }
        let decoded = header(message, HAND_OFF).map(HandOffHeader::decode);
        let Some(Ok(header)) = decoded else {
            self.counters.unreadable.add(1);
            tracing::error!(
                offset = message.offset(),
                "unreadable hand-off to this node: all sessions are closed with 4409"
            );
            self.receiver.missed();
            return true;
        };
        let value = Bytes::copy_from_slice(message.payload().unwrap_or_default());
        let mut hand_off = IncomingHandOff { header, value };
        while is_mine(to) {
            if self.is_stopping() {
                return false;
            }
            match self.receiver.receive(hand_off) {
                Pushed::Accepted | Pushed::Closed(_) => break,
                Pushed::Full(again) => hand_off = again,
            }
            std::thread::sleep(FULL_PAUSE);
        }
        true
    }
}

fn header<'a>(message: &'a BorrowedMessage<'_>, name: &str) -> Option<&'a [u8]> {
    let headers = message.headers()?;
    headers.iter().find(|header| header.key == name)?.value
}
