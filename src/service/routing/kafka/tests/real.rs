//! Against real Kafka (`KAFKA_BROKERS`), which creates topics, has configurations and fences members.

use std::time::SystemTime;

use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::CommitMode;
use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::Offset;

use super::cluster_logs::{follow, open};
use super::logs::{CollectedLog, CollectingReceiver, config, key, send_to};
use super::*;
use crate::service::cluster::ports::{NodeEpoch, Queued};
use crate::service::events::timestamp::unix_ms;
use crate::service::routing::kafka::catalogue::Catalogue;
use crate::service::routing::kafka::claims::{
    self, Claim, ClaimError, ClaimStart, ClaimedPartition,
};
use crate::service::routing::kafka::starts::GroupStarts;

pub(super) fn brokers() -> String {
    std::env::var("KAFKA_BROKERS").expect("KAFKA_BROKERS names a Kafka for tests")
}

/// A name that no other test run uses.
pub(super) fn unique(what: &str) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    format!("{what}-{}-{}", std::process::id(), now.as_nanos())
}

fn names() -> ClusterTopicNames {
    ClusterTopicNames { sessions: unique("sessions"), hand_off: unique("handoff") }
}

fn ensure(names: &ClusterTopicNames) -> Result<ClusterTopics, TopicsError> {
    ensure_topics(&config(brokers()), names, &Arc::default(), |reason| eprintln!("{reason}"))
}

fn admin() -> (AdminClient<DefaultClientContext>, tokio::runtime::Runtime) {
    let client = ClientConfig::new().set("bootstrap.servers", brokers()).clone();
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    (client.create().unwrap(), runtime.unwrap())
}

#[test]
#[ignore = "needs Kafka"]
fn topics_are_created_as_they_have_to_be_and_a_wrong_one_is_refused_with_the_command() {
    let names = names();
    let created = ensure(&names).unwrap();
    assert_eq!(created, ClusterTopics { hand_off_partitions: 32, warnings: Vec::new() });
    assert_eq!(ensure(&names).unwrap(), created, "and found");

    let (admin, runtime) = admin();
    let wrong =
        AlterConfig::new(ResourceSpecifier::Topic(&names.sessions)).set("cleanup.policy", "delete");
    let altered = runtime.block_on(admin.alter_configs([&wrong], &AdminOptions::new()));
    assert!(altered.unwrap()[0].is_ok());
    // A broker applies the change soon after its answer.
    let mut error = None;
    until("change applied", || {
        error = ensure(&names).err();
        error.is_some()
    });
    let error = error.unwrap().to_string();
    assert!(error.contains("cleanup.policy is delete, not compact"), "{error}");
    let command = format!(
        "kafka-configs.sh --bootstrap-server {} --alter --entity-type topics --entity-name {}",
        brokers(),
        names.sessions
    );
    assert!(error.contains(&command), "{error}");
}

#[test]
#[ignore = "needs Kafka"]
fn node_reads_both_topics_and_stores_everything_before_it_stops() {
    let logs = open(brokers(), names());
    let (log, receiver) = (Arc::<CollectedLog>::default(), Arc::<CollectingReceiver>::default());
    let failed = follow(&logs, 7, &log, &receiver);
    assert_eq!(logs.barrier().end_offset(), None, "topics are not known yet");
    until("read", || logs.missing().is_none());
    assert!(failed.try_recv().is_err());

    assert_eq!(logs.hand_off_partition(), Some(7), "epoch 7, 32 partitions");
    let sessions = logs.sessions();
    assert!(sessions.write(&key(1), Some(b"begun")));
    until("own record read", || log.users() == [("user-1".to_owned(), true)]);
    let (sink, stored) = (logs.hand_offs(), Arc::default());
    assert_eq!(send_to(&*sink, 7, 7, 20, &stored), Queued::Accepted);
    until("handed over", || receiver.offsets() == [20]);
    assert_eq!(logs.barrier().end_offset(), Some(1));

    logs.set_epoch(NodeEpoch(8));
    assert_eq!(logs.hand_off_partition(), Some(7), "the partition stays");
    assert_eq!(send_to(&*sink, 7, 7, 21, &stored), Queued::Accepted);
    assert_eq!(send_to(&*sink, 8, 7, 22, &stored), Queued::Accepted);
    until("for the new epoch", || receiver.offsets() == [20, 22]);
    assert!(sessions.write(&key(1), None));
    assert_eq!(logs.stop(PATIENCE), 0, "the last record is stored");
    assert!(!sessions.write(&key(2), None));
}

/// A topic that is created again can have more records than the old one had before anybody reads it, so offsets tell
/// nothing.
#[test]
#[ignore = "needs Kafka"]
fn deleted_topics_are_noticed_while_they_are_missing() {
    let names = names();
    let logs = open(brokers(), names.clone());
    let (log, receiver) = (Arc::<CollectedLog>::default(), Arc::<CollectingReceiver>::default());
    follow(&logs, 7, &log, &receiver);
    until("read", || logs.missing().is_none());
    let (admin, runtime) = admin();
    let delete = |topic: &str| {
        let deleted = runtime.block_on(admin.delete_topics(&[topic], &AdminOptions::new()));
        assert!(deleted.unwrap()[0].is_ok());
    };
    delete(&names.hand_off);
    until("hand-off topic gone", || receiver.gone.load(Ordering::Acquire) == 1);
    assert_eq!(log.restarts.load(Ordering::Acquire), 0);
    delete(&names.sessions);
    until("sessions topic gone", || log.restarts.load(Ordering::Acquire) == 1);
    logs.stop(Duration::ZERO);
}

#[test]
#[ignore = "needs Kafka"]
fn node_that_may_not_use_its_topics_reports_it_once_with_the_commands() {
    let names = ClusterTopicNames { sessions: "no valid name".into(), ..names() };
    let logs = open(brokers(), names);
    let failed = follow(&logs, 7, &Arc::default(), &Arc::default());
    let error = failed.recv_timeout(PATIENCE).expect("reported").to_string();
    assert!(error.contains("kafka-topics.sh --bootstrap-server"), "{error}");
    assert!(logs.missing().unwrap().contains(&error));
    logs.stop(PATIENCE);
    assert!(failed.try_recv().is_err());
}

/// A topic of one partition, with a record for each timestamp.
fn events(timestamps: &[u64]) -> TopicPartition {
    let topic = unique("events");
    let client = ClientConfig::new().set("bootstrap.servers", brokers()).clone();
    let producer: BaseProducer = client.create().unwrap();
    for timestamp in timestamps {
        let record = BaseRecord::to(&topic).key("c").payload("x").partition(0);
        producer.send(record.timestamp(*timestamp as i64)).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(PATIENCE).unwrap();
    TopicPartition { topic: topic.into(), topic_index: 0, partition: 0 }
}

fn member(group: &str, log: &TopicPartition) -> BaseConsumer {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers())
        .set("group.id", group)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("session.timeout.ms", "2000")
        .set("heartbeat.interval.ms", "200")
        .set("max.poll.interval.ms", "2000")
        .create()
        .unwrap();
    consumer.subscribe(&[&log.topic]).unwrap();
    consumer
}

/// At the beginning of time, with an empty table.
struct Fresh;

impl ClaimStart for Fresh {
    fn generation(&self, _log: &TopicPartition) -> i64 {
        0
    }

    fn table(&self, stated: Option<i64>) -> KafkaResult<i64> {
        Ok(stated.unwrap_or(0))
    }
}

/// Claims the partition, as a member that starts now.
fn claim(
    consumer: &BaseConsumer,
    log: &TopicPartition,
) -> Result<Vec<ClaimedPartition>, ClaimError> {
    let catalogue = Catalogue::new(vec![Arc::clone(&log.topic)], Duration::ZERO);
    catalogue.look(consumer, unix_ms).unwrap();
    let find = GroupStarts {
        has_run: false,
        catalogue: &catalogue,
        started_at_ms: unix_ms(),
        now_ms: unix_ms(),
        timeout: PATIENCE,
    };
    let starts = find.find(consumer, std::slice::from_ref(log), |_| false).unwrap();
    claims::claim(consumer, starts, PATIENCE, &Fresh)
}

fn poll_until_assigned(consumer: &BaseConsumer, log: &TopicPartition) {
    until("assigned", || {
        let _ = consumer.poll(Duration::from_millis(100));
        let assigned = consumer.assignment().unwrap();
        assigned.find_partition(&log.topic, log.partition).is_some()
    });
}

#[test]
#[ignore = "needs Kafka"]
fn paused_member_cannot_claim_after_its_successor() {
    let now_ms = unix_ms();
    let (log, group) = (events(&[now_ms; 10]), unique("group"));
    let first = member(&group, &log);
    poll_until_assigned(&first, &log);
    let claimed = claim(&first, &log).unwrap();
    assert_eq!(claimed[0].claim, Claim { generation: 0, table: 0 });
    assert_eq!(claimed[0].start.offset, 10, "nothing was committed: from the end");

    // The first is not polled from here on, as if it were paused.
    let second = member(&group, &log);
    poll_until_assigned(&second, &log);
    let claimed = claim(&second, &log).unwrap();
    assert_eq!(claimed[0].claim.generation, 1);

    let refused = claim(&first, &log);
    assert!(matches!(refused, Err(ClaimError::Fenced(_))), "{refused:?}");
    let mut commit = TopicPartitionList::new();
    commit.add_partition_offset(&log.topic, 0, Offset::Offset(3)).unwrap();
    assert!(first.commit(&commit, CommitMode::Sync).is_err());
    let committed = second.committed(PATIENCE).unwrap();
    let committed = committed.find_partition(&log.topic, 0).unwrap();
    assert!(committed.metadata().starts_with("g=1 t=0 s="), "the successor's claim stands");
    assert_eq!(committed.offset(), Offset::Offset(10));
}

#[test]
#[ignore = "needs Kafka"]
fn claimed_partition_is_read_from_its_youngest_records_on() {
    const MINUTE: u64 = 60_000;
    let now_ms = unix_ms();
    let mut timestamps = vec![now_ms - 60 * MINUTE; 10];
    timestamps.extend([now_ms; 10]);
    let log = events(&timestamps);
    let member = member(&unique("group"), &log);
    poll_until_assigned(&member, &log);
    let mut claimed = claim(&member, &log).unwrap();
    assert_eq!(claimed[0].start.offset, 20);
    let at_age = |age_ms: u64| TailBounds { since_ms: (now_ms - age_ms) as i64, bytes: 1 << 20 };
    let fill_from = |claimed: &[ClaimedPartition], bounds| {
        let start = &claimed[0].start;
        fills::fill_from(&member, &[(&start.log, start.offset)], bounds, PATIENCE)[0]
    };
    assert_eq!(fill_from(&claimed, at_age(10 * MINUTE)), 6);
    assert_eq!(fill_from(&claimed, at_age(90 * MINUTE)), 0);
    let few = TailBounds { bytes: 3 * 128, ..at_age(90 * MINUTE) };
    assert_eq!(fill_from(&claimed, few), 13);
    claimed[0].start.offset = 5;
    assert_eq!(fill_from(&claimed, at_age(10 * MINUTE)), 1, "below the start");
    claimed[0].start.offset = 50;
    assert_eq!(fill_from(&claimed, at_age(10 * MINUTE)), 50, "the log was created again");
}
