//! A producer that shares nothing with Delivery but the wire types of the contract.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use delivery::service::events::proto::conversation::v1::{
    Conversation, ConversationCreatedEvent, MembershipChangedEvent, ReadReceiptUpdatedEvent,
};
use delivery::service::events::proto::message::v1::{
    Message, MessageDeletedEvent, MessageSentEvent,
};
use delivery::service::events::proto::shared::v1::{EventEnvelope, EventType};
use delivery::service::events::timestamp::Timestamp;
use prost::Message as _;
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};

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

/// See the module.
pub struct Publisher {
    producer: ThreadedProducer<Context>,
    topic: String,
    acknowledged: Arc<Acknowledged>,
    sent: u64,
}

impl Publisher {
    /// Publishes to `topic`. Idempotent and patient: a record is appended once, however long the
    /// broker is away.
    pub fn new(brokers: &str, topic: &str) -> Self {
        let acknowledged = Arc::new(Acknowledged::default());
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            .set("linger.ms", "2")
            .set("message.timeout.ms", "300000")
            .set("partitioner", "murmur2_random")
            .set("reconnect.backoff.max.ms", "1000")
            .create_with_context(Context(acknowledged.clone()))
            .expect("a producer");
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
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err((error, _)) => panic!("publishing: {error}"),
            }
        }
        self.sent += 1;
    }

    /// Announces a conversation with its members.
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

    /// Announces that a user joined or left.
    pub fn membership(&mut self, conversation: &str, user: &str, added: bool) {
        let event = MembershipChangedEvent {
            conversation_id: conversation.into(),
            user_id: user.into(),
            added,
        };
        self.publish(conversation, &envelope(EventType::MembershipChanged, event.encode_to_vec()));
    }

    /// Sends a message.
    pub fn message(&mut self, conversation: &str, sequence: i64, sender: &str, content: &str) {
        let event =
            MessageSentEvent { message: Some(message(conversation, sequence, sender, content)) };
        self.publish(conversation, &envelope(EventType::MessageSent, event.encode_to_vec()));
    }

    /// Deletes a message.
    pub fn deleted(&mut self, conversation: &str, message: &str) {
        let event = MessageDeletedEvent {
            conversation_id: conversation.into(),
            message_id: message.into(),
        };
        self.publish(conversation, &envelope(EventType::MessageDeleted, event.encode_to_vec()));
    }

    /// A user has read up to `sequence`.
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
    pub fn flush(&self, limit: Duration) {
        self.producer.flush(limit).expect("the broker acknowledges in time");
        assert_eq!(self.acknowledged.failed.load(Ordering::Relaxed), 0, "records that failed");
        assert_eq!(self.acknowledged(), self.sent);
    }
}

/// A message as the message service would publish it.
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

/// An envelope of schema version 1, of now.
pub fn envelope(event_type: EventType, payload: Vec<u8>) -> EventEnvelope {
    EventEnvelope {
        event_type: event_type.into(),
        schema_version: 1,
        occurred_at: Some(now()),
        payload: payload.into(),
    }
}

fn now() -> Timestamp {
    let since_epoch = std::time::UNIX_EPOCH.elapsed().expect("after 1970");
    Timestamp { seconds: since_epoch.as_secs() as i64, nanos: since_epoch.subsec_nanos() as i32 }
}

/// Creates a topic with `partitions` and returns its name, which no other test uses.
pub fn new_topic(brokers: &str, name: &str, partitions: i32) -> String {
    let unique = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos();
    let topic = format!("{name}-{unique:x}");
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().expect("an admin client");
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let new = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
    let results = runtime
        .block_on(admin.create_topics([&new], &AdminOptions::new()))
        .expect("the broker answers");
    for result in results {
        result.expect("the topic is created");
    }
    topic
}
