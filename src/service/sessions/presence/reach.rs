//! From when on the other nodes hand a session's events over (`ROUTING_MODE=group`).
//!
//! ```text
//!  admitted          registered                 reached
//!     │──── call ────────►│── lookup_lifetime ────►│
//!     └── events routed elsewhere may not come ────┘── … are handed over
//! ```
//!
//! A node that routes an event looks its members up in the registry and believes an answer, also
//! “nowhere”, for [`ReachConfig::lookup_lifetime`] from when it asked. So an answer from before the
//! registration is void everywhere that long after it, whether or not the announcement of the
//! registration was heard. What was routed before then is with the message service, which has a
//! message before its event is published: a catch-up whose last page is asked for afterwards misses
//! nothing.
//!
//! Presence may be away, and nobody waits for it for long: see [`Standing::Unreached`].

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// What decides it.
#[derive(Clone, Copy, Debug)]
pub struct ReachConfig {
    /// How long a node believes what it found in the registry. The same on every node.
    pub lookup_lifetime: Duration,
    /// How long after its admission a session's registration is waited for.
    pub registration_wait: Duration,
}

/// How far a session is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not before then is it decided, unless news come.
    Open(Instant),
    /// Every event that is routed from now on is handed over.
    Reached,
    /// It was not registered in time, or presence is known to be away. Events that are routed on
    /// other nodes may not come until it is.
    Unreached,
}

/// What is known about one session.
#[derive(Debug)]
pub struct Reach {
    config: ReachConfig,
    admitted: Instant,
    registered: OnceLock<Instant>,
    /// There is no point in waiting.
    hopeless: AtomicBool,
    news: Notify,
}

impl Reach {
    /// Of a session that was just admitted.
    pub fn new(config: ReachConfig, now: Instant) -> Self {
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
    pub fn standing(&self, now: Instant) -> Standing {
        let patience = self.admitted + self.config.registration_wait;
        match self.registered.get() {
            Some(at) => {
                let reached = *at + self.config.lookup_lifetime;
                if now >= reached {
                    Standing::Reached
                } else if *at <= patience {
                    Standing::Open(reached)
                } else {
                    Standing::Unreached
                }
            }
            None if now >= patience || self.hopeless.load(Ordering::Acquire) => Standing::Unreached,
            None => Standing::Open(patience),
        }
    }

    /// Waits until it is decided: at most the two times of the configuration together.
    pub async fn decided(&self) {
        loop {
            let mut news = pin!(self.news.notified());
            // Before the look, so that no news fall between the two.
            news.as_mut().enable();
            let Standing::Open(until) = self.standing(Instant::now()) else { return };
            // Either way there is something new to look at.
            let _ = timeout_at(until, news).await;
        }
    }
}

/// The side of whoever registers the session. Dropped without having done so, it says that there is
/// nothing to wait for.
#[derive(Debug)]
pub(super) struct Pledge(Arc<Reach>);

impl Pledge {
    pub(super) fn new(reach: Arc<Reach>) -> Self {
        Self(reach)
    }

    pub(super) fn keep(self, now: Instant) {
        self.0.registered(now);
    }

    /// It will take long; the registration may come all the same.
    pub(super) fn put_off(&self) {
        self.0.give_up();
    }
}

impl Drop for Pledge {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: ReachConfig = ReachConfig {
        lookup_lifetime: Duration::from_secs(1),
        registration_wait: Duration::from_secs(2),
    };

    fn new() -> (Arc<Reach>, impl Fn(u64) -> Instant) {
        let now = Instant::now();
        (Arc::new(Reach::new(CONFIG, now)), move |ms| now + Duration::from_millis(ms))
    }

    #[test]
    fn session_is_reached_when_no_answer_from_before_is_believed() {
        let (reach, at) = new();
        assert_eq!(reach.standing(at(1_999)), Standing::Open(at(2_000)));
        reach.registered(at(500));
        reach.registered(at(900));
        assert_eq!(reach.standing(at(1_499)), Standing::Open(at(1_500)));
        assert_eq!(reach.standing(at(1_500)), Standing::Reached);
    }

    #[test]
    fn registration_is_waited_for_so_long_and_counts_whenever_it_comes() {
        let (reach, at) = new();
        assert_eq!(reach.standing(at(2_000)), Standing::Unreached);
        reach.registered(at(3_000));
        assert_eq!(reach.standing(at(3_999)), Standing::Unreached);
        assert_eq!(reach.standing(at(4_000)), Standing::Reached);
    }

    #[test]
    fn nobody_waits_for_what_will_take_long() {
        let (reach, at) = new();
        let pledge = Pledge::new(Arc::clone(&reach));
        pledge.put_off();
        assert_eq!(reach.standing(at(0)), Standing::Unreached);
        pledge.keep(at(100));
        assert_eq!(reach.standing(at(1_100)), Standing::Reached);
    }

    #[tokio::test]
    async fn waiting_ends_with_the_news_or_with_the_time() {
        let long = Duration::from_secs(3600);
        let patient = ReachConfig { lookup_lifetime: long, registration_wait: long };
        let waiting = || {
            let reach = Arc::new(Reach::new(patient, Instant::now()));
            let waits = Arc::clone(&reach);
            let wait = tokio::spawn(async move { waits.decided().await });
            (Pledge::new(reach), wait)
        };
        let (pledge, wait) = waiting();
        tokio::task::yield_now().await;
        drop(pledge);
        wait.await.unwrap();

        let (pledge, wait) = waiting();
        tokio::task::yield_now().await;
        pledge.keep(Instant::now() - long);
        wait.await.unwrap();

        let short = Duration::from_millis(1);
        let hasty = ReachConfig { lookup_lifetime: short, registration_wait: short };
        let reach = Reach::new(hasty, Instant::now());
        reach.decided().await;
        assert_eq!(reach.standing(Instant::now()), Standing::Unreached);
        reach.registered(Instant::now());
        reach.decided().await;
    }
}
