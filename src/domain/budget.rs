//! A memory bound for what waits in many places: live events in rings, shards and the stream hub; what sessions
//! remember of their catch-up.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

/// A bound that all routers share. A router checks it before it makes the next event. Each event is charged when it is
/// made; the charge is returned when its last holder drops it.
#[derive(Debug)]
pub struct EventBudget {
    /// Below 0 for a moment, while two threads change the same charge.
    charged: AtomicI64,
    bytes_max: u64,
}

impl EventBudget {
    /// An empty budget.
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { charged: AtomicI64::new(0), bytes_max })
    }

    /// Bytes charged at the moment.
    pub fn charged(&self) -> u64 {
        u64::try_from(self.charged.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Whether one more event may be made. That event may exceed the bound by itself.
    pub fn has_room(&self) -> bool {
        self.charged() < self.bytes_max
    }

    /// Takes `bytes` until the charge is dropped.
    pub fn charge(self: &Arc<Self>, bytes: u64) -> Charge {
        let bytes = i64::try_from(bytes).expect("memory is smaller");
        self.charged.fetch_add(bytes, Ordering::Relaxed);
        Charge { budget: Arc::clone(self), bytes, suspended: AtomicU32::new(0) }
    }
}

/// What one event, or one list of recipients, takes of the budget.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<EventBudget>,
    bytes: i64,
    /// Number of holders that count the bytes towards a bound of their own.
    suspended: AtomicU32,
}

impl Charge {
    /// A holder counts the bytes towards a bound of its own, until [`Charge::resume`].
    pub fn suspend(&self) {
        if self.suspended.fetch_add(1, Ordering::Relaxed) == 0 {
            self.budget.charged.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }

    /// The holder does not count the bytes any more. Until the last one calls this, the budget is not charged.
    pub fn resume(&self) {
        if self.suspended.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.budget.charged.fetch_add(self.bytes, Ordering::Relaxed);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if *self.suspended.get_mut() == 0 {
            self.budget.charged.fetch_sub(self.bytes, Ordering::Relaxed);
        }
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
        assert_eq!((budget.charged(), budget.has_room()), (149, false));
        drop(first);
        assert_eq!((budget.charged(), budget.has_room()), (50, true));
        drop(second);
        assert_eq!(budget.charged(), 0);
    }

    #[test]
    fn suspended_charge_counts_again_when_its_last_holder_resumes_it() {
        let budget = EventBudget::new(100);
        let charge = budget.charge(60);
        let mut seen = Vec::new();
        for step in [Charge::suspend, Charge::suspend, Charge::resume, Charge::resume] {
            step(&charge);
            seen.push(budget.charged());
        }
        assert_eq!(seen, [0, 0, 0, 60]);
        charge.suspend();
        drop(charge);
        assert_eq!(budget.charged(), 0);
    }
}
