//! Reader of the hand-off topic: delivers the records for this node.
//!
//! ```text
//!              ┌── one router: its bell is rung, and its thread takes the records (`ArrivedHandOffs`)
//!  librdkafka ─┤
//!              └── several routers: the thread "kafka-hand-off" takes them and rings the router of each
//! ```
//!
//! A single router takes the records itself, because to wake another thread first would delay each of them. The
//! thread starts and restarts the reading in both cases, asks whether the topic still exists, and takes what
//! the router has not.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use rdkafka::error::KafkaResult;
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};

use crate::handoff::{Doorbell, Pushed};
use crate::service::cluster::ports::{
    ArrivedHandOffs, HandOffReceiver, IncomingHandOff, NodeEpoch,
};
use crate::service::cluster::wire::HandOffHeader;
use crate::service::routing::kafka::hand_off_topic::{HAND_OFF, TO};
use crate::service::routing::kafka::partition_reader::{
    LogStatus, LogTap, POLL_TIMEOUT, PartitionReader, Polled,
};
use crate::service::routing::kafka::{ClusterLogCounters, KafkaConfig, KafkaStartError, spawn};

/// Records between two calls of [`HandOffReceiver::read_to`], and before the thread looks after anything else.
const BATCH_RECORDS: usize = 512;
/// Pause while the receiver is full.
const FULL_PAUSE: Duration = Duration::from_millis(1);
/// A partition that is silent for this long before a barrier is read is started again: see
/// [`HandOffReader::end_offset`].
const SILENCE_BEFORE_PROBE: Duration = Duration::from_millis(500);

/// Reads the hand-offs to this node from one partition: from the end that the partition has when the reader
/// starts.
pub struct HandOffReader {
    partition: i32,
    follower: Arc<HandOffFollower>,
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
        let waker = Arc::<TakerWaker>::default();
        let tap = reader.tap({
            let waker = Arc::clone(&waker);
            move || waker.wake()
        })?;
        let follower = Arc::new(HandOffFollower {
            reader,
            receiver,
            counters,
            status,
            waker,
            epoch: AtomicU64::new(epoch.0),
            delivered: AtomicI64::new(-1),
            awaited: AtomicI64::new(-1),
            stopping: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            taking: Mutex::new(Taking::new(tap)),
        });
        let log = Arc::clone(&follower) as Arc<dyn ArrivedHandOffs>;
        if let Some(bell) = follower.receiver.opened(log) {
            assert!(follower.waker.bell.set(bell).is_ok(), "opened once");
        }
        let running = Arc::clone(&follower);
        let thread = spawn("kafka-hand-off", move || running.run())?;
        Ok(Self { partition, follower, thread: Mutex::new(Some(thread)) })
    }

    /// The partition that is read.
    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// Whether the partition is read. Only then may others know of this node: what is stored earlier is
    /// not delivered.
    pub fn status(&self) -> &Arc<LogStatus> {
        &self.follower.status
    }

    /// Takes a new epoch. Records for the former one that are not offered yet are skipped.
    pub fn set_epoch(&self, epoch: NodeEpoch) {
        self.follower.epoch.store(epoch.0, Ordering::Release);
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
        let (_, end) = self.follower.reader.watermarks()?;
        self.follower.awaited.fetch_max(end, Ordering::AcqRel);
        Ok(end)
    }

    /// Whether every record below an end offset was delivered to the receiver. Never blocks.
    pub fn has_delivered(&self, end: i64) -> bool {
        self.follower.delivered.load(Ordering::Acquire) >= end
    }

    /// Ends the thread. Blocks.
    pub fn stop(&self) {
        self.follower.stopping.store(true, Ordering::Release);
        let thread = self.thread.lock().expect("no holder panics").take();
        let Some(thread) = thread else { return };
        thread.thread().unpark();
        thread.join().expect("a panic ends the process");
    }
}

/// Wakes whoever takes the records: the receiver, if it has a bell, or else the reader's thread.
#[derive(Default)]
struct TakerWaker {
    bell: OnceLock<Arc<Doorbell>>,
    thread: OnceLock<Thread>,
}

impl TakerWaker {
    fn wake(&self) {
        match (self.bell.get(), self.thread.get()) {
            (Some(bell), _) => bell.ring(),
            (None, Some(thread)) => thread.unpark(),
            // Nothing is read before the thread runs.
            (None, None) => {}
        }
    }
}

/// What was found in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// All records that had arrived.
    All,
    /// As many records as were asked for.
    Some,
    /// The receiver is full.
    Full,
    /// The position is lost.
    Lost,
}

/// Where the reading is. Who holds its lock takes records.
struct Taking {
    tap: LogTap,
    position: i64,
    /// The last position that was reported to the receiver.
    reported: Option<i64>,
    unreported: usize,
    quiet_since: Instant,
    /// The end that is known to exist since before the partition was started again.
    probed: Option<i64>,
    /// A record that the receiver had no room for, and the epoch that it is for.
    refused: Option<(u64, IncomingHandOff)>,
    is_lost: bool,
}

impl Taking {
    fn new(tap: LogTap) -> Self {
        Self {
            tap,
            position: 0,
            reported: None,
            unreported: 0,
            quiet_since: Instant::now(),
            probed: None,
            refused: None,
            // Nothing is taken before it is started.
            is_lost: true,
        }
    }

    fn start(&mut self, position: i64) {
        self.position = position;
        (self.reported, self.probed, self.refused) = (None, None, None);
        self.unreported = 0;
        self.quiet_since = Instant::now();
        self.is_lost = false;
    }
}

struct HandOffFollower {
    reader: PartitionReader,
    receiver: Arc<dyn HandOffReceiver>,
    counters: Arc<ClusterLogCounters>,
    status: Arc<LogStatus>,
    waker: Arc<TakerWaker>,
    epoch: AtomicU64,
    /// Every record of this node below it was delivered to the receiver; -1: not started.
    delivered: AtomicI64,
    /// An end offset that somebody waits for.
    awaited: AtomicI64,
    stopping: AtomicBool,
    /// The receiver found the lock taken.
    wanted: AtomicBool,
    taking: Mutex<Taking>,
}

impl ArrivedHandOffs for HandOffFollower {
    fn take(&self, max: usize) -> bool {
        // Before the lock is tried: whoever has it looks here after giving it back.
        self.wanted.store(true, Ordering::SeqCst);
        let Ok(mut taking) = self.taking.try_lock() else { return false };
        self.wanted.store(false, Ordering::SeqCst);
        let before = taking.position;
        let _ = self.take_from(&mut taking, max);
        taking.position != before
    }
}

impl HandOffFollower {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn taking(&self) -> MutexGuard<'_, Taking> {
        self.taking.lock().expect("no holder panics")
    }

    fn run(&self) {
        self.waker.thread.set(std::thread::current()).expect("one thread");
        let mut from_end = true;
        while !self.is_stopping() {
            let started = self.reader.try_start(|low, end| if from_end { end } else { low });
            let Some((start, _)) = started else { continue };
            if !from_end {
                // The records from where it was to here are lost, and some of them may be for this node.
                self.receiver.missed();
            }
            self.taking().start(start);
            self.status.set_following(true);
            self.follow();
            self.taking().is_lost = true;
            if !self.is_stopping() {
                from_end = false;
                // An end offset that was asked for may lie above that of a topic that was lost.
                self.awaited.store(-1, Ordering::Release);
            }
        }
    }

    /// Reads until the position is lost, the topic is gone, or the node stops.
    fn follow(&self) {
        while !self.is_stopping() {
            // What concerns no partition. The records do not come this way.
            match self.reader.poll(Duration::ZERO) {
                Polled::Gone => return self.receiver.gone(),
                Polled::Lost => return,
                Polled::Record(_) | Polled::End | Polled::Nothing => {}
            }
            let mut taking = self.taking();
            let taken = self.take_from(&mut taking, BATCH_RECORDS);
            if taken == Taken::All {
                self.probe(&mut taking);
            }
            drop(taking);
            if self.wanted.swap(false, Ordering::SeqCst) {
                self.waker.wake();
            }
            match taken {
                Taken::Lost => return,
                Taken::Some => {}
                Taken::Full => std::thread::park_timeout(FULL_PAUSE),
                Taken::All => std::thread::park_timeout(POLL_TIMEOUT),
            }
        }
    }

    /// Starts the partition again if it is silent below an end offset that somebody waits for.
    fn probe(&self, taking: &mut Taking) {
        let awaited = self.awaited.load(Ordering::Acquire);
        if awaited > taking.position && taking.quiet_since.elapsed() >= SILENCE_BEFORE_PROBE {
            taking.quiet_since = Instant::now();
            taking.probed = self.reader.start(taking.position).is_ok().then_some(awaited);
        }
    }

    /// Passes at most `max` records that have arrived to the receiver. Never blocks.
    fn take_from(&self, taking: &mut Taking, max: usize) -> Taken {
        if taking.is_lost {
            return Taken::Lost;
        }
        if let Some((to, hand_off)) = taking.refused.take()
            && let Some(refused) = self.offer(to, hand_off)
        {
            taking.refused = Some(refused);
            return Taken::Full;
        }
        for _ in 0..max {
            match taking.tap.poll(&self.reader) {
                Polled::Record(message) => {
                    let next = message.offset() + 1;
                    let refused = self.pass(&message);
                    drop(message);
                    taking.quiet_since = Instant::now();
                    if refused.is_some() {
                        // What was reported is below it.
                        taking.refused = refused;
                        taking.position = next;
                        return Taken::Full;
                    }
                    taking.position = next;
                    taking.unreported += 1;
                    if taking.unreported >= BATCH_RECORDS {
                        self.report(taking);
                    }
                }
                Polled::End => {
                    let end = taking.probed.take().unwrap_or(taking.position);
                    taking.position = taking.position.max(end);
                    self.report(taking);
                }
                Polled::Lost | Polled::Gone => {
                    taking.is_lost = true;
                    return Taken::Lost;
                }
                Polled::Nothing => {
                    self.report(taking);
                    return Taken::All;
                }
            }
        }
        Taken::Some
    }

    /// Says how far the partition was read, if that has changed.
    fn report(&self, taking: &mut Taking) {
        taking.unreported = 0;
        if taking.reported != Some(taking.position) {
            taking.reported = Some(taking.position);
            self.delivered.store(taking.position, Ordering::Release);
            self.receiver.read_to(taking.position);
        }
    }

    /// Passes a record on if it is for this node. Returns what the receiver has no room for.
    fn pass(&self, message: &BorrowedMessage<'_>) -> Option<(u64, IncomingHandOff)> {
        self.counters.read.add(1);
        let Some(to) = header(message, TO).and_then(|to| to.try_into().ok()) else {
            self.counters.unreadable.add(1);
            return None;
        };
        let to = u64::from_be_bytes(to);
        if to != self.epoch.load(Ordering::Acquire) {
            self.counters.skipped.add(1);
            return None;
        }
        let decoded = header(message, HAND_OFF).map(HandOffHeader::decode);
        let Some(Ok(header)) = decoded else {
            self.counters.unreadable.add(1);
            tracing::error!(
                offset = message.offset(),
                "unreadable hand-off to this node: all sessions are closed with 4409"
            );
            self.receiver.missed();
            return None;
        };
        let value = Bytes::copy_from_slice(message.payload().unwrap_or_default());
        self.offer(to, IncomingHandOff { header, value })
    }

    /// Offers a hand-off to the receiver, unless it is for a former epoch. Returns it if there is no room.
    fn offer(&self, to: u64, hand_off: IncomingHandOff) -> Option<(u64, IncomingHandOff)> {
        if to != self.epoch.load(Ordering::Acquire) {
            return None;
        }
        match self.receiver.receive(hand_off) {
            Pushed::Accepted | Pushed::Closed(_) => None,
            Pushed::Full(again) => Some((to, again)),
        }
    }
}

fn header<'a>(message: &'a BorrowedMessage<'_>, name: &str) -> Option<&'a [u8]> {
    let headers = message.headers()?;
    headers.iter().find(|header| header.key == name)?.value
}
