//! Writers and readers of the topics of the cluster, against the mock cluster.

use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::*;
use crate::service::cluster::ports::{
    HandOffReceiver, HandOffSink, IncomingHandOff, NodeEpoch, OutgoingHandOff, Queued, SessionsLog,
    SessionsRecord, SessionsWriter as _,
};
use crate::service::cluster::wire::{HandOffHeader, SessionsKey, Users, hand_off_header::Content};

pub(super) const SESSIONS: &str = "sessions";
pub(super) const HAND_OFF: &str = "handoff";

pub(super) fn config(brokers: String) -> KafkaConfig {
    KafkaConfig { client_id: "test".into(), ..KafkaConfig::new(brokers) }
}

pub(super) fn mock() -> MockCluster<'static, DefaultProducerContext> {
    let mock = MockCluster::new(1).unwrap();
    mock.create_topic(SESSIONS, 1, 1).unwrap();
    mock.create_topic(HAND_OFF, 4, 1).unwrap();
    mock
}

pub(super) fn key(number: u64) -> SessionsKey {
    SessionsKey { epoch: 7, user: format!("user-{number}"), device: "phone".into() }
}

/// What a reader of the sessions topic has reported.
#[derive(Default)]
pub(super) struct CollectedLog {
    pub(super) records: Mutex<Vec<SessionsRecord>>,
    pub(super) read_to: AtomicU64,
    pub(super) restarts: AtomicU64,
}

impl SessionsLog for CollectedLog {
    fn record(&self, record: SessionsRecord) {
        let mut records = self.records.lock().unwrap();
        let previous = records.last().map_or(-1, |record| record.offset);
        assert!(record.offset > previous, "in the order of the log");
        records.push(record);
    }

    fn read_to(&self, next: i64) {
        let last = self.records.lock().unwrap().last().map_or(-1, |record| record.offset);
        assert!(next > last, "everything below is reported first");
        self.read_to.store(next as u64, Ordering::Release);
    }

    fn restarted(&self) {
        self.records.lock().unwrap().clear();
        self.read_to.store(0, Ordering::Release);
        self.restarts.fetch_add(1, Ordering::Release);
    }

    fn fell_behind(&self) {
        self.restarted();
    }
}

impl CollectedLog {
    pub(super) fn has_read_to(&self, next: i64) -> bool {
        self.read_to.load(Ordering::Acquire) >= next as u64
    }

    /// The users of the records, and whether each has a value.
    pub(super) fn users(&self) -> Vec<(String, bool)> {
        let records = self.records.lock().unwrap();
        let users = records.iter().map(|record| {
            (record.key.as_ref().expect("readable").user.clone(), record.value.is_some())
        });
        users.collect()
    }
}

#[derive(Default)]
pub(super) struct CollectingReceiver {
    pub(super) full: AtomicBool,
    pub(super) offered: AtomicU64,
    pub(super) missed: AtomicU64,
    pub(super) gone: AtomicU64,
    pub(super) read_to: AtomicU64,
    pub(super) received: Mutex<Vec<IncomingHandOff>>,
}

impl HandOffReceiver for CollectingReceiver {
    fn receive(&self, hand_off: IncomingHandOff) -> Pushed<IncomingHandOff> {
        self.offered.fetch_add(1, Ordering::Relaxed);
        if self.full.load(Ordering::Acquire) {
            return Pushed::Full(hand_off);
        }
        self.received.lock().unwrap().push(hand_off);
        Pushed::Accepted
    }

    fn read_to(&self, next: i64) {
        self.read_to.store(next as u64, Ordering::Release);
    }

    fn missed(&self) {
        self.missed.fetch_add(1, Ordering::Release);
    }

    fn gone(&self) {
        self.gone.fetch_add(1, Ordering::Release);
    }
}

impl CollectingReceiver {
    pub(super) fn offsets(&self) -> Vec<i64> {
        self.received.lock().unwrap().iter().map(|it| it.header.offset).collect()
    }
}

pub(super) fn live(offset: i64) -> HandOffHeader {
    HandOffHeader {
        parked: Vec::new(),
        topic: "events".into(),
        partition: 5,
        offset,
        generation: 2,
        table: 40,
        appended_at_ms: 1_000,
        content: Some(Content::Live(Users { ids: vec!["alice".into()] })),
    }
}

/// Sends a hand-off. Counts in `stored` when it is stored.
pub(super) fn send_to(
    sink: &dyn HandOffSink,
    target: u64,
    partition: i32,
    offset: i64,
    stored: &Arc<AtomicU64>,
) -> Queued {
    let stored = Arc::clone(stored);
    let done = move || {
        stored.fetch_add(1, Ordering::Relaxed);
    };
    let value = format!("event {offset}");
    let hand_off = OutgoingHandOff {
        target: NodeEpoch(target),
        partition,
        header: &live(offset),
        key: Some(b"c"),
        value: value.as_bytes(),
    };
    sink.send(hand_off, Box::new(done))
}

/// Values of the first `count` records of a partition.
fn values(brokers: &str, topic: &str, partition: i32, count: usize) -> Vec<Vec<u8>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "values")
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    let beginning = rdkafka::topic_partition_list::Offset::Beginning;
    list.add_partition_offset(topic, partition, beginning).unwrap();
    consumer.assign(&list).unwrap();
    let mut values = Vec::new();
    while values.len() < count {
        if let Ok(message) = consumer.poll(PATIENCE).expect("stored") {
            values.push(message.payload().unwrap().to_vec());
        }
    }
    values
}

#[test]
fn records_are_stored_once_in_order_over_an_outage_of_the_broker() {
    let mock = mock();
    let counters = Arc::<ClusterLogCounters>::default();
    let outbox =
        SessionsOutbox::start(&config(mock.bootstrap_servers()), SESSIONS, counters.clone());
    let outbox = outbox.unwrap();
    let write = |number: u64| assert!(outbox.write(&key(number), Some(&number.to_be_bytes())));
    (0..100).for_each(write);
    until("some stored", || counters.stored.get() > 0);
    mock.broker_down(1).unwrap();
    (100..200).for_each(write);
    // Nothing is given up while the broker is down.
    std::thread::sleep(Duration::from_secs(1));
    assert!(counters.waiting.get() > 0);
    mock.broker_up(1).unwrap();
    (200..300).for_each(write);
    until("all stored", || counters.waiting.get() == 0);
    assert_eq!((counters.stored.get(), counters.failed.get()), (300, 0));
    assert_eq!(counters.waiting_bytes.get(), 0);
    let stored = values(&mock.bootstrap_servers(), SESSIONS, 0, 300);
    let expected: Vec<_> = (0..300u64).map(|number| number.to_be_bytes().to_vec()).collect();
    assert_eq!(stored, expected);
    assert_eq!(outbox.stop(Duration::ZERO), 0);
    assert!(!outbox.write(&key(1), None), "nothing is accepted after the end");
}

/// An error that librdkafka does not retry: a record would be missing while later ones are stored.
#[test]
fn producer_that_lost_a_record_is_replaced_and_repeats_in_order_what_is_not_stored() {
    let mock = mock();
    let counters = Arc::<ClusterLogCounters>::default();
    let sink = HandOffOutbox::start(&config(mock.bootstrap_servers()), HAND_OFF, counters.clone());
    let sink = sink.unwrap();
    let stored = Arc::<AtomicU64>::default();
    // Small batches, many in flight.
    for offset in 0..50 {
        assert_eq!(send_to(&sink, 7, 2, offset, &stored), Queued::Accepted);
        if offset % 10 == 0 {
            until("stored", || stored.load(Ordering::Relaxed) > offset as u64 / 2);
        }
        if offset == 20 {
            // So that several requests are in flight.
            mock.broker_round_trip_time(1, Duration::from_millis(50)).unwrap();
            // A broker refuses the requests behind it, because their sequence numbers do not follow. The mock
            // would store them.
            let behind = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
            let mut refused = [behind; 5];
            refused[0] = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
            mock.request_errors(RDKafkaApiKey::Produce, &refused);
        }
        if offset == 29 {
            until("replaced", || counters.producers_replaced.get() >= 1 && sink.has_room());
        }
    }
    until("all stored", || stored.load(Ordering::Relaxed) == 50);
    assert!(counters.failed.get() > 0);
    assert_eq!(counters.waiting.get(), 0);
    // Records may be repeated, but each new one follows its predecessor.
    let values = values(&mock.bootstrap_servers(), HAND_OFF, 2, counters.stored.get() as usize);
    let mut next = 0;
    for value in values {
        let value = String::from_utf8(value).unwrap();
        let offset: i64 = value.strip_prefix("event ").unwrap().parse().unwrap();
        assert!(offset <= next, "{offset} before {next}");
        next = next.max(offset + 1);
    }
    assert_eq!(next, 50);
}

#[test]
fn full_outbox_refuses_within_its_bounds_and_too_large_a_record_for_good() {
    let mock = mock();
    mock.broker_down(1).unwrap();
    let counters = Arc::<ClusterLogCounters>::default();
    let sink = HandOffOutbox::start(&config(mock.bootstrap_servers()), HAND_OFF, counters.clone());
    let sink = sink.unwrap();
    let large = vec![0; 4 << 20];
    let send = |value: &[u8]| {
        let header = live(1);
        let target = NodeEpoch(7);
        let hand_off = OutgoingHandOff { target, partition: 0, header: &header, key: None, value };
        sink.send(hand_off, Box::new(|| {}))
    };
    assert_eq!(send(&vec![0; 8_000_000]), Queued::TooLarge);
    assert!(sink.has_room());
    let mut accepted = 0;
    while send(&large) == Queued::Accepted {
        accepted += 1;
        if sink.has_room() {
            assert!(accepted <= 16, "half of 128 MiB");
        }
    }
    assert_eq!(accepted, 31);
    assert!(!sink.has_room());
    assert!(counters.waiting_bytes.get() <= 128 << 20);
    mock.broker_up(1).unwrap();
    until("all stored", || counters.waiting.get() == 0);
    assert!(sink.has_room());
    assert_eq!(send(&large), Queued::Accepted);
}

#[test]
fn sessions_are_read_from_the_start_to_the_end_and_then_as_they_come() {
    let mock = mock();
    let counters = Arc::<ClusterLogCounters>::default();
    let config = config(mock.bootstrap_servers());
    let outbox = SessionsOutbox::start(&config, SESSIONS, counters.clone()).unwrap();
    let empty = Arc::<CollectedLog>::default();
    let reader = SessionsReader::start(&config, SESSIONS, empty.clone(), Arc::default()).unwrap();
    until("end of an empty topic", || reader.status().missing().is_none());
    reader.stop();
    for number in 0..1000 {
        assert!(outbox.write(&key(number), Some(b"begun")));
    }
    assert!(outbox.write(&key(3), None));
    until("stored", || counters.waiting.get() == 0);

    let log = Arc::<CollectedLog>::default();
    let counters = Arc::<ClusterLogCounters>::default();
    let reader = SessionsReader::start(&config, SESSIONS, log.clone(), counters.clone()).unwrap();
    until("end", || reader.status().missing().is_none());
    assert!(log.has_read_to(1001), "ready only at the end");
    let mut expected: Vec<_> = (0..1000).map(|number| (format!("user-{number}"), true)).collect();
    expected.push(("user-3".into(), false));
    assert_eq!(log.users(), expected);
    mock.broker_down(1).unwrap();
    assert!(outbox.write(&key(4), None));
    mock.broker_up(1).unwrap();
    until("later record", || log.has_read_to(1002));
    assert_eq!(log.users().last().unwrap(), &("user-4".to_owned(), false));
    assert_eq!((counters.read.get(), counters.unreadable.get()), (1002, 0));
    reader.stop();
}

#[test]
fn foreign_record_in_the_sessions_topic_has_no_key() {
    let mock = mock();
    let config = config(mock.bootstrap_servers());
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", &config.brokers).create().unwrap();
    for key in [&b""[..], b"\xff\xff"] {
        producer.send(BaseRecord::to(SESSIONS).key(key).payload("x")).map_err(|e| e.0).unwrap();
    }
    producer.flush(PATIENCE).unwrap();
    let (log, counters) = (Arc::<CollectedLog>::default(), Arc::<ClusterLogCounters>::default());
    let reader = SessionsReader::start(&config, SESSIONS, log.clone(), counters.clone()).unwrap();
    until("read", || log.has_read_to(2));
    assert!(log.records.lock().unwrap().iter().all(|record| record.key.is_none()));
    assert_eq!(counters.unreadable.get(), 2);
    reader.stop();
}

#[test]
fn unreachable_brokers_show_in_the_status_of_a_reader() {
    let mock = mock();
    mock.broker_down(1).unwrap();
    let config = config(mock.bootstrap_servers());
    let log = Arc::<CollectedLog>::default();
    let reader = SessionsReader::start(&config, SESSIONS, log, Arc::default()).unwrap();
    until("error", || reader.status().missing().is_some_and(|reason| reason.contains('(')));
    assert!(reader.status().missing().unwrap().starts_with("the topic sessions is not read"));
    mock.broker_up(1).unwrap();
    until("read", || reader.status().missing().is_none());
    reader.stop();
}

struct HandOffs {
    mock: MockCluster<'static, DefaultProducerContext>,
    sink: HandOffOutbox,
    stored: Arc<AtomicU64>,
    receiver: Arc<CollectingReceiver>,
    counters: Arc<ClusterLogCounters>,
    reader: HandOffReader,
}

impl HandOffs {
    /// A writer, and a reader of partition 2 for the epoch 7 that is ready.
    fn start() -> Self {
        let mock = mock();
        let config = config(mock.bootstrap_servers());
        let sink = HandOffOutbox::start(&config, HAND_OFF, Arc::default()).unwrap();
        let stored = Arc::<AtomicU64>::default();
        assert_eq!(send_to(&sink, 7, 2, 1, &stored), Queued::Accepted);
        until("stored before the start", || stored.load(Ordering::Relaxed) == 1);
        let receiver = Arc::<CollectingReceiver>::default();
        let counters = Arc::<ClusterLogCounters>::default();
        let (to, counted) = (receiver.clone(), counters.clone());
        let reader = HandOffReader::start(&config, HAND_OFF, 2, NodeEpoch(7), to, counted);
        let reader = reader.unwrap();
        until("following", || reader.status().missing().is_none());
        Self { mock, sink, stored, receiver, counters, reader }
    }

    fn send(&self, target: u64, partition: i32, offset: i64) {
        assert_eq!(send_to(&self.sink, target, partition, offset, &self.stored), Queued::Accepted);
    }
}

#[test]
fn hand_offs_to_this_node_arrive_complete_in_order_from_the_start_of_the_reader() {
    let it = HandOffs::start();
    for offset in 2..202 {
        it.send(7, 2, offset);
        it.send(8, 2, offset);
        it.send(7, 1, offset);
    }
    let expected: Vec<_> = (2..202).collect();
    until("all arrived", || it.receiver.offsets().len() == 200);
    assert_eq!(it.receiver.offsets(), expected);
    let first = it.receiver.received.lock().unwrap()[0].clone();
    assert_eq!(first, IncomingHandOff { header: live(2), value: Bytes::from("event 2") });
    until("skipped", || it.counters.skipped.get() == 200);
    assert_eq!(it.counters.read.get(), 400, "one partition");

    it.reader.set_epoch(NodeEpoch(9));
    it.send(7, 2, 300);
    it.send(9, 2, 301);
    until("new epoch", || it.receiver.offsets().last() == Some(&301));
    assert_eq!(it.receiver.offsets().len(), 201);
    assert_eq!(it.receiver.missed.load(Ordering::Relaxed), 0);
    it.reader.stop();
}

#[test]
fn full_receiver_stops_the_reader_until_it_has_room() {
    let it = HandOffs::start();
    it.receiver.full.store(true, Ordering::Release);
    (2..102).for_each(|offset| it.send(7, 2, offset));
    until("stored", || it.stored.load(Ordering::Relaxed) == 101);
    until("offered again", || it.receiver.offered.load(Ordering::Relaxed) > 10);
    assert_eq!(it.counters.read.get(), 1, "nothing more is taken");
    let end = it.reader.end_offset().unwrap();
    assert!(!it.reader.has_delivered(end));
    assert!(it.receiver.read_to.load(Ordering::Acquire) < end as u64);
    it.receiver.full.store(false, Ordering::Release);
    until("barrier", || it.reader.has_delivered(end));
    assert_eq!(it.receiver.offsets(), (2..102).collect::<Vec<_>>());
    it.reader.stop();
}

#[test]
fn barrier_waits_for_what_was_stored_before_it() {
    let it = HandOffs::start();
    let end = it.reader.end_offset().unwrap();
    until("nothing to wait for", || it.reader.has_delivered(end));
    for round in 0..20 {
        let sent = 2 + round;
        it.send(7, 2, sent);
        until("stored", || it.stored.load(Ordering::Relaxed) == sent as u64);
        let end = it.reader.end_offset().unwrap();
        until("delivered", || it.receiver.read_to.load(Ordering::Acquire) >= end as u64);
        assert!(it.reader.has_delivered(end));
        assert_eq!(it.receiver.offsets().last(), Some(&sent));
    }
    it.mock.broker_down(1).unwrap();
    assert!(it.reader.end_offset().is_err());
    it.reader.stop();
}

#[test]
fn unreachable_brokers_are_retried_until_the_node_stops() {
    let stopping = Arc::<AtomicBool>::default();
    let config = config("127.0.0.1:1".into());
    let attempts = AtomicU64::new(0);
    let result = ensure_topics(&config, &ClusterTopicNames::default(), &stopping, |reason| {
        assert!(!reason.is_empty());
        stopping.store(attempts.fetch_add(1, Ordering::Relaxed) == 1, Ordering::Release);
    });
    assert!(matches!(result, Err(TopicsError::Stopped)));
    assert_eq!(attempts.load(Ordering::Relaxed), 2);
}
