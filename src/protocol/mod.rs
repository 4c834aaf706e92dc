//! RFC 6455 and its HTTP upgrade as pure functions and state machines: bytes in, events out. No
//! I/O, no clock, no runtime, no unsafe.
//!
//! The way of a client's bytes:
//!
//! ```text
//!  request head ──► upgrade::parse ──► UpgradeRequest ──► upgrade::response_101
//!                        │ not a lawful upgrade
//!                        ▼
//!                     Refused ──► upgrade::refusal (an HTTP answer, then the end)
//!
//!  frames ──► receiver::Receiver ──► Incoming (a whole message, a control frame)
//!               frame: header checks, unmasking     │ a MUST of the RFC was broken
//!               incoming, utf8, deflate: the payload ▼
//!                                              ProtocolError ──► close frame
//! ```
//!
//! [`phase::Phase`] is the closing handshake; [`frame`] also writes what the server sends.

pub mod deflate;
pub mod error;
pub mod frame;
pub mod incoming;
pub mod mask;
pub mod phase;
pub mod receiver;
pub mod upgrade;
pub mod utf8;
