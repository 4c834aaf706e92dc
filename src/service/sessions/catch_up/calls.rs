//! The bounds of calls and of pages in memory, for all sessions together.
//!
//! ```text
//!  who wants a page ─► queue ─► room for pages? ─► permit for a call ─► call ─► page
//!                      (FIFO)   waits without a permit
//! ```
//!
//! Nobody waits for room while holding a permit. So pages that are not taken delay no call that needs no
//! room, and only as long as they are in memory.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Mutex, Notify, Semaphore, SemaphorePermit};

use super::CatchUpCounters;

/// The bounds.
#[derive(Debug)]
pub(super) struct CallLimits {
    calls: Semaphore,
    /// Held by the first of those that want a page.
    first: Mutex<()>,
    pages: Arc<PageRoom>,
}

/// The bytes of all pages in memory.
#[derive(Debug)]
struct PageRoom {
    bytes: AtomicU64,
    bytes_max: u64,
    /// Notified when bytes were returned.
    returned: Notify,
    counters: Arc<CatchUpCounters>,
}

/// The share of a page in the memory bound, returned when dropped.
#[derive(Debug)]
pub(super) struct PageCharge {
    pages: Arc<PageRoom>,
    bytes: u64,
}

impl CallLimits {
    pub(super) fn new(
        calls_max: usize,
        pages_bytes_max: usize,
        counters: Arc<CatchUpCounters>,
    ) -> Self {
        let pages = PageRoom {
            bytes: AtomicU64::new(0),
            bytes_max: pages_bytes_max as u64,
            returned: Notify::new(),
            counters,
        };
        Self { calls: Semaphore::new(calls_max), first: Mutex::new(()), pages: Arc::new(pages) }
    }

    /// Waits for one of the calls. `None` never happens: the semaphore is not closed.
    pub(super) async fn call(&self) -> Option<SemaphorePermit<'_>> {
        self.calls.acquire().await.ok()
    }

    /// Waits for room for a page, then for one of the calls, first come, first served. The pages of the
    /// calls in flight may exceed the bound.
    pub(super) async fn page_call(&self) -> Option<SemaphorePermit<'_>> {
        let _first = self.first.lock().await;
        loop {
            self.pages.wait_for_room().await;
            let permit = self.call().await?;
            if self.pages.has_room() {
                return Some(permit);
            }
        }
    }

    /// Charges a page that was received.
    pub(super) fn charge(&self, bytes: usize) -> PageCharge {
        let bytes = bytes as u64;
        self.pages.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.pages.counters.pages_bytes.add(bytes);
        PageCharge { pages: Arc::clone(&self.pages), bytes }
    }
}

impl PageRoom {
    fn has_room(&self) -> bool {
        self.bytes.load(Ordering::Acquire) < self.bytes_max
    }

    /// Called by one task at a time.
    async fn wait_for_room(&self) {
        loop {
            let mut returned = pin!(self.returned.notified());
            // Enabled before the bytes are read, so that no return in between is missed.
            returned.as_mut().enable();
            if self.has_room() {
                return;
            }
            returned.await;
        }
    }
}

impl Drop for PageCharge {
    fn drop(&mut self) {
        self.pages.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.pages.counters.pages_bytes.sub(self.bytes);
        self.pages.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use tokio::time::timeout;

    /// Long enough for a task that does not wait.
    const MOMENT: Duration = Duration::from_millis(1);

    /// Issue “From the log to the members”: “the page budget is awaited while holding a call permit”.
    #[tokio::test(start_paused = true)]
    async fn no_permit_is_held_while_room_is_awaited() {
        let limits = Arc::new(CallLimits::new(1, 100, Arc::default()));
        let charge = limits.charge(100);
        let waiting = Arc::clone(&limits);
        let page = tokio::spawn(async move { waiting.page_call().await.is_some() });
        tokio::time::sleep(MOMENT).await;
        assert!(!page.is_finished(), "there is no room");
        let call = timeout(MOMENT, limits.call()).await.expect("the only permit is free");
        drop(charge);
        tokio::time::sleep(MOMENT).await;
        assert!(!page.is_finished(), "there is room, but no permit");
        drop(call);
        assert!(page.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn pages_exceed_their_bound_by_the_calls_in_flight_at_most() {
        let limits = CallLimits::new(3, 100, Arc::default());
        let mut charges = Vec::new();
        for _ in 0..5 {
            let mut permits = Vec::new();
            while let Ok(permit) = timeout(MOMENT, limits.page_call()).await {
                permits.push(permit);
            }
            charges.extend(permits.iter().map(|_| limits.charge(60)));
        }
        assert_eq!(limits.pages.bytes.load(Ordering::Relaxed), 180, "three calls, then none");
        drop(charges);
        assert_eq!(limits.pages.bytes.load(Ordering::Relaxed), 0);
        assert!(timeout(MOMENT, limits.page_call()).await.is_ok());
    }
}
