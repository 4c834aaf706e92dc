//! The parameters that differ between seeds: limits small enough to be reached, rare or frequent
//! faults, few or many clients.

use super::random::Random;
use crate::domain::limiter::ConnectionLimits;
use crate::protocol::upgrade::UpgradeRules;
use crate::reactor::config::ShardConfig;
use crate::reactor::simulation::kernel::{Faults, START_MS};
use crate::reactor::wheel::TICK_MS;

#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) config: ShardConfig,
    pub(super) limits: ConnectionLimits,
    pub(super) faults: Faults,
    /// Room for connections in other shards.
    pub(super) room_elsewhere: u32,
    pub(super) ring_slots: usize,
    pub(super) clients_max: usize,
    /// Number of client addresses.
    pub(super) addresses: usize,
    /// Probability that many clients connect at once, out of 256.
    pub(super) storm: u8,
    /// Probability that a client leaves without a close frame, out of 256.
    pub(super) leaving: u8,
    /// Probability that a client begins to send without pause, out of 256.
    pub(super) floods: u8,
    /// Maximum number of events that a router pushes at once.
    pub(super) burst: usize,
    /// Maximum number of caught-up events in flight per session.
    pub(super) catch_up_window: usize,
    /// Whether the shard is stopped before the run comes to rest.
    pub(super) stops_early: bool,
    /// Probability that it is ordered to stop accepting, out of 256. Once is enough.
    pub(super) stops_accepting: u8,
    /// Probability that the service closes a session, out of 256.
    pub(super) service_closes: u8,
    /// How long the kernel has run before, ms.
    pub(super) start_ms: u64,
    /// Maximum time that passes at once, ms.
    pub(super) pace_ms: u64,
    /// Probability that the clocks jump, out of 256.
    pub(super) clock_jumps: u8,
}

impl Setup {
    pub(super) fn draw(random: &mut Random) -> Self {
        let clients_max = random.pick(&[2, 8, 24, 60]);
        Self {
            config: config(random),
            limits: ConnectionLimits {
                connections_per_address_max: random.pick(&[3, 1_000, 1_000]),
                handshakes_per_address_per_s_max: random.pick(&[5, 1_000, 1_000]),
                handshakes_per_s_max: random.pick(&[8, 1_000, 1_000]),
                ..ConnectionLimits::default()
            },
            faults: faults(random),
            room_elsewhere: random.pick(&[0, 3, 100]),
            ring_slots: random.pick(&[2, 8, 64]),
            clients_max,
            addresses: random.pick(&[1, 10]),
            storm: random.pick(&[0, 10, 100]),
            leaving: random.pick(&[0, 20, 200]),
            floods: random.pick(&[0, 0, 20, 200]),
            burst: random.pick(&[1, 3, 20]),
            catch_up_window: random.pick(&[1, 3, 50]),
            stops_early: random.chance(40),
            stops_accepting: random.pick(&[0, 0, 0, 0, 0, 0, 0, 3]),
            service_closes: random.pick(&[2, 30]),
            start_ms: start_ms(random),
            pace_ms: random.pick(&[200, 2_000, 20_000]),
            clock_jumps: random.pick(&[0, 20, 128]),
        }
    }
}

/// Half of the runs start shortly before a number of the clock wraps: the low half of a tick, its sign, milliseconds in
/// 32 bits, seconds in 16.
fn start_ms(random: &mut Random) -> u64 {
    let wraps_ms = [TICK_MS << 32, TICK_MS << 31, 1 << 32, 2_000 << 16, 0, 0, 0, 0];
    let before_ms = random.pick(&[1_000, 60_000, 400_000]);
    random.pick(&wraps_ms).saturating_sub(START_MS + random.between(0, before_ms))
}

fn config(random: &mut Random) -> ShardConfig {
    ShardConfig {
        connections_max: random.pick(&[4, 100, 100]),
        refusals_max: random.pick(&[5, 8]),
        accepts_max: random.pick(&[1, 4]),
        completions_max: random.pick(&[1, 5, 50, 1_024]),
        receive_buffers: random.pick(&[1, 4, 64]),
        handshake_ms_max: random.pick(&[1_000, 10_000]),
        message_ms_max: random.pick(&[2_000, 60_000]),
        resume_grace_ms: random.pick(&[500, 10_000]),
        catch_up_ms_max: random.pick(&[2_000, 300_000]),
        dedupe_ms: random.pick(&[1_000, 300_000]),
        cursor_interval_ms: random.pick(&[100, 2_000, 15_000]),
        write_ms_max: random.pick(&[500, 10_000]),
        close_ms_max: random.pick(&[500, 5_000]),
        linger_ms_max: random.pick(&[100, 1_000]),
        queue_frames_max: random.pick(&[4, 16, 128, 128]),
        queue_bytes_max: random.pick(&[16 * 1024, 1024 * 1024, 1024 * 1024]),
        hold_frames_max: random.pick(&[3, 30, 1_024, 1_024]),
        hold_bytes_max: random.pick(&[8 * 1024, 1024 * 1024, 1024 * 1024]),
        events_max: random.pick(&[5, 50, 100_000]),
        event_bytes_max: random.pick(&[20_000, 1 << 30]),
        inbound_frames_per_s_max: random.pick(&[30, 150]),
        upgrade: UpgradeRules { echo: true, ..UpgradeRules::default() },
        ..ShardConfig::default()
    }
}

/// A third of the seeds has no faults, so that faults cannot explain a failure there.
fn faults(random: &mut Random) -> Faults {
    if random.chance(85) {
        return Faults::default();
    }
    let rate = |random: &mut Random| random.pick(&[0, 2, 30, 120]);
    // In a third of the others, sends complete at once, so that their timing can be checked.
    let sends = if random.chance(85) { 0 } else { u8::MAX };
    Faults {
        late: sends & random.pick(&[0, 20, 128, 230]),
        short_send: sends & rate(random),
        zero_send: sends & rate(random),
        short_receive: rate(random),
        no_buffer: rate(random),
        accept_failure: rate(random),
        poll_ends: rate(random),
        spurious: rate(random),
        eager: random.pick(&[0, 0, 30, 255]),
        send_memory: sends & rate(random),
        early_return: rate(random),
        slow_turn: rate(random),
        completion_slots: random.pick(&[0, 0, 2, 16]),
        room_is_a_third: random.chance(128),
    }
}
