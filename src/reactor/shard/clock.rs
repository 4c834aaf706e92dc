//! Deadlines. A connection has one timer, set to the earliest of them or before: when it fires, the
//! deadlines are looked at again, so that receiving something moves a deadline without touching the
//! wheel.

use super::{SESSION_MANAGER, Shard};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardReport;
use crate::domain::ids::ConnectionKey;
use crate::protocol::upgrade::Refused;
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::{Connection, Filter, Flags, Flight, Stage};
use crate::reactor::wheel::{TICK_MS, Tick};
use crate::uring::{HowToClose, Kernel};
use std::rc::Rc;

/// Timers handled in one turn.
const TIMERS_PER_TURN_MAX: usize = 1024;
const CATCH_UP_TOO_LONG: Close =
    Close::new(CloseCode::TRY_AGAIN_LATER, "catch-up took too long: reconnect and resume");

impl<K: Kernel> Shard<K> {
    /// Handles what is due. Returns whether some is left for the next turn.
    pub(super) fn run_timers(&mut self) -> bool {
        let mut fired = std::mem::take(&mut self.fired);
        let reached = self.wheel.advance(&mut self.slab, self.now, TIMERS_PER_TURN_MAX, &mut fired);
        for slot in fired.drain(..) {
            // One that was handled before it may have ended this one.
            if let Some(key) = self.slab.key_at(slot) {
                self.look_at_deadlines(key);
                self.schedule(key);
            }
        }
        self.fired = fired;
        !reached
    }

    /// Sees to it that the timer fires no later than the earliest deadline.
    pub(super) fn schedule(&mut self, key: ConnectionKey) {
        let Some(connection) = self.slab.get_mut(key) else { return };
        let Some(deadline) = next_deadline(connection, key, &self.config) else { return };
        if connection.timer.due().is_none_or(|due| due > deadline) {
            self.wheel.set(&mut self.slab, key.slot, deadline);
        }
    }

    fn look_at_deadlines(&mut self, key: ConnectionKey) {
        let now = self.now;
        let config = &self.config;
        let Some(connection) = self.slab.get_mut(key) else { return };
        let overdue = now >= connection.limit;
        match &connection.stage {
            Stage::Accepting | Stage::Terminating(_) | Stage::Closing => {}
            Stage::Handshake(_) if overdue => {
                self.counters.counts.handshake_timeouts.add(1);
                self.answer(key, &Refused::timeout(), EndReason::HandshakeTimeout);
            }
            Stage::Deciding(_) if overdue => {
                self.counters.counts.admission_timeouts.add(1);
                let refused = Refused::unavailable("try again", config.retry_after_s);
                self.answer(key, &refused, EndReason::HandshakeTimeout);
                self.receive_on(key);
            }
            // What it has not taken by now it will not take.
            &Stage::Ending(why) if overdue => self.terminate(key, why, HowToClose::Abort),
            &Stage::Lingering(why) if overdue => self.terminate(key, why, HowToClose::Orderly),
            Stage::Handshake(_) | Stage::Deciding(_) | Stage::Ending(_) | Stage::Lingering(_) => {}
            Stage::Holding(_) | Stage::Filtering(_) | Stage::Live | Stage::Echo(_) => {
                // If the socket has room again, its next send decides.
                let stalled = connection.flags.has(Flags::STALLED);
                if stalled && overdue && connection.flight.any(Flight::ROOM) {
                    self.terminate(key, EndReason::WriteTimeout, HowToClose::Abort);
                } else if !self.is_silent(key) {
                    self.look_at_catch_up(key);
                }
            }
        }
    }

    /// Contract §3: a silent client is pinged, then dropped. From the ping it has the whole time
    /// between the two, however late the ping is: a process that was stopped for a minute does not
    /// drop everybody. Returns whether it is gone.
    fn is_silent(&mut self, key: ConnectionKey) -> bool {
        let now = self.now;
        let ping_due = ping_due(&self.config, key);
        let idle = ticks(self.config.idle_ms_max);
        let connection = self.slab.get_mut(key).expect("still here");
        let pinged = connection.flags.has(Flags::PINGED);
        if now < connection.heard + if pinged { idle } else { ping_due } {
            return false;
        }
        if connection.flags.has(Flags::READABLE) || connection.flight.any(Flight::RECEIVE) {
            // It has spoken; we have not listened yet.
            connection.heard = now;
            connection.flags.clear(Flags::PINGED);
            return false;
        }
        if pinged {
            self.terminate(key, EndReason::PeerSilent, HowToClose::Abort);
            return true;
        }
        connection.flags.set(Flags::PINGED);
        connection.heard = now - ping_due;
        // Behind whatever waits: a client that is sent much answers as one that is sent little.
        self.counters.counts.pings_sent.add(1);
        self.push(key, Rc::clone(&self.ping));
        false
    }

    fn look_at_catch_up(&mut self, key: ConnectionKey) {
        let now = self.now;
        let connection = self.slab.get_mut(key).expect("still here");
        match &connection.stage {
            Stage::Holding(holding) if holding.released.is_none() && now >= holding.deadline => {
                if connection.flags.has(Flags::SPOKE) {
                    return self.close(key, &CATCH_UP_TOO_LONG, EndReason::ServerFault);
                }
                self.counters.counts.grace_expired.add(1);
                self.reports.push(SESSION_MANAGER, ShardReport::GraceExpired { connection: key });
                self.release_with(key, Filter::new(Box::default(), now));
            }
            Stage::Filtering(filter) if now >= filter.until => {
                self.change_stage(key, Stage::Live);
            }
            _ => {}
        }
    }
}

/// Settings are validated to be far below the wheel's range.
fn ticks(ms: u64) -> Tick {
    ms.div_ceil(TICK_MS) as Tick
}

/// Silence before a ping: the setting, less a part of the spread that depends on the connection.
fn ping_due(config: &ShardConfig, key: ConnectionKey) -> Tick {
    let spread = ticks(config.ping_spread_ms) + 1;
    // Fibonacci hashing: neighbours in the slab lie far apart.
    let scattered = key.slot.wrapping_add(key.generation).wrapping_mul(0x9E37_79B9);
    let earlier = (u64::from(scattered) * u64::from(spread)) >> 32;
    ticks(config.ping_after_ms) - earlier as Tick
}

/// The earliest deadline, by the stage; `None`: it waits for the kernel only.
pub(super) fn next_deadline(
    connection: &Connection,
    key: ConnectionKey,
    config: &ShardConfig,
) -> Option<Tick> {
    let stage_deadline = match &connection.stage {
        Stage::Accepting | Stage::Terminating(_) | Stage::Closing => return None,
        Stage::Handshake(_) | Stage::Deciding(_) | Stage::Ending(_) | Stage::Lingering(_) => {
            return Some(connection.limit);
        }
        Stage::Holding(holding) => holding.released.is_none().then_some(holding.deadline),
        Stage::Filtering(filter) => Some(filter.until),
        Stage::Live | Stage::Echo(_) => None,
    };
    let silence = match connection.flags.has(Flags::PINGED) {
        true => connection.heard + ticks(config.idle_ms_max),
        false => connection.heard + ping_due(config, key),
    };
    let stall = connection.flags.has(Flags::STALLED).then_some(connection.limit);
    [Some(silence), stage_deadline, stall].into_iter().flatten().min()
}
