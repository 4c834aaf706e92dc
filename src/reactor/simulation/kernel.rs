//! A simulated kernel. Sockets are byte queues, and time passes only when the simulation moves it.
//! The seed decides when it does what a real kernel may do: see [`Faults`]. It counts what it has done.
//!
//! It also asserts the duties of the shard: one request of a kind per connection, no request on a
//! file that is not open under that key, nothing in flight on a file that is closed.

mod faults;
mod network;

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use rustix::io::Errno;

use crate::domain::ids::ConnectionKey;
use crate::domain::limits::RECEIVE_BUFFER_BYTES;
use crate::reactor::connection::RequestSet;
use crate::reactor::simulation::random::Random;
use crate::uring::{Completion, HowToClose, Kernel, Received, SendBuffer, Wait};

pub use faults::Faults;

/// Index of a socket; one per client connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub usize);

/// A connection between a client and the shard.
#[derive(Debug)]
struct Socket {
    address: SocketAddr,
    /// Bytes from the client that have not been received.
    inbound: VecDeque<u8>,
    /// The client has shut down its half.
    inbound_ended: bool,
    /// Number of bytes to the client that it has not read.
    outbound: usize,
    /// Size of the socket's send buffer.
    outbound_capacity: usize,
    /// Bytes to the client that the simulation has not taken.
    sent: Vec<u8>,
    /// The shard has shut down its half.
    outbound_ended: bool,
    /// Reset by the client, or failed.
    reset: bool,
    /// The error of a receive after that.
    error: Errno,
    /// Closed by the shard.
    closed: bool,
    /// When the shard last received something.
    received_at_ms: u64,
    /// Whether its client sends more whenever everything has been received.
    floods: bool,
    /// Number of bytes of the flood that the shard has received: negative before the first.
    flooded: isize,
    /// Something arrived since the last completion of the poll.
    unannounced: bool,
    /// The index of its file, once accepted.
    file: Option<u32>,
}

/// An entry of the file table.
#[derive(Debug)]
struct File {
    key: ConnectionKey,
    socket: Option<SocketId>,
    in_flight: RequestSet,
    /// A cancel has completed: polls complete for the last time.
    cancelled: bool,
}

#[derive(Debug)]
enum Request {
    Accept(ConnectionKey),
    Receive(ConnectionKey),
    Send(ConnectionKey, SendBuffer),
    PollWritable(ConnectionKey),
    PollReadable(ConnectionKey),
    Shutdown(ConnectionKey),
    Cancel(ConnectionKey),
    Close(ConnectionKey, HowToClose),
}

/// The simulated kernel: see the [module](self).
#[derive(Debug)]
pub struct SimulatedKernel {
    random: Random,
    /// The probabilities of faults; may be changed at any time.
    pub faults: Faults,
    now_ms: u64,
    unix_ms: u64,
    listening: bool,
    files: Vec<Option<File>>,
    sockets: Vec<Socket>,
    /// Connected, not yet accepted.
    backlog: VecDeque<SocketId>,
    /// Made, but not submitted.
    queued: Vec<Request>,
    requests: Vec<Request>,
    completions: VecDeque<Completion<SimulatedLease>>,
    /// Completions taken since the last [`Kernel::enter`].
    reaped: usize,
    /// Their bound. What a turn handles does not depend on what completes meanwhile.
    pub completions_max: usize,
    buffers: usize,
    buffers_free: Rc<Cell<usize>>,
    waits: Wait,
    /// How often each fault has occurred.
    occurred: BTreeMap<&'static str, u64>,
}

/// A receive buffer of the simulated kernel.
#[derive(Debug)]
pub struct SimulatedLease {
    bytes: Vec<u8>,
    free: Rc<Cell<usize>>,
}

impl Deref for SimulatedLease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for SimulatedLease {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for SimulatedLease {
    fn drop(&mut self) {
        self.free.set(self.free.get() + 1);
    }
}

/// What a flooding client sends: as a frame it is a violation (a reserved bit is set).
const FLOOD: u8 = 0xff;
/// More than a day, as the trait requires.
pub const START_MS: u64 = 100_000_000;
/// Any time in this century.
const UNIX_START_MS: u64 = 1_800_000_000_000;

impl SimulatedKernel {
    /// A kernel with this many receive buffers.
    pub fn new(seed: u64, buffers: usize) -> Self {
        Self {
            random: Random::new(seed),
            faults: Faults::default(),
            now_ms: START_MS,
            unix_ms: UNIX_START_MS,
            listening: true,
            files: Vec::new(),
            sockets: Vec::new(),
            backlog: VecDeque::new(),
            queued: Vec::new(),
            requests: Vec::new(),
            completions: VecDeque::new(),
            reaped: 0,
            completions_max: usize::MAX,
            buffers,
            buffers_free: Rc::new(Cell::new(buffers)),
            waits: Wait::No,
            occurred: BTreeMap::new(),
        }
    }

    /// Advances time.
    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.unix_ms = self.unix_ms.saturating_add(ms);
    }

    /// Steps the Unix clock forwards or back.
    pub fn step_unix_clock(&mut self, ms: i64) {
        self.unix_ms = self.unix_ms.saturating_add_signed(ms);
    }

    /// Until when the shard sleeps, if it sleeps with a deadline.
    pub fn sleeps_until_ms(&self) -> Option<u64> {
        match self.waits {
            Wait::UntilMs(at) if at > self.now_ms => Some(at),
            Wait::No | Wait::UntilMs(_) | Wait::Forever => None,
        }
    }

    /// Whether the wait of the last `enter` is over without a doorbell.
    pub fn is_awake(&self) -> bool {
        !self.completions.is_empty()
            || match self.waits {
                Wait::No => true,
                Wait::UntilMs(at) => at <= self.now_ms,
                Wait::Forever => false,
            }
    }

    /// Completes requests, or some of them, in an order that depends on the seed.
    pub fn progress(&mut self) {
        let mut index = 0;
        while index < self.requests.len() {
            // A swap moves another request to this index, which mixes the order.
            if self.fault("a late completion", self.faults.late) || !self.try_complete(index) {
                index += 1;
            }
        }
    }

    /// Tries to complete a request. Returns whether it was removed from the list.
    fn try_complete(&mut self, index: usize) -> bool {
        match &self.requests[index] {
            Request::Accept(key) => {
                let key = *key;
                self.try_accept(index, key)
            }
            Request::PollReadable(key) => {
                let key = *key;
                self.try_poll_readable(index, key)
            }
            Request::PollWritable(key) => {
                let key = *key;
                self.try_poll_writable(index, key)
            }
            Request::Receive(_)
            | Request::Send(..)
            | Request::Shutdown(_)
            | Request::Cancel(_)
            | Request::Close(..) => {
                match self.requests.swap_remove(index) {
                    Request::Receive(key) => self.complete_receive(key),
                    Request::Send(key, buffer) => self.complete_send(key, buffer),
                    Request::Shutdown(connection) => {
                        self.complete(connection, RequestSet::SHUTDOWN);
                        self.socket(connection).outbound_ended = true;
                        self.completions.push_back(Completion::ShutDown { connection });
                    }
                    Request::Cancel(connection) => {
                        self.complete(connection, RequestSet::CANCEL);
                        self.file(connection).cancelled = true;
                        self.completions.push_back(Completion::Cancelled { connection });
                    }
                    Request::Close(key, how) => self.complete_close(key, how),
                    Request::Accept(_) | Request::PollReadable(_) | Request::PollWritable(_) => {
                        unreachable!()
                    }
                }
                true
            }
        }
    }

    fn try_accept(&mut self, index: usize, connection: ConnectionKey) -> bool {
        let failure = if !self.listening {
            Some(Errno::CANCELED)
        } else if self.fault("a failed accept", self.faults.accept_failure) {
            let errors =
                [Errno::CONNABORTED, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
            Some(self.random.pick(&errors))
        } else {
            None
        };
        if let Some(error) = failure {
            self.count("a client that is gone at its accept", error == Errno::CONNABORTED);
            if error == Errno::CONNABORTED {
                self.accept_elsewhere();
            }
            self.requests.swap_remove(index);
            self.files[connection.slot as usize] = None;
            self.completions.push_back(Completion::AcceptFailed { connection, error });
            return true;
        }
        let Some(id) = self.backlog.pop_front() else { return false };
        self.requests.swap_remove(index);
        self.complete(connection, RequestSet::ACCEPT);
        self.file(connection).socket = Some(id);
        let socket = &mut self.sockets[id.0];
        socket.file = Some(connection.slot);
        self.completions.push_back(Completion::Accepted { connection, peer: socket.address });
        true
    }

    fn try_poll_readable(&mut self, index: usize, connection: ConnectionKey) -> bool {
        let cancelled = self.file(connection).cancelled;
        let ends = cancelled || self.fault("a poll that ends", self.faults.poll_ends);
        let spurious = self.fault("a spurious poll", self.faults.spurious);
        let is_full = self.is_completion_queue_full();
        let socket = self.socket(connection);
        if !socket.unannounced && !ends && !spurious {
            return false;
        }
        let ends = ends || is_full;
        socket.unannounced = false;
        let broken = socket.reset;
        self.completions.push_back(Completion::Readable { connection, armed: !ends, broken });
        if ends {
            // A new poll completes at once for what is there already.
            self.socket(connection).unannounced = true;
            self.complete(connection, RequestSet::POLL_READABLE);
            self.requests.swap_remove(index);
        }
        ends
    }

    fn try_poll_writable(&mut self, index: usize, connection: ConnectionKey) -> bool {
        let cancelled = self.file(connection).cancelled;
        let needs_a_third = self.faults.room_is_a_third;
        let spurious = self.fault("a spurious poll for room", self.faults.spurious);
        let socket = self.socket(connection);
        let free = socket.outbound_capacity - socket.outbound;
        let too_little = if needs_a_third { free < socket.outbound / 2 } else { free == 0 };
        let room = !too_little || socket.reset;
        self.count("a socket with too little room", !room && free > 0);
        if !room && !cancelled && !spurious {
            return false;
        }
        self.complete(connection, RequestSet::POLL_WRITABLE);
        self.requests.swap_remove(index);
        self.completions.push_back(Completion::Writable { connection });
        true
    }

    fn complete_receive(&mut self, connection: ConnectionKey) {
        self.complete(connection, RequestSet::RECEIVE);
        let short = self.fault("a short receive", self.faults.short_receive);
        let no_buffer = self.fault("a receive without a buffer", self.faults.no_buffer)
            || self.buffers_free.get() == 0;
        let part = self.random.below(64) + 1;
        let free = Rc::clone(&self.buffers_free);
        let now_ms = self.now_ms;
        let socket = self.socket(connection);
        let there = socket.inbound.len();
        let received = if no_buffer {
            Received::NoBuffers
        } else if there > 0 {
            let length = there.min(if short { part } else { RECEIVE_BUFFER_BYTES });
            let bytes = socket.inbound.drain(..length).collect();
            socket.received_at_ms = now_ms;
            if socket.floods {
                socket.flooded += length as isize;
                let left = socket.inbound.len();
                socket.inbound.resize(left.max(RECEIVE_BUFFER_BYTES), FLOOD);
            }
            free.set(free.get() - 1);
            let more = !socket.inbound.is_empty() || socket.inbound_ended;
            Received::Bytes { lease: SimulatedLease { bytes, free }, more }
        } else if socket.reset {
            Received::Failed(socket.error)
        } else if socket.inbound_ended {
            Received::End
        } else {
            Received::Nothing
        };
        self.completions.push_back(Completion::Received { connection, received });
    }

    fn complete_send(&mut self, connection: ConnectionKey, buffer: SendBuffer) {
        self.complete(connection, RequestSet::SEND);
        let zero = self.fault("a send that takes nothing", self.faults.zero_send);
        let short = self.fault("a short send", self.faults.short_send);
        let no_memory = self.fault("a send without memory", self.faults.send_memory);
        let error = self.random.pick(&[Errno::CONNRESET, Errno::PIPE, Errno::TIMEDOUT]);
        let lack = self.random.pick(&[Errno::NOBUFS, Errno::NOMEM]);
        let asked = buffer.len();
        let part = self.random.below(asked) + 1;
        let socket = self.socket(connection);
        assert!(!socket.outbound_ended, "a send after the shutdown");
        let room = socket.outbound_capacity - socket.outbound;
        let taken = asked.min(room).min(if short { part } else { asked });
        let result = if socket.reset {
            Err(error)
        } else if no_memory {
            Err(lack)
        } else if taken == 0 || zero {
            Err(Errno::AGAIN)
        } else {
            socket.sent.extend_from_slice(&buffer[..taken]);
            socket.outbound += taken;
            Ok(taken)
        };
        self.completions.push_back(Completion::Sent { connection, buffer, result });
    }

    fn complete_close(&mut self, connection: ConnectionKey, how: HowToClose) {
        self.complete(connection, RequestSet::CLOSE);
        assert!(self.file(connection).in_flight.is_none(), "closed with something in flight");
        let socket = self.socket(connection);
        socket.closed = true;
        socket.file = None;
        // A reset destroys what the client has not read. Closing with unread bytes is a reset too.
        if how == HowToClose::Abort || !socket.inbound.is_empty() {
            socket.reset = true;
        }
        socket.inbound = VecDeque::new();
        self.files[connection.slot as usize] = None;
        self.completions.push_back(Completion::Closed { connection });
    }

    fn file(&mut self, key: ConnectionKey) -> &mut File {
        let file = self.files[key.slot as usize].as_mut().expect("an open file");
        assert_eq!(file.key, key, "the file is another connection's");
        file
    }

    fn socket(&mut self, key: ConnectionKey) -> &mut Socket {
        let id = self.file(key).socket.expect("accepted");
        &mut self.sockets[id.0]
    }

    /// Whether there are completions that the shard has not taken.
    pub fn has_completions(&self) -> bool {
        !self.completions.is_empty()
    }

    fn is_completion_queue_full(&self) -> bool {
        let slots = usize::from(self.faults.completion_slots);
        slots > 0 && self.completions.len() >= slots
    }

    fn complete(&mut self, key: ConnectionKey, one: RequestSet) {
        self.file(key).in_flight.complete(one);
    }

    fn request(&mut self, key: ConnectionKey, one: RequestSet, request: Request) {
        let file = self.file(key);
        assert!(!file.in_flight.any(RequestSet::CLOSE), "a request on a file that is being closed");
        file.in_flight.begin(one);
        self.queued.push(request);
        if self.fault("a full submission queue", self.faults.eager) {
            self.requests.append(&mut self.queued);
            self.try_complete(self.requests.len() - 1);
        }
    }
}

impl Kernel for SimulatedKernel {
    type Lease = SimulatedLease;

    fn now_ms(&self) -> u64 {
        self.now_ms
    }

    fn unix_ms(&self) -> u64 {
        self.unix_ms
    }

    fn receive_buffers(&self) -> usize {
        self.buffers
    }

    fn accept(&mut self, connection: ConnectionKey) {
        let slot = connection.slot as usize;
        if self.files.len() <= slot {
            self.files.resize_with(slot + 1, || None);
        }
        assert!(self.files[slot].is_none(), "an accept into an occupied file");
        let in_flight = RequestSet::default();
        self.files[slot] =
            Some(File { key: connection, socket: None, in_flight, cancelled: false });
        self.request(connection, RequestSet::ACCEPT, Request::Accept(connection));
    }

    fn stop_accepting(&mut self) {
        self.listening = false;
        for id in self.backlog.drain(..) {
            self.sockets[id.0].closed = true;
            self.sockets[id.0].reset = true;
        }
    }

    fn poll_readable(&mut self, connection: ConnectionKey) {
        self.socket(connection).unannounced = true;
        self.request(connection, RequestSet::POLL_READABLE, Request::PollReadable(connection));
    }

    fn receive(&mut self, connection: ConnectionKey) {
        self.request(connection, RequestSet::RECEIVE, Request::Receive(connection));
    }

    fn send(&mut self, connection: ConnectionKey, buffer: SendBuffer) {
        self.request(connection, RequestSet::SEND, Request::Send(connection, buffer));
    }

    fn poll_writable(&mut self, connection: ConnectionKey) {
        self.request(connection, RequestSet::POLL_WRITABLE, Request::PollWritable(connection));
    }

    fn shutdown(&mut self, connection: ConnectionKey) {
        self.request(connection, RequestSet::SHUTDOWN, Request::Shutdown(connection));
    }

    fn cancel(&mut self, connection: ConnectionKey) {
        self.request(connection, RequestSet::CANCEL, Request::Cancel(connection));
    }

    fn close(&mut self, connection: ConnectionKey, how: HowToClose) {
        self.request(connection, RequestSet::CLOSE, Request::Close(connection, how));
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.waits = wait;
        self.reaped = 0;
        if self.fault("a slow turn", self.faults.slow_turn) {
            let ms = self.random.between(1, 300);
            self.pass(ms);
        }
        let mut submitted = self.queued.len();
        if self.fault("an early return", self.faults.early_return) {
            self.waits = Wait::No;
            submitted = self.random.below(submitted + 1);
        }
        self.requests.extend(self.queued.drain(..submitted));
        self.progress();
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion<SimulatedLease>> {
        let slots = usize::from(self.faults.completion_slots);
        let is_empty = slots > 0 && self.reaped >= slots;
        self.count("a full completion queue", is_empty && !self.completions.is_empty());
        let completion = if is_empty { None } else { self.completions.pop_front() }?;
        self.reaped += 1;
        assert!(self.reaped <= self.completions_max, "a turn without a bound");
        Some(completion)
    }
}
