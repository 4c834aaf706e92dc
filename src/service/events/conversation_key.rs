//! The one place that turns a conversation's id into the number the shards compare.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use crate::domain::ids::ConversationKey;

/// Drawn once per process: an outsider cannot construct ids whose keys collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The key of a conversation: the same for the same id as long as the process lives.
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
