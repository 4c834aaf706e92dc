//! Deadlines. Each connection has one timer, set to its earliest deadline or before. When it fires,
//! all deadlines are checked again, so a receive can move a deadline without touching the timer
//! wheel.

use super::{SESSION_MANAGER, Shard};
use crate::domain::close::{Close, CloseCode, EndReason};
use crate::domain::command::ShardReport;
use crate::domain::ids::ConnectionKey;
use crate::protocol::upgrade::Refused;
use crate::reactor::config::ShardConfig;
use crate::reactor::connection::{Connection, Filter, Flags, Lifecycle, RequestSet};
use crate::reactor::tls::TlsSession;
use crate::reactor::wheel::{TICK_MS, Tick};
use crate::uring::{HowToClose, Kernel};
use std::rc::Rc;

/// Timers handled in one turn.
const TIMERS_PER_TURN_MAX: usize = 1024;
const CATCH_UP_TOO_LONG: Close =
    Close::new(CloseCode::TRY_AGAIN_LATER, "catch-up took too long: reconnect and resume");

impl<K: Kernel> Shard<K> {
    /// Handles due timers. Returns whether some are left for the next turn.
    pub(super) fn run_timers(&mut self) -> bool {
        let mut fired = std::mem::take(&mut self.fired);
        let reached = self.wheel.advance(&mut self.slab, self.now, TIMERS_PER_TURN_MAX, &mut fired);
        for slot in fired.drain(..) {
            // An earlier timer of this turn may have freed the slot.
            if let Some(key) = self.slab.key_at(slot) {
                self.check_deadlines(key);
                self.schedule(key);
            }
        }
        self.fired = fired;
        !reached
    }

    /// Sets the timer so that it fires no later than the earliest deadline.
    pub(super) fn schedule(&mut self, key: ConnectionKey) {
        let Some(connection) = self.slab.get_mut(key) else { return };
        let tls = self.tls.get(key);
        let deadline = next_deadline(connection, tls, key, self.now, &self.config);
        let Some(deadline) = deadline else { return };
        if self.wheel.due(&connection.timer).is_none_or(|due| due > deadline) {
            self.wheel.set(&mut self.slab, key.slot, deadline);
        }
    }

    fn check_deadlines(&mut self, key: ConnectionKey) {
        let now = self.now;
        let config = &self.config;
        let Some(connection) = self.slab.get_mut(key) else { return };
        let overdue = now >= connection.deadline.near(now);
        match &connection.lifecycle {
            Lifecycle::Accepting | Lifecycle::Terminating(_) | Lifecycle::Freeing => {}
            Lifecycle::Securing(_) if overdue => {
                self.counters.counts.handshake_timeouts.add(1);
                self.terminate(key, EndReason::HandshakeTimeout, HowToClose::Orderly);
            }
            Lifecycle::Handshake(_) if overdue => {
                self.counters.counts.handshake_timeouts.add(1);
                self.answer(key, &Refused::timeout(), EndReason::HandshakeTimeout);
            }
            Lifecycle::Deciding(_) if overdue => {
                self.counters.counts.admission_timeouts.add(1);
                let refused = Refused::unavailable("try again", config.retry_after_s);
                self.answer(key, &refused, EndReason::HandshakeTimeout);
                self.receive_on(key);
            }
            Lifecycle::Closing(_) | Lifecycle::Lingering(_) if overdue => self.give_up_close(key),
            Lifecycle::Securing(_)
            | Lifecycle::Handshake(_)
            | Lifecycle::Deciding(_)
            | Lifecycle::Closing(_)
            | Lifecycle::Lingering(_) => {}
            Lifecycle::Holding(_)
            | Lifecycle::Filtering(_)
            | Lifecycle::Live
            | Lifecycle::Echo(_) => {
                // If the socket has room again, the next send decides.
                let stalled = connection.flags.has(Flags::STALLED);
                if stalled && overdue && connection.in_flight.any(RequestSet::POLL_WRITABLE) {
                    self.terminate(key, EndReason::WriteTimeout, HowToClose::Abort);
                } else if !self.check_silence(key) && !self.check_message(key) {
                    self.check_catch_up(key);
                }
            }
        }
    }

    /// Pings a silent client, and terminates it if it stays silent (contract §3). After the ping a
    /// client always has the full time to answer. So a process that was suspended for a minute does
    /// not disconnect everybody. Returns whether the connection was terminated.
    fn check_silence(&mut self, key: ConnectionKey) -> bool {
        let now = self.now;
        let ping_due = ping_due(&self.config, key);
        let idle = ticks(self.config.idle_ms_max);
        let connection = &mut self.slab[key];
        let pinged = connection.flags.has(Flags::PINGED);
        if now < connection.last_received.near(now) + if pinged { idle } else { ping_due } {
            return false;
        }
        if connection.flags.has(Flags::READABLE) || connection.in_flight.any(RequestSet::RECEIVE) {
            // The client has sent something that has not been received yet.
            connection.last_received = now.into();
            connection.flags.clear(Flags::PINGED);
            return false;
        }
        if pinged {
            self.terminate(key, EndReason::PeerSilent, HowToClose::Abort);
            return true;
        }
        connection.flags.set(Flags::PINGED);
        connection.last_received = (now - ping_due).into();
        // The ping goes behind all queued frames, so that busy and idle clients are treated the
        // same.
        self.counters.counts.pings_sent.add(1);
        self.push(key, Rc::clone(&self.ping));
        false
    }

    fn check_catch_up(&mut self, key: ConnectionKey) {
        let now = self.now;
        let connection = &self.slab[key];
        match &connection.lifecycle {
            Lifecycle::Holding(holding)
                if holding.delivered_by_catch_up.is_none() && now >= holding.deadline =>
            {
                if connection.flags.has(Flags::FIRST_MESSAGE) {
                    return self.close(key, &CATCH_UP_TOO_LONG, EndReason::ServerFault);
                }
                self.counters.counts.grace_expired.add(1);
                self.reports.push(SESSION_MANAGER, ShardReport::GraceExpired { connection: key });
                self.go_live_with(key, Filter::new(Box::default(), now));
            }
            Lifecycle::Filtering(filter) if now >= filter.until => {
                self.set_lifecycle(key, Lifecycle::Live);
            }
            _ => {}
        }
    }
}

pub(super) fn ticks(ms: u64) -> Tick {
    ms.div_ceil(TICK_MS)
}

/// Silence before a ping: the setting minus a part of the spread that depends on the connection.
fn ping_due(config: &ShardConfig, key: ConnectionKey) -> Tick {
    let spread = ticks(config.ping_spread_ms) + 1;
    // Fibonacci hashing: neighbours in the slab get distant values.
    let scattered = key.slot.wrapping_add(key.generation).wrapping_mul(0x9E37_79B9);
    let earlier = (u64::from(scattered) * spread) >> 32;
    ticks(config.ping_after_ms) - earlier
}

/// The earliest deadline; `None`: the connection waits only for the kernel.
pub(super) fn next_deadline(
    connection: &Connection,
    tls: Option<&TlsSession>,
    key: ConnectionKey,
    now: Tick,
    config: &ShardConfig,
) -> Option<Tick> {
    let deadline = connection.deadline.near(now);
    let lifecycle_deadline = match &connection.lifecycle {
        Lifecycle::Accepting | Lifecycle::Terminating(_) | Lifecycle::Freeing => return None,
        Lifecycle::Securing(_)
        | Lifecycle::Handshake(_)
        | Lifecycle::Deciding(_)
        | Lifecycle::Closing(_)
        | Lifecycle::Lingering(_) => {
            return Some(deadline);
        }
        Lifecycle::Holding(holding) => {
            holding.delivered_by_catch_up.is_none().then_some(holding.deadline)
        }
        Lifecycle::Filtering(filter) => Some(filter.until),
        Lifecycle::Live | Lifecycle::Echo(_) => None,
    };
    let silence = match connection.flags.has(Flags::PINGED) {
        true => ticks(config.idle_ms_max),
        false => ping_due(config, key),
    } + connection.last_received.near(now);
    let stall = connection.flags.has(Flags::STALLED).then_some(deadline);
    let message = message_deadline(connection, tls, config.message_ms_max);
    [Some(silence), lifecycle_deadline, stall, message].into_iter().flatten().min()
}

/// When the message or the record must be complete within which the received bytes end.
pub(super) fn message_deadline(
    connection: &Connection,
    tls: Option<&TlsSession>,
    message_ms_max: u64,
) -> Option<Tick> {
    let record = tls.and_then(TlsSession::incomplete_since);
    let since = [connection.receiver.incomplete_since(), record].into_iter().flatten().min()?;
    Some(since + ticks(message_ms_max))
}
