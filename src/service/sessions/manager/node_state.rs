//! The lifecycle of the node.

/// Lifecycle of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Sessions are admitted.
    Serving,
    /// No new sessions; the existing ones are closed gradually.
    Draining,
    /// The remaining sessions are being closed.
    Stopping,
    /// All sessions have ended.
    Stopped,
}
