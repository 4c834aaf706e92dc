//! Topics, partitions and offsets that appear, expire and disappear while nodes run, against real Kafka.

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::topic_partition_list::Offset;

use super::claims::Claiming;
use super::real::{brokers, unique};
use super::*;
use crate::service::cluster::ports::{SessionsLog as _, SessionsRecord};
use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::status::PartitionLag;

/// Two topics of one test, and what publishes and manages them.
pub(super) struct RealTopics {
    pub(super) messages: String,
    pub(super) conversations: String,
    group: String,
    pub(super) producer: BaseProducer,
    admin: AdminClient<DefaultClientContext>,
    runtime: tokio::runtime::Runtime,
}

impl RealTopics {
    /// Only the topic of conversations exists, with one partition.
    pub(super) fn new() -> Self {
        let client = ClientConfig::new()
            .set("bootstrap.servers", brokers())
            // New partitions are found soon.
            .set("topic.metadata.refresh.interval.ms", "200")
            .clone();
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let topics = Self {
            messages: unique("messages"),
            conversations: unique("conversations"),
            group: unique("group"),
            producer: client.create().unwrap(),
            admin: client.create().unwrap(),
            runtime: runtime.unwrap(),
        };
        topics.create(&topics.conversations, 1);
        topics
    }

    /// Both topics exist; messages have this many partitions.
    pub(super) fn with_messages(partitions: i32) -> Self {
        let topics = Self::new();
        topics.create(&topics.messages, partitions);
        topics
    }

    pub(super) fn create(&self, topic: &str, partitions: i32) {
        let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
        until("created", || {
            let created = self.admin.create_topics([&new], &AdminOptions::new());
            // A topic of this name may still be being deleted.
            self.runtime.block_on(created).unwrap()[0].is_ok()
        });
    }

    pub(super) fn delete(&self, topic: &str) {
        let deleted = self.admin.delete_topics(&[topic], &AdminOptions::new());
        assert!(self.runtime.block_on(deleted).unwrap()[0].is_ok());
    }

    /// Grows a topic to this number of partitions.
    pub(super) fn grow(&self, topic: &str, count: usize) {
        let new = NewPartitions::new(topic, count);
        let added = self.admin.create_partitions([&new], &AdminOptions::new());
        assert!(self.runtime.block_on(added).unwrap()[0].is_ok());
    }

    /// Deletes the records of a partition of messages below `offset`, as retention does.
    fn delete_records(&self, partition: i32, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.messages, partition, Offset::Offset(offset)).unwrap();
        let deleted = self.admin.delete_records(&list, &AdminOptions::new());
        self.runtime.block_on(deleted).unwrap();
    }

    pub(super) fn say(&self, partition: i32, sequences: std::ops::Range<i64>) {
        for sequence in sequences {
            let value = message("c", sequence);
            until("the producer knows the partition", || {
                let record = BaseRecord::to(&self.messages).key("c").payload(&value);
                let sent = self.producer.send(record.partition(partition));
                self.producer.poll(Duration::ZERO);
                sent.is_ok()
            });
        }
        self.producer.flush(PATIENCE).unwrap();
    }

    pub(super) fn create_conversation(&self) {
        let value = created("c", &["alice"]);
        let record = BaseRecord::to(&self.conversations).key("c").payload(&value);
        self.producer.send(record).map_err(|(error, _)| error).unwrap();
        self.producer.flush(PATIENCE).unwrap();
    }

    pub(super) fn config(&self, mode: RoutingMode) -> KafkaConfig {
        KafkaConfig {
            brokers: brokers(),
            topics: vec![self.messages.clone(), self.conversations.clone()],
            group: self.group.clone(),
            discovery_interval_ms: 500,
            ..TestNode::config(&unique("node"), mode)
        }
    }

    pub(super) fn start(&self, mode: RoutingMode) -> TestNode {
        TestNode::start_on(self.config(mode), None, None)
    }

    fn start_claiming(&self) -> TestNode {
        TestNode::start_on(self.config(RoutingMode::Group), None, Some(claims()))
    }

    /// A node in each mode.
    pub(super) fn start_in(&self, mode: Mode) -> TestNode {
        match mode {
            Mode::Broadcast => self.start(RoutingMode::Broadcast),
            Mode::Group => self.start(RoutingMode::Group),
            Mode::Claims => self.start_claiming(),
        }
    }
}

fn claims() -> ClaimParts {
    Claiming::new().parts()
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Mode {
    Broadcast,
    Group,
    Claims,
}

const MODES: [Mode; 3] = [Mode::Broadcast, Mode::Group, Mode::Claims];

impl TestNode {
    /// Takes deliveries until these messages have come, in this order, and no other message.
    pub(super) fn receives(&self, sequences: std::ops::Range<i64>) {
        for sequence in sequences {
            let next = std::iter::repeat_with(|| self.next());
            let mut messages = next.filter(|value| *value != created("c", &["alice"]));
            assert_eq!(messages.next().unwrap(), message("c", sequence), "sequence {sequence}");
        }
    }
}

/// Promise: “Partitions and topics that appear while nodes run are read from their start.”
#[test]
#[ignore = "needs Kafka"]
fn partition_added_while_a_node_runs_is_read_from_its_start() {
    for mode in MODES {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 1..11);
        node.receives(1..11);
        topics.grow(&topics.messages, 2);
        topics.say(1, 11..31);
        node.receives(11..31);
        assert_eq!(node.missed.load(Ordering::Relaxed), 0, "{mode:?}");
        node.stop(Duration::from_secs(5));
    }
}

/// Promise: “A topic that does not exist or may not be read is named”
#[test]
#[ignore = "needs Kafka"]
fn topic_created_while_a_node_runs_is_named_until_then_and_read_from_its_start() {
    for mode in MODES {
        let topics = RealTopics::new();
        let node = topics.start_in(mode);
        let expected = format!("KAFKA_TOPICS: the topic {} does not exist", topics.messages);
        until("named by readiness", || node.status.missing().as_ref() == Some(&expected));
        until("the other topic is read", || node.status.partitions() == 1);
        topics.create_conversation();
        topics.create(&topics.messages, 2);
        topics.say(0, 1..11);
        node.receives(1..11);
        topics.say(1, 11..21);
        node.receives(11..21);
        assert_eq!(node.status.missing(), None, "{mode:?}");
        assert_eq!(node.missed.load(Ordering::Relaxed), 0, "{mode:?}");
        node.stop(Duration::from_secs(5));
    }
}

/// The next node cannot know that the partition is new: it finds that the group has read the topic before.
#[test]
#[ignore = "needs Kafka"]
fn partition_added_while_all_nodes_are_stopped_is_read_from_its_start() {
    for mode in [Mode::Group, Mode::Claims] {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 1..3);
        node.receives(1..3);
        node.stop(Duration::from_secs(5));
        topics.grow(&topics.messages, 2);
        topics.say(1, 3..13);
        let node = topics.start_in(mode);
        node.receives(3..13);
        node.stop(Duration::from_secs(5));
    }
}

#[test]
#[ignore = "needs Kafka"]
fn old_topic_that_is_new_to_the_group_is_not_repeated() {
    for mode in [Mode::Group, Mode::Claims] {
        let topics = RealTopics::with_messages(1);
        let hour_ago_ms = i64::try_from(unix_ms()).unwrap() - 3_600_000;
        for sequence in 1..11 {
            let value = message("c", sequence);
            let record = BaseRecord::to(&topics.messages).key("c").payload(&value).partition(0);
            let record = record.timestamp(hour_ago_ms);
            topics.producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        topics.producer.flush(PATIENCE).unwrap();
        // Without the topic of messages.
        let without = KafkaConfig {
            topics: vec![topics.conversations.clone()],
            ..topics.config(RoutingMode::Group)
        };
        TestNode::start_on(without, None, None).ready().stop(Duration::from_secs(5));
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 11..13);
        node.receives(11..13);
        node.stop(Duration::from_secs(5));
    }
}

/// Promise: “Records that Kafka has deleted before they were read are counted, and every session that may need them is closed with 4409.”
#[test]
#[ignore = "needs Kafka"]
fn offset_that_expired_while_the_node_was_stopped_continues_at_the_first_record_and_is_counted() {
    for mode in [Mode::Group, Mode::Claims] {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 1..3);
        node.receives(1..3);
        node.stop(Duration::from_secs(5));
        topics.say(0, 3..103);
        topics.delete_records(0, 42);
        let node = topics.start_in(mode);
        node.receives(43..103);
        assert_eq!(node.counters.records_expired.get(), 40, "{mode:?}");
        assert_eq!(node.missed.load(Ordering::Relaxed), 1, "{mode:?}");
        node.stop(Duration::from_secs(5));
        // The loss is reported once.
        let node = topics.start_in(mode).ready();
        assert_eq!(node.counters.logs_lost.get(), 0, "{mode:?}");
        node.stop(Duration::from_secs(5));
    }
}

/// What the node has fetched is delivered; the position behind it is not in the log any more.
#[test]
#[ignore = "needs Kafka"]
fn offset_that_expires_while_the_node_lags_continues_at_the_first_record_and_is_counted() {
    // More than fits into the ring to the shard.
    const LAST: i64 = 3_000;
    for mode in MODES {
        let topics = RealTopics::with_messages(1);
        // It fetches little ahead, and cannot take what it has fetched.
        let config = topics.config(match mode {
            Mode::Broadcast => RoutingMode::Broadcast,
            Mode::Group | Mode::Claims => RoutingMode::Group,
        });
        let small = ["fetch.message.max.bytes=1000", "queued.min.messages=1"];
        let small = small.map(|property| property.split_once('=').unwrap());
        let properties = small.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let config = KafkaConfig { properties, prefetch_kib: 1, ..config };
        let claims = matches!(mode, Mode::Claims).then(claims);
        let node = TestNode::start_on(config, None, claims).ready();
        topics.create_conversation();
        topics.say(0, 1..2);
        node.receives(1..2);
        node.blocked.store(true, Ordering::Relaxed);
        topics.say(0, 2..LAST + 1);
        until("the node lags", || node.router_counters.waits_for_room.get() > 0);
        topics.delete_records(0, LAST - 1);
        node.blocked.store(false, Ordering::Relaxed);
        let mut last = 1;
        while last < LAST {
            let value = node.next();
            let sequence = (last + 1..=LAST).find(|sequence| message("c", *sequence) == value);
            last = sequence.expect("in order");
        }
        assert!(node.counters.records_expired.get() > 0, "{mode:?}");
        assert_eq!(node.missed.load(Ordering::Relaxed), 1, "{mode:?}");
        node.stop(Duration::from_secs(5));
    }
}

/// Promise: “A topic of events that is deleted and created again is read from its start, and all sessions are closed with 4409.”
#[test]
#[ignore = "needs Kafka"]
fn topic_created_again_while_a_node_runs_is_read_from_its_start() {
    for mode in [Mode::Broadcast, Mode::Group] {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 1..11);
        node.receives(1..11);
        until("committed or read", || node.status.lags().iter().all(|lag| lag.lag == 0));
        topics.delete(&topics.messages);
        topics.create(&topics.messages, 1);
        topics.say(0, 11..14);
        node.receives(11..14);
        assert_eq!(node.missed.load(Ordering::Relaxed), 1, "{mode:?}");
        assert_eq!(node.counters.logs_lost.get(), 1, "{mode:?}");
        node.stop(Duration::from_secs(5));
        if matches!(mode, Mode::Group) {
            topics.say(0, 14..16);
            let node = topics.start_in(mode);
            node.receives(14..16);
            node.stop(Duration::from_secs(5));
        }
    }
}

/// Holders of other nodes remember positions in the former log.
#[test]
#[ignore = "needs Kafka"]
fn node_with_claims_ends_if_a_topic_is_created_again_and_its_successor_reads_it_from_its_start() {
    let topics = RealTopics::with_messages(1);
    let (sender, failed) = channel();
    let claims =
        ClaimParts { failed: Arc::new(move |reason| drop(sender.send(reason))), ..claims() };
    let node = TestNode::start_on(topics.config(RoutingMode::Group), None, Some(claims)).ready();
    topics.create_conversation();
    topics.say(0, 1..11);
    node.receives(1..11);
    topics.delete(&topics.messages);
    topics.create(&topics.messages, 1);
    topics.say(0, 11..14);
    let reason = failed.recv_timeout(PATIENCE).expect("reported");
    let expected = format!("KAFKA_TOPICS: the topic {} was ", topics.messages);
    assert!(reason.starts_with(&expected), "{reason}");
    assert!(reason.ends_with("all nodes have to start again"), "{reason}");
    node.stop(Duration::from_secs(5));
    let node = topics.start_in(Mode::Claims);
    node.receives(11..14);
    node.stop(Duration::from_secs(5));
}

/// The group's offsets are deleted with the topics, but the sessions topic shows that the group has run before.
///
/// Promise: “A group whose sessions topic is older is not new”
#[test]
#[ignore = "needs Kafka"]
fn topics_created_again_while_all_nodes_are_stopped_are_read_from_their_start() {
    let topics = RealTopics::with_messages(1);
    let start = |sessions_topic_age_ms: i64| {
        let parts = claims();
        let appended_at_ms = i64::try_from(unix_ms()).unwrap() - sessions_topic_age_ms;
        parts.table.record(SessionsRecord { offset: 0, appended_at_ms, key: None, value: None });
        TestNode::start_on(topics.config(RoutingMode::Group), None, Some(parts))
    };
    // The very first start: at the end.
    topics.create_conversation();
    topics.say(0, 1..3);
    let node = start(0).ready();
    topics.create_conversation();
    topics.say(0, 3..11);
    node.receives(3..11);
    node.stop(Duration::from_secs(5));
    for topic in [&topics.messages, &topics.conversations] {
        topics.delete(topic);
        topics.create(topic, 1);
    }
    topics.create_conversation();
    topics.say(0, 11..14);
    let node = start(3_600_000);
    node.receives(11..14);
    node.stop(Duration::from_secs(5));
}

/// Behind the last record is the marker of its transaction, which no reader gets.
#[test]
#[ignore = "needs Kafka"]
fn partition_that_ends_with_a_transaction_has_no_lag_when_its_records_are_delivered() {
    for mode in MODES {
        let topics = RealTopics::with_messages(1);
        let node = topics.start_in(mode).ready();
        topics.create_conversation();
        topics.say(0, 1..2);
        node.receives(1..2);
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", brokers())
            .set("transactional.id", unique("transaction"))
            .create()
            .unwrap();
        producer.init_transactions(PATIENCE).unwrap();
        for (sequence, is_committed) in [(2, true), (3, false)] {
            producer.begin_transaction().unwrap();
            let value = message("c", sequence);
            let record = BaseRecord::to(&topics.messages).key("c").payload(&value).partition(0);
            producer.send(record).map_err(|(error, _)| error).unwrap();
            producer.flush(PATIENCE).unwrap();
            if is_committed {
                producer.commit_transaction(PATIENCE).unwrap();
                node.receives(2..3);
            } else {
                producer.abort_transaction(PATIENCE).unwrap();
            }
            let is_read = |lag: &PartitionLag| *lag.topic == *topics.messages && lag.lag == 0;
            until("no lag", || node.status.lags().iter().any(is_read));
        }
        node.stop(Duration::from_secs(5));
    }
}

/// The group protocol of Kafka 4: the broker assigns the partitions.
#[test]
#[ignore = "needs Kafka"]
fn members_of_a_consumer_protocol_group_share_the_partitions_and_take_over_from_each_other() {
    for mode in [Mode::Group, Mode::Claims] {
        let topics = RealTopics::with_messages(4);
        let start = || {
            let properties = vec![("group.protocol".to_owned(), "consumer".to_owned())];
            let config = KafkaConfig { properties, ..topics.config(RoutingMode::Group) };
            let claims = matches!(mode, Mode::Claims).then(claims);
            TestNode::start_on(config, None, claims)
        };
        let first = start().ready();
        topics.create_conversation();
        let second = start();
        until("shared", || {
            let shared = [&first, &second].map(|node| node.status.partitions());
            shared.iter().sum::<usize>() == 5 && !shared.contains(&0)
        });
        first.stop(Duration::from_secs(5));
        until("taken over", || second.status.partitions() == 5);
        for partition in 0..4 {
            let from = 1 + i64::from(partition) * 5;
            topics.say(partition, from..from + 5);
            second.receives(from..from + 5);
        }
        topics.grow(&topics.messages, 5);
        topics.say(4, 21..26);
        second.receives(21..26);
        second.stop(Duration::from_secs(5));
    }
}
