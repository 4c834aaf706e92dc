//! TLS: the handshake, which a thread of its own makes, and the records of a session.

use std::collections::VecDeque;

use super::Shard;
use super::send::mark_dirty;
use super::tally::Outcome;
use crate::domain::close::EndReason;
use crate::domain::ids::ConnectionKey;
use crate::handoff::Pushed;
use crate::protocol::phase::Signal;
use crate::protocol::tls::record::whole_length;
use crate::protocol::tls::{Alert, Content, HandshakeProgress, Job, Opened, Opening};
use crate::protocol::upgrade::Refused;
use crate::reactor::connection::{Connection, Flags, Handshake, Lifecycle};
use crate::reactor::tls::{ShardHandshakeEnd, TlsTable};
use crate::uring::{HowToClose, Kernel};

/// How often one handshake may visit its thread. Two visits are usual. A client that sends its hello in many small
/// records needs more.
const VISITS_MAX: u8 = 16;
/// Handshakes taken back per turn.
const HANDSHAKES_PER_TURN_MAX: usize = 256;
/// Type of a record of the handshake (RFC 8446 §5.1).
const HANDSHAKE_RECORD: u8 = 22;
const SPEAKS_TLS: &str = "this port speaks TLS: use https:// or wss://";

/// The shard's side of the thread that makes its handshakes.
#[derive(Debug)]
pub(super) struct HandshakeLink {
    end: ShardHandshakeEnd,
    /// Handshakes that are under way.
    under_way: usize,
    /// Connections whose handshake waits for room in the ring. Some have ended.
    waiting: VecDeque<ConnectionKey>,
}

impl HandshakeLink {
    pub(super) fn new(end: ShardHandshakeEnd) -> Self {
        Self { end, under_way: 0, waiting: VecDeque::new() }
    }
}

impl<K: Kernel> Shard<K> {
    /// Handles bytes of a TLS connection: those of its handshake, then the records of its session.
    pub(super) fn records(&mut self, key: ConnectionKey, bytes: &mut [u8]) {
        if matches!(self.slab[key].lifecycle, Lifecycle::Securing(_)) {
            return self.handshake_records(key, bytes);
        }
        let now = self.now;
        let mut rest = bytes;
        while !rest.is_empty() {
            let connection = &self.slab[key];
            let opening = self.tls.get_mut(key).and_then(|tls| tls.opening.as_mut());
            let Some(opening) = opening.filter(|_| reads_records(connection)) else {
                if !connection.lifecycle.is_over() {
                    self.dropped(key, rest.len());
                }
                return;
            };
            let Opened { consumed, record_bytes, content } = match opening.next(rest, now) {
                Ok(opened) => opened,
                Err(error) => {
                    self.counters.counts.tls_errors.add(1);
                    return self.end_tls(key, error.alert(), EndReason::PeerAtFault);
                }
            };
            let (taken, others) = std::mem::take(&mut rest).split_at_mut(consumed);
            rest = others;
            let data = match &content {
                Content::Data(at) => at.len(),
                Content::Assembled(data) => data.len(),
                _ => 0,
            };
            if record_bytes > 0 && !self.count_overhead(key, record_bytes - data, data == 0) {
                return self.too_many_records(key);
            }
            match content {
                Content::Incomplete => self.schedule(key),
                Content::Nothing | Content::KeyUpdate { asked: false } => {}
                Content::Data(at) => self.bytes(key, &mut taken[at]),
                Content::Assembled(mut data) => self.bytes(key, &mut data),
                Content::KeyUpdate { asked: true } => {
                    let tls = self.tls.get_mut(key).expect("its record was opened");
                    tls.sealing.answer_key_update();
                }
                Content::Closed => {
                    return self.end_tls(key, Alert::CLOSE_NOTIFY, EndReason::PeerGone);
                }
                Content::Failed(_) => {
                    return self.terminate(key, EndReason::PeerReset, HowToClose::Orderly);
                }
            }
        }
    }

    /// Counts what a record has beyond its data towards the limits of the client, and one without data as a frame:
    /// opening it costs as much. Returns whether the client keeps to the limits.
    fn count_overhead(&mut self, key: ConnectionKey, overhead: usize, is_empty: bool) -> bool {
        let (bytes_max, frames_max) =
            (self.config.inbound_bytes_per_s_max, self.config.inbound_frames_per_s_max);
        let connection = &mut self.slab[key];
        if matches!(connection.lifecycle, Lifecycle::Echo(_)) {
            return true;
        }
        let inbound = &mut connection.inbound;
        inbound.count(self.now, overhead, bytes_max)
            && (!is_empty || inbound.count_frame(self.now, frames_max))
    }

    /// Ends a connection that exceeds its limits: before the 101 and after our close frame there is no close frame for it.
    fn too_many_records(&mut self, key: ConnectionKey) {
        if self.slab[key].lifecycle.is_open() {
            return self.too_much(key);
        }
        self.counters.counts.inbound_rate_exceeded.add(1);
        self.end_tls(key, Alert::UNEXPECTED_MESSAGE, EndReason::PeerAtFault);
    }

    fn handshake_records(&mut self, key: ConnectionKey, bytes: &[u8]) {
        let Lifecycle::Securing(securing) = &mut self.slab[key].lifecycle else {
            panic!("the lifecycle was checked by the caller");
        };
        securing.input.extend_from_slice(bytes);
        if securing.visits == 0 && is_plaintext(&securing.input) {
            self.counters.counts.tls_refused_plaintext.add(1);
            self.tls.remove(key);
            return self.answer(key, &Refused::bad_request(SPEAKS_TLS), EndReason::Refused);
        }
        self.advance_handshake(key);
    }

    /// Passes a handshake to its thread, if the client has sent a whole record.
    fn advance_handshake(&mut self, key: ConnectionKey) {
        let connection = self.slab.get_mut(key);
        let Some(Lifecycle::Securing(securing)) = connection.map(|it| &mut it.lifecycle) else {
            return;
        };
        let handshaker = self.handshaker.as_mut().expect("connections are secured by one");
        if securing.is_under_way {
            return;
        }
        let is_whole = whole_length(&securing.input).is_some_and(|it| it <= securing.input.len());
        if securing.input.len() > TlsTable::HANDSHAKE_INPUT_BYTES_MAX
            || (is_whole && securing.visits == VISITS_MAX)
        {
            self.counters.counts.tls_handshakes_flooded.add(1);
            return self.end_tls(key, Alert::UNEXPECTED_MESSAGE, EndReason::Refused);
        }
        if !is_whole {
            return;
        }
        if handshaker.under_way == usize::from(self.config.handshakes_max) {
            self.counters.counts.tls_handshakes_delayed.add(1);
            securing.is_under_way = true;
            return handshaker.waiting.push_back(key);
        }
        securing.is_under_way = true;
        securing.visits += 1;
        let job = Job {
            connection: key,
            handshake: securing.handshake.take(),
            input: std::mem::take(&mut securing.input),
            output: Vec::new(),
            progress: HandshakeProgress::NeedMore,
        };
        match handshaker.end.commands.push(job) {
            Pushed::Accepted => handshaker.under_way += 1,
            Pushed::Full(_) => panic!("the ring has room for all that may be under way"),
            // The thread has ended, so the process will.
            Pushed::Closed(_) => self.terminate(key, EndReason::ServerFault, HowToClose::Orderly),
        }
    }

    /// Takes a bounded number of handshakes back, and passes on those that had to wait. Returns whether some may be
    /// left.
    pub(super) fn take_handshakes(&mut self) -> bool {
        for _ in 0..HANDSHAKES_PER_TURN_MAX {
            let Some(handshaker) = &mut self.handshaker else { return false };
            let Some(job) = handshaker.end.reports.pop() else { break };
            handshaker.under_way -= 1;
            self.handshake_advanced(job);
        }
        while let Some(handshaker) = &mut self.handshaker
            && handshaker.under_way < usize::from(self.config.handshakes_max)
            && let Some(key) = handshaker.waiting.pop_front()
        {
            let connection = self.slab.get_mut(key);
            if let Some(Lifecycle::Securing(securing)) = connection.map(|it| &mut it.lifecycle) {
                securing.is_under_way = false;
                self.advance_handshake(key);
            }
        }
        self.handshakes_wait()
    }

    /// Whether handshakes wait to be taken back.
    pub(super) fn handshakes_wait(&self) -> bool {
        self.handshaker.as_ref().is_some_and(|it| !it.end.reports.is_empty())
    }

    /// Handshakes that are under way or wait for that; some belong to connections that have ended.
    #[cfg(any(test, feature = "simulation"))]
    pub(super) fn handshakes_under_way(&self) -> usize {
        self.handshaker.as_ref().map_or(0, |link| link.under_way + link.waiting.len())
    }

    /// Wakes the thread, if it sleeps and has something to do.
    pub(super) fn publish_handshakes(&mut self) {
        if let Some(handshaker) = &mut self.handshaker {
            handshaker.end.commands.publish();
        }
    }

    fn handshake_advanced(&mut self, job: Job) {
        let key = job.connection;
        let Some(connection) = self.slab.get_mut(key) else { return };
        let Lifecycle::Securing(securing) = &mut connection.lifecycle else { return };
        securing.is_under_way = false;
        securing.handshake = job.handshake;
        let peer = securing.peer;
        let tls = self.tls.get_mut(key).expect("it is being secured");
        match job.progress {
            HandshakeProgress::NeedMore => {
                securing.input = job.input;
                tls.sealing.push_handshake(&job.output);
                mark_dirty(&mut self.dirty, key, connection);
                self.advance_handshake(key);
            }
            HandshakeProgress::Done(secrets) => {
                let [client, server] = secrets.keys();
                tls.sealing.push_handshake(&job.output);
                tls.sealing.establish(server);
                tls.opening = Some(Opening::new(client));
                mark_dirty(&mut self.dirty, key, connection);
                self.set_lifecycle(key, Lifecycle::Handshake(Box::new(Handshake::new(peer))));
                let mut rest = job.input;
                self.records(key, &mut rest);
            }
            HandshakeProgress::Failed => {
                tls.sealing.fail_handshake(&job.output);
                self.begin_close(key, EndReason::Refused);
                self.abort_tls(key);
            }
        }
        self.receive_on(key);
    }

    /// Ends a TLS connection with an alert (RFC 8446 §6). What is queued is dropped. If a record has been sent in part,
    /// there is no way to send an alert.
    pub(super) fn end_tls(&mut self, key: ConnectionKey, alert: Alert, why: EndReason) {
        let tls = self.tls.get_mut(key).expect("a TLS connection");
        if tls.sealing.sealed_bytes() > 0 {
            return self.terminate(key, why, HowToClose::Orderly);
        }
        tls.sealing.close(alert);
        let connection = &mut self.slab[key];
        // The close frame of an overflow could not be sent any more.
        connection.flags.clear(Flags::CUT);
        connection.queue.clear(&mut self.nodes, |outgoing| {
            self.tally.recipient_done(&outgoing, Outcome::Ended);
        });
        if !connection.lifecycle.closes() {
            self.begin_close(key, why);
        }
        self.abort_tls(key);
    }

    /// Nothing but what is ready is sent, and nothing more is read.
    fn abort_tls(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        connection.receiver = Default::default();
        connection.inbound = Default::default();
        connection.phase = connection.phase.next(Signal::Aborted).expect("allowed in every phase");
        mark_dirty(&mut self.dirty, key, connection);
        self.shut_down_if_flushed(key);
        self.schedule(key);
    }
}

/// Whether records are opened: not after the close.
fn reads_records(connection: &Connection) -> bool {
    matches!(connection.lifecycle, Lifecycle::Handshake(_) | Lifecycle::Deciding(_))
        || connection.phase.reads_frames() && !connection.lifecycle.is_over()
}

/// Whether a client speaks HTTP where TLS is expected.
fn is_plaintext(input: &[u8]) -> bool {
    input.first().is_some_and(|first| *first != HANDSHAKE_RECORD && first.is_ascii_uppercase())
}
