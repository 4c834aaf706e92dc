//! What every floor of the service side needs of tokio.

pub mod bell;
