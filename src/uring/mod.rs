//! The only folder with kernel unsafe: the ring, its operations, its completion tokens, its receive
//! buffers.
//!
//! ```text
//! setup ─► Ring ── operation constructors ─► submission queue ─► kernel
//!            │                                                     │
//!            │◄─ Completion ◄─ token decoded ◄─ completion queue ◄─┘
//!            ├─ sends    what the kernel reads from, kept until the completion
//!            ├─ accepts  where the kernel writes peer addresses, likewise
//!            └─ buffers  what the kernel receives into; lent out as `Lease`s
//! ```
//!
//! Whoever uses this folder can break nothing: memory that an operation refers to is owned here
//! until the operation's last completion, also when the ring is dropped meanwhile.

#![allow(unsafe_code)]

mod accepts;
mod buffers;
mod completion;
mod operation;
mod ring;
mod sends;
mod setup;
mod token;

pub use buffers::Lease;
pub use completion::{Completion, Received};
pub use ring::{Ring, Wait};
pub use setup::{RingConfig, SetupError};

#[cfg(test)]
mod tests;
