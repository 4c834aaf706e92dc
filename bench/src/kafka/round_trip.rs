//! A plain round trip of the broker: a producer with the properties of Delivery's hand-offs sends records of
//! their size, and a [plain consumer](super::plain) reads them, both on Delivery's core. A hand-off cannot be
//! faster than this.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use delivery::service::cluster::ports::NodeEpoch;
use delivery::service::cluster::wire::hand_off_header::Content;
use delivery::service::cluster::wire::{HandOffHeader, Users};
use delivery::service::routing::kafka::{
    KafkaConfig, hand_off_headers, hand_off_producer_properties,
};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::Producer as _;

use super::plain::PlainConsumer;
use super::trace::{Trace, TracedProducer};
use super::{failed, joined, paced};
use crate::generator::PushPlan;
use crate::journey::Passage;
use crate::names;
use crate::usage;

/// A node's hand-off partition is one partition, too.
pub(super) const PARTITIONS: i32 = 1;

/// A producer and a consumer of a topic that nobody else uses.
pub(super) struct RoundTrip {
    producer: TracedProducer,
    consumer: PlainConsumer,
    topic: String,
    core: usize,
}

/// A round trip for each event of a plan, while the plan is pushed.
pub(super) struct RunningRoundTrip(JoinHandle<io::Result<Vec<Passage>>>);

impl RoundTrip {
    /// # Errors
    /// Kafka failed, or the core does not exist.
    pub(super) fn start(brokers: &str, topic: &str, core: usize) -> io::Result<Self> {
        let properties = hand_off_producer_properties(&KafkaConfig::new(brokers));
        let create = || properties.create_with_context(Trace::default());
        let producer = usage::on_core(core, create)?.map_err(|error| failed(&error))?;
        let consumer = PlainConsumer::start(brokers, &[(topic, PARTITIONS)], core)?;
        Ok(Self { producer, consumer, topic: topic.to_owned(), core })
    }

    /// Begins to send, halfway between the events of the same plan.
    pub(super) fn push(self, plan: PushPlan, sessions: usize) -> io::Result<RunningRoundTrip> {
        let thread = std::thread::Builder::new().name("round-trip".into());
        let Self { producer, consumer, topic, core } = self;
        let run = move || {
            usage::pin(core)?;
            std::thread::sleep(Duration::from_nanos(500_000_000 / plan.rate));
            paced::push(&producer, &topic, Some(&headers(&topic)), plan, sessions)?;
            Ok(joined(producer.context().take(), consumer.finish(plan.events)))
        };
        Ok(RunningRoundTrip(thread.spawn(run)?))
    }
}

impl RunningRoundTrip {
    /// Waits for the last record. Returns their passages in the order of the plan.
    pub(super) fn finish(self) -> io::Result<Vec<Passage>> {
        self.0.join().map_err(|_| io::Error::other("the round trip panicked"))?
    }
}

/// Headers as those of a hand-off to one user.
fn headers(topic: &str) -> OwnedHeaders {
    let now_ms = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as i64);
    let header = HandOffHeader {
        parked: Vec::new(),
        topic: topic.to_owned(),
        partition: 1,
        offset: 10_000,
        generation: now_ms,
        table: 10_000,
        appended_at_ms: now_ms,
        content: Some(Content::Live(Users { ids: vec![names::user(0)] })),
    };
    hand_off_headers(NodeEpoch(1), &header).0
}
