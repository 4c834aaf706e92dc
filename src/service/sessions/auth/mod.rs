//! Who a client is: tokens are checked here (contract §7), for WebSocket and gRPC alike.
//!
//! | key source | algorithm | checked |
//! | --- | --- | --- |
//! | secret (`JWT_SECRET`) | HS256 | at once: some microseconds |
//! | public keys in a PEM file | RS256, ES256 or EdDSA, by the kind of key | in a task: some hundred microseconds |
//! | public keys at a URL (JWKS) | likewise | in a task, which may wait for a fetch |
//!
//! A token needs `sub` (the user) and `exp`; `nbf`, and `iss` and `aud` where configured, must fit.
//! `user_id` of the request may be left out, and must be `sub` if it is given.

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

/// Whom a client has been found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: String,
    /// When that ceases to hold, Unix time in seconds, the leeway added; `None`: never.
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
    /// What became of tokens.
    pub struct AuthCounters of SharedCounter {
        Counter accepted: "Tokens accepted",
        Counter refused: "Tokens refused or missing",
        Counter keys_unavailable: "Tokens that could not be checked because no keys could be fetched",
        Counter jwks_fetches: "Fetches of published keys",
        Counter jwks_failures: "Fetches of published keys that brought none",
        Gauge jwks_keys: "Published keys in use",
    }
}

/// The outcome of a check.
pub enum TokenCheck {
    /// Known at once.
    Done(Result<Identity, AuthFailure>),
    /// To be waited for, apart from whoever must not wait.
    Pending(BoxFuture<Result<Identity, AuthFailure>>),
}

/// Checks tokens. Shared by all who admit sessions.
#[derive(Debug)]
pub struct Authenticator {
    method: AuthMethod,
}

#[derive(Debug)]
enum AuthMethod {
    /// Everybody is who they say they are: for trying the program out, or behind a gateway that
    /// has checked already.
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
    /// Believes every client (`AUTH_MODE=trust`).
    pub fn trust() -> Arc<Self> {
        Arc::new(Self { method: AuthMethod::Trust })
    }

    /// Believes tokens (`AUTH_MODE=jwt`). Published keys are fetched by a task on the current
    /// runtime.
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

    /// Whether tokens can be checked: for readiness. Not before published keys have been fetched
    /// once.
    pub fn is_ready(&self) -> bool {
        match &self.method {
            AuthMethod::Trust => true,
            AuthMethod::Jwt(tokens) => match &tokens.keys {
                TokenKeys::Secret(_) | TokenKeys::Public(_) => true,
                TokenKeys::Published(jwks) => jwks.current().is_some(),
            },
        }
    }

    /// Who the bearer of `token` is, if that is `claimed_user`; an empty claim leaves it to the
    /// token.
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
            let outcome = tokens.verify_apart(&token, &claimed_user).await;
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

    async fn verify_apart(
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

/// Whether an id can name a user here: the rule that the upgrade parser has for ids in a query.
fn usable_user(user: &str) -> Result<(), AuthFailure> {
    if user.is_empty() {
        return Err(AuthFailure::UserMissing);
    }
    if user.len() > ID_BYTES_MAX || user.chars().any(char::is_control) {
        return Err(AuthFailure::SubjectUnusable);
    }
    Ok(())
}
