//! Keys published at a URL (RFC 7517): fetched periodically, and again when no key verifies a token, so that a rotation
//! of keys causes no refusals. A publisher may add a key, or put another one under the same id.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::AuthCounters;
use super::keys::KeySet;
use crate::domain::command::Secret;
use crate::service::runtime::backoff::Backoff;

/// First wait before a failed refresh is tried again; doubles each time.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Size of a published document, bytes.
const DOCUMENT_BYTES_MAX: u64 = 1024 * 1024;
/// Redirects followed per fetch.
const REDIRECTS_MAX: u32 = 3;

/// Settings for keys that are published at a URL.
#[derive(Clone, Debug)]
pub struct JwksConfig {
    /// `https://…`, or `http://…` within a trusted network. May contain a password.
    pub url: Secret,
    /// Interval between fetches.
    pub refresh: Duration,
    /// Shortest interval between fetches for tokens that no key verifies, so that invented tokens do not overload the
    /// publisher.
    pub refetch_interval: Duration,
    /// Timeout of one fetch.
    pub timeout: Duration,
}

impl JwksConfig {
    /// A fetch every five minutes, for tokens that no key verifies at most every 10 s, with a timeout of 5 s.
    pub fn new(url: Secret) -> Self {
        Self {
            url,
            refresh: Duration::from_secs(300),
            refetch_interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
        }
    }
}

/// Published keys.
#[derive(Debug)]
pub(super) struct Jwks {
    config: JwksConfig,
    agent: ureq::Agent,
    counters: Arc<AuthCounters>,
    /// `None` until the first fetch that succeeded.
    keys: RwLock<Option<Arc<KeySet>>>,
    /// When the last fetch for a token that no key verifies began. Locked during a fetch, so that all callers wait
    /// for the same one.
    refetch: tokio::sync::Mutex<Option<Instant>>,
}

impl Jwks {
    /// Fetches at once and then periodically, in a task on the current runtime, until it is dropped.
    pub(super) fn spawn(config: JwksConfig, counters: Arc<AuthCounters>) -> Arc<Self> {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .max_redirects(REDIRECTS_MAX)
            .build()
            .new_agent();
        let refetch = tokio::sync::Mutex::new(None);
        let jwks = Arc::new(Self { config, agent, counters, keys: RwLock::new(None), refetch });
        let held = Arc::downgrade(&jwks);
        tokio::spawn(async move {
            let mut failures = 0;
            while let Some(jwks) = held.upgrade() {
                let fetched = {
                    let _alone = jwks.refetch.lock().await;
                    jwks.fetch().await
                };
                failures = if fetched { 0 } else { failures + 1 };
                let refresh = jwks.config.refresh;
                drop(jwks);
                let backoff = Backoff::new(RETRY_MIN, refresh).with_jitter(0.8, 1.0);
                sleep(match failures {
                    0 => backoff.spread(refresh, rand::random()),
                    failures => backoff.random_delay(failures - 1),
                })
                .await;
            }
        });
        jwks
    }

    pub(super) fn current(&self) -> Option<Arc<KeySet>> {
        self.keys.read().expect("no holder panics").clone()
    }

    /// The keys `seen` do not verify a token: fetches them again, unless another caller has done so since, or that was
    /// done lately. Returns whether there are newer keys.
    pub(super) async fn fetch_newer_than(&self, seen: Option<&Arc<KeySet>>) -> bool {
        let mut begun = self.refetch.lock().await;
        if !self.is_current(seen) {
            return true;
        }
        if !self.is_due(*begun) {
            return false;
        }
        *begun = Some(Instant::now());
        self.fetch().await
    }

    /// Whether [`Jwks::fetch_newer_than`] would fetch, or wait for a fetch.
    pub(super) fn would_fetch(&self) -> bool {
        self.refetch.try_lock().map_or(true, |begun| self.is_due(*begun))
    }

    fn is_due(&self, begun: Option<Instant>) -> bool {
        begun.is_none_or(|begun| begun.elapsed() >= self.config.refetch_interval)
    }

    fn is_current(&self, seen: Option<&Arc<KeySet>>) -> bool {
        match (self.current(), seen) {
            (Some(current), Some(seen)) => Arc::ptr_eq(&current, seen),
            (None, None) => true,
            _ => false,
        }
    }

    /// Returns whether it succeeded. If not, the old keys stay in use.
    async fn fetch(&self) -> bool {
        self.counters.jwks_fetches.add(1);
        let (agent, url) = (self.agent.clone(), self.config.url.clone());
        let fetched = tokio::task::spawn_blocking(move || get(&agent, &url)).await;
        let why = match fetched.map_err(|_| "the runtime is stopping").flatten() {
            Ok(document) => match KeySet::of_jwks(&document) {
                Some(keys) => {
                    self.counters.jwks_keys.set(keys.len() as u64);
                    *self.keys.write().expect("no holder panics") = Some(Arc::new(keys));
                    return true;
                }
                None => "no usable key in the document",
            },
            Err(why) => why,
        };
        self.counters.jwks_failures.add(1);
        tracing::warn!(why, "cannot fetch the keys to check tokens with (jwks_url)");
        false
    }
}

/// One fetch. Errors do not contain the URL: it may contain a password.
fn get(agent: &ureq::Agent, url: &Secret) -> Result<String, &'static str> {
    let category = |error: ureq::Error| match error {
        ureq::Error::StatusCode(_) => "the publisher answered with an error status",
        ureq::Error::Timeout(_) => "the publisher did not answer in time",
        ureq::Error::HostNotFound => "the publisher's host is not found",
        ureq::Error::ConnectionFailed | ureq::Error::Io(_) => "the publisher cannot be reached",
        ureq::Error::BodyExceedsLimit(_) => "the document is too large",
        ureq::Error::BadUri(_) => "the URL is malformed",
        _ => "the exchange with the publisher failed",
    };
    let mut response = agent.get(url.expose()).call().map_err(category)?;
    response.body_mut().with_config().limit(DOCUMENT_BYTES_MAX).read_to_string().map_err(category)
}
