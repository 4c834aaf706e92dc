//! Delivery holds the client connections of a RealChat back end. It reads events from Kafka and pushes
//! each one to every connected device of every member of its conversation. It stores nothing.
//!
//! # The map
//!
//! ```text
//!            clients (WebSocket)                          clients (gRPC Connect)
//!                  │ TCP                                         │
//!  ┌───────────────▼────────────────┐   to shard    ┌────────────▼─────────────────────┐
//!  │ shard 0..N-1: one OS thread,   │◄══ bounded ═══│ service: one tokio runtime, R    │
//!  │ one io_uring, one slab each    │    rings      │ router threads, two Kafka threads│
//!  │  accept → upgrade → frames     │══════════════►│  sessions, routing, membership,  │
//!  │  send queues, timers           │   from shard  │  catch-up, presence, Redis, gRPC │
//!  └────────────────────────────────┘               └──────────────────────────────────┘
//! ```
//!
//! Layers, from the bottom up. A layer imports only some of the layers below it (`LAYERS` in
//! `tests/tree/layers.rs`): the service knows neither reactor nor ring. The test checks this, and that
//! unsafe code stays in [`uring`].
//!
//! | layer | contents |
//! | --- | --- |
//! | [`domain`] | ids, events, commands and reports of the hand-off, limits, counters |
//! | [`protocol`] | the HTTP upgrade, RFC 6455 and the records of TLS as pure functions: bytes in, events out |
//! | [`handoff`] | the bounded rings and the doorbell between shards and service |
//! | [`uring`] | io_uring, and all unsafe code |
//! | [`reactor`] | the shard: event loop, slab, send queues, timer wheel; generic over a kernel |
//! | [`service`] | users, conversations and back ends, in seven floors; never touches a client socket |
//! | [`app`] | settings, wiring, the command line |
//!
//! # The path of a Kafka record
//!
//! 1. [`service::routing::kafka`] assigns each partition to a router. [`service::routing::router`] polls
//!    it on its own thread, which keeps the records of a partition in order.
//! 2. [`service::events::envelope`] decodes the record, without a copy.
//! 3. [`service::members::membership`] returns the complete member list of the conversation, or fetches
//!    it ([`service::backends::neighbours`]) while other partitions continue.
//! 4. [`service::members::directory`] returns the members' sessions on this node: shard, slot,
//!    generation, encoding. A router hands the record over to the
//!    other nodes that [`service::cluster::table`] names (`HANDOFF=log`), or [`service::backends::redis`] does.
//! 5. [`service::events::encode`] writes one immutable frame per encoding.
//! 6. One [`domain::command::ShardCommand::Deliver`] per shard goes over a ring of [`handoff`], whose
//!    doorbell wakes a sleeping shard.
//! 7. [`reactor::shard`] appends the frame to each recipient's [`reactor::queue`] and starts one send
//!    per recipient. Frames that queue up meanwhile go out together in the next send.
//! 8. [`uring`] submits the sends to the kernel. When the last send has completed, the shard reports
//!    the record done, and [`service::routing::offsets`] advances the committable offset.
//!
//! # The path of a client frame
//!
//! The kernel fills one of the shard's receive buffers, and [`protocol::receiver`] unmasks the frame in
//! place. With TLS, [`protocol::tls`] opens the record there first; the handshake before it is made by
//! [`service::tls`], on a thread beside each shard. The shard answers pings itself. Text messages go to [`service::sessions::manager`], which
//! starts a catch-up ([`service::sessions::catch_up`]) or renews a token ([`service::sessions::auth`]). A client that
//! returns with a cursor ([`domain::cursor`]) gets what it missed from the tails that the routers keep of their
//! partitions.
//! It also reports the start and end of every session to [`service::sessions::presence`].
//!
//! # Wiring
//!
//! [`app::node`] creates all parts in the order of their dependencies, and stops them in reverse.
//! [`app::config`] defines every setting.

// They panic if the output takes no more; see `app::terminal`.
#![cfg_attr(
    not(any(test, feature = "simulation")),
    warn(clippy::print_stdout, clippy::print_stderr)
)]

pub mod app;
pub mod domain;
pub mod handoff;
pub mod protocol;
pub mod reactor;
pub mod service;
pub mod uring;

const _: () = assert!(usize::BITS == 64, "usize must have 64 bits");
