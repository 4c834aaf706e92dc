//! Whether everything the shard believes agrees with everything else. For the simulation, which
//! asks after every step; far too slow for a running shard.

use super::Shard;
use super::clock::next_deadline;
use crate::domain::ids::ConnectionKey;
use crate::protocol::phase::Phase;
use crate::reactor::connection::{Connection, Flags, Flight, Stage, StageClass};
use crate::uring::Kernel;

/// Frames beyond its limit that a queue may hold: the 101, a close frame, a heartbeat, and answers
/// to one receive.
const OWN_FRAMES_MAX: usize = 1024;

#[derive(Debug, Default, PartialEq, Eq)]
struct Sums {
    frames: usize,
    deliveries: u64,
    receives: usize,
    accepts: u32,
    dirty: usize,
    waiting: usize,
    admitted: u32,
    timers: usize,
    sessions: u64,
    handshakes: u64,
    echoes: u64,
}

impl<K: Kernel> Shard<K> {
    /// Looks at every connection and every list.
    ///
    /// # Panics
    /// If two of them disagree, or a bound is exceeded.
    pub fn audit(&mut self) {
        let mut sums = Sums::default();
        for (key, connection) in self.slab.iter() {
            self.audit_connection(key, connection);
            self.add_up(connection, &mut sums);
        }
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
            accepts: self.accepting.in_flight(),
            dirty: self.dirty.iter().filter(|key| self.slab.get(**key).is_some()).count(),
            waiting: self.waiting.iter().filter(|key| self.slab.get(**key).is_some()).count(),
            admitted: self.admitted,
            timers: self.wheel.set_timers(),
            sessions: counts.sessions.get(),
            handshakes: counts.handshakes.get(),
            echoes: counts.echoes.get(),
        };
        assert_eq!(sums, believed, "what the connections add up to, and what the shard believes");
        assert!(self.slab.used() <= self.config.slots_max() as usize);
        assert!(self.admitted <= self.config.connections_max);
        assert!(self.receives_in_flight <= self.kernel.receive_buffers());
        assert!(self.tally.held().0 <= sums.deliveries, "an event is held for nobody");
        self.reports.audit(self.slab.used());
    }

    /// What the shard believes to be in flight.
    pub fn flights(&self) -> impl Iterator<Item = (ConnectionKey, Flight)> + '_ {
        self.slab.iter().map(|(key, connection)| (key, connection.flight))
    }

    /// Whether it knows that there is something to receive of this connection, or will not care.
    pub fn will_receive(&self, key: ConnectionKey) -> bool {
        self.slab.get(key).is_none_or(|connection| {
            let flags = connection.flags;
            let known = flags.has(Flags::READABLE) || flags.has(Flags::PEER_ENDED);
            known || connection.stage.is_over()
        })
    }

    /// Whether it has been pinged since it was last heard.
    pub fn is_pinged(&self, key: ConnectionKey) -> bool {
        self.slab.get(key).is_some_and(|connection| connection.flags.has(Flags::PINGED))
    }

    /// Staging buffers that are out.
    pub fn staging_out(&self) -> usize {
        self.staging.out()
    }

    fn audit_connection(&self, key: ConnectionKey, connection: &Connection) {
        let Connection { stage, phase, flight, flags, queue, timer, .. } = connection;
        let lawful = match stage {
            Stage::Accepting => *phase == Phase::Upgrading && *flight == Flight::ACCEPT,
            Stage::Handshake(_) | Stage::Deciding(_) => *phase == Phase::Upgrading,
            Stage::Holding(_) | Stage::Filtering(_) | Stage::Live | Stage::Echo(_) => {
                *phase == Phase::Open
            }
            Stage::Ending(_) => matches!(phase, Phase::AwaitingPeer | Phase::Closed),
            Stage::Lingering(_) => *phase == Phase::Closed && queue.is_empty(),
            Stage::Terminating(_) => !flight.is_none() && queue.is_empty(),
            Stage::Closing => *flight == Flight::CLOSE && queue.is_empty(),
        };
        assert!(lawful, "{stage:?} with {phase:?}, {flight:?}");
        assert!(!flight.any(Flight::SEND) || !flight.any(Flight::ROOM), "two ways to send");
        assert!(
            queue.is_empty()
                || flags.has(Flags::DIRTY)
                || flight.any(Flight::SEND.or(Flight::ROOM)),
            "frames that nobody will send: {stage:?}"
        );
        let own = if matches!(stage, Stage::Echo(_)) { usize::MAX / 2 } else { OWN_FRAMES_MAX };
        assert!(queue.frames() <= usize::from(self.config.queue_frames_max) + own);
        if let Some(deadline) = next_deadline(connection, key, &self.config) {
            let due = timer.due().expect("a deadline without a timer");
            assert!(
                due <= deadline.max(self.wheel.now() + 1),
                "the timer comes after the deadline"
            );
        }
    }

    fn add_up(&self, connection: &Connection, sums: &mut Sums) {
        let Connection { stage, flight, flags, queue, timer, address, .. } = connection;
        for queue in [Some(queue), stage.held_queue()].into_iter().flatten() {
            sums.frames += queue.frames();
            sums.deliveries += queue.events(&self.nodes) as u64;
        }
        sums.receives += usize::from(flight.any(Flight::RECEIVE));
        sums.accepts += u32::from(flight.any(Flight::ACCEPT));
        sums.dirty += usize::from(flags.has(Flags::DIRTY));
        sums.waiting += usize::from(flags.has(Flags::WAITING));
        sums.admitted += u32::from(address.is_some());
        sums.timers += usize::from(timer.due().is_some());
        match stage.class() {
            StageClass::Session => sums.sessions += 1,
            StageClass::Handshake => sums.handshakes += 1,
            StageClass::Echo => sums.echoes += 1,
            StageClass::Other => {}
        }
    }
}
