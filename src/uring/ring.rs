//! The ring of one thread: operations in, completions out, and the memory between.

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
use super::completion::{Completion, Received};
use super::operation;
use super::sends::Sends;
use super::setup::{RingConfig, SetupError, set_up};
use super::token::{Operation, Token};
use crate::domain::ids::ConnectionKey;
use crate::domain::outgoing::SendBuffer;

/// How often and how long a dropped ring asks the kernel to let go of its memory.
const QUIESCE_ROUNDS_MAX: usize = 50;
const QUIESCE_ROUND: Duration = Duration::from_millis(20);

/// How long [`Ring::enter`] may sleep while nothing completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// At most so long.
    AtMost(Duration),
    /// Until something completes.
    Forever,
}

/// An io_uring with its fixed-file table and its receive buffers. It belongs to the thread that
/// made it.
///
/// Connections are files 0 to `connections` - 1 of the table; a key's slot is the file.
pub struct Ring {
    /// Closed first: fields drop in the order of declaration.
    ring: IoUring,
    buffers: Rc<BufferRing>,
    sends: Sends,
    accepts: Accepts,
    /// Operations that wait for room in the completion queue. Bounded by the callers: one operation
    /// of each kind per connection.
    backlog: VecDeque<Entry>,
    /// One-shot operations whose completion has not been reaped.
    one_shots: u32,
    /// Watches whose last completion has not been reaped.
    watches: u32,
    /// Bound of `one_shots`: half of the completion queue.
    one_shots_max: u32,
    /// Why a submission between two calls of [`Ring::enter`] failed.
    failure: Option<io::Error>,
    connections: u32,
    enter_flags: u32,
    /// An io_uring of a single issuer must stay on its thread.
    _thread_bound: PhantomData<*const ()>,
}

impl Ring {
    /// Sets up a ring for the calling thread.
    ///
    /// # Errors
    /// See [`SetupError`]: each says what to do about it.
    pub fn new(config: &RingConfig) -> Result<Self, SetupError> {
        let parts = set_up(config)?;
        let params = parts.ring.params();
        let mut enter_flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        if params.is_feature_no_iowait() {
            // An idle shard is idle, not waiting for a disk.
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
            watches: 0,
            failure: None,
            connections: config.connections,
            enter_flags: enter_flags.bits(),
            _thread_bound: PhantomData,
        })
    }

    /// Receive buffers there are.
    pub fn receive_buffers(&self) -> usize {
        usize::from(self.buffers.count())
    }

    /// Operations in flight, watches included: what the kernel still owes an answer for.
    pub fn in_flight(&self) -> usize {
        self.one_shots as usize + self.watches as usize + self.backlog.len()
    }

    fn listener_file(&self) -> u32 {
        self.connections
    }

    fn doorbell_file(&self) -> u32 {
        self.connections + 1
    }

    /// Takes the listening socket into the table; the caller's descriptor may be closed after it.
    ///
    /// # Errors
    /// What the kernel says of the descriptor.
    pub fn listen(&mut self, listener: BorrowedFd<'_>) -> io::Result<()> {
        self.set_file(self.listener_file(), listener.as_raw_fd())
    }

    /// Takes a doorbell (an eventfd) into the table; [`Completion::Rung`] tells of each ring.
    ///
    /// # Errors
    /// What the kernel says of the descriptor.
    pub fn watch_doorbell(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.set_file(self.doorbell_file(), event.as_raw_fd())?;
        self.push(operation::watch_doorbell(self.doorbell_file()));
        Ok(())
    }

    fn set_file(&self, file: u32, descriptor: RawFd) -> io::Result<()> {
        let set = self.ring.submitter().register_files_update(file, &[descriptor])?;
        assert_eq!(set, 1);
        Ok(())
    }

    /// Accepts one connection into the file of the key's slot, which is empty. At most
    /// [`ACCEPTS_IN_FLIGHT_MAX`](crate::domain::limits::ACCEPTS_IN_FLIGHT_MAX) at a time.
    pub fn accept(&mut self, connection: ConnectionKey) {
        self.check(connection);
        let listener = self.listener_file();
        let cell = self.accepts.lend(connection.slot).expect("the caller keeps to the bound");
        let entry = operation::accept(listener, connection, cell);
        self.push(entry);
    }

    /// Cancels what waits on the listener and then takes it out of the table; each accept still
    /// completes. The socket is closed if no descriptor of it is left elsewhere. No accept may
    /// follow.
    pub fn stop_listening(&mut self) {
        self.push(operation::cancel_accepts(self.listener_file()));
    }

    /// Watches the socket for something to read, its end or its failure, until cancelled.
    pub fn watch(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::watch(connection));
    }

    /// Receives what is there. Never waits.
    pub fn receive(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::receive(connection));
    }

    /// Sends what fits into the socket's buffer. Never waits.
    pub fn send(&mut self, connection: ConnectionKey, buffer: SendBuffer) {
        self.check(connection);
        let kept = self.sends.keep(connection, buffer);
        let entry = operation::send(connection.slot, kept, self.sends.bytes(kept));
        self.push(entry);
    }

    /// Waits, once, for room in the socket's buffer.
    pub fn await_writable(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::await_writable(connection));
    }

    /// Ends what waits on the socket (the watch, the wait for room); each still completes.
    pub fn cancel(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::cancel_watch(connection));
        self.push(operation::cancel_wait(connection));
    }

    /// Ends our half of the stream (FIN) after what was sent.
    pub fn shutdown(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::shutdown(connection));
    }

    /// Closes the socket and empties the file; the peer still gets what was sent.
    pub fn close(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::close(connection));
    }

    /// Closes the socket and empties the file; what the peer has not taken is discarded, and it
    /// gets a reset.
    pub fn abort(&mut self, connection: ConnectionKey) {
        self.check(connection);
        self.push(operation::dissolve(connection));
        self.push(operation::close(connection));
    }

    fn check(&self, connection: ConnectionKey) {
        assert!(connection.slot < self.connections, "no file of that number");
    }

    /// Queues an operation. It leaves with the next [`Ring::enter`], or when the queue is full.
    fn push(&mut self, entry: Entry) {
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    /// Whether the operation is in the submission queue now: it is not while its completion might
    /// overflow the completion queue, or while the kernel takes nothing.
    fn try_push(&mut self, entry: &Entry) -> bool {
        let multishot = operation_of(entry).is_multishot();
        if !multishot && self.one_shots >= self.one_shots_max {
            return false;
        }
        if self.ring.submission().is_full() {
            // Batches beyond the queue's size gain nothing.
            if let Err(error) = self.ring_enter(0, None) {
                self.failure.get_or_insert(error);
            }
        }
        // SAFETY:
        // - Every entry comes from a constructor in `operation`. What it points to outlives the
        //   operation:
        //   - accept: an `AddressCell` on the heap, lent until the accept's completion;
        //   - send: the bytes of a `SendBuffer` that `sends` keeps until the completion, which do
        //     not move or change while the value exists (see `domain::outgoing`);
        //   - receive: no pointer; the buffers are in the mapping of `buffers`;
        //   - dissolve: a static; all others: no pointer.
        // - When the ring is dropped, `drop` waits for these completions or leaks the memory.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        match (pushed, multishot) {
            (false, _) => {}
            (true, true) => self.watches += 1,
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

    /// One system call: submits what was queued, runs what the kernel deferred and, while nothing
    /// has completed, waits.
    ///
    /// # Errors
    /// The ring has failed and cannot be used any more.
    pub fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.drain_backlog();
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let wanted = u32::from(wait != Wait::No && self.ring.completion().is_empty());
        let timeout = match wait {
            Wait::AtMost(timeout) if wanted > 0 => Some(timeout),
            _ => None,
        };
        self.ring_enter(wanted, timeout)
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
                // Timed out, interrupted, out of memory for requests just now, or completions of an
                // overflow first want to be reaped: what was not submitted stays queued.
                Some(Errno::TIME | Errno::INTR | Errno::AGAIN | Errno::BUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completion, in the order of the kernel; `None` until the next [`Ring::enter`].
    pub fn next_completion(&mut self) -> Option<Completion> {
        loop {
            let (token, entry) = self.reap()?;
            if let Some(completion) = self.complete(token, &entry) {
                return Some(completion);
            }
        }
    }

    fn reap(&mut self) -> Option<(Token, cqueue::Entry)> {
        let entry = self.ring.completion().next()?;
        let token = Token::decode(entry.user_data()).expect("a token of ours comes back");
        if !token.operation.is_multishot() {
            self.one_shots -= 1;
        } else if !cqueue::more(entry.flags()) {
            self.watches -= 1;
        }
        Some((token, entry))
    }

    fn complete(&mut self, token: Token, entry: &cqueue::Entry) -> Option<Completion> {
        let connection = token.key;
        let result = outcome(entry);
        Some(match token.operation {
            Operation::Accept => {
                let peer = self.accepts.take_back(connection.slot, result.is_ok());
                let result = result.map(|_| peer.expect("written by a successful accept"));
                Completion::Accepted { connection, result }
            }
            Operation::Watch => Completion::Readable {
                connection,
                watching: cqueue::more(entry.flags()),
                broken: result.is_ok_and(|mask| mask & BROKEN != 0),
                result: result.map(drop),
            },
            Operation::Receive => {
                Completion::Received { connection, outcome: self.received(result, entry.flags()) }
            }
            Operation::Send => {
                let (connection, buffer) = self.sends.release(connection);
                Completion::Sent { connection, buffer, result }
            }
            Operation::AwaitWritable => {
                Completion::Writable { connection, result: result.map(drop) }
            }
            // The second of the two.
            Operation::CancelWait => Completion::Cancelled { connection },
            Operation::Shutdown => Completion::ShutDown { connection, result: result.map(drop) },
            Operation::Close => Completion::Closed { connection, result: result.map(drop) },
            Operation::WatchDoorbell => {
                if !cqueue::more(entry.flags()) && result.is_ok() {
                    // An overflow of the completion queue ends a watch.
                    self.push(operation::watch_doorbell(self.doorbell_file()));
                }
                Completion::Rung
            }
            Operation::CancelAccepts => {
                self.set_file(self.listener_file(), -1).expect("any file may be taken out");
                return None;
            }
            Operation::CancelWatch | Operation::CancelEverything | Operation::Dissolve => {
                return None;
            }
        })
    }

    fn received(&self, result: Result<usize, Errno>, flags: u32) -> Received {
        // Taken first: whatever the result, a buffer that was named must go back.
        let lease = cqueue::buffer_select(flags)
            .map(|id| Lease::take(&self.buffers, id, result.unwrap_or(0)));
        match (result, lease) {
            (Ok(0), _) => Received::End,
            (Ok(_), Some(lease)) => Received::Bytes { lease, more: cqueue::sock_nonempty(flags) },
            (Ok(_), None) => unreachable!("bytes without a buffer"),
            (Err(Errno::AGAIN), _) => Received::Nothing,
            (Err(Errno::NOBUFS), _) => Received::NoBuffer,
            (Err(error), _) => Received::Failed(error),
        }
    }
}

fn operation_of(entry: &Entry) -> Operation {
    Token::decode(entry.get_user_data()).expect("every entry is given a token").operation
}

#[cfg(test)]
impl Ring {
    /// Whether the kernel holds completions back for want of room.
    pub(super) fn has_overflown(&mut self) -> bool {
        self.ring.submission().cq_overflow()
    }
}

/// What a poll says of a socket that was reset.
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
            .field("watches", &self.watches)
            .field("backlog", &self.backlog.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Ring {
    /// Lets nothing go that the kernel may still read or write: cancels everything and waits for
    /// the completions, and where they do not come in time (or the thread is not the ring's own)
    /// leaks that memory instead. Closing the ring alone would not do: the kernel ends what is in
    /// flight in the background.
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
        if self.one_shots + self.watches == 0 {
            return Ok(());
        }
        self.one_shots_max += 1; // the completion queue's other half has room
        if !self.try_push(&operation::cancel_everything()) {
            return Err(Errno::BUSY.into());
        }
        for _ in 0..QUIESCE_ROUNDS_MAX {
            self.ring_enter(1, Some(QUIESCE_ROUND))?;
            while self.reap().is_some() {}
            if self.one_shots + self.watches == 0 {
                return Ok(());
            }
        }
        Err(Errno::TIMEDOUT.into())
    }
}
