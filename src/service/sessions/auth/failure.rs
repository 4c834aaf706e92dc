//! Why a token check failed, and the answer to the client.

use crate::domain::command::Refusal;

/// Why a check failed. The texts go to the client. They reveal nothing about tokens, keys or expected
/// values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthFailure {
    /// Neither the request nor a token names a user (contract §3).
    #[error("missing user_id or device_id")]
    UserMissing,
    /// The token is missing.
    #[error(
        "access token required: send `Authorization: Bearer <token>` (header or gRPC metadata); over \
         WebSocket also `?access_token=<token>` or the subprotocol `bearer.<token>`"
    )]
    TokenMissing,
    /// Not a JWT.
    #[error("access token is malformed")]
    Malformed,
    /// The token's algorithm is not the key's.
    #[error("access token is signed with an algorithm that is not accepted")]
    AlgorithmRefused,
    /// There is no key of that id.
    #[error("access token is signed with an unknown key")]
    KeyUnknown,
    /// The signature is wrong.
    #[error("access token has a wrong signature")]
    SignatureWrong,
    /// `exp` has passed.
    #[error("access token has expired: get a fresh one")]
    Expired,
    /// `exp` is missing: such a token would never expire.
    #[error("access token has no expiry (`exp`)")]
    ExpiryMissing,
    /// An operator has revoked it.
    #[error("access token was revoked: get a fresh one")]
    Revoked,
    /// `nbf` has not passed yet.
    #[error("access token is not valid yet (`nbf`)")]
    NotYetValid,
    /// `iss` is wrong or missing.
    #[error("access token comes from another issuer (`iss`)")]
    IssuerRefused,
    /// `aud` is wrong or missing.
    #[error("access token is meant for another audience (`aud`)")]
    AudienceRefused,
    /// `sub` is missing or not a valid user id.
    #[error("access token has no usable subject (`sub`)")]
    SubjectUnusable,
    /// The token belongs to another user.
    #[error("user_id is not the subject of the access token: omit it, or send your own")]
    UserMismatch,
    /// There are no keys to check with.
    #[error(
        "access tokens cannot be checked yet: their keys could not be fetched so far; try again"
    )]
    KeysUnavailable,
}

impl AuthFailure {
    /// The HTTP status of the answer.
    pub fn status(self) -> u16 {
        match self {
            Self::UserMissing => 400,
            Self::TokenMissing
            | Self::Malformed
            | Self::AlgorithmRefused
            | Self::KeyUnknown
            | Self::SignatureWrong
            | Self::Expired
            | Self::ExpiryMissing
            | Self::Revoked
            | Self::NotYetValid
            | Self::IssuerRefused
            | Self::AudienceRefused
            | Self::SubjectUnusable => 401,
            Self::UserMismatch => 403,
            Self::KeysUnavailable => 503,
        }
    }

    /// Whether a key that the publisher has added or replaced since may verify the token.
    pub(super) fn is_for_lack_of_a_key(self) -> bool {
        matches!(self, Self::KeyUnknown | Self::AlgorithmRefused | Self::SignatureWrong)
    }

    /// The answer to the handshake.
    pub fn refusal(self) -> Refusal {
        Refusal {
            status: self.status(),
            body: self.to_string().into(),
            retry_after_s: matches!(self, Self::KeysUnavailable).then_some(KEYS_RETRY_AFTER_S),
        }
    }
}

/// When to retry while there are no keys, seconds.
const KEYS_RETRY_AFTER_S: u32 = 5;
