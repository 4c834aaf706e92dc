//! The members of conversations, and the sessions of users on this node.

pub mod beginnings;
pub mod current;
pub mod directory;
pub mod membership;
pub mod user_lists;
