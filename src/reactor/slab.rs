//! The slab of a shard's connections. Slots are allocated and returned in chunks; a generation per
//! slot distinguishes its uses. The lowest chunk with a free slot is used first, so that the upper
//! chunks empty and are returned after a peak.

use std::ops::{Index, IndexMut};

use crate::domain::ids::{ConnectionKey, GENERATION_MAX};

/// Slots of one chunk: allocated and returned together.
pub const CHUNK_SLOTS: usize = 1024;
/// Empty chunks that stay allocated, so that a load around the size of a chunk does not allocate
/// each time.
const EMPTY_CHUNKS_KEPT: usize = 1;
/// The end of a free list.
const NONE: u32 = u32::MAX;

/// Slots for values of `T`, addressed by number and generation.
#[derive(Debug)]
pub struct Slab<T> {
    chunks: Vec<Chunk<T>>,
    /// Maximum number of slots.
    limit: usize,
    used: usize,
    /// No chunk below this one has a free slot.
    first_with_room: usize,
    allocated_chunks: usize,
    empty_chunks: usize,
}

#[derive(Debug)]
struct Chunk<T> {
    /// `None`: the memory is returned.
    slots: Option<Box<[Slot<T>]>>,
    /// First entry of the free list, as an index into the chunk.
    free: u32,
    used: usize,
    /// The latest generation, shared by the slots, so that it survives the return of the chunk's memory. A key
    /// comes back at the earliest after as many uses of the chunk as there are generations.
    generation: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    content: Content<T>,
}

#[derive(Debug)]
enum Content<T> {
    Used(T),
    /// The next entry of the free list.
    Free(u32),
}

impl<T> Slab<T> {
    /// Memory of one slot, bytes.
    pub const SLOT_BYTES: usize = size_of::<Slot<T>>();

    /// An empty slab of at most `limit` slots; nothing is allocated yet.
    pub fn new(limit: usize) -> Self {
        assert!(limit > 0);
        Self {
            chunks: Vec::new(),
            limit,
            used: 0,
            first_with_room: 0,
            allocated_chunks: 0,
            empty_chunks: 0,
        }
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Slots that memory is allocated for.
    pub fn allocated(&self) -> usize {
        self.allocated_chunks * CHUNK_SLOTS
    }

    /// Whether [`Slab::insert`] would succeed.
    pub fn has_room(&self) -> bool {
        self.used < self.limit
    }

    /// Puts `value` into the lowest chunk with a free slot. `None`: the slab is full, and `value`
    /// is dropped.
    pub fn insert(&mut self, value: T) -> Option<ConnectionKey> {
        if !self.has_room() {
            return None;
        }
        while self.chunks.get(self.first_with_room).is_some_and(Chunk::is_full) {
            self.first_with_room += 1;
        }
        let index = self.first_with_room;
        if index == self.chunks.len() {
            let free = NONE;
            self.chunks.push(Chunk { slots: None, free, used: 0, generation: 0 });
        }
        let chunk = &mut self.chunks[index];
        if chunk.slots.is_none() {
            chunk.allocate();
            self.allocated_chunks += 1;
        } else if chunk.used == 0 {
            self.empty_chunks -= 1;
        }
        let (within, generation) = chunk.take(value);
        self.used += 1;
        let slot = index * CHUNK_SLOTS + within;
        Some(ConnectionKey { slot: u32::try_from(slot).expect("slots fit 32 bits"), generation })
    }

    /// The value of this slot and generation, if present.
    pub fn get_mut(&mut self, key: ConnectionKey) -> Option<&mut T> {
        let slot = key.slot as usize;
        let slots = self.chunks.get_mut(slot / CHUNK_SLOTS)?.slots.as_deref_mut()?;
        let entry = &mut slots[slot % CHUNK_SLOTS];
        match &mut entry.content {
            Content::Used(value) if entry.generation == key.generation => Some(value),
            _ => None,
        }
    }

    /// The value of this slot and generation, if present.
    pub fn get(&self, key: ConnectionKey) -> Option<&T> {
        let slot = key.slot as usize;
        let slots = self.chunks.get(slot / CHUNK_SLOTS)?.slots.as_deref()?;
        let entry = &slots[slot % CHUNK_SLOTS];
        match &entry.content {
            Content::Used(value) if entry.generation == key.generation => Some(value),
            _ => None,
        }
    }

    /// All values, the lowest slot first.
    pub fn iter(&self) -> impl Iterator<Item = (ConnectionKey, &T)> {
        self.chunks.iter().enumerate().flat_map(|(number, chunk)| {
            let slots = chunk.slots.as_deref().unwrap_or_default().iter().enumerate();
            let used = slots.filter_map(move |(within, entry)| match &entry.content {
                Content::Used(value) => {
                    let slot = (number * CHUNK_SLOTS + within) as u32;
                    Some((ConnectionKey { slot, generation: entry.generation }, value))
                }
                Content::Free(_) => None,
            });
            used.take(chunk.used)
        })
    }

    /// The value in this slot, whatever its generation. For lists that are linked by slots.
    ///
    /// # Panics
    /// If the slot is free: the list is broken.
    pub fn at_mut(&mut self, slot: u32) -> &mut T {
        let slot = slot as usize;
        let slots = self.chunks[slot / CHUNK_SLOTS].slots.as_deref_mut();
        match &mut slots.expect("the chunk of a linked slot is allocated")[slot % CHUNK_SLOTS]
            .content
        {
            Content::Used(value) => value,
            Content::Free(_) => panic!("slot {slot} is linked but free"),
        }
    }

    /// The key of a slot in use; `None` if it is free or was never allocated.
    pub fn key_at(&self, slot: u32) -> Option<ConnectionKey> {
        let slots = self.chunks.get(slot as usize / CHUNK_SLOTS)?.slots.as_deref()?;
        let entry = &slots[slot as usize % CHUNK_SLOTS];
        matches!(entry.content, Content::Used(_))
            .then_some(ConnectionKey { slot, generation: entry.generation })
    }

    /// One past the highest slot that may be in use.
    pub fn slots_end(&self) -> u32 {
        u32::try_from(self.chunks.len() * CHUNK_SLOTS).expect("slots fit 32 bits")
    }

    /// Removes the value and frees the slot. The next use has another generation.
    pub fn remove(&mut self, key: ConnectionKey) -> Option<T> {
        self.get_mut(key)?;
        let index = key.slot as usize / CHUNK_SLOTS;
        let chunk = &mut self.chunks[index];
        let value = chunk.release(key.slot as usize % CHUNK_SLOTS);
        self.used -= 1;
        self.first_with_room = self.first_with_room.min(index);
        if chunk.used == 0 {
            if self.empty_chunks < EMPTY_CHUNKS_KEPT {
                self.empty_chunks += 1;
            } else {
                chunk.slots = None;
                self.allocated_chunks -= 1;
            }
        }
        Some(value)
    }
}

/// The value of a key that is known to be present, such as that of a completion.
///
/// # Panics
/// If it is not: the slot was freed too early.
impl<T> Index<ConnectionKey> for Slab<T> {
    type Output = T;

    #[track_caller]
    fn index(&self, key: ConnectionKey) -> &T {
        let Some(value) = self.get(key) else { absent(key) };
        value
    }
}

impl<T> IndexMut<ConnectionKey> for Slab<T> {
    #[track_caller]
    fn index_mut(&mut self, key: ConnectionKey) -> &mut T {
        let Some(value) = self.get_mut(key) else { absent(key) };
        value
    }
}

#[cold]
#[track_caller]
fn absent(key: ConnectionKey) -> ! {
    panic!("nothing at {key:?}: a slot is kept while a request is in flight")
}

impl<T> Chunk<T> {
    fn is_full(&self) -> bool {
        self.used == CHUNK_SLOTS
    }

    fn allocate(&mut self) {
        assert_eq!(self.used, 0);
        let generation = self.next_generation();
        let last = CHUNK_SLOTS - 1;
        self.slots = Some(
            (0..CHUNK_SLOTS)
                .map(|index| Slot {
                    generation,
                    content: Content::Free(if index == last { NONE } else { index as u32 + 1 }),
                })
                .collect(),
        );
        self.free = 0;
    }

    fn take(&mut self, value: T) -> (usize, u32) {
        let within = self.free as usize;
        let entry = &mut self.slots.as_deref_mut().expect("allocated")[within];
        let Content::Free(next) = entry.content else { panic!("slot {within} is free and used") };
        self.free = next;
        entry.content = Content::Used(value);
        self.used += 1;
        (within, entry.generation)
    }

    fn release(&mut self, within: usize) -> T {
        let generation = self.next_generation();
        let entry = &mut self.slots.as_deref_mut().expect("allocated")[within];
        let content = std::mem::replace(&mut entry.content, Content::Free(self.free));
        let Content::Used(value) = content else { panic!("slot {within} is freed twice") };
        entry.generation = generation;
        self.free = within as u32;
        self.used -= 1;
        value
    }

    fn next_generation(&mut self) -> u32 {
        self.generation = (self.generation + 1) & GENERATION_MAX;
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn successor_in_a_slot_has_another_generation() {
        let mut slab = Slab::new(1);
        let first = slab.insert('a').unwrap();
        assert_eq!(slab.insert('b'), None);
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('c').unwrap();
        assert_eq!(first.slot, second.slot);
        assert_ne!(first.generation, second.generation);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut 'c'));
    }

    #[test]
    #[should_panic(expected = "nothing at ConnectionKey { slot: 0, generation: 1 }")]
    fn index_of_a_removed_value_names_its_key() {
        let mut slab = Slab::new(1);
        let key = slab.insert('a').unwrap();
        slab.remove(key).unwrap();
        slab[key] = 'b';
    }

    #[test]
    fn memory_is_returned_after_a_peak_and_old_keys_stay_invalid() {
        let mut slab = Slab::new(10 * CHUNK_SLOTS);
        let keys: Vec<_> = (0..10 * CHUNK_SLOTS).map(|i| slab.insert(i).unwrap()).collect();
        assert_eq!(slab.allocated(), 10 * CHUNK_SLOTS);
        for key in &keys {
            slab.remove(*key).unwrap();
        }
        assert_eq!(slab.allocated(), EMPTY_CHUNKS_KEPT * CHUNK_SLOTS);
        for i in 0..10 * CHUNK_SLOTS {
            slab.insert(i).unwrap();
        }
        assert!(keys.iter().all(|key| slab.get_mut(*key).is_none()));
    }

    #[test]
    fn old_keys_stay_invalid_when_generations_wrap_and_memory_is_returned() {
        let mut slab = Slab::new(3 * CHUNK_SLOTS);
        let fill = |slab: &mut Slab<_>| -> Vec<_> {
            (0..3 * CHUNK_SLOTS).map(|i| slab.insert(i).unwrap()).collect()
        };
        let empty = |slab: &mut Slab<_>, keys: Vec<_>| {
            assert!(keys.into_iter().all(|key| slab.remove(key).is_some()));
        };
        let keys = fill(&mut slab);
        empty(&mut slab, keys);
        assert_eq!(slab.allocated(), CHUNK_SLOTS);
        slab.chunks[2].generation = GENERATION_MAX - 10;
        let mut keys = fill(&mut slab);
        let mut last = Vec::new();
        for number in 0..20 {
            last.push(keys.pop().unwrap());
            slab.remove(last[number]).unwrap();
            keys.push(slab.insert(number).unwrap());
        }
        empty(&mut slab, keys);
        let key = fill(&mut slab).pop().unwrap();
        assert!(!last.contains(&key), "{key:?} is used again");
    }

    proptest! {
        /// Checked against a map: every key finds its own value until removed, and nothing after
        /// that.
        #[test]
        fn behaves_like_a_map(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..4000)) {
            let mut slab = Slab::new(2 * CHUNK_SLOTS);
            let mut oracle = HashMap::new();
            let mut live = Vec::new();
            let mut dead = Vec::new();
            for (number, (insert, which)) in steps.into_iter().enumerate() {
                if insert || live.is_empty() {
                    let key = slab.insert(number).unwrap();
                    prop_assert!(oracle.insert(key, number).is_none());
                    live.push(key);
                } else {
                    let key = live.swap_remove(which.index(live.len()));
                    prop_assert_eq!(slab.remove(key), oracle.remove(&key));
                    dead.push(key);
                }
                prop_assert_eq!(slab.used(), oracle.len());
            }
            for (key, number) in &mut oracle {
                prop_assert_eq!(slab.get_mut(*key), Some(number));
                prop_assert_eq!(slab.key_at(key.slot), Some(*key));
            }
            for key in dead {
                prop_assert!(slab.get_mut(key).is_none());
            }
        }
    }
}
