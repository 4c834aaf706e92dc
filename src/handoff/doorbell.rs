//! An eventfd that is written only when the other side sleeps.
//!
//! ```text
//! sleeper                         ringer
//! ───────                         ──────
//! sleeping = true                 push into a ring
//! fence(SeqCst)                   fence(SeqCst)
//! look into every ring again      sleeping?  → false, write the eventfd
//! wait on the eventfd
//! ```
//!
//! The two fences make it impossible that the sleeper misses the push *and* the ringer misses the
//! flag: one of them comes first in the single order of all SeqCst fences.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// The bell of one sleeper; any number of ringers.
#[derive(Debug)]
pub struct Doorbell {
    event: OwnedFd,
    sleeping: AtomicBool,
}

impl Doorbell {
    /// A bell whose owner is awake.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, sleeping: AtomicBool::new(false) })
    }

    /// Sleeper: announces that it is about to wait. Every ring must be looked into once more
    /// between this and the wait.
    pub fn about_to_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Sleeper: awake again; resets the eventfd if it was written.
    pub fn awake(&self) {
        if !self.sleeping.swap(false, Ordering::AcqRel) {
            let mut count = [0; 8];
            // EAGAIN: a ringer has cleared the flag and its write is still to come. The next wait
            // returns at once for nothing, which is harmless.
            let _ = rustix::io::read(&self.event, &mut count);
        }
    }

    /// Ringer: wakes the sleeper if it sleeps. Call it after the push.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            // The only failure is EAGAIN at 2^64 - 1 unread rings, which is as good as a ring.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    /// Sleeper: waits for a ring, at most `timeout_ms`. For threads that have no other thing to
    /// wait for; a reactor waits in its ring instead.
    pub fn wait(&self, timeout_ms: u32) {
        let timeout = Timespec {
            tv_sec: i64::from(timeout_ms / 1000),
            tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
        };
        // EINTR or a timeout: the caller looks at its rings again, as after a ring.
        let _ = poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&timeout));
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn ring_before_the_wait_is_not_lost() {
        let bell = Doorbell::new().unwrap();
        bell.about_to_sleep();
        bell.ring();
        bell.wait(u32::MAX);
        bell.awake();
    }

    #[test]
    fn sleeper_is_woken_by_another_thread() {
        let bell = Arc::new(Doorbell::new().unwrap());
        bell.about_to_sleep();
        let ringer = std::thread::spawn({
            let bell = Arc::clone(&bell);
            move || bell.ring()
        });
        bell.wait(u32::MAX);
        bell.awake();
        ringer.join().unwrap();
    }
}
