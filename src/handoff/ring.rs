//! A bounded single-producer single-consumer ring. It never blocks and never grows, and the outcome
//! of a push must be handled.

use std::sync::Arc;

use crate::handoff::Doorbell;

/// The outcome of a push. An item that was not accepted is returned.
#[must_use = "an ignored overflow is a lost message"]
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed<T> {
    /// The consumer will see it.
    Accepted,
    /// The ring is full: back off and push again later.
    Full(T),
    /// The consumer is gone: no item will ever be taken.
    Closed(T),
}

/// The producer's end.
#[derive(Debug)]
pub struct Producer<T> {
    ring: rtrb::Producer<T>,
    bell: LastRing,
    rung: bool,
}

/// Rings the doorbell when the producer is gone. Dropped after the ring (fields drop in the order of declaration), so
/// that the consumer, once woken, finds the ring abandoned.
#[derive(Debug)]
struct LastRing(Arc<Doorbell>);

impl Drop for LastRing {
    fn drop(&mut self) {
        self.0.ring();
    }
}

/// The consumer's end.
#[derive(Debug)]
pub struct Consumer<T> {
    ring: rtrb::Consumer<T>,
}

/// A ring of `slots` items whose consumer sleeps on `bell`. One doorbell may serve many rings.
pub fn ring<T>(slots: usize, bell: Arc<Doorbell>) -> (Producer<T>, Consumer<T>) {
    assert!(slots > 0);
    let (producer, consumer) = rtrb::RingBuffer::new(slots);
    (Producer { ring: producer, bell: LastRing(bell), rung: true }, Consumer { ring: consumer })
}

impl<T> Producer<T> {
    /// Pushes an item. Never blocks or allocates. The consumer may see the item at once, but only
    /// [`Producer::publish`] wakes it.
    pub fn push(&mut self, item: T) -> Pushed<T> {
        if self.ring.is_abandoned() {
            return Pushed::Closed(item);
        }
        match self.ring.push(item) {
            Ok(()) => {
                self.rung = false;
                Pushed::Accepted
            }
            Err(rtrb::PushError::Full(item)) => Pushed::Full(item),
        }
    }

    /// Rings the doorbell, once for all pushes since the last call. The doorbell makes a system
    /// call only if the consumer sleeps.
    pub fn publish(&mut self) {
        if !std::mem::replace(&mut self.rung, true) {
            self.bell.0.ring();
        }
    }

    /// The same for items that can wait: uses [`Doorbell::nudge`].
    pub fn publish_quietly(&mut self) {
        if !std::mem::replace(&mut self.rung, true) {
            self.bell.0.nudge();
        }
    }

    /// Free slots: at least this many pushes will be accepted.
    pub fn free(&self) -> usize {
        self.ring.slots()
    }
}

impl<T> Consumer<T> {
    /// Takes the oldest item.
    pub fn pop(&mut self) -> Option<T> {
        self.ring.pop().ok()
    }

    /// Whether the ring is empty.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.ring.slots()
    }

    /// Whether the producer is gone. The items that it pushed can still be popped.
    pub fn is_abandoned(&self) -> bool {
        self.ring.is_abandoned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_ring_gives_the_item_back() {
        let (mut producer, mut consumer) = ring(1, Arc::new(Doorbell::new().unwrap()));
        assert_eq!(producer.push(1), Pushed::Accepted);
        assert_eq!(producer.push(2), Pushed::Full(2));
        assert_eq!(consumer.pop(), Some(1));
        assert_eq!(producer.push(2), Pushed::Accepted);
        drop(consumer);
        assert_eq!(producer.push(3), Pushed::Closed(3));
    }

    /// The bell must not ring before the ring is abandoned: the consumer would look once, and sleep on.
    #[test]
    fn consumer_is_woken_to_an_abandoned_ring() {
        for _ in 0..5_000 {
            let bell = Arc::new(Doorbell::new().unwrap());
            let (producer, consumer) = ring::<u8>(1, Arc::clone(&bell));
            let end = std::thread::spawn(move || drop(producer));
            bell.about_to_sleep();
            if !consumer.is_abandoned() {
                bell.wait(60_000);
                assert!(consumer.is_abandoned());
            }
            end.join().unwrap();
        }
    }

    #[test]
    fn pushed_items_survive_the_producer() {
        let (mut producer, mut consumer) = ring(4, Arc::new(Doorbell::new().unwrap()));
        assert_eq!(producer.push(1), Pushed::Accepted);
        drop(producer);
        assert!(consumer.is_abandoned());
        assert_eq!((consumer.pop(), consumer.pop()), (Some(1), None));
    }
}
