//! One session: a descriptor, a phase, and bytes only while a frame is cut in two.

use std::os::fd::OwnedFd;

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No socket.
    Down,
    /// Connecting.
    Dialing,
    /// The request is sent.
    Upgrading,
    /// Open.
    Open,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) socket: Option<OwnedFd>,
    /// The beginning of a frame or of an answer; boxed, so that a session without one stays small.
    #[expect(clippy::box_collection, reason = "a word instead of three per idle session")]
    pub(super) partial: Option<Box<Vec<u8>>>,
    /// When the connect began, ns.
    pub(super) began_ns: u64,
    /// The last sequence received, 0 for none.
    pub(super) mark: u32,
    pub(super) phase: Phase,
    /// An echo is under way.
    pub(super) waits: bool,
}

impl Session {
    pub(super) fn down() -> Self {
        Self { socket: None, partial: None, began_ns: 0, mark: 0, phase: Phase::Down, waits: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_session_is_small() {
        assert!(size_of::<Session>() <= 32);
    }
}
