//! Receives bytes and handles messages.

use super::{SESSION_MANAGER, Shard};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardReport;
use crate::domain::ids::ConnectionKey;
use crate::domain::limits::DROPPED_BYTES_MAX;
use crate::protocol::receiver::{Flow, Incoming, MessageKind, ReceiveRules};
use crate::protocol::{deflate, frame};
use crate::reactor::connection::{Flags, Lifecycle, RequestSet};
use crate::reactor::shard::clock::message_deadline;
use crate::uring::{HowToClose, Kernel, Received};

/// Compression level of echoes, which need no better one.
const ECHO_DEFLATE_LEVEL: u32 = 1;
const TOO_SLOW: Close =
    Close::new(CloseCode::POLICY_VIOLATION, "a message was not complete in time");
const TOO_MUCH: Close =
    Close::new(CloseCode::POLICY_VIOLATION, "too many messages or bytes a second");

impl<K: Kernel> Shard<K> {
    /// The connection has something to receive.
    pub(super) fn readable(&mut self, key: ConnectionKey, armed: bool, broken: bool) {
        let connection = &mut self.slab[key];
        if armed {
            assert!(connection.in_flight.any(RequestSet::POLL_READABLE));
        } else {
            // If the kernel ended the poll by itself, the next receive starts another.
            connection.in_flight.complete(RequestSet::POLL_READABLE);
            if connection.lifecycle.is_over() {
                return self.free_if_idle(key);
            }
        }
        connection.flags.set(Flags::READABLE);
        if broken {
            connection.flags.set(Flags::BROKEN);
        }
        self.receive_on(key);
    }

    /// Requests a receive, if there is something to receive and it may be received now.
    pub(super) fn receive_on(&mut self, key: ConnectionKey) {
        let too_many_reports = self.reports.is_backlogged();
        let buffers = self.kernel.receive_buffers();
        let Some(connection) = self.slab.get_mut(key) else { return };
        if !connection.flags.has(Flags::READABLE) || connection.in_flight.any(RequestSet::RECEIVE) {
            return;
        }
        match connection.lifecycle {
            // Bytes after the request are received after the decision.
            Lifecycle::Deciding(_) | Lifecycle::Accepting => return,
            // The same for bytes of a handshake, which are handled in order.
            Lifecycle::Securing(ref securing) if securing.is_under_way => return,
            Lifecycle::Terminating(_) | Lifecycle::Freeing => return,
            // An echo is received at the pace at which its answers are sent.
            Lifecycle::Echo(_)
                if connection.queue.frames() >= usize::from(self.config.queue_frames_max / 2)
                    || connection.queue.bytes() >= self.config.queue_bytes_max as usize =>
            {
                return;
            }
            _ => {}
        }
        if too_many_reports || self.receives_in_flight >= buffers {
            if !connection.flags.set(Flags::WAITING) {
                self.waiting.push_back(key);
            }
            return;
        }
        if !connection.in_flight.any(RequestSet::POLL_READABLE) {
            connection.in_flight.begin(RequestSet::POLL_READABLE);
            self.kernel.poll_readable(key);
        }
        connection.flags.clear(Flags::READABLE);
        connection.in_flight.begin(RequestSet::RECEIVE);
        self.receives_in_flight += 1;
        self.kernel.receive(key);
    }

    /// Starts receives that had to wait for a buffer or for the session manager.
    pub(super) fn start_receives(&mut self) {
        for _ in 0..self.waiting.len() {
            if self.reports.is_backlogged()
                || self.receives_in_flight >= self.kernel.receive_buffers()
            {
                return;
            }
            let Some(key) = self.waiting.pop_front() else { return };
            if let Some(connection) = self.slab.get_mut(key) {
                connection.flags.clear(Flags::WAITING);
                self.receive_on(key);
            }
        }
    }

    pub(super) fn received(&mut self, key: ConnectionKey, received: Received<K::Lease>) {
        self.receives_in_flight -= 1;
        let connection = &mut self.slab[key];
        connection.in_flight.complete(RequestSet::RECEIVE);
        if connection.lifecycle.is_over() {
            return self.free_if_idle(key);
        }
        match received {
            Received::Bytes { mut lease, more } => {
                connection.last_received = self.now.into();
                connection.flags.clear(Flags::PINGED);
                if more || connection.flags.has(Flags::BROKEN) {
                    connection.flags.set(Flags::READABLE);
                }
                self.counters.counts.bytes_received.add(lease.len() as u64);
                if self.tls.has(key) {
                    self.records(key, &mut lease)
                } else {
                    self.bytes(key, &mut lease)
                }
            }
            Received::End => return self.fin_received(key),
            Received::Nothing => {}
            Received::NoBuffers => {
                connection.flags.set(Flags::READABLE);
                if !connection.flags.set(Flags::WAITING) {
                    self.waiting.push_back(key);
                }
                return self.counters.counts.receive_buffers_exhausted.add(1);
            }
            Received::Failed(_) => {
                return self.terminate(key, EndReason::PeerReset, HowToClose::Orderly);
            }
        }
        self.receive_on(key);
    }

    /// Passes received bytes to the handshake or the frame decoder, or drops them after the close.
    pub(super) fn bytes(&mut self, key: ConnectionKey, bytes: &mut [u8]) {
        let connection = &mut self.slab[key];
        match &mut connection.lifecycle {
            Lifecycle::Handshake(_) => self.handshake_bytes(key, bytes),
            // The next record of what was received together with the request.
            Lifecycle::Deciding(deciding) => deciding.rest.extend_from_slice(bytes),
            Lifecycle::Accepting | Lifecycle::Securing(_) => panic!("bytes before the handshake"),
            _ if connection.phase.reads_frames() => self.frames(key, bytes),
            _ => self.dropped(key, bytes.len()),
        }
    }

    /// Drops what a client sends after it was refused or has violated the protocol. One that sends too much of it is
    /// reset.
    pub(super) fn dropped(&mut self, key: ConnectionKey, bytes: usize) {
        if !self.slab[key].inbound.count_dropped(bytes, DROPPED_BYTES_MAX) {
            self.counters.counts.dropped_too_much.add(1);
            self.terminate(key, EndReason::PeerAtFault, HowToClose::Abort);
        }
    }

    pub(super) fn frames(&mut self, key: ConnectionKey, bytes: &mut [u8]) {
        let now = self.now;
        let config = &self.config;
        let connection = &mut self.slab[key];
        let limited = !matches!(connection.lifecycle, Lifecycle::Echo(_));
        let message_bytes_max =
            if limited { config.message_bytes_max } else { config.echo_message_bytes_max };
        let rules = ReceiveRules {
            message_bytes_max: message_bytes_max as usize,
            deflate: connection.flags.has(Flags::DEFLATE),
        };
        if limited && !connection.inbound.count(now, bytes.len(), config.inbound_bytes_per_s_max) {
            return self.too_much(key);
        }
        let mut receiver = std::mem::take(&mut connection.receiver);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut sink = |incoming: Incoming<'_>| self.incoming(key, incoming);
        let verdict = receiver.receive(bytes, &rules, &mut scratch, &mut sink);
        self.scratch = scratch;
        let connection = &mut self.slab[key];
        let is_over = connection.lifecycle.is_over();
        let has_deadline = !is_over && receiver.note_begun(now);
        if !is_over {
            connection.receiver = receiver;
        }
        if has_deadline {
            self.schedule(key);
        }
        if let Err(error) = verdict {
            self.counters.counts.protocol_errors.add(1);
            self.close_for_violation(key, &error.close());
        }
    }

    fn incoming(&mut self, key: ConnectionKey, incoming: Incoming<'_>) -> Flow {
        let connection = &mut self.slab[key];
        if !connection.phase.reads_frames() {
            return Flow::Stop;
        }
        let limited = !matches!(connection.lifecycle, Lifecycle::Echo(_));
        let frames_max = self.config.inbound_frames_per_s_max;
        if limited && !connection.inbound.count_frame(self.now, frames_max) {
            self.too_much(key);
            return Flow::Stop;
        }
        match incoming {
            Incoming::Message { kind, payload, compressed } => {
                self.counters.counts.messages_received.add(1);
                self.message(key, kind, payload, compressed);
            }
            Incoming::Ping(payload) => self.pinged(key, payload),
            Incoming::Pong(_) => {}
            Incoming::Close(close) => {
                self.peer_closed(key, close.map(|(code, _)| code));
                return Flow::Stop;
            }
        }
        Flow::Continue
    }

    fn message(&mut self, key: ConnectionKey, kind: MessageKind, payload: &[u8], compressed: bool) {
        match self.slab[key].lifecycle {
            Lifecycle::Echo(window_bits) => {
                let window_bits = window_bits.filter(|_| compressed);
                let frame = window_bits
                    .and_then(|bits| deflate::compress(payload, ECHO_DEFLATE_LEVEL, bits))
                    .map(|payload| frame::encode(kind.opcode(), true, &payload))
                    .unwrap_or_else(|| frame::encode(kind.opcode(), false, payload));
                self.push_own(key, frame);
            }
            Lifecycle::Holding(_) | Lifecycle::Filtering(_) | Lifecycle::Live => {
                self.client_message(key, kind, payload);
            }
            // Our close frame is sent, and the client's has not arrived.
            _ => self.counters.counts.messages_discarded.add(1),
        }
    }

    /// Handles a message of a session. The first message is the resume request: text according to
    /// the contract, binary from some libraries. Later messages are passed on only if they may be
    /// control messages.
    fn client_message(&mut self, key: ConnectionKey, kind: MessageKind, payload: &[u8]) {
        let catch_up_deadline = self.after(self.config.catch_up_ms_max);
        let connection = &mut self.slab[key];
        let first = !connection.flags.has(Flags::FIRST_MESSAGE);
        let wanted = first || (kind == MessageKind::Text && payload.first() == Some(&b'{'));
        // A first message that is no text is no resume request. The session manager answers it.
        let text = std::str::from_utf8(payload).ok().or(first.then_some(""));
        match text.filter(|text| wanted && text.len() <= self.config.message_bytes_max as usize) {
            Some(text) => {
                connection.flags.set(Flags::FIRST_MESSAGE);
                if first && let Lifecycle::Holding(holding) = &mut connection.lifecycle {
                    holding.deadline = catch_up_deadline;
                }
                self.counters.counts.messages_passed.add(1);
                let report = ShardReport::Message { connection: key, text: text.into() };
                self.reports.push(SESSION_MANAGER, report);
                // The deadline of catch-up may be earlier than that of the first message.
                self.schedule(key);
            }
            None => self.counters.counts.messages_discarded.add(1),
        }
    }

    /// Answers a ping with a pong (RFC 6455 §5.5.2), unless so much is queued that the client
    /// apparently does not read. Nothing is sent after a close frame (§5.5.1).
    fn pinged(&mut self, key: ConnectionKey, payload: &[u8]) {
        self.counters.counts.pings_received.add(1);
        let frames_max = usize::from(self.config.queue_frames_max / 2);
        let connection = &self.slab[key];
        if connection.phase.may_send() && connection.queue.frames() < frames_max {
            self.push_own(key, frame::encode_pong(payload));
        } else {
            self.counters.counts.pongs_skipped.add(1);
        }
    }

    /// Closes an open connection if a message of it is overdue. Returns whether it did.
    pub(super) fn check_message(&mut self, key: ConnectionKey) -> bool {
        let connection = &self.slab[key];
        // The rest may be here, and wait for a buffer.
        if connection.flags.has(Flags::READABLE)
            || connection.in_flight.any(RequestSet::RECEIVE)
            || message_deadline(connection, self.tls.get(key), self.config.message_ms_max)
                .is_none_or(|at| self.now < at)
        {
            return false;
        }
        self.counters.counts.message_timeouts.add(1);
        self.close_for_violation(key, &TOO_SLOW);
        true
    }

    pub(super) fn too_much(&mut self, key: ConnectionKey) {
        self.counters.counts.inbound_rate_exceeded.add(1);
        self.close_for_violation(key, &TOO_MUCH);
    }
}
