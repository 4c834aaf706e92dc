//! Consistency checks over the whole state of a shard. Only tests and the simulation run them, after
//! every step; they are far too slow for production.

use std::collections::HashSet;
use std::rc::Rc;

use super::clock::next_deadline;
use super::tally::Tally;
use super::{PENDING_REPORTS_MAX, Shard};
use crate::domain::ids::ConnectionKey;
use crate::domain::outgoing::Outgoing;
use crate::protocol::phase::Phase;
use crate::reactor::connection::{Connection, Flags, Lifecycle, LifecycleClass, RequestSet};
use crate::uring::Kernel;

/// Frames that a queue may hold beyond its limit: the 101, a close frame, a ping, and answers to
/// one receive.
const OWN_FRAMES_MAX: usize = 1024;

/// Reports to the session manager that one turn may add beyond [`PENDING_REPORTS_MAX`]: one per
/// completion of the turn.
const REPORTS_PER_TURN_MAX: usize = 1024;

#[derive(Debug, Default, PartialEq, Eq)]
struct Sums {
    frames: usize,
    deliveries: u64,
    receives: usize,
    accepts: u32,
    dirty: usize,
    waiting: usize,
    awaited: usize,
    admitted: u32,
    timers: usize,
    sessions: u64,
    handshakes: u64,
    echoes: u64,
    /// Each held event once.
    held: HashSet<*const Outgoing>,
}

impl<K: Kernel> Shard<K> {
    /// Checks every connection and every list.
    ///
    /// # Panics
    /// If two of them disagree, or a bound is exceeded.
    pub fn audit(&mut self) {
        let mut sums = Sums::default();
        for (key, connection) in self.slab.iter() {
            self.audit_connection(key, connection);
            self.add_up(connection, &mut sums);
        }
        let held = std::mem::take(&mut sums.held).len() as u64;
        assert_eq!(held, self.tally.held.events, "events held by any session");
        let counts = &self.counters.counts;
        let done = [
            &counts.deliveries_sent,
            &counts.deliveries_stale,
            &counts.deliveries_ended,
            &counts.deliveries_duplicate,
            &counts.deliveries_skipped,
        ];
        let done: u64 = done.iter().map(|counter| counter.get()).sum();
        let believed = Sums {
            frames: self.nodes.used(),
            deliveries: counts.deliveries.get() - done,
            receives: self.receives_in_flight,
            accepts: self.accepting.in_flight,
            dirty: self.dirty.iter().filter(|key| self.slab.get(**key).is_some()).count(),
            waiting: self.waiting.iter().filter(|key| self.slab.get(**key).is_some()).count(),
            awaited: self.awaited.iter().filter(|key| self.slab.get(**key).is_some()).count(),
            admitted: self.admitted,
            timers: self.wheel.set_timers(&mut self.slab),
            sessions: counts.sessions.get(),
            handshakes: counts.handshakes.get(),
            echoes: counts.echoes.get(),
            held: HashSet::new(),
        };
        assert_eq!(sums, believed, "sums over all connections against the totals of the shard");
        assert!(self.slab.used() <= self.config.slots_max() as usize);
        assert!(self.admitted <= self.config.connections_max + self.config.accepts_max);
        assert!(self.refused.len() < self.config.refusals_max as usize);
        assert!(self.receives_in_flight <= self.kernel.receive_buffers());
        let Tally { queued, held, .. } = &self.tally;
        assert!(queued.events + held.events <= sums.deliveries, "an event without recipients");
        assert!(!self.has_more_held_than(1, 1), "more is held than may be");
        let is_under_way =
            |lifecycle: &Lifecycle| matches!(lifecycle, Lifecycle::Securing(it) if it.is_under_way);
        let under_way = self.slab.iter().filter(|(_, it)| is_under_way(&it.lifecycle)).count();
        assert!(under_way <= self.handshakes_under_way(), "a handshake that nobody makes");
        let reports = self.reports.pending_for_manager();
        assert!(
            reports <= PENDING_REPORTS_MAX + REPORTS_PER_TURN_MAX + self.slab.used(),
            "{reports} reports"
        );
    }

    /// The kernel.
    pub fn kernel(&self) -> &K {
        &self.kernel
    }

    /// The kernel, so that a simulation can act as its clients.
    pub fn kernel_mut(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Connections that the limits have admitted.
    pub fn admitted(&self) -> u32 {
        self.admitted
    }

    /// Whether the next turn would begin to accept. Without a free slot it waits for the kernel to close refused
    /// connections.
    pub fn would_accept(&self) -> bool {
        let has_room = self.slab.has_room() && self.has_own_room();
        self.may_accept() && has_room && self.accepting.in_flight == 0
    }

    /// Accepts in flight.
    pub fn accepts(&self) -> u32 {
        self.accepting.in_flight
    }

    /// Connections and accepts in flight.
    pub fn slots_used(&self) -> usize {
        self.slab.used()
    }

    /// The requests in flight per connection, according to the shard.
    pub fn requests_in_flight(&self) -> impl Iterator<Item = (ConnectionKey, RequestSet)> + '_ {
        self.slab.iter().map(|(key, connection)| (key, connection.in_flight))
    }

    /// Whether the shard will receive from this connection, or no longer needs to.
    pub fn has_noticed_input(&self, key: ConnectionKey) -> bool {
        self.slab.get(key).is_none_or(|connection| {
            let flags = connection.flags;
            let known = flags.has(Flags::READABLE) || flags.has(Flags::FIN_RECEIVED);
            known || connection.lifecycle.is_over()
        })
    }

    /// Whether the rings wait for clients.
    pub fn waits_for_clients(&self) -> bool {
        let awaited = self.awaited.iter().filter_map(|key| self.slab.get(*key));
        self.holds_too_much() || awaited.into_iter().any(Connection::has_full_socket)
    }

    /// Whether it is sent its live events.
    pub fn is_live(&self, key: ConnectionKey) -> bool {
        self.slab.get(key).is_some_and(|connection| {
            matches!(connection.lifecycle, Lifecycle::Live | Lifecycle::Filtering(_))
        })
    }

    /// Whether it has been pinged since bytes were last received.
    pub fn is_pinged(&self, key: ConnectionKey) -> bool {
        self.slab.get(key).is_some_and(|connection| connection.flags.has(Flags::PINGED))
    }

    /// Staging buffers in use.
    pub fn staging_out(&self) -> usize {
        self.staging.out()
    }

    fn audit_connection(&self, key: ConnectionKey, connection: &Connection) {
        let Connection { lifecycle, phase, in_flight, flags, queue, timer, .. } = connection;
        let lawful = match lifecycle {
            Lifecycle::Accepting => *phase == Phase::Upgrading && *in_flight == RequestSet::ACCEPT,
            Lifecycle::Securing(_) | Lifecycle::Handshake(_) | Lifecycle::Deciding(_) => {
                *phase == Phase::Upgrading
            }
            Lifecycle::Holding(_)
            | Lifecycle::Filtering(_)
            | Lifecycle::Live
            | Lifecycle::Echo(_) => *phase == Phase::Open,
            Lifecycle::Closing(_) => matches!(phase, Phase::AwaitingPeer | Phase::Closed),
            Lifecycle::Lingering(_) => *phase == Phase::Closed && queue.is_empty(),
            Lifecycle::Terminating(_) => !in_flight.is_none() && queue.is_empty(),
            Lifecycle::Freeing => *in_flight == RequestSet::CLOSE && queue.is_empty(),
        };
        assert!(lawful, "{lifecycle:?} with {phase:?}, {in_flight:?}");
        assert!(
            !in_flight.any(RequestSet::SEND) || !in_flight.any(RequestSet::POLL_WRITABLE),
            "a send and a poll for room in flight"
        );
        assert!(
            (queue.is_empty() && self.tls.get(key).is_none_or(|tls| tls.sealing.is_flushed()))
                || flags.has(Flags::DIRTY)
                || in_flight.any(RequestSet::SEND.or(RequestSet::POLL_WRITABLE)),
            "queued frames without a send: {lifecycle:?}"
        );
        let own =
            if matches!(lifecycle, Lifecycle::Echo(_)) { usize::MAX / 2 } else { OWN_FRAMES_MAX };
        assert!(queue.frames() <= usize::from(self.config.queue_frames_max) + own);
        if let Some(deadline) =
            next_deadline(connection, self.tls.get(key), key, self.now, &self.config)
        {
            let due = self.wheel.due(timer).expect("a deadline without a timer");
            assert!(
                due <= deadline.max(self.wheel.now() + 1),
                "the timer comes after the deadline"
            );
        }
    }

    fn add_up(&self, connection: &Connection, sums: &mut Sums) {
        let Connection { lifecycle, in_flight, flags, queue, timer, address, .. } = connection;
        for queue in [Some(queue), lifecycle.holding()].into_iter().flatten() {
            sums.frames += queue.frames();
            sums.deliveries += queue.events(&self.nodes).count() as u64;
        }
        let held = lifecycle.holding().into_iter().flat_map(|held| held.events(&self.nodes));
        sums.held.extend(held.map(Rc::as_ptr));
        sums.receives += usize::from(in_flight.any(RequestSet::RECEIVE));
        sums.accepts += u32::from(in_flight.any(RequestSet::ACCEPT));
        sums.dirty += usize::from(flags.has(Flags::DIRTY));
        sums.waiting += usize::from(flags.has(Flags::WAITING));
        sums.awaited += usize::from(flags.has(Flags::AWAITED));
        sums.admitted += u32::from(address.is_some());
        sums.timers += usize::from(self.wheel.due(timer).is_some());
        match lifecycle.class() {
            LifecycleClass::Session => sums.sessions += 1,
            LifecycleClass::Handshake => sums.handshakes += 1,
            LifecycleClass::Echo => sums.echoes += 1,
            LifecycleClass::Other => {}
        }
    }
}
