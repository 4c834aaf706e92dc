//! A limit of connections or calls, at which the oldest one that has done nothing yet makes room for a new one. So
//! silent clients cannot lock out others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// The places, and those of their holders that make room.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    replaceable: Mutex<ReplaceableHolders>,
}

#[derive(Debug, Default)]
struct ReplaceableHolders {
    next: u64,
    oldest_first: BTreeMap<u64, Arc<Notify>>,
}

/// While this exists, its holder makes room for a new one.
#[derive(Debug)]
pub struct Replaceable {
    places: Arc<Places>,
    number: u64,
}

impl Places {
    /// `max` free places.
    pub fn new(max: usize) -> Arc<Self> {
        let free = Arc::new(Semaphore::new(max));
        Arc::new(Self { free, replaceable: Mutex::default() })
    }

    /// Takes a place until the permit is dropped. If none is free, tells the oldest replaceable holder to leave, and
    /// waits until it has. `None`: no holder is replaceable.
    pub async fn take(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.free).try_acquire_owned() {
            return Some(place);
        }
        let (_, leave) = self.lock().oldest_first.pop_first()?;
        leave.notify_one();
        Arc::clone(&self.free).acquire_owned().await.ok()
    }

    /// Makes the holder of a place replaceable, as the newest one. When `leave` is notified, it must drop its place
    /// without waiting for anything.
    pub fn replaceable(self: &Arc<Self>, leave: Arc<Notify>) -> Replaceable {
        let mut holders = self.lock();
        let number = holders.next;
        holders.next += 1;
        holders.oldest_first.insert(number, leave);
        Replaceable { places: Arc::clone(self), number }
    }

    fn lock(&self) -> MutexGuard<'_, ReplaceableHolders> {
        // No code panics under this lock.
        self.replaceable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Replaceable {
    fn drop(&mut self) {
        self.places.lock().oldest_first.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn oldest_replaceable_holder_makes_room() {
        let places = Places::new(3);
        let leave: [Arc<Notify>; 3] = std::array::from_fn(|_| Arc::default());
        let mut held = Vec::new();
        for leave in &leave {
            let place = places.take().await.unwrap();
            held.push((place, places.replaceable(Arc::clone(leave))));
        }
        // The oldest one is not replaceable any more.
        let (_first, replaceable) = held.remove(0);
        drop(replaceable);
        let second = held.remove(0);
        let leaving = async {
            leave[1].notified().await;
            drop(second);
        };
        let (fourth, ()) = tokio::join!(places.take(), leaving);
        assert!(fourth.is_some());
        // The third has stopped being replaceable, too.
        let (_third, replaceable) = held.remove(0);
        drop(replaceable);
        assert!(places.take().await.is_none());
    }
}
