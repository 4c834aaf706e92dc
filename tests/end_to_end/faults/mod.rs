//! Issue “Guarantees”, show 1 and 3: each part killed, stopped or cut off in turn, under steady load.
//! Each test is a row of the table in `docs/faults.md`.

mod scene;
mod table;

use std::time::Duration;

use rustix::process::Signal;
use tonic::Code;

use crate::support::neighbours::{Manner, Method};
use crate::support::node::NodeBuilder;
use crate::support::proxy::Proxy;
use scene::{Outcome, Scene};

const WARM_UP: Duration = Duration::from_secs(5);
const AFTERWARDS: Duration = Duration::from_secs(10);

/// The settings as they are.
fn plain(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node
}

fn broadcast(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node.set("ROUTING_MODE", "broadcast")
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What the page promises under every fault of this table.
fn nothing_lost_in_order(outcome: &Outcome) {
    assert_eq!(outcome.totals.lost, 0, "lost: {outcome:?}");
    assert_eq!(outcome.totals.out_of_order, 0, "out of order: {outcome:?}");
}

/// Whoever stayed connected got everything live.
fn nothing_missed_live(outcome: &Outcome) {
    nothing_lost_in_order(outcome);
    assert_eq!(outcome.missed_live, 0, "missed by sessions that stayed: {outcome:?}");
}

macro_rules! faults {
    ($($name:ident($scene:ident: $nodes:literal, $adapt:expr) $fault:block => $judge:ident;)+) => {$(
        #[test]
        #[ignore = "needs Kafka, Redis and minutes: tests/run faults"]
        fn $name() {
            let mut $scene = Scene::start($nodes, $adapt);
            $scene.run(WARM_UP);
            $fault
            $scene.run(AFTERWARDS);
            $judge(&$scene.finish(stringify!($name)));
        }
    )+};
}

faults! {
    no_fault(scene: 2, plain) {
        scene.run(seconds(20));
    } => nothing_missed_live;

    no_fault_broadcast(scene: 2, broadcast) {
        scene.run(seconds(20));
    } => nothing_missed_live;

    node_killed(scene: 2, plain) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => nothing_lost_in_order;

    node_killed_broadcast(scene: 2, broadcast) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => nothing_lost_in_order;

    node_stopped_for_30_s(scene: 2, plain) {
        scene.nodes[0].as_ref().expect("running").signal(Signal::STOP);
        scene.run(seconds(30));
        scene.nodes[0].as_ref().expect("running").signal(Signal::CONT);
    } => nothing_lost_in_order;

    kafka_killed_and_back(scene: 2, plain) {
        scene.kafka.kill();
        scene.run(seconds(10));
        scene.kafka.launch();
        scene.run(seconds(20));
    } => nothing_missed_live;

    kafka_unreachable_for_60_s(scene: 2, plain) {
        scene.kafka_proxy.cut();
        scene.run(seconds(60));
        scene.kafka_proxy.heal();
        scene.run(seconds(10));
    } => nothing_missed_live;

    redis_killed_and_back(scene: 2, plain) {
        scene.redis.kill();
        scene.run(seconds(15));
        scene.redis.launch();
        scene.run(seconds(30));
    } => nothing_lost_in_order;

    presence_down(scene: 2, |number, node| broadcast(number, node).set("PRESENCE_MODE", "service")) {
        for method in [Method::Register, Method::Unregister, Method::Refresh] {
            scene.neighbours.set(method, Manner::Failing(Code::Unavailable));
        }
        scene.drop_sessions(3);
        scene.run(seconds(30));
        for method in [Method::Register, Method::Unregister, Method::Refresh] {
            scene.neighbours.set(method, Manner::Well);
        }
    } => nothing_lost_in_order;

    presence_hanging(scene: 2, |number, node| broadcast(number, node).set("PRESENCE_MODE", "service")) {
        for method in [Method::Register, Method::Unregister, Method::Refresh] {
            scene.neighbours.set(method, Manner::Hanging);
        }
        scene.drop_sessions(3);
        scene.run(seconds(30));
        for method in [Method::Register, Method::Unregister, Method::Refresh] {
            scene.neighbours.set(method, Manner::Well);
        }
    } => nothing_lost_in_order;

    conversation_service_down(scene: 2, plain) {
        scene.neighbours.set(Method::Members, Manner::Failing(Code::Unavailable));
        scene.neighbours.set(Method::List, Manner::Failing(Code::Unavailable));
        scene.drop_sessions(3);
        scene.run(seconds(20));
        scene.neighbours.set(Method::Members, Manner::Well);
        scene.neighbours.set(Method::List, Manner::Well);
    } => nothing_lost_in_order;

    message_service_hanging(scene: 2, plain) {
        scene.neighbours.set(Method::Sync, Manner::Hanging);
        scene.drop_sessions(3);
        scene.run(seconds(20));
        scene.neighbours.set(Method::Sync, Manner::Well);
    } => nothing_lost_in_order;

    message_service_down(scene: 2, plain) {
        scene.neighbours.set(Method::Sync, Manner::Failing(Code::Unavailable));
        scene.drop_sessions(3);
        scene.run(seconds(20));
        scene.neighbours.set(Method::Sync, Manner::Well);
    } => nothing_lost_in_order;

    node_added_and_removed(scene: 2, plain) {
        scene.add_node(|node| node.set("INSTANCE_ID", "node-2"));
        scene.run_until_ready(2);
        scene.run(seconds(10));
        scene.stop_node(2, seconds(30));
    } => nothing_lost_in_order;

    client_network_cut_without_fin(scene: 2, |_, node| {
        node.set("PING_INTERVAL", "4s").set("IDLE_TIMEOUT", "8s")
    }) {
        let proxy = Proxy::start(scene.nodes[0].as_ref().expect("running").public);
        scene.reconnect_through(proxy.address, 4);
        scene.run(seconds(5));
        proxy.cut();
        scene.run(seconds(3));
        scene.desert(proxy.address);
        scene.run(seconds(15));
    } => nothing_lost_in_order;

    disk_full_for_logs(scene: 2, |_, node| node.output("/dev/full").set("LOG_LEVEL", "debug")) {
        scene.drop_sessions(3);
        scene.run(seconds(15));
    } => nothing_lost_in_order;

    three_nodes_rolled(scene: 3, |_, node| node.set("DRAIN_PERIOD", "5s")) {
        for number in 0..3 {
            scene.stop_node(number, seconds(30));
            scene.start_node(number);
            scene.run_until_ready(number);
            scene.run(seconds(3));
        }
    } => nothing_lost_in_order;
}
