//! Every way out. Last words first (`Ending`), then our end of stream (`Lingering`), or neither;
//! then in named steps: terminate (begin nothing more), join (what is in flight), close.

use super::tally::Outcome;
use super::{SESSION_MANAGER, Shard, Stopping};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardReport;
use crate::domain::ids::ConnectionKey;
use crate::protocol::frame;
use crate::protocol::phase::{Phase, Signal};
use crate::protocol::receiver::Receiver;
use crate::protocol::upgrade::Refused;
use crate::reactor::connection::{Flags, Flight, Stage};
use crate::uring::{HowToClose, Kernel};

/// Contract §3.
const QUEUE_OVERFLOW: Close = Close::new(CloseCode::INTERNAL_ERROR, "backpressure overflow");
/// Connections told to go in one turn.
const SWEEP_PER_TURN_MAX: u32 = 256;

impl<K: Kernel> Shard<K> {
    /// Sends what is queued, then a close frame; then the client's close frame is awaited
    /// (RFC 6455 §7.1.2).
    pub(super) fn close(&mut self, key: ConnectionKey, close: &Close, why: EndReason) {
        self.end(key, why);
        let connection = self.connection(key).expect("still here");
        connection.phase = connection.phase.next(Signal::CloseSent).expect("was open");
        self.push_own(key, frame::encode_close(close));
        self.schedule(key);
    }

    /// The same, but the client broke a rule: nothing more of it is read (RFC 6455 §7.1.7).
    pub(super) fn fail(&mut self, key: ConnectionKey, close: &Close) {
        let connection = self.connection(key).expect("still here");
        let open = connection.stage.is_open();
        if open {
            self.close(key, close, EndReason::PeerAtFault);
        }
        let connection = self.connection(key).expect("still here");
        connection.receiver = Receiver::default();
        connection.phase = connection.phase.next(Signal::Aborted).expect("lawful from anywhere");
        self.settle(key);
    }

    /// The queue is full: the client does not read (contract §3). What has been begun is
    /// completed, the rest gives way to the close frame.
    pub(super) fn overflow(&mut self, key: ConnectionKey) {
        self.counters.counts.queue_overflows.add(1);
        self.end(key, EndReason::QueueOverflow);
        let connection = self.connection(key).expect("still here");
        connection.phase = connection.phase.next(Signal::CloseSent).expect("was open");
        connection.flags.set(Flags::CUT);
        self.cut_if_due(key);
        self.schedule(key);
    }

    /// Carries an overflow out, as soon as no send is reading the queue.
    pub(super) fn cut_if_due(&mut self, key: ConnectionKey) {
        let connection = self.slab.get_mut(key).expect("still here");
        if connection.flight.any(Flight::SEND) || !connection.flags.clear(Flags::CUT) {
            return;
        }
        connection.queue.cut(&mut self.nodes, |outgoing| {
            self.tally.finish(&outgoing, Outcome::Ended);
        });
        self.push_own(key, frame::encode_close(&QUEUE_OVERFLOW));
    }

    /// The client's close frame: answered, unless it is the answer (RFC 6455 §5.5.1).
    pub(super) fn peer_closed(&mut self, key: ConnectionKey, code: Option<CloseCode>) {
        let connection = self.connection(key).expect("still here");
        let phase = connection.phase.next(Signal::CloseReceived).expect("frames were read");
        connection.phase = phase;
        match phase {
            Phase::OwingEcho => {
                self.end(key, EndReason::ClosedByPeer);
                let connection = self.connection(key).expect("still here");
                connection.phase = connection.phase.next(Signal::CloseSent).expect("owed");
                self.push_own(key, frame::encode_close_reply(code));
                self.schedule(key);
            }
            Phase::Closed => self.settle(key),
            Phase::Upgrading | Phase::Open | Phase::AwaitingPeer => unreachable!("see the table"),
        }
    }

    /// The client has ended its half of the stream: of an open connection that is the end, but last
    /// words are still said.
    pub(super) fn peer_ended(&mut self, key: ConnectionKey) {
        let connection = self.connection(key).expect("still here");
        connection.flags.set(Flags::PEER_ENDED);
        match connection.stage {
            Stage::Ending(_) => {
                connection.phase =
                    connection.phase.next(Signal::Aborted).expect("lawful from anywhere");
                self.settle(key);
            }
            _ => self.terminate(key, EndReason::PeerGone, HowToClose::Orderly),
        }
    }

    /// An open connection begins to end: what it held back and the rest of its receiver go.
    fn end(&mut self, key: ConnectionKey, why: EndReason) {
        let limit = self.after(self.config.close_ms_max);
        let stage = self.change_stage(key, Stage::Ending(why));
        assert!(stage.is_open(), "only an open connection has a closing handshake");
        self.give_up_held(stage);
        self.connection(key).expect("still here").limit = limit;
    }

    /// What a stage held back will not be sent.
    pub(super) fn give_up_held(&mut self, mut stage: Stage) {
        if let Some((held, _)) = stage.held() {
            held.clear(&mut self.nodes, |outgoing| self.tally.finish(&outgoing, Outcome::Ended));
        }
    }

    /// If all last words are said and no answer is awaited: our end of stream.
    pub(super) fn settle(&mut self, key: ConnectionKey) {
        let limit = self.after(self.config.linger_ms_max);
        let connection = self.connection(key).expect("still here");
        let Stage::Ending(why) = connection.stage else { return };
        if connection.phase != Phase::Closed
            || !connection.queue.is_empty()
            || connection.flags.has(Flags::CUT)
            || connection.flight.any(Flight::SEND)
        {
            return;
        }
        if connection.flags.has(Flags::PEER_ENDED) {
            return self.terminate(key, why, HowToClose::Orderly);
        }
        connection.limit = limit;
        connection.flight.begin(Flight::SHUTDOWN);
        self.change_stage(key, Stage::Lingering(why));
        self.kernel.shutdown(key);
        self.schedule(key);
    }

    /// Begins nothing more on this connection. Its deliveries are given up, its end is reported
    /// under the reason with which it began to end.
    pub(super) fn terminate(&mut self, key: ConnectionKey, why: EndReason, how: HowToClose) {
        let stage = self.change_stage(key, Stage::Terminating(how));
        assert!(!stage.is_over(), "ended twice");
        let why = match stage {
            Stage::Ending(why) | Stage::Lingering(why) => why,
            _ => why,
        };
        self.wheel.unset(&mut self.slab, key.slot);
        let connection = self.slab.get_mut(key).expect("still here");
        connection.receiver = Receiver::default();
        connection.queue.clear(&mut self.nodes, |outgoing| {
            self.tally.finish(&outgoing, Outcome::Ended);
        });
        self.counters.count_end(why);
        if connection.flags.has(Flags::OPENED) {
            self.reports.push(SESSION_MANAGER, ShardReport::Ended { connection: key, why });
        }
        if connection.flight.any(Flight::POLL.or(Flight::ROOM)) {
            connection.flight.begin(Flight::CANCEL);
            self.kernel.cancel(key);
        }
        self.give_up_held(stage);
        self.join(key);
    }

    /// Once nothing is in flight: close.
    pub(super) fn join(&mut self, key: ConnectionKey) {
        let connection = self.connection(key).expect("still here");
        if let Stage::Terminating(how) = connection.stage
            && connection.flight.is_none()
        {
            connection.flight.begin(Flight::CLOSE);
            self.change_stage(key, Stage::Closing);
            self.kernel.close(key, how);
        }
    }

    /// A request that changes nothing but being in flight has completed.
    pub(super) fn joined(&mut self, key: ConnectionKey, of: Flight) {
        self.completed(key, of);
        self.join(key);
    }

    /// The socket is closed: the slot is free.
    pub(super) fn closed(&mut self, key: ConnectionKey) {
        self.completed(key, Flight::CLOSE);
        let connection = self.slab.remove(key).expect("still here");
        assert!(connection.flight.is_none() && connection.queue.is_empty());
        if let Some(ticket) = connection.address {
            self.admitted -= 1;
            self.gate.leave(ticket, self.kernel.unix_ms());
        }
    }

    /// The service closes a session, or one that it has not decided on yet.
    pub(super) fn close_by_service(&mut self, key: ConnectionKey, close: &Close, why: EndReason) {
        match self.connection(key).map(|connection| &connection.stage) {
            Some(stage) if stage.is_open() => self.close(key, close, why),
            Some(Stage::Deciding(_)) => self.turn_away(key, why),
            _ => self.counters.counts.commands_stale.add(1),
        }
    }

    /// Closes everything; the shard has stopped when all slots are free.
    pub(super) fn stop(&mut self, close: Close) {
        if self.stopping.is_none() {
            self.stop_accepting();
            self.stopping = Some(Stopping { close, cursor: 0 });
        }
    }

    /// Tells some more connections to go. Returns whether some have not been told.
    pub(super) fn sweep(&mut self) -> bool {
        let Some(Stopping { close, cursor }) = self.stopping.take() else { return false };
        let end = self.slab.slots_end();
        let to = end.min(cursor + SWEEP_PER_TURN_MAX);
        for slot in cursor..to {
            let Some(key) = self.slab.key_at(slot) else { continue };
            match self.connection(key).map(|connection| &connection.stage) {
                Some(stage) if stage.is_open() => self.close(key, &close, EndReason::Draining),
                Some(Stage::Handshake(_) | Stage::Deciding(_)) => {
                    self.turn_away(key, EndReason::Draining);
                }
                _ => {}
            }
        }
        self.stopping = Some(Stopping { close, cursor: to });
        to < end
    }

    fn turn_away(&mut self, key: ConnectionKey, why: EndReason) {
        let refused = Refused::unavailable("this node is going away", self.config.retry_after_s);
        self.answer(key, &refused, why);
        self.receive_on(key);
    }
}
