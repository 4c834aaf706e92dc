//! Settings of a shard, with production defaults.

use crate::domain::limits::{
    ACCEPTS_IN_FLIGHT_MAX, CONNECTIONS_PER_SHARD_MAX, RECEIVE_BUFFER_BYTES, SEND_BATCH_BYTES,
};
use crate::protocol::tls::handshake::JOBS_MAX;
use crate::protocol::upgrade::UpgradeRules;
use crate::reactor::wheel::TICK_MS;

/// Longest time of a setting that a slot's ticks and rates depend on, ms: 12 hours. Ticks are compared within 397 days
/// ([`ShortTick`](crate::reactor::wheel::ShortTick)), seconds of rates within 18 hours.
pub const SETTING_MS_MAX: u64 = 12 * 60 * 60 * 1_000;

/// Settings of one shard, the same for all shards. `app` derives them from the program's settings.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// Connections of this shard, including unfinished handshakes. Further clients are left to the other shards; if
    /// these have no room either, they get a 503.
    pub connections_max: u32,
    /// Slots beyond [`ShardConfig::connections_max`] for answering 503 and 429, more than `accepts_max`. When more than
    /// the difference are in use, the oldest of these connections is closed.
    pub refusals_max: u32,
    /// Accepts in flight at a time.
    pub accepts_max: u32,
    /// Completions handled in one turn. The others wait for the next one, which takes events and runs timers before.
    pub completions_max: u16,
    /// TLS handshakes under way at the thread that makes them, at most
    /// [`JOBS_MAX`]. The others wait.
    pub handshakes_max: u16,
    /// Receive buffers of [`RECEIVE_BUFFER_BYTES`] shared by all connections: a power of two.
    pub receive_buffers: u16,
    /// `Retry-After` of a 429 or 503, seconds.
    pub retry_after_s: u32,

    /// Time from the accept to the complete upgrade request (then 408), and from there to the
    /// service's decision (then 503), ms each.
    pub handshake_ms_max: u64,
    /// Time from the 101 to the client's first message (the resume request), ms. Then the session
    /// goes live without it.
    pub resume_grace_ms: u64,
    /// Time from the first message to [`GoLive`](crate::domain::command::ShardCommand::GoLive), ms.
    /// Then the session is closed with 1013.
    pub catch_up_ms_max: u64,
    /// How long the messages delivered by catch-up are remembered after the session goes live, ms.
    pub dedupe_ms: u64,
    /// How often a session that asked for cursors gets one while something is routed, ms.
    pub cursor_interval_ms: u64,
    /// Silence after which a client is pinged, ms (contract §3: 54 s).
    pub ping_after_ms: u64,
    /// Pings are sent up to this much earlier, ms. The amount differs per connection, so that
    /// clients that connected together are not pinged together.
    pub ping_spread_ms: u64,
    /// Silence after which a client is disconnected, ms (contract §3: 60 s).
    pub idle_ms_max: u64,
    /// Time from the first byte of a client's message to its last, ms. Then it is closed with 1008.
    pub message_ms_max: u64,
    /// A connection is terminated when a send makes no progress for this time, ms.
    pub write_ms_max: u64,
    /// Time after our close frame for the queue to be sent and for the client's close frame to
    /// arrive, ms.
    pub close_ms_max: u64,
    /// Time from our FIN to the client's, ms. Bytes that arrive in this time are discarded: closing
    /// the socket with unread bytes would reset the connection and destroy the last frames.
    pub linger_ms_max: u64,

    /// Frames queued for one connection. On overflow it is closed with 1011 (contract §3).
    pub queue_frames_max: u16,
    /// Bytes queued for one connection, with the same effect. A frame may exceed it if less than three quarters are in
    /// use.
    pub queue_bytes_max: u32,
    /// Live events held while a session catches up. On overflow it is closed with 1013.
    pub hold_frames_max: u16,
    /// Bytes of the held events, with the same effect.
    pub hold_bytes_max: u32,
    /// Live events in this shard. One in [`HELD_SHARE`](crate::domain::limits::HELD_SHARE) may be held for sessions
    /// that catch up. At the rest the shard takes no more from the routers' rings, so that their partitions pause.
    pub events_max: u32,
    /// What those events cost, bytes ([`Event::cost`](crate::domain::event::Event::cost)), divided in the same way.
    pub event_bytes_max: u64,

    /// Client messages and control frames per second; above it: 1008.
    pub inbound_frames_per_s_max: u16,
    /// Client bytes per second; above it: 1008.
    pub inbound_bytes_per_s_max: u32,
    /// Longest client message, bytes; above it: 1009.
    pub message_bytes_max: u32,
    /// Rules for upgrade requests: routes, origins, compression, sizes.
    pub upgrade: UpgradeRules,
    /// Longest message to `/echo`, bytes; its rates are not limited.
    pub echo_message_bytes_max: u32,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            connections_max: 65_536,
            refusals_max: 256,
            accepts_max: 32,
            completions_max: 1_024,
            handshakes_max: JOBS_MAX as u16,
            receive_buffers: 256,
            retry_after_s: 5,
            handshake_ms_max: 10_000,
            resume_grace_ms: 10_000,
            catch_up_ms_max: 300_000,
            dedupe_ms: 300_000,
            cursor_interval_ms: 15_000,
            ping_after_ms: 54_000,
            ping_spread_ms: 6_000,
            idle_ms_max: 60_000,
            message_ms_max: 60_000,
            write_ms_max: 10_000,
            close_ms_max: 5_000,
            linger_ms_max: 1_000,
            queue_frames_max: 128,
            queue_bytes_max: 1024 * 1024,
            hold_frames_max: 1_024,
            hold_bytes_max: 1024 * 1024,
            events_max: 262_144,
            event_bytes_max: 256 * 1024 * 1024,
            inbound_frames_per_s_max: 100,
            inbound_bytes_per_s_max: 256 * 1024,
            message_bytes_max: 64 * 1024,
            upgrade: UpgradeRules::default(),
            echo_message_bytes_max: 16 * 1024 * 1024,
        }
    }
}

impl ShardConfig {
    /// Maximum number of slots: connections, refusals, accepts in flight.
    pub fn slots_max(&self) -> u32 {
        self.connections_max + self.refusals_max + self.accepts_max
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// The first violated rule: the name of the field, and the rule.
    pub fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        let rules = [
            (self.connections_max > 0, "connections_max", "at least 1"),
            (
                self.slots_max() <= CONNECTIONS_PER_SHARD_MAX,
                "connections_max",
                "with refusals_max and accepts_max at most 1048576",
            ),
            (self.refusals_max > self.accepts_max, "refusals_max", "more than accepts_max"),
            (
                (1..=ACCEPTS_IN_FLIGHT_MAX).contains(&(self.accepts_max as usize)),
                "accepts_max",
                "1 to 64",
            ),
            (self.completions_max > 0, "completions_max", "at least 1"),
            (self.receive_buffers.is_power_of_two(), "receive_buffers", "a power of two"),
            (self.handshake_ms_max > TICK_MS, "handshake_ms_max", "more than 16"),
            (self.ping_after_ms > self.ping_spread_ms, "ping_spread_ms", "less than ping_after_ms"),
            (self.cursor_interval_ms > 0, "cursor_interval_ms", "at least 1"),
            (self.idle_ms_max > self.ping_after_ms, "idle_ms_max", "more than ping_after_ms"),
            (self.message_ms_max > TICK_MS, "message_ms_max", "more than 16"),
            (self.write_ms_max > TICK_MS, "write_ms_max", "more than 16"),
            (self.close_ms_max > TICK_MS, "close_ms_max", "more than 16"),
            (self.linger_ms_max > TICK_MS, "linger_ms_max", "more than 16"),
            (self.queue_frames_max > 1, "queue_frames_max", "at least 2"),
            (self.queue_frames_max < u16::MAX / 2, "queue_frames_max", "less than 32767"),
            (self.hold_frames_max > 0, "hold_frames_max", "at least 1"),
            (self.hold_frames_max < u16::MAX / 2, "hold_frames_max", "less than 32767"),
            (
                self.queue_bytes_max as usize >= SEND_BATCH_BYTES,
                "queue_bytes_max",
                "at least 16384",
            ),
            (self.queue_bytes_max <= 1 << 30, "queue_bytes_max", "at most 1073741824"),
            (self.hold_bytes_max <= 1 << 30, "hold_bytes_max", "at most 1073741824"),
            (self.events_max > 0, "events_max", "at least 1"),
            (self.event_bytes_max > 0, "event_bytes_max", "at least 1"),
            (self.inbound_frames_per_s_max > 0, "inbound_frames_per_s_max", "at least 1"),
            (
                self.inbound_bytes_per_s_max as usize >= RECEIVE_BUFFER_BYTES,
                "inbound_bytes_per_s_max",
                "at least 4096",
            ),
            (self.message_bytes_max >= 1024, "message_bytes_max", "at least 1024"),
            (
                self.echo_message_bytes_max <= 1 << 30,
                "echo_message_bytes_max",
                "at most 1073741824",
            ),
        ];
        let times = [
            ("handshake_ms_max", self.handshake_ms_max),
            ("idle_ms_max", self.idle_ms_max),
            ("write_ms_max", self.write_ms_max),
            ("close_ms_max", self.close_ms_max),
            ("linger_ms_max", self.linger_ms_max),
        ];
        let times = times.map(|(field, ms)| (ms <= SETTING_MS_MAX, field, "at most 43200000"));
        match rules.into_iter().chain(times).find(|(holds, ..)| !holds) {
            Some((_, field, rule)) => Err((field, rule)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_a_broken_rule_is_named() {
        assert_eq!(ShardConfig::default().validate(), Ok(()));
        let broken = ShardConfig { idle_ms_max: 54_000, ..ShardConfig::default() };
        assert_eq!(broken.validate(), Err(("idle_ms_max", "more than ping_after_ms")));
        let broken = ShardConfig { write_ms_max: SETTING_MS_MAX + 1, ..ShardConfig::default() };
        assert_eq!(broken.validate(), Err(("write_ms_max", "at most 43200000")));
    }
}
