//! Verifies a token's signature and claims.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Header, Validation};
use serde::Deserialize;

use super::keys::{KeySet, VerificationKey};
use super::{AuthFailure, Identity, usable_user};

/// Keys tried for one token. A token or key without an id fits all others of its algorithm.
const CANDIDATES_MAX: usize = 16;

/// Rules for claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimRules {
    /// `iss` must be this; `None`: any.
    pub issuer: Option<String>,
    /// `aud` must be or contain this; `None`: any.
    pub audience: Option<String>,
    /// Tolerance for `exp` and `nbf`, for clocks that differ.
    pub leeway: Duration,
}

#[derive(Deserialize)]
struct Claims {
    sub: Option<String>,
    iss: Option<String>,
    aud: Option<Audience>,
    exp: Option<NumericDate>,
    nbf: Option<NumericDate>,
    /// Only revocations need it, so one that is no number refuses no token.
    iat: Option<serde_json::Value>,
}

/// One audience or several (RFC 7519 §4.1.3).
#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

/// Unix time in seconds, possibly with a fraction (RFC 7519 §2).
#[derive(Clone, Copy, Deserialize)]
#[serde(transparent)]
struct NumericDate(f64);

impl NumericDate {
    /// Rounded down and saturated.
    fn seconds(self) -> u64 {
        self.0 as u64
    }

    /// Rounded up and saturated.
    fn seconds_up(self) -> u64 {
        self.0.ceil() as u64
    }
}

/// The unverified header of a token, to find its key.
pub(super) fn header(token: &str) -> Result<Header, AuthFailure> {
    let header = jsonwebtoken::decode_header(token).map_err(|error| match error.kind() {
        // `none`, and every algorithm that is not supported.
        ErrorKind::InvalidAlgorithmName => AuthFailure::AlgorithmRefused,
        ErrorKind::Json(error) if error.to_string().contains("unknown variant") => {
            AuthFailure::AlgorithmRefused
        }
        _ => AuthFailure::Malformed,
    })?;
    // RFC 7515 §4.1.11: extensions that must be supported; none is.
    if header.crit.is_some() { Err(AuthFailure::Malformed) } else { Ok(header) }
}

/// Verifies a token with the keys of all sets. The signature is checked first, so that only the holder of a valid
/// signature learns why a claim is refused.
pub(super) fn verify(
    token: &str,
    header: &Header,
    sets: &[Arc<KeySet>],
    rules: &ClaimRules,
    claimed_user: &str,
    unix_s: u64,
) -> Result<Identity, AuthFailure> {
    let (mut failure, mut is_known) = (AuthFailure::KeyUnknown, false);
    let of_id = sets.iter().flat_map(|keys| keys.of_id(header.kid.as_deref()));
    let of_algorithm = of_id.inspect(|_| is_known = true).filter(|key| key.algorithm == header.alg);
    for key in of_algorithm.take(CANDIDATES_MAX) {
        match claims(token, key) {
            Ok(claims) => return identity(claims, rules, claimed_user, unix_s),
            Err(why) => failure = why,
        }
    }
    match failure {
        AuthFailure::KeyUnknown if is_known => Err(AuthFailure::AlgorithmRefused),
        failure => Err(failure),
    }
}

/// Verifies the signature and returns the claims.
fn claims(token: &str, key: &VerificationKey) -> Result<Claims, AuthFailure> {
    let mut validation = Validation::new(key.algorithm);
    // The signature only: `identity` checks the claims, with the caller's time.
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation.required_spec_claims = HashSet::new();
    match jsonwebtoken::decode::<Claims>(token, &key.key, &validation) {
        Ok(token) => Ok(token.claims),
        Err(error) => Err(match error.kind() {
            ErrorKind::InvalidAlgorithm => AuthFailure::AlgorithmRefused,
            ErrorKind::InvalidSignature => AuthFailure::SignatureWrong,
            _ => AuthFailure::Malformed,
        }),
    }
}

fn identity(
    claims: Claims,
    rules: &ClaimRules,
    claimed_user: &str,
    unix_s: u64,
) -> Result<Identity, AuthFailure> {
    let leeway_s = rules.leeway.as_secs();
    let expires_at_s =
        claims.exp.ok_or(AuthFailure::ExpiryMissing)?.seconds().saturating_add(leeway_s);
    // "On or after which" it must not be accepted (RFC 7519 §4.1.4).
    if expires_at_s <= unix_s {
        return Err(AuthFailure::Expired);
    }
    if claims.nbf.is_some_and(|nbf| nbf.seconds_up() > unix_s.saturating_add(leeway_s)) {
        return Err(AuthFailure::NotYetValid);
    }
    if rules.issuer.is_some() && claims.iss != rules.issuer {
        return Err(AuthFailure::IssuerRefused);
    }
    if let Some(wanted) = &rules.audience {
        let meant = match &claims.aud {
            None => false,
            Some(Audience::One(one)) => one == wanted,
            Some(Audience::Several(several)) => several.contains(wanted),
        };
        if !meant {
            return Err(AuthFailure::AudienceRefused);
        }
    }
    let user = claims.sub.unwrap_or_default();
    usable_user(&user).map_err(|_| AuthFailure::SubjectUnusable)?;
    if !claimed_user.is_empty() && claimed_user != user {
        return Err(AuthFailure::UserMismatch);
    }
    let issued_at_s = claims.iat.and_then(|iat| iat.as_f64()).map(|iat| NumericDate(iat).seconds());
    Ok(Identity { user, expires_at_s: Some(expires_at_s), issued_at_s })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// "On or after" `exp` (RFC 7519 §4.1.4), and not before `nbf` (§4.1.5), to the second.
    #[test]
    fn token_is_valid_from_the_second_of_nbf_to_the_one_before_exp() {
        let whole = json!({ "sub": "alice", "nbf": 1_000, "exp": 2_000 });
        let fractions = json!({ "sub": "alice", "nbf": 1_000.5, "exp": 2_000.5 });
        for (claims, leeway_s, unix_s, expected) in [
            (&whole, 0, 999, Err(AuthFailure::NotYetValid)),
            (&whole, 0, 1_000, Ok(())),
            (&whole, 0, 1_999, Ok(())),
            (&whole, 0, 2_000, Err(AuthFailure::Expired)),
            (&whole, 30, 969, Err(AuthFailure::NotYetValid)),
            (&whole, 30, 970, Ok(())),
            (&whole, 30, 2_029, Ok(())),
            (&whole, 30, 2_030, Err(AuthFailure::Expired)),
            (&fractions, 0, 1_000, Err(AuthFailure::NotYetValid)),
            (&fractions, 0, 1_001, Ok(())),
        ] {
            let leeway = Duration::from_secs(leeway_s);
            let rules = ClaimRules { issuer: None, audience: None, leeway };
            let read = serde_json::from_value(claims.clone()).unwrap();
            let found = identity(read, &rules, "", unix_s).map(|_| ());
            assert_eq!(found, expected, "{claims} {leeway_s} {unix_s}");
        }
    }
}
