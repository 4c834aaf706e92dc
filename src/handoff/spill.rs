//! A producer that never refuses an item.

use std::collections::VecDeque;

use super::{Producer, Pushed};

/// Waiting items for which memory is kept after a storm.
const CAPACITY_KEPT: usize = 1024;

/// The producer's end of a ring, and the items that have found it full. They keep their order. Whoever uses it bounds
/// what is pushed: by what each item stands for, or by [`SpillingProducer::waiting`].
#[derive(Debug)]
pub struct SpillingProducer<T> {
    ring: Producer<T>,
    waiting: VecDeque<T>,
}

impl<T> From<Producer<T>> for SpillingProducer<T> {
    fn from(ring: Producer<T>) -> Self {
        Self { ring, waiting: VecDeque::new() }
    }
}

impl<T> SpillingProducer<T> {
    /// Pushes an item behind those that wait. It is dropped if the consumer is gone. Returns whether it has to wait.
    pub fn push(&mut self, item: T) -> bool {
        let full = match self.waiting.is_empty() {
            true => self.ring.push(item),
            false => Pushed::Full(item),
        };
        match full {
            Pushed::Accepted | Pushed::Closed(_) => false,
            Pushed::Full(item) => {
                self.waiting.push_back(item);
                true
            }
        }
    }

    /// Pushes waiting items as long as they fit.
    pub fn flush(&mut self) {
        while let Some(item) = self.waiting.pop_front() {
            match self.ring.push(item) {
                Pushed::Accepted => {}
                Pushed::Full(item) => return self.waiting.push_front(item),
                Pushed::Closed(_) => self.waiting.clear(),
            }
        }
        self.waiting.shrink_to(CAPACITY_KEPT);
    }

    /// [`Producer::publish`].
    pub fn publish(&mut self) {
        self.ring.publish();
    }

    /// [`Producer::publish_quietly`].
    pub fn publish_quietly(&mut self) {
        self.ring.publish_quietly();
    }

    /// Number of items that wait for room.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::handoff::{Doorbell, ring};

    #[test]
    fn items_keep_their_order_over_a_full_ring() {
        let (producer, mut consumer) = ring(2, Arc::new(Doorbell::new().unwrap()));
        let mut producer = SpillingProducer::from(producer);
        let waits: Vec<_> = (0..6).map(|item| producer.push(item)).collect();
        assert_eq!(waits, [false, false, true, true, true, true]);
        assert_eq!(consumer.pop(), Some(0));
        assert!(producer.push(6), "there is room, but others wait");
        let mut taken = Vec::new();
        while taken.len() < 6 {
            producer.flush();
            taken.extend(std::iter::from_fn(|| consumer.pop()));
        }
        assert_eq!((taken, producer.waiting()), (vec![1, 2, 3, 4, 5, 6], 0));
    }

    #[test]
    fn nothing_waits_for_a_consumer_that_is_gone() {
        let (producer, consumer) = ring(1, Arc::new(Doorbell::new().unwrap()));
        let mut producer = SpillingProducer::from(producer);
        assert!(!producer.push(0) && producer.push(1) && producer.push(2));
        drop(consumer);
        producer.flush();
        assert_eq!(producer.waiting(), 0);
        assert!(!producer.push(3));
    }
}
