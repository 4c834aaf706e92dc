//! An eventfd that is written only while the other side sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::sleep::SleepFlag;

/// The doorbell of one sleeper. Any number of threads may ring it.
#[derive(Debug)]
pub struct Doorbell {
    event: OwnedFd,
    flag: SleepFlag,
}

impl Doorbell {
    /// A doorbell whose owner is awake.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, flag: SleepFlag::new() })
    }

    /// Sleeper: announces a wait. It must check every ring once more between this call and the
    /// wait.
    pub fn about_to_sleep(&self) {
        self.flag.about_to_sleep(false);
    }

    /// Sleeper: the same, but [`Doorbell::nudge`] does not wake it. For a sleeper that checks its
    /// rings again soon anyway and does not need nudged items before that.
    pub fn about_to_sleep_soundly(&self) {
        self.flag.about_to_sleep(true);
    }

    /// Sleeper: awake again. Does not read the eventfd: a ringer may have cleared the flag and be
    /// about to write. Edge-triggered waiters (a reactor's ring, tokio) need not read it at all;
    /// the cost is at most one spurious wakeup.
    pub fn awake(&self) {
        self.flag.awake();
    }

    /// Ringer: wakes the sleeper if it sleeps. Call it after the push.
    pub fn ring(&self) {
        if self.flag.must_ring() {
            self.wake();
        }
    }

    /// Ringer: the same, except that it does not wake a sound sleeper.
    pub fn nudge(&self) {
        if self.flag.must_nudge() {
            self.wake();
        }
    }

    fn wake(&self) {
        // The only possible error is EAGAIN at 2^64 - 1 unread rings, which wakes the sleeper as
        // well.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Sleeper: waits for a ring, at most `timeout_ms`. For threads that wait for nothing else; a
    /// reactor waits in its io_uring instead.
    pub fn wait(&self, timeout_ms: u32) {
        let timeout = Timespec {
            tv_sec: i64::from(timeout_ms / 1000),
            tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
        };
        // EINTR or a timeout: the caller checks its rings again, as after a ring.
        if let Ok(1..) = poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&timeout)) {
            // Read by the woken thread, so that the next wait is for the next ring.
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
    fn late_ring_causes_one_spurious_wakeup() {
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
