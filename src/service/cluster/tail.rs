//! The tail of a partition: its last records, in memory.
//!
//! An owner replays from it what a session missed between its 101 and the moment at which the owner learned
//! of it. It is bounded by age and, for all partitions of the node together, by bytes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;

use crate::domain::members::Members;

/// Bytes and bounds of all tails of a node.
#[derive(Debug)]
pub struct TailBudget {
    bytes_max: u64,
    age_max_ms: u64,
    bytes: AtomicU64,
    tails: AtomicU64,
    /// When the oldest record of each tail was pushed, Unix time in ms; `u64::MAX`: it has none.
    oldest: Mutex<Vec<Weak<AtomicU64>>>,
}

impl TailBudget {
    /// At most `bytes_max` (`TAIL_BYTES`) and `age_max_ms` (`TAIL_AGE`).
    pub fn new(bytes_max: u64, age_max_ms: u64) -> Arc<Self> {
        let (bytes, tails) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { bytes_max, age_max_ms, bytes, tails, oldest: Mutex::default() })
    }

    /// `TAIL_BYTES`: the bound of all tails together, bytes.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// `TAIL_AGE`: the bound of the age of a record, ms.
    pub fn age_max_ms(&self) -> u64 {
        self.age_max_ms
    }

    /// Bytes of all tails.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Age of the oldest record of all tails at this time, ms; 0 without records.
    pub fn age_ms(&self, now_ms: u64) -> u64 {
        let mut tails = self.oldest.lock().expect("no holder panics");
        tails.retain(|oldest| oldest.strong_count() > 0);
        let oldest = tails.iter().filter_map(Weak::upgrade);
        let oldest = oldest.map(|oldest| oldest.load(Ordering::Relaxed)).min();
        oldest.map_or(0, |oldest| now_ms.saturating_sub(oldest))
    }

    fn add_tail(&self) -> Arc<AtomicU64> {
        self.tails.fetch_add(1, Ordering::Relaxed);
        let oldest = Arc::new(AtomicU64::new(u64::MAX));
        let mut tails = self.oldest.lock().expect("no holder panics");
        tails.retain(|oldest| oldest.strong_count() > 0);
        tails.push(Arc::downgrade(&oldest));
        oldest
    }
}

/// Who received a record.
#[derive(Clone, Debug)]
pub struct TailAudience {
    /// The members of its conversation, sorted.
    pub members: Members,
    /// A user who received it without being a member: added or removed by it.
    pub other: Option<Arc<str>>,
}

impl TailAudience {
    /// Whether the user received the record.
    pub fn contains(&self, user: &str) -> bool {
        self.members.contains(user) || self.other.as_deref() == Some(user)
    }
}

/// A record of the tail.
#[derive(Clone, Debug)]
pub struct TailEntry {
    /// Its offset.
    pub offset: i64,
    /// Time of its append, Unix time in ms.
    pub appended_at_ms: u64,
    /// Its key.
    pub key: Option<Box<[u8]>>,
    /// Its value.
    pub value: Bytes,
    /// `None`: this node did not route it, so its members have to be looked up.
    pub audience: Option<TailAudience>,
}

/// Memory of an entry without its contents, bytes: the ring of entries has at most twice the slots that it
/// needs. The rest is the allocations' own.
const ENTRY_BYTES: usize = 2 * size_of::<KeptEntry>() + 64;

impl TailEntry {
    /// Memory that it holds without its list of members, bytes.
    fn bytes(&self) -> u64 {
        let key = self.key.as_ref().map_or(0, |key| key.len());
        (ENTRY_BYTES + self.value.len() + key) as u64
    }
}

/// Memory of a list, bytes. The cache of members may have dropped it, so that the tail alone holds it.
fn list_bytes(members: &Members) -> u64 {
    members.bytes() as u64
}

fn list_key(members: &Members) -> usize {
    members.address()
}

#[derive(Debug)]
struct KeptEntry {
    entry: TailEntry,
    /// When it was pushed, by the clock of this node: brokers' clocks may differ.
    since_ms: u64,
}

/// The tail of one partition.
#[derive(Debug)]
pub struct PartitionTail {
    entries: VecDeque<KeptEntry>,
    /// The lists of members that entries share, by their address: number of entries, bytes.
    lists: HashMap<usize, (usize, u64)>,
    /// Records below this offset are not in the tail.
    from: i64,
    bytes: u64,
    /// For [`TailBudget::age_ms`].
    oldest: Arc<AtomicU64>,
    budget: Arc<TailBudget>,
}

impl PartitionTail {
    /// An empty tail of a partition that is read from `from`.
    pub fn new(from: i64, budget: Arc<TailBudget>) -> Self {
        let (entries, lists) = (VecDeque::new(), HashMap::new());
        Self { entries, lists, from, bytes: 0, oldest: budget.add_tail(), budget }
    }

    /// Every record at or above this offset that was pushed is in the tail.
    pub fn from(&self) -> i64 {
        self.from
    }

    /// Appends a record, and drops the oldest beyond the bounds. If the partition went back to an earlier offset, because
    /// its topic was created again, the tail begins there.
    pub fn push(&mut self, entry: TailEntry, now_ms: u64) {
        if self.entries.back().is_some_and(|last| last.entry.offset >= entry.offset) {
            while self.drop_oldest() {}
            self.from = entry.offset;
        }
        let list = entry.audience.as_ref().map_or(0, |it| self.share(&it.members));
        self.add(entry.bytes() + list);
        self.entries.push_back(KeptEntry { entry, since_ms: now_ms });
        self.trim(now_ms);
    }

    /// Inserts a record that was passed over before, at its place. If the tail begins later, it stays out.
    pub fn insert(&mut self, entry: TailEntry, now_ms: u64) {
        if entry.offset < self.from {
            return;
        }
        let index = self.entries.partition_point(|kept| kept.entry.offset < entry.offset);
        if self.entries.get(index).is_some_and(|kept| kept.entry.offset == entry.offset) {
            return;
        }
        // As old as its successor, so that the oldest stay in front.
        let since_ms = self.entries.get(index).map_or(now_ms, |kept| kept.since_ms);
        let list = entry.audience.as_ref().map_or(0, |it| self.share(&it.members));
        self.add(entry.bytes() + list);
        self.entries.insert(index, KeptEntry { entry, since_ms });
        self.trim(now_ms);
    }

    /// Returns false if there is none.
    fn drop_oldest(&mut self) -> bool {
        let Some(KeptEntry { entry: oldest, .. }) = self.entries.pop_front() else { return false };
        self.from = oldest.offset + 1;
        let list = oldest.audience.as_ref().map_or(0, |it| self.release(&it.members));
        self.sub(oldest.bytes() + list);
        true
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.budget.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sub(&mut self, bytes: u64) {
        self.bytes -= bytes;
        self.budget.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// One more entry holds the list. Returns the bytes that this adds.
    fn share(&mut self, members: &Members) -> u64 {
        let (entries, bytes) = self.lists.entry(list_key(members)).or_default();
        *entries += 1;
        if *entries > 1 {
            return 0;
        }
        *bytes = list_bytes(members);
        *bytes
    }

    /// One entry less holds the list. Returns the bytes that this frees.
    fn release(&mut self, members: &Members) -> u64 {
        let key = list_key(members);
        let (entries, bytes) = self.lists.get_mut(&key).expect("every list is counted");
        *entries -= 1;
        if *entries > 0 {
            return 0;
        }
        let bytes = *bytes;
        self.lists.remove(&key);
        bytes
    }

    /// Drops what is too old, and what exceeds this tail's share of the bytes while all tails together
    /// exceed theirs.
    pub fn trim(&mut self, now_ms: u64) {
        let limit_ms = now_ms.saturating_sub(self.budget.age_max_ms);
        let share = self.budget.bytes_max / self.budget.tails.load(Ordering::Relaxed).max(1);
        while let Some(KeptEntry { since_ms, .. }) = self.entries.front() {
            let is_old = *since_ms < limit_ms;
            let is_over = self.budget.bytes() > self.budget.bytes_max && self.bytes > share;
            if !is_old && !is_over {
                break;
            }
            self.drop_oldest();
        }
        self.oldest.store(self.oldest_ms().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The offsets at or above `from` and below `to` of records whose audience is not known, in order.
    pub fn unresolved(&self, from: i64, to: i64) -> impl Iterator<Item = &TailEntry> {
        self.range(from, to).filter(|entry| entry.audience.is_none())
    }

    /// Notes the audience of the record at this offset.
    pub fn resolve(&mut self, offset: i64, audience: TailAudience) {
        let index = self.entries.partition_point(|kept| kept.entry.offset < offset);
        let Some(kept) = self.entries.get_mut(index).filter(|it| it.entry.offset == offset) else {
            return;
        };
        let members = audience.members.clone();
        let before = kept.entry.audience.replace(audience);
        let added = self.share(&members);
        self.add(added);
        let freed = before.map_or(0, |before| self.release(&before.members));
        self.sub(freed);
    }

    /// The records at or above `from` and below `to`, in order.
    pub fn range(&self, from: i64, to: i64) -> impl Iterator<Item = &TailEntry> {
        let first = self.entries.partition_point(|kept| kept.entry.offset < from);
        let entries = self.entries.range(first..).map(|kept| &kept.entry);
        entries.take_while(move |entry| entry.offset < to)
    }

    /// Records in the tail.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When the oldest record was pushed, Unix time in ms.
    pub fn oldest_ms(&self) -> Option<u64> {
        self.entries.front().map(|kept| kept.since_ms)
    }
}

impl Drop for PartitionTail {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.tails.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(offset: i64, at_ms: u64, bytes: usize) -> TailEntry {
        let value = Bytes::from(vec![0; bytes]);
        TailEntry { offset, appended_at_ms: at_ms, key: None, value, audience: None }
    }

    fn offsets(tail: &PartitionTail, from: i64, to: i64) -> Vec<i64> {
        tail.range(from, to).map(|entry| entry.offset).collect()
    }

    #[test]
    fn tail_keeps_its_age() {
        let mut tail = PartitionTail::new(5, TailBudget::new(1 << 20, 1_000));
        for (offset, at_ms) in [(5, 100), (7, 600), (8, 1_100), (9, 1_600)] {
            tail.push(entry(offset, at_ms, 10), at_ms);
        }
        assert_eq!(offsets(&tail, 0, 100), [7, 8, 9]);
        assert_eq!(offsets(&tail, 8, 9), [8]);
        assert_eq!(tail.from(), 6);
        tail.trim(10_000);
        assert!(tail.is_empty());
        assert_eq!(tail.from(), 10);
    }

    #[test]
    fn tail_of_a_partition_that_goes_back_begins_there() {
        let budget = TailBudget::new(1 << 20, 1_000);
        let mut tail = PartitionTail::new(5, Arc::clone(&budget));
        for offset in [5, 7, 8] {
            tail.push(entry(offset, 100, 10), 100);
        }
        tail.push(entry(3, 200, 10), 200);
        assert_eq!(offsets(&tail, 0, 100), [3]);
        assert_eq!(tail.from(), 3);
        let mut other = PartitionTail::new(3, TailBudget::new(1 << 20, 1_000));
        other.push(entry(3, 200, 10), 200);
        assert_eq!(budget.bytes(), other.bytes);
    }

    #[test]
    fn tail_over_its_share_gives_way_and_the_other_stays() {
        let budget = TailBudget::new(10_000, u64::MAX);
        let (mut busy, mut quiet) = (
            PartitionTail::new(0, Arc::clone(&budget)),
            PartitionTail::new(0, Arc::clone(&budget)),
        );
        quiet.push(entry(0, 1, 1_000), 1);
        for offset in 0..100 {
            busy.push(entry(offset, 1, 1_000), 1);
            assert!(budget.bytes() <= 10_000);
        }
        assert_eq!(quiet.len(), 1);
        assert!(busy.len() > 4, "{}", busy.len());
        drop((busy, quiet));
        assert_eq!(budget.bytes(), 0);
    }

    #[test]
    fn shared_member_list_is_counted_once() {
        let budget = TailBudget::new(u64::MAX, u64::MAX);
        let mut tail = PartitionTail::new(0, Arc::clone(&budget));
        let members: Members = (0..1_000).map(|n| format!("{n:04}")).collect();
        let list = members.bytes() as u64;
        let audience = TailAudience { members, other: Some(Arc::from("guest")) };
        assert!(audience.contains("0007") && audience.contains("guest") && !audience.contains("x"));
        for offset in 0..10 {
            tail.push(TailEntry { audience: Some(audience.clone()), ..entry(offset, 1, 10) }, 1);
        }
        assert_eq!(budget.bytes(), list + 10 * (ENTRY_BYTES + 10) as u64);
    }

    /// An oracle: the bytes are those of the entries that are left, whatever was pushed, resolved and dropped.
    #[test]
    fn bytes_are_those_of_what_is_kept() {
        let budget = TailBudget::new(40_000, 1_000);
        let mut tail = PartitionTail::new(0, Arc::clone(&budget));
        let lists: Vec<Members> =
            (1..6).map(|list| (0..list * 20).map(|n| format!("{list}-{n:04}")).collect()).collect();
        let audience = |n: usize| TailAudience { members: lists[n % 5].clone(), other: None };
        for n in 0..600_usize {
            let known = (n % 3 > 0).then(|| audience(n / 7));
            let pushed = TailEntry { audience: known, ..entry(n as i64, 1, n % 300) };
            tail.push(pushed, n as u64 * 5);
            tail.resolve(n as i64 - 3, audience(n));
            let mut known: Vec<usize> = Vec::new();
            let mut expected = 0;
            for kept in tail.range(0, i64::MAX) {
                expected += kept.bytes();
                let Some(audience) = &kept.audience else { continue };
                if !known.contains(&list_key(&audience.members)) {
                    known.push(list_key(&audience.members));
                    expected += list_bytes(&audience.members);
                }
            }
            assert_eq!(budget.bytes(), expected);
            assert_eq!(tail.lists.len(), known.len());
        }
        drop(tail);
        assert_eq!((budget.bytes(), budget.age_ms(5_000)), (0, 0));
    }

    #[test]
    fn age_is_that_of_the_oldest_record_of_all_tails() {
        let budget = TailBudget::new(u64::MAX, 1_000);
        assert_eq!(budget.age_ms(5_000), 0);
        let mut first = PartitionTail::new(0, Arc::clone(&budget));
        let mut second = PartitionTail::new(0, Arc::clone(&budget));
        second.push(entry(0, 1, 10), 4_500);
        first.push(entry(0, 1, 10), 4_800);
        assert_eq!(budget.age_ms(5_000), 500);
        drop(second);
        assert_eq!(budget.age_ms(5_000), 200);
        first.trim(6_000);
        assert_eq!(budget.age_ms(6_000), 0);
    }
}
