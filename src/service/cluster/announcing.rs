//! The announcer and the keeper of the lease, against a log that is stored and read late, and a queue that is
//! often full.

mod leasing;

use crate::service::members::beginnings::Beginnings;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use prost::Message as _;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::announcer::{AnnouncerCounters, SessionAnnouncer, Unannounced};
use super::holder::{Holder, RoutedPosition, SessionSerial, SourcePartition};
use super::lease::{InstanceInUse, LeaseKeeper, LeaseParts, LeaseState};
use super::missed::MissedSessions;
use super::nodes::EpochEnd;
use super::own_epoch::OwnEpoch;
use super::ports::{NodeEpoch, SessionsLog as _, SessionsRecord, SessionsWriter};
use super::table::{SessionTable, TableConfig, TableCounters, TableListener};
use super::wire::{Lease, SessionBegun, SessionsKey};
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::handoff::Doorbell;
use crate::service::members::directory::{Directory, SessionIds};

type Write = (SessionsKey, Option<Vec<u8>>);

/// The sessions topic, with a queue before it.
#[derive(Default)]
struct Log {
    queue: Mutex<Vec<Write>>,
    room: AtomicUsize,
    stored: Mutex<Vec<Write>>,
}

impl SessionsWriter for Log {
    fn write(&self, key: &SessionsKey, value: Option<&[u8]>) -> bool {
        let mut queue = self.queue.lock().unwrap();
        let has_room = queue.len() < self.room.load(Ordering::Relaxed);
        if has_room {
            queue.push((key.clone(), value.map(<[u8]>::to_vec)));
        }
        has_room
    }
}

impl Log {
    fn store(&self, amount: usize) {
        let mut queue = self.queue.lock().unwrap();
        let amount = amount.min(queue.len());
        self.stored.lock().unwrap().extend(queue.drain(..amount));
    }
}

struct Fixture {
    log: Arc<Log>,
    directory: Arc<Directory>,
    missed: Arc<MissedSessions>,
    own: Arc<OwnEpoch>,
    table: Arc<SessionTable>,
    announcer: Arc<SessionAnnouncer>,
    holder: Arc<Mutex<Holder>>,
    keeper: LeaseKeeper,
    read: usize,
    now_ms: u64,
    /// Sessions that have missed events.
    closed: Vec<SessionAddress>,
}

const NODE_TIMEOUT_MS: i64 = 60_000;

impl Fixture {
    /// A node on this log. It has done nothing yet.
    fn new(log: Arc<Log>, number: u64, waiting_max: usize) -> Self {
        let directory = Arc::new(Directory::new());
        let holder = Arc::<Mutex<Holder>>::default();
        let missed = Arc::new(MissedSessions::new(
            Arc::clone(&directory),
            Some(Arc::clone(&holder)),
            Arc::new(Doorbell::new().unwrap()),
        ));
        let own = Arc::new(OwnEpoch::new(Arc::clone(&holder), Arc::clone(&missed) as _));
        let config = TableConfig {
            topics: vec![],
            node_timeout_ms: NODE_TIMEOUT_MS,
            newcomers_age_ms: NODE_TIMEOUT_MS,
            beginnings_max: Beginnings::KEPT_MAX,
        };
        let listener = Arc::clone(&own) as Arc<dyn TableListener>;
        let table = SessionTable::new(config, listener, Arc::<TableCounters>::default());
        let table = Arc::new(table);
        // The topic was empty when the node began to read it.
        table.read_to(0);
        let writer = Arc::clone(&log) as Arc<dyn SessionsWriter>;
        let announcer = Arc::new(SessionAnnouncer::new(
            Arc::clone(&own),
            Arc::clone(&table),
            Arc::clone(&writer),
            waiting_max,
            Arc::<AnnouncerCounters>::default(),
        ));
        let mut last = number << 16;
        let keeper = LeaseKeeper::new(LeaseParts {
            instance: "node".into(),
            host: format!("host-{number}"),
            version: "1".into(),
            hand_off_partition: Box::new(|| Some(0)),
            table: Arc::clone(&table),
            own: Arc::clone(&own),
            announcer: Arc::clone(&announcer),
            writer,
            is_read: Box::new(|| true),
            routed: Box::new(Vec::new),
            set_epoch: Box::new(|_| ()),
            new_epoch: Box::new(move || {
                last += 1;
                NodeEpoch(last)
            }),
        });
        let (read, now_ms, closed) = (0, 0, Vec::new());
        Self { log, directory, missed, own, table, announcer, holder, keeper, read, now_ms, closed }
    }

    /// A node whose lease is stored.
    fn living(waiting_max: usize) -> Self {
        let log = Arc::new(Log { room: AtomicUsize::new(8), ..Log::default() });
        let mut node = Self::new(log, 1, waiting_max);
        node.pass(200);
        assert_eq!(*node.keeper.state(), LeaseState::Living);
        node
    }

    /// Applies stored records.
    fn read(&mut self, amount: usize) {
        let stored = self.log.stored.lock().unwrap().clone();
        let to = self.read.saturating_add(amount).min(stored.len());
        for (offset, (key, value)) in stored.into_iter().enumerate().take(to).skip(self.read) {
            self.table.record(SessionsRecord {
                offset: offset as i64,
                appended_at_ms: self.now_ms as i64,
                key: Some(key),
                value: value.map(Into::into),
            });
        }
        self.read = to;
        self.table.read_to(to as i64);
        self.take_missed();
    }

    /// Time passes, in which everything is stored and read.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now_ms += 100;
            self.keeper.turn(self.now_ms);
            self.announcer.flush();
            self.log.store(usize::MAX);
            self.read(usize::MAX);
        }
    }

    /// As the session manager does.
    fn take_missed(&mut self) {
        let batch = self.missed.take();
        for (ids, address) in batch.left {
            match self.directory.find(&ids) {
                None => self.announcer.ended(&ids, address),
                Some(_) => self.announcer.replaced(&ids, address),
            }
            self.closed.push(address);
        }
        self.closed.extend(batch.named);
    }

    fn admit(&self, user: usize, slot: u32) -> Result<Option<SessionAddress>, Unannounced> {
        let epoch = self.announcer.began(&ids(user), address(slot))?;
        let former = self.directory.insert(ids(user), address(slot));
        if let Some(former) = former {
            self.announcer.replaced(&ids(user), former);
        }
        self.announcer.admitted(address(slot), epoch);
        Ok(former)
    }

    fn end(&self, user: usize, slot: u32) {
        if self.directory.remove(&ids(user), address(slot)) {
            self.announcer.ended(&ids(user), address(slot));
        }
    }

    /// What a reader of the compacted topic sees of this epoch: the serial for each user.
    fn view(&self, epoch: u64) -> BTreeMap<String, u64> {
        let mut view = BTreeMap::new();
        for (key, value) in &*self.log.stored.lock().unwrap() {
            if key.epoch != epoch || key.user.is_empty() {
                continue;
            }
            match value {
                Some(value) => {
                    let serial = SessionBegun::decode(&value[..]).unwrap().serial;
                    view.insert(key.user.clone(), serial);
                }
                None => {
                    view.remove(&key.user);
                }
            }
        }
        view
    }
}

fn ids(user: usize) -> SessionIds {
    SessionIds::new(&format!("user-{user}"), "phone")
}

fn address(slot: u32) -> SessionAddress {
    let connection = ConnectionKey { slot, generation: 0 };
    SessionAddress { shard: ShardId(0), encoding: Encoding::Binary, connection }
}

/// In any order of beginnings, ends and replacements, with a queue that is often full, the topic's view is
/// the live sessions once the queue has drained. Serials are in the order of the log, and nothing is written
/// for a session after its end.
#[test]
fn topic_tells_the_live_sessions_whatever_the_order() {
    for seed in 0..300 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut node = Fixture::living(6);
        let epoch = node.own.living().unwrap().0;
        let mut live = HashMap::new();
        let (mut slot, mut refused) = (0, 0);
        for _ in 0..400 {
            match random.random_range(0..10) {
                0..4 => {
                    let user = random.random_range(0..12);
                    slot += 1;
                    match node.admit(user, slot) {
                        Ok(former) => {
                            assert_eq!(live.insert(user, slot), former.map(|it| it.connection.slot))
                        }
                        Err(why) => {
                            assert_eq!(why, Unannounced::Full);
                            refused += 1;
                        }
                    }
                }
                4..7 => {
                    let user = random.random_range(0..12);
                    if let Some(slot) = live.remove(&user) {
                        node.end(user, slot);
                    }
                }
                7 => node.log.room.store(random.random_range(0..4), Ordering::Relaxed),
                8 => node.log.store(random.random_range(0..4)),
                _ => {
                    node.announcer.flush();
                    node.read(random.random_range(0..4));
                }
            }
        }
        assert!(refused > 0, "seed {seed}: the bound was never reached");
        node.log.room.store(usize::MAX, Ordering::Relaxed);
        assert!(node.announcer.flush(), "seed {seed}");
        node.log.store(usize::MAX);
        node.read(usize::MAX);
        let serial = |slot: &u32| node.announcer.serial(address(*slot)).expect("it is live").0;
        let expected: BTreeMap<_, _> =
            live.iter().map(|(user, slot)| (ids(*user).user().to_owned(), serial(slot))).collect();
        assert_eq!(node.view(epoch), expected, "seed {seed}");
        let stored = node.log.stored.lock().unwrap();
        let sessions = stored.iter().filter(|(key, _)| !key.user.is_empty());
        let serials: Vec<_> = sessions
            .filter_map(|(_, value)| Some(SessionBegun::decode(value.as_deref()?).unwrap().serial))
            .collect();
        assert!(serials.is_sorted_by(|a, b| a < b), "seed {seed}: {serials:?}");
        assert_eq!(node.holder.lock().unwrap().young(), live.len(), "seed {seed}");
    }
}

#[test]
fn session_that_ends_before_its_beginning_is_written_leaves_nothing() {
    let node = Fixture::living(6);
    node.log.room.store(0, Ordering::Relaxed);
    let before = node.log.stored.lock().unwrap().len();
    for slot in 0..100 {
        assert_eq!(node.admit(1, slot), Ok(None));
        node.end(1, slot);
    }
    node.log.room.store(usize::MAX, Ordering::Relaxed);
    assert!(node.announcer.flush());
    node.log.store(usize::MAX);
    assert_eq!(node.log.stored.lock().unwrap().len(), before);
}

#[test]
fn replaced_session_whose_beginning_is_stored_leaves_a_tombstone() {
    let node = Fixture::living(6);
    let epoch = node.own.living().unwrap().0;
    assert_eq!(node.admit(1, 1), Ok(None));
    node.log.room.store(0, Ordering::Relaxed);
    assert_eq!(node.admit(1, 2), Ok(Some(address(1))));
    node.end(1, 2);
    node.log.room.store(usize::MAX, Ordering::Relaxed);
    assert!(node.announcer.flush());
    node.log.store(usize::MAX);
    assert!(node.view(epoch).is_empty());
}
