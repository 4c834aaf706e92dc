//! The holder's side of the hand-off: which session still needs a record.
//!
//! Records of one source partition arrive in order within a generation of its owner. A new owner repeats
//! records, and an old one that was stalled may send late ones. This state machine decides for each record
//! and session, so that every session gets every record once;
//! [why](super#why-nothing-is-missed-and-nothing-arrives-twice).
//!
//! The node's own lanes use the same state: a node that owns a partition and also holds sessions counts
//! once, and a partition that moves between nodes is seamless for the sessions of both.
//!
//! # The rule
//!
//! The holder keeps for each source partition *P* the `generation`, `highest` (the highest offset that passed) and
//! `established` (the *T* that passed: sessions with a *b* below it are named in every record that concerns them). A
//! **young** session is one whose *b* is unknown or at or above the `established` of some *P*. For it the holder keeps
//! the last offset delivered of each such *P*.
//!
//! An owner goes past records whose members it does not know yet: they are **parked**, and handed over later, out of
//! the order of the partition. Each record names the parked ones below it. What is below it and not named was routed
//! before. So the holder knows which records below `highest` it has still to expect (`parked`), and of a young session
//! which it lacks below the last one that it got.
//!
//! For a record (*P*, *o*, generation *g*, *T*):
//!
//! 1. *g* below `generation`: a zombie's, discarded. If *g* is above it, `generation` becomes *g*, whatever kind of
//!    record it is: also a replay, because the successor may have nothing else to send. If then *T* is below
//!    `established`, the new owner knows fewer sessions than the former one did: `established` falls to *T*, and each
//!    session with a *b* between the two is young again, with everything up to `highest` delivered, but for what is
//!    `parked`. (That is why the holder keeps *b* of all its sessions.)
//! 2. A session gets no record at or below the last offset that was delivered to it while it was young, unless it lacks
//!    it because it was parked. A replay can be ahead of the live records that a successor repeats, so this holds until
//!    `highest` has reached that offset.
//! 3. A session with a *b* at or above *T* gets no live record: its owner names the user for another session of
//!    theirs, and will replay the record to this one behind those that came before. If *b* is not known, and this
//!    node has not read the sessions topic up to *T*, the record waits until it is.
//! 4. Otherwise a session that is young for *P* gets every record that names it, live or replayed. Any other session
//!    gets it if *o* is above `highest`, or parked.
//! 5. A record that is named as parked becomes `parked` if it is above `highest`. Otherwise it has passed before, and a
//!    new owner has parked it again: then `established` stays until nothing is, because the sessions below it have that
//!    record, and younger ones do not. A record leaves `parked` when it arrives, live or replayed, or when a later
//!    record does not name it any more.
//! 6. A live record with *o* above `highest` sets `highest` to *o* and `established` to *T*. `passed` with the next
//!    offset
//!    *n* does so with *n* − 1, if *n* is above `highest`: without it, sessions would stay young while nothing is sent
//!    to their node.
//! 7. **Lost** records, from an offset on and below *n*: they are gone, and their owner has not read all of them. Every
//!    session with a *b* below *T* that may lack one of them is closed: by the rules above it would still take one of
//!    them. Then everything below *n* counts as passed, and nothing below it as `parked`. (The others wait for a
//!    replay, and if that is not possible, they are closed as well.) If the log has lost its last records, *n* is below
//!    positions that have passed, which mean nothing any more: all sessions are closed, and `highest` falls to *n* − 1.
//!
//! A partition that was never seen counts as one in which nothing has passed. So a session is young until the first
//! record of it, and what is delivered of it is remembered from then on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use crate::domain::ids::SessionAddress;
use crate::service::cluster::parked_offsets::{ParkedBelow, ParkedOffsets};

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
#[derive(Debug)]
struct Passed {
    generation: i64,
    /// The highest offset.
    highest: i64,
    /// The highest live record whose sessions were looked up. It may be on its way to them still.
    looked_up: i64,
    /// Sessions whose beginning is stored below this are named in every record that concerns them.
    established: i64,
    /// Records that passed without having been handed over to the sessions that are not young.
    parked: ParkedOffsets,
    /// The owner has parked a record that a former owner has handed over.
    is_parked_again: bool,
    /// No session lacks a record above this offset below the last one that it got.
    lacked: i64,
}

static NOTHING_PASSED: Passed = Passed::nothing();

impl Passed {
    const fn nothing() -> Self {
        let parked = ParkedOffsets(Vec::new());
        Self {
            generation: 0,
            highest: -1,
            looked_up: -1,
            established: 0,
            parked,
            is_parked_again: false,
            lacked: -1,
        }
    }
}

/// What a session got of a partition for which it is or was young.
#[derive(Debug)]
struct DeliveredTo {
    source: SourcePartition,
    /// The last offset.
    offset: i64,
    /// Records before it that it has not got, because their owner had parked them: ascending. Shared by the sessions
    /// that got a record at the same time, and mostly empty.
    not_got: Option<Arc<[i64]>>,
}

impl DeliveredTo {
    fn not_got(&self) -> &[i64] {
        self.not_got.as_deref().unwrap_or_default()
    }

    fn set_not_got(&mut self, not_got: Vec<i64>) {
        self.not_got = (!not_got.is_empty()).then(|| not_got.into());
    }

    fn lacks(&self, offset: i64) -> bool {
        self.not_got().binary_search(&offset).is_ok()
    }

    fn got(&mut self, offset: i64) {
        if self.lacks(offset) {
            let rest = self.not_got().iter().copied().filter(|it| *it != offset).collect();
            self.set_not_got(rest);
        }
    }
}

/// Positions for which a session that needs more of them allocates memory at a time. Few, because a session
/// is young for a short time, and all sessions of a node can be young at once.
const POSITIONS_ADDED: usize = 4;

#[derive(Debug)]
struct HeldSession {
    serial: SessionSerial,
    /// The offset at which the beginning is stored; `None`: not known yet.
    begin: Option<i64>,
    delivered: Vec<DeliveredTo>,
}

impl HeldSession {
    fn of(&self, source: SourcePartition) -> Option<&DeliveredTo> {
        self.delivered.iter().find(|delivered| delivered.source == source)
    }

    fn of_mut(&mut self, source: SourcePartition) -> &mut DeliveredTo {
        let known = self.delivered.iter().position(|delivered| delivered.source == source);
        let index = known.unwrap_or_else(|| {
            if self.delivered.len() == self.delivered.capacity() {
                self.delivered.reserve_exact(POSITIONS_ADDED);
            }
            self.delivered.push(DeliveredTo { source, offset: -1, not_got: None });
            self.delivered.len() - 1
        });
        &mut self.delivered[index]
    }

    /// A record was delivered, whose owner had parked these before it.
    fn set_delivered(&mut self, source: SourcePartition, offset: i64, below: &mut ParkedBelow<'_>) {
        let delivered = self.of_mut(source);
        if offset <= delivered.offset {
            return delivered.got(offset);
        }
        if let Some(first) = below.offsets.first() {
            if *first > delivered.offset {
                let shared = below.shared.get_or_insert_with(|| below.offsets.into());
                delivered.not_got = Some(Arc::clone(shared));
            } else {
                let lacks = |it: &i64| *it > delivered.offset || delivered.lacks(*it);
                let not_got = below.offsets.iter().copied().filter(lacks).collect();
                delivered.set_not_got(not_got);
            }
        } else {
            delivered.not_got = None;
        }
        delivered.offset = offset;
    }

    /// Everything up to `offset` was delivered, but for these.
    fn set_all_delivered(&mut self, source: SourcePartition, offset: i64, parked: &ParkedOffsets) {
        let delivered = self.of_mut(source);
        let mut not_got = delivered.not_got().to_vec();
        not_got.extend(parked.0.iter().filter(|parked| **parked > delivered.offset));
        delivered.set_not_got(not_got);
        delivered.offset = delivered.offset.max(offset);
    }

    /// A record was delivered that may have been parked.
    fn unpark(&mut self, source: SourcePartition, offset: i64) {
        let known = self.delivered.iter_mut().find(|delivered| delivered.source == source);
        known.into_iter().for_each(|delivered| delivered.got(offset));
    }

    fn is_young(&self, passed: &Passed) -> bool {
        self.begin.is_none_or(|begin| begin >= passed.established)
    }

    /// Whether it needs one of the records of this range, as far as is known, see [`Holder::needs`].
    fn may_lack(&self, source: SourcePartition, passed: &Passed, range: Range<i64>) -> bool {
        let mut from = range.start;
        if let Some(delivered) = self.of(source) {
            if delivered.not_got().iter().any(|offset| range.contains(offset)) {
                return true;
            }
            from = from.max(delivered.offset + 1);
        }
        from < range.end
            && (self.is_young(passed)
                || passed.highest < range.end - 1
                || passed.parked.0.iter().any(|offset| (from..range.end).contains(offset)))
    }
}

/// Which sessions a loss of records concerns.
#[derive(Debug, PartialEq, Eq)]
pub enum LossConcerns {
    /// None: the owner that reports it has a successor that has already sent something.
    Zombie,
    /// This node has to read more of the sessions topic first: its owner is ahead.
    NotKnown,
    /// These, which are as if they had ended.
    Sessions(Vec<SessionAddress>),
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

/// A position that has counted for cursors.
#[derive(Clone, Copy, Debug)]
struct CountedPosition {
    next: i64,
    table: i64,
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
    /// No session with a later beginning may get cursors.
    cursors_above: i64,
    /// The last position of each partition that has counted for cursors.
    counted: BTreeMap<SourcePartition, CountedPosition>,
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
    pub const YOUNG_BYTES: usize =
        3 * size_of::<(i64, SessionSerial)>() + POSITIONS_ADDED * size_of::<DeliveredTo>();

    /// Memory for each partition of which a young session has received events, bytes.
    pub const POSITION_BYTES: usize = size_of::<DeliveredTo>();

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

    /// Where the beginning of a session is stored. `None`: not known yet, or it has ended.
    pub fn begin(&self, address: SessionAddress) -> Option<i64> {
        self.sessions.get(&address)?.begin
    }

    /// From now on only what an owner passes that knows this session counts for cursors. `checked`: up to where the
    /// session has everything of a partition, by an owner that knew it; `None`: not checked.
    ///
    /// # Errors
    /// The partitions to be checked (again) first: a higher position has counted, of an owner that may not have known
    /// this session.
    pub fn may_get_cursors(
        &mut self,
        begin: i64,
        checked: impl Fn(SourcePartition) -> Option<i64>,
    ) -> Result<(), Vec<SourcePartition>> {
        let covers_more = |(source, counted): &(&SourcePartition, &CountedPosition)| {
            let checked = checked(**source);
            checked.is_none_or(|next| counted.table <= begin && counted.next > next)
        };
        let unchecked: Vec<_> =
            self.counted.iter().filter(covers_more).map(|(source, _)| *source).collect();
        if !unchecked.is_empty() {
            return Err(unchecked);
        }
        self.cursors_above = self.cursors_above.max(begin);
        Ok(())
    }

    /// Whether a position counts for cursors: everything that its owner has passed was handed over to all sessions that
    /// may get some. Nothing of an owner counts whose records are discarded. The offset is the position.
    pub fn counts_for_cursors(&mut self, at: RoutedPosition) -> bool {
        let counts = at.table > self.cursors_above && at.generation >= self.generation(at.source);
        if counts {
            let counted = CountedPosition { next: at.offset, table: at.table };
            self.counted.insert(at.source, counted);
        } else {
            self.lower_counted(at.source, at.offset);
        }
        counts
    }

    /// A position that does not count for cursors has replaced the last one, if it is lower.
    pub fn lower_counted(&mut self, source: SourcePartition, next: i64) {
        if let Some(counted) = self.counted.get_mut(&source) {
            counted.next = counted.next.min(next);
        }
    }

    /// The highest generation of a partition of which something has arrived; 0: none.
    pub fn generation(&self, source: SourcePartition) -> i64 {
        self.sources.get(&source).map_or(0, |passed| passed.generation)
    }

    /// The sessions that have not ended.
    pub fn sessions(&self) -> impl Iterator<Item = SessionAddress> {
        self.sessions.keys().copied()
    }

    /// The serial of a session that has not ended.
    pub fn serial(&self, address: SessionAddress) -> Option<SessionSerial> {
        self.sessions.get(&address).map(|session| session.serial)
    }

    /// Something of this generation arrives, or is about to be routed by a lane of this node.
    fn succeed(&mut self, at: RoutedPosition) -> Arrived {
        let passed = self.sources.entry(at.source).or_insert_with(Passed::nothing);
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
                passed.lacked = passed.lacked.max(passed.parked.highest());
                for session in self.sessions.values_mut() {
                    if let Some(begin) = session.begin.filter(|begin| again.contains(begin)) {
                        session.set_all_delivered(at.source, highest, &passed.parked);
                        self.young.insert((begin, session.serial));
                    }
                }
            }
        }
        Arrived::InTurn
    }

    /// A record arrives, or a lane of this node is about to route it. `parked`: the records before it that its
    /// owner has not routed yet, ascending.
    pub fn arrive(&mut self, at: RoutedPosition, parked: &[i64]) -> Arrived {
        if self.succeed(at) == Arrived::Zombie {
            return Arrived::Zombie;
        }
        let passed = self.sources.get_mut(&at.source).expect("just found");
        let highest = passed.highest;
        let parked = &parked[..parked.partition_point(|parked| *parked < at.offset)];
        passed.is_parked_again = !passed.parked.name_below(at.offset, parked, highest);
        Arrived::InTurn
    }

    /// The sessions that need this live record are looked up before the holder is unlocked. Those that are not in the
    /// directory yet are not among them.
    pub fn looks_up(&mut self, at: RoutedPosition) {
        let passed = self.sources.entry(at.source).or_insert_with(Passed::nothing);
        passed.looked_up = passed.looked_up.max(at.offset);
    }

    /// The offset of each partition from which on a session that is in the directory now gets every record that
    /// concerns it while this node's own lane routes it. What is below may have been routed before, also at *V* or
    /// above.
    pub fn live_from(&self) -> HashMap<SourcePartition, i64> {
        let of = |passed: &Passed| passed.highest.max(passed.looked_up) + 1;
        self.sources.iter().map(|(source, passed)| (*source, of(passed))).collect()
    }

    /// The records from `from` on and below `at.offset` are gone, and their owner has not read all of them. Takes out
    /// the sessions that may lack one of them. `read_to` as in [`Holder::needs_live`]. If `from` is above `at.offset`,
    /// the log has lost its last records.
    pub fn lose(&mut self, at: RoutedPosition, from: i64, read_to: i64) -> LossConcerns {
        if self.succeed(at) == Arrived::Zombie {
            return LossConcerns::Zombie;
        }
        let is_truncated = from > at.offset;
        let passed = &self.sources[&at.source];
        let mut concerned = Vec::new();
        for (address, session) in &self.sessions {
            let awaits_replay = match session.begin {
                Some(begin) => begin >= at.table,
                None if read_to >= at.table => true,
                None => return LossConcerns::NotKnown,
            };
            let may_lack =
                || !awaits_replay && session.may_lack(at.source, passed, from..at.offset);
            if is_truncated || may_lack() {
                concerned.push(*address);
            }
        }
        concerned.iter().for_each(|address| self.ended(*address));
        let passed = self.sources.get_mut(&at.source).expect("just found");
        if is_truncated {
            (passed.highest, passed.looked_up, passed.lacked) = (-1, -1, -1);
            passed.parked = ParkedOffsets::default();
        }
        passed.parked.replace_below(at.offset, &[]);
        if at.offset > passed.highest {
            passed.highest = at.offset - 1;
            passed.is_parked_again = false;
            self.establish(at);
        }
        LossConcerns::Sessions(concerned)
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
        if let Some(delivered) = session.of(at.source) {
            if delivered.lacks(at.offset) {
                return true;
            }
            if at.offset <= delivered.offset {
                return false;
            }
        }
        session.is_young(passed) || at.offset > passed.highest || passed.parked.contains(&at.offset)
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

    /// The record was delivered to these sessions, which needed it. `parked` as in [`Holder::arrive`].
    pub fn delivered(
        &mut self,
        at: RoutedPosition,
        parked: &[i64],
        to: impl Iterator<Item = SessionAddress>,
    ) {
        let passed = self.sources.entry(at.source).or_insert_with(Passed::nothing);
        let all_stored = self.young.last().is_none_or(|(begin, _)| *begin < i64::MAX);
        let none_is_young = all_stored && self.latest_begin < passed.established;
        // A replay can be ahead of the live records: then a session that is not young any more may lack what was
        // parked.
        if none_is_young && at.offset > passed.highest.max(passed.lacked) {
            return;
        }
        let offsets = &parked[..parked.partition_point(|parked| *parked < at.offset)];
        passed.lacked = offsets.last().map_or(passed.lacked, |last| passed.lacked.max(*last));
        let mut below = ParkedBelow { offsets, shared: None };
        for address in to {
            let Some(session) = self.sessions.get_mut(&address) else { continue };
            if session.is_young(passed) {
                session.set_delivered(at.source, at.offset, &mut below);
                // Not there yet, if this is the first record of its source.
                self.young.insert((session.begin.unwrap_or(i64::MAX), session.serial));
            } else {
                session.unpark(at.source, at.offset);
            }
        }
    }

    /// A live record has passed: it was delivered to every session of this node that it concerns.
    pub fn passed(&mut self, at: RoutedPosition) {
        let passed = self.sources.entry(at.source).or_insert_with(Passed::nothing);
        if at.generation != passed.generation {
            return;
        }
        passed.parked.remove(at.offset);
        if at.offset <= passed.highest {
            return;
        }
        passed.highest = at.offset;
        self.establish(at);
    }

    /// A replay has passed. Its owner had routed the record before, and handed it over to every session of this node
    /// that it knew.
    pub fn replayed(&mut self, at: RoutedPosition) {
        if let Some(passed) = self.sources.get_mut(&at.source)
            && passed.generation == at.generation
        {
            passed.parked.remove(at.offset);
        }
    }

    /// The owner has handed over everything below `at.offset`, which is not a record.
    pub fn passed_below(&mut self, at: RoutedPosition) {
        let passed = self.sources.entry(at.source).or_insert_with(Passed::nothing);
        if at.generation != passed.generation || at.offset <= passed.highest {
            return;
        }
        passed.highest = at.offset - 1;
        self.establish(at);
    }

    fn establish(&mut self, at: RoutedPosition) {
        let passed = self.sources.get_mut(&at.source).expect("just passed");
        if passed.established < at.table && !passed.is_parked_again {
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
            // A replay can be ahead of the live records, and of records that are parked for the others.
            session.delivered.retain(|delivered| {
                let passed = &self.sources[&delivered.source];
                delivered.offset > passed.highest
                    || delivered.not_got.is_some()
                    || passed.parked.0.first().is_some_and(|first| *first <= delivered.offset)
            });
            session.delivered.shrink_to_fit();
        }
    }

    /// Sessions that are young for some partition.
    pub fn young(&self) -> usize {
        self.young.len()
    }
}
