//! Characters that ids must not contain on a node with a registry.
//!
//! A registry keeps a session under `session:{user}:{device}` (contract §4). User `a:b` on device `c` and
//! user `a` on device `b:c` would share a key, and each could close the other's session. A user without
//! `:` would be enough to tell the two apart. A device must not contain it either, because other services
//! read these keys too: one that splits at the last `:` would take device `b:c` of user `a` for device `c`
//! of user `a:b`. Without `:` in both, every reader sees the same two ids.
//!
//! Redis Cluster reads braces as a hash tag, which alone decides the slot of a key. Without braces in the
//! ids, a registration and its fence (`backends::redis::fence`) can be given the same slot.
//!
//! `presence:user:{user}:devices` is unambiguous with any user. Ids that are empty, too long, or contain
//! control characters are refused before, on every node.

/// The characters.
const RESERVED: [char; 3] = [':', '{', '}'];

/// Which of the two ids contains a reserved character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservedIn {
    /// The user id.
    User,
    /// The device id.
    Device,
}

impl ReservedIn {
    /// `None`: the ids have a registry key of their own.
    pub(super) fn find(user: &str, device: &str) -> Option<Self> {
        if user.contains(RESERVED) {
            Some(Self::User)
        } else if device.contains(RESERVED) {
            Some(Self::Device)
        } else {
            None
        }
    }

    /// What the client is told.
    pub fn reason(self) -> &'static str {
        match self {
            Self::User => {
                "user_id must not contain ':', '{' or '}': another user's session could have the \
                 same registry key"
            }
            Self::Device => {
                "device_id must not contain ':', '{' or '}': another user's session could have the \
                 same registry key"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_that_could_share_a_key_are_named() {
        assert_eq!(ReservedIn::find("a:b", "c"), Some(ReservedIn::User));
        assert_eq!(ReservedIn::find("a", "b:c"), Some(ReservedIn::Device));
        assert_eq!(ReservedIn::find("a}", "b"), Some(ReservedIn::User));
        assert_eq!(ReservedIn::find("a", "{b}"), Some(ReservedIn::Device));
        let uuid = "6f1c1d4e-8a3b-4b51-9a43-5c8f3c1f0e21";
        for id in [uuid, "Jürgen M", "auth0|5f7c", "me@example.com", "a/b", "a%3Ab", "：", "*"] {
            assert_eq!(ReservedIn::find(id, id), None, "{id}");
        }
    }

    proptest! {
        /// Promise: “No two sessions share a registry key.”
        #[test]
        fn accepted_ids_have_keys_of_their_own(
            pairs in prop::collection::vec(("[ab:{}]{1,3}", "[ab:{}]{1,3}"), 1..200),
        ) {
            let mut owners = HashMap::new();
            for (user, device) in pairs {
                if ReservedIn::find(&user, &device).is_none() {
                    let key = format!("session:{user}:{device}");
                    let ids = (user, device);
                    let owner = owners.entry(key).or_insert_with(|| ids.clone());
                    prop_assert_eq!(&*owner, &ids);
                }
            }
        }
    }
}
