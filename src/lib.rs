//! Delivery holds the client connections of a RealChat back end: it reads events from Kafka and
//! pushes each one to every connected device of every member of its conversation. It stores
//! nothing.
//!
//! # The map
//!
//! ```text
//!            clients (WebSocket)                          clients (gRPC Connect)
//!                  │ TCP                                         │
//!  ┌───────────────▼────────────────┐   to shard    ┌────────────▼─────────────────────┐
//!  │ shard 0..N-1: one OS thread,   │◄══ bounded ═══│ service: one tokio runtime, R    │
//!  │ one io_uring, one slab each    │    rings      │ router threads, one Kafka thread │
//!  │  accept → upgrade → frames     │══════════════►│  sessions, routing, membership,  │
//!  │  send queues, timers           │   from shard  │  resume, presence, redis, grpc   │
//!  └────────────────────────────────┘               └──────────────────────────────────┘
//! ```
//!
//! A lower layer never imports a higher one, and siblings never import each other (`tests/tree`
//! checks it, and that unsafe code stays in [`uring`]):
//!
//! | layer | knows |
//! | --- | --- |
//! | [`domain`] | nouns: ids, events, what crosses the hand-off, limits, counters; imports nothing |
//! | [`protocol`] | the HTTP upgrade and RFC 6455 as pure functions: bytes in, events out |
//! | [`handoff`] | the bounded rings and the doorbell between the two worlds |
//! | [`uring`] | the kernel's ring, and all unsafe code |
//! | [`reactor`] | the shard: event loop, slab, send queues, timer wheel; generic over a kernel |
//! | [`service`] | users, conversations and back ends; never touches a client socket |
//! | [`app`] | settings, wiring, the command line |
//!
//! # The way of one Kafka record
//!
//! 1. [`service::routing::kafka`] gives each partition to a router; [`service::routing::router`] polls it on its own
//!    thread, so that the order of the partition is the order of everything after it.
//! 2. [`service::events::envelope`] reads what the record says, once and without a copy.
//! 3. [`service::members::membership`] knows the members of its conversation completely, or asks
//!    ([`service::backends::neighbours`]) while the other partitions go on.
//! 4. [`service::members::directory`] knows the members' sessions here: shard, slot, generation, encoding.
//!    Members elsewhere are reached through [`service::backends::redis`].
//! 5. [`service::events::encode`] writes one immutable frame for each encoding among them.
//! 6. One [`domain::command::ShardCommand::Deliver`] for each shard concerned goes over a ring of
//!    [`handoff`]; the doorbell wakes a shard that sleeps.
//! 7. [`reactor::shard`] puts the frame into each recipient's [`reactor::queue`] and starts one send
//!    for each; what waits meanwhile goes out together with the next.
//! 8. [`uring`] hands the sends to the kernel. When the last recipient is done the shard reports
//!    it, and [`service::routing::offsets`] lets the offset move.
//!
//! # The way of one client frame
//!
//! The kernel fills one of the shard's receive buffers; [`protocol::receiver`] unmasks in place;
//! pings are answered in the shard; a text message goes up to [`service::sessions::manager`], which resumes
//! ([`service::sessions::catch_up`]) or renews a token ([`service::sessions::auth`]). [`service::sessions::presence`] hears of every
//! beginning and end.
//!
//! # Where things are put together
//!
//! [`app::node`] makes everything in the order in which it depends on each other, and ends it in
//! the reverse. [`app::config`] holds every setting once.

pub mod app;
pub mod domain;
pub mod handoff;
pub mod protocol;
pub mod reactor;
pub mod service;
pub mod uring;

const _: () = assert!(usize::BITS == 64, "sizes and counts are taken for 64 bits");
