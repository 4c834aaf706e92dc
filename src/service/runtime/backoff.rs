//! Exponential backoff with jitter.

use std::time::Duration;

/// The delays between retries: the initial delay, doubled with each retry up to a maximum, times a
/// random factor, so that callers that failed together do not retry together.
///
/// Stateless: the caller counts its retries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    /// Bounds of the random factor.
    jitter: (f64, f64),
}

impl Backoff {
    /// Delays that are shortened by up to half, so that `max` is never exceeded.
    pub const fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, jitter: (0.5, 1.0) }
    }

    /// Uses other bounds of the random factor. With a factor above 1, a delay may exceed the
    /// maximum.
    pub const fn with_jitter(self, least: f64, most: f64) -> Self {
        Self { jitter: (least, most), ..self }
    }

    /// The maximum before jitter.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The delay before retry `retry`, counted from 0. `chance`: random, 0 to 1.
    pub fn delay(&self, retry: u32, chance: f64) -> Duration {
        let doubled = self.initial.saturating_mul(1 << retry.min(16)).min(self.max);
        self.spread(doubled, chance)
    }

    /// [`Backoff::delay`] with the thread's random generator.
    pub fn random_delay(&self, retry: u32) -> Duration {
        self.delay(retry, rand::random())
    }

    /// Applies only the jitter, to a regular interval, so that many nodes do not act at the same
    /// moment.
    pub fn spread(&self, interval: Duration, chance: f64) -> Duration {
        let (least, most) = self.jitter;
        interval.mul_f64(least + chance * (most - least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_maximum_within_the_jitter() {
        let ms = Duration::from_millis;
        let shortened = Backoff::new(ms(100), ms(1_500));
        let longest: Vec<_> = (0..6).map(|retry| shortened.delay(retry, 1.0)).collect();
        assert_eq!(longest, [100, 200, 400, 800, 1_500, 1_500].map(ms));
        assert_eq!(shortened.delay(2, 0.0), ms(200));
        assert_eq!(shortened.delay(u32::MAX, 0.5), ms(1_125));
        assert!((ms(50)..=ms(100)).contains(&shortened.random_delay(0)));
        let lengthened = shortened.with_jitter(1.0, 1.5);
        assert_eq!((lengthened.delay(1, 0.0), lengthened.delay(1, 1.0)), (ms(200), ms(300)));
        assert_eq!(lengthened.spread(ms(60), 0.5), ms(75));
    }
}
