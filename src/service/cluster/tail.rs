//! The tail of a partition: its last records, in memory.
//!
//! A session that returns with a cursor gets from it what it has missed. And an owner replays from it what a session
//! missed between its 101 and the moment at which the owner learned of it. It is bounded by age and, for all partitions
//! of the node together, by bytes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use hashbrown::HashMap;
use slab::Slab;

use crate::domain::cursor::{UNCHECKED, record_check};
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
#[derive(Clone, Debug, Default)]
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

/// A record for the tail, or of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailRecord<'a> {
    /// Its offset.
    pub offset: i64,
    /// Time of its append, Unix time in ms.
    pub appended_at_ms: u64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value.
    pub value: &'a [u8],
}

/// A record of the tail, and who received it.
#[derive(Clone, Copy, Debug)]
pub struct TailEntry<'a> {
    /// The record.
    pub record: TailRecord<'a>,
    /// The members of its conversation; `None`: this node did not route it, so they have to be looked up.
    pub members: Option<&'a Members>,
    /// A user who received it without being a member.
    pub other: Option<&'a Arc<str>>,
}

impl TailEntry<'_> {
    /// Whether the user received the record. `false` if that is not known.
    pub fn is_for(&self, user: &str) -> bool {
        self.members.is_some_and(|members| members.contains(user))
            || self.other.is_some_and(|other| **other == *user)
    }
}

/// Bytes of the contents of the first and of the largest block of a tail, powers of two, which allocators do not round
/// up. A block has at most a sixteenth of the tail, so that the space in the newest block that is not used yet, and
/// that in the oldest that is not used any more, stay small.
const BLOCK_BYTES: std::ops::RangeInclusive<usize> = 1 << 10..=64 << 10;
const BLOCKS: usize = 16;
/// Memory of a block without its contents, bytes: its place in the ring of blocks, which has at most twice the
/// places that it needs, and 16 bytes of the allocator for each of its allocations.
const BLOCK_OVERHEAD: usize = 2 * size_of::<Block>() + 32;
/// Memory of a list besides itself, bytes: its places in the table, the map and the queue, each at most twice what is
/// needed.
const LIST_BYTES: u64 = 2
    * (size_of::<SharedList>() + size_of::<(usize, (i64, u32))>() + size_of::<(i64, u32)>() + 9)
        as u64;
/// Stands for "none" in the fields of a slot.
const NONE: u32 = u32::MAX;

/// A record of a block.
#[derive(Clone, Copy, Debug)]
struct Slot {
    offset: i64,
    appended_at_ms: u64,
    /// When it was pushed, by the clock of this node: brokers' clocks may differ.
    since_ms: u64,
    /// Where its key begins; the value follows.
    start: u32,
    /// [`NONE`]: it has no key.
    key_len: u32,
    value_len: u32,
    /// The list of its members. [`NONE`]: not known.
    list: u32,
    /// The other user. [`NONE`]: there is none.
    other: u32,
}

/// Consecutive records, at least one that is not dropped. One block holds a few hundred of them, so that a record costs
/// no allocation.
#[derive(Debug)]
struct Block {
    /// Ascending by offset.
    slots: Vec<Slot>,
    /// So many of them are dropped.
    dropped: usize,
    contents: Vec<u8>,
}

impl Block {
    fn with_capacity(records: usize, bytes: usize) -> Self {
        let (slots, contents) = (Vec::with_capacity(records), Vec::with_capacity(bytes));
        Self { slots, dropped: 0, contents }
    }

    fn bytes(&self) -> u64 {
        let slots = self.slots.capacity() * size_of::<Slot>();
        (BLOCK_OVERHEAD + slots + self.contents.capacity()) as u64
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.slots.len() < self.slots.capacity()
            && self.contents.len() + bytes <= self.contents.capacity()
    }

    /// Copies the record. Its slot is not in the block yet.
    fn copy(&mut self, record: TailRecord<'_>, since_ms: u64) -> Slot {
        let TailRecord { offset, appended_at_ms, key, value } = record;
        let start = narrow(self.contents.len());
        self.contents.extend_from_slice(key.unwrap_or_default());
        self.contents.extend_from_slice(value);
        let key_len = key.map_or(NONE, |key| narrow(key.len()));
        let value_len = narrow(value.len());
        let (list, other) = (NONE, NONE);
        Slot { offset, appended_at_ms, since_ms, start, key_len, value_len, list, other }
    }

    fn record(&self, slot: &Slot) -> TailRecord<'_> {
        let key_len = if slot.key_len == NONE { 0 } else { slot.key_len as usize };
        let (key, rest) = self.contents[slot.start as usize..].split_at(key_len);
        TailRecord {
            offset: slot.offset,
            appended_at_ms: slot.appended_at_ms,
            key: (slot.key_len != NONE).then_some(key),
            value: &rest[..slot.value_len as usize],
        }
    }

    fn check(&self, slot: &Slot) -> u32 {
        let record = self.record(slot);
        record_check(record.appended_at_ms, record.key)
    }
}

/// A length within a block.
fn narrow(length: usize) -> u32 {
    u32::try_from(length).expect("records and blocks are smaller than 4 GiB")
}

/// A list of members that records share.
#[derive(Debug)]
struct SharedList {
    members: Members,
    /// Its memory. The cache of members may have dropped it, so that the tail alone holds it.
    bytes: u64,
}

/// The tail of one partition.
///
/// ```text
/// │ slots: offset, times, place │ … │  ─► lists of members, shared by records
/// │ contents: key, value, key, …    │
/// └─ a block ───────────────────────┴─ a block ─┴─ … ─┴─ the newest: written at its end
/// ```
#[derive(Debug)]
pub struct PartitionTail {
    blocks: VecDeque<Block>,
    /// The block that was dropped last, for the next one: its memory is not given back and taken again.
    spare: Option<Block>,
    records: usize,
    lists: Slab<SharedList>,
    /// The lists by their address, each with the highest offset of its records.
    by_address: HashMap<usize, (i64, u32)>,
    /// The lists, each once, by an offset up to which it is not dropped: its highest one when it was looked at last. So
    /// nothing is counted for each record.
    kept_until: VecDeque<(i64, u32)>,
    others: Slab<Arc<str>>,
    /// Records below this offset are not in the tail.
    from: i64,
    /// The check of the record right before the first block; [`UNCHECKED`]: not known.
    check_before: u32,
    bytes: u64,
    /// For [`TailBudget::age_ms`].
    oldest: Arc<AtomicU64>,
    budget: Arc<TailBudget>,
}

/// The place of a record: its block, and its slot in the block.
type Place = (usize, usize);

impl PartitionTail {
    /// An empty tail of a partition that is read from `from`.
    pub fn new(from: i64, budget: Arc<TailBudget>) -> Self {
        Self {
            blocks: VecDeque::new(),
            spare: None,
            records: 0,
            lists: Slab::new(),
            by_address: HashMap::new(),
            kept_until: VecDeque::new(),
            others: Slab::new(),
            from,
            check_before: UNCHECKED,
            bytes: 0,
            oldest: budget.add_tail(),
            budget,
        }
    }

    /// Every record at or above this offset that was pushed is in the tail.
    pub fn from(&self) -> i64 {
        self.from
    }

    /// Appends a record, and drops the oldest beyond the bounds. `audience`: who received it; `None`: not known. If the
    /// partition went back to an earlier offset, because its topic was created again, the tail begins there.
    pub fn push(&mut self, record: TailRecord<'_>, audience: Option<&TailAudience>, now_ms: u64) {
        if self.last_offset().is_some_and(|last| last >= record.offset) {
            while self.drop_oldest() {}
            self.from = record.offset;
            self.check_before = UNCHECKED;
        }
        let bytes = record.key.map_or(0, <[u8]>::len) + record.value.len();
        if !self.blocks.back().is_some_and(|block| block.has_room(bytes)) {
            self.add_block(bytes);
        }
        let (list, other) = self.share(record.offset, audience);
        let block = self.blocks.back_mut().expect("one was added");
        let slot = block.copy(record, now_ms);
        block.slots.push(Slot { list, other, ..slot });
        self.records += 1;
        self.trim(now_ms);
    }

    /// Inserts a record that was passed over before, at its place. If the tail begins later, it stays out.
    pub fn insert(&mut self, record: TailRecord<'_>, audience: Option<&TailAudience>, now_ms: u64) {
        if record.offset < self.from {
            return;
        }
        let place = self.place(record.offset);
        let Some((block, slot)) = self.slot_at(place).map(|next| (place.0, *next)) else {
            return self.push(record, audience, now_ms);
        };
        if slot.offset == record.offset {
            return;
        }
        let (list, other) = self.share(record.offset, audience);
        let block = &mut self.blocks[block];
        let before = block.bytes();
        // As old as its successor, so that the oldest stay in front.
        let new = block.copy(record, slot.since_ms);
        block.slots.insert(place.1, Slot { list, other, ..new });
        let added = block.bytes() - before;
        self.records += 1;
        self.add(added);
        self.trim(now_ms);
    }

    /// Adds a block with room for a record of this size, for as many records of the same size as the last ones.
    fn add_block(&mut self, bytes: usize) {
        let share = (self.bytes as usize / BLOCKS + 1).next_power_of_two() / 2;
        let contents = share.clamp(*BLOCK_BYTES.start(), *BLOCK_BYTES.end()).max(bytes);
        let last = self.blocks.back().map(|last| last.contents.len() / last.slots.len());
        // Without values, as those of records that were given up, a block would have very many.
        let records = contents / last.unwrap_or(bytes).max(size_of::<Slot>()) + 1;
        let fits = |spare: &mut Block| {
            (contents..=2 * contents).contains(&spare.contents.capacity())
                && spare.slots.capacity() >= records
        };
        let block = match self.spare.take_if(fits) {
            Some(Block { mut slots, mut contents, .. }) => {
                slots.clear();
                contents.clear();
                Block { slots, dropped: 0, contents }
            }
            None => {
                let block = Block::with_capacity(records, contents);
                self.add(block.bytes());
                block
            }
        };
        self.blocks.push_back(block);
    }

    /// Returns false if there is none.
    fn drop_oldest(&mut self) -> bool {
        let Some(block) = self.blocks.front_mut() else { return false };
        let oldest = block.slots[block.dropped];
        block.dropped += 1;
        self.from = oldest.offset + 1;
        self.records -= 1;
        if block.dropped == block.slots.len() {
            self.check_before = block.check(&oldest);
            let block = self.blocks.pop_front();
            self.set_spare(block);
            self.drop_lists();
        }
        if oldest.other != NONE {
            self.others.remove(oldest.other as usize);
        }
        true
    }

    fn set_spare(&mut self, spare: Option<Block>) {
        if let Some(former) = std::mem::replace(&mut self.spare, spare) {
            self.sub(former.bytes());
        }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.budget.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sub(&mut self, bytes: u64) {
        self.bytes -= bytes;
        self.budget.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The record at this offset holds this audience.
    fn share(&mut self, offset: i64, audience: Option<&TailAudience>) -> (u32, u32) {
        let Some(TailAudience { members, other }) = audience else { return (NONE, NONE) };
        let other =
            other.as_ref().map_or(NONE, |user| narrow(self.others.insert(Arc::clone(user))));
        if let Some((last, list)) = self.by_address.get_mut(&members.address()) {
            *last = offset.max(*last);
            return (*list, other);
        }
        let bytes = members.bytes() as u64 + LIST_BYTES;
        let list = SharedList { members: members.clone(), bytes };
        let list = narrow(self.lists.insert(list));
        self.kept_until.push_back((offset, list));
        self.by_address.insert(members.address(), (offset, list));
        self.add(bytes);
        (list, other)
    }

    /// Drops the lists whose records are all dropped. The queue is not quite in order, because records are inserted
    /// late: then a list is dropped a little later.
    fn drop_lists(&mut self) {
        while let Some((until, list)) = self.kept_until.pop_front() {
            if until >= self.from {
                self.kept_until.push_front((until, list));
                return;
            }
            let address = self.lists[list as usize].members.address();
            let (last, _) = self.by_address[&address];
            if last >= self.from {
                self.kept_until.push_back((last, list));
                continue;
            }
            self.by_address.remove(&address);
            let SharedList { bytes, .. } = self.lists.remove(list as usize);
            self.sub(bytes);
        }
    }

    /// Drops what is too old, and what exceeds this tail's share of the bytes while all tails together
    /// exceed theirs.
    pub fn trim(&mut self, now_ms: u64) {
        let limit_ms = now_ms.saturating_sub(self.budget.age_max_ms);
        while let Some(since_ms) = self.oldest_ms() {
            let is_old = since_ms < limit_ms;
            if !is_old && !self.is_over() {
                break;
            }
            self.drop_oldest();
        }
        if self.blocks.is_empty() {
            self.set_spare(None);
        }
        self.oldest.store(self.oldest_ms().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        let tails = self.budget.tails.load(Ordering::Relaxed).max(1);
        self.budget.bytes() > self.budget.bytes_max && self.bytes > self.budget.bytes_max / tails
    }

    /// The records at or above `from` and below `to` whose audience is not known, in order.
    pub fn unresolved(&self, from: i64, to: i64) -> impl Iterator<Item = TailRecord<'_>> {
        let unknown = self.range(from, to).filter(|entry| entry.members.is_none());
        unknown.map(|entry| entry.record)
    }

    /// Notes the audience of the record at this offset.
    pub fn resolve(&mut self, offset: i64, audience: &TailAudience) {
        let place = self.place(offset);
        if self.slot_at(place).is_none_or(|slot| slot.offset != offset) {
            return;
        }
        let (list, other) = self.share(offset, Some(audience));
        let slot = &mut self.blocks[place.0].slots[place.1];
        let before = std::mem::replace(slot, Slot { list, other, ..*slot });
        if before.other != NONE {
            self.others.remove(before.other as usize);
        }
    }

    /// The records at or above `from` and below `to`, in order.
    pub fn range(&self, from: i64, to: i64) -> impl Iterator<Item = TailEntry<'_>> {
        let (first, slot) = self.place(from);
        let blocks = self.blocks.range(first.min(self.blocks.len())..).enumerate();
        let entries = blocks.flat_map(move |(index, block)| {
            let first = if index == 0 { slot } else { 0 };
            block.slots[first..].iter().map(move |slot| self.entry(block, slot))
        });
        entries.take_while(move |entry| entry.record.offset < to)
    }

    fn entry<'a>(&'a self, block: &'a Block, slot: &Slot) -> TailEntry<'a> {
        TailEntry {
            record: block.record(slot),
            members: self.lists.get(slot.list as usize).map(|list| &list.members),
            other: self.others.get(slot.other as usize),
        }
    }

    /// The place of the first record at or above this offset.
    fn place(&self, offset: i64) -> Place {
        let is_below = |block: &Block| block.slots.last().is_some_and(|last| last.offset < offset);
        let index = self.blocks.partition_point(is_below);
        let slot = self.blocks.get(index).map_or(0, |block| {
            let below = block.slots.partition_point(|slot| slot.offset < offset);
            below.max(block.dropped)
        });
        (index, slot)
    }

    fn slot_at(&self, (block, slot): Place) -> Option<&Slot> {
        self.blocks.get(block)?.slots.get(slot)
    }

    fn last_offset(&self) -> Option<i64> {
        Some(self.blocks.back()?.slots.last()?.offset)
    }

    /// The record right before `offset`, which is not below [`PartitionTail::from`]: its offset, if it is known, and
    /// its check. [`UNCHECKED`]: this node has not read that record.
    pub fn before(&self, offset: i64) -> (Option<i64>, u32) {
        let (block, slot) = self.place(offset);
        // Also a dropped one, as long as its block is there.
        let in_block = slot.checked_sub(1).map(|before| (block, before));
        let place = in_block.or_else(|| {
            let before = block.checked_sub(1)?;
            Some((before, self.blocks[before].slots.len() - 1))
        });
        match place {
            Some((block, slot)) => {
                let block = &self.blocks[block];
                let slot = &block.slots[slot];
                (Some(slot.offset), block.check(slot))
            }
            None => (self.from.checked_sub(1), self.check_before),
        }
    }

    /// Records in the tail.
    pub fn len(&self) -> usize {
        self.records
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// When the oldest record was pushed, Unix time in ms.
    pub fn oldest_ms(&self) -> Option<u64> {
        self.blocks.front().map(|block| block.slots[block.dropped].since_ms)
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
    use std::collections::BTreeMap;

    use super::*;

    const VALUE: [u8; 1_000] = [7; 1_000];

    fn record(offset: i64, bytes: usize) -> TailRecord<'static> {
        let appended_at_ms = offset as u64 * 3;
        TailRecord { offset, appended_at_ms, key: None, value: &VALUE[..bytes] }
    }

    fn offsets(tail: &PartitionTail, from: i64, to: i64) -> Vec<i64> {
        tail.range(from, to).map(|entry| entry.record.offset).collect()
    }

    #[test]
    fn tail_keeps_its_age() {
        let mut tail = PartitionTail::new(5, TailBudget::new(1 << 20, 1_000));
        for (offset, at_ms) in [(5, 100), (7, 600), (8, 1_100), (9, 1_600)] {
            tail.push(record(offset, 10), None, at_ms);
        }
        assert_eq!(offsets(&tail, 0, 100), [7, 8, 9]);
        assert_eq!(offsets(&tail, 8, 9), [8]);
        assert_eq!(tail.from(), 6);
        tail.trim(10_000);
        assert!(tail.is_empty());
        assert_eq!(tail.from(), 10);
        assert!(offsets(&tail, 0, 100).is_empty());
    }

    #[test]
    fn tail_of_a_partition_that_goes_back_begins_there() {
        let budget = TailBudget::new(1 << 20, 1_000);
        let mut tail = PartitionTail::new(5, Arc::clone(&budget));
        for offset in [5, 7, 8] {
            tail.push(record(offset, 10), None, 100);
        }
        tail.push(record(3, 10), None, 200);
        assert_eq!(offsets(&tail, 0, 100), [3]);
        assert_eq!((tail.from(), tail.before(3)), (3, (Some(2), UNCHECKED)));
        let mut other = PartitionTail::new(3, TailBudget::new(1 << 20, 1_000));
        other.push(record(3, 10), None, 200);
        assert_eq!(budget.bytes(), other.bytes);
    }

    #[test]
    fn tail_over_its_share_gives_way_and_the_other_stays() {
        let budget = TailBudget::new(100_000, u64::MAX);
        let (mut busy, mut quiet) = (
            PartitionTail::new(0, Arc::clone(&budget)),
            PartitionTail::new(0, Arc::clone(&budget)),
        );
        quiet.push(record(0, 1_000), None, 1);
        for offset in 0..1_000 {
            busy.push(record(offset, 1_000), None, 1);
            assert!(budget.bytes() <= 100_000);
        }
        assert_eq!(quiet.len(), 1);
        assert!(busy.len() > 60, "{}", busy.len());
        drop((busy, quiet));
        assert_eq!(budget.bytes(), 0);
    }

    #[test]
    fn shared_member_list_is_counted_once() {
        let budget = TailBudget::new(u64::MAX, u64::MAX);
        let mut tail = PartitionTail::new(0, Arc::clone(&budget));
        let members: Members = (0..1_000).map(|n| format!("{n:04}")).collect();
        let list = members.bytes() as u64 + LIST_BYTES;
        let audience = TailAudience { members, other: Some(Arc::from("guest")) };
        assert!(audience.contains("0007") && audience.contains("guest") && !audience.contains("x"));
        for offset in 0..10 {
            tail.push(record(offset, 10), Some(&audience), 1);
        }
        let blocks: u64 = tail.blocks.iter().map(Block::bytes).sum();
        assert_eq!(budget.bytes(), list + blocks);
        let entry = tail.range(4, 5).next().unwrap();
        assert!(entry.is_for("0007") && entry.is_for("guest") && !entry.is_for("x"));
    }

    /// The check of a position is that of the record before it, also of one that is dropped.
    #[test]
    fn check_is_that_of_the_record_before_the_position() {
        let mut tail = PartitionTail::new(0, TailBudget::new(u64::MAX, 1_000));
        assert_eq!(tail.before(0).1, UNCHECKED, "nothing was read");
        let check = |offset: i64| record_check(offset as u64 * 3, None);
        for offset in [0, 1, 5, 6] {
            tail.push(record(offset, 700), None, offset as u64);
        }
        assert_eq!(tail.before(0).1, UNCHECKED);
        let found = [1, 2, 5, 6, 7, 90].map(|next| tail.before(next));
        assert_eq!(found, [0, 1, 1, 5, 6, 6].map(|offset| (Some(offset), check(offset))));
        tail.trim(1_003);
        assert_eq!(tail.from(), 2);
        assert_eq!(tail.before(2), (Some(1), check(1)), "dropped, in a block that is left");
        tail.trim(10_000);
        assert!(tail.blocks.is_empty());
        assert_eq!(tail.before(7), (Some(6), check(6)), "dropped with its block");
    }

    /// An oracle: what is kept is what was pushed last, and the bytes are those of it.
    #[test]
    fn records_and_bytes_are_those_of_what_is_kept() {
        let budget = TailBudget::new(60_000, 1_500);
        let mut tail = PartitionTail::new(0, Arc::clone(&budget));
        let lists: Vec<Members> =
            (1..6).map(|list| (0..list * 20).map(|n| format!("{list}-{n:04}")).collect()).collect();
        let audience = |n: usize| {
            let other = n.is_multiple_of(4).then(|| Arc::from(format!("guest-{n}")));
            TailAudience { members: lists[n % 5].clone(), other }
        };
        let mut pushed = BTreeMap::new();
        for n in 0..900_usize {
            let (offset, size) = (n as i64, n * 7 % 300);
            let known = (n % 3 > 0).then(|| audience(n / 7));
            if n % 13 == 5 {
                pushed.insert(offset, (size, None)); // Parked.
            } else {
                pushed.insert(offset, (size, known.clone()));
                tail.push(record(offset, size), known.as_ref(), n as u64 * 5);
            }
            if n % 13 == 9 {
                tail.insert(record(offset - 4, (n - 4) * 7 % 300), None, n as u64 * 5);
            }
            let is_parked = (n % 13 == 5 || (n >= 3 && (n - 3) % 13 == 5)).then_some(());
            if n >= 3 && is_parked.is_none() {
                tail.resolve(offset - 3, &audience(n));
                pushed.get_mut(&(offset - 3)).unwrap().1 = Some(audience(n));
            }
            let mut bytes: u64 = tail.blocks.iter().chain(&tail.spare).map(Block::bytes).sum();
            let lists = tail.lists.iter().map(|(_, list)| list.members.bytes() as u64 + LIST_BYTES);
            bytes += lists.sum::<u64>();
            assert_eq!(budget.bytes(), bytes);
            assert!(bytes <= 60_000);
            let parked_until = offset - (n % 13) as i64 + 5;
            let is_there = |at: &i64| *at != parked_until || n % 13 >= 9 || n % 13 < 5;
            let expected: Vec<i64> =
                pushed.range(tail.from()..).map(|(at, _)| *at).filter(is_there).collect();
            assert_eq!(offsets(&tail, 0, i64::MAX), expected);
            assert_eq!(tail.len(), expected.len());
            let mut users = 0;
            for entry in tail.range(0, i64::MAX) {
                let (size, audience) = &pushed[&entry.record.offset];
                assert_eq!(entry.record, record(entry.record.offset, *size));
                assert_eq!(entry.members.is_some(), audience.is_some());
                if let (Some(members), Some(audience)) = (entry.members, audience) {
                    assert!(members.is_same(&audience.members));
                    assert_eq!(entry.other, audience.other.as_ref());
                    users += usize::from(audience.other.is_some());
                }
            }
            assert_eq!(tail.others.len(), users);
            assert_eq!(tail.kept_until.len(), tail.lists.len());
        }
        assert!(tail.len() < 290, "{}", tail.len());
        // What no record holds any more is dropped with the records before it.
        tail.trim(100_000);
        assert!(tail.is_empty() && tail.lists.is_empty() && tail.by_address.is_empty());
        drop(tail);
        assert_eq!((budget.bytes(), budget.age_ms(5_000)), (0, 0));
    }

    #[test]
    fn age_is_that_of_the_oldest_record_of_all_tails() {
        let budget = TailBudget::new(u64::MAX, 1_000);
        assert_eq!(budget.age_ms(5_000), 0);
        let mut first = PartitionTail::new(0, Arc::clone(&budget));
        let mut second = PartitionTail::new(0, Arc::clone(&budget));
        second.push(record(0, 10), None, 4_500);
        first.push(record(0, 10), None, 4_800);
        assert_eq!(budget.age_ms(5_000), 500);
        drop(second);
        assert_eq!(budget.age_ms(5_000), 200);
        first.trim(6_000);
        assert_eq!(budget.age_ms(6_000), 0);
    }
}
