//! The sessions that began lately, and the positions from which they want events.
//!
//! An owner that applies beginnings up to *T′*, between two records at its next offset *n*, asks for the sessions
//! that began in [*T*, *T′*):
//!
//! 1. For each session of another node: let *V* be the position of *P* that the latest lease below its `as_of` stated.
//!    The owner replays the entries of its tail in [*V*, *n*) whose recipients include the user. If the tail no longer
//!    reaches
//!    *V*, it sends a gap.
//! 2. For each session of its own node that was admitted before the lane began: the same. (The others got everything
//!    directly.)
//! 3. *T* becomes *T′*, one newcomer at a time, so that what blocks one does not repeat the others. A replay that
//!    finds no room continues where it stopped.
//!
//! If the members of an entry are unknown, the step is tried again later, with the *n* of that time; the lane routes on
//! with the old *T*.
//!
//! *V* comes from the leases, because what an owner had stated before the holder had read `as_of` was routed, and so
//! appended, before the 101. `as_of` is taken before the handshake is answered. There are three answers
//! ([`StatedPosition`]): if nobody had stated a position, the partition was new, and the session wants it from its
//! first record on, not from where the lane happened to begin; if the statement is forgotten, the session is closed
//! with 4409.
//!
//! A beginning is kept for `TAIL_AGE`, as long as the tail is. One that no owner of a partition applied in that time is
//! forgotten. The next owner then finds that its *T* is below [`NewcomerWindow::kept_from`], and reports the whole
//! range as missed: its sessions are closed with 4409, rather than live with a silent gap.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::holder::{SessionSerial, SourcePartition};
use super::nodes::NodeIndex;
use super::ports::NodeEpoch;

/// Newcomers kept at most: beyond it the oldest is forgotten, as if it were too old.
pub const NEWCOMERS_MAX: usize = 500_000;

/// A session that began lately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newcomer {
    /// The offset of its beginning in the sessions topic.
    pub begin: i64,
    /// The offset up to which its holder had read the sessions topic when it admitted the session.
    pub as_of: i64,
    /// Its node.
    pub node: NodeIndex,
    /// The epoch of its node.
    pub epoch: NodeEpoch,
    /// Its number in that epoch.
    pub serial: SessionSerial,
    /// Its user.
    pub user: Arc<str>,
}

/// A newcomer, the entry that it made visible, and the clock of the log at its beginning.
#[derive(Debug)]
struct KeptNewcomer {
    newcomer: Arc<Newcomer>,
    entry: Option<(u64, u64)>,
    clock_ms: i64,
}

/// Newcomers of one window.
pub const WINDOW_MAX: usize = 256;

/// The first sessions that began in a range of the sessions topic, at most [`WINDOW_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewcomerWindow {
    /// In the order of their beginnings.
    pub newcomers: Vec<Arc<Newcomer>>,
    /// Sessions that began below this offset are not kept any more. Above the start of the range: some
    /// are missing.
    pub kept_from: i64,
}

/// What is known of the position of a partition at the time of a beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatedPosition {
    /// The next offset that its owner had stated last.
    At(i64),
    /// No owner had stated anything: the partition was new.
    Never,
    /// The statement is not kept any more.
    Forgotten,
}

/// What owners stated of one partition.
#[derive(Debug, Default)]
struct StatedPositions {
    /// The offset of a lease in the sessions topic, the position that it stated, and the clock.
    kept: VecDeque<(i64, i64, i64)>,
    /// Whether older ones were dropped.
    is_pruned: bool,
    /// The highest generation, and the node that stated it.
    generation: i64,
    owner: Option<NodeIndex>,
}

/// The newcomers and the stated positions.
#[derive(Debug)]
pub struct Newcomers {
    age_ms: i64,
    kept: VecDeque<KeptNewcomer>,
    /// Entries that owners see only once they have applied their beginning.
    begins: HashMap<(u64, u64), i64>,
    stated: HashMap<SourcePartition, StatedPositions>,
    kept_from: i64,
    clock_ms: i64,
}

impl Newcomers {
    /// Keeps newcomers for this long by the clock of the log, ms.
    pub fn new(age_ms: i64) -> Self {
        Self {
            age_ms,
            kept: VecDeque::new(),
            begins: HashMap::new(),
            stated: HashMap::new(),
            kept_from: 0,
            clock_ms: 0,
        }
    }

    /// A session has begun. `entry`: the table entry that it made.
    pub fn begun(&mut self, newcomer: Newcomer, entry: Option<(u64, u64)>, clock_ms: i64) {
        if let Some(entry) = entry {
            self.begins.insert(entry, newcomer.begin);
        }
        self.clock_ms = clock_ms;
        self.kept.push_back(KeptNewcomer { newcomer: Arc::new(newcomer), entry, clock_ms });
        if self.kept.len() > NEWCOMERS_MAX {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some(KeptNewcomer { newcomer, entry, .. }) = self.kept.pop_front() else { return };
        self.kept_from = newcomer.begin + 1;
        if let Some(entry) = entry
            && self.begins.get(&entry) == Some(&newcomer.begin)
        {
            self.begins.remove(&entry);
        }
    }

    /// The owner of a partition stated its next offset, in the lease at `offset`.
    pub fn stated(&mut self, source: SourcePartition, offset: i64, next: i64) {
        let stated = self.stated.entry(source).or_default();
        stated.kept.push_back((offset, next, self.clock_ms));
    }

    /// The owner of a partition stated its generation.
    pub fn owned(&mut self, source: SourcePartition, generation: i64, owner: NodeIndex) {
        let stated = self.stated.entry(source).or_default();
        if generation >= stated.generation {
            (stated.generation, stated.owner) = (generation, Some(owner));
        }
    }

    /// The node that stated the highest generation of a partition. It may have ended since.
    pub fn owner(&self, source: SourcePartition) -> Option<NodeIndex> {
        self.stated.get(&source)?.owner
    }

    /// The partitions that an owner has stated.
    pub fn sources(&self) -> impl Iterator<Item = SourcePartition> {
        self.stated.keys().copied()
    }

    /// The highest generation that was stated; 0: none.
    pub fn generation(&self, source: SourcePartition) -> i64 {
        self.stated.get(&source).map_or(0, |stated| stated.generation)
    }

    /// The position of a partition that was stated last below `as_of`.
    pub fn routed(&self, source: SourcePartition, as_of: i64) -> StatedPosition {
        let Some(stated) = self.stated.get(&source) else { return StatedPosition::Never };
        let below = stated.kept.partition_point(|(offset, _, _)| *offset < as_of);
        match below.checked_sub(1) {
            Some(index) => StatedPosition::At(stated.kept[index].1),
            None if stated.is_pruned => StatedPosition::Forgotten,
            None => StatedPosition::Never,
        }
    }

    /// Where the beginning of a table entry is stored, if that was lately.
    pub fn begin_of(&self, user: u64, device_and_node: u64) -> Option<i64> {
        self.begins.get(&(user, device_and_node)).copied()
    }

    /// The first [`WINDOW_MAX`] sessions that began at or above `from` and below `to`.
    pub fn window(&self, from: i64, to: i64) -> NewcomerWindow {
        let first = self.kept.partition_point(|kept| kept.newcomer.begin < from);
        let newcomers = self.kept.range(first..).map(|kept| &kept.newcomer).take(WINDOW_MAX);
        let newcomers = newcomers.take_while(|newcomer| newcomer.begin < to).cloned().collect();
        NewcomerWindow { newcomers, kept_from: self.kept_from }
    }

    /// Forgets what is too old.
    pub fn prune(&mut self, clock_ms: i64) {
        self.clock_ms = clock_ms;
        let limit = clock_ms - self.age_ms;
        while self.kept.front().is_some_and(|kept| kept.clock_ms < limit) {
            self.forget_oldest();
        }
        for stated in self.stated.values_mut() {
            // The last one before the limit still holds for what began at the limit.
            while stated.kept.get(1).is_some_and(|(_, _, at_ms)| *at_ms < limit) {
                stated.kept.pop_front();
                stated.is_pruned = true;
            }
        }
    }

    /// Newcomers kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}
