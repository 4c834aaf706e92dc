use super::*;

fn load() -> ClusterLoad {
    ClusterLoad {
        nodes: 50.0,
        users: 1e7,
        sessions: MemberSessions { online: 1.0, devices: 1.0 },
        records: 20_000.0,
        value_bytes: 400,
        membership_share: 0.01,
        conversations: vec![
            ConversationSize { members: 2.0, share: 3.0 },
            ConversationSize { members: 100.0, share: 1.0 },
        ],
        connects: 5_000.0,
        partitions: 200.0,
        hand_off_partitions: 200.0,
        routers: 1.0,
        replication: 3.0,
        sessions_topic: SessionsTopic { uncompacted_s: 3_600.0, ends_kept_s: 3_600.0 },
        tail_age_s: 300.0,
        lag_s: 0.0,
        unit_costs: UnitCosts::default(),
    }
}

fn near(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-3, "{found}, not {expected}");
}

#[test]
fn flows_follow_from_the_load() {
    let load = load();
    let group = load.group();
    // 49 × (1 − 0.98²) = 1.940 for two members, 49 × (1 − 0.98¹⁰⁰) = 42.50 for a hundred.
    near(group.live.records, 20_000.0 * (0.75 * 1.9404 + 0.25 * 42.50));
    near(group.leases.records, 25.0);
    near(group.begun.records, 5_000.0);
    // A user has 20,000 × 26.5 / 10 million records a second.
    near(group.replays.records, 5_000.0 * 0.053 * 0.98);
    // A hundred sessions begin on each node in a second.
    near(group.passed.records, 50.0 * 49.0);
    near(group.read_source.records, 400.0);
    near(group.read_own.records, group.hand_offs().records / 50.0);
    near(group.read_foreign.records, group.read_own.records * 49.0 / 200.0);
    near(group.read_sessions.records, 10_025.0);
    assert_eq!(load.broadcast().read.records, 20_000.0);
}

#[test]
fn starting_node_reads_sessions_ends_and_what_is_not_compacted() {
    let mut load = load();
    let topic = load.sessions_topic();
    near(topic.begun, 1e7);
    near(topic.uncompacted, 10_025.0 * 3_600.0);
    // In an hour each device has 1.8 sessions, of which few are on the same node.
    near(topic.ended, 1e7 * 49.0 * (1.0 - (-1.8_f64 / 50.0).exp()));
    load.sessions_topic.ends_kept_s = 86_400.0;
    assert!(load.sessions_topic().ended > 2.8e8, "29 nodes in a day");
}

#[test]
fn beginnings_are_kept_for_less_than_the_tail_if_there_are_too_many() {
    let memory = load().memory();
    near(memory.newcomers_s, 100.0);
    near(memory.tails, 20_000.0 * records::source(400) / 50.0 * 300.0);
}

#[test]
fn large_conversations_never_cost_less_in_group_mode() {
    let of = |members| ClusterLoad {
        conversations: vec![ConversationSize { members, share: 1.0 }],
        ..load()
    };
    assert!(of(2.0).turning().records.is_some_and(|nodes| nodes < 10));
    // Each record is handed over to all nodes, and each node reads some of the others' besides.
    assert_eq!(of(100_000.0).turning().bytes, None);
    assert!(!of(100_000.0).group().sizes[0].is_too_large);
    let two_nodes = ClusterLoad { nodes: 2.0, ..of(1_000_000.0) };
    assert!(two_nodes.group().sizes[0].is_too_large, "half a million ids");
}
