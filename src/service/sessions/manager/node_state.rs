//! The lifecycle of the node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Lifecycle of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NodeState {
    /// Sessions are admitted.
    Serving = 0,
    /// No new sessions; the existing ones are closed gradually.
    Draining = 1,
    /// The remaining sessions are being closed.
    Stopping = 2,
    /// All sessions have ended.
    Stopped = 3,
}

/// The state, shared by the session manager, which writes it, and its handles, which read it.
#[derive(Clone, Debug)]
pub(super) struct SharedNodeState(Arc<AtomicU8>);

impl SharedNodeState {
    pub(super) fn new() -> Self {
        Self(Arc::new(AtomicU8::new(NodeState::Serving as u8)))
    }

    pub(super) fn get(&self) -> NodeState {
        match self.0.load(Ordering::Acquire) {
            0 => NodeState::Serving,
            1 => NodeState::Draining,
            2 => NodeState::Stopping,
            _ => NodeState::Stopped,
        }
    }

    pub(super) fn set(&self, state: NodeState) {
        self.0.store(state as u8, Ordering::Release);
    }
}
