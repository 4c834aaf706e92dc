//! The kernel interface and its io_uring implementation: the only folder with unsafe code.
//!
//! ```text
//! setup ─► Ring ── operation constructors ─► submission queue ─► kernel
//!            │                                                     │
//!            │◄─ Completion ◄─ token decoded ◄─ completion queue ◄─┘
//!            ├─ sends    buffers that the kernel reads, kept until the completion
//!            ├─ accepts  cells that the kernel writes peer addresses into, likewise
//!            └─ buffers  buffers that the kernel receives into, lent out as `Lease`s
//! ```
//!
//! The public interface is safe: memory that an operation refers to is owned here until the
//! operation's last completion, even if the ring is dropped before it.

#![allow(unsafe_code)]

mod accepts;
mod buffers;
mod clock;
mod kernel;
mod operation;
mod ring;
mod send_buffer;
mod sends;
mod setup;
mod token;

pub use buffers::Lease;
pub use clock::monotonic_ms;
pub use kernel::{Completion, HowToClose, Kernel, Received, Wait};
pub use ring::Ring;
pub use send_buffer::SendBuffer;
pub use setup::{RingConfig, SetupError};

#[cfg(test)]
mod tests;
