//! A Kafka producer of the contract's events.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prost::Message as _;
use prost_types::Timestamp;
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};

use crate::proto::conversation::v1::{
    Conversation, ConversationCreatedEvent, MembershipChangedEvent, ReadReceiptUpdatedEvent,
};
use crate::proto::message::v1::{Message, MessageDeletedEvent, MessageSentEvent};
use crate::proto::shared::v1::{EventEnvelope, EventType};

/// Pause before a full queue, or a count that another thread advances, is looked at again.
const POLL: Duration = Duration::from_millis(1);

/// Records that the broker has acknowledged or refused.
#[derive(Debug, Default)]
struct Acknowledged {
    records: AtomicU64,
    failed: AtomicU64,
}

#[derive(Clone, Debug)]
struct Context(Arc<Acknowledged>);

impl ClientContext for Context {}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let counter = if result.is_ok() { &self.0.records } else { &self.0.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A producer for one topic that counts what it has sent.
pub struct Publisher {
    producer: ThreadedProducer<Context>,
    topic: String,
    acknowledged: Arc<Acknowledged>,
    sent: u64,
}

impl Publisher {
    /// Publishes to `topic`. Idempotent, and retries for five minutes: a record is appended once,
    /// even if the broker is unreachable for a while.
    pub fn new(brokers: &str, topic: &str) -> Self {
        Self::with_settings(brokers, topic, &[])
    }

    /// The same with more librdkafka properties.
    pub fn with_settings(brokers: &str, topic: &str, settings: &[(&str, &str)]) -> Self {
        let acknowledged = Arc::new(Acknowledged::default());
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            .set("linger.ms", "2")
            .set("message.timeout.ms", "300000")
            .set("partitioner", "murmur2_random")
            .set("reconnect.backoff.max.ms", "1000");
        for &(name, value) in settings {
            config.set(name, value);
        }
        let context = Context(Arc::clone(&acknowledged));
        let producer = config.create_with_context(context).expect("a producer");
        Self { producer, topic: topic.into(), acknowledged, sent: 0 }
    }

    /// Publishes an envelope under the key of its conversation.
    pub fn publish(&mut self, conversation: &str, envelope: &EventEnvelope) {
        self.publish_bytes(conversation, &envelope.encode_to_vec());
    }

    /// Publishes any bytes.
    pub fn publish_bytes(&mut self, key: &str, value: &[u8]) {
        self.publish_with(key, value, &[]);
    }

    /// Publishes any bytes, with headers.
    pub fn publish_with(&mut self, key: &str, value: &[u8], headers: &[(&str, &str)]) {
        loop {
            let mut given = OwnedHeaders::new();
            for &(key, value) in headers {
                given = given.insert(Header { key, value: Some(value) });
            }
            let record = BaseRecord::to(&self.topic).key(key).payload(value).headers(given);
            match self.producer.send(record) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                    std::thread::sleep(POLL);
                }
                Err((error, _)) => panic!("publishing: {error}"),
            }
        }
        self.sent += 1;
    }

    /// Publishes the creation of a conversation with its members.
    pub fn created(&mut self, conversation: &str, members: &[String]) {
        let event = ConversationCreatedEvent {
            conversation: Some(Conversation {
                conversation_id: conversation.into(),
                participant_user_ids: members.to_vec(),
                ..Conversation::default()
            }),
            participant_user_ids: members.to_vec(),
        };
        self.publish(
            conversation,
            &envelope(EventType::ConversationCreated, event.encode_to_vec()),
        );
    }

    /// Publishes that a user joined or left.
    pub fn membership(&mut self, conversation: &str, user: &str, added: bool) {
        let event = MembershipChangedEvent {
            conversation_id: conversation.into(),
            user_id: user.into(),
            added,
        };
        self.publish(conversation, &envelope(EventType::MembershipChanged, event.encode_to_vec()));
    }

    /// Publishes a message.
    pub fn message(&mut self, conversation: &str, sequence: i64, sender: &str, content: &str) {
        let event =
            MessageSentEvent { message: Some(message(conversation, sequence, sender, content)) };
        self.publish(conversation, &envelope(EventType::MessageSent, event.encode_to_vec()));
    }

    /// Publishes the deletion of a message.
    pub fn deleted(&mut self, conversation: &str, message: &str) {
        let event = MessageDeletedEvent {
            conversation_id: conversation.into(),
            message_id: message.into(),
        };
        self.publish(conversation, &envelope(EventType::MessageDeleted, event.encode_to_vec()));
    }

    /// Publishes that a user has read up to `sequence`.
    pub fn receipt(&mut self, conversation: &str, user: &str, sequence: i64) {
        let event = ReadReceiptUpdatedEvent {
            conversation_id: conversation.into(),
            user_id: user.into(),
            read_sequence: sequence,
        };
        self.publish(conversation, &envelope(EventType::ReadReceiptUpdated, event.encode_to_vec()));
    }

    /// Records handed to the producer.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Records that the broker has acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.records.load(Ordering::Relaxed)
    }

    /// Waits until every record is acknowledged.
    ///
    /// # Panics
    /// A record was refused, or not all are acknowledged within `limit`.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.producer.flush(limit).expect("the broker acknowledges in time");
        // The producer's own thread may still be in the last callbacks.
        while self.acknowledged() < self.sent {
            assert_eq!(self.acknowledged.failed.load(Ordering::Relaxed), 0, "records refused");
            assert!(Instant::now() < deadline, "the broker acknowledges in time");
            std::thread::sleep(POLL);
        }
    }
}

/// A message as the message service publishes it.
pub fn message(conversation: &str, sequence: i64, sender: &str, content: &str) -> Message {
    Message {
        message_id: format!("{conversation}-{sequence}"),
        conversation_id: conversation.into(),
        sender_user_id: sender.into(),
        sequence,
        message_type: "text".into(),
        content: content.into(),
        metadata_json: "{}".into(),
        sent_at: Some(now()),
        deleted_at: None,
    }
}

/// An envelope of schema version 1 that occurs now.
pub fn envelope(event_type: EventType, payload: Vec<u8>) -> EventEnvelope {
    EventEnvelope {
        event_type: event_type.into(),
        schema_version: 1,
        occurred_at: Some(now()),
        payload: payload.into(),
    }
}

fn now() -> Timestamp {
    std::time::SystemTime::now().into()
}

/// Creates a topic with `partitions` and returns its name, which no other test uses.
///
/// # Panics
/// The broker does not create it.
pub fn new_topic(brokers: &str, name: &str, partitions: i32) -> String {
    let unique = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos();
    let topic = format!("{name}-{unique:x}");
    create_topics(brokers, &[&topic], partitions, &[]).expect("the broker creates the topic");
    topic
}

/// Creates topics with these settings and one replica. Blocks: not for use within a runtime.
///
/// # Errors
/// The broker is unreachable or refuses one of them.
pub fn create_topics(
    brokers: &str,
    names: &[&str],
    partitions: i32,
    settings: &[(&str, &str)],
) -> io::Result<()> {
    let new: Vec<_> = names
        .iter()
        .map(|name| {
            let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
            settings.iter().fold(topic, |topic, (name, value)| topic.set(name, value))
        })
        .collect();
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().map_err(io::Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let results = runtime
        .block_on(admin.create_topics(&new, &AdminOptions::new()))
        .map_err(io::Error::other)?;
    match results.into_iter().find_map(Result::err) {
        None => Ok(()),
        Some((topic, error)) => Err(io::Error::other(format!("topic {topic}: {error}"))),
    }
}
