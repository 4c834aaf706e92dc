//! The topics of events and the security of Kafka, seen from clients of real nodes.

use std::path::Path;

use delivery_testkit::neighbours::{Behaviour, FakeNeighbours, Method};
use delivery_testkit::ports::free_port;
use delivery_testkit::publisher::{Publisher, new_topic};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rustix::process::Signal;
use tonic::Code;

use super::support::back_end::{BackEnd, message, with_neighbours};
use super::support::client::{Client, Received};
use super::support::node::{Node, NodeBuilder};
use super::support::own_services::OwnService;
use super::support::wait::{SOON, until};

fn node(back_end: &BackEnd, number: usize) -> Node {
    let topic = &back_end.topic;
    back_end
        .node()
        .set("ROUTING_MODE", "group")
        .set("SESSIONS_TOPIC", format!("{topic}.sessions"))
        .set("HANDOFF_TOPIC", format!("{topic}.handoff"))
        .set("KAFKA_PROPERTIES", "session.timeout.ms=6000")
        .set("INSTANCE_ID", format!("{topic}-{number}"))
        .spawn()
}

/// Deletes the records below `offset`, as retention does.
fn delete_records(brokers: &str, topic: &str, offset: i64) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().expect("valid");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Offset(offset)).expect("valid");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let deleted = admin.delete_records(&list, &AdminOptions::new());
    runtime.expect("a runtime").block_on(deleted).expect("deleted");
}

/// The code with which the session is closed. Messages before it are taken.
fn close_code(client: &mut Client) -> u16 {
    loop {
        match client.receive() {
            Received::Closed(code, _) => return code,
            Received::Binary(_) | Received::Ping => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Promise: “Records that Kafka has deleted before they were read are counted, and every session that may need them is closed with 4409.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn sessions_of_all_nodes_are_closed_if_records_expired_under_their_owner() {
    let mut back_end = BackEnd::start("expired", 1);
    back_end.neighbours.state().create("room", &["alice", "bob"], 0);
    let mut nodes: Vec<_> = (0..2).map(|number| node(&back_end, number)).collect();
    nodes.iter_mut().for_each(Node::wait_ready);
    let partitions = |node: &Node| node.metrics().sum("delivery_router_partitions", &[]);
    until(SOON, "one of them owns the partition", || {
        (nodes.iter().map(partitions).sum::<f64>() == 1.0).then_some(())
    });
    let owner = nodes.iter().position(|node| partitions(node) == 1.0).expect("one");
    let (owner, other) = (&nodes[owner], &nodes[1 - owner]);
    let mut alice = Client::session(owner.public, "alice", "phone");
    let mut bob = Client::session(other.public, "bob", "phone");
    back_end.publisher.message("room", 1, "alice", "hello");
    assert_eq!(message(&mut alice), ("room".to_owned(), 1));
    assert_eq!(message(&mut bob), ("room".to_owned(), 1));

    owner.signal(Signal::STOP);
    for sequence in 2..12 {
        back_end.publisher.message("room", sequence, "alice", "hello");
    }
    back_end.publisher.flush(SOON);
    delete_records(&back_end.brokers, &back_end.topic, 6);
    assert_eq!(close_code(&mut bob), 4409, "a session of the next owner");
    let expired = other.metrics().sum("delivery_kafka_records_expired_total", &[]);
    assert!((1.0..=6.0).contains(&expired), "{expired}");
    owner.signal(Signal::CONT);
    assert_eq!(close_code(&mut alice), 4409, "a session of another node");
    let mut bob = Client::session(other.public, "bob", "phone");
    back_end.publisher.message("room", 12, "alice", "hello");
    while message(&mut bob).1 != 12 {}
}

/// Sessions of all nodes need a record that waits for its members. Its owner goes past it, Kafka deletes it, and the
/// owner ends.
///
/// Promise: “Records that Kafka has deleted before they were read are counted, and every session that may need them is closed with 4409.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn sessions_of_all_nodes_are_closed_if_a_record_expired_that_its_owner_had_parked() {
    let mut back_end = BackEnd::start("parked-expired", 1);
    back_end.neighbours.state().create("known", &["alice"], 0);
    back_end.neighbours.state().create("unknown", &["alice"], 0);
    let mut nodes: Vec<_> = (0..3).map(|number| node(&back_end, number)).collect();
    nodes.iter_mut().for_each(Node::wait_ready);
    let owns = |node: &Node| node.metrics().sum("delivery_router_partitions", &[]) == 1.0;
    until(SOON, "one of them owns the partition", || nodes.iter().any(owns).then_some(()));
    let mut clients: Vec<_> = nodes
        .iter()
        .zip(["one", "two", "three"])
        .map(|(node, device)| Client::session(node.public, "alice", device))
        .collect();
    back_end.publisher.message("known", 1, "alice", "hello");
    for client in &mut clients {
        assert_eq!(message(client), ("known".to_owned(), 1));
    }
    back_end.neighbours.set(Method::Members, Behaviour::Failing(Code::Unavailable));
    back_end.publisher.message("unknown", 1, "alice", "hello");
    back_end.publisher.message("known", 2, "alice", "hello");
    for client in &mut clients {
        assert_eq!(message(client), ("known".to_owned(), 2), "goes past the other record");
    }
    delete_records(&back_end.brokers, &back_end.topic, 3);
    let owner = nodes.iter().position(owns).expect("still the owner");
    nodes[owner].kill();
    drop(clients.remove(owner));
    back_end.publisher.message("known", 3, "alice", "hello");
    for client in &mut clients {
        assert_eq!(client.receive(), Received::Closed(4409, "events missed".to_owned()));
    }
}

/// A private key and its certificate, which is its own authority: as one file, and the certificate alone.
fn certificate(folder: &Path) -> [std::path::PathBuf; 2] {
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).expect("generated");
    let (key, certificate) = (made.signing_key.serialize_pem(), made.cert.pem());
    let [both, alone] = ["server.pem", "ca.pem"].map(|name| folder.join(name));
    std::fs::write(&both, format!("{key}{certificate}")).expect("written");
    std::fs::write(&alone, certificate).expect("written");
    [both, alone]
}

#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn node_speaks_tls_and_sasl_and_names_a_topic_that_it_may_not_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let [pem, authority] = certificate(folder.path());
    let port = free_port();
    let kafka = OwnService::secured_kafka(port, pem);
    let topic = new_topic(&kafka.address.to_string(), "secured", 1);
    let mut publisher = Publisher::new(&kafka.address.to_string(), &topic);
    let neighbours = FakeNeighbours::start();
    neighbours.state().create("room", &["alice"], 0);
    let node = |user: &str, mechanism: &str| {
        let properties = [
            "security.protocol=SASL_SSL".to_owned(),
            format!("ssl.ca.location={}", authority.display()),
            format!("sasl.mechanism={mechanism}"),
            format!("sasl.username={user}"),
            "sasl.password=secret".to_owned(),
        ];
        with_neighbours(NodeBuilder::serve(), &neighbours)
            .kafka(&format!("127.0.0.1:{port}"), &topic)
            .set("ROUTING_MODE", "broadcast")
            .set("KAFKA_PROPERTIES", properties.join(","))
    };
    for (sequence, mechanism) in [(1, "PLAIN"), (2, "SCRAM-SHA-256"), (3, "SCRAM-SHA-512")] {
        let node = node("delivery", mechanism).start();
        let mut alice = Client::session(node.public, "alice", "phone");
        publisher.message("room", sequence, "alice", "hello");
        assert_eq!(message(&mut alice), ("room".to_owned(), sequence), "{mechanism}");
    }
    let stranger = node("stranger", "PLAIN").spawn();
    let expected = format!("KAFKA_TOPICS: this node may not read the topic {topic}");
    until(SOON, "named by readiness", || {
        let answer = stranger.get("/health/ready")?;
        answer.body.contains(&expected).then_some(())
    });
    let labels = [format!("topic=\"{topic}\""), "reason=\"forbidden\"".to_owned()];
    let labels = labels.each_ref().map(String::as_str);
    assert_eq!(stranger.metrics().sum("delivery_kafka_topic_trouble", &labels), 1.0);
    until(SOON, "named by the log", || stranger.log().contains(&expected).then_some(()));
}
