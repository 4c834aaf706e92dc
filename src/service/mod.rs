//! The tokio side: users, conversations and back ends. Never touches a client socket.
//!
//! Six floors. A module imports only from its own folder and from the floors below it; no two
//! modules of a folder import each other in a circle (`tests/tree` checks both).
//!
//! | floor | folder | knows |
//! | --- | --- | --- |
//! | 6 | [`sessions`], [`streams`] | who is connected and may be; catch-up and presence; gRPC streams |
//! | 5 | [`routing`] | from a Kafka record to the sessions that receive it |
//! | 4 | [`members`] | who belongs to a conversation, which sessions a user has here |
//! | 3 | [`backends`] | the other services and Redis: clients, reconnection, outages |
//! | 2 | [`events`] | what a record says, and how each encoding writes it |
//! | 1 | [`runtime`] | what every floor needs of tokio |
//!
//! `sessions` and `streams` do not import each other.

pub mod backends;
pub mod events;
pub mod members;
pub mod routing;
pub mod runtime;
pub mod sessions;
pub mod streams;
