//! From when on the other nodes hand a session's events over (`ROUTING_MODE=group`).
//!
//! ```text
//!  admitted          registered                 reached
//!     │──── call ────────►│── lookup_lifetime ────►│
//!     └── events routed elsewhere may not come ────┘── … are handed over
//! ```
//!
//! A node that routes an event looks its members up in the registry and believes an answer, also
//! “nowhere”, for [`VisibilityConfig::lookup_lifetime`] from when it asked. So an answer from before the
//! registration is void everywhere that long after it, whether or not the announcement of the
//! registration was heard. What was routed before then is with the message service, which has a
//! message before its event is published: a catch-up whose last page is asked for afterwards misses
//! nothing.
//!
//! Presence may be away, and nobody waits for it for long: see [`VisibilityState::NotVisible`].

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// What decides it.
#[derive(Clone, Copy, Debug)]
pub struct VisibilityConfig {
    /// How long a node believes what it found in the registry. The same on every node.
    pub lookup_lifetime: Duration,
    /// How long after its admission a session's registration is waited for.
    pub registration_wait: Duration,
}

/// How far a session is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisibilityState {
    /// Not before then is it decided, unless news come.
    Pending(Instant),
    /// Every event that is routed from now on is handed over.
    Visible,
    /// It was not registered in time, or presence is known to be away. Events that are routed on
    /// other nodes may not come until it is.
    NotVisible,
}

/// What is known about one session.
#[derive(Debug)]
pub struct Visibility {
    config: VisibilityConfig,
    admitted: Instant,
    registered: OnceLock<Instant>,
    /// There is no point in waiting.
    hopeless: AtomicBool,
    news: Notify,
}

impl Visibility {
    /// Of a session that was just admitted.
    pub fn new(config: VisibilityConfig, now: Instant) -> Self {
        Self {
            config,
            admitted: now,
            registered: OnceLock::new(),
            hopeless: AtomicBool::new(false),
            news: Notify::new(),
        }
    }

    /// Presence has accepted the registration.
    pub fn registered(&self, now: Instant) {
        // Only the first time counts: it stays registered, or it is replaced.
        let _ = self.registered.set(now);
        self.news.notify_waiters();
    }

    fn give_up(&self) {
        self.hopeless.store(true, Ordering::Release);
        self.news.notify_waiters();
    }

    /// Where it stands.
    pub fn state(&self, now: Instant) -> VisibilityState {
        let patience = self.admitted + self.config.registration_wait;
        match self.registered.get() {
            Some(at) => {
                let reached = *at + self.config.lookup_lifetime;
                if now >= reached {
                    VisibilityState::Visible
                } else if *at <= patience {
                    VisibilityState::Pending(reached)
                } else {
                    VisibilityState::NotVisible
                }
            }
            None if now >= patience || self.hopeless.load(Ordering::Acquire) => {
                VisibilityState::NotVisible
            }
            None => VisibilityState::Pending(patience),
        }
    }

    /// Waits until it is decided: at most the two times of the configuration together.
    pub async fn decided(&self) {
        loop {
            let mut news = pin!(self.news.notified());
            // Before the look, so that no news fall between the two.
            news.as_mut().enable();
            let VisibilityState::Pending(until) = self.state(Instant::now()) else { return };
            // Either way there is something new to look at.
            let _ = timeout_at(until, news).await;
        }
    }
}

/// The side of whoever registers the session. Dropped without having done so, it says that there is
/// nothing to wait for.
#[derive(Debug)]
pub(super) struct VisibilityNotifier(Arc<Visibility>);

impl VisibilityNotifier {
    pub(super) fn new(visibility: Arc<Visibility>) -> Self {
        Self(visibility)
    }

    pub(super) fn keep(self, now: Instant) {
        self.0.registered(now);
    }

    /// It will take long; the registration may come all the same.
    pub(super) fn put_off(&self) {
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
    fn session_is_reached_when_no_answer_from_before_is_believed() {
        let (visibility, at) = new();
        assert_eq!(visibility.state(at(1_999)), VisibilityState::Pending(at(2_000)));
        visibility.registered(at(500));
        visibility.registered(at(900));
        assert_eq!(visibility.state(at(1_499)), VisibilityState::Pending(at(1_500)));
        assert_eq!(visibility.state(at(1_500)), VisibilityState::Visible);
    }

    #[test]
    fn registration_is_waited_for_so_long_and_counts_whenever_it_comes() {
        let (visibility, at) = new();
        assert_eq!(visibility.state(at(2_000)), VisibilityState::NotVisible);
        visibility.registered(at(3_000));
        assert_eq!(visibility.state(at(3_999)), VisibilityState::NotVisible);
        assert_eq!(visibility.state(at(4_000)), VisibilityState::Visible);
    }

    #[test]
    fn nobody_waits_for_what_will_take_long() {
        let (visibility, at) = new();
        let notifier = VisibilityNotifier::new(Arc::clone(&visibility));
        notifier.put_off();
        assert_eq!(visibility.state(at(0)), VisibilityState::NotVisible);
        notifier.keep(at(100));
        assert_eq!(visibility.state(at(1_100)), VisibilityState::Visible);
    }

    #[tokio::test]
    async fn waiting_ends_with_the_news_or_with_the_time() {
        let long = Duration::from_secs(3600);
        let patient = VisibilityConfig { lookup_lifetime: long, registration_wait: long };
        let waiting = || {
            let visibility = Arc::new(Visibility::new(patient, Instant::now()));
            let waits = Arc::clone(&visibility);
            let wait = tokio::spawn(async move { waits.decided().await });
            (VisibilityNotifier::new(visibility), wait)
        };
        let (notifier, wait) = waiting();
        tokio::task::yield_now().await;
        drop(notifier);
        wait.await.unwrap();

        let (notifier, wait) = waiting();
        tokio::task::yield_now().await;
        notifier.keep(Instant::now() - long);
        wait.await.unwrap();

        let short = Duration::from_millis(1);
        let hasty = VisibilityConfig { lookup_lifetime: short, registration_wait: short };
        let visibility = Visibility::new(hasty, Instant::now());
        visibility.decided().await;
        assert_eq!(visibility.state(Instant::now()), VisibilityState::NotVisible);
        visibility.registered(Instant::now());
        visibility.decided().await;
    }
}
