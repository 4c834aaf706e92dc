//! A node that stops leaves the consumer group.

use super::nodes::Nodes;
use crate::support::group::Group;
use crate::support::wait::SOON;

/// Stops of one node. Some of them left the member behind while partitions were being unassigned.
const STOPS: usize = 10;
/// Records published right before every second stop, so that some are in flight.
const RECORDS: usize = 500;

/// Starts and stops node 0 again and again, idle and under load. Other members: `others`.
fn stop_repeatedly(nodes: &mut Nodes, others: &[String]) {
    let group = Group::new(&nodes.back_end.brokers, &nodes.back_end.topic);
    let room = nodes.user("room");
    let users = [nodes.user("alice")];
    nodes.back_end.neighbours.state().create(&room, &users.each_ref().map(|user| &**user), 0);
    let mut sequence = 0;
    for stop in 0..STOPS {
        let mut node = nodes.builder(0).start();
        let mut all = [others, &[nodes.instance(0)]].concat();
        all.sort_unstable();
        assert_eq!(group.members(), all);
        if stop % 2 == 1 {
            for _ in 0..RECORDS {
                sequence += 1;
                nodes.back_end.publisher.message(&room, sequence, &users[0], "hello");
            }
        }
        let status = node.stop(SOON);
        assert_eq!(status.code(), Some(0), "{}", node.log());
        assert_eq!(group.members(), others, "after {} stops: {}", stop + 1, node.log());
    }
}

/// Promise: “A node that has stopped is no member of the group.”
#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn stopped_node_is_no_member_of_the_group() {
    stop_repeatedly(&mut Nodes::new("leaving"), &[]);
}

/// Promise: “A node that has stopped is no member of the group.”
#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn stopped_node_leaves_the_others_in_the_group() {
    let mut nodes = Nodes::new("leaving-others");
    let other = nodes.builder(1).start();
    let name = nodes.instance(1);
    stop_repeatedly(&mut nodes, &[name]);
    drop(other);
}

/// Promise: “A node that has stopped is no member of the group.”
#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn stopped_node_without_partitions_is_no_member_of_the_group() {
    let mut nodes = Nodes::with_partitions("leaving-idle", 1);
    let other = nodes.builder(1).start();
    let name = nodes.instance(1);
    stop_repeatedly(&mut nodes, &[name]);
    drop(other);
}
