//! How much memory the events of one maker may take, wherever they wait: in rings, shards or the hub.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bound shared by all events of one maker, who asks before making the next. Each is charged
/// when it is made, and pays back when the last who holds it lets go.
#[derive(Debug)]
pub struct EventBudget {
    held: AtomicU64,
    bytes_max: u64,
}

impl EventBudget {
    /// Nothing held yet.
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { held: AtomicU64::new(0), bytes_max })
    }

    /// Bytes of the events that are alive.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether one more may be made. It may exceed the bound by itself.
    pub fn has_room(&self) -> bool {
        self.held() < self.bytes_max
    }

    /// Takes so many bytes until the charge is dropped.
    pub fn charge(self: &Arc<Self>, bytes: u64) -> Charge {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Charge { budget: Arc::clone(self), bytes }
    }
}

/// What one event takes of its maker's budget.
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
    fn charge_is_paid_back_when_it_is_dropped() {
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
