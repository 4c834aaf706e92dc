//! Slot map of the hub's sessions, addressed like a shard's connections.

use crate::domain::ids::{ConnectionKey, GENERATION_MAX};

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    item: Option<T>,
}

/// Items by [`ConnectionKey`]. A slot is reused with another generation.
#[derive(Debug)]
pub(super) struct SlotMap<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    max: usize,
}

impl<T> SlotMap<T> {
    /// At most `max` items.
    pub(super) fn new(max: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), max }
    }

    /// Returns the item if every slot is in use.
    pub(super) fn insert(&mut self, item: T) -> Result<ConnectionKey, T> {
        if let Some(slot) = self.free.pop() {
            let entry = &mut self.slots[slot as usize];
            entry.item = Some(item);
            return Ok(ConnectionKey { slot, generation: entry.generation });
        }
        let slot = match u32::try_from(self.slots.len()) {
            Ok(slot) if self.slots.len() < self.max => slot,
            _ => return Err(item),
        };
        self.slots.push(Slot { generation: 0, item: Some(item) });
        Ok(ConnectionKey { slot, generation: 0 })
    }

    pub(super) fn get(&self, key: ConnectionKey) -> Option<&T> {
        let slot = self.slots.get(key.slot as usize)?;
        if slot.generation == key.generation { slot.item.as_ref() } else { None }
    }

    pub(super) fn get_mut(&mut self, key: ConnectionKey) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation == key.generation { slot.item.as_mut() } else { None }
    }

    /// Removes the item. Its slot gets another generation.
    pub(super) fn remove(&mut self, key: ConnectionKey) -> Option<T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        let item = if slot.generation == key.generation { slot.item.take()? } else { return None };
        slot.generation = if slot.generation == GENERATION_MAX { 0 } else { slot.generation + 1 };
        self.free.push(key.slot);
        Some(item)
    }

    /// All items with their keys.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (ConnectionKey, &mut T)> {
        (0..).zip(&mut self.slots).filter_map(|(slot, entry)| {
            let key = ConnectionKey { slot, generation: entry.generation };
            entry.item.as_mut().map(|item| (key, item))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reused_slot_has_another_key() {
        let mut slots = SlotMap::new(1);
        let first = slots.insert('a').unwrap();
        assert_eq!(slots.insert('b'), Err('b'));
        assert_eq!(slots.remove(first), Some('a'));
        let second = slots.insert('b').unwrap();
        assert_eq!(second.slot, first.slot);
        assert_eq!(slots.get_mut(first), None);
        assert_eq!(slots.get_mut(second), Some(&mut 'b'));
    }

    #[test]
    fn generation_wraps_within_its_bits() {
        let mut slots = SlotMap::new(1);
        slots.slots.push(Slot { generation: GENERATION_MAX, item: Some('a') });
        let last = ConnectionKey { slot: 0, generation: GENERATION_MAX };
        slots.remove(last).unwrap();
        assert_eq!(slots.insert('b').unwrap().generation, 0);
    }
}
