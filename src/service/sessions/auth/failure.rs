//! Why a client was not believed, and what it is told.

use crate::domain::command::Refusal;

/// Why a check failed. The texts go to the client: they help, and tell nothing of a token, a key
/// or what would have been right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthFailure {
    /// Neither the request nor a token names a user (contract §3).
    #[error("missing user_id or device_id")]
    UserMissing,
    /// No token where one is required.
    #[error(
        "access token required: send `Authorization: Bearer`, `?access_token=`, or the \
         subprotocol `bearer.<token>`"
    )]
    TokenMissing,
    /// Not a JWT.
    #[error("access token is malformed")]
    Malformed,
    /// Signed with an algorithm that the key is not for.
    #[error("access token is signed with an algorithm that is not accepted here")]
    AlgorithmRefused,
    /// No key of that id.
    #[error("access token is signed with a key that is not known here")]
    KeyUnknown,
    /// The signature is wrong.
    #[error("access token has a wrong signature")]
    SignatureWrong,
    /// `exp` is past, or missing.
    #[error("access token has expired: get a fresh one")]
    Expired,
    /// `exp` is missing: such a token would hold for ever.
    #[error("access token has no expiry (`exp`)")]
    ExpiryMissing,
    /// `nbf` is still to come.
    #[error("access token is not valid yet (`nbf`)")]
    NotYetValid,
    /// `iss` is another, or missing.
    #[error("access token comes from another issuer (`iss`)")]
    IssuerRefused,
    /// `aud` names others, or nobody.
    #[error("access token is meant for another audience (`aud`)")]
    AudienceRefused,
    /// `sub` is missing, or cannot be a user id.
    #[error("access token has no usable subject (`sub`)")]
    SubjectUnusable,
    /// The token is somebody else's.
    #[error("user_id is not the subject of the access token: leave it out, or send your own")]
    UserMismatch,
    /// The keys to check with could not be had.
    #[error("access tokens cannot be checked at the moment: try again")]
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
            | Self::NotYetValid
            | Self::IssuerRefused
            | Self::AudienceRefused
            | Self::SubjectUnusable => 401,
            Self::UserMismatch => 403,
            Self::KeysUnavailable => 503,
        }
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

/// When to try again after keys could not be had, seconds.
const KEYS_RETRY_AFTER_S: u32 = 5;
