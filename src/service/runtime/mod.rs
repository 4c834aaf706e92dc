//! Building blocks that every floor of the service side uses.

pub mod backoff;
pub mod bell;
pub mod cache;
pub mod clock;
pub mod places;
