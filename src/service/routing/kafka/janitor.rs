//! Removes from the sessions topic what nodes that did not stop in good order have left.
//!
//! The table keeps no ids, so the janitor reads the topic a second time: it collects the keys of epochs that
//! have ended and writes a tombstone for each. An epoch that has ended for one reader has ended for all, and
//! for ever, so whoever does it removes nothing that lives. Only the living node with the lowest epoch does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prost::Message as _;
use rdkafka::message::Message as _;

use crate::service::cluster::ports::{NodeEpoch, SessionsWriter};
use crate::service::cluster::table::SessionTable;
use crate::service::cluster::wire::SessionsKey;
use crate::service::routing::kafka::partition_reader::{
    LogStatus, POLL_TIMEOUT, PartitionReader, Polled,
};
use crate::service::routing::kafka::{ClusterLogCounters, KafkaConfig, KafkaStartError, spawn};

/// Time between two looks at whether there is work.
const INTERVAL: Duration = Duration::from_secs(10);
/// Keys collected in one pass.
const KEYS_MAX: usize = 100_000;
/// Memory of the keys of one pass, bytes: twice the longest ids would be rare, so typical ones are counted.
pub const JANITOR_BYTES_MAX: u64 = KEYS_MAX as u64 * 256;
/// Records waiting in the queue of the sessions topic, beyond which the janitor pauses.
const WAITING_MAX: u64 = 1_000;
/// Pause while the queue of the sessions topic is full.
const FULL_PAUSE: Duration = Duration::from_millis(20);

/// The janitor, on a thread of its own.
pub struct SessionsJanitor {
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl SessionsJanitor {
    /// Starts to look for work in `topic`, which `table` follows.
    ///
    /// # Errors
    /// See [`KafkaStartError`].
    pub fn start(
        config: KafkaConfig,
        topic: String,
        table: Arc<SessionTable>,
        writer: Arc<dyn SessionsWriter>,
        counters: Arc<ClusterLogCounters>,
    ) -> Result<Self, KafkaStartError> {
        let stopping = Arc::<AtomicBool>::default();
        let pass =
            JanitorPass { config, topic, table, writer, counters, stopping: Arc::clone(&stopping) };
        let thread = spawn("kafka-janitor", move || pass.run())?;
        Ok(Self { stopping, thread })
    }

    /// Tells the thread to end.
    pub fn end(&self) {
        self.stopping.store(true, Ordering::Release);
        self.thread.thread().unpark();
    }

    /// Ends the thread. Blocks.
    pub fn stop(self) {
        self.end();
        self.thread.join().expect("a panic ends the process");
    }
}

struct JanitorPass {
    config: KafkaConfig,
    topic: String,
    table: Arc<SessionTable>,
    writer: Arc<dyn SessionsWriter>,
    counters: Arc<ClusterLogCounters>,
    stopping: Arc<AtomicBool>,
}

impl JanitorPass {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn run(self) {
        while !self.is_stopping() {
            std::thread::park_timeout(INTERVAL);
            if self.is_stopping() || !self.table.is_janitor() {
                continue;
            }
            // Before the pass: what is left behind during it is the work of the next one.
            if self.table.take_leftovers() == 0 {
                continue;
            }
            match self.collect() {
                Ok(keys) => self.remove(&keys),
                Err(error) => {
                    tracing::warn!(%error, "cannot read the sessions topic for the leftovers of dead nodes");
                    self.table.add_leftovers(1);
                }
            }
        }
    }

    /// The keys of dead epochs that have a value, in the order of sessions before leases.
    fn collect(&self) -> Result<Vec<Vec<u8>>, KafkaStartError> {
        let status = Arc::new(LogStatus::new(&self.topic));
        // Its records are read already: they count once.
        let uncounted = Arc::<ClusterLogCounters>::default();
        let reader = PartitionReader::new(&self.config, &self.topic, 0, status, uncounted)?;
        let (mut sessions, mut leases) = (BTreeSet::new(), BTreeSet::new());
        let to = self.table.next_offset();
        let Some((_, end)) = reader.try_start(|low, _| low) else {
            self.table.add_leftovers(1);
            return Ok(Vec::new());
        };
        let to = to.min(end);
        let mut idle_since = Instant::now();
        while !self.is_stopping() && idle_since.elapsed() < INTERVAL {
            let message = match reader.poll(POLL_TIMEOUT) {
                Polled::Record(message) => message,
                Polled::Nothing => continue,
                Polled::End => return Ok(sessions.into_iter().chain(leases).collect()),
                Polled::Lost | Polled::Gone => break,
            };
            idle_since = Instant::now();
            if message.offset() >= to {
                return Ok(sessions.into_iter().chain(leases).collect());
            }
            let Some(bytes) = message.key() else { continue };
            let Ok(key) = SessionsKey::decode(bytes) else { continue };
            if !self.table.has_ended(NodeEpoch(key.epoch)) {
                continue;
            }
            let keys = if key.user.is_empty() { &mut leases } else { &mut sessions };
            if message.payload().is_none() {
                keys.remove(bytes);
            } else if keys.len() < KEYS_MAX {
                keys.insert(bytes.to_vec());
            } else {
                break;
            }
        }
        // The rest is for the next pass, with the leases.
        self.table.add_leftovers(1);
        Ok(sessions.into_iter().collect())
    }

    fn remove(&self, keys: &[Vec<u8>]) {
        for bytes in keys {
            let Ok(key) = SessionsKey::decode(&**bytes) else { continue };
            // Beginnings and leases go first.
            while self.counters.waiting.get() > WAITING_MAX || !self.writer.write(&key, None) {
                if self.is_stopping() {
                    return;
                }
                std::thread::sleep(FULL_PAUSE);
            }
            self.counters.tombstones.add(1);
        }
        if !keys.is_empty() {
            tracing::info!(
                records = keys.len(),
                "removed what dead nodes left in the sessions topic"
            );
        }
    }
}
