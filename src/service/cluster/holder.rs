//! The holder's side of the hand-off: which session still needs a record.
//!
//! Records of one source partition arrive in order within a generation of its owner. A new owner repeats
//! records, and an old one that was stalled may send late ones. This state machine decides for each record
//! and session, so that every session gets every record once; [why](super#why-nothing-is-missed-and-nothing-arrives-twice).
//!
//! The node's own lanes use the same state: a node that owns a partition and also holds sessions counts
//! once, and a partition that moves between nodes is seamless for the sessions of both.
//!
//! # The rule
//!
//! The holder keeps for each source partition *P* the `generation`, `highest` (the highest offset that passed) and
//! `established` (the *T* that passed: sessions with a *b* below it are named in every record that concerns them). A
//! **young** session is one whose *b* is unknown or at or above the `established` of some *P*. For it the holder keeps
//! the last offset delivered of each such *P*. For a record (*P*, *o*, generation *g*, *T*):
//!
//! 1. *g* below `generation`: a zombie's, discarded. If *g* is above it, `generation` becomes *g*, whatever kind of record
//!    it is: also a replay, because the successor may have nothing else to send. If then *T* is below `established`, the new owner
//!    knows fewer sessions than the former one did: `established` falls to *T*, and each session with a *b* between
//!    the two is young again, with everything up to `highest` delivered. (That is why the holder keeps *b* of all its
//!    sessions.)
//! 2. A session gets no record at or below the last offset that was delivered to it while it was young. A replay can be ahead
//!    of the live records that a successor repeats, so this holds until `highest` has reached that offset.
//! 3. A session with a *b* at or above *T* gets no live record: its owner names the user for another session of
//!    theirs, and will replay the record to this one behind those that came before. If *b* is not known, and this
//!    node has not read the sessions topic up to *T*, the record waits until it is.
//! 4. Otherwise a session that is young for *P* gets every record that names it, live or replayed. Any other session gets
//!    it if *o* is above `highest`.
//! 5. A live record with *o* above `highest` sets `highest` to *o* and `established` to *T*. `passed` with the next offset
//!    *n* does so with *n* − 1, if *n* is above `highest`: without it, sessions would stay young while nothing is sent to
//!    their node.
//!
//! A partition that was never seen counts as one in which nothing has passed. So a session is young until the first record
//! of it, and what is delivered of it is remembered from then on.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::domain::ids::SessionAddress;

/// A partition of a topic of events. The topic is its index among the topics of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourcePartition {
    /// Index of the topic.
    pub topic: u16,
    /// The partition.
    pub partition: i32,
}

/// Number of a session in its epoch, from 1. Grows with each session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionSerial(pub u64);

/// Where a record comes from, and what its owner knew when it routed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedPosition {
    /// The source partition.
    pub source: SourcePartition,
    /// The offset in it.
    pub offset: i64,
    /// Generation of the owner.
    pub generation: i64,
    /// The offset in the sessions topic up to which the owner had applied beginnings.
    pub table: i64,
}

/// What passed of one source partition.
#[derive(Clone, Copy, Debug)]
struct Passed {
    generation: i64,
    /// The highest offset.
    highest: i64,
    /// Sessions whose beginning is stored below this are named in every record that concerns them.
    established: i64,
}

const NOTHING_PASSED: Passed = Passed { generation: 0, highest: -1, established: 0 };

/// Positions for which a session that needs more of them allocates memory at a time. Few, because a session
/// is young for a short time, and all sessions of a node can be young at once.
const POSITIONS_ADDED: usize = 4;

#[derive(Debug)]
struct HeldSession {
    serial: SessionSerial,
    /// The offset at which the beginning is stored; `None`: not known yet.
    begin: Option<i64>,
    /// The last offset delivered of partitions for which the session is or was young.
    delivered: Vec<(SourcePartition, i64)>,
}

impl HeldSession {
    fn delivered(&self, source: SourcePartition) -> i64 {
        let known = self.delivered.iter().find(|(at, _)| *at == source);
        known.map_or(-1, |(_, offset)| *offset)
    }

    fn set_delivered(&mut self, source: SourcePartition, offset: i64) {
        match self.delivered.iter_mut().find(|(at, _)| *at == source) {
            Some((_, last)) => *last = offset.max(*last),
            None => {
                if self.delivered.len() == self.delivered.capacity() {
                    self.delivered.reserve_exact(POSITIONS_ADDED);
                }
                self.delivered.push((source, offset));
            }
        }
    }

    fn is_young(&self, passed: &Passed) -> bool {
        self.begin.is_none_or(|begin| begin >= passed.established)
    }
}

/// Whether a record is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// The owner has a successor that has already sent something: discard the record.
    Zombie,
    /// Ask [`Holder::needs`] for each recipient.
    InTurn,
}

/// Whether a session needs a live record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveNeed {
    /// It does.
    Yes,
    /// It has the record, gets it by a replay, or has ended.
    No,
    /// This node has to read more of the sessions topic first: its owner is ahead.
    NotKnown,
}

/// The state of the holder of one node.
#[derive(Debug, Default)]
pub struct Holder {
    sources: HashMap<SourcePartition, Passed>,
    sessions: HashMap<SessionAddress, HeldSession>,
    by_serial: HashMap<SessionSerial, SessionAddress>,
    /// The serial of the session that was admitted last.
    latest: SessionSerial,
    /// No beginning is stored above this offset.
    latest_begin: i64,
    /// Sessions that may be young for some partition: not known to be stored (as `i64::MAX`) or stored
    /// at or above the lowest `established`.
    young: BTreeSet<(i64, SessionSerial)>,
}

impl Holder {
    /// Memory of one session that is not young, bytes: its entries in both maps, which are filled to seven
    /// eighths at most and to half of that at least.
    pub const SESSION_BYTES: usize = 2
        * (size_of::<(SessionAddress, HeldSession)>()
            + size_of::<(SessionSerial, SessionAddress)>()
            + 2);

    /// Memory of one session that is young, bytes: its place in the set of young sessions, whose nodes are
    /// half full at least.
    pub const YOUNG_BYTES: usize = 3 * size_of::<(i64, SessionSerial)>()
        + POSITIONS_ADDED * size_of::<(SourcePartition, i64)>();

    /// Memory for each partition of which a young session has received events, bytes.
    pub const POSITION_BYTES: usize = size_of::<(SourcePartition, i64)>();

    /// A session was admitted. To be called before any record can find it in the directory.
    pub fn began(&mut self, serial: SessionSerial, address: SessionAddress) {
        let session = HeldSession { serial, begin: None, delivered: Vec::new() };
        let before = self.sessions.insert(address, session);
        debug_assert!(before.is_none(), "addresses are not reused before the end");
        self.by_serial.insert(serial, address);
        self.latest = self.latest.max(serial);
        self.young.insert((i64::MAX, serial));
    }

    /// The beginning of a session is stored at this offset of the sessions topic.
    pub fn stored(&mut self, serial: SessionSerial, begin: i64) {
        let Some(address) = self.by_serial.get(&serial) else { return };
        let session = self.sessions.get_mut(address).expect("both maps agree");
        if session.begin.is_none() {
            session.begin = Some(begin);
            self.latest_begin = self.latest_begin.max(begin);
            self.young.remove(&(i64::MAX, serial));
            self.young.insert((begin, serial));
            self.retire();
        }
    }

    /// A session has ended.
    pub fn ended(&mut self, address: SessionAddress) {
        let Some(session) = self.sessions.remove(&address) else { return };
        self.by_serial.remove(&session.serial);
        self.young.remove(&(session.begin.unwrap_or(i64::MAX), session.serial));
    }

    /// The serial of the session that was admitted last.
    pub fn latest(&self) -> SessionSerial {
        self.latest
    }

    /// The address of a session that has not ended.
    pub fn find(&self, serial: SessionSerial) -> Option<SessionAddress> {
        self.by_serial.get(&serial).copied()
    }

    /// The sessions that have not ended.
    pub fn sessions(&self) -> impl Iterator<Item = SessionAddress> {
        self.sessions.keys().copied()
    }

    /// The serial of a session that has not ended.
    pub fn serial(&self, address: SessionAddress) -> Option<SessionSerial> {
        self.sessions.get(&address).map(|session| session.serial)
    }

    /// A record arrives, or a lane of this node is about to route it.
    pub fn arrive(&mut self, at: RoutedPosition) -> Arrived {
        let passed = self.sources.entry(at.source).or_insert(NOTHING_PASSED);
        if at.generation < passed.generation {
            return Arrived::Zombie;
        }
        if at.generation > passed.generation {
            passed.generation = at.generation;
            if at.table < passed.established {
                // The new owner knows fewer sessions. Those that it does not know are young again, with
                // all that passed delivered.
                let again = at.table..std::mem::replace(&mut passed.established, at.table);
                let highest = passed.highest;
                for session in self.sessions.values_mut() {
                    if let Some(begin) = session.begin.filter(|begin| again.contains(begin)) {
                        session.set_delivered(at.source, highest);
                        self.young.insert((begin, session.serial));
                    }
                }
            }
        }
        Arrived::InTurn
    }

    /// The sessions whose beginning is stored in this range of the sessions topic. If the node has not read
    /// the topic up to the end of the range: also those whose beginning it has not read.
    pub fn begun_in(&self, range: Range<i64>, read_to: i64) -> Vec<SessionAddress> {
        let unread_too = read_to < range.end;
        let concerned = self.sessions.iter().filter(|(_, session)| match session.begin {
            Some(begin) => range.contains(&begin),
            None => unread_too,
        });
        concerned.map(|(address, _)| *address).collect()
    }

    /// Whether a session needs a record that names it.
    pub fn needs(&self, address: SessionAddress, at: RoutedPosition) -> bool {
        let passed = self.sources.get(&at.source).unwrap_or(&NOTHING_PASSED);
        // It has ended, and the directory does not know yet.
        let Some(session) = self.sessions.get(&address) else { return false };
        if at.offset <= session.delivered(at.source) {
            return false;
        }
        session.is_young(passed) || at.offset > passed.highest
    }

    /// Whether a session needs a live record that names its user. Its owner may name the user for another
    /// session of theirs: if it has not applied the beginning of this one, its replay will bring the record, in
    /// order with those before it. `read_to`: this node has read the sessions topic below this offset.
    pub fn needs_live(
        &self,
        address: SessionAddress,
        at: RoutedPosition,
        read_to: i64,
    ) -> LiveNeed {
        let Some(session) = self.sessions.get(&address) else { return LiveNeed::No };
        let awaits_replay = match session.begin {
            Some(begin) => begin >= at.table,
            None if read_to >= at.table => true,
            None => return LiveNeed::NotKnown,
        };
        if !awaits_replay && self.needs(address, at) { LiveNeed::Yes } else { LiveNeed::No }
    }

    /// Whether a session needs a record that a lane of this node routes. Sessions admitted after `direct_after`
    /// are newer than the lane, so they miss nothing before its start. The others wait for the replay.
    pub fn needs_of_lane(
        &self,
        address: SessionAddress,
        at: RoutedPosition,
        direct_after: SessionSerial,
    ) -> bool {
        let waits = self.sessions.get(&address).is_some_and(|session| {
            session.serial <= direct_after && session.begin.is_none_or(|begin| begin >= at.table)
        });
        !waits && self.needs(address, at)
    }

    /// The record was delivered to these sessions, which needed it.
    pub fn delivered(&mut self, at: RoutedPosition, to: impl Iterator<Item = SessionAddress>) {
        let passed = *self.sources.get(&at.source).unwrap_or(&NOTHING_PASSED);
        let all_stored = self.young.last().is_none_or(|(begin, _)| *begin < i64::MAX);
        if all_stored && self.latest_begin < passed.established {
            return;
        }
        for address in to {
            if let Some(session) = self.sessions.get_mut(&address)
                && session.is_young(&passed)
            {
                session.set_delivered(at.source, at.offset);
                // Not there yet, if this is the first record of its source.
                self.young.insert((session.begin.unwrap_or(i64::MAX), session.serial));
            }
        }
    }

    /// A live record has passed: it was delivered to every session of this node that it concerns.
    pub fn passed(&mut self, at: RoutedPosition) {
        let passed = self.sources.entry(at.source).or_insert(NOTHING_PASSED);
        if at.generation != passed.generation || at.offset <= passed.highest {
            return;
        }
        passed.highest = at.offset;
        self.establish(at);
    }

    /// The owner has handed over everything below `at.offset`, which is not a record.
    pub fn passed_below(&mut self, at: RoutedPosition) {
        let passed = self.sources.entry(at.source).or_insert(NOTHING_PASSED);
        if at.generation != passed.generation || at.offset <= passed.highest {
            return;
        }
        passed.highest = at.offset - 1;
        self.establish(at);
    }

    fn establish(&mut self, at: RoutedPosition) {
        let passed = self.sources.get_mut(&at.source).expect("just passed");
        if passed.established < at.table {
            passed.established = at.table;
            self.retire();
        }
    }

    /// Forgets what was kept of sessions that are young for no partition any more.
    fn retire(&mut self) {
        let lowest = self.sources.values().map(|passed| passed.established).min().unwrap_or(0);
        while let Some(&(begin, serial)) = self.young.first()
            && begin < lowest
        {
            self.young.pop_first();
            let address = self.by_serial[&serial];
            let session = self.sessions.get_mut(&address).expect("both maps agree");
            // A replay can be ahead of the live records.
            session.delivered.retain(|(source, offset)| *offset > self.sources[source].highest);
            session.delivered.shrink_to_fit();
        }
    }

    /// Sessions that are young for some partition.
    pub fn young(&self) -> usize {
        self.young.len()
    }
}
