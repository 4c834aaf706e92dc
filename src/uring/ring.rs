//! The io_uring of one thread: it submits operations, reaps completions, and owns the memory that
//! operations refer to.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue};
use rustix::io::Errno;

use super::accepts::Accepts;
use super::buffers::{BufferRing, Lease};
use super::clock::Clock;
use super::kernel::{Completion, HowToClose, Kernel, Received, Wait};
use super::operation;
use super::send_buffer::SendBuffer;
use super::sends::Sends;
use super::setup::{RingConfig, SetupError, set_up};
use super::token::{Operation, Token};
use crate::domain::ids::ConnectionKey;

/// Attempts of a dropped ring to collect all outstanding completions, and the length of each.
const QUIESCE_ROUNDS_MAX: usize = 50;
const QUIESCE_ROUND: Duration = Duration::from_millis(20);

/// An io_uring with its fixed-file table, its receive buffers and its clocks. It belongs to the
/// thread that created it.
///
/// Connections are files 0 to `connections` - 1 of the table; the slot of a key is the file.
pub struct Ring {
    /// Dropped, and so closed, first: fields drop in the order of declaration.
    ring: IoUring,
    buffers: Rc<BufferRing>,
    sends: Sends,
    accepts: Accepts,
    /// Operations that wait for room in the completion queue. Bounded: the caller has at most one
    /// operation of each kind in flight per connection.
    backlog: VecDeque<Entry>,
    /// One-shot operations whose completion has not been reaped.
    one_shots: u32,
    /// Multishot operations whose last completion has not been reaped.
    multishots: u32,
    /// Bound of `one_shots`: half of the completion queue.
    one_shots_max: u32,
    /// Error of a submission that a full queue forced between two calls of `enter`.
    failure: Option<io::Error>,
    connections: u32,
    clock: Clock,
    enter_flags: u32,
    /// `IORING_SETUP_SINGLE_ISSUER`: the ring must stay on its thread.
    _thread_bound: PhantomData<*const ()>,
}

impl Ring {
    /// Sets up a ring for the calling thread.
    ///
    /// # Errors
    /// See [`SetupError`]; each text says what to do.
    pub fn new(config: &RingConfig) -> Result<Self, SetupError> {
        let parts = set_up(config)?;
        let params = parts.ring.params();
        let mut enter_flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        if params.is_feature_no_iowait() {
            // The kernel would count an idle shard as waiting for I/O.
            enter_flags |= EnterFlags::NO_IOWAIT;
        }
        Ok(Self {
            one_shots_max: params.cq_entries() / 2,
            ring: parts.ring,
            buffers: Rc::new(parts.buffers),
            sends: Sends::new(),
            accepts: Accepts::new(),
            backlog: VecDeque::new(),
            one_shots: 0,
            multishots: 0,
            failure: None,
            connections: config.connections,
            clock: Clock::new(),
            enter_flags: enter_flags.bits(),
            _thread_bound: PhantomData,
        })
    }

    /// Operations in flight: those that still owe a completion.
    pub fn in_flight(&self) -> usize {
        self.one_shots as usize + self.multishots as usize + self.backlog.len()
    }

    fn listener_file(&self) -> u32 {
        self.connections
    }

    fn doorbell_file(&self) -> u32 {
        self.connections + 1
    }

    /// Registers the listening socket. The caller may close its descriptor afterwards.
    ///
    /// # Errors
    /// The kernel refuses the descriptor.
    pub fn listen(&mut self, listener: BorrowedFd<'_>) -> Result<(), SetupError> {
        self.set_file(self.listener_file(), listener.as_raw_fd())
            .map_err(|source| SetupError::System { what: "register the listener", source })
    }

    /// Registers a doorbell (an eventfd), each ring of which ends a wait. The caller may close its
    /// descriptor afterwards.
    ///
    /// # Errors
    /// The kernel refuses the descriptor.
    pub fn watch_doorbell(&mut self, event: BorrowedFd<'_>) -> Result<(), SetupError> {
        self.set_file(self.doorbell_file(), event.as_raw_fd())
            .map_err(|source| SetupError::System { what: "register the doorbell", source })?;
        self.push(operation::watch_doorbell(self.doorbell_file()));
        Ok(())
    }

    fn set_file(&self, file: u32, descriptor: RawFd) -> io::Result<()> {
        let set = self.ring.submitter().register_files_update(file, &[descriptor])?;
        assert_eq!(set, 1);
        Ok(())
    }

    fn check(&self, connection: ConnectionKey) {
        assert!(connection.slot < self.connections, "no such file");
    }

    /// Queues an operation. The next `enter` submits it, or a full queue does earlier.
    fn push(&mut self, entry: Entry) {
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    /// Returns whether the operation was put into the submission queue. It is not if its completion
    /// might overflow the completion queue, or if the kernel accepts no submissions at the moment.
    fn try_push(&mut self, entry: &Entry) -> bool {
        let multishot = operation_of(entry).is_multishot();
        if !multishot && self.one_shots >= self.one_shots_max {
            return false;
        }
        if self.ring.submission().is_full() {
            // Larger batches than the queue gain nothing.
            if let Err(error) = self.ring_enter(0, None) {
                self.failure.get_or_insert(error);
            }
        }
        // SAFETY:
        // - Every entry comes from a constructor in `operation`. What it points to outlives the
        //   operation:
        //   - accept: an `AddressCell` on the heap, lent until the accept's completion;
        //   - send: `StableBytes` that `sends` keeps, untouched, until the completion;
        //   - receive: no pointer; the buffers are in the mapping of `buffers`;
        //   - disconnect: a static; all others: no pointer.
        // - When the ring is dropped, `drop` waits for these completions or leaks the memory.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        match (pushed, multishot) {
            (false, _) => {}
            (true, true) => self.multishots += 1,
            (true, false) => self.one_shots += 1,
        }
        pushed
    }

    fn drain_backlog(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    fn ring_enter(&mut self, wanted: u32, timeout: Option<Duration>) -> io::Result<()> {
        let queued = self.ring.submission().len() as u32;
        let timespec = timeout.map(Timespec::from);
        let mut arguments = SubmitArgs::new();
        if let Some(timespec) = &timespec {
            arguments = arguments.timespec(timespec);
        }
        // SAFETY:
        // - `EXT_ARG` is in the flags, so the kernel takes the argument for an
        //   `io_uring_getevents_arg`, which `SubmitArgs` transparently is; its size goes along.
        // - The argument and the `timespec` it points to are locals that live until the call
        //   returns.
        // - `queued` entries are in the queue: `submission()` was dropped, which publishes its tail.
        let outcome = unsafe {
            self.ring.submitter().enter(queued, wanted, self.enter_flags, Some(&arguments))
        };
        match outcome {
            Ok(_) => Ok(()),
            Err(error) => match Errno::from_io_error(&error) {
                // Timed out, interrupted, short of memory for requests, or overflown completions
                // must be reaped first. What was not submitted stays queued.
                Some(Errno::TIME | Errno::INTR | Errno::AGAIN | Errno::BUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn reap(&mut self) -> Option<(Token, cqueue::Entry)> {
        let entry = self.ring.completion().next()?;
        let token = Token::decode(entry.user_data()).expect("the kernel returns our own tokens");
        if !token.operation.is_multishot() {
            self.one_shots -= 1;
        } else if !cqueue::more(entry.flags()) {
            self.multishots -= 1;
        }
        Some((token, entry))
    }

    /// `None`: a completion that the shard does not need to see.
    fn complete(&mut self, token: Token, entry: &cqueue::Entry) -> Option<Completion<Lease>> {
        let connection = token.key;
        let result = outcome(entry);
        Some(match token.operation {
            Operation::Accept => {
                let peer = self.accepts.take_back(connection.slot, result.is_ok());
                match result {
                    Ok(_) => {
                        let peer = peer.expect("written by a successful accept");
                        Completion::Accepted { connection, peer }
                    }
                    // An accept that is submitted after the listener left the table finds no file.
                    Err(Errno::BADF) => {
                        Completion::AcceptFailed { connection, error: Errno::CANCELED }
                    }
                    Err(error) => Completion::AcceptFailed { connection, error },
                }
            }
            Operation::PollReadable => Completion::Readable {
                connection,
                armed: cqueue::more(entry.flags()),
                broken: result.is_ok_and(|mask| mask & BROKEN != 0),
            },
            Operation::Receive => {
                Completion::Received { connection, received: self.received(result, entry.flags()) }
            }
            Operation::Send => {
                let (connection, buffer) = self.sends.release(connection);
                Completion::Sent { connection, buffer, result }
            }
            Operation::PollWritable => Completion::Writable { connection },
            // The second of the two cancels.
            Operation::CancelPollWritable => Completion::Cancelled { connection },
            Operation::Shutdown => Completion::ShutDown { connection },
            Operation::Close => {
                result.expect("a connection is closed once");
                Completion::Closed { connection }
            }
            Operation::WatchDoorbell => {
                if !cqueue::more(entry.flags()) {
                    self.doorbell_unwatched(result);
                }
                // The shard checks its rings every turn.
                return None;
            }
            Operation::CancelAccepts => {
                self.set_file(self.listener_file(), -1).expect("any file can be unregistered");
                return None;
            }
            Operation::CancelPollReadable | Operation::CancelEverything | Operation::Disconnect => {
                return None;
            }
        })
    }

    /// The watch of the doorbell has ended. An overflow of the completion queue does that, or a lack of memory. A
    /// doorbell that cannot be watched would leave the shard deaf, so it is an error of the ring.
    pub(super) fn doorbell_unwatched(&mut self, result: Result<usize, Errno>) {
        match result {
            Ok(_) | Err(Errno::NOMEM | Errno::CANCELED | Errno::AGAIN) => {
                self.push(operation::watch_doorbell(self.doorbell_file()));
            }
            Err(error) => {
                self.failure.get_or_insert(error.into());
            }
        }
    }

    fn received(&self, result: Result<usize, Errno>, flags: u32) -> Received<Lease> {
        // Taken first: a buffer that the kernel names must be returned, whatever the result.
        let lease = cqueue::buffer_select(flags)
            .map(|id| Lease::take(&self.buffers, id, result.unwrap_or(0)));
        match (result, lease) {
            (Ok(0), _) => Received::End,
            (Ok(_), Some(lease)) => Received::Bytes { lease, more: cqueue::sock_nonempty(flags) },
            (Ok(_), None) => unreachable!("bytes without a buffer"),
            (Err(Errno::AGAIN), _) => Received::Nothing,
            (Err(Errno::NOBUFS | Errno::NOMEM), _) => Received::NoBuffers,
            (Err(error), _) => Received::Failed(error),
        }
    }
}

impl Kernel for Ring {
    type Lease = Lease;

    fn now_ms(&self) -> u64 {
        self.clock.now_ms
    }

    fn unix_ms(&self) -> u64 {
        self.clock.unix_ms
    }

    fn receive_buffers(&self) -> usize {
        usize::from(self.buffers.count())
    }

    fn accept(&mut self, connection: ConnectionKey) {
        self.check(connection);
        let listener = self.listener_file();
        let cell =
            self.accepts.lend(connection.slot).expect("the caller respects ACCEPTS_IN_FLIGHT_MAX");
        let entry = operation::accept(listener, connection, cell);
        self.push(entry);
    }

    /// The socket is closed if no descriptor of it is left outside the table.
    fn stop_accepting(&mut self) {
        self.push(operation::cancel_accepts(self.listener_file()));
    }

    fn poll_readable(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::poll_readable(connection));
    }

    fn receive(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::receive(connection));
    }

    fn send(&mut self, connection: ConnectionKey, buffer: SendBuffer) {
        self.check(connection);
        let kept = self.sends.keep(connection, buffer);
        let entry = operation::send(connection.slot, kept, self.sends.buffer(kept));
        self.push(entry);
    }

    fn poll_writable(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::poll_writable(connection));
    }

    fn shutdown(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::shutdown(connection));
    }

    fn cancel(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::cancel_poll_readable(connection));
        self.push(operation::cancel_poll_writable(connection));
    }

    fn close(&mut self, connection: ConnectionKey, how: HowToClose) {
        self.check(connection);
        if how == HowToClose::Abort {
            self.push(operation::disconnect(connection));
        }
        self.push(operation::close(connection));
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.drain_backlog();
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let (may_wait, timeout) = match wait {
            Wait::No => (false, None),
            Wait::UntilMs(until_ms) => {
                let left = self.clock.until(until_ms);
                (left.is_some(), left)
            }
            Wait::Forever => (true, None),
        };
        let wanted = u32::from(may_wait && self.ring.completion().is_empty());
        let entered = self.ring_enter(wanted, timeout.filter(|_| wanted > 0));
        self.clock.read();
        entered
    }

    fn next_completion(&mut self) -> Option<Completion<Lease>> {
        loop {
            let (token, entry) = self.reap()?;
            if let Some(completion) = self.complete(token, &entry) {
                return Some(completion);
            }
        }
    }
}

fn operation_of(entry: &Entry) -> Operation {
    Token::decode(entry.get_user_data()).expect("every entry has a token").operation
}

#[cfg(test)]
impl Ring {
    /// Whether the completion queue has overflown.
    pub(super) fn has_overflown(&mut self) -> bool {
        self.ring.submission().cq_overflow()
    }
}

/// Poll events of a socket that was reset.
const BROKEN: usize = (libc::POLLERR | libc::POLLHUP) as usize;

/// A completion's result: a count, or an error.
fn outcome(entry: &cqueue::Entry) -> Result<usize, Errno> {
    match entry.result() {
        count @ 0.. => Ok(count as usize),
        error => Err(Errno::from_raw_os_error(-error)),
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("connections", &self.connections)
            .field("one_shots", &self.one_shots)
            .field("multishots", &self.multishots)
            .field("backlog", &self.backlog.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Ring {
    /// Frees no memory that the kernel may still read or write: cancels everything and waits for
    /// the completions. If they do not come in time, or this is not the thread of the ring, the
    /// memory is leaked instead. Closing the ring is not enough: the kernel cancels operations in
    /// flight asynchronously.
    fn drop(&mut self) {
        self.backlog.clear();
        if self.quiesce().is_err() {
            mem::forget(Rc::clone(&self.buffers));
            mem::forget(mem::replace(&mut self.sends, Sends::new()));
            mem::forget(mem::replace(&mut self.accepts, Accepts::new()));
        }
    }
}

impl Ring {
    fn quiesce(&mut self) -> io::Result<()> {
        if self.one_shots + self.multishots == 0 {
            return Ok(());
        }
        self.one_shots_max += 1; // the other half of the completion queue has room
        if !self.try_push(&operation::cancel_everything()) {
            return Err(Errno::BUSY.into());
        }
        for _ in 0..QUIESCE_ROUNDS_MAX {
            self.ring_enter(1, Some(QUIESCE_ROUND))?;
            while self.reap().is_some() {}
            if self.one_shots + self.multishots == 0 {
                return Ok(());
            }
        }
        Err(Errno::TIMEDOUT.into())
    }
}
