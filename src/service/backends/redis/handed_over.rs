//! Handed-over records that wait for the router: a bounded queue, and what happens when it is full.
//!
//! A record that finds no room is a gap. Which sessions it concerns is not known, so all sessions are
//! closed with 4409; not at once, because a client that resumes at once would fall into the same gap.
//! Further records are dropped until the router has taken all that wait; then the sessions are closed, and
//! the next record is accepted.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::counters::SubscriptionCounters;
use crate::handoff::Pushed;
use crate::service::backends::ports::{MissedEvents, RouterInbox, RouterInput};

/// Interval of attempts while the router is full.
const ROUTER_RETRY: Duration = Duration::from_millis(1);

/// What both ends of the queue share.
struct WaitingRecords {
    bytes: AtomicUsize,
    /// Whether records are dropped until the queue is empty.
    overflowed: Mutex<bool>,
    counters: Arc<SubscriptionCounters>,
}

/// The reader's end of the queue.
pub(super) struct HandedOver {
    queue: mpsc::Sender<Bytes>,
    waiting: Arc<WaitingRecords>,
    bytes_max: usize,
}

impl HandedOver {
    /// Starts the task that moves records to the router.
    pub(super) fn start(
        (records_max, bytes_max): (usize, usize),
        router: Arc<dyn RouterInbox>,
        missed: Arc<dyn MissedEvents>,
        counters: Arc<SubscriptionCounters>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (queue, records) = mpsc::channel(records_max);
        let overflowed = Mutex::new(false);
        let waiting = Arc::new(WaitingRecords { bytes: AtomicUsize::new(0), overflowed, counters });
        tasks.spawn(pump(records, router, missed, Arc::clone(&waiting)));
        Self { queue, waiting, bytes_max }
    }

    /// Queues a record, or drops it. Never blocks.
    pub(super) fn take(&self, payload: &[u8]) {
        let counters = &self.waiting.counters;
        counters.redis_hand_offs.add(1);
        let value = Bytes::copy_from_slice(payload);
        let bytes = value.len();
        // Locked before the queue is looked at: the pump empties it, then looks at the mark.
        let mut overflowed = self.waiting.overflowed.lock().expect("no holder panics");
        let waiting = self.waiting.bytes.load(Ordering::Relaxed);
        let fits = waiting == 0 || waiting + bytes <= self.bytes_max;
        match self.queue.try_reserve() {
            Ok(place) if fits && !*overflowed => {
                self.waiting.bytes.fetch_add(bytes, Ordering::Relaxed);
                counters.redis_hand_offs_waiting.add(1);
                place.send(value);
            }
            Ok(_) | Err(_) => {
                counters.redis_hand_offs_dropped.add(1);
                if !std::mem::replace(&mut *overflowed, true) {
                    counters.redis_hand_off_gaps.add(1);
                }
            }
        }
    }
}

/// Moves records to the router in order, as fast as it accepts them.
async fn pump(
    mut records: mpsc::Receiver<Bytes>,
    router: Arc<dyn RouterInbox>,
    missed: Arc<dyn MissedEvents>,
    waiting: Arc<WaitingRecords>,
) {
    while let Some(value) = records.recv().await {
        let bytes = value.len();
        let mut input = RouterInput::Remote { value };
        loop {
            match router.send(input) {
                Pushed::Accepted => break,
                Pushed::Full(back) => {
                    input = back;
                    sleep(ROUTER_RETRY).await;
                }
                Pushed::Closed(_) => return,
            }
        }
        waiting.bytes.fetch_sub(bytes, Ordering::Relaxed);
        waiting.counters.redis_hand_offs_waiting.sub(1);
        let mut overflowed = waiting.overflowed.lock().expect("no holder panics");
        if *overflowed && records.is_empty() {
            // Under the lock, so that the sessions leave before the next record is accepted.
            missed.missed_by_all();
            *overflowed = false;
        }
    }
}
