//! The dead-letter topic: unroutable records, unchanged, with headers that give the reason.
//!
//! | header | value |
//! | --- | --- |
//! | `delivery-reason` | `undecodable`, `no_conversation`, `no_such_conversation`, `members_unknown`, `members_unavailable` |
//! | `delivery-error` | the reason in words |
//! | `delivery-topic`, `delivery-partition`, `delivery-offset` | the position of the record |

use std::sync::Arc;

use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext as _, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer,
};
use tokio::time::Instant;

use crate::service::backends::outage::Outage;
use crate::service::routing::kafka::{KafkaConfig, KafkaCounters, KafkaStartError, client};
use crate::service::routing::router::dead_letter::{DeadLetter, DeadLetterDone, DeadLetterSink};

/// Dead letters in the producer queue.
const LETTERS_MAX: u64 = 10_000;
/// The same in bytes.
const LETTERS_BYTES_MAX: u64 = 64 << 20;
/// Memory of the producer queue, bytes.
pub const DEAD_LETTERS_BYTES_MAX: u64 =
    LETTERS_BYTES_MAX + LETTERS_MAX * client::RECORD_OVERHEAD_BYTES;

struct DeadLetterContext {
    counters: Arc<KafkaCounters>,
    outage: Outage,
}

impl ClientContext for DeadLetterContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        client::log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        client::count_error(&self.counters, &error);
        tracing::debug!(%error, reason, "dead-letter topic");
    }
}

impl ProducerContext for DeadLetterContext {
    type DeliveryOpaque = Box<DeadLetterDone>;

    fn delivery(&self, result: &DeliveryResult<'_>, done: Box<DeadLetterDone>) {
        match result {
            Ok(_) => {
                self.counters.dead_letters_stored.add(1);
                if let Some(back) = self.outage.succeeded(Instant::now()) {
                    tracing::info!("dead letters stored again {back}");
                }
            }
            Err((error, _)) => self.failed(error),
        }
        done();
    }
}

impl DeadLetterContext {
    fn failed(&self, error: &KafkaError) {
        self.counters.dead_letters_failed.add(1);
        if let Some(again) = self.outage.failed(Instant::now()) {
            tracing::warn!(%error, "dead letter not stored{again}");
        }
    }
}

/// Producer to the dead-letter topic.
pub struct DeadLetterTopic {
    topic: String,
    producer: ThreadedProducer<DeadLetterContext>,
}

impl DeadLetterTopic {
    /// A producer to `topic`, with the brokers and properties of `config`. It queues at most 10,000
    /// dead letters or 64 MiB, each for at most 30 s.
    ///
    /// # Errors
    /// librdkafka refuses a property.
    pub fn new(
        topic: String,
        config: &KafkaConfig,
        counters: Arc<KafkaCounters>,
    ) -> Result<Self, KafkaStartError> {
        let mut properties = client::common_properties(config);
        properties
            .set("message.timeout.ms", "30000")
            .set("queue.buffering.max.messages", LETTERS_MAX.to_string())
            .set("queue.buffering.max.kbytes", (LETTERS_BYTES_MAX / 1024).to_string())
            .set("linger.ms", "5")
            .set("enable.idempotence", "true");
        let properties = client::with_user_properties(properties, config);
        let context = DeadLetterContext { counters, outage: Outage::default() };
        let producer = ThreadedProducer::from_config_and_context(&properties, context)?;
        Ok(Self { topic, producer })
    }
}

impl DeadLetterSink for DeadLetterTopic {
    fn send(&self, letter: DeadLetter<'_>, done: DeadLetterDone) -> bool {
        let error = letter.reason.to_string();
        let partition = letter.log.partition.to_string();
        let offset = letter.raw.offset.to_string();
        let headers = [
            ("delivery-reason", letter.reason.label()),
            ("delivery-error", &error),
            ("delivery-topic", &letter.log.topic),
            ("delivery-partition", &partition),
            ("delivery-offset", &offset),
        ]
        .into_iter()
        .fold(OwnedHeaders::new_with_capacity(5), |headers, (key, value)| {
            headers.insert(Header { key, value: Some(value) })
        });
        let mut record: BaseRecord<'_, [u8], [u8], Box<DeadLetterDone>> =
            BaseRecord::with_opaque_to(&self.topic, Box::new(done))
                .payload(letter.raw.value)
                .headers(headers);
        if let Some(key) = letter.raw.key {
            record = record.key(key);
        }
        match self.producer.send(record) {
            Ok(()) => true,
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => false,
            Err((error, record)) => {
                self.producer.context().failed(&error);
                (record.delivery_opaque)();
                true
            }
        }
    }
}
