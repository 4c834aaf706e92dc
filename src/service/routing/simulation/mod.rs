//! The cluster on simulated logs: the real routers, tables, holders, tails and offset windows of several
//! nodes, driven by one seed over virtual time.
//!
//! The logs, the consumer group and the clients are simulated. Nodes are killed, stall and go on as zombies
//! (also beside the node that took their place), and come back; partitions move at any point, with and
//! without notice; tables and hand-offs lag; acknowledgements are lost; logs are compacted and expire. The
//! promise that is checked is in `clients`. `docs/simulation.md` describes it.

#[cfg(test)]
mod calm;
mod clients;
mod logs;
mod manager;
mod members;
mod node;
mod queues;
mod returning;
mod stalls;
#[cfg(test)]
mod tests;
pub mod trace;
mod weather;

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use self::clients::ClusterClient;
use self::logs::{Commit, Device, Logs, PARTITIONS};
use self::manager::ClosedSession;
use self::node::SimulatedNode;
use self::returning::{CursorKeeper, ReturningSession};
use self::weather::Weather;
use crate::service::cluster::nodes::EpochEnd;

/// Nodes of a cluster.
const NODES: usize = 4;
/// Processes at a time: nodes, and zombies whose place another process has taken.
const PROCESSES: usize = NODES + 2;
/// Users.
const USERS: usize = 24;
/// Devices of a user, each with one client.
const DEVICES: usize = 2;
/// How long a node may stall before the group gives its partitions to others, ms.
const GROUP_TIMEOUT_MS: u64 = 15_000;
/// Rounds without a delivery after which the cluster is at rest. In so many, a router takes all hand-offs that
/// its queue can hold.
const QUIET_ROUNDS: usize = 400;
/// How long a node has to stall before another process takes its place: longer than three renewals, ms.
const TAKEOVER_MS: u64 = 8_000;

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterSummary {
    /// How often each thing happened.
    pub counts: BTreeMap<&'static str, u64>,
}

impl ClusterSummary {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn count_many(&mut self, what: &'static str, count: u64) {
        *self.counts.entry(what).or_default() += count;
    }

    /// Adds another run.
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.counts {
            self.count_many(what, *count);
        }
    }
}

struct Cluster {
    random: StdRng,
    weather: Weather,
    now_ms: u64,
    logs: Logs,
    nodes: Vec<Option<SimulatedNode>>,
    /// Which node the group has assigned each partition to, and the generation of the assignment.
    assigned: [Option<usize>; PARTITIONS],
    clients: BTreeMap<Device, ClusterClient>,
    /// The clients that keep a cursor.
    returning: BTreeMap<Device, CursorKeeper>,
    runtime: tokio::runtime::Runtime,
    /// Processes started.
    lives: u64,
    /// Nodes that were taken over by another process.
    taken_over: BTreeSet<usize>,
    summary: ClusterSummary,
}

/// Runs `steps` steps from `seed`. Four times on the way everything comes to rest, and what every client got
/// is checked.
///
/// # Panics
/// A promise is broken. [`trace::print_on_panic`] prints the seed and the step.
pub fn run(seed: u64, steps: u64) -> ClusterSummary {
    trace::begin(seed, steps);
    let mut cluster = Cluster::new(seed);
    trace::weather(format!("{:?}", cluster.weather));
    for step in 1..=steps {
        trace::step(step);
        cluster.step();
        if step % (steps / 4).max(1) == 0 {
            cluster.settle();
            cluster.check();
        }
    }
    for number in 0..PROCESSES {
        cluster.end_process(number);
    }
    cluster.summary.count_many("steps", steps);
    cluster.summary
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let weather = Weather::new(&mut random);
        Self::with(random, weather, NODES)
    }

    fn with(random: StdRng, weather: Weather, nodes: usize) -> Self {
        // Time passes only in `drive_replays`.
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build();
        let mut cluster = Self {
            weather,
            random,
            now_ms: 1_000_000,
            logs: Logs::default(),
            nodes: (0..PROCESSES).map(|_| None).collect(),
            assigned: [None; PARTITIONS],
            clients: BTreeMap::new(),
            returning: BTreeMap::new(),
            runtime: runtime.expect("a runtime without I/O"),
            lives: 0,
            taken_over: BTreeSet::new(),
            summary: ClusterSummary::default(),
        };
        for number in 0..nodes {
            cluster.start(number);
        }
        cluster
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random.random_range(0..limit)
    }

    fn did(&mut self, what: &'static str, node: usize, about: u64) {
        self.summary.count(what);
        trace::note(what, [node as i64, about as i64, 0, 0]);
    }

    /// A process that runs.
    fn running(&mut self) -> Option<usize> {
        let number = self.below(PROCESSES);
        self.nodes[number]
            .as_ref()
            .is_some_and(|node| !node.stall.is_on(self.now_ms))
            .then_some(number)
    }

    /// Starts a node, unless it runs, or a zombie could take its place.
    fn start(&mut self, number: usize) {
        if self.nodes.iter().flatten().any(|node| node.number() == number) {
            return;
        }
        self.start_process(number);
    }

    fn start_process(&mut self, number: usize) {
        self.lives += 1;
        let handle = self.runtime.handle().clone();
        self.nodes[number] =
            Some(SimulatedNode::start(number, self.lives, &mut self.logs, handle, &self.weather));
        self.did("nodes started", number, self.lives);
    }

    /// Another process takes the place of a node that has stalled for long. The old one is a zombie when it
    /// goes on.
    fn take_over(&mut self) {
        let number = self.below(NODES);
        let Some(zombie) = (NODES..PROCESSES).find(|free| self.nodes[*free].is_none()) else {
            return;
        };
        let has_stalled = |node: &SimulatedNode| node.stall.so_far(self.now_ms) > TAKEOVER_MS;
        let may = self.nodes[number].as_ref().is_some_and(has_stalled)
            && !self.nodes[NODES..].iter().flatten().any(|node| node.number() == number);
        if !may {
            return;
        }
        self.nodes.swap(number, zombie);
        for assigned in self.assigned.iter_mut().filter(|it| **it == Some(number)) {
            *assigned = Some(zombie);
        }
        self.taken_over.insert(number);
        self.start_process(number);
        self.did("nodes taken over by another process", number, zombie as u64);
    }

    fn step(&mut self) {
        self.now_ms += self.random.random_range(0..self.weather.step_ms);
        self.logs.now_ms = self.now_ms;
        self.logs.expire(self.weather.retention_ms);
        self.check_group();
        if self.weather.has_cursors {
            let for_ms = self.random.random_range(0..self.weather.replays_ms);
            if self.drive_replays(for_ms) {
                self.end_an_owner();
            }
        }
        match self.below(1_000) {
            0..150 => {
                let conversation = self.below(USERS);
                let bytes = if self.below(10) == 0 { 400 } else { 0 };
                self.logs.append(conversation, bytes);
                self.summary.count("records");
            }
            150..190 => self.connect(),
            190..205 => self.disconnect(),
            205..219 if self.weather.is_calm => {}
            205..207 => self.kill(),
            207..210 => self.stall(),
            210..213 => self.rebalance(),
            213 => self.leave(),
            214..219 => self.take_over(),
            219..221 => self.logs.compact(self.weather.compaction_lag_ms),
            221..232 => {
                let number = self.below(NODES);
                self.start(number);
            }
            988..998 if self.weather.expires_events => self.expire_events(),
            232..998 => {
                for _ in 0..self.weather.acts {
                    let (action, amount) = (self.below(10), self.below(self.weather.amount_max));
                    if let Some(number) = self.running() {
                        self.act(number, action, amount);
                        if self.below(2) == 0 {
                            self.manage(number);
                        }
                    }
                }
            }
            998 => self.disturb(),
            _ if self.weather.is_mild => {}
            _ => {
                // Nobody reaches Kafka.
                self.now_ms += 300_000;
                self.did("outages of Kafka", 0, 0);
            }
        }
    }

    /// Events are deleted, whether they were read or not: mostly while some of them wait for their members. In half of
    /// the cases their owner does not survive that.
    fn expire_events(&mut self) {
        let partition = self.below(PARTITIONS);
        let owner = self.assigned[partition].and_then(|owner| self.nodes[owner].as_ref());
        let waits = owner.is_some_and(|owner| owner.has_parked(partition));
        if !waits && self.below(10) > 0 {
            return;
        }
        let (low, end) = (self.logs.low(partition), self.logs.ends()[partition]);
        let from = if waits { self.logs.committed(partition).offset.max(low) } else { low };
        let below = if self.below(4) == 0 { end } else { self.random.random_range(from..=end) };
        self.logs.expire_events(partition, below);
        self.did("events expired", partition, below as u64);
        if self.below(2) == 0 {
            self.end_owner(partition);
        }
    }

    /// Clients have got records of a replay, or have caught up: an owner may end, whose successor has committed less.
    fn end_an_owner(&mut self) {
        let one_in = self.weather.ends_owners;
        if !self.weather.is_calm && one_in > 0 && self.below(one_in) == 0 {
            let partition = self.below(PARTITIONS);
            self.end_owner(partition);
        }
    }

    /// The owner of a partition is killed, gives it back, or stalls until it has lost it.
    fn end_owner(&mut self, partition: usize) {
        let Some(owner) = self.assigned[partition] else { return };
        match self.below(3) {
            0 => {
                self.end_process(owner);
                self.did("nodes killed", owner, 0);
            }
            1 => self.give_back(partition),
            _ => {
                if let Some(node) = &mut self.nodes[owner] {
                    node.stall.begin(self.now_ms, 2 * GROUP_TIMEOUT_MS);
                    self.did("nodes stalled", owner, 2 * GROUP_TIMEOUT_MS);
                }
            }
        }
    }

    /// A node whose position in a partition has expired starts to read it again.
    fn start_expired_again(&mut self, number: usize) {
        let expired = self.nodes[number].as_ref().map(SimulatedNode::expired);
        for partition in expired.unwrap_or_default() {
            if self.assigned[partition] == Some(number) {
                self.give_back(partition);
                self.assign(partition, number);
            }
        }
    }

    /// A node loses its position in the sessions topic, or acknowledgements.
    fn disturb(&mut self) {
        let (loses_position, again) = (self.weather.loses_position, self.below(2) == 0);
        let Some(number) = self.running() else { return };
        let Some(node) = &mut self.nodes[number] else { return };
        if loses_position && again {
            node.lose_position(&self.logs);
            self.did("positions lost", number, 0);
        } else {
            node.store_again(&mut self.logs);
            self.did("acknowledgements lost", number, 0);
        }
    }

    fn act(&mut self, number: usize, action: usize, amount: usize) {
        let now_ms = self.now_ms;
        let Some(node) = &mut self.nodes[number] else { return };
        node.renew(now_ms);
        let random = &mut self.random;
        let mut is_rare = |one_in| amount < usize::MAX && !random.random_ratio(1, one_in);
        match action {
            0..=2 if amount == usize::MAX => {
                node.turn_router(action + 1, now_ms);
                node.turn_router(action, now_ms);
                node.turn_shards();
            }
            0..=2 => {
                node.turn_router(amount, now_ms);
                // A shard may be slower than the routers.
                if action > 0 {
                    node.turn_shards();
                }
            }
            3 => node.read_sessions(&self.logs, amount),
            4 => node.read_hand_offs(&self.logs, amount),
            5 => node.store(&mut self.logs, amount),
            6 => node.acknowledge(amount),
            7 if amount == 1 && self.weather.forgets_members > 0 => {
                if self.random.random_range(0..self.weather.forgets_members) == 0 {
                    node.forget_members();
                }
            }
            7 if is_rare(self.weather.answers_one_in) => {}
            7 => node.answer(amount, &self.runtime),
            8 => {
                node.stall.end();
                let assigned = self.assigned;
                node.notice_lost(|partition| assigned[partition] != Some(number));
                self.start_expired_again(number);
            }
            _ if is_rare(self.weather.commits_one_in) => {}
            _ => {
                for (partition, commit) in node.commits() {
                    // The coordinator refuses a member that has lost the partition.
                    if self.assigned[partition] == Some(number) {
                        self.logs.commit(partition, commit);
                    }
                }
            }
        }
        self.collect(number);
    }

    /// Takes what the node's shards delivered.
    fn collect(&mut self, number: usize) {
        let Some(node) = &mut self.nodes[number] else { return };
        let life = node.life();
        for (slot, partition, offset) in node.take_delivered() {
            let client = self.clients.iter_mut().find(|(_, it)| (it.life, it.slot) == (life, slot));
            if let Some((device, client)) = client {
                client.got[partition].push(offset);
                if let Some(session) = &mut client.returning {
                    session.got(self.returning.entry(*device).or_default(), partition, offset);
                }
                let about = [life as i64, i64::from(slot), partition as i64, offset];
                trace::note("delivered: process, slot, partition, offset", about);
                self.summary.count("deliveries");
            }
        }
    }

    /// A turn of the node's session manager.
    fn manage(&mut self, number: usize) {
        let Some(node) = &mut self.nodes[number] else { return };
        let (life, node_number) = (node.life(), node.number());
        // Before the session manager closes the sessions that have left the directory.
        let cursor = node.cursor();
        let (ended, closed) = (node.manager.take_ended(), node.manager.close_sessions());
        let gives_way = node.gives_way();
        for (epoch, why) in ended {
            let what = match why {
                EpochEnd::Silent => "epochs that ended: silent",
                EpochEnd::Lost => "epochs that ended: lost",
                EpochEnd::Replaced => "epochs that ended: replaced",
                // A zombie that has not read of its successor yet begins another epoch.
                EpochEnd::Refused => "epochs that ended: refused",
                // It has not found out itself.
                EpochEnd::Stopped => "epochs that ended: by others",
            };
            self.did(what, number, epoch);
            let silence = self.logs.longest_silence(epoch);
            let taken_over = self.taken_over.contains(&node_number);
            let is_due = match why {
                EpochEnd::Silent => silence >= self.weather.node_timeout_ms,
                EpochEnd::Stopped => silence >= self.weather.node_timeout_ms || taken_over,
                // The other process may have read the last renewal late, so its time is not bounded here.
                EpochEnd::Replaced | EpochEnd::Refused => taken_over,
                // Nodes that lag read what was compacted.
                EpochEnd::Lost => true,
            };
            assert!(is_due, "epoch {epoch} ended ({why:?}) after {silence} ms");
        }
        for closed in closed {
            let (slot, what) = match closed {
                ClosedSession::Missed { slot, with_all: true } => {
                    (slot, "sessions that missed events, with all")
                }
                ClosedSession::Missed { slot, .. } => (slot, "sessions that missed events"),
                ClosedSession::Replaced { slot, .. } => (slot, "sessions replaced on another node"),
            };
            let client = self.clients.iter().find(|(_, it)| (it.life, it.slot) == (life, slot));
            let Some((&(user, device), _)) = client else { continue };
            self.did(what, number, u64::from(slot));
            match closed {
                ClosedSession::Missed { with_all: true, .. } => {}
                ClosedSession::Missed { .. } => {
                    assert!(self.weather.has_gaps(), "a session missed events for no reason");
                }
                ClosedSession::Replaced { epoch, serial, .. } => {
                    let is_replaced = self.logs.is_replaced((user, device), epoch, serial);
                    assert!(
                        is_replaced,
                        "session {serial} of epoch {epoch} closed, but not replaced"
                    );
                }
            }
            self.remove((user, device));
        }
        if gives_way {
            self.end_process(number);
            self.did("nodes that gave way", number, 0);
        }
        if let Some(cursor) = cursor {
            self.send_cursor(life, &cursor);
        }
    }

    /// A client is not connected any more.
    fn remove(&mut self, device: Device) {
        if let Some(client) = self.clients.remove(&device) {
            client.check(device, &self.logs);
        }
    }

    /// A process is gone, and with it its connections.
    fn end_process(&mut self, number: usize) {
        self.collect(number);
        let Some(node) = self.nodes[number].take() else { return };
        node.count(&mut self.summary);
        let life = node.life();
        let clients: Vec<_> = self.clients.iter().filter(|(_, it)| it.life == life).collect();
        let devices: Vec<_> = clients.into_iter().map(|(device, _)| *device).collect();
        devices.into_iter().for_each(|device| self.remove(device));
        for assigned in self.assigned.iter_mut().filter(|it| **it == Some(number)) {
            *assigned = None;
        }
    }

    fn connect(&mut self) {
        let device = (self.below(USERS), self.below(DEVICES));
        let Some(number) = self.running() else { return };
        if self.weather.is_mild && self.below(2) == 0 {
            self.route_a_burst(number);
        }
        self.connect_to(number, device);
    }

    /// The node routes some records right before a client comes, as far as it knows their members.
    fn route_a_burst(&mut self, number: usize) {
        for _ in 0..4 {
            let conversation = self.below(USERS);
            self.logs.append(conversation, 0);
            self.summary.count("records");
        }
        let now_ms = self.now_ms;
        if let Some(node) = &mut self.nodes[number] {
            node.turn(now_ms);
        }
        self.collect(number);
    }

    fn connect_to(&mut self, number: usize, device: Device) {
        let Some(node) = &mut self.nodes[number] else { return };
        let Some(slot) = node.manager.admit(device) else { return };
        let life = node.life();
        // The old connection is dead; its node finds out when it reads the new beginning.
        self.remove(device);
        let ends = self.logs.ends();
        // The first device of each user keeps no cursor.
        let returning = (self.weather.has_cursors && device.1 > 0).then(|| {
            let returning = self.returning.entry(device).or_default();
            if returning.cursor.is_none() {
                returning.base = ends;
            }
            returning.cursor.clone()
        });
        let node = self.nodes[number].as_ref();
        let returning = node.zip(returning).map(|(node, cursor)| {
            let has_cursor = cursor.is_some();
            let reader = node.replay(slot, device, cursor);
            ReturningSession::new(reader, has_cursor, &self.runtime)
        });
        let client = ClusterClient { life, slot, ends, got: Default::default(), returning };
        self.clients.insert(device, client);
        self.did("sessions", number, u64::from(slot));
    }

    fn disconnect(&mut self) {
        let device = (self.below(USERS), self.below(DEVICES));
        self.disconnect_device(device);
    }

    fn disconnect_device(&mut self, device: Device) {
        let Some(ClusterClient { life, slot, .. }) = self.clients.get(&device) else { return };
        let node = self.nodes.iter_mut().flatten().find(|node| node.life() == *life);
        if let Some(node) = node {
            node.manager.end(*slot);
        }
        self.remove(device);
    }

    fn kill(&mut self) {
        let number = self.below(PROCESSES);
        if self.nodes[number].is_some() {
            self.end_process(number);
            self.did("nodes killed", number, 0);
        }
    }

    /// A node stops in good order.
    fn leave(&mut self) {
        let Some(number) = self.running() else { return };
        let Some(node) = &mut self.nodes[number] else { return };
        for (partition, commit) in node.leave(&mut self.logs) {
            if self.assigned[partition] == Some(number) {
                self.logs.commit(partition, commit);
            }
        }
        self.end_process(number);
        self.did("nodes stopped", number, 0);
    }

    fn stall(&mut self) {
        let number = self.below(PROCESSES);
        // Some last about as long as a node may not renew its lease.
        let node_timeout_ms = self.weather.node_timeout_ms;
        let range = match self.below(3) {
            0 if !self.weather.is_mild => node_timeout_ms - 5_000..node_timeout_ms,
            _ => 1_000..self.weather.stall_ms,
        };
        let for_ms = self.random.random_range(range);
        let now_ms = self.now_ms;
        if let Some(node) = &mut self.nodes[number] {
            node.stall.begin(now_ms, for_ms);
            self.did("nodes stalled", number, for_ms);
        }
    }

    /// The group takes partitions from nodes that do not answer, and assigns what nobody has.
    fn check_group(&mut self) {
        for partition in 0..PARTITIONS {
            if let Some(number) = self.assigned[partition]
                && let Some(node) = &self.nodes[number]
                && node.stall.was_removed(self.now_ms)
            {
                self.assigned[partition] = None;
                self.did("partitions lost by a stalled node", number, partition as u64);
            }
            if self.assigned[partition].is_none()
                && let Some(number) = self.running()
            {
                self.assign(partition, number);
            }
        }
    }

    fn assign(&mut self, partition: usize, number: usize) {
        let Some(node) = &mut self.nodes[number] else { return };
        let commit = self.logs.committed(partition);
        let mut claimed = Commit { generation: commit.generation + 1, ..commit };
        if commit.generation == 0 {
            // Nothing was ever routed, so no beginning has to be replayed.
            claimed.table = node.table_read_to();
        }
        self.logs.commit(partition, claimed);
        let since_ms = self.now_ms.saturating_sub(self.weather.tail_age_ms);
        let fill_from = self.logs.appended_since(partition, since_ms).min(claimed.offset);
        let fill_from = fill_from.max(self.logs.low(partition));
        node.assign(&self.logs, partition, claimed, fill_from);
        self.assigned[partition] = Some(number);
        if claimed.offset < self.logs.low(partition) {
            self.did("partitions assigned whose next records are gone", number, partition as u64);
        }
        self.did("partitions assigned", number, partition as u64);
    }

    /// A partition moves to another node, while the former owner gives it back.
    fn rebalance(&mut self) {
        let partition = self.below(PARTITIONS);
        self.give_back(partition);
    }

    fn give_back(&mut self, partition: usize) {
        let Some(former) = self.assigned[partition] else { return };
        let Some(node) = &mut self.nodes[former] else { return };
        if !node.stall.is_on(self.now_ms) {
            let commit = node.release(partition, self.now_ms);
            self.collect(former);
            if let Some(commit) = commit {
                self.logs.commit(partition, commit);
            }
            self.did("partitions released", former, partition as u64);
        }
        self.assigned[partition] = None;
    }

    /// Lets everything come to rest: all nodes go on, everything is read, stored and acknowledged.
    fn settle(&mut self) {
        trace::note("everything comes to rest", [0; 4]);
        for node in self.nodes.iter_mut().flatten() {
            node.stall.end();
        }
        let (mut rounds, mut quiet) = (0, 0);
        while quiet < QUIET_ROUNDS {
            rounds += 1;
            assert!(rounds < 100 * QUIET_ROUNDS, "the cluster does not come to rest");
            self.now_ms += 100;
            self.logs.now_ms = self.now_ms;
            self.check_group();
            let before = self.summary.counts.get("deliveries").copied();
            for number in 0..PROCESSES {
                for action in 0..10 {
                    self.act(number, action, usize::MAX);
                }
                self.manage(number);
            }
            if self.weather.has_cursors {
                self.drive_replays(100);
            }
            let rests = self.nodes.iter().flatten().all(|node| node.rests(&self.logs));
            let is_quiet = rests && self.summary.counts.get("deliveries").copied() == before;
            quiet = if is_quiet { quiet + 1 } else { 0 };
        }
        // In the last round some nodes renewed their leases after others had read.
        for node in self.nodes.iter_mut().flatten() {
            node.read_sessions(&self.logs, usize::MAX);
        }
    }

    /// Everything is at rest: every client has everything.
    fn check(&self) {
        for epoch in self.nodes.iter().flatten().filter_map(SimulatedNode::living) {
            for node in self.nodes.iter().flatten() {
                let dead = node.takes_for_dead(epoch);
                assert!(!dead, "{epoch:?} lives, but not for process {}", node.life());
            }
        }
        for (device, client) in &self.clients {
            let is_live = client.returning.as_ref().is_none_or(ReturningSession::is_live);
            assert!(is_live, "{device:?} still waits for its replay");
            let missed = client.check(*device, &self.logs);
            if missed == [None; PARTITIONS] {
                continue;
            }
            println!(
                "{:?}, assigned {:?}, ends {:?}",
                self.weather,
                self.assigned,
                self.logs.ends()
            );
            for node in self.nodes.iter().flatten() {
                println!("{}", node.describe(&self.logs));
            }
            panic!(
                "{device:?} in slot {} of process {} missed {missed:?}",
                client.slot, client.life
            );
        }
    }
}
