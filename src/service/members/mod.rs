//! Who belongs to a conversation, and which sessions a user has on this node.

pub mod directory;
pub mod membership;
