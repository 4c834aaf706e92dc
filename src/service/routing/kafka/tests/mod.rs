//! Tests against librdkafka's mock cluster, which speaks Kafka's protocol but implements little of it.
//! The end-to-end tests run against real Kafka.

mod catalogue;
mod claims;
mod cluster_logs;
mod logs;
mod membership_topics;
mod real;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer as _};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::*;
use crate::domain::budget::EventBudget;
use crate::domain::command::{ShardCommand, ShardReport};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::handoff::{Doorbell, Pushed, ShardEnd, connect};
use crate::service::members::directory::{Directory, SessionIds};
use crate::service::members::membership::{MembershipConfig, MembershipCounters};
use crate::service::routing::router::dead_letter::DeadLetterSink;
use crate::service::routing::router::tests::world::{changed, created, message};
use crate::service::routing::router::{Router, RouterConfig, RouterCounters, RouterParts};

const MESSAGES: &str = "messaging.events.v1";
const CONVERSATIONS: &str = "conversation.events.v1";
const PARTITIONS: i32 = 3;
/// Longer than anything takes, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Cluster {
    mock: MockCluster<'static, DefaultProducerContext>,
    producer: BaseProducer,
}

impl Cluster {
    fn new() -> Self {
        let mock = MockCluster::new(1).unwrap();
        for topic in [MESSAGES, CONVERSATIONS] {
            mock.create_topic(topic, PARTITIONS, 1).unwrap();
        }
        let producer =
            ClientConfig::new().set("bootstrap.servers", mock.bootstrap_servers()).create();
        Self { mock, producer: producer.unwrap() }
    }

    fn publish(&self, topic: &str, conversation: &str, value: &[u8]) {
        let record = BaseRecord::to(topic).key(conversation).payload(value);
        self.producer.send(record).map_err(|(error, _)| error).unwrap();
        self.producer.flush(PATIENCE).unwrap();
    }

    fn create(&self, conversation: &str, members: &[&str]) {
        self.publish(CONVERSATIONS, conversation, &created(conversation, members));
    }

    fn say(&self, conversation: &str, sequence: i64) {
        self.publish(MESSAGES, conversation, &message(conversation, sequence));
    }

    fn consumer(&self, group: &str) -> BaseConsumer {
        ClientConfig::new()
            .set("bootstrap.servers", self.mock.bootstrap_servers())
            .set("group.id", group)
            .create()
            .unwrap()
    }

    /// Sum of the committed offsets of a topic's partitions.
    fn committed(&self, topic: &str) -> i64 {
        let consumer = self.consumer("test");
        let mut partitions = TopicPartitionList::new();
        partitions.add_partition_range(topic, 0, PARTITIONS - 1);
        let committed = consumer.committed_offsets(partitions, PATIENCE).unwrap();
        committed
            .elements()
            .iter()
            .filter_map(|found| found.offset().to_raw())
            .filter(|o| *o > 0)
            .sum()
    }
}

struct TestNode {
    kafka: Kafka,
    status: Arc<KafkaStatus>,
    counters: Arc<KafkaCounters>,
    router_counters: Arc<RouterCounters>,
    router: RouterControl,
    router_thread: JoinHandle<()>,
    /// The value of each delivery.
    delivered: Receiver<Vec<u8>>,
    /// Whether the shard stops reporting deliveries done.
    stalled: Arc<AtomicBool>,
    /// Whether the shard takes no deliveries.
    blocked: Arc<AtomicBool>,
    /// How often all sessions were reported to have missed events.
    missed: Arc<AtomicUsize>,
    _runtime: tokio::runtime::Runtime,
}

/// A shard whose sessions take every event at once.
fn shard(
    ShardEnd { mut commands, mut reports }: ShardEnd,
    bell: Arc<Doorbell>,
    stalled: Arc<AtomicBool>,
    blocked: Arc<AtomicBool>,
) -> Receiver<Vec<u8>> {
    let (sender, delivered) = channel();
    std::thread::spawn(move || {
        while !commands.is_abandoned() || !commands.is_empty() {
            while !blocked.load(Ordering::Relaxed)
                && let Some(command) = commands.pop()
            {
                let (event, ticket) = match command {
                    ShardCommand::Deliver { event, ticket, .. } => (event, ticket),
                    ShardCommand::Routed { .. } => continue,
                    command => panic!("{command:?}"),
                };
                let value = event.frame(Encoding::Binary).unwrap()[2..].to_vec();
                let _ = sender.send(value);
                if let Some(ticket) = ticket
                    && !stalled.load(Ordering::Relaxed)
                {
                    assert!(!matches!(reports.push(ShardReport::Done { ticket }), Pushed::Full(_)));
                }
            }
            reports.publish();
            bell.about_to_sleep();
            if blocked.load(Ordering::Relaxed) || commands.is_empty() {
                bell.wait(100);
            }
            bell.awake();
        }
    });
    delivered
}

impl TestNode {
    fn start(cluster: &Cluster, mode: RoutingMode, name: &str) -> Self {
        Self::start_with(cluster, mode, name, None)
    }

    fn start_with(cluster: &Cluster, mode: RoutingMode, name: &str, letters: Option<&str>) -> Self {
        Self::start_configured(cluster, Self::config(name, mode), letters)
    }

    /// The configuration of a node. The caller sets the brokers.
    fn config(name: &str, mode: RoutingMode) -> KafkaConfig {
        KafkaConfig {
            mode,
            group: "test".into(),
            client_id: name.into(),
            commit_interval_ms: 50,
            discovery_interval_ms: 200,
            revoke_grace_ms: 500,
            ..KafkaConfig::new("")
        }
    }

    fn start_configured(cluster: &Cluster, config: KafkaConfig, letters: Option<&str>) -> Self {
        let brokers = cluster.mock.bootstrap_servers();
        Self::start_on(KafkaConfig { brokers, ..config }, letters, None)
    }

    fn start_on(config: KafkaConfig, letters: Option<&str>, claims: Option<ClaimParts>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build();
        let runtime = runtime.unwrap();
        let membership = Membership::new(
            MembershipConfig::default(),
            None,
            runtime.handle().clone(),
            Arc::<MembershipCounters>::default(),
        );
        let counters = Arc::<KafkaCounters>::default();
        let dead_letters = letters.map(|topic| {
            let topic = DeadLetterTopic::new(topic.into(), &config, Arc::clone(&counters));
            Arc::new(topic.unwrap()) as Arc<dyn DeadLetterSink>
        });
        let (bell, shard_bell) =
            (Arc::new(Doorbell::new().unwrap()), Arc::new(Doorbell::new().unwrap()));
        let (link, end) = connect([1024, 4096], &shard_bell, &bell);
        let stalled = Arc::<AtomicBool>::default();
        let blocked = Arc::<AtomicBool>::default();
        let delivered = shard(end, shard_bell, Arc::clone(&stalled), Arc::clone(&blocked));
        let directory = Arc::new(Directory::new());
        let address = SessionAddress {
            shard: ShardId(0),
            encoding: Encoding::Binary,
            connection: ConnectionKey { slot: 0, generation: 0 },
        };
        directory.insert(SessionIds::new("alice", "phone"), address);
        let router_counters = Arc::<RouterCounters>::default();
        let tails = TailBudget::new(1 << 20, 60_000);
        let (router, control) = Router::new(RouterParts {
            config: RouterConfig::default(),
            counters: Arc::clone(&router_counters),
            bell,
            budget: EventBudget::new(1 << 28),
            links: vec![link],
            directory,
            membership: Arc::clone(&membership),
            user_lists: None,
            remote: None,
            cluster: None,
            tails: Some(Arc::clone(&tails)),
            dead_letters,
        });
        let router_thread = router.spawn("router".into()).unwrap();
        let status = Arc::<KafkaStatus>::default();
        let missed = Arc::<AtomicUsize>::default();
        let missed_by_all = Arc::clone(&missed);
        let parts = KafkaParts {
            routers: vec![control.clone()],
            membership,
            status: Arc::clone(&status),
            counters: Arc::clone(&counters),
            tails: Some(tails),
            claims,
            missed: Box::new(move || {
                missed_by_all.fetch_add(1, Ordering::Relaxed);
            }),
        };
        let kafka = Kafka::start(config, parts);
        Self {
            kafka: kafka.unwrap(),
            status,
            counters,
            router_counters,
            router: control,
            router_thread,
            delivered,
            stalled,
            blocked,
            missed,
            _runtime: runtime,
        }
    }

    fn ready(self) -> Self {
        until("ready", || self.status.missing().is_none());
        self
    }

    fn next(&self) -> Vec<u8> {
        self.delivered.recv_timeout(PATIENCE).expect("delivered")
    }

    fn stop(self, grace: Duration) {
        self.kafka.stop(grace);
        self.router.stop();
        self.router_thread.join().unwrap();
        assert!(self.status.missing().is_some());
    }
}

/// Polls a condition that no channel reports.
fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !reached() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn broadcast_reads_from_the_end_and_has_the_members_of_earlier_conversations() {
    let cluster = Cluster::new();
    cluster.create("c", &["alice"]);
    cluster.say("c", 1);
    let node = TestNode::start(&cluster, RoutingMode::Broadcast, "one").ready();
    assert_eq!(node.status.partitions(), 2 * PARTITIONS as usize);
    cluster.publish(CONVERSATIONS, "c", &changed("c", "bob", true));
    assert_eq!(node.next(), changed("c", "bob", true));
    for sequence in 2..5 {
        cluster.say("c", sequence);
        assert_eq!(node.next(), message("c", sequence));
    }
    until("lag known", || {
        let lags = node.status.lags();
        lags.len() == 2 * PARTITIONS as usize && lags.iter().all(|lag| lag.lag == 0)
    });
    node.stop(Duration::from_secs(5));
    assert_eq!(cluster.committed(MESSAGES), 0);
}

#[test]
fn broadcast_finds_a_topic_created_later() {
    let mock = MockCluster::new(1).unwrap();
    mock.create_topic(CONVERSATIONS, 1, 1).unwrap();
    let producer = ClientConfig::new().set("bootstrap.servers", mock.bootstrap_servers()).create();
    let cluster = Cluster { mock, producer: producer.unwrap() };
    let node = TestNode::start(&cluster, RoutingMode::Broadcast, "one");
    let missing = || node.status.missing().unwrap_or_default();
    let expected = format!("KAFKA_TOPICS: the topic {MESSAGES} does not exist");
    until("named by readiness", || missing() == expected);
    until("the other topic is read", || node.status.partitions() == 1);
    cluster.create("c", &["alice"]);
    assert_eq!(node.next(), created("c", &["alice"]));
    cluster.mock.create_topic(MESSAGES, PARTITIONS, 1).unwrap();
    until("found", || node.status.partitions() == 1 + PARTITIONS as usize);
    assert_eq!(node.status.missing(), None);
    cluster.say("c", 1);
    assert_eq!(node.next(), message("c", 1));
    node.stop(Duration::from_secs(5));
}

#[test]
fn group_commits_done_records_and_the_next_owner_reads_on_from_there() {
    let cluster = Cluster::new();
    let node = TestNode::start(&cluster, RoutingMode::Group, "one").ready();
    cluster.create("c", &["alice"]);
    assert_eq!(node.next(), created("c", &["alice"]));
    for sequence in 1..11 {
        cluster.say("c", sequence);
        assert_eq!(node.next(), message("c", sequence));
    }
    until("committed", || cluster.committed(MESSAGES) == 10);
    node.stop(Duration::from_secs(5));
    cluster.say("c", 11);
    let node = TestNode::start(&cluster, RoutingMode::Group, "two");
    assert_eq!(node.next(), message("c", 11));
    node.stop(Duration::from_secs(5));
    assert_eq!(cluster.committed(MESSAGES), 11);
    assert_eq!(cluster.committed(CONVERSATIONS), 1);
}

/// Promise: “The offset follows delivery.”
#[test]
fn records_not_done_are_not_committed_and_the_next_owner_sends_them_again() {
    let cluster = Cluster::new();
    let node = TestNode::start(&cluster, RoutingMode::Group, "one").ready();
    cluster.create("c", &["alice"]);
    cluster.say("c", 1);
    assert!([node.next(), node.next()].contains(&message("c", 1)));
    until("committed", || cluster.committed(MESSAGES) == 1);
    node.stalled.store(true, Ordering::Relaxed);
    cluster.say("c", 2);
    cluster.say("c", 3);
    assert_eq!([node.next(), node.next()], [message("c", 2), message("c", 3)]);
    let counters = Arc::clone(&node.counters);
    node.stop(Duration::from_millis(100));
    assert_eq!(counters.partitions_left_unfinished.get(), 1);
    assert_eq!(cluster.committed(MESSAGES), 1);
    let node = TestNode::start(&cluster, RoutingMode::Group, "two");
    assert_eq!([node.next(), node.next()], [message("c", 2), message("c", 3)]);
    node.stop(Duration::from_secs(5));
    assert_eq!(cluster.committed(MESSAGES), 3);
}

#[test]
fn nodes_of_a_group_share_the_partitions_and_take_over_from_each_other() {
    let cluster = Cluster::new();
    let conversations: Vec<_> = (0..12).map(|n| format!("c-{n}")).collect();
    for conversation in &conversations {
        cluster.create(conversation, &["alice"]);
    }
    let first = TestNode::start(&cluster, RoutingMode::Group, "one").ready();
    assert_eq!(first.status.partitions(), 2 * PARTITIONS as usize);
    let second = TestNode::start(&cluster, RoutingMode::Group, "two");
    until("shared", || {
        first.status.partitions() == PARTITIONS as usize
            && second.status.partitions() == PARTITIONS as usize
    });
    let mut received: HashMap<Vec<u8>, usize> = HashMap::new();
    // Records in all partitions, so that each node gets some.
    for sequence in 1..4 {
        for conversation in &conversations {
            cluster.say(conversation, sequence);
            let joined = changed(conversation, &format!("user-{sequence}"), true);
            cluster.publish(CONVERSATIONS, conversation, &joined);
        }
    }
    let count = |received: &mut HashMap<Vec<u8>, usize>, nodes: &[&TestNode], expected| {
        until("all received", || {
            for value in nodes.iter().flat_map(|node| node.delivered.try_iter()) {
                *received.entry(value).or_default() += 1;
            }
            received.len() == expected
        });
    };
    count(&mut received, &[&first, &second], 72);
    assert!(received.values().all(|times| *times == 1), "{received:?}");
    assert!(first.router_counters.deliveries.get() > 0);
    assert!(second.router_counters.deliveries.get() > 0);

    first.stop(Duration::from_secs(5));
    until("taken over", || second.status.partitions() == 2 * PARTITIONS as usize);
    conversations.iter().for_each(|conversation| cluster.say(conversation, 4));
    count(&mut received, &[&second], 84);
    assert!(received.values().all(|times| *times == 1), "{received:?}");
    second.stop(Duration::from_secs(5));
    assert_eq!(cluster.committed(MESSAGES), 48);
}

#[test]
fn undecodable_record_goes_to_the_dead_letter_topic_and_the_next_is_delivered() {
    let cluster = Cluster::new();
    cluster.mock.create_topic("dead", 1, 1).unwrap();
    let node = TestNode::start_with(&cluster, RoutingMode::Group, "one", Some("dead")).ready();
    cluster.create("c", &["alice"]);
    assert_eq!(node.next(), created("c", &["alice"]));
    cluster.publish(MESSAGES, "c", b"\x0c");
    cluster.say("c", 1);
    assert_eq!(node.next(), message("c", 1));
    until("stored", || node.counters.dead_letters_stored.get() == 1);
    until("committed", || cluster.committed(MESSAGES) == 2);

    let reader = cluster.consumer("reader");
    let mut partition = TopicPartitionList::new();
    partition
        .add_partition_offset("dead", 0, rdkafka::topic_partition_list::Offset::Beginning)
        .unwrap();
    reader.assign(&partition).unwrap();
    let letter = reader.poll(PATIENCE).expect("stored").unwrap();
    assert_eq!((letter.key(), letter.payload()), (Some(&b"c"[..]), Some(&b"\x0c"[..])));
    let headers: HashMap<_, _> = letter
        .headers()
        .unwrap()
        .iter()
        .map(|header| (header.key, std::str::from_utf8(header.value.unwrap()).unwrap()))
        .collect();
    assert_eq!(headers["delivery-reason"], "undecodable");
    assert_eq!(headers["delivery-topic"], MESSAGES);
    assert_eq!(headers["delivery-offset"], "0");
    node.stop(Duration::from_secs(5));
}

#[test]
fn unreachable_broker_shows_in_readiness_and_consuming_resumes_when_it_is_back() {
    let cluster = Cluster::new();
    let node = TestNode::start(&cluster, RoutingMode::Broadcast, "one").ready();
    cluster.create("c", &["alice"]);
    assert_eq!(node.next(), created("c", &["alice"]));
    cluster.mock.broker_down(1).unwrap();
    until("not ready", || node.status.missing().is_some());
    cluster.mock.broker_up(1).unwrap();
    until("ready again", || node.status.missing().is_none());
    cluster.say("c", 1);
    assert_eq!(node.next(), message("c", 1));
    node.stop(Duration::from_secs(5));
}

#[test]
fn unknown_property_is_refused_with_its_name() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let membership = Membership::new(
        MembershipConfig::default(),
        None,
        runtime.handle().clone(),
        Arc::<MembershipCounters>::default(),
    );
    let bell = Arc::new(Doorbell::new().unwrap());
    let (_router, control) = Router::new(RouterParts {
        config: RouterConfig::default(),
        counters: Arc::default(),
        bell,
        budget: EventBudget::new(1 << 28),
        links: Vec::new(),
        directory: Arc::new(Directory::new()),
        membership: Arc::clone(&membership),
        user_lists: None,
        remote: None,
        cluster: None,
        tails: None,
        dead_letters: None,
    });
    let config = KafkaConfig {
        properties: vec![("no.such.property".into(), "1".into())],
        ..KafkaConfig::new("127.0.0.1:1")
    };
    let parts = KafkaParts {
        routers: vec![control],
        membership,
        status: Arc::default(),
        counters: Arc::default(),
        tails: None,
        claims: None,
        missed: Box::new(|| {}),
    };
    let refused = Kafka::start(config, parts).err();
    assert!(refused.unwrap().to_string().contains("no.such.property"));
}
