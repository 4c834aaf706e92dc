//! What is done to the nodes, Kafka and Redis of a scene.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rustix::process::Signal;

use crate::support::node::NodeBuilder;

use super::{PARTITIONS, Scene};

impl Scene {
    /// Restarts a node with the same settings.
    pub(in super::super) fn start_node(&mut self, number: usize) {
        assert!(self.nodes[number].is_none(), "it is running");
        self.nodes[number] = Some(self.builders[number].spawn());
        self.notes(&format!("node {number} started"));
    }

    /// Adds a node with the settings of node 0 and some more.
    pub(in super::super) fn add_node(&mut self, adapt: impl FnOnce(NodeBuilder) -> NodeBuilder) {
        self.builders.push(adapt(self.builders[0].clone().on_ports_of_its_own()));
        self.nodes.push(None);
        self.start_node(self.nodes.len() - 1);
    }

    /// Kafka is unreachable for this long, for the nodes and the publisher.
    pub(in super::super) fn kafka_cut(&mut self, time: Duration) {
        self.kafka_proxy.cut();
        self.node_0_cut_from_kafka(time);
        self.kafka_proxy.heal();
    }

    /// Kafka is unreachable for node 0 for this long.
    pub(in super::super) fn node_0_cut_from_kafka(&mut self, time: Duration) {
        self.kafka_proxy_of_node_0.cut();
        self.run(time);
        self.kafka_proxy_of_node_0.heal();
    }

    fn admin(&self) -> (AdminClient<DefaultClientContext>, tokio::runtime::Runtime) {
        let brokers = self.kafka_proxy.address.to_string();
        let admin = ClientConfig::new().set("bootstrap.servers", brokers).create();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        (admin.expect("valid"), runtime.expect("a runtime"))
    }

    /// The topic has twice as many partitions.
    pub(in super::super) fn add_partitions(&mut self) {
        let (admin, runtime) = self.admin();
        let count = 2 * usize::try_from(PARTITIONS).expect("positive");
        let new = NewPartitions::new(&self.topic, count);
        let added = runtime.block_on(admin.create_partitions([&new], &AdminOptions::new()));
        assert!(added.expect("answered")[0].is_ok());
        self.notes("partitions added");
    }

    /// Deletes all records that the topic has now, as retention does.
    pub(in super::super) fn expire_records(&mut self) {
        let (admin, runtime) = self.admin();
        let mut all = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            all.add_partition_offset(&self.topic, partition, Offset::End).expect("valid");
        }
        runtime.block_on(admin.delete_records(&all, &AdminOptions::new())).expect("deleted");
        self.notes("records deleted");
    }

    /// Stops a node with SIGSTOP for this long.
    pub(in super::super) fn stopped(&mut self, number: usize, time: Duration) {
        self.nodes[number].as_ref().expect("it is running").signal(Signal::STOP);
        self.run(time);
        self.nodes[number].as_ref().expect("it is running").signal(Signal::CONT);
    }

    /// Stops Redis with SIGSTOP for this long. Every sixth session comes back in that time.
    pub(in super::super) fn redis_paused(&mut self, time: Duration) {
        self.redis.signal(Signal::STOP);
        self.drop_sessions(6);
        self.run(time);
        self.redis.signal(Signal::CONT);
    }

    /// Sends SIGKILL.
    pub(in super::super) fn kill_node(&mut self, number: usize) {
        self.nodes[number].take().expect("it is running").kill();
    }

    /// Sends SIGTERM and keeps up the load until the node has exited.
    pub(in super::super) fn stop_node(&mut self, number: usize, within: Duration) {
        let mut node = self.nodes[number].take().expect("it is running");
        node.signal(Signal::TERM);
        self.notes(&format!("node {number} is to stop"));
        let deadline = Instant::now() + within;
        let status = loop {
            self.run(Duration::from_millis(100));
            if let Some(status) = node.ended() {
                break status;
            }
            assert!(Instant::now() < deadline, "it did not stop");
        };
        assert!(status.success(), "{status}: {}", node.log());
        self.notes(&format!("node {number} stopped"));
    }

    /// Keeps up the load until the node is ready.
    pub(in super::super) fn run_until_ready(&mut self, number: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.readiness(number).0 != 200 {
            assert!(Instant::now() < deadline, "node {number} is not ready");
            self.run(Duration::from_millis(200));
        }
        self.notes(&format!("node {number} is ready"));
    }

    fn notes(&mut self, what: &str) {
        self.timeline.note(self.began.elapsed(), what);
    }

    /// Status and body of `/health/ready`; 0: no answer.
    pub(in super::super) fn readiness(&self, number: usize) -> (u16, String) {
        let answer = self.nodes[number].as_ref().and_then(|node| node.get("/health/ready"));
        answer.map_or((0, "no answer".into()), |answer| (answer.status, answer.body.trim().into()))
    }
}
