//! The keys of tokens and the tokens of operators: read at start, and those of files again on SIGHUP and when the files
//! change.

use std::sync::Arc;

use tokio::sync::watch;

use super::followed_files::follow;
use super::metrics::register;
use crate::app::admin::{AdminCounters, AdminTokens, Collector, ReadinessCheck};
use crate::app::config::{AuthMode, Settings, admin_tokens, has_development_secret, own_keys};
use crate::domain::command::Secret;
use crate::service::sessions::auth::{
    AuthCounters, Authenticator, ClaimRules, JwksConfig, OwnKeys,
};

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
        tell_development_secret(&own, &counters);
        Ok(Self { auth, counters, own })
    }

    /// Reads the files again as long as the runtime lives. Without files, or without tokens, there is nothing to do.
    pub(super) fn follow_files(self, settings: &Settings, asked: watch::Receiver<u64>) {
        let has_files = settings.jwt_secret_file.is_some() || settings.jwt_key_file.is_some();
        if settings.auth_mode == AuthMode::Trust || !has_files {
            return;
        }
        let settings = settings.clone();
        let Self { auth, counters, own } = self;
        tokio::spawn(async move {
            let read = move || own_keys(&settings);
            let replace = |own: &OwnKeys| {
                auth.replace_own(own).map_err(|error| error.to_string())?;
                tell_development_secret(own, &counters);
                Ok(())
            };
            let counted = (&counters.key_reloads, &counters.key_reload_failures);
            follow("keys of tokens", own, asked, read, replace, counted).await;
        });
    }
}

fn tell_development_secret(own: &OwnKeys, counters: &AuthCounters) {
    let is_used = has_development_secret(own);
    counters.development_secret.set(u64::from(is_used));
    if is_used {
        tracing::warn!("{DEVELOPMENT_SECRET}");
    }
}

/// Reads the tokens of operators, also again as long as the runtime lives if they are in a file.
///
/// # Errors
/// A token cannot be used. The text names its setting.
pub(super) fn operators(
    settings: &Settings,
    counters: &Arc<AdminCounters>,
    asked: watch::Receiver<u64>,
) -> Result<Arc<AdminTokens>, String> {
    let own = admin_tokens(settings).map_err(|error| error.to_string())?;
    let tokens = Arc::new(AdminTokens::new(&own));
    if settings.admin_token_file.is_some() {
        let (settings, counters) = (settings.clone(), Arc::clone(counters));
        let followed = Arc::clone(&tokens);
        tokio::spawn(async move {
            let read = move || admin_tokens(&settings);
            let replace = |own: &Vec<Secret>| {
                followed.replace(own);
                Ok(())
            };
            let counted = (&counters.token_reloads, &counters.token_reload_failures);
            follow("tokens of operators", own, asked, read, replace, counted).await;
        });
    }
    Ok(tokens)
}

/// Whether all published keys were fetched once.
pub(super) fn check(auth: Arc<Authenticator>) -> ReadinessCheck {
    Box::new(move || match auth.publishers_not_fetched() {
        0 => None,
        1 => Some("tokens: the keys of a JWKS_URL were not fetched yet".to_owned()),
        number => Some(format!("tokens: the keys of {number} of JWKS_URL were not fetched yet")),
    })
}
