//! Authentication: checks tokens (contract §7), for WebSocket and gRPC.
//!
//! | key source | algorithm | checked |
//! | --- | --- | --- |
//! | secrets (`JWT_SECRET`, `JWT_SECRET_FILE`) | HS256 | at once: takes microseconds |
//! | public keys in a PEM file | RS256, ES256 or EdDSA, by the kind of key | in a task: takes hundreds of microseconds |
//! | public keys at URLs (JWKS) | the same | in a task that may wait for a fetch |
//!
//! There may be several of each, all of which count: keys are rotated with an overlap.
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

use std::sync::{Arc, RwLock};

use jsonwebtoken::{Algorithm, Header};

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
    /// When the token was issued (`iat`), Unix time in seconds, rounded down. `None`: it does not say, or there is none.
    pub issued_at_s: Option<u64>,
}

/// Keys that the node has itself. They may be replaced while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnKeys {
    /// Secrets, for HS256.
    pub secrets: Vec<Secret>,
    /// The content of a PEM file with one or more public keys.
    pub pem: Option<Vec<u8>>,
}

impl OwnKeys {
    /// Whether all of them can be used.
    ///
    /// # Errors
    /// A secret is empty, or the PEM holds no usable public key.
    pub fn check(&self) -> Result<(), KeyError> {
        KeySet::of_own(self).map(|_| ())
    }
}

crate::counters! {
    /// Counters of token checks.
    pub struct AuthCounters of SharedCounter {
        Counter accepted: "Tokens accepted",
        Counter refused: "Tokens refused or missing",
        Counter keys_unavailable: "Tokens not checked because no keys could be fetched",
        Counter key_reloads: "Own keys replaced while the node ran",
        Counter key_reload_failures: "Own keys that could not be read again; the old ones stay in use",
        Counter revocation_reloads: "Changes of the file of revocations that were applied while the node ran",
        Counter revocation_reload_failures: "Changes of the file of revocations that could not be read; the earlier ones stay",
        Gauge development_secret: "1 if tokens may be signed with the secret of RealChat's documents",
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
    own: RwLock<Arc<KeySet>>,
    published: Vec<Arc<Jwks>>,
    rules: ClaimRules,
    counters: Arc<AuthCounters>,
}

impl Authenticator {
    /// Trusts every client (`AUTH_MODE=trust`).
    pub fn trust() -> Arc<Self> {
        Arc::new(Self { method: AuthMethod::Trust })
    }

    /// Checks tokens (`AUTH_MODE=jwt`). For each of `published`, a task on the current runtime fetches its keys.
    ///
    /// # Errors
    /// A secret is empty, or the PEM holds no usable public key.
    pub fn jwt(
        own: &OwnKeys,
        published: Vec<JwksConfig>,
        rules: ClaimRules,
        counters: Arc<AuthCounters>,
    ) -> Result<Arc<Self>, KeyError> {
        signature::install();
        let own = RwLock::new(Arc::new(KeySet::of_own(own)?));
        let spawn = |config| Jwks::spawn(config, Arc::clone(&counters));
        let published = published.into_iter().map(spawn).collect();
        let tokens = Arc::new(TokenVerifier { own, published, rules, counters });
        Ok(Arc::new(Self { method: AuthMethod::Jwt(tokens) }))
    }

    /// Replaces the node's own keys. Sessions stay: they have been checked.
    ///
    /// # Errors
    /// As for [`Authenticator::jwt`]. The old keys stay in use.
    pub fn replace_own(&self, own: &OwnKeys) -> Result<(), KeyError> {
        if let AuthMethod::Jwt(tokens) = &self.method {
            let keys = Arc::new(KeySet::of_own(own)?);
            *tokens.own.write().expect("no holder panics") = keys;
        }
        Ok(())
    }

    /// Number of publishers whose keys were never fetched. Until it is 0, tokens may be valid that cannot be checked.
    pub fn publishers_not_fetched(&self) -> usize {
        match &self.method {
            AuthMethod::Trust => 0,
            AuthMethod::Jwt(tokens) => tokens.not_fetched(),
        }
    }

    /// Judges `token` with the keys at hand, before a user is claimed. `Ok`: it is valid, or its key has to be fetched
    /// first, so that only [`Authenticator::check`] can tell.
    ///
    /// # Errors
    /// It is missing or invalid. That is counted; a valid one is not, because it is checked again.
    pub fn judge(&self, token: Option<&Secret>) -> Result<(), AuthFailure> {
        let AuthMethod::Jwt(tokens) = &self.method else { return Ok(()) };
        let judged = token.ok_or(AuthFailure::TokenMissing).and_then(|token| {
            let header = verify::header(token.expose())?;
            match tokens.verify(token, &header, "") {
                Err(why) if tokens.may_be_new(&header, why) => Ok(()),
                outcome => outcome.map(|_| ()),
            }
        });
        judged.inspect_err(|_| tokens.counters.refused.add(1))
    }

    /// Checks `token`, and that it belongs to `claimed_user` unless that is empty.
    pub fn check(&self, token: Option<&Secret>, claimed_user: &str) -> TokenCheck {
        let tokens = match &self.method {
            AuthMethod::Trust => {
                let user = claimed_user.to_owned();
                let identity = Identity { user, expires_at_s: None, issued_at_s: None };
                return TokenCheck::Done(usable_user(claimed_user).map(|()| identity));
            }
            AuthMethod::Jwt(tokens) => tokens,
        };
        let done = |outcome| TokenCheck::Done(tokens.count(outcome));
        let Some(token) = token else { return done(Err(AuthFailure::TokenMissing)) };
        let header = match verify::header(token.expose()) {
            Ok(header) => header,
            Err(why) => return done(Err(why)),
        };
        if header.alg == Algorithm::HS256 {
            return done(tokens.verify(token, &header, claimed_user));
        }
        let (tokens, token) = (Arc::clone(tokens), token.clone());
        let claimed_user = claimed_user.to_owned();
        TokenCheck::Pending(Box::pin(async move {
            let outcome = tokens.verify_in_task(&token, &header, &claimed_user).await;
            tokens.count(outcome)
        }))
    }
}

impl TokenVerifier {
    /// Verifies with the keys at hand.
    fn verify(
        &self,
        token: &Secret,
        header: &Header,
        claimed_user: &str,
    ) -> Result<Identity, AuthFailure> {
        let own = Arc::clone(&self.own.read().expect("no holder panics"));
        let published = self.published.iter().filter_map(|jwks| jwks.current());
        let sets: Vec<_> = std::iter::once(own).chain(published).collect();
        let (token, now_s) = (token.expose(), unix_ms() / 1000);
        verify::verify(token, header, &sets, &self.rules, claimed_user, now_s)
    }

    async fn verify_in_task(
        &self,
        token: &Secret,
        header: &Header,
        claimed_user: &str,
    ) -> Result<Identity, AuthFailure> {
        let seen: Vec<_> = self.published.iter().map(|jwks| jwks.current()).collect();
        let mut outcome = self.verify(token, header, claimed_user);
        if let Err(why) = outcome
            && why.is_for_lack_of_a_key()
        {
            let mut is_changed = false;
            for (jwks, seen) in self.published.iter().zip(&seen) {
                is_changed |= jwks.fetch_newer_than(seen.as_ref()).await;
            }
            if is_changed {
                outcome = self.verify(token, header, claimed_user);
            }
        }
        match outcome {
            Err(why) if why.is_for_lack_of_a_key() && self.not_fetched() > 0 => {
                Err(AuthFailure::KeysUnavailable)
            }
            outcome => outcome,
        }
    }

    fn not_fetched(&self) -> usize {
        self.published.iter().filter(|jwks| jwks.current().is_none()).count()
    }

    /// Whether a token that was refused may be signed with a key that [`TokenVerifier::verify_in_task`] would fetch, or cannot be
    /// checked yet.
    fn may_be_new(&self, header: &Header, why: AuthFailure) -> bool {
        why.is_for_lack_of_a_key()
            && header.alg != Algorithm::HS256
            && (self.not_fetched() > 0 || self.published.iter().any(|jwks| jwks.would_fetch()))
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
