//! All ways to end a connection. `Closing` sends the last frames and `Lingering` our FIN; either
//! may be skipped. `Terminating` starts no new requests and waits for those in flight; `Freeing`
//! closes the socket.

use super::send::mark_dirty;
use super::tally::Outcome;
use super::{SESSION_MANAGER, Shard, Stopping};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardReport;
use crate::domain::ids::ConnectionKey;
use crate::protocol::frame;
use crate::protocol::phase::{Phase, Signal};
use crate::protocol::receiver::Receiver;
use crate::protocol::tls::Alert;
use crate::protocol::upgrade::Refused;
use crate::reactor::connection::{Flags, Lifecycle, RequestSet};
use crate::reactor::rate::InboundRate;
use crate::uring::{HowToClose, Kernel};

/// Close frame of a queue overflow (contract §3).
const QUEUE_OVERFLOW: Close = Close::new(CloseCode::INTERNAL_ERROR, "backpressure overflow");
/// Connections closed per turn while the shard stops.
const CLOSES_PER_TURN_MAX: u32 = 256;

impl<K: Kernel> Shard<K> {
    /// Sends the queue, then a close frame, and awaits the client's close frame (RFC 6455 §7.1.2).
    pub(super) fn close(&mut self, key: ConnectionKey, close: &Close, why: EndReason) {
        if close.comes_with_cursor() {
            self.push_last_cursor(key);
        }
        self.begin_close(key, why);
        let connection = &mut self.slab[key];
        connection.phase = connection.phase.next(Signal::CloseSent).expect("the phase was open");
        self.push_own(key, frame::encode_close(close));
        self.schedule(key);
    }

    /// Closes after a protocol violation of the client. Nothing more is read from it (RFC 6455
    /// §7.1.7).
    pub(super) fn close_for_violation(&mut self, key: ConnectionKey, close: &Close) {
        if self.slab[key].lifecycle.is_open() {
            self.close(key, close, EndReason::PeerAtFault);
        }
        let connection = &mut self.slab[key];
        connection.receiver = Receiver::default();
        connection.inbound = InboundRate::default();
        connection.phase = connection.phase.next(Signal::Aborted).expect("allowed in every phase");
        self.shut_down_if_flushed(key);
    }

    /// Closes a connection whose queue is full: the client does not read (contract §3). A partly
    /// sent frame is completed; the close frame replaces all others.
    pub(super) fn close_for_overflow(&mut self, key: ConnectionKey) {
        self.counters.counts.queue_overflows.add(1);
        self.begin_close(key, EndReason::QueueOverflow);
        let connection = &mut self.slab[key];
        connection.phase = connection.phase.next(Signal::CloseSent).expect("the phase was open");
        connection.flags.set(Flags::CUT);
        self.cut_if_due(key);
        self.schedule(key);
    }

    /// Drops the frames of an overflown queue, once no send is reading the queue.
    pub(super) fn cut_if_due(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        if connection.in_flight.any(RequestSet::SEND) || !connection.flags.clear(Flags::CUT) {
            return;
        }
        let sealed = self.tls.get(key).map_or(0, |tls| tls.sealing.sealed_bytes());
        connection.queue.cut(&mut self.nodes, sealed, |outgoing| {
            self.tally.recipient_done(&outgoing, Outcome::Ended);
        });
        self.push_own(key, frame::encode_close(&QUEUE_OVERFLOW));
    }

    /// Handles the client's close frame: answers it, unless it is itself the answer (RFC 6455
    /// §5.5.1).
    pub(super) fn peer_closed(&mut self, key: ConnectionKey, code: Option<CloseCode>) {
        let phase = self.slab[key].phase.next(Signal::CloseReceived);
        let phase = phase.expect("frames are read only before the close");
        self.slab[key].phase = phase;
        match phase {
            Phase::OwingEcho => {
                self.begin_close(key, EndReason::ClosedByPeer);
                self.slab[key].phase = phase.next(Signal::CloseSent).expect("an echo is owed");
                self.push_own(key, frame::encode_close_reply(code));
                self.schedule(key);
            }
            Phase::Closed => self.shut_down_if_flushed(key),
            Phase::Upgrading | Phase::Open | Phase::AwaitingPeer => {
                unreachable!("not reachable by a received close frame")
            }
        }
    }

    /// The client has shut down its half of the stream. An open connection is terminated; one that
    /// is closing still sends its last frames.
    pub(super) fn fin_received(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        connection.flags.set(Flags::FIN_RECEIVED);
        match connection.lifecycle {
            Lifecycle::Closing(_) => {
                connection.phase =
                    connection.phase.next(Signal::Aborted).expect("allowed in every phase");
                self.shut_down_if_flushed(key);
            }
            _ => self.terminate(key, EndReason::PeerGone, HowToClose::Orderly),
        }
    }

    /// Begins a close and drops the held events. The receiver stays: the answer of the peer is still
    /// read. The caller moves the phase on, which no second close can.
    pub(super) fn begin_close(&mut self, key: ConnectionKey, why: EndReason) {
        let lifecycle = self.set_lifecycle(key, Lifecycle::Closing(why));
        self.give_up_held(lifecycle);
        self.slab[key].deadline = self.after(self.config.close_ms_max).into();
    }

    /// Drops the events that a lifecycle holds.
    pub(super) fn give_up_held(&mut self, mut lifecycle: Lifecycle) {
        if let Some((held, _)) = lifecycle.held() {
            held.clear(&mut self.nodes, |outgoing| {
                self.tally.end_hold(&outgoing);
                self.tally.recipient_done(&outgoing, Outcome::Ended)
            });
        }
    }

    /// Sends our FIN, if all frames are sent and no close frame is awaited. Over TLS, `close_notify` comes before it
    /// (RFC 8446 §6.1).
    pub(super) fn shut_down_if_flushed(&mut self, key: ConnectionKey) {
        let deadline = self.after(self.config.linger_ms_max);
        let connection = &mut self.slab[key];
        let Lifecycle::Closing(why) = connection.lifecycle else { return };
        if connection.phase != Phase::Closed
            || !connection.queue.is_empty()
            || connection.flags.has(Flags::CUT)
            || connection.in_flight.any(RequestSet::SEND)
        {
            return;
        }
        if let Some(tls) = self.tls.get_mut(key) {
            tls.sealing.close(Alert::CLOSE_NOTIFY);
            if !tls.sealing.is_flushed() {
                return mark_dirty(&mut self.dirty, key, connection);
            }
        }
        if connection.flags.has(Flags::FIN_RECEIVED) {
            return self.terminate(key, why, HowToClose::Orderly);
        }
        connection.deadline = deadline.into();
        connection.in_flight.begin(RequestSet::SHUTDOWN);
        self.set_lifecycle(key, Lifecycle::Lingering(why));
        self.kernel.shutdown(key);
        self.schedule(key);
    }

    /// Ends a close without waiting for the rest of it. What the client has not taken by now is discarded. If it has
    /// taken everything and has only not answered our close frame, the kernel may still deliver what it has.
    pub(super) fn give_up_close(&mut self, key: ConnectionKey) {
        let connection = &self.slab[key];
        let (Lifecycle::Closing(why) | Lifecycle::Lingering(why)) = connection.lifecycle else {
            panic!("no close has begun")
        };
        let has_rest = !connection.queue.is_empty()
            || self.tls.get(key).is_some_and(|tls| !tls.sealing.is_flushed());
        let how = if has_rest { HowToClose::Abort } else { HowToClose::Orderly };
        self.terminate(key, why, how);
    }

    /// Starts no new requests on this connection. Drops its deliveries and reports its end. If a
    /// close had already begun, the reason of the close is reported.
    pub(super) fn terminate(&mut self, key: ConnectionKey, why: EndReason, how: HowToClose) {
        let lifecycle = self.set_lifecycle(key, Lifecycle::Terminating(how));
        assert!(!lifecycle.is_over(), "terminated twice");
        let why = match lifecycle {
            Lifecycle::Closing(why) | Lifecycle::Lingering(why) => why,
            _ => why,
        };
        self.wheel.unset(&mut self.slab, key.slot);
        self.tls.remove(key);
        let connection = &mut self.slab[key];
        connection.receiver = Receiver::default();
        connection.queue.clear(&mut self.nodes, |outgoing| {
            self.tally.recipient_done(&outgoing, Outcome::Ended);
        });
        self.counters.count_end(why);
        if connection.flags.has(Flags::OPENED) {
            self.reports.push(SESSION_MANAGER, ShardReport::Ended { connection: key, why });
        }
        if connection.in_flight.any(RequestSet::POLL_READABLE.or(RequestSet::POLL_WRITABLE)) {
            connection.in_flight.begin(RequestSet::CANCEL);
            self.kernel.cancel(key);
        }
        self.give_up_held(lifecycle);
        self.free_if_idle(key);
    }

    /// Closes the socket, if nothing is in flight.
    pub(super) fn free_if_idle(&mut self, key: ConnectionKey) {
        let connection = &mut self.slab[key];
        if let Lifecycle::Terminating(how) = connection.lifecycle
            && connection.in_flight.is_none()
        {
            connection.in_flight.begin(RequestSet::CLOSE);
            self.set_lifecycle(key, Lifecycle::Freeing);
            self.kernel.close(key, how);
        }
    }

    /// A request without other effects has completed.
    pub(super) fn request_completed(&mut self, key: ConnectionKey, of: RequestSet) {
        self.slab[key].in_flight.complete(of);
        self.free_if_idle(key);
    }

    /// The socket is closed: frees the slot.
    pub(super) fn free_slot(&mut self, key: ConnectionKey) {
        self.slab[key].in_flight.complete(RequestSet::CLOSE);
        let connection = self.slab.remove(key).expect("its last request has just completed");
        assert!(connection.in_flight.is_none() && connection.queue.is_empty());
        if let Some(permit) = connection.address {
            self.admitted -= 1;
            self.capacity.give_back();
            self.limiter.release(permit, self.kernel.now_ms());
        }
    }

    /// Closes a session for the service, or refuses one that is still undecided.
    pub(super) fn close_by_service(&mut self, key: ConnectionKey, close: &Close, why: EndReason) {
        match self.slab.get(key).map(|connection| &connection.lifecycle) {
            Some(lifecycle) if lifecycle.is_open() => self.close(key, close, why),
            Some(Lifecycle::Deciding(_)) => self.refuse_unavailable(key, why),
            _ => self.counters.counts.commands_stale.add(1),
        }
    }

    /// Closes all connections. The shard has stopped when all slots are free.
    pub(super) fn stop(&mut self, close: Close) {
        if self.stopping.is_none() {
            self.stop_accepting();
            self.stopping = Some(Stopping { close, cursor: 0 });
        }
    }

    /// Closes some more connections. Returns whether some are left.
    pub(super) fn close_some(&mut self) -> bool {
        let Some(Stopping { close, cursor }) = self.stopping.take() else { return false };
        let end = self.slab.slots_end();
        let to = end.min(cursor + CLOSES_PER_TURN_MAX);
        for slot in cursor..to {
            let Some(key) = self.slab.key_at(slot) else { continue };
            match self.slab.get(key).map(|connection| &connection.lifecycle) {
                Some(lifecycle) if lifecycle.is_open() => {
                    self.close(key, &close, EndReason::Draining)
                }
                Some(Lifecycle::Securing(_) | Lifecycle::Handshake(_) | Lifecycle::Deciding(_)) => {
                    self.refuse_unavailable(key, EndReason::Draining);
                }
                _ => {}
            }
        }
        self.stopping = Some(Stopping { close, cursor: to });
        to < end
    }

    fn refuse_unavailable(&mut self, key: ConnectionKey, why: EndReason) {
        let refused = Refused::unavailable("this node is going away", self.config.retry_after_s);
        self.answer(key, &refused, why);
        self.receive_on(key);
    }
}
