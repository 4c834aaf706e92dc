//! Keys that are published at a URL (RFC 7517), kept, refreshed, and fetched again when a token
//! names one that is not among them: that is how a rotation is survived.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use jsonwebtoken::Header;
use tokio::time::{Instant, sleep};

use super::AuthCounters;
use super::keys::{KeyLookup, KeySet};
use crate::domain::command::Secret;
use crate::service::runtime::backoff::Backoff;

/// First wait before a failed refresh is tried again; doubles each time.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// A published document, bytes.
const DOCUMENT_BYTES_MAX: u64 = 1024 * 1024;
/// Redirects that are followed.
const REDIRECTS_MAX: u32 = 3;

/// Where keys are published.
#[derive(Clone, Debug)]
pub struct JwksConfig {
    /// `https://…` (or `http://…` within a network that is trusted); may hold a password.
    pub url: Secret,
    /// Between two fetches.
    pub refresh: Duration,
    /// Least time between two fetches for unknown keys, so that tokens with invented key ids do not
    /// storm the publisher.
    pub refetch_interval: Duration,
    /// For one fetch.
    pub timeout: Duration,
}

impl JwksConfig {
    /// Refreshes every five minutes, for unknown keys at most every 10 s; 5 s for a fetch.
    pub fn new(url: Secret) -> Self {
        Self {
            url,
            refresh: Duration::from_secs(300),
            refetch_interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Jwks {
    config: JwksConfig,
    agent: ureq::Agent,
    counters: Arc<AuthCounters>,
    /// `None` until the first fetch that succeeded.
    keys: RwLock<Option<Arc<KeySet>>>,
    /// When a fetch was last begun for an unknown key. Held while one is under way: all who need
    /// it wait for the same one.
    refetch: tokio::sync::Mutex<Option<Instant>>,
}

impl Jwks {
    /// Fetches at once and then again and again, on the current runtime, as long as it is held.
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

    /// The keys to verify a token with: those there are, or fresh ones if they do not have its
    /// key. `None`: there have never been any.
    pub(super) async fn keys_for(&self, header: &Header) -> Option<Arc<KeySet>> {
        if let Some(keys) = self.knowing(header) {
            return Some(keys);
        }
        let mut begun = self.refetch.lock().await;
        if let Some(keys) = self.knowing(header) {
            return Some(keys); // Another one's fetch brought it.
        }
        if begun.is_none_or(|begun| begun.elapsed() >= self.config.refetch_interval) {
            *begun = Some(Instant::now());
            self.fetch().await;
        }
        self.current()
    }

    fn knowing(&self, header: &Header) -> Option<Arc<KeySet>> {
        self.current().filter(|keys| !matches!(keys.find(header), KeyLookup::Unknown))
    }

    /// Returns whether it has fresh keys now. If not, the old ones stay.
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

/// One fetch. Errors say what went wrong without the URL: it may hold a password.
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
