//! When other nodes begin to hand over a session's events (`ROUTING_MODE=group`).
//!
//! ```text
//!  admitted          registered                visible
//!     │──── call ────────►│── lookup_lifetime ────►│
//!     └── events routed on other nodes may not ────┘── … they are handed over
//!         arrive
//! ```
//!
//! A node that routes an event looks up the members in the registry. It caches the answer, also a
//! negative one, for [`VisibilityConfig::lookup_lifetime`] from the time of the request. Once this
//! time has passed after the registration, no node uses an older answer, even if it missed the
//! announcement. Events routed earlier are covered by catch-up: the message service has a message
//! before its event is published, so a catch-up that requests its last page after that time misses
//! nothing.
//!
//! Presence may be unreachable, so the wait is bounded: see [`VisibilityState::NotVisible`].

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Settings of [`Visibility`].
#[derive(Clone, Copy, Debug)]
pub struct VisibilityConfig {
    /// How long a node caches what it found in the registry. The same on every node.
    pub lookup_lifetime: Duration,
    /// How long to wait for a session's registration after its admission.
    pub registration_wait: Duration,
}

/// Whether other nodes hand over a session's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisibilityState {
    /// Not known before this time, unless notified.
    Pending(Instant),
    /// Other nodes hand over every event that they route from now on.
    Visible,
    /// The session was not registered in time, or presence is known to be unreachable. Events that
    /// other nodes route may not arrive until the session is registered.
    NotVisible,
}

/// The visibility of one session on other nodes.
#[derive(Debug)]
pub struct Visibility {
    config: VisibilityConfig,
    admitted: Instant,
    registered: OnceLock<Instant>,
    /// The registration will take long or not happen: waiting is pointless.
    gave_up: AtomicBool,
    changed: Notify,
}

impl Visibility {
    /// The visibility of a session that was just admitted.
    pub fn new(config: VisibilityConfig, now: Instant) -> Self {
        Self {
            config,
            admitted: now,
            registered: OnceLock::new(),
            gave_up: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    /// Presence has accepted the registration.
    pub fn registered(&self, now: Instant) {
        // Only the first time counts: the session stays registered, or it is replaced.
        let _ = self.registered.set(now);
        self.changed.notify_waiters();
    }

    fn give_up(&self) {
        self.gave_up.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// The state at `now`.
    pub fn state(&self, now: Instant) -> VisibilityState {
        let deadline = self.admitted + self.config.registration_wait;
        match self.registered.get() {
            Some(at) => {
                let visible = *at + self.config.lookup_lifetime;
                if now >= visible {
                    VisibilityState::Visible
                } else if *at <= deadline {
                    VisibilityState::Pending(visible)
                } else {
                    VisibilityState::NotVisible
                }
            }
            None if now >= deadline || self.gave_up.load(Ordering::Acquire) => {
                VisibilityState::NotVisible
            }
            None => VisibilityState::Pending(deadline),
        }
    }

    /// Waits until the state is no longer pending: at most the sum of the two times of the
    /// configuration.
    pub async fn decided(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            // Enabled before the state is read, so that no change in between is missed.
            changed.as_mut().enable();
            let VisibilityState::Pending(until) = self.state(Instant::now()) else { return };
            // Either way the state has to be read again.
            let _ = timeout_at(until, changed).await;
        }
    }
}

/// Notifies a [`Visibility`] of the registration. If it is dropped before, waiting for the
/// registration is pointless.
#[derive(Debug)]
pub(super) struct VisibilityNotifier(Arc<Visibility>);

impl VisibilityNotifier {
    pub(super) fn new(visibility: Arc<Visibility>) -> Self {
        Self(visibility)
    }

    pub(super) fn registered(self, now: Instant) {
        self.0.registered(now);
    }

    /// Whether the session is no longer waiting for its registration, so that it has gone live without.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.0.state(now) == VisibilityState::NotVisible
    }

    /// The registration will take long. It still counts when it comes.
    pub(super) fn delayed(&self) {
        self.0.give_up();
    }
}

impl Drop for VisibilityNotifier {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: VisibilityConfig = VisibilityConfig {
        lookup_lifetime: Duration::from_secs(1),
        registration_wait: Duration::from_secs(2),
    };

    fn new() -> (Arc<Visibility>, impl Fn(u64) -> Instant) {
        let now = Instant::now();
        (Arc::new(Visibility::new(CONFIG, now)), move |ms| now + Duration::from_millis(ms))
    }

    #[test]
    fn session_is_visible_when_no_older_lookup_is_cached() {
        let (visibility, at) = new();
        assert_eq!(visibility.state(at(1_999)), VisibilityState::Pending(at(2_000)));
        visibility.registered(at(500));
        visibility.registered(at(900));
        assert_eq!(visibility.state(at(1_499)), VisibilityState::Pending(at(1_500)));
        assert_eq!(visibility.state(at(1_500)), VisibilityState::Visible);
    }

    #[test]
    fn wait_for_a_registration_is_bounded_and_a_late_one_counts() {
        let (visibility, at) = new();
        assert_eq!(visibility.state(at(2_000)), VisibilityState::NotVisible);
        visibility.registered(at(3_000));
        assert_eq!(visibility.state(at(3_999)), VisibilityState::NotVisible);
        assert_eq!(visibility.state(at(4_000)), VisibilityState::Visible);
    }

    #[test]
    fn known_delay_is_not_waited_for() {
        let (visibility, at) = new();
        let notifier = VisibilityNotifier::new(Arc::clone(&visibility));
        notifier.delayed();
        assert_eq!(visibility.state(at(0)), VisibilityState::NotVisible);
        notifier.registered(at(100));
        assert_eq!(visibility.state(at(1_100)), VisibilityState::Visible);
    }

    #[tokio::test]
    async fn wait_ends_with_a_change_or_at_its_deadline() {
        let long = Duration::from_secs(3600);
        let long_config = VisibilityConfig { lookup_lifetime: long, registration_wait: long };
        let waiting = || {
            let visibility = Arc::new(Visibility::new(long_config, Instant::now()));
            let waiter = Arc::clone(&visibility);
            let wait = tokio::spawn(async move { waiter.decided().await });
            (VisibilityNotifier::new(visibility), wait)
        };
        let (notifier, wait) = waiting();
        tokio::task::yield_now().await;
        drop(notifier);
        wait.await.unwrap();

        let (notifier, wait) = waiting();
        tokio::task::yield_now().await;
        notifier.registered(Instant::now() - long);
        wait.await.unwrap();

        let short = Duration::from_millis(1);
        let short_config = VisibilityConfig { lookup_lifetime: short, registration_wait: short };
        let visibility = Visibility::new(short_config, Instant::now());
        visibility.decided().await;
        assert_eq!(visibility.state(Instant::now()), VisibilityState::NotVisible);
        visibility.registered(Instant::now());
        visibility.decided().await;
    }
}
