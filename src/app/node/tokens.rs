//! The keys of tokens and the tokens of operators: read at start, and those of files again on SIGHUP and when the files
//! change.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::watch;

use super::followed_files::follow;
use super::metrics::register;
use crate::app::admin::{AdminCounters, AdminTokens, Collector, ReadinessCheck};
use crate::app::config::{
    AuthMode, Settings, admin_tokens, has_development_secret, own_keys, revocations,
};
use crate::domain::command::Secret;
use crate::service::sessions::auth::{
    AuthCounters, Authenticator, ClaimRules, JwksConfig, OwnKeys,
};
use crate::service::sessions::manager::{RevokedTokens, SessionHandle};

/// Said at start and whenever keys are replaced.
const DEVELOPMENT_SECRET: &str = "the secret of HS256 tokens is the one in RealChat's documents: whoever has read them can \
                                  connect as any user. For development only";

/// Checks the tokens of a node.
pub(super) struct Tokens {
    pub(super) auth: Arc<Authenticator>,
    counters: Arc<AuthCounters>,
    own: OwnKeys,
    /// Revoked from the first session on.
    pub(super) revoked: Vec<RevokedTokens>,
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
            let (auth, own) = (Authenticator::trust(), OwnKeys::default());
            return Ok(Self { auth, counters, own, revoked: Vec::new() });
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
        let revoked = revocations(settings).map_err(|error| error.to_string())?;
        Ok(Self { auth, counters, own, revoked })
    }

    /// Reads the files again as long as the runtime lives. Without files, or without tokens, there is nothing to do.
    pub(super) fn follow_files(
        self,
        settings: &Settings,
        sessions: SessionHandle,
        asked: watch::Receiver<u64>,
    ) {
        if settings.auth_mode == AuthMode::Trust {
            return;
        }
        let Self { auth, counters, own, revoked } = self;
        if settings.revocations_file.is_some() {
            let (settings, counters) = (settings.clone(), Arc::clone(&counters));
            tokio::spawn(follow_revocations(settings, revoked, sessions, counters, asked.clone()));
        }
        if settings.jwt_secret_file.is_some() || settings.jwt_key_file.is_some() {
            let settings = settings.clone();
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
}

/// Applies what is added to the file of revocations. `known`: what the sessions know already.
async fn follow_revocations(
    settings: Settings,
    known: Vec<RevokedTokens>,
    sessions: SessionHandle,
    counters: Arc<AuthCounters>,
    asked: watch::Receiver<u64>,
) {
    let mut applied: HashSet<_> = known.iter().cloned().collect();
    let read = move || revocations(&settings);
    let replace = |new: &Vec<RevokedTokens>| {
        let new: HashSet<_> = new.iter().cloned().collect();
        let added: Vec<_> = new.difference(&applied).cloned().collect();
        applied = new;
        tokio::spawn(revoke(sessions.clone(), added));
        Ok(())
    };
    let counted = (&counters.revocation_reloads, &counters.revocation_reload_failures);
    follow("revocations of tokens", known, asked, read, replace, counted).await;
}

async fn revoke(sessions: SessionHandle, added: Vec<RevokedTokens>) {
    for revoked in added {
        let user = revoked.user.clone();
        let whose = user.as_deref().unwrap_or("everybody");
        match sessions.revoke(revoked).await {
            Some(Ok(())) => {}
            Some(Err(full)) => {
                tracing::error!(whose, "tokens not revoked: {full}");
                continue;
            }
            None => return,
        }
        let Some(closed) = sessions.close_revoked(user.as_deref(), None).await else { return };
        tracing::info!(whose, closed, "tokens revoked by the file");
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
