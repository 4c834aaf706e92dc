//! A plain consumer: a loop that only polls librdkafka, with Delivery's settings, on Delivery's core,
//! at the same time. Delivery cannot be faster than this.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use delivery::service::routing::kafka::{KafkaConfig, consumer_properties};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaResult;
use rdkafka::message::Message as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::{KAFKA_MAX, POLL, failed};
use crate::clock::now_ns;
use crate::payload::Stamp;
use crate::usage;

/// One wait for a record.
const WAIT: Duration = Duration::from_millis(100);

/// A record that was read: key, sequence, time.
pub(super) type Read = (Vec<u8>, u64, u64);

/// A running plain consumer. Starts at the end of the topics.
pub(super) struct PlainConsumer {
    stopping: Arc<AtomicBool>,
    read: Arc<AtomicU64>,
    thread: JoinHandle<Vec<Read>>,
}

impl PlainConsumer {
    /// Reads these topics, each with its number of partitions.
    ///
    /// # Errors
    /// Kafka failed, or the core does not exist.
    pub(super) fn start(brokers: &str, topics: &[(&str, i32)], core: usize) -> io::Result<Self> {
        let consumer = usage::on_core(core, || consumer(brokers, topics))?;
        let consumer = consumer.map_err(|error| failed(&error))?;
        let (stopping, read) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let thread = std::thread::Builder::new().name("plain".into()).spawn({
            let (stopping, read) = (Arc::clone(&stopping), Arc::clone(&read));
            move || {
                usage::pin(core).expect("pinned to it above");
                let mut records = Vec::new();
                while !stopping.load(Ordering::Acquire) {
                    let Some(Ok(message)) = consumer.poll(WAIT) else { continue };
                    let at_ns = now_ns();
                    let stamp = message.payload().and_then(Stamp::find);
                    if let (Some(key), Some(stamp)) = (message.key(), stamp) {
                        records.push((key.to_vec(), stamp.sequence, at_ns));
                        read.fetch_add(1, Ordering::Release);
                    }
                }
                records
            }
        })?;
        Ok(Self { stopping, read, thread })
    }

    /// Waits for this many records, stops, and returns them.
    pub(super) fn finish(self, records: u64) -> Vec<Read> {
        let from = Instant::now();
        while self.read.load(Ordering::Acquire) < records && from.elapsed() < KAFKA_MAX {
            std::thread::sleep(POLL);
        }
        self.stopping.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

fn consumer(brokers: &str, topics: &[(&str, i32)]) -> KafkaResult<BaseConsumer> {
    let consumer: BaseConsumer =
        consumer_properties(&KafkaConfig::new(brokers), "bench-plain").create()?;
    let mut positions = TopicPartitionList::new();
    for &(topic, partitions) in topics {
        for partition in 0..partitions {
            let (_, end) = consumer.fetch_watermarks(topic, partition, KAFKA_MAX)?;
            positions.add_partition_offset(topic, partition, Offset::Offset(end))?;
        }
    }
    consumer.assign(&positions)?;
    Ok(consumer)
}
