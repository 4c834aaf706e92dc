//! A memory bound for the events of one producer, wherever they wait: in rings, in shards or in the
//! stream hub.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bound shared by all events of one producer. The producer checks it before it makes the next
/// event. Each event is charged when it is made; the charge is returned when its last holder drops
/// it.
#[derive(Debug)]
pub struct EventBudget {
    held: AtomicU64,
    bytes_max: u64,
}

impl EventBudget {
    /// An empty budget.
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { held: AtomicU64::new(0), bytes_max })
    }

    /// Bytes charged at the moment.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether one more event may be made. That event may exceed the bound by itself.
    pub fn has_room(&self) -> bool {
        self.held() < self.bytes_max
    }

    /// Takes `bytes` until the charge is dropped.
    pub fn charge(self: &Arc<Self>, bytes: u64) -> Charge {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Charge { budget: Arc::clone(self), bytes }
    }
}

/// The share of one event in its producer's budget.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<EventBudget>,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charge_is_returned_on_drop() {
        let budget = EventBudget::new(100);
        let first = budget.charge(99);
        assert!(budget.has_room());
        let second = budget.charge(50);
        assert_eq!((budget.held(), budget.has_room()), (149, false));
        drop(first);
        assert_eq!((budget.held(), budget.has_room()), (50, true));
        drop(second);
        assert_eq!(budget.held(), 0);
    }
}
