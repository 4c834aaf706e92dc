//! An eventfd that is written only when the other side sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::sleep::SleepFlag;

/// The bell of one sleeper; any number of ringers.
#[derive(Debug)]
pub struct Doorbell {
    event: OwnedFd,
    flag: SleepFlag,
}

impl Doorbell {
    /// A bell whose owner is awake.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, flag: SleepFlag::new() })
    }

    /// Sleeper: announces that it is about to wait. Every ring must be looked into once more
    /// between this and the wait.
    pub fn about_to_sleep(&self) {
        self.flag.about_to_sleep(false);
    }

    /// The same, but [`Doorbell::nudge`] does not wake it: for a sleeper that looks into its rings
    /// again before long, and has no use for what it is nudged for until then.
    pub fn about_to_sleep_soundly(&self) {
        self.flag.about_to_sleep(true);
    }

    /// Sleeper: awake again. The eventfd is not read here: a ringer may have cleared the flag and
    /// be just about to write. What waits for edges (a reactor's ring, tokio) need not read it at
    /// all; it may wake once for nothing.
    pub fn awake(&self) {
        self.flag.awake();
    }

    /// Ringer: wakes the sleeper if it sleeps. Call it after the push.
    pub fn ring(&self) {
        if self.flag.must_ring() {
            self.wake();
        }
    }

    /// Ringer: the same unless the sleeper sleeps soundly.
    pub fn nudge(&self) {
        if self.flag.must_nudge() {
            self.wake();
        }
    }

    fn wake(&self) {
        // The only failure is EAGAIN at 2^64 - 1 unread rings, which is as good as a ring.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Sleeper: waits for a ring, at most `timeout_ms`. For threads that have no other thing to
    /// wait for; a reactor waits in its ring instead.
    pub fn wait(&self, timeout_ms: u32) {
        let timeout = Timespec {
            tv_sec: i64::from(timeout_ms / 1000),
            tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
        };
        // EINTR or a timeout: the caller looks at its rings again, as after a ring.
        if let Ok(1..) = poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&timeout)) {
            // Read by the one who was woken by it: the next wait is for the next ring.
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
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
    fn nudge_wakes_only_the_light_sleeper() {
        let bell = Doorbell::new().unwrap();
        bell.about_to_sleep_soundly();
        bell.nudge();
        let unread = rustix::io::read(&bell.event, &mut [0; 8]);
        assert_eq!(unread, Err(rustix::io::Errno::AGAIN));
        bell.ring();
        bell.wait(u32::MAX);
        bell.awake();
        bell.about_to_sleep();
        bell.nudge();
        bell.wait(u32::MAX);
        bell.awake();
    }

    #[test]
    fn late_ring_wakes_once_for_nothing_and_not_for_ever() {
        let bell = Doorbell::new().unwrap();
        bell.about_to_sleep();
        bell.ring();
        bell.awake(); // saw the push before it waited
        bell.about_to_sleep();
        bell.wait(u32::MAX);
        bell.awake();
        let unread = rustix::io::read(&bell.event, &mut [0; 8]);
        assert_eq!(unread, Err(rustix::io::Errno::AGAIN));
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
