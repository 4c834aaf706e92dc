//! Authentication: checks tokens (contract §7), for WebSocket and gRPC.
//!
//! | key source | algorithm | checked |
//! | --- | --- | --- |
//! | secret (`JWT_SECRET`) | HS256 | at once: takes microseconds |
//! | public keys in a PEM file | RS256, ES256 or EdDSA, by the kind of key | in a task: takes hundreds of microseconds |
//! | public keys at a URL (JWKS) | the same | in a task that may wait for a fetch |
//!
//! A token needs `sub` (the user) and `exp`. `nbf` must have passed; `iss` and `aud` must match if
//! configured. The request's `user_id` is optional, and must equal `sub` if given.

mod failure;
mod jwks;
mod keys;
mod signature;
#[cfg(test)]
pub(super) mod tests;
mod verify;

use std::sync::Arc;

pub use failure::AuthFailure;
pub use jwks::JwksConfig;
pub use keys::KeyError;
pub use verify::ClaimRules;

use crate::domain::command::Secret;
use crate::domain::limits::ID_BYTES_MAX;
use crate::service::backends::ports::BoxFuture;
use crate::service::events::timestamp::unix_ms;

use self::jwks::Jwks;
use self::keys::KeySet;

/// The identity of an authenticated client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: String,
    /// When it expires, Unix time in seconds including the leeway. `None`: never.
    pub expires_at_s: Option<u64>,
}

/// Where the keys come from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// A secret, for HS256.
    Secret(Secret),
    /// The content of a PEM file with one or more public keys.
    Pem(Vec<u8>),
    /// A JWKS document at a URL.
    Jwks(JwksConfig),
}

crate::counters! {
    /// Counters of token checks.
    pub struct AuthCounters of SharedCounter {
        Counter accepted: "Tokens accepted",
        Counter refused: "Tokens refused or missing",
        Counter keys_unavailable: "Tokens not checked because no keys could be fetched",
        Counter jwks_fetches: "Fetches of published keys",
        Counter jwks_failures: "Fetches of published keys that failed",
        Gauge jwks_keys: "Published keys in use",
    }
}

/// A token check.
pub enum TokenCheck {
    /// The outcome is known at once.
    Done(Result<Identity, AuthFailure>),
    /// The outcome takes time. A caller that must not wait awaits it in a task.
    Pending(BoxFuture<Result<Identity, AuthFailure>>),
}

/// Checks tokens, for all callers.
#[derive(Debug)]
pub struct Authenticator {
    method: AuthMethod,
}

#[derive(Debug)]
enum AuthMethod {
    /// Every client is trusted. For tests and demos, or behind a gateway that authenticates.
    Trust,
    Jwt(Arc<TokenVerifier>),
}

#[derive(Debug)]
struct TokenVerifier {
    keys: TokenKeys,
    rules: ClaimRules,
    counters: Arc<AuthCounters>,
}

#[derive(Debug)]
enum TokenKeys {
    Secret(KeySet),
    Public(KeySet),
    Published(Arc<Jwks>),
}

impl Authenticator {
    /// Trusts every client (`AUTH_MODE=trust`).
    pub fn trust() -> Arc<Self> {
        Arc::new(Self { method: AuthMethod::Trust })
    }

    /// Checks tokens (`AUTH_MODE=jwt`). A task on the current runtime fetches published keys.
    ///
    /// # Errors
    /// The secret is empty, or the PEM holds no usable public key.
    pub fn jwt(
        source: KeySource,
        rules: ClaimRules,
        counters: Arc<AuthCounters>,
    ) -> Result<Arc<Self>, KeyError> {
        signature::install();
        let keys = match source {
            KeySource::Secret(secret) => TokenKeys::Secret(KeySet::of_secret(&secret)?),
            KeySource::Pem(pem) => TokenKeys::Public(KeySet::of_pem(&pem)?),
            KeySource::Jwks(config) => {
                TokenKeys::Published(Jwks::spawn(config, Arc::clone(&counters)))
            }
        };
        let tokens = Arc::new(TokenVerifier { keys, rules, counters });
        Ok(Arc::new(Self { method: AuthMethod::Jwt(tokens) }))
    }

    /// Whether tokens can be checked, for readiness. Published keys must have been fetched once.
    pub fn is_ready(&self) -> bool {
        match &self.method {
            AuthMethod::Trust => true,
            AuthMethod::Jwt(tokens) => match &tokens.keys {
                TokenKeys::Secret(_) | TokenKeys::Public(_) => true,
                TokenKeys::Published(jwks) => jwks.current().is_some(),
            },
        }
    }

    /// Judges `token` with the keys at hand, before a user is claimed. `Ok`: it is valid, or its key has to be fetched
    /// first, so that only [`Authenticator::check`] can tell.
    ///
    /// # Errors
    /// It is missing or invalid. That is counted; a valid one is not, because it is checked again.
    pub fn judge(&self, token: Option<&Secret>) -> Result<(), AuthFailure> {
        let AuthMethod::Jwt(tokens) = &self.method else { return Ok(()) };
        let outcome = match (token, &tokens.keys) {
            (None, _) => Err(AuthFailure::TokenMissing),
            (Some(token), TokenKeys::Secret(keys) | TokenKeys::Public(keys)) => {
                tokens.verify(token, keys, "")
            }
            (Some(token), TokenKeys::Published(jwks)) => {
                let Some(keys) = jwks.current() else { return Ok(()) };
                match tokens.verify(token, &keys, "") {
                    Err(AuthFailure::KeyUnknown) => return Ok(()),
                    outcome => outcome,
                }
            }
        };
        outcome.map(|_| ()).inspect_err(|_| tokens.counters.refused.add(1))
    }

    /// Checks `token`, and that it belongs to `claimed_user` unless that is empty.
    pub fn check(&self, token: Option<&Secret>, claimed_user: &str) -> TokenCheck {
        let tokens = match &self.method {
            AuthMethod::Trust => {
                let identity = Identity { user: claimed_user.to_owned(), expires_at_s: None };
                return TokenCheck::Done(usable_user(claimed_user).map(|()| identity));
            }
            AuthMethod::Jwt(tokens) => tokens,
        };
        let Some(token) = token else {
            return TokenCheck::Done(tokens.count(Err(AuthFailure::TokenMissing)));
        };
        if let TokenKeys::Secret(keys) = &tokens.keys {
            return TokenCheck::Done(tokens.count(tokens.verify(token, keys, claimed_user)));
        }
        let (tokens, token) = (Arc::clone(tokens), token.clone());
        let claimed_user = claimed_user.to_owned();
        TokenCheck::Pending(Box::pin(async move {
            let outcome = tokens.verify_in_task(&token, &claimed_user).await;
            tokens.count(outcome)
        }))
    }
}

impl TokenVerifier {
    fn verify(
        &self,
        token: &Secret,
        keys: &KeySet,
        claimed_user: &str,
    ) -> Result<Identity, AuthFailure> {
        let token = token.expose();
        let header = verify::header(token)?;
        verify::verify(token, &header, keys, &self.rules, claimed_user, unix_ms() / 1000)
    }

    async fn verify_in_task(
        &self,
        token: &Secret,
        claimed_user: &str,
    ) -> Result<Identity, AuthFailure> {
        match &self.keys {
            TokenKeys::Secret(keys) | TokenKeys::Public(keys) => {
                self.verify(token, keys, claimed_user)
            }
            TokenKeys::Published(jwks) => {
                let header = verify::header(token.expose())?;
                let keys = jwks.keys_for(&header).await.ok_or(AuthFailure::KeysUnavailable)?;
                self.verify(token, &keys, claimed_user)
            }
        }
    }

    fn count(&self, outcome: Result<Identity, AuthFailure>) -> Result<Identity, AuthFailure> {
        match &outcome {
            Ok(_) => self.counters.accepted.add(1),
            Err(AuthFailure::KeysUnavailable) => self.counters.keys_unavailable.add(1),
            Err(_) => self.counters.refused.add(1),
        }
        outcome
    }
}

/// Checks a user id by the rule of the upgrade parser for ids in a query.
fn usable_user(user: &str) -> Result<(), AuthFailure> {
    if user.is_empty() {
        return Err(AuthFailure::UserMissing);
    }
    if user.len() > ID_BYTES_MAX || user.chars().any(char::is_control) {
        return Err(AuthFailure::SubjectUnusable);
    }
    Ok(())
}
