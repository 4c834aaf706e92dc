//! The life of a membership topic, and of a topic of events while all nodes are stopped, against real Kafka.

use super::catalogue::{Mode, RealTopics};
use super::*;

impl RealTopics {
    /// Creates conversation `id` of alice, in this partition of the topic of conversations.
    fn create_in(&self, partition: i32, id: &str) {
        let value = created(id, &["alice"]);
        until("the producer knows the partition", || {
            let record = BaseRecord::to(&self.conversations).key(id).payload(&value);
            let sent = self.producer.send(record.partition(partition));
            self.producer.poll(Duration::ZERO);
            sent.is_ok()
        });
        self.producer.flush(PATIENCE).unwrap();
    }

    fn say_in(&self, conversation: &str, sequence: i64) {
        let value = message(conversation, sequence);
        let record = BaseRecord::to(&self.messages).key(conversation).payload(&value);
        self.producer.send(record).map_err(|(error, _)| error).unwrap();
        self.producer.flush(PATIENCE).unwrap();
    }
}

impl TestNode {
    fn receives_message(&self, conversation: &str, sequence: i64) {
        let expected = message(conversation, sequence);
        while self.next() != expected {}
    }
}

/// Without a conversation service the follower alone knows the members: a partition that it does not read is one
/// whose conversations have none.
#[test]
#[ignore = "needs Kafka"]
fn partition_added_to_a_membership_topic_is_followed_from_its_start() {
    for mode in [Mode::Broadcast, Mode::Group] {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_in(0, "a");
        topics.say_in("a", 1);
        node.receives_message("a", 1);
        topics.grow(&topics.conversations, 2);
        topics.create_in(1, "b");
        topics.say_in("b", 1);
        node.receives_message("b", 1);
        // The former partition is still followed.
        topics.create_in(0, "c");
        topics.say_in("c", 1);
        node.receives_message("c", 1);
        assert_eq!(node.counters.membership_restarts.get(), 0, "{mode:?}");
        node.stop(Duration::from_secs(5));
    }
}

#[test]
#[ignore = "needs Kafka"]
fn membership_topic_created_again_is_followed_from_its_start() {
    for mode in [Mode::Broadcast, Mode::Group] {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        for id in ["x", "y", "a"] {
            topics.create_in(0, id);
        }
        topics.say_in("a", 1);
        node.receives_message("a", 1);
        topics.delete(&topics.conversations);
        topics.create(&topics.conversations, 1);
        topics.create_in(0, "b");
        // Until then nothing says that the members of `b` are still to come.
        until("noticed", || node.counters.membership_restarts.get() > 0);
        until("followed again", || node.status.missing().is_none());
        topics.say_in("b", 1);
        node.receives_message("b", 1);
        node.stop(Duration::from_secs(5));
    }
}

/// The new log is longer than the offset that the node had committed in the former one.
#[test]
#[ignore = "needs Kafka"]
fn topic_created_again_while_all_nodes_are_stopped_is_read_from_its_start() {
    for mode in [Mode::Group, Mode::Claims] {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 1..4);
        node.receives(1..4);
        node.stop(Duration::from_secs(5));
        topics.delete(&topics.messages);
        topics.create(&topics.messages, 1);
        topics.say(0, 4..24);
        let node = topics.start_in(mode);
        node.receives(4..24);
        node.stop(Duration::from_secs(5));
    }
}

/// The rule of `MEMBERSHIP_TOPICS` without a value, as its description says.
#[test]
fn topics_named_after_conversations_carry_membership() {
    let of = |topics: &[&str]| {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        KafkaConfig { topics, ..KafkaConfig::new("") }.membership_topics()
    };
    assert_eq!(of(&["messaging.events.v1", "conversation.events.v1"]), ["conversation.events.v1"]);
    assert_eq!(of(&["prod.messaging.v1", "prod.conversations.v1"]), ["prod.conversations.v1"]);
    assert_eq!(of(&["prod_chat", "prod_conversation-events"]), ["prod_conversation-events"]);
    // A part that contains the word without beginning with it is something else.
    assert_eq!(of(&["chat", "myconversations"]), ["chat", "myconversations"]);
    assert_eq!(of(&["chat"]), ["chat"]);
    let configured = KafkaConfig { membership: vec!["b".into()], ..KafkaConfig::new("") };
    assert_eq!(configured.membership_topics(), ["b"]);
}
