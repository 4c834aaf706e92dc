//! The tokio side: users, conversations and back ends. Never touches a client socket.
//!
//! Seven floors. A module imports only from its own folder and from lower floors, and modules of a folder
//! have no import cycles. `tests/tree` checks both.
//!
//! | floor | folder | contents |
//! | --- | --- | --- |
//! | 7 | [`sessions`], [`streams`] | handshakes, tokens, catch-up, presence; gRPC streams |
//! | 6 | [`routing`] | from a Kafka record to its recipients, and back to the committed offset |
//! | 5 | [`cluster`] | what the nodes tell each other: who is where, what is handed over |
//! | 4 | [`members`] | the members of conversations, the sessions of users on this node |
//! | 3 | [`backends`] | clients of the other services and of Redis |
//! | 2 | [`events`], [`tls`] | decoding and encoding of events; certificates, session tickets, handshakes |
//! | 1 | [`runtime`] | what every floor shares: doorbell for tokio, backoff, steady clock, caches, places for connections |
//!
//! `sessions` and `streams` do not import each other.

pub mod backends;
pub mod cluster;
pub mod events;
pub mod members;
pub mod routing;
pub mod runtime;
pub mod sessions;
pub mod streams;
pub mod tls;
