//! Both topics of the cluster, as one part of a node.
//!
//! ```text
//!   open ──► outboxes (accept at once; nobody may write before the table is read)
//!   follow ─► thread "kafka-cluster": topics checked ─► hand-offs followed ─► sessions read
//!                                                                │               │
//!                             the lease may name the partition ◄─┘               └─► missing() is None
//! ```
//!
//! The hand-off reader starts first, at the end of its partition: what is stored later is for a node that
//! others know, and is read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::service::cluster::ports::{
    HandOffReceiver, HandOffSink, NodeEpoch, SessionsLog, SessionsWriter,
};
use crate::service::routing::kafka::topic_specs::ClusterTopicNames;
use crate::service::routing::kafka::topics::{TopicsError, ensure_topics};
use crate::service::routing::kafka::{
    ClaimBarrier, ClusterLogCounters, HandOffOutbox, HandOffReader, KafkaConfig, KafkaStartError,
    SessionsOutbox, SessionsReader, spawn,
};

/// Pause between two looks at whether the hand-off partition is followed.
const FOLLOWING_PAUSE: Duration = Duration::from_millis(20);

/// Metrics of both topics.
#[derive(Clone, Debug, Default)]
pub struct ClusterLogMetrics {
    /// The sessions topic.
    pub sessions: Arc<ClusterLogCounters>,
    /// The hand-off topic.
    pub hand_off: Arc<ClusterLogCounters>,
}

/// What a node does with the topics of its cluster.
pub struct ClusterLogParts {
    /// The epoch under which the node starts.
    pub epoch: NodeEpoch,
    /// Gets the sessions topic.
    pub log: Arc<dyn SessionsLog>,
    /// Gets the hand-offs to this node.
    pub receiver: Arc<dyn HandOffReceiver>,
    /// Called at most once, if the node cannot work: the text names the commands that mend it.
    pub failed: Box<dyn FnOnce(TopicsError) + Send>,
}

/// The writers and readers of both topics. Bounded: see
/// [`SESSIONS_BYTES_MAX`](crate::service::routing::kafka::SESSIONS_BYTES_MAX),
/// [`HAND_OFF_BYTES_MAX`](crate::service::routing::kafka::HAND_OFF_BYTES_MAX), and for each of the two readers
/// [`LOG_READER_BYTES_MAX`](crate::service::routing::kafka::LOG_READER_BYTES_MAX).
pub struct ClusterLogs {
    config: KafkaConfig,
    names: ClusterTopicNames,
    metrics: ClusterLogMetrics,
    sessions: Arc<SessionsOutbox>,
    hand_offs: Arc<HandOffOutbox>,
    readers: Arc<LogReaders>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The readers, once the topics are known.
#[derive(Default)]
struct LogReaders {
    epoch: AtomicU64,
    hand_offs: OnceLock<HandOffReader>,
    sessions: OnceLock<SessionsReader>,
    /// Why the topics are not known yet.
    waiting: Mutex<Option<String>>,
    stopping: Arc<AtomicBool>,
}

impl ClaimBarrier for LogReaders {
    fn end_offset(&self) -> Option<i64> {
        match self.hand_offs.get()?.end_offset() {
            Ok(end) => Some(end),
            Err(error) => {
                tracing::debug!(%error, "cannot ask for the end of the hand-off partition");
                None
            }
        }
    }
}

impl ClusterLogs {
    /// Starts the writers. Needs no broker.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn open(
        config: KafkaConfig,
        names: ClusterTopicNames,
        metrics: ClusterLogMetrics,
    ) -> Result<Self, KafkaStartError> {
        let counters = Arc::clone(&metrics.sessions);
        let sessions = Arc::new(SessionsOutbox::start(&config, &names.sessions, counters)?);
        let counters = Arc::clone(&metrics.hand_off);
        let hand_offs = Arc::new(HandOffOutbox::start(&config, &names.hand_off, counters)?);
        let (readers, thread) = (Arc::default(), Mutex::default());
        Ok(Self { config, names, metrics, sessions, hand_offs, readers, thread })
    }

    /// Where to write beginnings, ends and leases: nothing before [`ClusterLogs::missing`] is `None`.
    pub fn sessions(&self) -> Arc<dyn SessionsWriter> {
        Arc::clone(&self.sessions) as Arc<dyn SessionsWriter>
    }

    /// Where hand-offs go.
    pub fn hand_offs(&self) -> Arc<dyn HandOffSink> {
        Arc::clone(&self.hand_offs) as Arc<dyn HandOffSink>
    }

    /// The barrier of claims.
    pub fn barrier(&self) -> Arc<dyn ClaimBarrier> {
        Arc::clone(&self.readers) as Arc<dyn ClaimBarrier>
    }

    /// Creates and checks the topics, and reads both, on threads of their own. Unreachable brokers are retried
    /// without end; [`ClusterLogs::missing`] shows it. To be called once.
    ///
    /// # Errors
    /// The process cannot have another thread.
    pub fn follow(&self, parts: ClusterLogParts) -> Result<(), KafkaStartError> {
        self.readers.epoch.store(parts.epoch.0, Ordering::Release);
        let (config, names) = (self.config.clone(), self.names.clone());
        let (metrics, readers) = (self.metrics.clone(), Arc::clone(&self.readers));
        let thread = spawn("kafka-cluster", move || {
            let ClusterLogParts { log, receiver, failed, .. } = parts;
            match readers.start(&config, &names, &metrics, log, receiver) {
                Ok(()) | Err(TopicsError::Stopped) => {}
                Err(error) => {
                    *readers.waiting() = Some(error.to_string());
                    failed(error);
                }
            }
        })?;
        let before = self.thread.lock().expect("no holder panics").replace(thread);
        assert!(before.is_none(), "followed once");
        Ok(())
    }

    /// What is not read yet, for readiness and for the first lease; `None`: hand-offs are followed, and the
    /// sessions topic is read to the end that it had.
    pub fn missing(&self) -> Option<String> {
        let readers = &self.readers;
        let Some(hand_offs) = readers.hand_offs.get() else {
            let reason = readers.waiting().as_ref().map(|reason| format!(" ({reason})"));
            let reason = reason.unwrap_or_default();
            return Some(format!("the topics of the cluster are not checked yet{reason}"));
        };
        hand_offs.status().missing().or_else(|| match readers.sessions.get() {
            Some(sessions) => sessions.status().missing(),
            None => Some(format!("the topic {} is not read yet", self.names.sessions)),
        })
    }

    /// The partition of the hand-off topic that this node reads, for its lease. It stays when the epoch
    /// changes. `None`: not known yet.
    pub fn hand_off_partition(&self) -> Option<i32> {
        self.readers.hand_offs.get().map(HandOffReader::partition)
    }

    /// The node has a new epoch: hand-offs for the former one are skipped from now on.
    pub fn set_epoch(&self, epoch: NodeEpoch) {
        self.readers.set_epoch(epoch);
    }

    /// Waits at most `grace` until everything that was queued is stored, and ends all threads. Blocks. Returns
    /// the number of records that are not stored. To be called last: after the routers, and after the
    /// tombstone of the lease is queued.
    pub fn stop(&self, grace: Duration) -> u64 {
        let deadline = Instant::now() + grace;
        // The hand-offs are stored already if the routers were stopped in good order.
        let mut unstored = self.sessions.stop(grace / 2);
        unstored += self.hand_offs.stop(deadline.saturating_duration_since(Instant::now()));
        self.readers.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.thread.lock().expect("no holder panics").take() {
            thread.join().expect("a panic ends the process");
        }
        if let Some(hand_offs) = self.readers.hand_offs.get() {
            hand_offs.stop();
        }
        if let Some(sessions) = self.readers.sessions.get() {
            sessions.stop();
        }
        unstored
    }
}

impl Drop for ClusterLogs {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl LogReaders {
    fn waiting(&self) -> MutexGuard<'_, Option<String>> {
        self.waiting.lock().expect("no holder panics")
    }

    fn epoch(&self) -> NodeEpoch {
        NodeEpoch(self.epoch.load(Ordering::Acquire))
    }

    fn set_epoch(&self, epoch: NodeEpoch) {
        self.epoch.store(epoch.0, Ordering::SeqCst);
        if let Some(reader) = self.hand_offs.get() {
            reader.set_epoch(epoch);
        }
    }

    fn start(
        &self,
        config: &KafkaConfig,
        names: &ClusterTopicNames,
        metrics: &ClusterLogMetrics,
        log: Arc<dyn SessionsLog>,
        receiver: Arc<dyn HandOffReceiver>,
    ) -> Result<(), TopicsError> {
        let waiting = |reason: &str| *self.waiting() = Some(reason.to_owned());
        let topics = ensure_topics(config, names, &self.stopping, waiting)?;
        for warning in &topics.warnings {
            tracing::warn!("{warning}");
        }
        let partitions = topics.hand_off_partitions.max(1).unsigned_abs();
        let partition = i32::try_from(self.epoch().0 % u64::from(partitions)).unwrap_or(0);
        let counters = Arc::clone(&metrics.hand_off);
        let reader = HandOffReader::start(
            config,
            &names.hand_off,
            partition,
            self.epoch(),
            receiver,
            counters,
        )?;
        let status = Arc::clone(reader.status());
        assert!(self.hand_offs.set(reader).is_ok(), "followed once");
        // It may have changed while the reader was started.
        self.set_epoch(self.epoch());
        while status.missing().is_some() {
            if self.stopping.load(Ordering::Acquire) {
                return Err(TopicsError::Stopped);
            }
            std::thread::sleep(FOLLOWING_PAUSE);
        }
        let counters = Arc::clone(&metrics.sessions);
        let reader = SessionsReader::start(config, &names.sessions, log, counters)?;
        assert!(self.sessions.set(reader).is_ok(), "followed once");
        Ok(())
    }
}
