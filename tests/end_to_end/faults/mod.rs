//! Issue “Guarantees”, show 1 and 3: each part is killed, stopped or cut off in turn, under steady load.
//! Each test is a row of the table in `docs/faults.md`.

mod redis_states;
mod scene;
mod table;

use std::path::Path;
use std::time::Duration;

use delivery_testkit::neighbours::{Behaviour, Method};
use tonic::Code;

use crate::support::node::NodeBuilder;
use crate::support::proxy::Proxy;
use crate::support::tally::Totals;
use scene::{CURSORS, Outcome, Scene, Size, USUAL};

const WARM_UP: Duration = Duration::from_secs(5);
const AFTERWARDS: Duration = Duration::from_secs(10);

/// Issue “A cluster that keeps what one node promises”, show 1.
const STALL_OF_A_ROLL_MAX: Duration = Duration::from_secs(3);
/// Close code of a session that has missed events.
const EVENTS_MISSED: u16 = 4409;

const DOWN: Behaviour = Behaviour::Failing(Code::Unavailable);
const REGISTRATION: [Method; 3] = [Method::Register, Method::Unregister, Method::Refresh];

/// The default settings.
fn plain(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node
}

fn broadcast(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node.set("ROUTING_MODE", "broadcast")
}

/// Nodes in whose way nobody but the presence service stands.
fn presence_service(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node.set("PRESENCE_MODE", "service")
}

/// A node that is silent for longer than this loses its sessions.
fn silent_after_10_s(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node.set("NODE_TIMEOUT", "10s")
}

/// Its clients get their first cursor that covers anything soon.
fn quick_cursors(_number: usize, node: NodeBuilder) -> NodeBuilder {
    node.set("CURSOR_INTERVAL", "1s")
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Drops every third session while these methods of the neighbours misbehave, for this long.
fn drops_sessions_while(scene: &mut Scene, methods: &[Method], fault: Behaviour, time: Duration) {
    methods.iter().for_each(|method| scene.neighbours.set(*method, fault));
    scene.drop_sessions(3);
    scene.run(time);
    methods.iter().for_each(|method| scene.neighbours.set(*method, Behaviour::Normal));
}

/// The promises that hold under every fault of this table.
fn nothing_lost_in_order(outcome: &Outcome) {
    assert_eq!(outcome.totals.lost, 0, "lost: {outcome:?}");
    assert_eq!(outcome.totals.out_of_order, 0, "out of order: {outcome:?}");
}

/// Every session that stayed connected received everything live.
fn nothing_missed_live(outcome: &Outcome) {
    nothing_lost_in_order(outcome);
    assert_eq!(outcome.missed_live, 0, "missed by sessions that stayed: {outcome:?}");
}

/// No session ended but those that the test dropped. What stayed got everything once and in order.
fn nobody_noticed(outcome: &Outcome) {
    nothing_missed_live(outcome);
    assert!(outcome.endings.is_empty(), "sessions ended: {outcome:?}");
    undisturbed(outcome);
}

/// Only sessions of node 0 ended, with this code. The others got everything once and in order.
fn only_node_0_lost_sessions(outcome: &Outcome, code: u16) {
    nothing_missed_live(outcome);
    let ended: Vec<_> = outcome.endings.keys().collect();
    assert_eq!(ended, [&(0, code)], "other sessions ended: {outcome:?}");
    undisturbed(outcome);
}

fn only_node_0_died(outcome: &Outcome) {
    only_node_0_lost_sessions(outcome, 0);
}

fn only_node_0_was_silent(outcome: &Outcome) {
    only_node_0_lost_sessions(outcome, EVENTS_MISSED);
}

/// No session ended. Everything came once, in the order of each partition: conversations move to other partitions.
fn nothing_missed_or_repeated(outcome: &Outcome) {
    let Totals { lost, duplicates, .. } = outcome.totals;
    let missed = outcome.missed_live;
    assert_eq!((lost, missed, duplicates), (0, 0, 0), "{outcome:?}");
    assert!(outcome.endings.is_empty(), "sessions ended: {outcome:?}");
}

/// Node 0 died. Sessions of others had missed events and were told, and their clients got them when they resumed.
fn others_were_told(outcome: &Outcome) {
    nothing_missed_live(outcome);
    let mut ended = outcome.endings.keys();
    let is_expected = |end: &(usize, u16)| *end == (0, 0) || end.1 == EVENTS_MISSED;
    assert!(ended.all(is_expected), "other sessions ended: {outcome:?}");
}

/// Each session that stayed got every event once and in order, while it stayed.
fn undisturbed(outcome: &Outcome) {
    let Totals { received, lost, duplicates, out_of_order } = outcome.stayed;
    assert!(received > 0, "nobody stayed: {outcome:?}");
    assert_eq!((lost, duplicates, out_of_order), (0, 0, 0), "of those that stayed: {outcome:?}");
}

/// Every session that ended or was dropped returned with its cursor, got everything from the tails, nothing of it twice
/// and in order, and nobody asked the message service.
fn returned_with_cursors(outcome: &Outcome) {
    nothing_missed_live(outcome);
    assert!(outcome.reconnects > 0, "no session returned: {outcome:?}");
    let Totals { duplicates, out_of_order, .. } = outcome.within_sessions;
    assert_eq!((duplicates, out_of_order), (0, 0), "within one session: {outcome:?}");
    let has_expired = outcome.shows("delivery_resume_cursors_expired_total");
    assert!(!has_expired, "a cursor has expired: {outcome:?}");
    assert_eq!(outcome.sync_calls, 0, "calls for messages: {outcome:?}");
}

/// Rolled nodes: see [`nothing_lost_and_nobody_stormed`]. No event waited long for its partition.
fn rolled_without_a_stall(outcome: &Outcome) {
    nothing_lost_and_nobody_stormed(outcome);
    assert!(outcome.longest_stall() < STALL_OF_A_ROLL_MAX, "a stall: {outcome:?}");
}

/// The same, and the other nodes got no more handshakes than `docs/guarantees.md` allows.
fn nothing_lost_and_nobody_stormed(outcome: &Outcome) {
    nothing_lost_in_order(outcome);
    for drain in &outcome.drains {
        assert!(drain.sessions > 0, "the drained node had no sessions: {outcome:?}");
        assert!(drain.handshakes_per_s <= drain.budget_per_s, "a storm: {outcome:?}");
    }
}

/// Each with the metrics that show it, as its row in the table says.
macro_rules! faults {
    ($($name:ident($scene:ident: $nodes:literal, $size:expr, $adapt:expr) $fault:block
        => $judge:ident, shown by [$($metric:literal),*];)+) => {
        $(
            #[test]
            #[ignore = "needs Kafka, Redis and minutes: tests/run faults"]
            fn $name() {
                let mut $scene = Scene::start($nodes, $size, $adapt);
                $scene.run(WARM_UP);
                $fault
                $scene.run(AFTERWARDS);
                let outcome = $scene.finish(stringify!($name));
                $judge(&outcome);
                let metrics: &[&str] = &[$($metric),*];
                for metric in metrics {
                    assert!(outcome.shows(metric), "{metric} did not grow: {outcome:?}");
                }
            }
        )+

        /// In the order of the table.
        const SHOWN_BY: &[(&str, &[&str])] = &[$((stringify!($name), &[$($metric),*])),+];
    };
}

faults! {
    // Promise: “At least once to every session that stays.”
    no_fault(scene: 2, USUAL, plain) {
        scene.run(seconds(20));
    } => nobody_noticed, shown by [];

    no_fault_broadcast(scene: 2, USUAL, broadcast) {
        scene.run(seconds(20));
    } => nothing_missed_live, shown by [];

    // Promise: “A node that is killed costs the sessions of the other nodes nothing.”
    node_killed(scene: 2, USUAL, plain) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => only_node_0_died, shown by ["delivery_kafka_rebalances_total"];

    node_of_three_killed(scene: 3, USUAL, plain) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => only_node_0_died, shown by ["delivery_kafka_rebalances_total"];

    node_killed_broadcast(scene: 2, USUAL, broadcast) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => nothing_lost_in_order, shown by [];

    // Three session timeouts: its partitions are owned by others when it wakes.
    zombie_owner(scene: 3, USUAL, plain) {
        scene.stopped(0, seconds(18));
    } => nobody_noticed, shown by ["delivery_kafka_rebalances_total"];

    node_stopped_for_30_s(scene: 2, USUAL, plain) {
        scene.stopped(0, seconds(30));
    } => nobody_noticed, shown by ["delivery_kafka_rebalances_total"];

    node_stopped_for_too_long(scene: 3, USUAL, silent_after_10_s) {
        scene.stopped(0, seconds(30));
        scene.run_until_ready(0);
    } => only_node_0_was_silent, shown by ["delivery_session_events_missed_total"];

    // It routes what it has fetched while others own its partitions, and hands over afterwards.
    node_cut_from_kafka_for_30_s(scene: 3, USUAL, plain) {
        scene.node_0_cut_from_kafka(seconds(30));
        scene.run_until_ready(0);
    } => nobody_noticed, shown by ["delivery_kafka_rebalances_total"];

    node_cut_from_kafka_for_too_long(scene: 3, USUAL, silent_after_10_s) {
        scene.node_0_cut_from_kafka(seconds(40));
        scene.run_until_ready(0);
    } => only_node_0_was_silent, shown by ["delivery_session_events_missed_total"];

    // Promise: “Sockets stay up, readiness reports what is missing, and work resumes by itself”
    kafka_killed_and_back(scene: 2, USUAL, plain) {
        scene.kafka.kill();
        scene.run(seconds(10));
        scene.kafka.launch();
        scene.run(seconds(20));
    } => nobody_noticed, shown by ["delivery_kafka_errors_total"];

    kafka_unreachable_for_60_s(scene: 2, USUAL, plain) {
        scene.kafka_cut(seconds(60));
        scene.run(seconds(10));
    } => nobody_noticed, shown by ["delivery_kafka_rebalances_total"];

    // Promise: “Partitions and topics that appear while nodes run are read from their start.”
    partitions_added(scene: 2, USUAL, plain) {
        scene.add_partitions();
        scene.run(seconds(20));
    } => nothing_missed_or_repeated, shown by ["delivery_kafka_rebalances_total"];

    partitions_added_broadcast(scene: 2, USUAL, broadcast) {
        scene.add_partitions();
        scene.run(seconds(20));
    } => nothing_missed_or_repeated, shown by [];

    // What the owner has not read is gone before another one takes over.
    records_expired(scene: 2, USUAL, plain) {
        scene.kill_node(0);
        scene.run(seconds(4));
        scene.expire_records();
        scene.run(seconds(10));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => others_were_told, shown by ["delivery_kafka_records_expired_total", "delivery_session_events_missed_total"];

    redis_paused_for_1_5_s(scene: 2, USUAL, plain) {
        scene.redis_paused(Duration::from_millis(1_500));
    } => nobody_noticed, shown by [];

    redis_paused_for_30_s(scene: 2, USUAL, plain) {
        scene.redis_paused(seconds(30));
    } => nobody_noticed, shown by ["delivery_redis_commands_failed_total"];

    redis_paused_for_5_min(scene: 2, USUAL, plain) {
        scene.redis_paused(seconds(300));
    } => nobody_noticed, shown by ["delivery_redis_commands_failed_total"];

    redis_connections_killed(scene: 2, USUAL, plain) {
        redis_states::kills_connections(&mut scene, seconds(10));
    } => nobody_noticed, shown by ["delivery_redis_subscription_gaps_total"];

    redis_full(scene: 2, USUAL, plain) {
        scene.drop_sessions(6);
        redis_states::is_full(&mut scene, seconds(30));
    } => nobody_noticed, shown by ["delivery_redis_refused_memory_total"];

    redis_demoted(scene: 2, USUAL, plain) {
        scene.drop_sessions(6);
        redis_states::is_demoted(&mut scene, seconds(30));
    } => nobody_noticed, shown by ["delivery_redis_refused_replica_total"];

    redis_killed_and_back(scene: 2, USUAL, plain) {
        scene.redis.kill();
        scene.drop_sessions(6);
        scene.run(seconds(15));
        scene.redis.launch();
        scene.run(seconds(30));
    } => nobody_noticed, shown by ["delivery_redis_connection_failures_total"];

    redis_unreachable_for_30_s(scene: 2, USUAL, plain) {
        scene.redis_proxy.cut();
        scene.drop_sessions(6);
        scene.run(seconds(30));
        scene.redis_proxy.heal();
        scene.run(seconds(15));
    } => nobody_noticed, shown by ["delivery_redis_commands_failed_total"];

    presence_down_for_150_s(scene: 2, USUAL, presence_service) {
        drops_sessions_while(&mut scene, &REGISTRATION, DOWN, seconds(150));
    } => nobody_noticed, shown by ["delivery_presence_failures_total"];

    presence_down(scene: 2, USUAL, |number, node| broadcast(number, node).set("PRESENCE_MODE", "service")) {
        drops_sessions_while(&mut scene, &REGISTRATION, DOWN, seconds(30));
    } => nothing_lost_in_order, shown by ["delivery_presence_failures_total"];

    presence_hanging(scene: 2, USUAL, |number, node| broadcast(number, node).set("PRESENCE_MODE", "service")) {
        drops_sessions_while(&mut scene, &REGISTRATION, Behaviour::Hanging, seconds(30));
    } => nothing_lost_in_order, shown by ["delivery_presence_failures_total"];

    conversation_service_down(scene: 2, USUAL, plain) {
        drops_sessions_while(&mut scene, &[Method::Members, Method::List], DOWN, seconds(20));
    } => nothing_lost_in_order, shown by ["delivery_conversation_service_failures_total"];

    conversation_service_denying(scene: 2, USUAL, plain) {
        let denied = Behaviour::Failing(Code::PermissionDenied);
        drops_sessions_while(&mut scene, &[Method::Members, Method::List], denied, seconds(20));
    } => nothing_lost_in_order, shown by ["delivery_conversation_service_denied_total"];

    message_service_down(scene: 2, USUAL, plain) {
        drops_sessions_while(&mut scene, &[Method::Sync], DOWN, seconds(20));
    } => nothing_lost_in_order, shown by ["delivery_message_service_failures_total"];

    message_service_hanging(scene: 2, USUAL, plain) {
        drops_sessions_while(&mut scene, &[Method::Sync], Behaviour::Hanging, seconds(20));
    } => nothing_lost_in_order, shown by ["delivery_message_service_timeouts_total"];

    node_added_and_removed(scene: 2, USUAL, plain) {
        scene.add_node(|node| node.set("INSTANCE_ID", "node-2"));
        scene.run_until_ready(2);
        scene.run(seconds(10));
        scene.stop_node(2, seconds(30));
    } => nothing_lost_in_order, shown by ["delivery_kafka_rebalances_total"];

    client_network_cut_without_fin(scene: 2, USUAL, |_, node| {
        node.set("PING_INTERVAL", "4s").set("IDLE_TIMEOUT", "8s")
    }) {
        let proxy = Proxy::start(scene.nodes[0].as_ref().expect("running").public);
        scene.reconnect_through(proxy.address, 4);
        scene.run(seconds(5));
        proxy.cut();
        // Longer than the idle timeout: the node terminates these sessions before they reconnect.
        scene.run(seconds(12));
        scene.desert(proxy.address);
        scene.run(seconds(15));
    } => nothing_lost_in_order, shown by ["delivery_shard_ended_total{reason=\"peer_silent\"}"];

    disk_full_for_logs(scene: 2, USUAL, |_, node| node.output("/dev/full").set("LOG_LEVEL", "debug")) {
        scene.drop_sessions(3);
        scene.run(seconds(15));
    } => nothing_lost_in_order, shown by ["delivery_log_write_errors_total"];

    // Promise: “No storm after a drain.”
    three_nodes_rolled(scene: 3, Size { sessions: 3_000, conversations: 600, ..USUAL }, |_, node| {
        node.set("DRAIN_PERIOD", "10s")
    }) {
        for number in 0..3 {
            scene.drain_node(number, seconds(10));
            scene.start_node(number);
            scene.run_until_ready(number);
            scene.run(seconds(3));
        }
    } => rolled_without_a_stall, shown by [];

    // Its clients return to the other node, which has the tails of all partitions.
    node_killed_cursors_broadcast(scene: 2, CURSORS, |number, node| broadcast(number, quick_cursors(number, node))) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => returned_with_cursors, shown by ["delivery_resume_cursor_resumes_total"];

    // Its clients return to the other node, which has to take over half of the partitions first.
    node_killed_cursors(scene: 2, CURSORS, quick_cursors) {
        scene.kill_node(0);
        scene.run(seconds(20));
        scene.start_node(0);
        scene.run_until_ready(0);
    } => returned_with_cursors, shown by ["delivery_resume_cursor_resumes_total"];

    // All clients return, each to another node, while partitions change their owner.
    owners_change_cursors(scene: 2, CURSORS, quick_cursors) {
        scene.add_node(|node| node.set("INSTANCE_ID", "node-2"));
        for _ in 0..4 {
            scene.drop_sessions(2);
            scene.run(seconds(3));
        }
        scene.run_until_ready(2);
        scene.drop_sessions(1);
        scene.run(seconds(10));
    } => returned_with_cursors, shown by ["delivery_resume_cursor_resumes_total"];
}

/// Each row of the table names the metrics that show its fault, in the order of the tests.
#[test]
fn table_names_the_metrics_that_its_tests_check() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/faults.md");
    let page = std::fs::read_to_string(path).expect("the page");
    let (table, _) = page.split_once("\n## ").expect("a section after the table");
    let rows: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| fault |"))
        .filter(|line| !line.starts_with("| ---"))
        .collect();
    assert_eq!(rows.len(), SHOWN_BY.len(), "one row for each test");
    for (row, (test, metrics)) in rows.iter().zip(SHOWN_BY) {
        let shown = row.trim_end_matches(['|', ' ']).rsplit(" | ").next().unwrap_or_default();
        let named: Vec<_> = shown.split('`').skip(1).step_by(2).collect();
        for metric in *metrics {
            assert!(named.contains(metric), "{test} sees {metric}; its row: {row}");
        }
        // The rest are gauges, and effects outside the metrics page.
        let counters = named.iter().filter(|name| name.contains("_total"));
        let unseen: Vec<_> = counters.filter(|name| !metrics.contains(*name)).collect();
        assert!(unseen.is_empty(), "{test} sees nothing of {unseen:?}");
    }
}
