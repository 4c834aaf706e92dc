//! One node of the simulated cluster: the real router, table, holder and tails around simulated clients.

mod inspection;
mod shard;

use crate::service::members::beginnings::Beginnings;
use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::logs::{Commit, HAND_OFF_PARTITIONS, Logs, StoredHandOff, TOPIC};
use super::manager::{EpochWatch, SimulatedManager, address};
use super::members::{ConversationsService, membership};
use super::queues::{OwnedPartition, RoutedCells, SessionsQueue, SimulatedSink, positions};
use super::stalls::Stall;
use super::weather::{FOREVER_MS, Weather};
use crate::domain::budget::EventBudget;
use crate::domain::cursor::RoutedPositions;
use crate::handoff::{Doorbell, Pushed, ShardEnd, connect};
use crate::service::backends::ports::MissedEvents;
use crate::service::cluster::announcer::SessionAnnouncer;
use crate::service::cluster::holder::Holder;
use crate::service::cluster::lease::{LeaseKeeper, LeaseParts, LeaseState};
use crate::service::cluster::missed::MissedSessions;
use crate::service::cluster::nodes::RENEWAL_MS;
use crate::service::cluster::own_epoch::OwnEpoch;
use crate::service::cluster::ports::{
    HandOffReceiver as _, HandOffSink, HandOffStored, IncomingHandOff, NodeEpoch, SessionsLog as _,
};
use crate::service::cluster::table::{SessionTable, TableConfig, TableCounters, TableListener};
use crate::service::cluster::tail::TailBudget;
use crate::service::members::directory::Directory;
use crate::service::members::membership::Membership;
use crate::service::routing::router::Ownership;
use crate::service::routing::router::holding::HandOffInboxes;
use crate::service::routing::router::owner::ClusterParts;
use crate::service::routing::router::{
    Assignment, CommittableOffset, CommittableTable, GroupReplays, ReplayChunkMax, Router,
    RouterConfig, RouterControl, RouterCounters, RouterParts, TailFill, TopicPartition,
};

/// Changes of sessions that may wait besides.
const CHANGES_MAX: usize = 6;
/// How long a starting node waits for the lease of another one, ms.
const NODE_WITHOUT_LEASE_MS: u64 = 60_000;
/// Slots of a ring.
const RING_SLOTS: usize = 8;

/// A router, and its ring to the shard.
struct SimulatedRouter {
    router: Router,
    control: RouterControl,
    shard: ShardEnd,
    counters: Arc<RouterCounters>,
}

pub(super) struct SimulatedNode {
    /// Its number. Processes of the same number have the same instance.
    number: usize,
    /// The process, by which the cluster tells its clients apart.
    life: u64,
    table: Arc<SessionTable>,
    table_counters: Arc<TableCounters>,
    pub(super) manager: SimulatedManager,
    keeper: LeaseKeeper,
    /// The clock of the keeper is ahead by this, ms.
    keeper_ahead_ms: u64,
    service: Option<Arc<ConversationsService>>,
    membership: Arc<Membership>,
    routers: Vec<SimulatedRouter>,
    inboxes: HandOffInboxes,
    sink: Arc<SimulatedSink>,
    /// Stored hand-offs whose acknowledgement has not arrived.
    unacknowledged: VecDeque<(i32, StoredHandOff, HandOffStored)>,
    writes: Arc<SessionsQueue>,
    routed: RoutedCells,
    owned: BTreeMap<usize, OwnedPartition>,
    sessions_read: usize,
    /// The end of the sessions topic when the node began to read it.
    sessions_end: usize,
    /// Whether that end is reached.
    following: Arc<AtomicBool>,
    hand_off_partition: usize,
    hand_offs_read: usize,
    delivered: Vec<(u32, usize, i64)>,
    shard_positions: RoutedPositions,
    replays: GroupReplays,
    pub(super) stall: Stall,
}

fn log(partition: usize) -> TopicPartition {
    TopicPartition { topic: TOPIC.into(), topic_index: 0, partition: partition as i32 }
}

impl SimulatedNode {
    /// Starts a node: it reads the table, and its lease is stored.
    pub(super) fn start(
        number: usize,
        life: u64,
        logs: &mut Logs,
        runtime: tokio::runtime::Handle,
        weather: &Weather,
    ) -> Self {
        let now_ms = logs.now_ms;
        let bell = Arc::new(Doorbell::new().expect("an eventfd"));
        let holder = Arc::<Mutex<Holder>>::default();
        let sink = Arc::new(SimulatedSink::new(weather.hand_off_bytes_max));
        let beginnings = Beginnings::new(weather.beginnings_max);
        let directory = Arc::new(Directory::with_beginnings(beginnings));
        let missed = Arc::new(MissedSessions::new(
            Arc::clone(&directory),
            Some(Arc::clone(&holder)),
            Arc::clone(&bell),
        ));
        let own = Arc::new(OwnEpoch::new(Arc::clone(&holder), Arc::clone(&missed) as _));
        let watch = Arc::new(EpochWatch::new(Arc::clone(&own)));
        let topics: Arc<[Arc<str>]> = Arc::from([Arc::from(TOPIC)]);
        let config = TableConfig {
            topics: topics.to_vec(),
            node_timeout_ms: weather.node_timeout_ms as i64,
            newcomers_age_ms: weather.tail_age_ms as i64,
            beginnings_max: weather.beginnings_max,
        };
        let listener = Arc::clone(&watch) as Arc<dyn TableListener>;
        let table_counters = Arc::<TableCounters>::default();
        let table = Arc::new(SessionTable::new(config, listener, Arc::clone(&table_counters)));
        let service =
            weather.has_service.then(|| Arc::new(ConversationsService::new(weather.latest_first)));
        let membership = membership(service.clone(), runtime);
        let cluster = ClusterParts {
            table: Arc::clone(&table),
            holder,
            sink: Arc::clone(&sink) as Arc<dyn HandOffSink>,
            missed: Arc::clone(&missed) as Arc<dyn MissedEvents>,
            topics: Arc::clone(&topics),
            answers: Arc::default(),
        };
        let tails = TailBudget::new(weather.tail_bytes, weather.tail_age_ms);
        let router = |_| {
            let shard_bell = Arc::new(Doorbell::new().expect("an eventfd"));
            let (link, shard) = connect([RING_SLOTS, 4_096], &shard_bell, &bell);
            let counters = Arc::<RouterCounters>::default();
            let (router, control) = Router::new(RouterParts {
                config: RouterConfig {
                    batch_max: 4,
                    // Records given up are not what is tested.
                    route_retry_max_ms: FOREVER_MS,
                    large_members: weather.large_members,
                    audience_bytes_max: weather.audience_bytes_max,
                    ..RouterConfig::default()
                },
                counters: Arc::clone(&counters),
                bell: Arc::clone(&bell),
                budget: EventBudget::new(1 << 28),
                links: vec![link],
                directory: Arc::clone(&directory),
                membership: Arc::clone(&membership),
                user_lists: None,
                remote: None,
                cluster: Some(cluster.clone()),
                tails: Some(Arc::clone(&tails)),
                dead_letters: None,
            });
            SimulatedRouter { router, control, shard, counters }
        };
        let routers: Vec<_> = (0..weather.routers).map(router).collect();
        let controls = routers.iter().map(|it| it.control.clone()).collect();
        let max = ReplayChunkMax { records: 8, bytes: 2_000 };
        let replays = GroupReplays::new(controls, cluster.clone(), max);
        let missed_by_all = Arc::clone(&missed);
        let losses = Arc::<AtomicU64>::default();
        let all_missed = Arc::clone(&losses);
        let inboxes = HandOffInboxes {
            routers: routers.iter().map(|it| it.control.clone()).collect(),
            topics,
            missed: Box::new(move || {
                all_missed.fetch_add(1, Ordering::Relaxed);
                missed_by_all.missed_by_all();
            }),
        };
        let hand_off_partition = life as usize % HAND_OFF_PARTITIONS;
        let (writes, routed) = (Arc::<SessionsQueue>::default(), RoutedCells::default());
        let announcer = Arc::new(SessionAnnouncer::new(
            Arc::clone(&own),
            Arc::clone(&table),
            Arc::clone(&writes) as _,
            CHANGES_MAX,
            Arc::default(),
        ));
        let following = Arc::<AtomicBool>::default();
        let is_read = Arc::clone(&following);
        let (cells, mut lives, epoch) = (Arc::clone(&routed), life << 16, Arc::clone(&watch));
        let keeper = LeaseKeeper::new(LeaseParts {
            instance: format!("node-{number}"),
            host: String::new(),
            version: String::new(),
            hand_off_partition: Box::new(move || Some(hand_off_partition as i32)),
            table: Arc::clone(&table),
            own,
            announcer: Arc::clone(&announcer),
            writer: Arc::clone(&writes) as _,
            is_read: Box::new(move || is_read.load(Ordering::Relaxed)),
            routed: Box::new(move || vec![positions(&cells)]),
            set_epoch: Box::new(move |it| epoch.set_epoch(it)),
            new_epoch: Box::new(move || {
                lives += 1;
                NodeEpoch(lives)
            }),
        });
        let mut node = Self {
            number,
            life,
            manager: SimulatedManager::new(directory, announcer, missed, watch, losses),
            table,
            table_counters,
            keeper,
            keeper_ahead_ms: 0,
            service,
            membership,
            routers,
            inboxes,
            sink,
            unacknowledged: VecDeque::new(),
            writes,
            routed,
            owned: BTreeMap::new(),
            sessions_read: 0,
            sessions_end: logs.sessions.len(),
            following: Arc::clone(&following),
            hand_off_partition,
            hand_offs_read: logs.hand_offs[hand_off_partition].end(),
            delivered: Vec::new(),
            shard_positions: RoutedPositions::default(),
            replays,
            stall: Stall::default(),
        };
        node.read_sessions(logs, usize::MAX);
        node.renew(now_ms);
        if *node.keeper.state() == LeaseState::Reading {
            // A node without a lease has left sessions: it is dead.
            node.keeper_ahead_ms = NODE_WITHOUT_LEASE_MS;
            node.renew(now_ms);
        }
        if *node.keeper.state() == LeaseState::Watching {
            // The former node of this number is dead.
            node.keeper_ahead_ms += 3 * RENEWAL_MS as u64;
            node.renew(now_ms);
        }
        node.store(logs, usize::MAX);
        node.read_sessions(logs, usize::MAX);
        node.renew(now_ms);
        assert_eq!(*node.keeper.state(), LeaseState::Living);
        node
    }

    pub(super) fn table_read_to(&self) -> i64 {
        self.table.next_offset()
    }

    pub(super) fn number(&self) -> usize {
        self.number
    }

    pub(super) fn life(&self) -> u64 {
        self.life
    }

    /// One turn of the routers, and of the shard.
    pub(super) fn turn(&mut self, now_ms: u64) {
        (0..self.routers.len()).for_each(|number| self.turn_router(number, now_ms));
        self.turn_shards();
    }

    /// One turn of one router, chosen by a number.
    pub(super) fn turn_router(&mut self, number: usize, now_ms: u64) {
        let routers = self.routers.len();
        if let Some(router) = self.routers.get_mut(number % routers) {
            assert!(matches!(router.router.turn(now_ms), ControlFlow::Continue(_)));
        }
    }

    pub(super) fn take_delivered(&mut self) -> Vec<(u32, usize, i64)> {
        std::mem::take(&mut self.delivered)
    }

    pub(super) fn read_sessions(&mut self, logs: &Logs, amount: usize) {
        let to = self.sessions_read.saturating_add(amount).min(logs.sessions.len());
        for offset in self.sessions_read..to {
            match &logs.sessions[offset] {
                Some(record) => self.table.record(record.clone()),
                None if offset < self.sessions_end => {}
                None => return self.lose_position(logs),
            }
        }
        self.sessions_read = to;
        if to >= self.sessions_end {
            self.table.read_to(to as i64);
            self.following.store(true, Ordering::Relaxed);
        }
    }

    /// The position in the sessions topic is lost: it is read again from the start.
    pub(super) fn lose_position(&mut self, logs: &Logs) {
        self.following.store(false, Ordering::Relaxed);
        self.table.fell_behind();
        self.sessions_read = 0;
        self.sessions_end = logs.sessions.len();
    }

    pub(super) fn read_hand_offs(&mut self, logs: &Logs, amount: usize) {
        let stored = &logs.hand_offs[self.hand_off_partition];
        if self.hand_offs_read < stored.low() {
            self.inboxes.missed();
            self.hand_offs_read = stored.low();
        }
        for _ in 0..amount {
            let Some(hand_off) = stored.get(self.hand_offs_read) else { break };
            if hand_off.to == self.table.own_epoch() {
                let (header, value) = (hand_off.header.clone(), hand_off.value.clone());
                let received = self.inboxes.receive(IncomingHandOff { header, value });
                if !matches!(received, Pushed::Accepted) {
                    break;
                }
            }
            self.hand_offs_read += 1;
        }
        self.inboxes.read_to(self.hand_offs_read as i64);
    }

    /// Stores what is queued for both topics.
    pub(super) fn store(&mut self, logs: &mut Logs, amount: usize) {
        for _ in 0..amount {
            let Some((partition, record, stored)) =
                self.sink.queue.lock().expect("one thread").pop_front()
            else {
                break;
            };
            logs.hand_off(partition, record.clone());
            self.unacknowledged.push_back((partition, record, stored));
        }
        for _ in 0..amount {
            let next = self.writes.0.lock().expect("one thread").pop_front();
            let Some((key, value)) = next else { break };
            logs.session(key, value.map(Into::into));
        }
    }

    /// The acknowledgements of stored hand-offs are lost: they are stored again, in the same order.
    pub(super) fn store_again(&self, logs: &mut Logs) {
        for (partition, record, _) in &self.unacknowledged {
            logs.hand_off(*partition, record.clone());
        }
    }

    /// The acknowledgements of stored hand-offs arrive.
    pub(super) fn acknowledge(&mut self, amount: usize) {
        for _ in 0..amount {
            let Some((_, _, stored)) = self.unacknowledged.pop_front() else { break };
            stored();
        }
    }

    /// Renews the lease, if it is time, and writes what waits.
    pub(super) fn renew(&mut self, now_ms: u64) {
        self.keeper.turn(now_ms + self.keeper_ahead_ms);
        self.manager.flush();
    }

    /// The router of a partition.
    fn control(&self, partition: usize) -> &RouterControl {
        &self.routers[partition % self.routers.len()].control
    }

    pub(super) fn assign(
        &mut self,
        logs: &Logs,
        partition: usize,
        claimed: Commit,
        fill_from: i64,
    ) {
        self.drop_partition(partition);
        let start = claimed.offset.max(logs.low(partition));
        let is_lost = start > claimed.offset;
        if is_lost {
            // The sessions of this node, as its Kafka thread does.
            self.inboxes.missed();
        }
        let (committable, settled, routed) = (
            Arc::new(CommittableOffset::new((!is_lost).then_some(start))),
            Arc::new(CommittableTable::new(claimed.table)),
            Arc::new(AtomicI64::new(start)),
        );
        let source = logs.source(partition, fill_from);
        let has_expired = Arc::clone(&source.has_expired);
        self.control(partition).assign(Assignment {
            log: log(partition),
            source: Box::new(source),
            start: Some(start),
            fill: Some(TailFill::new(fill_from)),
            committable: Arc::clone(&committable),
            ownership: Some(Ownership {
                generation: claimed.generation,
                start,
                table: claimed.table,
                barrier: logs.hand_offs[self.hand_off_partition].end() as i64,
                settled: Arc::clone(&settled),
                routed: Arc::clone(&routed),
                lost_from: is_lost.then_some(claimed.offset),
            }),
        });
        let generation = claimed.generation;
        let owned = OwnedPartition { generation, committable, settled, routed, has_expired };
        let cell = (generation, Arc::clone(&owned.routed));
        self.routed.lock().expect("one thread").insert(partition, cell);
        self.owned.insert(partition, owned);
    }

    fn drop_partition(&mut self, partition: usize) {
        self.routed.lock().expect("one thread").remove(&partition);
        if self.owned.remove(&partition).is_some() {
            let released = self.control(partition).revoke(log(partition), Duration::ZERO);
            // At the next turn.
            drop(released);
        }
    }

    /// Gives a partition back. Returns its last commit.
    pub(super) fn release(&mut self, partition: usize, now_ms: u64) -> Option<Commit> {
        self.turn(now_ms);
        let commit = self.owned.get(&partition)?.commit();
        self.drop_partition(partition);
        self.turn(now_ms + 1);
        commit
    }

    /// The partitions whose sources are at positions that have expired.
    pub(super) fn expired(&self) -> Vec<usize> {
        let has_expired = |owned: &OwnedPartition| owned.has_expired.load(Ordering::Relaxed);
        let expired = self.owned.iter().filter(|(_, owned)| has_expired(owned));
        expired.map(|(partition, _)| *partition).collect()
    }

    /// The node finds out that it has lost partitions.
    pub(super) fn notice_lost(&mut self, is_lost: impl Fn(usize) -> bool) {
        for partition in self.owned.keys().copied().filter(|it| is_lost(*it)).collect::<Vec<_>>() {
            self.drop_partition(partition);
        }
    }

    pub(super) fn commits(&self) -> Vec<(usize, Commit)> {
        let commits = self.owned.iter();
        commits.filter_map(|(partition, owned)| Some((*partition, owned.commit()?))).collect()
    }

    /// Drops the lists of members.
    pub(super) fn forget_members(&mut self) {
        if self.service.is_some() {
            self.membership.clear();
            self.membership.follow();
        }
    }

    /// The conversation service answers this many requests.
    pub(super) fn answer(&mut self, amount: usize, runtime: &tokio::runtime::Runtime) {
        if let Some(service) = &self.service {
            service.answer(amount, runtime);
        }
    }

    /// Stops in good order. Returns the last commits.
    pub(super) fn leave(&mut self, logs: &mut Logs) -> Vec<(usize, Commit)> {
        let now_ms = logs.now_ms;
        let owned: Vec<_> = self.owned.keys().copied().collect();
        let commits = owned.into_iter().filter_map(|it| Some((it, self.release(it, now_ms)?)));
        let commits = commits.collect();
        self.manager.end_all();
        self.keeper.stop();
        while !matches!(self.keeper.state(), LeaseState::Stopped | LeaseState::InUse(_)) {
            self.keeper.turn(now_ms);
            self.store(logs, usize::MAX);
        }
        commits
    }
}
