//! The table of sessions: on which nodes each user has a session, as the sessions topic says.
//!
//! Every node reads the whole topic and keeps an entry of 16 bytes per session. Routers look users up for every record.
//! One thread applies the topic. What it learns beyond the table, it tells a [`TableListener`].
//!
//! **What an owner sees.** A lane looks the table up as of its own *T*: it ignores entries whose beginning it has not
//! applied. Otherwise it would name a session in a record before it has replayed the earlier ones to it. So a beginning
//! is noted ([`Newcomers`]) before its entry is visible. An entry that is visible already stays so: the user had a
//! session on that node before, and owners that name the user reach the new one too.
//!
//! **Hashes.** They are keyed per process. A collision of two users costs a copy that the holder discards. A collision
//! of two devices of one user on one node (2⁻⁴⁸) is the only one that could hide a session.
//!
//! **Replacement.** Of two sessions of one user and device on two nodes, the one whose beginning is later in the log
//! wins. A node that reads a foreign beginning closes its own session with 4000 if it has read that session's beginning
//! before. It compares serials: it has read its own beginnings in their order.
//!
//! **The end of a node** removes its entries, and its address first, so that no owner hands over to it. Its index is
//! used again only when no entry holds it.

mod leases;

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use hashbrown::{DefaultHashBuilder, HashTable};
use prost::Message as _;

use super::holder::{SessionSerial, SourcePartition};
use super::newcomers::{Newcomer, NewcomerWindow, Newcomers, StatedPosition};
use super::nodes::{EpochEnd, LivingNodes, NodeIndex};
use super::ports::{NodeEpoch, SessionsLog, SessionsRecord};
use super::wire::{Lease, SessionBegun, SessionsKey};
use crate::counters;
use crate::service::members::beginnings::Beginnings;

/// Parts, each with its own lock, so that the writer blocks few readers.
pub const PARTS: usize = 256;
/// A slot of a part, bytes: an entry and its tag.
pub const SLOT_BYTES: usize = size_of::<TableEntry>() + 1;
/// Bits of a device's hash in an entry.
const DEVICE_BITS: u32 = 48;

/// One session: the hash of its user, the hash of its device, the index of its node.
///
/// ```text
/// | user: 64 | device: 48 | node: 16 |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TableEntry {
    user: u64,
    device_and_node: u64,
}

impl TableEntry {
    fn new(user: u64, device: u64, node: NodeIndex) -> Self {
        let device = device & ((1 << DEVICE_BITS) - 1);
        Self { user, device_and_node: device << 16 | u64::from(node.0) }
    }

    fn node(self) -> NodeIndex {
        NodeIndex(self.device_and_node as u16)
    }
}

/// Settings of the table.
#[derive(Clone, Debug)]
pub struct TableConfig {
    /// The topics of events, in the order of their indices.
    pub topics: Vec<Arc<str>>,
    /// How long a node may not renew its lease, by the clock of the log, ms (`NODE_TIMEOUT`).
    pub node_timeout_ms: i64,
    /// How long beginnings are kept for owners that have to replay, ms (`TAIL_AGE`).
    pub newcomers_age_ms: i64,
    /// Users kept in [`SessionTable::beginnings`].
    pub beginnings_max: usize,
}

counters! {
    /// Metrics of the table.
    pub struct TableCounters of SharedCounter {
        Counter records: "Records read from the sessions topic.",
        Counter records_unreadable: "Records of the sessions topic that could not be decoded.",
        Gauge sessions: "Sessions of all nodes in the table.",
        Gauge nodes: "Living nodes, this one included.",
        Gauge newcomers: "Beginnings kept for owners that have to replay.",
        Counter nodes_silent: "LivingNodes whose lease was not renewed in time.",
        Counter restarts: "Times that the position in the sessions topic was lost and the table was read again.",
    }
}

/// Receives what the node itself has to know. Called by the thread that applies the topic, must not block.
pub trait TableListener: Send + Sync + 'static {
    /// The beginning of a session of this node is stored at this offset.
    fn begun(&self, serial: SessionSerial, offset: i64);

    /// A later session of the same user and device has begun on another node. Sessions of this node with
    /// a serial up to `up_to` began before it.
    fn replaced(&self, user: &str, device: &str, up_to: SessionSerial);

    /// The epoch of this node has ended. `by`: the lease of the node that took its place.
    fn ended(&self, why: EpochEnd, by: Option<&Lease>);
}

/// Where a node is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeAddress {
    /// Its epoch.
    pub epoch: NodeEpoch,
    /// The partition of the hand-off topic that it reads.
    pub partition: i32,
    /// Whether it answers replay requests.
    pub answers_replays: bool,
}

/// The table, and what is derived from the sessions topic beside it.
///
/// Locks are taken in this order: `state`, `newcomers`, a part, `addresses`. A caller that looks something up
/// holds one of them at a time.
pub struct SessionTable {
    parts: Box<[RwLock<HashTable<TableEntry>>]>,
    /// Keyed per process, so that nobody can construct users whose hashes collide.
    hasher: DefaultHashBuilder,
    device_hasher: DefaultHashBuilder,
    /// Where each node is, by index. `None`: not alive, or its lease was not read yet.
    addresses: RwLock<Vec<Option<NodeAddress>>>,
    newcomers: RwLock<Newcomers>,
    /// The users whose sessions began lately, for routers that remember who is connected.
    beginnings: Beginnings,
    /// Every record below this offset is applied.
    read_to: AtomicI64,
    /// No entry began at or above this offset. Set before the entry is inserted.
    begun_to: AtomicI64,
    own_epoch: AtomicU64,
    /// Records in the topic that nodes left behind which have ended, as far as they were seen since the last
    /// [`SessionTable::take_leftovers`].
    leftovers: AtomicU64,
    state: Mutex<WriterState>,
    /// Offset and append time of the first record that was read.
    first_record: OnceLock<(i64, i64)>,
    config: TableConfig,
    listener: Arc<dyn TableListener>,
    counters: Arc<TableCounters>,
}

/// State of the thread that applies the topic.
#[derive(Debug, Default)]
struct WriterState {
    nodes: LivingNodes,
    own: Option<NodeEpoch>,
    /// The highest serial of this node that was read.
    own_serial: SessionSerial,
    /// See [`SessionTable::is_whole`].
    is_whole: bool,
    /// Every record below this offset is read; `None`: the first pass is not at its end.
    reached: Option<i64>,
    /// See [`SessionTable::take_woken`].
    woken: BTreeSet<NodeEpoch>,
    /// Until this clock no lease has to be checked.
    leases_until_ms: i64,
    /// The clock when old newcomers were last removed.
    pruned_ms: i64,
}

impl SessionTable {
    /// An empty table.
    pub fn new(
        config: TableConfig,
        listener: Arc<dyn TableListener>,
        counters: Arc<TableCounters>,
    ) -> Self {
        let beginnings = Beginnings::new(config.beginnings_max);
        Self {
            beginnings,
            parts: (0..PARTS).map(|_| RwLock::default()).collect(),
            hasher: DefaultHashBuilder::default(),
            device_hasher: DefaultHashBuilder::default(),
            addresses: RwLock::default(),
            newcomers: RwLock::new(Newcomers::new(config.newcomers_age_ms)),
            read_to: AtomicI64::new(0),
            begun_to: AtomicI64::new(0),
            own_epoch: AtomicU64::new(0),
            leftovers: AtomicU64::new(0),
            state: Mutex::default(),
            first_record: OnceLock::new(),
            config,
            listener,
            counters,
        }
    }

    /// Memory of one session, bytes: an entry and its tag, in parts that are filled to seven eighths at most
    /// and to half of that at least.
    pub const ENTRY_BYTES: usize = SLOT_BYTES * 16 / 7;

    /// Memory of the entries, bytes.
    pub fn bytes(&self) -> usize {
        let parts = self.parts.iter();
        parts.map(|part| part.read().expect("no holder panics").allocation_size()).sum()
    }

    /// The epoch under which this node writes from now on.
    pub fn set_own_epoch(&self, epoch: NodeEpoch) {
        let mut state = self.state();
        self.own_epoch.store(epoch.0, Ordering::Release);
        state.own = Some(epoch);
        state.own_serial = SessionSerial(0);
    }

    /// The epoch of this node.
    pub fn own_epoch(&self) -> NodeEpoch {
        NodeEpoch(self.own_epoch.load(Ordering::Acquire))
    }

    /// Every record of the topic below this offset is applied.
    pub fn next_offset(&self) -> i64 {
        self.read_to.load(Ordering::Acquire)
    }

    /// Whether the topic had records before this Unix time in ms, by the clock of its brokers. Its offsets begin at 0,
    /// also if compaction has removed the first ones.
    pub fn is_older_than(&self, at_ms: i64) -> bool {
        self.first_record
            .get()
            .is_some_and(|(offset, written_ms)| *offset > 0 || *written_ms < at_ms)
    }

    /// The users whose sessions began lately, on any node. A user is there before [`SessionTable::next_offset`] moves
    /// past the beginning.
    pub fn beginnings(&self) -> &Beginnings {
        &self.beginnings
    }

    /// Calls `visit` for each node that holds a session of the user, once each, for an owner that has
    /// applied beginnings below `applied`. Returns the number of their sessions, also of those whose beginning it has
    /// not applied.
    pub fn nodes_of(&self, user: &str, applied: i64, mut visit: impl FnMut(NodeIndex)) -> usize {
        let hash = self.hasher.hash_one(user);
        // Copied, because the writer locks the newcomers before a part.
        let mut few = [TableEntry { user: 0, device_and_node: 0 }; 4];
        let (mut count, mut many) = (0, Vec::new());
        {
            let table = self.part(hash).read().expect("no holder panics");
            for entry in table.iter_hash(hash).filter(|entry| entry.user == hash) {
                match few.get_mut(count) {
                    Some(slot) => (*slot, count) = (*entry, count + 1),
                    None => many.push(*entry),
                }
            }
        }
        let mut last = None;
        for entry in few[..count].iter().chain(&many) {
            if last == Some(entry.node()) || !self.is_applied(entry, applied) {
                continue;
            }
            // More than two nodes of one user are rare, so the repetition is left to the caller.
            last = Some(entry.node());
            visit(entry.node());
        }
        count + many.len()
    }

    fn is_applied(&self, entry: &TableEntry, applied: i64) -> bool {
        applied >= self.begun_to.load(Ordering::Acquire)
            || self
                .newcomers
                .read()
                .expect("no holder panics")
                .begin_of(entry.user, entry.device_and_node)
                .is_none_or(|begin| begin < applied)
    }

    /// Where a node is; `None`: it is not alive any more.
    pub fn address(&self, node: NodeIndex) -> Option<NodeAddress> {
        let addresses = self.addresses.read().expect("no holder panics");
        addresses.get(usize::from(node.0)).copied().flatten()
    }

    /// The sessions that began at or above `from` and below `to`.
    pub fn newcomers(&self, from: i64, to: i64) -> NewcomerWindow {
        self.newcomers.read().expect("no holder panics").window(from, to)
    }

    /// All other nodes that are alive.
    pub fn others(&self) -> Vec<NodeAddress> {
        let own = self.own_epoch();
        let addresses = self.addresses.read().expect("no holder panics");
        addresses.iter().flatten().filter(|address| address.epoch != own).copied().collect()
    }

    /// Where the node is that owns a source partition, as far as it has stated that in a lease.
    pub fn owner(&self, source: SourcePartition) -> Option<NodeAddress> {
        let owner = self.newcomers.read().expect("no holder panics").owner(source);
        self.address(owner?)
    }

    /// The source partitions that an owner has ever stated.
    pub fn sources(&self) -> Vec<SourcePartition> {
        self.newcomers.read().expect("no holder panics").sources().collect()
    }

    /// The session that began at this offset, if that was lately.
    pub fn newcomer(&self, begin: i64) -> Option<Arc<Newcomer>> {
        let window = self.newcomers.read().expect("no holder panics").window(begin, begin + 1);
        window.newcomers.into_iter().next()
    }

    /// The highest generation that an owner of a source partition has stated; 0: none.
    pub fn generation(&self, source: SourcePartition) -> i64 {
        self.newcomers.read().expect("no holder panics").generation(source)
    }

    /// The next offset of a source partition that its owner had stated below `as_of`: records from it on
    /// may have been appended after that.
    pub fn routed(&self, source: SourcePartition, as_of: i64) -> StatedPosition {
        self.newcomers.read().expect("no holder panics").routed(source, as_of)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, WriterState> {
        self.state.lock().expect("no holder panics")
    }

    fn part(&self, hash: u64) -> &RwLock<HashTable<TableEntry>> {
        // The table uses the low bits for its groups and the high seven for its tags.
        &self.parts[(hash >> 40) as usize % PARTS]
    }

    fn entry(&self, key: &SessionsKey, node: NodeIndex) -> TableEntry {
        let user = self.hasher.hash_one(key.user.as_str());
        TableEntry::new(user, self.device_hasher.hash_one(key.device.as_str()), node)
    }

    fn contains(&self, entry: TableEntry) -> bool {
        let table = self.part(entry.user).read().expect("no holder panics");
        table.find(entry.user, |known| *known == entry).is_some()
    }

    /// Returns whether the entry is new.
    fn insert(&self, entry: TableEntry) -> bool {
        let mut table = self.part(entry.user).write().expect("no holder panics");
        if table.find(entry.user, |known| *known == entry).is_some() {
            return false;
        }
        table.insert_unique(entry.user, entry, |known| known.user);
        self.counters.sessions.add(1);
        true
    }

    fn remove(&self, entry: TableEntry) {
        let mut table = self.part(entry.user).write().expect("no holder panics");
        if let Ok(found) = table.find_entry(entry.user, |known| *known == entry) {
            found.remove();
            self.counters.sessions.sub(1);
        }
    }

    /// Removes all entries of a node.
    fn remove_node(&self, node: NodeIndex) {
        for part in &self.parts {
            let mut table = part.write().expect("no holder panics");
            let before = table.len();
            table.retain(|entry| entry.node() != node);
            let removed = (before - table.len()) as u64;
            self.counters.sessions.sub(removed);
            self.add_leftovers(removed);
            if table.capacity() > 64 && table.len() < table.capacity() / 4 {
                let target = table.len() * 2;
                table.shrink_to(target, |known| known.user);
            }
        }
    }

    fn set_address(&self, node: NodeIndex, address: Option<NodeAddress>) {
        let mut addresses = self.addresses.write().expect("no holder panics");
        let index = usize::from(node.0);
        if addresses.len() <= index {
            addresses.resize(index + 1, None);
        }
        addresses[index] = address;
    }

    fn apply_session(
        &self,
        state: &mut WriterState,
        offset: i64,
        key: &SessionsKey,
        begun: Option<SessionBegun>,
    ) {
        let epoch = NodeEpoch(key.epoch);
        let Some(node) = state.nodes.index(epoch) else {
            self.add_leftovers(u64::from(begun.is_some()));
            return;
        };
        let entry = self.entry(key, node);
        let Some(begun) = begun else { return self.remove(entry) };
        let serial = SessionSerial(begun.serial);
        if state.own == Some(epoch) {
            state.own_serial = state.own_serial.max(serial);
            self.listener.begun(serial, offset);
        } else if let Some(own) = state.own
            && let Some(info) = state.nodes.get(own)
            && self.contains(self.entry(key, info.index))
        {
            self.listener.replaced(&key.user, &key.device, state.own_serial);
        }
        let user = Arc::<str>::from(key.user.as_str());
        let newcomer = Newcomer {
            begin: offset,
            as_of: begun.as_of,
            node,
            epoch,
            serial,
            user: Arc::clone(&user),
        };
        let clock_ms = state.nodes.clock_ms();
        let mut newcomers = self.newcomers.write().expect("no holder panics");
        // An entry that is visible already stays so: the user had a session on that node before, and
        // owners that name the user reach the new one too.
        let is_new = !self.contains(entry);
        self.begun_to.store(offset + 1, Ordering::Release);
        newcomers.begun(newcomer, is_new.then_some((entry.user, entry.device_and_node)), clock_ms);
        self.insert(entry);
        // Also if the entry is not new: it may be that of another user with the same hash.
        self.beginnings.push(user);
        self.counters.newcomers.set(newcomers.len() as u64);
    }
}

impl SessionsLog for SessionTable {
    fn record(&self, record: SessionsRecord) {
        let mut guard = self.state();
        let state = &mut *guard;
        self.counters.records.add(1);
        self.first_record.get_or_init(|| (record.offset, record.appended_at_ms));
        state.nodes.tick(record.appended_at_ms);
        self.check_leases(state);
        let SessionsRecord { offset, key: Some(key), value, .. } = record else {
            self.counters.records_unreadable.add(1);
            return;
        };
        let epoch = NodeEpoch(key.epoch);
        match (key.user.is_empty(), value) {
            (true, None) => {
                state.woken.remove(&epoch);
                self.end_epoch(state, epoch, EpochEnd::Stopped, None);
            }
            (true, Some(value)) => match Lease::decode(value) {
                Ok(lease) => self.apply_lease(state, epoch, offset, lease),
                Err(_) => self.counters.records_unreadable.add(1),
            },
            (false, None) => self.apply_session(state, offset, &key, None),
            (false, Some(value)) => match SessionBegun::decode(value) {
                Ok(begun) => self.apply_session(state, offset, &key, Some(begun)),
                Err(_) => self.counters.records_unreadable.add(1),
            },
        }
    }

    fn read_to(&self, next: i64) {
        let mut state = self.state();
        state.reached = Some(next);
        self.publish(&mut state);
    }

    fn restarted(&self) {
        self.counters.restarts.add(1);
        // First: a lane that finds nobody looks at it afterwards.
        self.read_to.store(0, Ordering::Release);
        let mut guard = self.state();
        // Again, because a keeper may have published before the lock.
        self.read_to.store(0, Ordering::Release);
        let state = &mut *guard;
        let living: HashMap<_, _> =
            state.nodes.living().map(|(epoch, info)| (epoch, info.index)).collect();
        for index in living.values() {
            self.set_address(*index, None);
            self.remove_node(*index);
        }
        state.nodes = LivingNodes::default();
        // Beginnings on other nodes are compared with what was read before them.
        state.own_serial = SessionSerial(0);
        // The clock begins at zero again.
        (state.leases_until_ms, state.pruned_ms) = (0, 0);
        (state.is_whole, state.reached) = (false, None);
        state.woken.clear();
        *self.newcomers.write().expect("no holder panics") =
            Newcomers::new(self.config.newcomers_age_ms);
    }

    fn fell_behind(&self) {
        self.restarted();
        if self.state().own.take().is_some() {
            self.listener.ended(EpochEnd::Lost, None);
        }
    }
}
