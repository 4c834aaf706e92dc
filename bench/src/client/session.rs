//! One session: a descriptor, a phase, and bytes only while a frame is cut in two.

use std::os::fd::OwnedFd;

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No socket.
    Down,
    /// Connecting; `mark` is when it began.
    Dialing,
    /// The request is sent; `mark` is when the connect began.
    Upgrading,
    /// Open; `mark` is the last sequence received, 0 for none.
    Open,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) socket: Option<OwnedFd>,
    /// The beginning of a frame or of an answer; boxed, so that a session without one stays small.
    #[expect(clippy::box_collection, reason = "a word instead of three per idle session")]
    pub(super) partial: Option<Box<Vec<u8>>>,
    pub(super) mark: u64,
    pub(super) phase: Phase,
    /// An echo is under way.
    pub(super) waits: bool,
}

impl Session {
    pub(super) fn down() -> Self {
        Self { socket: None, partial: None, mark: 0, phase: Phase::Down, waits: false }
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
