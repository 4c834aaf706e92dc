//! A limit of connections or calls, at which the oldest one that has done nothing yet makes room for a new one. So
//! silent clients cannot lock out others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

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

    /// Takes a place until the permit is dropped, as its newest holder, which is replaceable. If none is free, tells
    /// the oldest replaceable holder to leave, and waits until one has. Those that wait are replaceable, too. `None`:
    /// no other holder is replaceable, or this one had to leave before it got its place.
    pub async fn take(
        self: &Arc<Self>,
        leave: &Arc<Notify>,
    ) -> Option<(OwnedSemaphorePermit, Replaceable)> {
        let replaceable = self.replaceable(Arc::clone(leave));
        if let Ok(place) = Arc::clone(&self.free).try_acquire_owned() {
            return Some((place, replaceable));
        }
        let oldest = self.lock().oldest_first.pop_first();
        let (_, oldest) = oldest.filter(|(number, _)| *number != replaceable.number)?;
        oldest.notify_one();
        tokio::select! {
            place = Arc::clone(&self.free).acquire_owned() => Some((place.ok()?, replaceable)),
            () = leave.notified() => None,
        }
    }

    /// Makes the holder of a place replaceable again, as the newest one. When `leave` is notified, it must drop its
    /// place without waiting for anything.
    pub fn replaceable(self: &Arc<Self>, leave: Arc<Notify>) -> Replaceable {
        let mut holders = self.lock();
        let number = holders.next;
        holders.next += 1;
        holders.oldest_first.insert(number, leave);
        Replaceable { places: Arc::clone(self), number }
    }

    fn lock(&self) -> MutexGuard<'_, ReplaceableHolders> {
        self.replaceable.lock().expect("no holder panics")
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
        let leave: [Arc<Notify>; 4] = std::array::from_fn(|_| Arc::default());
        let mut held = Vec::new();
        for leave in &leave[..3] {
            held.push(places.take(leave).await.unwrap());
        }
        // The oldest one is not replaceable any more.
        let (_first, replaceable) = held.remove(0);
        drop(replaceable);
        let second = held.remove(0);
        let leaving = async {
            leave[1].notified().await;
            drop(second);
        };
        let (fourth, ()) = tokio::join!(places.take(&leave[3]), leaving);
        // The others have stopped being replaceable, too.
        let (_fourth, replaceable) = fourth.unwrap();
        let (_third, other) = held.remove(0);
        drop((replaceable, other));
        assert!(places.take(&Arc::default()).await.is_none());
    }

    /// A client that connects at the same moment as many silent ones gets in.
    #[tokio::test]
    async fn those_who_wait_make_room_too() {
        let places = Places::new(2);
        let leave: [Arc<Notify>; 8] = std::array::from_fn(|_| Arc::default());
        let hold = |number: usize| {
            let (places, leave) = (Arc::clone(&places), Arc::clone(&leave[number]));
            async move {
                let Some(place) = places.take(&leave).await else { return false };
                if number < 7 {
                    leave.notified().await;
                }
                drop(place);
                true
            }
        };
        let holders: Vec<_> = (0..8).map(|number| tokio::spawn(hold(number))).collect();
        let mut newest = holders.into_iter().last().unwrap();
        assert!((&mut newest).await.unwrap(), "the newest one gets a place");
    }
}
