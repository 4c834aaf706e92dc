//! Keys that verify tokens. The kind of a key determines its only algorithm, and the token's header must
//! match it. So a public key is never used as an HMAC secret.

use jsonwebtoken::jwk::{
    AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse,
};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind};

use super::OwnKeys;

/// Keys used of one set; the rest of a larger set is ignored.
const KEYS_MAX: usize = 64;
/// Bytes of an uncompressed point of P-256 (SEC 1, §2.3.3).
const P256_POINT_BYTES: usize = 65;
/// Bytes of an Ed25519 public key (RFC 8032).
const ED25519_BYTES: usize = 32;

/// Shortest modulus of an RSA key: 2048 bits (RFC 7518 §3.3).
const RSA_MODULUS_BYTES_MIN: usize = 256;

/// Why a key cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is a private key. Only public keys are accepted.
    #[error("the key file holds a private key: provide only the public key")]
    Private,
    /// It is not PEM, or not of a supported kind.
    #[error("the key file holds no PEM public key of type RSA, EC P-256 or Ed25519")]
    Unknown,
    /// ring verifies RSA keys of 2048 to 8192 bits.
    #[error("the key file holds an RSA key of fewer than 2048 bits: create a longer one")]
    RsaTooShort,
    /// The secret is empty.
    #[error("the secret is empty")]
    Empty,
}

/// A key and its algorithm.
#[derive(Clone)]
pub(super) struct VerificationKey {
    pub(super) id: Option<String>,
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
}

/// The keys of one source.
#[derive(Clone, Default)]
pub(super) struct KeySet {
    keys: Vec<VerificationKey>,
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.keys.len())
    }
}

impl KeySet {
    /// The keys that the node has itself.
    pub(super) fn of_own(own: &OwnKeys) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for secret in &own.secrets {
            if secret.expose().is_empty() {
                return Err(KeyError::Empty);
            }
            let key = DecodingKey::from_secret(secret.expose().as_bytes());
            keys.push(VerificationKey { id: None, algorithm: Algorithm::HS256, key });
        }
        if let Some(pem) = &own.pem {
            keys.extend(of_pem(pem)?);
        }
        Ok(Self { keys })
    }

    /// The usable keys of a JWKS document. Others are ignored (RFC 7517 §5).
    pub(super) fn of_jwks(document: &str) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Document {
            keys: Vec<serde_json::Value>,
        }
        let document: Document = serde_json::from_str(document).ok()?;
        let keys: Vec<_> = (document.keys.into_iter())
            .filter_map(|key| of_jwk(&serde_json::from_value(key).ok()?))
            .take(KEYS_MAX)
            .collect();
        (!keys.is_empty()).then_some(Self { keys })
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The keys that a token with this key id may be signed with: those of the id, and those without one. Without an
    /// id, all.
    pub(super) fn of_id(&self, wanted: Option<&str>) -> impl Iterator<Item = &VerificationKey> {
        self.keys.iter().filter(move |key| match (&key.id, wanted) {
            (Some(id), Some(wanted)) => id == wanted,
            (None, _) | (_, None) => true,
        })
    }
}

/// All public keys of a PEM file. There are several during a rotation.
fn of_pem(pem: &[u8]) -> Result<Vec<VerificationKey>, KeyError> {
    let text = std::str::from_utf8(pem).map_err(|_| KeyError::Unknown)?;
    let mut keys = Vec::new();
    for (at, _) in text.match_indices("-----BEGIN ").take(KEYS_MAX) {
        let rest = &text[at..];
        let end = rest[1..].find("-----BEGIN ").map_or(rest.len(), |next| next + 1);
        keys.push(of_pem_block(&rest[..end])?);
    }
    if keys.is_empty() { Err(KeyError::Unknown) } else { Ok(keys) }
}

fn of_pem_block(block: &str) -> Result<VerificationKey, KeyError> {
    if block.lines().next().is_some_and(|label| label.contains("PRIVATE")) {
        return Err(KeyError::Private);
    }
    let pem = block.as_bytes();
    let (algorithm, key) = if let Ok(key) = DecodingKey::from_ed_pem(pem) {
        (Algorithm::EdDSA, key)
    } else if let Ok(key) = DecodingKey::from_ec_pem(pem) {
        (Algorithm::ES256, key)
    } else if let Ok(key) = DecodingKey::from_rsa_pem(pem) {
        (Algorithm::RS256, key)
    } else {
        return Err(KeyError::Unknown);
    };
    let length = key.try_get_as_bytes().map_or(0, <[u8]>::len);
    match algorithm {
        Algorithm::ES256 if length != P256_POINT_BYTES => Err(KeyError::Unknown),
        Algorithm::EdDSA if length != ED25519_BYTES => Err(KeyError::Unknown),
        Algorithm::RS256 if length < RSA_MODULUS_BYTES_MIN => Err(KeyError::RsaTooShort),
        _ => Ok(VerificationKey { id: None, algorithm, key }),
    }
}

fn of_jwk(jwk: &Jwk) -> Option<VerificationKey> {
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            Algorithm::ES256
        }
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            Algorithm::EdDSA
        }
        // Other curves, secrets (which must not be published), and unknown kinds.
        _ => return None,
    };
    let common = &jwk.common;
    let for_other_use =
        common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature);
    let for_other_algorithm = common.key_algorithm.is_some_and(|named| {
        !matches!(
            (named, algorithm),
            (KeyAlgorithm::RS256, Algorithm::RS256)
                | (KeyAlgorithm::ES256, Algorithm::ES256)
                | (KeyAlgorithm::EdDSA, Algorithm::EdDSA)
        )
    });
    // RFC 7517 §4.3.
    let for_other_operations = common
        .key_operations
        .as_ref()
        .is_some_and(|operations| !operations.contains(&KeyOperations::Verify));
    if for_other_use || for_other_algorithm || for_other_operations {
        return None;
    }
    let mut key = DecodingKey::from_jwk(jwk).ok()?;
    if let DecodingKeyKind::RsaModulusExponent { n, e } = key.kind() {
        // Some publishers begin the numbers with a zero byte, as DER does. ring takes none.
        let [n, e] = [n, e].map(|number| &number[number.iter().take_while(|b| **b == 0).count()..]);
        if n.len() < RSA_MODULUS_BYTES_MIN {
            return None;
        }
        key = DecodingKey::from_rsa_raw_components(n, e);
    }
    Some(VerificationKey { id: common.key_id.clone(), algorithm, key })
}
