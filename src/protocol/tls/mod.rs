//! The record layer of TLS 1.3 (RFC 8446 §5) for a server, after the handshake.
//!
//! An idle session keeps its keys and two counters, and nothing else. Records are opened in place where they were
//! received, and sealed where they are sent from.
//!
//! ```text
//!  received bytes ──► Opening::next ──► Content: data, an alert, a key update
//!                      │ keeps only a record that is incomplete
//!                      ▼
//!                   TlsError ──► alert, then close
//!
//!  queued frames ──► Sealing::next ──► one record for as many frames as fit
//!                      │ the socket has not taken all of it: the same bytes are sealed again
//!                      ▼
//!                   Sealing::sent ──► how much of the queue is sent
//! ```
//!
//! A record on the wire (§5.2). Type and version are always the same; the real type is the last byte that is not zero:
//!
//! ```text
//!  23 │ 3 │ 3 │ length: 2 │ sealed { content │ type: 1 │ zeros } │ tag: 16
//!  └──────── header ──────┘
//! ```
//!
//! [`handshake`] says how the handshake, which is made elsewhere, hands over its secrets.

pub mod alert;
pub mod handshake;
pub mod keys;
pub mod opening;
pub mod record;
pub mod sealing;

pub use alert::{Alert, TlsError};
pub use handshake::{HandshakeProgress, Job, Secrets, TlsHandshake};
pub use keys::Suite;
pub use opening::{Content, Opened, Opening};
pub use sealing::Sealing;
