//! Who a client is: tokens are checked here (contract §7), for WebSocket and gRPC alike.

mod failure;

use std::sync::Arc;

pub use failure::AuthFailure;

use crate::domain::command::Secret;
use crate::domain::limits::ID_BYTES_MAX;
use crate::service::ports::BoxFuture;

/// Whom a client has been found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: String,
    /// When that ceases to hold, Unix time in seconds, the leeway added; `None`: never.
    pub expires_at_s: Option<u64>,
}

/// The outcome of a check.
pub enum Checked {
    /// Known at once.
    Now(Result<Identity, AuthFailure>),
    /// To be waited for, apart from whoever must not wait.
    Later(BoxFuture<Result<Identity, AuthFailure>>),
}

/// Checks tokens. Shared by all who admit sessions.
#[derive(Debug)]
pub struct Authenticator {
    method: Method,
}

#[derive(Debug)]
enum Method {
    /// Everybody is who they say they are: for trying the program out, or behind a gateway that
    /// has checked already.
    Trust,
}

impl Authenticator {
    /// Believes every client (`AUTH_MODE=trust`).
    pub fn trust() -> Arc<Self> {
        Arc::new(Self { method: Method::Trust })
    }

    /// Who the bearer of `token` is, if that is `claimed_user`; an empty claim leaves it to the
    /// token.
    pub fn check(&self, token: Option<&Secret>, claimed_user: &str) -> Checked {
        let _ = token;
        match self.method {
            Method::Trust => Checked::Now(
                usable_user(claimed_user)
                    .map(|()| Identity { user: claimed_user.to_owned(), expires_at_s: None }),
            ),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_believes_the_claim_but_needs_one() {
        let auth = Authenticator::trust();
        let Checked::Now(found) = auth.check(None, "alice") else { panic!("not at once") };
        assert_eq!(found, Ok(Identity { user: "alice".into(), expires_at_s: None }));
        let Checked::Now(found) = auth.check(None, "") else { panic!("not at once") };
        assert_eq!(found, Err(AuthFailure::UserMissing));
    }
}
