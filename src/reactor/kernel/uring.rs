//! The real kernel: io_uring, and the clocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use super::{Completion, HowToClose, Kernel, Received, Wait};
use crate::domain::ids::ConnectionKey;
use crate::domain::outgoing::SendBuffer;
use crate::uring;
use crate::uring::{Lease, Ring, RingConfig, SetupError};

/// Added to the monotonic time, so that early in the process's life a day can be subtracted.
const EPOCH_MS: u64 = 24 * 60 * 60 * 1000;

/// [`Kernel`] on an io_uring of the calling thread.
#[derive(Debug)]
pub struct UringKernel {
    ring: Ring,
    started: Instant,
    now_ms: u64,
    unix_ms: u64,
}

impl UringKernel {
    /// Sets up the ring; it accepts from `listener` and is woken by `doorbell`. Both descriptors
    /// may be closed afterwards: the ring keeps references of its own.
    ///
    /// # Errors
    /// What the system refuses, with what to do about it.
    pub fn new(
        config: &RingConfig,
        listener: BorrowedFd<'_>,
        doorbell: BorrowedFd<'_>,
    ) -> Result<Self, SetupError> {
        let mut ring = Ring::new(config)?;
        ring.listen(listener)
            .map_err(|source| SetupError::System { what: "register the listener", source })?;
        ring.watch_doorbell(doorbell.as_fd())
            .map_err(|source| SetupError::System { what: "register the doorbell", source })?;
        let mut kernel = Self { ring, started: Instant::now(), now_ms: 0, unix_ms: 0 };
        kernel.read_clocks();
        Ok(kernel)
    }

    fn monotonic_ms(&self) -> u64 {
        EPOCH_MS + millis(self.started.elapsed())
    }

    fn read_clocks(&mut self) {
        self.now_ms = self.monotonic_ms();
        // A clock set before 1970 reads as 1970.
        self.unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis);
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

impl Kernel for UringKernel {
    type Lease = Lease;

    fn now_ms(&self) -> u64 {
        self.now_ms
    }

    fn unix_ms(&self) -> u64 {
        self.unix_ms
    }

    fn receive_buffers(&self) -> usize {
        self.ring.receive_buffers()
    }

    fn accept(&mut self, connection: ConnectionKey) {
        self.ring.accept(connection);
    }

    fn stop_accepting(&mut self) {
        self.ring.stop_listening();
    }

    fn poll_readable(&mut self, connection: ConnectionKey) {
        self.ring.watch(connection);
    }

    fn receive(&mut self, connection: ConnectionKey) {
        self.ring.receive(connection);
    }

    fn send(&mut self, connection: ConnectionKey, buffer: SendBuffer) {
        self.ring.send(connection, buffer);
    }

    fn poll_writable(&mut self, connection: ConnectionKey) {
        self.ring.await_writable(connection);
    }

    fn shutdown(&mut self, connection: ConnectionKey) {
        self.ring.shutdown(connection);
    }

    fn cancel(&mut self, connection: ConnectionKey) {
        self.ring.cancel(connection);
    }

    fn close(&mut self, connection: ConnectionKey, how: HowToClose) {
        match how {
            HowToClose::Orderly => self.ring.close(connection),
            HowToClose::Abort => self.ring.abort(connection),
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let wait = match wait {
            Wait::No => uring::Wait::No,
            Wait::Forever => uring::Wait::Forever,
            Wait::UntilMs(until) => match until.saturating_sub(self.monotonic_ms()) {
                0 => uring::Wait::No,
                left => uring::Wait::AtMost(Duration::from_millis(left)),
            },
        };
        let entered = self.ring.enter(wait);
        self.read_clocks();
        entered
    }

    fn next_completion(&mut self) -> Option<Completion<Lease>> {
        loop {
            if let Some(completion) = translate(self.ring.next_completion()?) {
                return Some(completion);
            }
        }
    }
}

/// `None`: nothing that a shard has to know.
fn translate(completion: uring::Completion) -> Option<Completion<Lease>> {
    Some(match completion {
        uring::Completion::Accepted { connection, result: Ok(peer) } => {
            Completion::Accepted { connection, peer }
        }
        uring::Completion::Accepted { connection, result: Err(error) } => {
            // An accept submitted after the listener left the table finds no file.
            let error = if error == Errno::BADF { Errno::CANCELED } else { error };
            Completion::AcceptFailed { connection, error }
        }
        uring::Completion::Readable { connection, watching, broken, result: _ } => {
            Completion::Readable { connection, armed: watching, broken }
        }
        uring::Completion::Received { connection, outcome } => {
            Completion::Received { connection, received: received(outcome) }
        }
        uring::Completion::Writable { connection, result: _ } => {
            Completion::Writable { connection }
        }
        uring::Completion::Sent { connection, buffer, result } => {
            Completion::Sent { connection, buffer, result }
        }
        uring::Completion::ShutDown { connection, result: _ } => {
            Completion::ShutDown { connection }
        }
        uring::Completion::Cancelled { connection } => Completion::Cancelled { connection },
        uring::Completion::Closed { connection, result } => {
            result.expect("a connection is closed once");
            Completion::Closed { connection }
        }
        // The shard looks into its rings every turn.
        uring::Completion::Rung => return None,
    })
}

fn received(outcome: uring::Received) -> Received<Lease> {
    match outcome {
        uring::Received::Bytes { lease, more } => Received::Data { lease, more },
        uring::Received::End => Received::End,
        uring::Received::Nothing => Received::Nothing,
        uring::Received::NoBuffer => Received::NoBuffers,
        uring::Received::Failed(error) => Received::Failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    use crate::handoff::Doorbell;

    fn key(slot: u32) -> ConnectionKey {
        ConnectionKey { slot, generation: 1 }
    }

    #[test]
    fn clocks_advance_with_each_enter() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bell = Doorbell::new().unwrap();
        let config = RingConfig { connections: 8, ..RingConfig::default() };
        let mut kernel = UringKernel::new(&config, listener.as_fd(), bell.as_fd()).unwrap();
        let (before, unix_before) = (kernel.now_ms(), kernel.unix_ms());
        assert!(before >= EPOCH_MS);
        kernel.enter(Wait::UntilMs(before)).unwrap(); // already past
        while kernel.now_ms() < before + 2 {
            kernel.enter(Wait::UntilMs(before + 2)).unwrap();
        }
        assert!(kernel.unix_ms() > unix_before);
        assert!(kernel.next_completion().is_none());
    }

    #[test]
    fn ring_of_the_bell_ends_a_wait_without_a_completion() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bell = Doorbell::new().unwrap();
        let config = RingConfig { connections: 8, ..RingConfig::default() };
        let mut kernel = UringKernel::new(&config, listener.as_fd(), bell.as_fd()).unwrap();
        for _ in 0..3 {
            bell.about_to_sleep();
            std::thread::scope(|scope| {
                scope.spawn(|| bell.ring());
                kernel.enter(Wait::Forever).unwrap();
            });
            bell.awake();
            assert!(kernel.next_completion().is_none());
        }
    }

    #[test]
    fn accepts_end_one_way_or_the_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bell = Doorbell::new().unwrap();
        let config = RingConfig { connections: 8, ..RingConfig::default() };
        let mut kernel = UringKernel::new(&config, listener.as_fd(), bell.as_fd()).unwrap();
        kernel.accept(key(0));
        kernel.accept(key(1));
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        kernel.enter(Wait::Forever).unwrap();
        let Some(Completion::Accepted { connection, peer }) = kernel.next_completion() else {
            panic!("not accepted");
        };
        assert_eq!(peer, client.local_addr().unwrap());
        kernel.stop_accepting();
        let error = loop {
            kernel.enter(Wait::Forever).unwrap();
            match kernel.next_completion() {
                Some(Completion::AcceptFailed { error, .. }) => break error,
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        };
        assert_eq!(error, Errno::CANCELED);
        kernel.close(connection, HowToClose::Orderly);
        kernel.enter(Wait::Forever).unwrap();
        assert!(matches!(kernel.next_completion(), Some(Completion::Closed { .. })));
    }
}
