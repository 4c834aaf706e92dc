//! A bounded map with the CLOCK (second chance) rule of eviction.
//!
//! ```text
//!   index: hash ──► slot          slots: │ a │ b │   │ c*│ d │    * read since the hand passed
//!                                              ▲
//!                                            hand ─► evicts the next entry without a mark,
//!                                                    takes the mark off the others
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hashbrown::HashTable;
use slab::Slab;

/// Slots that one [`Cache::evict_stale`] looks at.
const STALE_LOOKS: usize = 4;

/// The weight of an entry, and whether it can be evicted.
pub trait Weigh {
    /// Its share of [`Bounds::weight_max`].
    fn weight(&self) -> usize;

    /// A pinned entry is never evicted.
    fn is_pinned(&self) -> bool {
        false
    }
}

/// How much a cache holds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Entries.
    pub entries_max: usize,
    /// Sum of their weights.
    pub weight_max: usize,
}

#[derive(Debug)]
struct Slot<V> {
    key: Arc<str>,
    hash: u64,
    value: V,
    /// Read since the hand passed.
    used: AtomicBool,
}

/// A bounded map from strings. The caller hashes, locks, and decides when to evict: the same hash
/// can also select one of several caches.
#[derive(Debug)]
pub struct Cache<V> {
    index: HashTable<u32>,
    slots: Slab<Slot<V>>,
    hand: usize,
    weight: usize,
    bounds: Bounds,
}

impl<V: Weigh> Cache<V> {
    /// An empty cache; it allocates as it fills.
    pub fn new(bounds: Bounds) -> Self {
        Self { index: HashTable::new(), slots: Slab::new(), hand: 0, weight: 0, bounds }
    }

    /// Entries held.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Sum of the weights of the entries held.
    pub fn weight(&self) -> usize {
        self.weight
    }

    fn slot(&self, hash: u64, key: &str) -> Option<usize> {
        let is_key = |slot: &u32| *self.slots[*slot as usize].key == *key;
        self.index.find(hash, is_key).map(|slot| *slot as usize)
    }

    /// Whether it holds an entry of this key. Does not mark the entry as used.
    pub fn contains(&self, hash: u64, key: &str) -> bool {
        self.slot(hash, key).is_some()
    }

    /// Applies `read` to an entry. `Some` marks the entry as used.
    pub fn read<T>(&self, hash: u64, key: &str, read: impl FnOnce(&V) -> Option<T>) -> Option<T> {
        let slot = &self.slots[self.slot(hash, key)?];
        let found = read(&slot.value)?;
        // Stored only if it changes something: the cache line stays shared between readers.
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some(found)
    }

    /// Changes an entry in place. `None`: there is none.
    pub fn update<T>(
        &mut self,
        hash: u64,
        key: &str,
        update: impl FnOnce(&Arc<str>, &mut V) -> T,
    ) -> Option<T> {
        let slot = self.slot(hash, key)?;
        let Slot { key, value, .. } = &mut self.slots[slot];
        self.weight -= value.weight();
        let result = update(key, value);
        self.weight += value.weight();
        Some(result)
    }

    /// Changes all entries in place.
    pub fn update_all(&mut self, mut update: impl FnMut(&mut V)) {
        self.weight = 0;
        for (_, slot) in &mut self.slots {
            update(&mut slot.value);
            self.weight += slot.value.weight();
        }
    }

    /// Inserts or replaces an entry; the bounds hold after the next [`Cache::evict`].
    pub fn insert(&mut self, hash: u64, key: Arc<str>, value: V) {
        self.remove(hash, &key);
        self.weight += value.weight();
        let slot = self.slots.insert(Slot { key, hash, value, used: AtomicBool::new(false) });
        let (slot, slots) = (u32::try_from(slot).expect("fewer than 2^32 entries"), &self.slots);
        self.index.insert_unique(hash, slot, |slot| slots[*slot as usize].hash);
    }

    /// Removes an entry.
    pub fn remove(&mut self, hash: u64, key: &str) {
        if let Some(slot) = self.slot(hash, key) {
            self.free(slot);
        }
    }

    /// Removes all entries and frees their memory.
    pub fn clear(&mut self) {
        *self = Self::new(self.bounds);
    }

    fn free(&mut self, slot: usize) {
        let Slot { hash, value, .. } = self.slots.remove(slot);
        self.weight -= value.weight();
        let indexed = self.index.find_entry(hash, |indexed| *indexed as usize == slot);
        indexed.unwrap_or_else(|_| unreachable!("every slot is indexed")).remove();
    }

    /// Evicts entries until the bounds hold, and returns how many. The entry of `keep` and pinned
    /// ones stay, even beyond the bounds.
    pub fn evict(&mut self, keep: &str) -> usize {
        let before = self.len();
        let Bounds { entries_max, weight_max } = self.bounds;
        // Two rounds: the first one may only remove all marks.
        let mut looks = 2 * self.slots.capacity();
        while (self.len() > entries_max || self.weight > weight_max) && looks > 0 {
            looks -= 1;
            self.turn(|slot| {
                *slot.key != *keep
                    && !slot.value.is_pinned()
                    && !slot.used.swap(false, Ordering::Relaxed)
            });
        }
        before - self.len()
    }

    /// Looks at the next few entries and evicts those that are stale. Called with each insertion,
    /// it keeps stale entries few.
    pub fn evict_stale(&mut self, is_stale: impl Fn(&V) -> bool) {
        for _ in 0..STALE_LOOKS {
            self.turn(|slot| is_stale(&slot.value));
        }
    }

    /// Moves the hand over one slot, and evicts the entry there if `goes` returns true.
    fn turn(&mut self, goes: impl FnOnce(&Slot<V>) -> bool) {
        let slot = self.hand;
        self.hand = if slot + 1 < self.slots.capacity() { slot + 1 } else { 0 };
        if self.slots.get(slot).is_some_and(goes) {
            self.free(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl Weigh for u8 {
        fn weight(&self) -> usize {
            usize::from(*self)
        }
    }

    fn cache(entries_max: usize, weight_max: usize) -> Cache<u8> {
        Cache::new(Bounds { entries_max, weight_max })
    }

    fn hash(key: &str) -> u64 {
        // Collides often, so that keys are compared.
        (key.len() as u64) << 60
    }

    fn insert(cache: &mut Cache<u8>, key: &str, value: u8) -> usize {
        cache.insert(hash(key), key.into(), value);
        cache.evict(key)
    }

    fn has(cache: &Cache<u8>, key: &str) -> bool {
        cache.contains(hash(key), key)
    }

    #[test]
    fn used_entries_get_a_second_chance() {
        let mut cache = cache(3, 100);
        for key in ["a", "b", "c"] {
            insert(&mut cache, key, 1);
        }
        assert_eq!(cache.read(hash("a"), "a", |value| Some(*value)), Some(1));
        assert_eq!(insert(&mut cache, "d", 1), 1);
        assert!(has(&cache, "a") && !has(&cache, "b"));
        assert_eq!(insert(&mut cache, "e", 1), 1);
        assert!(!has(&cache, "c"), "the hand goes on from where it was");
        assert_eq!(insert(&mut cache, "f", 1) + insert(&mut cache, "g", 1), 2);
        assert!(!has(&cache, "d") && !has(&cache, "a"), "the mark was good for one round");
    }

    #[test]
    fn entry_that_exceeds_the_bound_is_the_only_one() {
        let mut cache = cache(10, 10);
        insert(&mut cache, "a", 5);
        insert(&mut cache, "b", 5);
        assert_eq!(insert(&mut cache, "huge", 99), 2);
        assert_eq!((cache.len(), cache.weight()), (1, 99));
        assert_eq!(insert(&mut cache, "a", 5), 1);
        assert_eq!((cache.len(), cache.weight()), (1, 5));
    }

    #[test]
    fn stale_entries_go() {
        let mut cache = cache(10, 100);
        for (key, value) in [("a", 1), ("b", 2), ("c", 3)] {
            insert(&mut cache, key, value);
        }
        cache.evict_stale(|value| *value < 3);
        assert_eq!((cache.len(), cache.weight()), (1, 3));
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(
            steps in prop::collection::vec((0_u8..12, 0_u8..3, 0_u8..20), 0..200),
        ) {
            let (mut cache, mut oracle) = (cache(8, 60), BTreeMap::new());
            for (key, step, value) in steps {
                let key = format!("{key}");
                match step {
                    0 => {
                        insert(&mut cache, &key, value);
                        oracle.insert(key.clone(), value);
                    }
                    1 => {
                        cache.remove(hash(&key), &key);
                        oracle.remove(&key);
                    }
                    _ => {
                        let updated = cache.update(hash(&key), &key, |_, old| *old = value);
                        if updated.is_some() {
                            oracle.insert(key.clone(), value);
                        }
                    }
                }
                cache.evict(&key);
                oracle.retain(|key, _| has(&cache, key));
                prop_assert!(cache.len() <= 8 && cache.weight() <= 60);
                prop_assert_eq!(cache.len(), oracle.len());
                prop_assert_eq!(cache.index.len(), oracle.len());
                let weight: usize = oracle.values().map(|value| usize::from(*value)).sum();
                prop_assert_eq!(cache.weight(), weight);
                for (key, value) in &oracle {
                    prop_assert_eq!(cache.read(hash(key), key, |value| Some(*value)), Some(*value));
                }
            }
        }
    }
}
