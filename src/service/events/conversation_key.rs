//! Hashes conversation ids to the keys that shards compare.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use crate::domain::ids::ConversationKey;

/// Seeded per process, so that an attacker cannot construct ids whose keys collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The key of a conversation. The same id has the same key for the lifetime of the process.
pub fn conversation_key(conversation: &str) -> ConversationKey {
    ConversationKey(HASHER.hash_one(conversation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_follows_the_id() {
        assert_eq!(conversation_key("c-1"), conversation_key("c-1"));
        assert_ne!(conversation_key("c-1"), conversation_key("c-2"));
    }
}
