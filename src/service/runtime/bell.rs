//! Waiting on a doorbell from a tokio task.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::handoff::Doorbell;

struct BellFd(Arc<Doorbell>);

impl AsRawFd for BellFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A [`Doorbell`] whose sleeper is a tokio task.
///
/// Call in this order: [`AsyncBell::about_to_sleep`], check every ring once more,
/// await [`AsyncBell::rung`] together with the task's other events, then [`AsyncBell::awake`].
pub struct AsyncBell {
    fd: AsyncFd<BellFd>,
}

impl AsyncBell {
    /// Registers the bell with the current runtime.
    ///
    /// # Errors
    /// The runtime cannot poll the descriptor.
    #[expect(
        deprecated,
        reason = "its replacement is the same call, marked unsafe because the descriptor must stay \
                  open; here the doorbell owns the eventfd, and the Arc keeps the doorbell"
    )]
    pub fn new(bell: Arc<Doorbell>) -> io::Result<Self> {
        Ok(Self { fd: AsyncFd::with_interest(BellFd(bell), Interest::READABLE)? })
    }

    /// See [`Doorbell::about_to_sleep`].
    pub fn about_to_sleep(&self) {
        self.fd.get_ref().0.about_to_sleep();
    }

    /// See [`Doorbell::awake`].
    pub fn awake(&self) {
        self.fd.get_ref().0.awake();
    }

    /// Waits for a ring; may return once without one. Cancel safe.
    pub async fn rung(&self) {
        match self.fd.readable().await {
            // Readiness is cleared before the eventfd is read: a ring in between is a new edge, so
            // it wakes again and is not lost.
            Ok(mut guard) => guard.clear_ready(),
            // The runtime is shutting down: this task will not be polled again.
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_ring_wakes_the_sleeper() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let waiting = AsyncBell::new(Arc::clone(&bell)).unwrap();
        for _ in 0..3 {
            waiting.about_to_sleep();
            let ringer = std::thread::spawn({
                let bell = Arc::clone(&bell);
                move || bell.ring()
            });
            waiting.rung().await;
            waiting.awake();
            ringer.join().unwrap();
        }
    }

    #[tokio::test]
    async fn ring_before_the_wait_is_not_lost() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let waiting = AsyncBell::new(Arc::clone(&bell)).unwrap();
        waiting.about_to_sleep();
        bell.ring();
        waiting.rung().await;
        waiting.awake();
    }
}
