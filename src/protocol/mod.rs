//! RFC 6455, its HTTP upgrade and the records of TLS ([`tls`]) as pure functions and state machines: bytes in, events out. No
//! I/O, no clock, no runtime, no unsafe.
//!
//! How a client's bytes are processed:
//!
//! ```text
//!  request head ──► upgrade::parse ──► UpgradeRequest ──► upgrade::response_101
//!                        │ not a valid upgrade
//!                        ▼
//!                     Refused ──► upgrade::response_refused (an HTTP error, then close)
//!
//!  frames ──► receiver::Receiver ──► Incoming (a whole message or a control frame)
//!               frame, mask: header checks, unmasking │ the client violates the RFC
//!               incoming, utf8, deflate: payload      ▼
//!                                                ProtocolError ──► close frame
//! ```
//!
//! [`phase::Phase`] is the closing handshake. [`frame`] also encodes the server's frames.

pub mod deflate;
pub mod error;
pub mod frame;
pub mod incoming;
pub mod mask;
pub mod phase;
pub mod receiver;
pub mod tls;
pub mod upgrade;
pub mod utf8;
