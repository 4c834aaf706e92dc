//! The number of connections that the shards may have together.

use std::sync::atomic::{AtomicU32, Ordering};

/// Free places, shared by all shards. A place is taken by each connection that is admitted and given back when its slot
/// is free.
#[derive(Debug)]
pub struct Capacity(AtomicU32);

impl Capacity {
    /// Room for `connections_max` connections.
    pub fn new(connections_max: u32) -> Self {
        Self(AtomicU32::new(connections_max))
    }

    /// Takes a place. Returns whether one was free.
    pub fn take(&self) -> bool {
        let less = |free: u32| free.checked_sub(1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Gives a place back.
    pub fn give_back(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Free places; other shards may take or give back some at any time.
    pub fn free(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_places_are_taken_than_there_are() {
        let capacity = Capacity::new(100);
        let took = || (0..80).filter(|_| capacity.take()).count();
        let taken = std::thread::scope(|scope| {
            [scope.spawn(took), scope.spawn(took)].map(|taker| taker.join().unwrap())
        });
        assert_eq!((taken[0] + taken[1], capacity.free()), (100, 0));
        capacity.give_back();
        assert!(capacity.take() && !capacity.take());
    }
}
