//! Sends the queues. One send is in flight per connection, so frames keep their order. Frames that
//! are queued during a send go out together in the next one.

use std::collections::VecDeque;
use std::rc::Rc;

use rustix::io::Errno;

use super::Shard;
use super::intake::is_filling;
use super::tally::Outcome;
use crate::domain::close::EndReason;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::SEND_BATCH_BYTES;
use crate::domain::outgoing::Outgoing;
use crate::protocol::tls::Sealing;
use crate::reactor::connection::{Connection, Flags, Lifecycle, RequestSet};
use crate::reactor::queue::{FramePool, SendQueue};
use crate::uring::{HowToClose, Kernel, SendBuffer};

/// Sends started per turn: enough to amortise the system call, few enough that their completions
/// fit into the ring.
pub(super) const SENDS_PER_TURN_MAX: usize = 256;
/// Staging buffers kept while nothing is being sent.
const STAGING_KEPT: usize = 16;

/// Buffers for frames that are copied together. There may be as many as sends of one turn; a send
/// completes within the next system call, so few are in use for longer.
#[derive(Debug, Default)]
pub(super) struct Staging {
    spare: Vec<Vec<u8>>,
    out: usize,
}

impl Staging {
    /// An empty buffer of [`SEND_BATCH_BYTES`]; `None`: all are in use, and one frame is sent
    /// alone.
    fn take(&mut self) -> Option<Vec<u8>> {
        if self.out == SENDS_PER_TURN_MAX {
            return None;
        }
        self.out += 1;
        Some(self.spare.pop().unwrap_or_else(|| Vec::with_capacity(SEND_BATCH_BYTES)))
    }

    fn give_back(&mut self, mut buffer: Vec<u8>) {
        assert!(buffer.capacity() >= SEND_BATCH_BYTES && self.out > 0);
        self.out -= 1;
        buffer.clear();
        self.spare.push(buffer);
    }

    /// Frees memory after a peak.
    fn trim(&mut self) {
        self.spare.truncate(STAGING_KEPT);
    }

    /// Buffers in use.
    pub(super) fn out(&self) -> usize {
        self.out
    }
}

impl<K: Kernel> Shard<K> {
    /// Queues a frame made by the shard.
    pub(super) fn push_own(&mut self, key: ConnectionKey, bytes: Box<[u8]>) {
        self.push(key, Outgoing::own(bytes));
    }

    /// Queues a frame that is not a delivery: a last frame, a ping or an answer to the client. The
    /// caller bounds their number.
    pub(super) fn push(&mut self, key: ConnectionKey, outgoing: Rc<Outgoing>) {
        self.slab[key].queue.push(&mut self.nodes, outgoing);
        self.queue_grown(key);
    }

    /// The queue has grown: it has something to send, and the rings wait for it if it is nearly full.
    pub(super) fn queue_grown(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        mark_dirty(&mut self.dirty, key, connection);
        if is_filling(connection, self.now, &self.config) && !connection.flags.set(Flags::AWAITED) {
            self.awaited.push(key);
        }
    }

    /// Starts the sends of this turn. Returns whether some are left for the next turn.
    pub(super) fn start_sends(&mut self) -> bool {
        for _ in 0..SENDS_PER_TURN_MAX {
            let Some(key) = self.dirty.pop_front() else {
                if self.staging.out() == 0 {
                    self.staging.trim();
                }
                return false;
            };
            let Some(connection) = self.slab.get_mut(key) else { continue };
            connection.flags.clear(Flags::DIRTY);
            if connection.lifecycle.is_over()
                || connection.in_flight.any(RequestSet::SEND.or(RequestSet::POLL_WRITABLE))
            {
                continue;
            }
            let buffer = match self.tls.get_mut(key) {
                None => {
                    let staging = || self.staging.take();
                    connection.queue.next_send(&self.nodes, SEND_BATCH_BYTES, staging)
                }
                Some(tls) => {
                    let Some(staging) = self.staging.take() else {
                        mark_dirty(&mut self.dirty, key, connection);
                        return true;
                    };
                    match next_record(&connection.queue, &self.nodes, &mut tls.sealing, staging) {
                        Ok(buffer) => Some(buffer),
                        Err(staging) => {
                            self.staging.give_back(staging);
                            None
                        }
                    }
                }
            };
            if let Some(buffer) = buffer {
                connection.in_flight.begin(RequestSet::SEND);
                self.kernel.send(key, buffer);
            }
        }
        !self.dirty.is_empty()
    }

    pub(super) fn sent(
        &mut self,
        key: ConnectionKey,
        buffer: SendBuffer,
        result: Result<usize, Errno>,
    ) {
        let asked = buffer.len();
        let batch = buffer.into_batch();
        let connection = &mut self.slab[key];
        connection.in_flight.complete(RequestSet::SEND);
        if connection.lifecycle.is_over() {
            self.return_staging(batch);
            return self.free_if_idle(key);
        }
        let taken = match result {
            Ok(taken) => taken,
            // A lack of memory passes, or the write timeout ends it.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM) => 0,
            Err(_) => {
                self.return_staging(batch);
                return self.terminate(key, EndReason::PeerReset, HowToClose::Orderly);
            }
        };
        assert!(taken <= asked, "the socket took {taken} of {asked}");
        let frames_before = connection.queue.frames();
        let of_queue = match self.tls.get_mut(key) {
            None => taken,
            Some(tls) => tls.sealing.sent(taken),
        };
        connection.queue.advance(&mut self.nodes, of_queue, |outgoing| {
            self.tally.recipient_done(&outgoing, Outcome::Sent);
        });
        let counts = &self.counters.counts;
        counts.sends.add(1);
        counts.bytes_sent.add(taken as u64);
        let frames_sent = frames_before - connection.queue.frames();
        if batch.is_some() {
            counts.frames_batched.add(frames_sent as u64);
        }
        self.return_staging(batch);
        self.count_for_cursor(key, frames_sent);
        self.cut_if_due(key);
        if taken < asked {
            self.counters.counts.sends_short.add(1);
            self.stalled(key, taken > 0);
        } else {
            self.progressed(key);
        }
    }

    fn return_staging(&mut self, batch: Option<Vec<u8>>) {
        if let Some(batch) = batch {
            self.staging.give_back(batch);
        }
    }

    /// The socket is full. Nothing is sent until it has room; after the write timeout the
    /// connection is terminated.
    fn stalled(&mut self, key: ConnectionKey, progress: bool) {
        let deadline = self.after(self.config.write_ms_max);
        let connection = &mut self.slab[key];
        connection.in_flight.begin(RequestSet::POLL_WRITABLE);
        let first = !connection.flags.set(Flags::STALLED);
        // After the close has begun, the deadline of the lifecycle applies.
        if connection.lifecycle.is_open() && (first || progress) {
            connection.deadline = deadline.into();
        }
        self.kernel.poll_writable(key);
        self.schedule(key);
    }

    /// The socket has taken the whole buffer.
    fn progressed(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        connection.flags.clear(Flags::STALLED);
        if matches!(connection.lifecycle, Lifecycle::Holding(_)) {
            self.drain_held(key);
        }
        let connection = &mut self.slab[key];
        let is_flushed = self.tls.get(key).is_none_or(|tls| tls.sealing.is_flushed());
        if connection.queue.is_empty() && is_flushed {
            self.shut_down_if_flushed(key);
        } else {
            mark_dirty(&mut self.dirty, key, connection);
        }
        // An echo may have been waiting for room in the queue.
        self.receive_on(key);
    }

    pub(super) fn writable(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        connection.in_flight.complete(RequestSet::POLL_WRITABLE);
        if connection.lifecycle.is_over() {
            return self.free_if_idle(key);
        }
        mark_dirty(&mut self.dirty, key, connection);
    }
}

/// What is sent next over TLS. `Err`: nothing; the empty buffer comes back.
fn next_record(
    queue: &SendQueue,
    nodes: &FramePool,
    sealing: &mut Sealing,
    mut staging: Vec<u8>,
) -> Result<SendBuffer, Vec<u8>> {
    let copy = |length: usize, out: &mut Vec<u8>| queue.copy_front(nodes, length, out);
    match sealing.next(queue.bytes(), SEND_BATCH_BYTES, &mut staging, copy) {
        None => Err(staging),
        Some(from) => {
            staging.drain(..from);
            Ok(SendBuffer::batch(staging))
        }
    }
}

/// Lists the connection as having something to send. It is resolved already, for a delivery does this once per
/// recipient.
pub(super) fn mark_dirty(
    dirty: &mut VecDeque<ConnectionKey>,
    key: ConnectionKey,
    connection: &mut Connection,
) {
    if !connection.in_flight.any(RequestSet::SEND.or(RequestSet::POLL_WRITABLE))
        && !connection.flags.set(Flags::DIRTY)
    {
        dirty.push_back(key);
    }
}
