//! Accepts connections and applies the limits.
//!
//! All shards accept from one socket. A shard without room leaves the clients to the others. Only when no shard has
//! room do shards accept beyond their own, to answer 503.

use std::net::IpAddr;

use rustix::io::Errno;

use super::Shard;
use crate::domain::close::EndReason;
use crate::domain::ids::ConnectionKey;
use crate::domain::limiter::{AddressPermit, LimitExceeded};
use crate::protocol::phase::Signal;
use crate::protocol::tls::Alert;
use crate::protocol::upgrade::{self, Refused};
use crate::reactor::connection::{Connection, Handshake, Lifecycle, RequestSet, Securing};
use crate::reactor::rate::InboundRate;
use crate::uring::{HowToClose, Kernel};

/// Pause after an accept failed for lack of a resource, ms. An immediate retry would spin.
const ACCEPT_RETRY_MS: u64 = 100;

/// The state of the listener.
#[derive(Debug)]
pub(super) struct AcceptState {
    open: bool,
    pub(super) in_flight: u32,
    /// No accepts before this time.
    retry_at_ms: Option<u64>,
}

impl Default for AcceptState {
    fn default() -> Self {
        Self { open: true, in_flight: 0, retry_at_ms: None }
    }
}

impl AcceptState {
    pub(super) fn retry_at_ms(&self) -> Option<u64> {
        self.retry_at_ms.filter(|_| self.open)
    }
}

impl<K: Kernel> Shard<K> {
    /// Keeps accepts in flight as long as there is room, or nobody has any.
    pub(super) fn arm_accepts(&mut self) {
        // A time in the past must not wake the shard.
        self.accepting.retry_at_ms.take_if(|at| *at <= self.kernel.now_ms());
        if !self.may_accept() {
            return;
        }
        while self.accepting.in_flight < self.config.accepts_max
            && (self.has_own_room() || self.capacity.free() == 0)
        {
            let Some(key) = self.slab.insert(Connection::accepting()) else { return };
            self.slab[key].in_flight.begin(RequestSet::ACCEPT);
            self.accepting.in_flight += 1;
            self.kernel.accept(key);
        }
    }

    /// Whether no reason but a lack of room keeps it from accepting.
    pub(super) fn may_accept(&self) -> bool {
        let pauses = self.accepting.retry_at_ms.is_some_and(|at| self.kernel.now_ms() < at);
        self.accepting.open && !pauses && !self.reports.is_backlogged()
    }

    /// An accept in flight has its place: a client that it brings is not refused for this shard's lack of room.
    pub(super) fn has_own_room(&self) -> bool {
        self.admitted + self.accepting.in_flight < self.config.connections_max
    }

    /// Only the latest refused clients keep their slots until they have read the answer, so that the others get one.
    fn cut_refusals(&mut self) {
        let kept = self.config.refusals_max - self.config.accepts_max;
        while self.refused.len() > kept as usize
            && let Some(key) = self.refused.pop_front()
        {
            if self.slab.get(key).is_some_and(|it| it.lifecycle.closes()) {
                self.counters.counts.refusals_cut.add(1);
                self.give_up_close(key);
            }
        }
    }

    /// Closes the listener; open connections stay.
    pub(super) fn stop_accepting(&mut self) {
        if std::mem::replace(&mut self.accepting.open, false) {
            self.kernel.stop_accepting();
        }
    }

    pub(super) fn accepted(&mut self, key: ConnectionKey, peer: IpAddr) {
        self.accepting.in_flight -= 1;
        self.counters.counts.accepted.add(1);
        let connection = &mut self.slab[key];
        connection.in_flight.complete(RequestSet::ACCEPT);
        connection.last_received = self.now.into();
        if self.stopping.is_some() {
            return self.terminate(key, EndReason::Draining, HowToClose::Orderly);
        }
        let refused = match self.check_limits(peer) {
            Ok(permit) => {
                let deadline = self.after(self.config.handshake_ms_max);
                let connection = &mut self.slab[key];
                connection.address = Some(permit);
                connection.deadline = deadline.into();
                let lifecycle = if self.handshaker.is_some() {
                    Lifecycle::Securing(Box::new(Securing::new(peer)))
                } else {
                    Lifecycle::Handshake(Box::new(Handshake::new(peer)))
                };
                self.set_lifecycle(key, lifecycle);
                None
            }
            Err(refused) => Some(refused),
        };
        if self.handshaker.is_some() {
            self.tls.insert(key);
        }
        self.slab[key].in_flight.begin(RequestSet::POLL_READABLE);
        self.kernel.poll_readable(key);
        match refused {
            None => self.schedule(key),
            Some(refused) => {
                self.answer(key, &refused, EndReason::Refused);
                self.refused.push_back(key);
                self.cut_refusals();
            }
        }
    }

    pub(super) fn accept_failed(&mut self, key: ConnectionKey, error: Errno) {
        self.accepting.in_flight -= 1;
        self.slab[key].in_flight.complete(RequestSet::ACCEPT);
        self.slab.remove(key);
        if error == Errno::CANCELED && !self.accepting.open {
            return;
        }
        self.counters.counts.accept_failures.add(1);
        // Errors that concern one client which is already gone: no pause.
        let clients_fault = [Errno::CONNABORTED, Errno::CONNRESET, Errno::PROTO, Errno::PERM];
        if !clients_fault.contains(&error) {
            self.accepting.retry_at_ms = Some(self.kernel.now_ms() + ACCEPT_RETRY_MS);
        }
    }

    /// Checks the limits. A shard admits a client beyond its room if it was to be refused when it was accepted, and
    /// another shard has got room since.
    fn check_limits(&mut self, peer: IpAddr) -> Result<AddressPermit, Refused> {
        let counts = &self.counters.counts;
        let retry_after_s = self.config.retry_after_s;
        let own_max = self.config.connections_max + self.config.accepts_max;
        if self.admitted >= own_max || !self.capacity.take() {
            counts.refused_full.add(1);
            return Err(Refused::unavailable("this node is full", retry_after_s));
        }
        let exceeded = match self.limiter.admit(peer, self.kernel.now_ms()) {
            Ok(permit) => {
                self.admitted += 1;
                return Ok(permit);
            }
            Err(exceeded) => exceeded,
        };
        self.capacity.give_back();
        match exceeded {
            LimitExceeded::TotalRate => {
                counts.refused_total_rate.add(1);
                Err(Refused::unavailable("too many clients connect at once", retry_after_s))
            }
            LimitExceeded::AddressRate => {
                counts.refused_address_rate.add(1);
                Err(Refused::too_many("too many handshakes from your address", retry_after_s))
            }
            LimitExceeded::AddressConnections => {
                counts.refused_address_count.add(1);
                Err(Refused::too_many("too many connections from your address", retry_after_s))
            }
        }
    }

    /// Answers a request, or an incomplete one, with an HTTP error and closes. Before the end of a TLS handshake an alert
    /// says only that it is not the client's fault.
    pub(super) fn answer(&mut self, key: ConnectionKey, refused: &Refused, why: EndReason) {
        if self.tls.get(key).is_some_and(|tls| !tls.sealing.is_established()) {
            return self.end_tls(key, Alert::INTERNAL_ERROR, why);
        }
        self.begin_close(key, why);
        let connection = &mut self.slab[key];
        connection.inbound = InboundRate::default();
        connection.phase = connection.phase.next(Signal::Aborted).expect("allowed in every phase");
        self.push_own(key, upgrade::response_refused(refused).into());
        self.schedule(key);
    }
}
