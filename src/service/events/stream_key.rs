//! The one place that turns a conversation's id into the number the shards compare.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use crate::domain::ids::StreamKey;

/// Drawn once per process: an outsider cannot construct ids whose keys collide.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The key of a conversation: the same for the same id as long as the process lives.
pub fn stream_key(conversation: &str) -> StreamKey {
    StreamKey(HASHER.hash_one(conversation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_follows_the_id() {
        assert_eq!(stream_key("c-1"), stream_key("c-1"));
        assert_ne!(stream_key("c-1"), stream_key("c-2"));
    }
}
