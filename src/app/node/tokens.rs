//! The keys of tokens: read at start, and those of files again on SIGHUP and when the files change.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::metrics::register;
use crate::app::admin::{Collector, ReadinessCheck};
use crate::app::config::{AuthMode, BadKey, Settings, has_development_secret, own_keys};
use crate::service::sessions::auth::{
    AuthCounters, Authenticator, ClaimRules, JwksConfig, OwnKeys,
};

/// How often the files are read to see whether they have changed. Kubernetes replaces the files of a secret without a
/// signal.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Said at start and whenever keys are replaced.
const DEVELOPMENT_SECRET: &str = "the secret of HS256 tokens is the one in RealChat's documents: whoever has read them can \
                                  connect as any user. For development only";

/// Checks the tokens of a node.
pub(super) struct Tokens {
    pub(super) auth: Arc<Authenticator>,
    counters: Arc<AuthCounters>,
    own: OwnKeys,
}

impl Tokens {
    /// Reads the keys.
    ///
    /// # Errors
    /// A key cannot be used. The text names its setting.
    pub(super) fn new(
        settings: &Settings,
        collectors: &mut Vec<Collector>,
    ) -> Result<Self, String> {
        let counters: Arc<AuthCounters> = register("auth_", collectors);
        if settings.auth_mode == AuthMode::Trust {
            tracing::warn!("AUTH_MODE=trust: anybody can connect as any user");
            return Ok(Self { auth: Authenticator::trust(), counters, own: OwnKeys::default() });
        }
        let own = own_keys(settings).map_err(|error| error.to_string())?;
        let published = settings.jwks_url.iter().map(|url| JwksConfig::new(url.secret().clone()));
        let rules = ClaimRules {
            issuer: settings.jwt_issuer.as_ref().map(ToString::to_string),
            audience: settings.jwt_audience.as_ref().map(ToString::to_string),
            leeway: settings.jwt_leeway,
        };
        let (published, all) = (published.collect(), Arc::clone(&counters));
        let auth = Authenticator::jwt(&own, published, rules, all).map_err(|e| e.to_string())?;
        let tokens = Self { auth, counters, own };
        tokens.tell_development_secret();
        Ok(tokens)
    }

    fn tell_development_secret(&self) {
        let is_used = has_development_secret(&self.own);
        self.counters.development_secret.set(u64::from(is_used));
        if is_used {
            tracing::warn!("{DEVELOPMENT_SECRET}");
        }
    }

    /// Reads the files again when `asked` changes, and from time to time, as long as the runtime lives. What cannot be
    /// read changes nothing. Without files, or without tokens, there is nothing to do.
    pub(super) fn follow_files(mut self, settings: &Settings, mut asked: watch::Receiver<u64>) {
        let has_files = settings.jwt_secret_file.is_some() || settings.jwt_key_file.is_some();
        if settings.auth_mode == AuthMode::Trust || !has_files {
            return;
        }
        let settings = settings.clone();
        tokio::spawn(async move {
            let mut last_failure = None;
            loop {
                let is_asked = tokio::select! {
                    () = sleep(LOOK_AGAIN) => false,
                    changed = asked.changed() => match changed {
                        Ok(()) => true,
                        Err(_) => return,
                    },
                };
                let settings = settings.clone();
                let Ok(read) = spawn_blocking(move || own_keys(&settings)).await else { return };
                let failure = self.replace(read, is_asked).err();
                if let Some(why) = &failure
                    && (is_asked || last_failure.as_ref() != Some(why))
                {
                    self.counters.key_reload_failures.add(1);
                    tracing::error!("the keys of tokens stay as they were: {why}");
                }
                last_failure = failure;
            }
        });
    }

    fn replace(&mut self, read: Result<OwnKeys, BadKey>, is_asked: bool) -> Result<(), String> {
        let own = read.map_err(|error| error.to_string())?;
        if own == self.own {
            if is_asked {
                tracing::info!("the keys of tokens have not changed");
            }
            return Ok(());
        }
        self.auth.replace_own(&own).map_err(|error| error.to_string())?;
        self.own = own;
        self.counters.key_reloads.add(1);
        tracing::info!("the keys of tokens were replaced; sessions stay");
        self.tell_development_secret();
        Ok(())
    }
}

/// Whether all published keys were fetched once.
pub(super) fn check(auth: Arc<Authenticator>) -> ReadinessCheck {
    Box::new(move || match auth.publishers_not_fetched() {
        0 => None,
        1 => Some("tokens: the keys of a JWKS_URL were not fetched yet".to_owned()),
        number => Some(format!("tokens: the keys of {number} of JWKS_URL were not fetched yet")),
    })
}
