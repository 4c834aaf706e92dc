//! The rate limit of one client.

use crate::reactor::wheel::{TICK_MS, Tick};

/// Counts within one second of the shard's clock. Small, because each connection has one.
#[derive(Clone, Copy, Debug, Default)]
pub struct InboundRate {
    second: u16,
    frames: u16,
    bytes: u32,
}

impl InboundRate {
    /// Counts received bytes. Returns whether they are within the limit.
    pub fn count(&mut self, now: Tick, bytes: usize, bytes_max: u32) -> bool {
        self.turn_to(now);
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.bytes <= bytes_max
    }

    /// Counts a frame. Returns whether it is within the limit.
    pub fn count_frame(&mut self, now: Tick, frames_max: u16) -> bool {
        self.turn_to(now);
        self.frames = self.frames.saturating_add(1);
        self.frames <= frames_max
    }

    /// Counts bytes that are dropped, from a reset on instead of within a second. Returns whether they are within the
    /// limit.
    pub fn count_dropped(&mut self, bytes: usize, bytes_max: u32) -> bool {
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.bytes <= bytes_max
    }

    fn turn_to(&mut self, now: Tick) {
        // Wraps after 18 hours. No client is silent for so long: `SETTING_MS_MAX`.
        let second = (now * TICK_MS / 1000) as u16;
        if self.second != second {
            *self = Self { second, frames: 0, bytes: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_restart_each_second() {
        let mut rate = InboundRate::default();
        assert!(rate.count(0, 10, 10) && rate.count_frame(0, 1));
        assert!(!rate.count(62, 1, 10) && !rate.count_frame(62, 1));
        assert!(rate.count(63, 10, 10) && rate.count_frame(63, 1));
    }
}
