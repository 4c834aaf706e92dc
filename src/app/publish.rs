//! `delivery publish`: publishes one event to Kafka, as the message and conversation services do.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};

use super::terminal;
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::conversation::v1 as conversation;
use crate::service::events::proto::message::v1 as message;
use crate::service::events::proto::shared::v1::EventType;
use crate::service::events::timestamp::Timestamp;

/// The help text.
pub const ABOUT: &str = "\
Publishes one event to Kafka.

To create a conversation, send a message, and change the members:

    delivery publish create  --conversation team --members alice,bob
    delivery publish message --conversation team --sender alice --sequence 1 \"Hello\"
    delivery publish add     --conversation team --user carol
    delivery publish remove  --conversation team --user bob

Prints the topic, partition and offset of the record.";

/// Maximum time until the broker has accepted a record.
const ACCEPT_MAX: Duration = Duration::from_secs(15);

/// The arguments.
#[derive(Args, Debug)]
pub struct Publish {
    /// Kafka brokers, separated by commas
    #[arg(long, env = "KAFKA_BROKERS", global = true, default_value = "127.0.0.1:9092")]
    brokers: String,
    /// Topic of message events
    #[arg(long, global = true, default_value = "messaging.events.v1")]
    message_topic: String,
    /// Topic of conversation events
    #[arg(long, global = true, default_value = "conversation.events.v1")]
    conversation_topic: String,
    /// The event to publish
    #[command(subcommand)]
    event: Event,
}

#[derive(Subcommand, Debug)]
enum Event {
    /// Create a conversation with all its members
    Create {
        /// Conversation id
        #[arg(long)]
        conversation: String,
        /// User ids, separated by commas
        #[arg(long, value_delimiter = ',', required = true)]
        members: Vec<String>,
        /// Display name
        #[arg(long, default_value = "")]
        name: String,
    },
    /// Add a user to a conversation
    Add(Member),
    /// Remove a user from a conversation
    Remove(Member),
    /// Send a message
    Message {
        /// Conversation id
        #[arg(long)]
        conversation: String,
        /// User id of the sender
        #[arg(long)]
        sender: String,
        /// Sequence number in the conversation: one more than that of the last message [default: the time in ms]
        #[arg(long)]
        sequence: Option<i64>,
        /// Text of the message
        text: String,
    },
    /// Delete a message
    Delete {
        /// Conversation id
        #[arg(long)]
        conversation: String,
        /// Message id, as printed by `publish message`
        #[arg(long)]
        message_id: String,
    },
    /// Report how far a user has read
    Read {
        /// Conversation id
        #[arg(long)]
        conversation: String,
        /// User id
        #[arg(long)]
        user: String,
        /// Sequence number of the last message the user has read
        #[arg(long)]
        sequence: i64,
    },
}

#[derive(Args, Debug)]
struct Member {
    /// Conversation id
    #[arg(long)]
    conversation: String,
    /// User id
    #[arg(long)]
    user: String,
}

/// Publishes the event.
///
/// # Errors
/// Kafka did not accept it. The text says why.
pub fn run(publish: &Publish) -> Result<(), String> {
    let record = record(publish);
    let publisher = Publisher::new(&publish.brokers)?;
    let position = publisher.publish(&record)?;
    terminal::print(&format!("{} {position}\n", record.description))
}

/// A record to publish.
#[derive(Clone, Debug)]
pub struct NewRecord {
    /// The topic.
    pub topic: String,
    /// The conversation id (contract §2).
    pub key: String,
    /// A serialized `EventEnvelope`.
    pub value: Vec<u8>,
    /// The event in words, for the output.
    pub description: String,
}

fn record(publish: &Publish) -> NewRecord {
    let now = Timestamp::from(SystemTime::now());
    let (messages, conversations) = (&publish.message_topic, &publish.conversation_topic);
    match &publish.event {
        Event::Create { conversation, members, name } => {
            create(conversations, conversation, name, members, now)
        }
        Event::Add(member) => membership(conversations, member, true, now),
        Event::Remove(member) => membership(conversations, member, false, now),
        Event::Message { conversation, sender, sequence, text } => {
            let sequence = sequence.unwrap_or(now.unix_ms());
            sent(messages, conversation, sender, sequence, text, now)
        }
        Event::Delete { conversation, message_id } => {
            let event = message::MessageDeletedEvent {
                conversation_id: conversation.clone(),
                message_id: message_id.clone(),
            };
            let description = format!("deletion of {message_id}");
            wrap(messages, conversation, EventType::MessageDeleted, &event, now, description)
        }
        Event::Read { conversation, user, sequence } => {
            let event = conversation::ReadReceiptUpdatedEvent {
                conversation_id: conversation.clone(),
                user_id: user.clone(),
                read_sequence: *sequence,
            };
            let description = format!("read receipt of {user}");
            wrap(
                conversations,
                conversation,
                EventType::ReadReceiptUpdated,
                &event,
                now,
                description,
            )
        }
    }
}

/// The record of a created conversation.
pub fn create(topic: &str, id: &str, name: &str, members: &[String], now: Timestamp) -> NewRecord {
    let kind = if members.len() == 2 {
        conversation::ConversationType::Direct
    } else {
        conversation::ConversationType::Group
    };
    let event = conversation::ConversationCreatedEvent {
        conversation: Some(conversation::Conversation {
            conversation_id: id.to_owned(),
            display_name: name.to_owned(),
            created_at: Some(now),
            r#type: kind.into(),
            participant_user_ids: members.to_vec(),
            ..Default::default()
        }),
        participant_user_ids: members.to_vec(),
    };
    let description = format!("conversation {id} of {}", members.join(", "));
    wrap(topic, id, EventType::ConversationCreated, &event, now, description)
}

fn membership(topic: &str, member: &Member, added: bool, now: Timestamp) -> NewRecord {
    let Member { conversation, user } = member;
    let event = conversation::MembershipChangedEvent {
        conversation_id: conversation.clone(),
        user_id: user.clone(),
        added,
    };
    let description = format!("{} {user}", if added { "added" } else { "removed" });
    wrap(topic, conversation, EventType::MembershipChanged, &event, now, description)
}

/// The record of a sent message.
pub fn sent(
    topic: &str,
    conversation: &str,
    sender: &str,
    sequence: i64,
    text: &str,
    now: Timestamp,
) -> NewRecord {
    let message_id = format!("{conversation}-{sequence}");
    let event = message::MessageSentEvent {
        message: Some(message::Message {
            message_id: message_id.clone(),
            conversation_id: conversation.to_owned(),
            sender_user_id: sender.to_owned(),
            sequence,
            message_type: "text".to_owned(),
            content: text.to_owned(),
            sent_at: Some(now),
            ..Default::default()
        }),
    };
    let description = format!("message {message_id}");
    wrap(topic, conversation, EventType::MessageSent, &event, now, description)
}

fn wrap(
    topic: &str,
    key: &str,
    kind: EventType,
    event: &impl prost::Message,
    now: Timestamp,
    description: String,
) -> NewRecord {
    let value = encode_envelope(kind, Some(now), event.encode_to_vec());
    NewRecord { topic: topic.to_owned(), key: key.to_owned(), value, description }
}

/// Receives the broker's response to the last record.
#[derive(Clone, Default)]
struct LastResponse(Arc<Mutex<Option<Result<String, String>>>>);

impl rdkafka::ClientContext for LastResponse {
    /// Ignored: librdkafka would log each retry, and only the response matters.
    fn log(&self, _level: rdkafka::config::RDKafkaLogLevel, _facility: &str, _message: &str) {}

    fn error(&self, _error: rdkafka::error::KafkaError, _reason: &str) {}
}

impl ProducerContext for LastResponse {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        use rdkafka::Message as _;
        let response = match result {
            Ok(record) => Ok(format!(
                "→ {} partition {} offset {}",
                record.topic(),
                record.partition(),
                record.offset()
            )),
            Err((error, _)) => Err(error.to_string()),
        };
        *self.0.lock().expect("no holder panics") = Some(response);
    }
}

/// A producer that waits for the broker's response to each record.
pub struct Publisher {
    producer: BaseProducer<LastResponse>,
    response: LastResponse,
    brokers: String,
}

impl Publisher {
    /// Connects in the background.
    ///
    /// # Errors
    /// The broker list is invalid.
    pub fn new(brokers: &str) -> Result<Self, String> {
        let response = LastResponse::default();
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("message.timeout.ms", ACCEPT_MAX.as_millis().to_string())
            .set("partitioner", "murmur2_random")
            .create_with_context(response.clone())
            .map_err(|error| format!("cannot use the brokers `{brokers}`: {error}"))?;
        Ok(Self { producer, response, brokers: brokers.to_owned() })
    }

    /// Sends one record and waits until it is written. Returns its topic, partition and offset, for the
    /// output.
    ///
    /// # Errors
    /// Kafka did not accept it in time.
    pub fn publish(&self, record: &NewRecord) -> Result<String, String> {
        let refused =
            |why: String| format!("Kafka at {} did not accept the event: {why}", self.brokers);
        self.response.0.lock().expect("no holder panics").take();
        self.producer
            .send(BaseRecord::to(&record.topic).key(&record.key).payload(&record.value))
            .map_err(|(error, _)| refused(error.to_string()))?;
        self.producer
            .flush(ACCEPT_MAX + Duration::from_secs(1))
            .map_err(|e| refused(e.to_string()))?;
        let response = self.response.0.lock().expect("no holder panics").take();
        response.unwrap_or_else(|| Err("no response".to_owned())).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::service::events::proto::shared::v1::EventEnvelope;

    #[test]
    fn record_is_keyed_by_its_conversation_and_wrapped_once() {
        let now = Timestamp { seconds: 7, nanos: 0 };
        let record = sent("topic", "team", "alice", 3, "Hello", now);
        assert_eq!((record.topic.as_str(), record.key.as_str()), ("topic", "team"));
        let envelope = EventEnvelope::decode(&record.value[..]).unwrap();
        assert_eq!(envelope.event_type(), EventType::MessageSent);
        assert_eq!((envelope.schema_version, envelope.occurred_at), (1, Some(now)));
        let sent = message::MessageSentEvent::decode(envelope.payload).unwrap().message.unwrap();
        assert_eq!((sent.sequence, sent.content.as_str()), (3, "Hello"));
        assert_eq!(sent.message_id, "team-3");
    }

    #[test]
    fn created_conversation_contains_every_member() {
        let members = ["alice".to_owned(), "bob".to_owned()];
        let record = create("topic", "team", "Team", &members, Timestamp::default());
        let envelope = EventEnvelope::decode(&record.value[..]).unwrap();
        let event = conversation::ConversationCreatedEvent::decode(envelope.payload).unwrap();
        assert_eq!(event.participant_user_ids, members);
        assert_eq!(event.conversation.unwrap().participant_user_ids, members);
    }
}
