//! Two and three nodes that hand events over through the log, without Redis, seen from their clients.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use delivery_testkit::publisher::message;
use rustix::process::Signal;

use super::support::back_end::BackEnd;
use super::support::client::{Client, Received};
use super::support::fleet::{Connect, Fleet};
use super::support::node::{Node, NodeBuilder};
use super::support::tally::Tally;
use super::support::wait::{SOON, until};

const ROOMS: usize = 12;
/// Two of each user's devices are on two nodes.
const USERS: [&str; 4] = ["alice", "bob", "carol", "dave"];

/// One device of a user. It never resumes: what it misses, it misses.
pub(super) struct Device {
    pub(super) node: usize,
    client: Client,
    pub(super) tally: Tally,
    /// The sequence that was published last when it connected.
    pub(super) from: i64,
    pub(super) closed: Option<u16>,
}

impl Device {
    pub(super) fn connect(
        node: usize,
        address: SocketAddr,
        user: &str,
        device: &str,
        from: i64,
    ) -> Self {
        let client = Client::opened(&Connect::session(address, user, device));
        Self { node, client, tally: Tally::default(), from, closed: None }
    }

    /// By how many messages it is behind, in the room where it is most behind.
    pub(super) fn lags_by(&self, published: i64) -> i64 {
        let last = |room| self.tally.streams.get(&format!("room-{room}")).map_or(0, |it| it.last);
        (0..ROOMS).map(|room| published - last(room)).max().unwrap_or(0)
    }

    pub(super) fn take(&mut self) {
        while let Some(received) = self.client.receive_within(Duration::from_millis(1)) {
            match received {
                Received::Binary(payload) => drop(self.tally.saw(&payload)),
                Received::Ping => {}
                Received::Closed(code, _) => self.closed = Some(code),
                Received::Ended => {
                    self.closed.get_or_insert(0);
                }
                other => panic!("{other:?}"),
            }
            if self.closed.is_some() {
                break;
            }
        }
    }

    /// What of everything since its 101 it has not got, and what it got again or too late.
    pub(super) fn faults(&self, published: i64) -> (u64, u64) {
        let (mut missed, mut disturbed) = (0, 0);
        for room in 0..ROOMS {
            let stream = self.tally.streams.get(&format!("room-{room}"));
            let stream = stream.cloned().unwrap_or_default();
            let missing = stream.missing.iter().filter(|sequence| **sequence > self.from).count();
            let behind = published - stream.last.max(self.from).min(published);
            missed += missing as u64 + behind.unsigned_abs();
            disturbed += stream.duplicates + stream.out_of_order;
        }
        (missed, disturbed)
    }
}

struct LogCluster {
    back_end: BackEnd,
    nodes: Vec<Option<Node>>,
    devices: Vec<Device>,
    published: i64,
    connected: usize,
    node_timeout: &'static str,
}

impl LogCluster {
    fn start(name: &str, nodes: usize) -> Self {
        Self::with_node_timeout(name, nodes, "1m")
    }

    fn with_node_timeout(name: &str, nodes: usize, node_timeout: &'static str) -> Self {
        let back_end = BackEnd::start(name, 6);
        for room in 0..ROOMS {
            back_end.neighbours.state().create(&format!("room-{room}"), &USERS, 0);
        }
        let mut cluster = Self {
            back_end,
            nodes: (0..nodes).map(|_| None).collect(),
            devices: Vec::new(),
            published: 0,
            connected: 0,
            node_timeout,
        };
        // At once, so that they share the partitions from the start.
        let mut started: Vec<_> =
            (0..nodes).map(|number| cluster.builder(number).spawn()).collect();
        started.iter_mut().for_each(Node::wait_ready);
        cluster.nodes = started.into_iter().map(Some).collect();
        cluster.owners_settle();
        cluster
    }

    fn builder(&self, number: usize) -> NodeBuilder {
        let topic = &self.back_end.topic;
        self.back_end
            .node()
            .set("ROUTING_MODE", "group")
            .set("SESSIONS_TOPIC", format!("{topic}.sessions"))
            .set("HANDOFF_TOPIC", format!("{topic}.handoff"))
            .set("KAFKA_PROPERTIES", "session.timeout.ms=6000")
            .set("RESUME_GRACE", "2m")
            .set("NODE_TIMEOUT", self.node_timeout)
            .set("INSTANCE_ID", format!("{topic}-{number}"))
    }

    fn running(&self) -> impl Iterator<Item = (usize, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(number, node)| Some((number, node.as_ref()?)))
    }

    /// Waits until each running node owns partitions.
    fn owners_settle(&self) {
        until(SOON, "the nodes share the partitions", || {
            let owned: Vec<_> = self
                .running()
                .map(|(_, node)| node.metrics().sum("delivery_router_partitions", &[]))
                .collect();
            (owned.iter().sum::<f64>() == 6.0 && owned.iter().all(|owned| *owned > 0.0))
                .then_some(())
        });
    }

    /// One device of the next user.
    fn connect(&mut self, number: usize) {
        let user = USERS[self.connected % USERS.len()];
        let device = format!("device-{}", self.connected);
        self.connected += 1;
        let node = self.nodes[number].as_ref().expect("runs");
        let from = self.published;
        self.devices.push(Device::connect(number, node.public, user, &device, from));
    }

    fn publish(&mut self) {
        self.published += 1;
        for room in 0..ROOMS {
            let room = format!("room-{room}");
            let stored = message(&room, self.published, "alice", "hello");
            self.back_end.neighbours.state().messages.entry(room.clone()).or_default().push(stored);
            self.back_end.publisher.message(&room, self.published, "alice", "hello");
        }
        self.devices.iter_mut().for_each(Device::take);
    }

    /// Waits until every open device has everything since its 101, each message once and in order.
    fn nobody_misses_anything(&mut self) {
        let published = self.published;
        let mut faults = BTreeMap::new();
        until(SOON, "everybody has everything", || {
            self.devices.iter_mut().for_each(Device::take);
            faults = self
                .devices
                .iter()
                .enumerate()
                .filter(|(_, device)| device.closed.is_none())
                .map(|(number, device)| (number, (device.node, device.faults(published))))
                .collect();
            faults.values().all(|(_, (missed, _))| *missed == 0).then_some(())
        });
        assert!(faults.values().all(|(_, (_, disturbed))| *disturbed == 0), "{faults:?}");
    }

    fn closed(&self) -> Vec<(usize, u16)> {
        let closed = |device: &Device| Some((device.node, device.closed?));
        self.devices.iter().filter_map(closed).collect()
    }
}

/// Promise: “A session gets every event from its 101 on, whichever node reads it from Kafka.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn nobody_misses_an_event_from_the_101_on() {
    let mut cluster = LogCluster::start("from-the-101", 2);
    for round in 0..40 {
        cluster.connect(round % 2);
        cluster.publish();
    }
    cluster.nobody_misses_anything();
    assert_eq!(cluster.closed(), []);
    let handed_over: f64 = cluster
        .running()
        .map(|(_, node)| node.metrics().sum("delivery_router_hand_offs_total", &[]))
        .sum();
    assert!(handed_over > 0.0);
}

/// Sessions of the storm, and how many of them connect in a second.
const STORM: usize = 3_000;
const STORM_PER_SECOND: usize = 1_000;
/// Users of one conversation of the storm.
const CROWD: usize = 100;

/// What one session of the storm got.
#[derive(Clone, Default)]
struct Storm {
    /// The last sequence that was published when its 101 was seen.
    from: Option<i64>,
    tally: Tally,
}

/// Promise: “A session gets every event from its 101 on, whichever node reads it from Kafka.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn nobody_misses_an_event_while_a_thousand_sessions_connect_per_second() {
    let mut cluster = LogCluster::start("storm", 3);
    let rooms = STORM / CROWD;
    let user = |number: usize| format!("user-{number}");
    for room in 0..rooms {
        let members: Vec<_> = (0..CROWD).map(|member| user(room * CROWD + member)).collect();
        let members: Vec<_> = members.iter().map(String::as_str).collect();
        cluster.back_end.neighbours.state().create(&format!("crowd-{room}"), &members, 0);
    }
    let addresses: Vec<_> = cluster.running().map(|(_, node)| node.public).collect();
    let mut fleet = Fleet::new();
    let mut sessions = vec![Storm::default(); STORM];
    let started = Instant::now();
    let (mut connected, mut published) = (0, 0_i64);
    while connected < STORM || published < 40 {
        let due = started.elapsed().as_millis() as usize * STORM_PER_SECOND / 1_000;
        while connected < due.min(STORM) {
            let address = addresses[connected % addresses.len()];
            fleet
                .connect(&Connect::session(address, &user(connected), "phone"))
                .expect("connected");
            connected += 1;
        }
        if started.elapsed().as_millis() as i64 / 100 > published {
            published += 1;
            for room in 0..rooms {
                let room = format!("crowd-{room}");
                cluster.back_end.publisher.message(&room, published, "somebody", "hello");
            }
        }
        take(&mut fleet, &mut sessions, published);
    }
    cluster.back_end.publisher.flush(SOON);
    let mut missed = 0;
    until(SOON, "everybody has everything since the 101", || {
        take(&mut fleet, &mut sessions, published);
        let missed_of = |(number, session): (usize, &Storm)| {
            let Some(from) = session.from else { return published };
            let stream = session.tally.streams.get(&format!("crowd-{}", number / CROWD));
            let stream = stream.cloned().unwrap_or_default();
            let missing = stream.missing.iter().filter(|sequence| **sequence > from).count() as i64;
            missing + published - stream.last.max(from)
        };
        missed = sessions.iter().enumerate().map(missed_of).sum();
        (fleet.open_count() == STORM && missed == 0).then_some(())
    });
    let wrong = |session: &&Storm| {
        session.tally.streams.values().any(|it| it.duplicates + it.out_of_order > 0)
    };
    assert_eq!(sessions.iter().filter(wrong).count(), 0);
    let replays: f64 = cluster
        .running()
        .map(|(_, node)| node.metrics().sum("delivery_router_replays_total", &[]))
        .sum();
    println!(
        "{STORM} sessions in {:.1} s on 3 nodes, {published} messages each: {missed} missed, {replays} replayed",
        started.elapsed().as_secs_f64()
    );
}

fn take(fleet: &mut Fleet, sessions: &mut [Storm], published: i64) {
    fleet.turn(Duration::from_millis(1), &mut |id, received| match received {
        Received::Open(_) => sessions[id].from = Some(published),
        Received::Binary(payload) => drop(sessions[id].tally.saw(&payload)),
        Received::Ping => {}
        other => panic!("session {id}: {other:?}"),
    });
}

/// Promise: “A node that is killed costs the sessions of the other nodes nothing.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn killed_owner_costs_the_sessions_of_the_others_nothing() {
    let mut cluster = LogCluster::start("killed-owner", 2);
    for round in 0..8 {
        cluster.connect(round % 2);
        cluster.publish();
    }
    let mut node = cluster.nodes[0].take().expect("runs");
    node.signal(Signal::KILL);
    until(SOON, "it has ended", || node.ended());
    drop(node);
    for _ in 0..20 {
        cluster.publish();
    }
    cluster.nobody_misses_anything();
    // It takes its own place again.
    cluster.nodes[0] = Some(cluster.builder(0).start());
    cluster.owners_settle();
    for round in 0..8 {
        cluster.connect(round % 2);
        cluster.publish();
    }
    cluster.nobody_misses_anything();
    assert!(cluster.closed().iter().all(|(node, _)| *node == 0), "{:?}", cluster.closed());
}

/// Promise: “A second node with an `INSTANCE_ID` in use refuses to start and names the other.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn second_node_of_an_instance_refuses_to_start() {
    let mut cluster = LogCluster::start("instance-in-use", 1);
    cluster.connect(0);
    cluster.publish();
    let second = cluster.builder(0);
    let mut second = second.spawn();
    let status = until(SOON, "it has ended", || second.ended());
    assert!(!status.success());
    let log = second.log();
    let named = log.contains("INSTANCE_ID: another node has the instance");
    assert!(named && log.contains(&format!("{}-0", cluster.back_end.topic)), "{log}");
    for _ in 0..5 {
        cluster.publish();
    }
    cluster.nobody_misses_anything();
    assert_eq!(cluster.closed(), []);
}

/// Promise: “What a dead node has left in the sessions topic is removed by another one.”
#[test]
#[ignore = "needs Kafka: tests/run end_to_end"]
fn dead_node_leaves_nothing_in_the_sessions_topic() {
    let mut cluster = LogCluster::with_node_timeout("leftovers", 2, "10s");
    for round in 0..6 {
        cluster.connect(round % 2);
    }
    cluster.publish();
    cluster.nobody_misses_anything();
    let mut dead = cluster.nodes[0].take().expect("runs");
    dead.signal(Signal::KILL);
    until(SOON, "it has ended", || dead.ended());
    let living = cluster.nodes[1].as_ref().expect("runs");
    until(SOON, "the other has removed its three sessions and its lease", || {
        let metrics = living.metrics();
        let removed = metrics.sum("delivery_sessions_topic_tombstones_total", &[]);
        (removed == 4.0 && metrics.sum("delivery_cluster_sessions", &[]) == 3.0).then_some(())
    });
    assert_eq!(living.metrics().sum("delivery_cluster_nodes", &[]), 1.0);
}
