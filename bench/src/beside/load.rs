//! The producers of the small events, and of those of the neighbour.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer as _};

use super::{Beside, BesidePlan, LARGE, Neighbour, ORDINARY, UNKNOWN};
use crate::clock::now_ns;
use crate::generator::{Generator, PushPlan};
use crate::kafka::node::RunTopics;
use crate::kafka::paced::write;
use crate::kafka::{KAFKA_MAX, failed};
use crate::payload::{Stamp, Template, conversation_id};

/// Size of an event of the neighbour, bytes.
const EXTRA_BYTES: usize = 400;

/// A connected producer: the first events of another one would wait for half a second.
fn producer(brokers: &str, topic: &str) -> io::Result<BaseProducer> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config.set("linger.ms", "1").set("enable.idempotence", "true");
    let producer = config.create::<BaseProducer>().map_err(|error| failed(&error))?;
    producer.client().fetch_metadata(Some(topic), KAFKA_MAX).map_err(|error| failed(&error))?;
    Ok(producer)
}

fn sleep_until(producer: &BaseProducer, due_ns: u64) {
    producer.poll(Duration::ZERO);
    std::thread::sleep(Duration::from_nanos(due_ns.saturating_sub(now_ns())));
}

/// Sends the small events when they are due.
pub(super) struct SmallEvents {
    producer: BaseProducer,
    topic: String,
}

impl SmallEvents {
    pub(super) fn new(brokers: &str, topics: &RunTopics) -> io::Result<Self> {
        let topic = topics.messages.clone();
        Ok(Self { producer: producer(brokers, &topic)?, topic })
    }

    pub(super) fn push(&self, plan: PushPlan, sessions: usize) -> io::Result<()> {
        let mut generator = Generator::new(plan, sessions);
        while !generator.is_finished() {
            let Some(item) = generator.next_due() else {
                sleep_until(&self.producer, generator.due_ns().unwrap_or(0));
                continue;
            };
            let key = conversation_id(item.conversation);
            let record = BaseRecord::to(&self.topic).key(&*key).payload(&*item.value);
            write::<DefaultProducerContext>(&self.producer, record)?;
        }
        self.producer.flush(KAFKA_MAX).map_err(|error| failed(&error))
    }
}

/// Sends the events of the neighbour, or of the control, until it is stopped.
pub(super) struct Extra {
    producer: Arc<BaseProducer>,
    topic: String,
    neighbour: Neighbour,
    partitions: i32,
    sent: Arc<AtomicU64>,
}

impl Extra {
    pub(super) fn new(plan: &BesidePlan, topics: &RunTopics) -> io::Result<Self> {
        let topic = topics.messages.clone();
        let producer = Arc::new(producer(&plan.brokers, &topic)?);
        let (neighbour, partitions) = (plan.neighbour, plan.partitions);
        Ok(Self { producer, topic, neighbour, partitions, sent: Arc::default() })
    }

    /// Events sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(super) fn start(
        &self,
        beside: Beside,
        stopped: &Arc<AtomicBool>,
    ) -> JoinHandle<io::Result<()>> {
        let (producer, topic) = (Arc::clone(&self.producer), self.topic.clone());
        let (neighbour, partitions) = (self.neighbour, self.partitions);
        let (stopped, sent) = (Arc::clone(stopped), Arc::clone(&self.sent));
        std::thread::spawn(move || {
            push(&producer, &topic, (beside, neighbour, partitions), &stopped, &sent)
        })
    }
}

fn push(
    producer: &BaseProducer,
    topic: &str,
    (beside, neighbour, partitions): (Beside, Neighbour, i32),
    stopped: &AtomicBool,
    all_sent: &AtomicU64,
) -> io::Result<()> {
    // Conversations, and their events per second together. Their partitions: in turn, or by key.
    let (first, count, rate) = match neighbour {
        Neighbour::Large { rate, .. } => (LARGE, 1, rate),
        Neighbour::Unknown { of_partition, rate } => {
            let count = of_partition * partitions as usize;
            (UNKNOWN, count, rate * count as u64)
        }
        Neighbour::Hostile { .. } => return Ok(()),
    };
    let first = if beside == Beside::Control { ORDINARY } else { first };
    let (template, started_ns, mut sent) = (Template::new(EXTRA_BYTES), now_ns(), 0);
    while !stopped.load(Ordering::Relaxed) && rate > 0 {
        let due_ns = started_ns + sent * 1_000_000_000 / rate;
        sleep_until(producer, due_ns);
        let index = sent as usize % count;
        let stamp = Stamp { sequence: sent / count as u64 + 1, intended_ns: due_ns };
        let (key, value) =
            (conversation_id(first + index), template.envelope(first + index, stamp));
        let record = BaseRecord::to(topic).key(&*key).payload(&*value);
        let record = match count {
            1 => record,
            _ => record.partition(index as i32 % partitions),
        };
        write::<DefaultProducerContext>(producer, record)?;
        sent += 1;
        all_sent.fetch_add(1, Ordering::Relaxed);
    }
    producer.flush(KAFKA_MAX).map_err(|error| failed(&error))
}
