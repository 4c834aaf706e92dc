//! Which tokens are refused although they are valid: those that were issued before a moment.

use std::collections::HashMap;
use std::time::Duration;

/// Users whose tokens are revoked. At this number, further ones are refused.
pub const USERS_REVOKED_MAX: usize = 100_000;
/// How often revocations are looked through for those that are over, seconds.
const EXPIRY_INTERVAL_S: u64 = 60;

/// How far ahead of this node's clock the moment of a revocation may be, seconds: the clocks of the auth service and of
/// the operator may differ from it.
const AHEAD_S_MAX: u64 = 60;

/// The tokens that a revocation concerns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RevokedTokens {
    /// Whose; `None`: everybody's.
    pub user: Option<Box<str>>,
    /// Those that were issued earlier, Unix time in seconds, and those that do not say when.
    pub before_s: u32,
}

impl RevokedTokens {
    /// # Errors
    /// The moment is in the future: fresh tokens would be refused until then.
    pub fn new(user: Option<&str>, before_s: u64, now_s: u64) -> Result<Self, FutureMoment> {
        if before_s > now_s.saturating_add(AHEAD_S_MAX) {
            return Err(FutureMoment);
        }
        let before_s = u32::try_from(before_s).unwrap_or(u32::MAX);
        Ok(Self { user: user.map(Box::from), before_s })
    }
}

/// The moment of a revocation is in the future.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is in the future: fresh tokens would be refused until then")]
pub struct FutureMoment;

/// There are [`USERS_REVOKED_MAX`] users already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the tokens of {USERS_REVOKED_MAX} users are revoked on this node already: revoke those of everybody instead"
)]
pub struct RevocationsFull;

/// The revocations of one node. They are forgotten when it stops.
#[derive(Debug)]
pub(super) struct Revocations {
    kept_s: u64,
    of_everybody: Option<Revocation>,
    of_users: HashMap<Box<str>, Revocation>,
    expired_s: u64,
}

/// Unix times in seconds.
#[derive(Clone, Copy, Debug)]
struct Revocation {
    /// Tokens that were issued earlier are revoked.
    before_s: u32,
    until_s: u64,
}

impl Revocations {
    pub(super) fn new(kept: Duration) -> Self {
        let (of_everybody, of_users) = (None, HashMap::new());
        Self { kept_s: kept.as_secs(), of_everybody, of_users, expired_s: 0 }
    }

    /// Revokes these tokens. A later moment of an earlier revocation stays.
    pub(super) fn add(
        &mut self,
        RevokedTokens { user, before_s }: &RevokedTokens,
        now_s: u64,
    ) -> Result<(), RevocationsFull> {
        let known = match user {
            None => self.of_everybody.as_ref(),
            Some(user) => self.of_users.get(user),
        };
        if user.is_some() && known.is_none() && self.of_users.len() >= USERS_REVOKED_MAX {
            return Err(RevocationsFull);
        }
        let before_s = (*before_s).max(known.map_or(0, |known| known.before_s));
        let new = Revocation { before_s, until_s: now_s.saturating_add(self.kept_s) };
        match user {
            None => self.of_everybody = Some(new),
            Some(user) => {
                self.of_users.insert(user.clone(), new);
            }
        }
        Ok(())
    }

    /// Whether a token of this user is revoked. `issued_s` is 0 if the token does not say when it was issued.
    pub(super) fn cover(&self, user: &str, issued_s: u32) -> bool {
        let is_older = |it: &Revocation| issued_s < it.before_s;
        self.of_everybody.as_ref().is_some_and(is_older)
            || self.of_users.get(user).is_some_and(is_older)
    }

    /// Forgets those that were kept long enough. To be called at each tick.
    pub(super) fn expire(&mut self, now_s: u64) {
        if now_s < self.expired_s.saturating_add(EXPIRY_INTERVAL_S) {
            return;
        }
        self.expired_s = now_s;
        self.of_everybody = self.of_everybody.filter(|it| it.until_s > now_s);
        self.of_users.retain(|_, it| it.until_s > now_s);
        if self.of_users.is_empty() {
            self.of_users.shrink_to_fit();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.of_users.len() + usize::from(self.of_everybody.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Duration = Duration::from_secs(100);

    fn of(user: Option<&str>, before_s: u64) -> RevokedTokens {
        RevokedTokens::new(user, before_s, before_s).unwrap()
    }

    #[test]
    fn moment_is_at_most_a_little_ahead() {
        assert!(RevokedTokens::new(None, 1_060, 1_000).is_ok());
        assert_eq!(RevokedTokens::new(None, 1_061, 1_000), Err(FutureMoment));
    }

    #[test]
    fn older_tokens_of_the_user_or_of_everybody_are_covered() {
        let mut revocations = Revocations::new(KEPT);
        assert!(!revocations.cover("alice", 0));
        revocations.add(&of(Some("alice"), 1_000), 1_000).unwrap();
        for (user, issued_s, expected) in
            [("alice", 999, true), ("alice", 1_000, false), ("alice", 0, true), ("bob", 999, false)]
        {
            assert_eq!(revocations.cover(user, issued_s), expected, "{user} {issued_s}");
        }
        revocations.add(&of(None, 500), 1_000).unwrap();
        assert!(revocations.cover("bob", 499) && !revocations.cover("bob", 500));
        assert!(revocations.cover("alice", 999), "that of the user stays");
        assert_eq!(revocations.len(), 2);
    }

    #[test]
    fn earlier_moment_does_not_lift_a_later_one() {
        let mut revocations = Revocations::new(KEPT);
        revocations.add(&of(Some("alice"), 1_000), 1_000).unwrap();
        revocations.add(&of(Some("alice"), 900), 1_000).unwrap();
        assert!(revocations.cover("alice", 950));
    }

    #[test]
    fn revocation_is_kept_for_its_time_from_its_last_request() {
        let mut revocations = Revocations::new(KEPT);
        revocations.add(&of(Some("alice"), 1_000), 1_000).unwrap();
        revocations.add(&of(None, 1_000), 1_000).unwrap();
        revocations.add(&of(Some("bob"), 1_000), 1_090).unwrap();
        revocations.expire(1_099);
        assert_eq!(revocations.len(), 3);
        revocations.expire(1_160);
        assert!(!revocations.cover("alice", 5) && revocations.cover("bob", 5));
        revocations.expire(1_220);
        assert_eq!(revocations.len(), 0);
    }

    #[test]
    fn further_users_are_refused_at_the_limit_but_everybody_is_not() {
        let mut revocations = Revocations::new(KEPT);
        for user in 0..USERS_REVOKED_MAX {
            revocations.add(&of(Some(&user.to_string()), 10), 10).unwrap();
        }
        assert_eq!(revocations.add(&of(Some("alice"), 10), 10), Err(RevocationsFull));
        assert_eq!(revocations.add(&of(Some("7"), 20), 10), Ok(()), "known already");
        assert_eq!(revocations.add(&of(None, 10), 10), Ok(()));
        revocations.expire(1_000);
        assert_eq!(revocations.add(&of(Some("alice"), 10), 1_000), Ok(()));
    }
}
