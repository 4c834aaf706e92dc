//! Hashes conversation ids to the keys that shards compare.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use crate::domain::ids::{ConversationKey, ConversationPosition};

/// Seeded per process, so that an attacker cannot construct ids whose keys collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The key of a conversation. The same id has the same key for the lifetime of the process.
pub fn conversation_key(conversation: &str) -> ConversationKey {
    ConversationKey(HASHER.hash_one(conversation))
}

/// What identifies an event of the log that is no message: see
/// [`Event::position`](crate::domain::event::Event::position).
pub fn log_position(topic: &str, partition: i32, offset: i64) -> ConversationPosition {
    let conversation = ConversationKey(HASHER.hash_one((topic, partition)));
    ConversationPosition { conversation, sequence: offset }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_follows_the_id() {
        assert_eq!(conversation_key("c-1"), conversation_key("c-1"));
        assert_ne!(conversation_key("c-1"), conversation_key("c-2"));
        assert_eq!(log_position("t", 0, 7), log_position("t", 0, 7));
        assert_ne!(log_position("t", 0, 7).conversation, log_position("t", 1, 7).conversation);
        assert_ne!(log_position("t", 0, 7).conversation, conversation_key("t"));
    }
}
