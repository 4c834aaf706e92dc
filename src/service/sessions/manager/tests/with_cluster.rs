//! The manager with hand-off through the log: which sessions it announces, refuses and closes.

use crate::service::members::beginnings::Beginnings;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message as _;

use super::*;
use crate::domain::ids::SessionAddress;
use crate::service::backends::ports::MissedEvents;
use crate::service::cluster::announcer::AnnouncerCounters;
use crate::service::cluster::holder::Holder;
use crate::service::cluster::own_epoch::OwnEpoch;
use crate::service::cluster::ports::{NodeEpoch, SessionsLog as _, SessionsRecord, SessionsWriter};
use crate::service::cluster::table::{SessionTable, TableConfig, TableCounters};
use crate::service::cluster::wire::{Lease, SessionBegun, SessionsKey};

const OWN: u64 = 1;
const OTHER: u64 = 2;

/// The sessions topic: every write is stored and read at once.
struct Topic {
    written: Mutex<Vec<(SessionsKey, bool)>>,
    room: AtomicUsize,
}

impl SessionsWriter for Topic {
    fn write(&self, key: &SessionsKey, value: Option<&[u8]>) -> bool {
        let mut written = self.written.lock().unwrap();
        let has_room = written.len() < self.room.load(Ordering::Relaxed);
        if has_room {
            written.push((key.clone(), value.is_some()));
        }
        has_room
    }
}

/// The manager takes these from its own queue in a real node.
struct NotCalled;

impl MissedEvents for NotCalled {
    fn missed(&self, _session: SessionAddress) {}
    fn missed_by_user(&self, _user: &str) {}
    fn missed_by_all(&self) {}
}

struct Cluster {
    bench: Bench,
    topic: Arc<Topic>,
    table: Arc<SessionTable>,
    own: Arc<OwnEpoch>,
    offset: i64,
}

fn lease(instance: &str) -> Vec<u8> {
    Lease { instance: instance.into(), ..Lease::default() }.encode_to_vec()
}

fn session_key(epoch: u64, user: &str) -> SessionsKey {
    SessionsKey { epoch, user: user.into(), device: "phone".into() }
}

impl Cluster {
    fn new() -> Self {
        let own = Arc::new(OwnEpoch::new(Arc::<Mutex<Holder>>::default(), Arc::new(NotCalled)));
        let config = TableConfig {
            topics: vec![],
            node_timeout_ms: 60_000,
            newcomers_age_ms: 60_000,
            beginnings_max: Beginnings::KEPT_MAX,
        };
        let table =
            SessionTable::new(config, Arc::clone(&own) as _, Arc::<TableCounters>::default());
        let table = Arc::new(table);
        let topic =
            Arc::new(Topic { written: Mutex::default(), room: AtomicUsize::new(usize::MAX) });
        let announcer = SessionAnnouncer::new(
            Arc::clone(&own),
            Arc::clone(&table),
            Arc::clone(&topic) as _,
            1,
            Arc::<AnnouncerCounters>::default(),
        );
        let dependencies =
            Dependencies { announcer: Some(Arc::new(announcer)), ..Dependencies::default() };
        let bench = Bench::with_dependencies(dependencies, 1, SessionConfig::default());
        table.set_own_epoch(NodeEpoch(OWN));
        Self { bench, topic, table, own, offset: 0 }
    }

    fn living() -> Self {
        let mut cluster = Self::new();
        cluster.stored(session_lease(OWN), Some(lease("own")));
        cluster.stored(session_lease(OTHER), Some(lease("other")));
        assert!(cluster.own.begin(NodeEpoch(OWN)));
        cluster
    }

    /// A record is stored and read.
    fn stored(&mut self, key: SessionsKey, value: Option<Vec<u8>>) {
        let value = value.map(Into::into);
        self.table.record(SessionsRecord {
            offset: self.offset,
            appended_at_ms: 0,
            key: Some(key),
            value,
        });
        self.offset += 1;
        self.table.read_to(self.offset);
    }

    fn began(&mut self, epoch: u64, user: &str, serial: u64) {
        let begun = SessionBegun { serial, as_of: 0 };
        self.stored(session_key(epoch, user), Some(begun.encode_to_vec()));
    }

    fn written(&self) -> Vec<(SessionsKey, bool)> {
        std::mem::take(&mut *self.topic.written.lock().unwrap())
    }

    fn tick(&mut self) -> Vec<(ConnectionKey, CloseCode, String)> {
        self.bench.clock += Duration::from_millis(100);
        self.bench.manager.tick(self.bench.clock, 0);
        closes(&self.bench.commands(0))
    }
}

fn session_lease(epoch: u64) -> SessionsKey {
    SessionsKey { epoch, ..SessionsKey::default() }
}

#[test]
fn session_is_announced_from_its_admission_to_its_end() {
    let mut cluster = Cluster::living();
    cluster.bench.admitted(0, key(0, 0), "alice", "phone");
    assert_eq!(cluster.written(), [(session_key(OWN, "alice"), true)]);
    cluster.bench.admitted(0, key(1, 0), "bob", "phone");
    cluster.bench.end(0, key(0, 0));
    let expected = [(session_key(OWN, "bob"), true), (session_key(OWN, "alice"), false)];
    assert_eq!(cluster.written(), expected);
}

#[test]
fn no_session_is_admitted_before_the_lease_is_stored() {
    let mut cluster = Cluster::new();
    cluster.bench.open(0, key(0, 0), "alice", "phone");
    let (status, body) = cluster.bench.refused(0);
    assert_eq!(status, 503);
    assert!(body.contains("joining the cluster"), "{body}");
    assert!(cluster.bench.directory.is_empty() && cluster.written().is_empty());
}

#[test]
fn sessions_are_refused_while_the_topic_cannot_be_written() {
    let mut cluster = Cluster::living();
    cluster.topic.room.store(0, Ordering::Relaxed);
    cluster.bench.admitted(0, key(0, 0), "alice", "phone");
    cluster.bench.open(0, key(1, 0), "bob", "phone");
    assert_eq!(cluster.bench.refused(0).0, 503);
    cluster.bench.end(0, key(1, 0));
    cluster.topic.room.store(usize::MAX, Ordering::Relaxed);
    cluster.tick();
    assert_eq!(cluster.written(), [(session_key(OWN, "alice"), true)]);
    cluster.bench.admitted(0, key(1, 1), "bob", "phone");
}

#[test]
fn replaced_session_on_the_same_node_has_no_tombstone() {
    let mut cluster = Cluster::living();
    cluster.bench.admitted(0, key(0, 0), "alice", "phone");
    cluster.bench.open(0, key(1, 0), "alice", "phone");
    cluster.bench.commands(0);
    cluster.bench.end(0, key(0, 0));
    let beginning = (session_key(OWN, "alice"), true);
    assert_eq!(cluster.written(), [beginning.clone(), beginning]);
}

/// Of two sessions of one user and device on two nodes, the one whose beginning is later in the log stays.
#[test]
fn session_whose_beginning_is_earlier_in_the_log_is_closed() {
    let mut cluster = Cluster::living();
    for (slot, user) in (0..).zip(["alice", "bob"]) {
        cluster.bench.admitted(0, key(slot, 0), user, "phone");
    }
    cluster.began(OWN, "alice", 1);
    cluster.began(OTHER, "bob", 1);
    cluster.began(OWN, "bob", 2);
    cluster.began(OTHER, "alice", 2);
    let closed = cluster.tick();
    assert_eq!(closed.len(), 1, "{closed:?}");
    assert_eq!((closed[0].0, closed[0].1), (key(0, 0), CloseCode::SESSION_REPLACED));
    assert_eq!(cluster.bench.directory.sessions_of("bob", |_| {}), 1);
    assert_eq!(cluster.written().last(), Some(&(session_key(OWN, "alice"), false)));
}

#[test]
fn new_session_is_not_closed_for_one_that_began_before_it() {
    let mut cluster = Cluster::living();
    cluster.bench.admitted(0, key(0, 0), "alice", "phone");
    cluster.began(OWN, "alice", 1);
    cluster.bench.open(0, key(1, 0), "alice", "phone");
    cluster.bench.commands(0);
    // Its own beginning is not stored yet.
    cluster.began(OTHER, "alice", 1);
    assert!(cluster.tick().is_empty());
    assert_eq!(cluster.bench.directory.len(), 1);
}

#[test]
fn session_that_has_missed_events_is_announced_as_ended_at_once() {
    let mut cluster = Cluster::living();
    cluster.bench.admitted(0, key(0, 0), "alice", "phone");
    cluster.written();
    cluster.bench.manager.missed.missed_by_all();
    cluster.bench.manager.take_missed();
    assert_eq!(cluster.written(), [(session_key(OWN, "alice"), false)]);
    cluster.bench.end(0, key(0, 0));
    assert!(cluster.written().is_empty());
}

#[test]
fn successor_of_a_session_that_has_missed_events_stays_announced() {
    let mut cluster = Cluster::living();
    cluster.bench.admitted(0, key(0, 0), "alice", "phone");
    cluster.bench.manager.missed.missed_by_all();
    cluster.bench.admitted(0, key(1, 0), "alice", "phone");
    cluster.bench.manager.take_missed();
    let written = cluster.written();
    assert!(written.iter().all(|(_, is_begun)| *is_begun), "{written:?}");
}
