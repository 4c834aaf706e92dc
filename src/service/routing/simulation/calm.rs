//! The cluster in calm weather: what the real code writes, compared with what
//! [`sizing`](crate::service::routing::sizing) computes. A formula that disagrees with the code fails here.

use std::collections::BTreeSet;

use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::logs::{Device, HAND_OFF_PARTITIONS, PARTITIONS, members};
use super::weather::Weather;
use super::{Cluster, PROCESSES};
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::routing::sizing::{
    ClusterLoad, ConversationSize, MemberSessions, SessionsTopic, UnitCosts, named_users,
    other_nodes,
};

/// Virtual time between two turns of all nodes, ms.
const ROUND_MS: u64 = 100;
/// Rounds after which everything that was appended is handed over, delivered and acknowledged.
const ROUNDS_TO_REST: usize = 8;
/// Conversations with the same members, in all partitions.
const CONVERSATIONS: [usize; 3] = [0, 5, 10];
/// Members of all of them.
const USERS: [usize; 4] = [1, 2, 3, 4];

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Written {
    records: u64,
    live: u64,
    /// Users that the live ones name.
    named: u64,
    replays: u64,
    passed: u64,
    begun: u64,
    ended: u64,
    leases: u64,
}

struct CalmCluster {
    cluster: Cluster,
    records: u64,
}

impl CalmCluster {
    fn new(nodes: usize, routers: usize) -> Self {
        let mut random = StdRng::seed_from_u64(1);
        let weather = Weather { routers, ..Weather::calm(&mut random) };
        let mut calm = Self { cluster: Cluster::with(random, weather, nodes), records: 0 };
        // Partitions are assigned, and their owners have stated their positions.
        calm.pass(4 * ROUNDS_TO_REST);
        calm
    }

    fn pass(&mut self, rounds: usize) {
        let cluster = &mut self.cluster;
        for _ in 0..rounds {
            cluster.now_ms += ROUND_MS;
            cluster.logs.now_ms = cluster.now_ms;
            cluster.check_group();
            for number in 0..PROCESSES {
                (0..10).for_each(|action| cluster.act(number, action, usize::MAX));
                cluster.manage(number);
            }
        }
    }

    fn connect(&mut self, device: Device, number: usize) {
        self.cluster.connect_to(number, device);
    }

    fn disconnect(&mut self, device: Device) {
        let cluster = &mut self.cluster;
        let missed = cluster.clients[&device].check(device, &cluster.logs);
        assert_eq!(missed, [None; PARTITIONS], "in calm weather everything arrives");
        cluster.disconnect_device(device);
    }

    fn append(&mut self, conversation: usize) {
        self.cluster.logs.append(conversation, 0);
        self.records += 1;
    }

    /// Routers that have a partition, by node.
    fn owners(&self) -> BTreeSet<(usize, usize)> {
        let routers = self.cluster.weather.routers;
        let assigned = self.cluster.assigned.iter().enumerate();
        assigned.map(|(partition, node)| (node.expect("assigned"), partition % routers)).collect()
    }

    fn written(&self) -> Written {
        let mut written = Written { records: self.records, ..Written::default() };
        for partition in 0..HAND_OFF_PARTITIONS {
            let log = &self.cluster.logs.hand_offs[partition];
            for offset in log.low()..log.end() {
                match &log.get(offset).expect("retained").header.content {
                    Some(Content::Live(users)) => {
                        written.live += 1;
                        written.named += users.ids.len() as u64;
                    }
                    Some(Content::Replay(_)) => written.replays += 1,
                    Some(Content::Passed(_)) => written.passed += 1,
                    other => panic!("{other:?} in calm weather"),
                }
            }
        }
        for record in self.cluster.logs.sessions.iter().flatten() {
            let is_lease = record.key.as_ref().is_some_and(|key| key.user.is_empty());
            match (is_lease, &record.value) {
                (true, _) => written.leases += 1,
                (false, Some(_)) => written.begun += 1,
                (false, None) => written.ended += 1,
            }
        }
        written
    }
}

/// A load like that of the simulated cluster.
fn load(nodes: usize, routers: usize, connects: f64, records: f64) -> ClusterLoad {
    ClusterLoad {
        nodes: nodes as f64,
        users: 1.0,
        sessions: MemberSessions { online: 1.0, devices: 1.0 },
        records,
        value_bytes: 100,
        membership_share: 0.0,
        conversations: vec![ConversationSize { members: 1.0, share: 1.0 }],
        connects,
        partitions: PARTITIONS as f64,
        hand_off_partitions: HAND_OFF_PARTITIONS as f64,
        routers: routers as f64,
        replication: 1.0,
        sessions_topic: SessionsTopic { uncompacted_s: 1.0, ends_kept_s: 1.0 },
        tail_age_s: 60.0,
        // What is written in one round is read in the next.
        lag_s: ROUND_MS as f64 / 1_000.0,
        unit_costs: UnitCosts::default(),
    }
}

fn near(found: f64, computed: f64, tolerance: f64, what: &str) {
    let ratio = found / computed;
    assert!((ratio - 1.0).abs() <= tolerance, "{what}: {found}, computed {computed}");
}

/// Every way to place the devices on the nodes occurs once, so the average is exact.
#[test]
fn records_are_handed_over_to_as_many_nodes_and_users_as_computed() {
    for (nodes, users, devices) in [
        (2_usize, 1, 1),
        (2, 3, 1),
        (2, 2, 2),
        (3, 2, 1),
        (3, 3, 1),
        (3, 1, 2),
        (4, 2, 1),
        (4, 1, 2),
    ] {
        let all: Vec<Device> = USERS[..users]
            .iter()
            .flat_map(|user| (0..devices).map(|device| (*user, device)))
            .collect();
        for conversation in CONVERSATIONS {
            assert!(USERS.iter().all(|user| members(conversation).contains(user)));
        }
        let places = nodes.pow(all.len() as u32);
        let mut calm = CalmCluster::new(nodes, 1);
        let before = calm.written();
        for place in 0..places {
            for (at, device) in all.iter().enumerate() {
                calm.connect(*device, place / nodes.pow(at as u32) % nodes);
            }
            calm.pass(ROUNDS_TO_REST);
            CONVERSATIONS.into_iter().for_each(|conversation| calm.append(conversation));
            calm.pass(ROUNDS_TO_REST);
            all.iter().for_each(|device| calm.disconnect(*device));
            calm.pass(ROUNDS_TO_REST);
        }
        let after = calm.written();
        let records = (after.records - before.records) as f64;
        let sessions = MemberSessions { online: 1.0, devices: devices as f64 };
        let what = format!("{nodes} nodes, {users} users with {devices} devices");
        let (n, m) = (nodes as f64, users as f64);
        let live = (after.live - before.live) as f64 / records;
        near(live, other_nodes(n, m, sessions), 1e-9, &what);
        let named = (after.named - before.named) as f64 / records;
        near(named, named_users(n, m, sessions), 1e-9, &what);
        let connects = (places * all.len()) as u64;
        let computed = load(nodes, 1, connects as f64, 1.0).group();
        let changes = [after.begun - before.begun, after.ended - before.ended];
        assert_eq!(changes.map(|it| it as f64), [computed.begun.records, computed.ended.records]);
    }
}

#[test]
fn leases_are_as_many_as_computed() {
    for nodes in [2, 4] {
        let mut calm = CalmCluster::new(nodes, 1);
        let before = calm.written();
        let seconds = 100;
        calm.pass(seconds * 1_000 / ROUND_MS as usize);
        let leases = calm.written().leases - before.leases;
        let computed = load(nodes, 1, 1.0, 1.0).group().leases.records;
        near(leases as f64, computed * seconds as f64, 0.02, "leases");
        assert_eq!(calm.written().live, 0, "and nothing else");
    }
}

/// A user who gets ten records a second connects and disconnects, at every time since the last lease and on
/// every node.
#[test]
fn replays_and_what_has_passed_are_as_many_as_computed() {
    for (nodes, routers) in [(2, 1), (4, 1), (3, 2)] {
        let mut calm = CalmCluster::new(nodes, routers);
        let device = (USERS[0], 0);
        let (connects, mut round) = (120, 0);
        let mut to_tell = 0;
        for number in 0..connects {
            let node = number % nodes;
            calm.connect(device, node);
            to_tell += calm.owners().iter().filter(|(owner, _)| *owner != node).count();
            for connected in 0..35 {
                calm.append(CONVERSATIONS[round % 3]);
                round += 1;
                calm.pass(1);
                if connected == 17 {
                    calm.pass(ROUNDS_TO_REST);
                    calm.disconnect(device);
                }
            }
        }
        calm.pass(2 * ROUNDS_TO_REST);
        let written = calm.written();
        let what = format!("{nodes} nodes, {routers} routers");
        // So slowly that each session is the only one of its second.
        let per_second = 1e-6;
        let computed = load(nodes, routers, per_second, 10.0).group();
        let of_all = |records: f64| records / per_second * connects as f64;
        near(written.replays as f64, of_all(computed.replays.records), 0.05, &what);
        assert_eq!(written.passed, to_tell as u64, "once for each router of another node");
        // The group gives some routers several partitions, others none.
        let routers_used = calm.owners().len() as f64 / (nodes * routers).min(PARTITIONS) as f64;
        near(written.passed as f64, of_all(computed.passed.records) * routers_used, 0.01, &what);
    }
}
