//! How long the events of all clients may wait for those that do not read.

/// The longest wait in one piece, ms.
pub const WAIT_MS_MAX: u64 = 128;
/// After so many ms without a wait, one ms more may be waited. So at most a fifth of the time is spent waiting.
pub const EARNING_MS: u64 = 4;
/// What the time between two calls counts at most, ms. If it is longer, the program was stopped.
const PAUSE_MS_MAX: u64 = 32;
/// The whole allowance.
const WHOLE: i64 = (WAIT_MS_MAX * EARNING_MS) as i64;

/// Bounds how long all clients together make the others wait, however they divide it among themselves: at most
/// [`WAIT_MS_MAX`] at a time, and a fifth of the time.
#[derive(Debug)]
pub struct WaitAllowance {
    /// What is left, in parts of `1 / EARNING_MS` ms. Below 0 if the last wait took longer than allowed.
    left: i64,
    at_ms: u64,
}

impl WaitAllowance {
    /// The whole allowance. `now_ms`: any clock that does not go back.
    pub fn new(now_ms: u64) -> Self {
        Self { left: WHOLE, at_ms: now_ms }
    }

    /// Time has passed since the last call. `waited`: for clients.
    pub fn pass(&mut self, now_ms: u64, waited: bool) {
        let passed_ms = now_ms.saturating_sub(self.at_ms);
        self.at_ms = now_ms;
        self.left = if waited {
            self.left.max(0) - (passed_ms.min(PAUSE_MS_MAX) * EARNING_MS) as i64
        } else {
            self.left.saturating_add_unsigned(passed_ms).min(WHOLE)
        };
    }

    /// Allows a wait of `ms`, at most [`WAIT_MS_MAX`], instead of what is left.
    pub fn allow(&mut self, ms: u64) {
        self.left = ((ms * EARNING_MS) as i64).min(WHOLE);
    }

    /// Whether nothing may wait now.
    pub fn is_used_up(&self) -> bool {
        self.left <= 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest wait, and the ms waited of `all_ms`, if `wants` says when a client would make the others wait. It is
    /// asked every `step_ms`.
    fn waits(all_ms: u64, step_ms: u64, wants: impl Fn(u64) -> bool) -> (u64, u64) {
        let mut allowance = WaitAllowance::new(0);
        let (mut longest, mut piece, mut sum) = (0, 0, 0);
        for now_ms in (step_ms..=all_ms).step_by(step_ms as usize) {
            let waits = wants(now_ms) && !allowance.is_used_up();
            allowance.pass(now_ms, waits);
            piece = if waits { piece + step_ms } else { 0 };
            longest = longest.max(piece);
            sum += u64::from(waits) * step_ms;
        }
        (longest, sum)
    }

    #[test]
    fn waits_are_bounded_whatever_the_pattern() {
        for period in [1, 2, 3, 10, 50, 127, 128, 129, 1_000] {
            for of_period in [1, period / 2, period - 1, period] {
                for step_ms in [1, 16] {
                    let (longest, sum) = waits(100_000, step_ms, |now| now % period < of_period);
                    let of = format!("{of_period} of {period} in steps of {step_ms}");
                    assert!(longest < WAIT_MS_MAX + step_ms, "{of}: {longest} ms");
                    assert!(sum <= WAIT_MS_MAX + step_ms + 100_000 / 5, "{of}: {sum} ms");
                }
            }
        }
        assert_eq!(waits(1_000, 1, |now| now < 100), (99, 99), "a short wait is allowed whole");
    }

    #[test]
    fn wait_that_is_allowed_is_as_long_as_it_says() {
        let mut allowance = WaitAllowance::new(0);
        allowance.allow(16);
        allowance.pass(15, true);
        assert!(!allowance.is_used_up());
        allowance.pass(16, true);
        assert!(allowance.is_used_up());
    }

    #[test]
    fn program_that_was_stopped_does_not_use_it_up() {
        let mut allowance = WaitAllowance::new(0);
        allowance.pass(60_000, true);
        assert!(!allowance.is_used_up());
    }
}
