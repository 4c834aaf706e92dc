//! Claims of partitions, against the mock cluster. See `real` for those that need the broker's checks.

use crate::service::members::beginnings::Beginnings;
use std::sync::atomic::AtomicU64;

use super::*;
use crate::service::cluster::holder::SessionSerial;
use crate::service::cluster::nodes::EpochEnd;
use crate::service::cluster::table::{SessionTable, TableConfig, TableListener};
use crate::service::cluster::wire::Lease;
use crate::service::events::timestamp::unix_ms;

impl Cluster {
    /// Metadata of the committed offset of each partition of a topic, without since when the group reads it.
    fn committed_metadata(&self, topic: &str) -> Vec<String> {
        let metadata = self.whole_metadata(topic).into_iter();
        let claims = metadata.map(|whole| {
            let (claim, since) = whole.split_once(" s=").unwrap();
            assert!(since.parse::<u64>().is_ok(), "{whole}");
            claim.to_owned()
        });
        claims.collect()
    }

    fn whole_metadata(&self, topic: &str) -> Vec<String> {
        let consumer = self.consumer("test");
        let mut partitions = TopicPartitionList::new();
        partitions.add_partition_range(topic, 0, PARTITIONS - 1);
        let committed = consumer.committed_offsets(partitions, PATIENCE).unwrap();
        committed.elements().iter().map(|found| found.metadata().to_owned()).collect()
    }
}

/// Hand-offs to a node, of which nothing is known but their end.
#[derive(Default)]
struct TestBarrier {
    unknown: AtomicBool,
    asked: AtomicU64,
}

impl ClaimBarrier for TestBarrier {
    fn end_offset(&self) -> Option<i64> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        (!self.unknown.load(Ordering::Acquire)).then_some(0)
    }
}

pub(super) struct Claiming {
    owned: Arc<OwnedPartitions>,
    barrier: Arc<TestBarrier>,
}

impl Claiming {
    /// A node that may join the group.
    pub(super) fn new() -> Self {
        let it = Self { owned: Arc::default(), barrier: Arc::default() };
        it.owned.join();
        it
    }

    fn start(&self, cluster: &Cluster, name: &str) -> TestNode {
        let brokers = cluster.mock.bootstrap_servers();
        let config = TestNode::config(name, RoutingMode::Group);
        // Longer than any test.
        let config = KafkaConfig { brokers, revoke_grace_ms: 600_000, ..config };
        TestNode::start_on(config, None, Some(self.parts()))
    }

    pub(super) fn parts(&self) -> ClaimParts {
        let config_of_table = TableConfig {
            topics: Vec::new(),
            node_timeout_ms: 60_000,
            newcomers_age_ms: 60_000,
            beginnings_max: Beginnings::KEPT_MAX,
        };
        let table = SessionTable::new(config_of_table, Arc::new(NoListener), Arc::default());
        ClaimParts {
            barrier: Arc::clone(&self.barrier) as Arc<dyn ClaimBarrier>,
            owned: Arc::clone(&self.owned),
            table: Arc::new(table),
            sessions_topic: "sessions".into(),
            failed: Arc::new(|reason| panic!("{reason}")),
        }
    }

    /// Generations of the partitions that the node states in its lease.
    fn generations(&self) -> Vec<i64> {
        let topics = self.owned.positions().into_iter();
        topics.flat_map(|topic| topic.partitions).map(|position| position.generation).collect()
    }
}

struct NoListener;

impl TableListener for NoListener {
    fn begun(&self, _serial: SessionSerial, _offset: i64) {}

    fn replaced(&self, _user: &str, _device: &str, _up_to: SessionSerial) {}

    fn ended(&self, _why: EpochEnd, _by: Option<&Lease>) {}
}

#[test]
fn generation_of_a_partition_grows_with_each_assignment_and_all_commits_carry_it() {
    let cluster = Cluster::new();
    let mut last = 0;
    for sequence in 1..4 {
        let claiming = Claiming::new();
        let node = claiming.start(&cluster, "one").ready();
        let generations = claiming.generations();
        assert!(generations.iter().all(|generation| *generation > last), "{generations:?}");
        last = generations.iter().copied().max().unwrap();
        let metadata: Vec<_> =
            generations.iter().map(|generation| format!("g={generation} t=0")).collect();
        // The topics are in alphabetical order.
        let (conversations, messages) = metadata.split_at(PARTITIONS as usize);
        assert_eq!(cluster.committed_metadata(MESSAGES), messages, "before the first record");
        assert_eq!(cluster.committed_metadata(CONVERSATIONS), conversations);
        cluster.create("c", &["alice"]);
        assert_eq!(node.next(), created("c", &["alice"]));
        cluster.say("c", sequence);
        assert_eq!(node.next(), message("c", sequence));
        until("committed", || cluster.committed(MESSAGES) == sequence);
        assert_eq!(node.counters.claims.get(), 2 * PARTITIONS as u64);
        assert_eq!(claiming.generations(), generations);
        node.stop(Duration::from_secs(5));
        assert!(claiming.generations().is_empty());
        assert_eq!(cluster.committed_metadata(MESSAGES), messages, "after the last commit");
    }
}

#[test]
fn without_claims_commits_state_only_since_when_the_group_reads_the_topic() {
    let before_ms = unix_ms();
    let cluster = Cluster::new();
    let node = TestNode::start(&cluster, RoutingMode::Group, "one").ready();
    cluster.create("c", &["alice"]);
    assert_eq!(node.next(), created("c", &["alice"]));
    cluster.say("c", 1);
    assert_eq!(node.next(), message("c", 1));
    until("committed", || cluster.committed(MESSAGES) == 1);
    node.stop(Duration::from_secs(5));
    for metadata in cluster.whole_metadata(MESSAGES) {
        let since: u64 = metadata.strip_prefix("s=").expect(&metadata).parse().unwrap();
        assert!((before_ms..=unix_ms()).contains(&since), "{metadata}");
    }
}

#[test]
fn partition_whose_claim_fails_is_not_routed_until_it_is_claimed() {
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
    let cluster = Cluster::new();
    // librdkafka does not retry this error.
    let refused = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED; 10_000];
    cluster.mock.request_errors(RDKafkaApiKey::OffsetCommit, &refused);
    let claiming = Claiming::new();
    let node = claiming.start(&cluster, "one");
    cluster.create("c", &["alice"]);
    let partitions = 2 * PARTITIONS as u64;
    until("refused and tried again", || node.counters.claims_failed.get() >= 2 * partitions);
    assert_eq!(node.counters.claims.get(), 0);
    assert_eq!(node.counters.partitions_unclaimed.get(), partitions);
    assert_eq!(node.status.partitions(), 0);
    assert!(node.status.missing().is_some());
    cluster.mock.clear_request_errors(RDKafkaApiKey::OffsetCommit);
    let node = node.ready();
    assert_eq!(node.counters.claims.get(), partitions);
    assert_eq!(node.counters.partitions_unclaimed.get(), 0);
    cluster.say("c", 1);
    while node.next() != message("c", 1) {}
    let generations = claiming.generations();
    node.stop(Duration::from_secs(5));
    // The topics are in alphabetical order.
    let expected: Vec<_> = generations[PARTITIONS as usize..]
        .iter()
        .map(|generation| format!("g={generation} t=0"))
        .collect();
    assert_eq!(cluster.committed_metadata(MESSAGES), expected);
}

#[test]
fn nodes_with_claims_share_the_partitions_and_take_over_from_each_other() {
    let cluster = Cluster::new();
    let claiming = Claiming::new();
    let first = claiming.start(&cluster, "one").ready();
    let before = claiming.generations();
    assert_eq!(before.len(), 2 * PARTITIONS as usize);
    let second = Claiming::new().start(&cluster, "two");
    until("shared", || {
        first.status.partitions() == PARTITIONS as usize
            && second.status.partitions() == PARTITIONS as usize
    });
    first.stop(Duration::from_secs(5));
    until("taken over", || second.status.partitions() == 2 * PARTITIONS as usize);
    cluster.create("c", &["alice"]);
    assert_eq!(second.next(), created("c", &["alice"]));
    second.stop(Duration::from_secs(5));
    // The topics are in alphabetical order.
    let after = [CONVERSATIONS, MESSAGES].map(|topic| cluster.committed_metadata(topic)).concat();
    let generation = |metadata: &String| -> i64 {
        let (generation, table) = metadata.strip_prefix("g=").unwrap().split_once(" t=").unwrap();
        assert_eq!(table, "0");
        generation.parse().unwrap()
    };
    let after: Vec<_> = after.iter().map(generation).collect();
    // Each partition was claimed by the first; half of them then moved at once, half at its end.
    let grows = before.iter().zip(&after).all(|(before, after)| before < after);
    assert!(grows && before.len() == after.len(), "{before:?} {after:?}");
}

#[test]
fn claimed_partition_is_given_up_with_records_in_flight_and_its_next_owner_repeats_them() {
    let cluster = Cluster::new();
    let first = Claiming::new().start(&cluster, "one").ready();
    let conversations: Vec<_> = (0..12).map(|n| format!("c-{n}")).collect();
    for conversation in &conversations {
        cluster.create(conversation, &["alice"]);
    }
    until("done", || cluster.committed(CONVERSATIONS) == 12);
    first.stalled.store(true, Ordering::Relaxed);
    // In every partition, whichever of them move.
    for conversation in &conversations {
        cluster.say(conversation, 1);
        cluster.publish(CONVERSATIONS, conversation, &changed(conversation, "bob", true));
    }
    let sent: Vec<_> = std::iter::repeat_with(|| first.next()).take(36).collect();
    let second = Claiming::new().start(&cluster, "two");
    until("shared", || second.status.partitions() == PARTITIONS as usize);
    let unfinished = first.counters.partitions_left_unfinished.get();
    assert!(unfinished > 0, "every partition has records in flight");
    assert!(sent.contains(&second.next()));
    first.stop(Duration::from_millis(100));
    second.stop(Duration::from_secs(5));
}

#[test]
fn partition_is_not_routed_before_the_barrier_of_its_claim_is_known() {
    let cluster = Cluster::new();
    let claiming = Claiming::new();
    claiming.barrier.unknown.store(true, Ordering::Release);
    let node = claiming.start(&cluster, "one");
    cluster.create("c", &["alice"]);
    until("asked again", || claiming.barrier.asked.load(Ordering::Relaxed) > 2);
    assert_eq!(node.status.partitions(), 0);
    assert!(claiming.generations().is_empty());
    assert!(node.status.missing().is_some());
    claiming.barrier.unknown.store(false, Ordering::Release);
    let node = node.ready();
    assert_eq!(node.status.partitions(), 2 * PARTITIONS as usize);
    cluster.say("c", 1);
    while node.next() != message("c", 1) {}
    node.stop(Duration::from_secs(5));
}

#[test]
fn group_is_joined_only_when_the_node_may() {
    let cluster = Cluster::new();
    let claiming = Claiming { owned: Arc::default(), barrier: Arc::default() };
    let waiting = claiming.start(&cluster, "one");
    // It would get half of the partitions.
    let other = Claiming::new().start(&cluster, "two").ready();
    assert_eq!(other.status.partitions(), 2 * PARTITIONS as usize);
    assert_eq!(waiting.counters.rebalances.get(), 0);
    claiming.owned.join();
    until("shared", || waiting.status.partitions() == PARTITIONS as usize);
    waiting.stop(Duration::from_secs(5));
    other.stop(Duration::from_secs(5));
    let never = Claiming { owned: Arc::default(), barrier: Arc::default() };
    never.start(&cluster, "three").stop(Duration::from_secs(5));
}

#[test]
fn source_knows_the_end_of_its_partition_until_the_next_record() {
    use crate::service::routing::router::RecordSource as _;
    let cluster = Cluster::new();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.mock.bootstrap_servers())
        .set("group.id", "source")
        .set("enable.partition.eof", "true")
        .create()
        .unwrap();
    let consumer = Arc::new(consumer);
    let bell = Arc::new(Doorbell::new().unwrap());
    let mut source = PartitionSource::new(&consumer, MESSAGES, 0, bell, false).unwrap();
    assert!(!source.is_at_end(), "not known");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(MESSAGES, 0, rdkafka::topic_partition_list::Offset::Offset(0))
        .unwrap();
    consumer.assign(&list).unwrap();
    for round in 0..3 {
        until("end", || {
            let _ = consumer.poll(Duration::ZERO);
            assert!(!source.poll(&mut |_| {}), "nothing was stored");
            source.is_at_end()
        });
        let record = BaseRecord::to(MESSAGES).key("c").payload("x").partition(0);
        cluster.producer.send(record).map_err(|(error, _)| error).unwrap();
        cluster.producer.flush(PATIENCE).unwrap();
        let mut offset = None;
        until("record", || {
            let _ = consumer.poll(Duration::ZERO);
            source.poll(&mut |record| offset = Some(record.offset))
        });
        assert_eq!(offset, Some(round));
        assert!(!source.is_at_end());
    }
}
