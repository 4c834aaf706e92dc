//! One session: a descriptor, a state, and a buffer only while a frame is incomplete.

use std::os::fd::OwnedFd;

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketState {
    /// No socket.
    Down,
    /// `connect(2)` is in progress.
    Dialing,
    /// The upgrade request is sent.
    Upgrading,
    /// Open.
    Open,
}

/// A session of the load client.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) socket: Option<OwnedFd>,
    /// An incomplete frame or answer; boxed to keep a session without one small.
    #[expect(clippy::box_collection, reason = "a word instead of three per idle session")]
    pub(super) partial: Option<Box<Vec<u8>>>,
    /// Time at which the connect began, ns.
    pub(super) began_ns: u64,
    /// The last sequence received; 0: none.
    pub(super) mark: u32,
    pub(super) state: SocketState,
    /// An echo is in flight.
    pub(super) waits: bool,
}

impl Session {
    pub(super) fn down() -> Self {
        Self {
            socket: None,
            partial: None,
            began_ns: 0,
            mark: 0,
            state: SocketState::Down,
            waits: false,
        }
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
