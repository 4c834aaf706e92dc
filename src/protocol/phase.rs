//! The life of a connection as one table: the upgrade, then the closing handshake of RFC 6455 §7.
//!
//! ```text
//!   Upgrading ──UpgradeSent──► Open ──CloseSent──────► AwaitingPeer ─┐
//!       │                       │                                    │ CloseReceived
//!       │                       └──CloseReceived──► OwingEcho ───────┤
//!       │                                               CloseSent    ▼
//!       └────────────────── Aborted (from anywhere) ──────────────► Closed
//! ```

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The request is incomplete, or waits for the service's word.
    Upgrading,
    /// The 101 has been handed to the socket: messages may flow both ways.
    Open,
    /// We sent a close frame first: nothing else may be sent (RFC 6455 §5.5.1), and what the client
    /// still sends is read only to find its close frame.
    AwaitingPeer,
    /// The client sent a close frame first: the answer is owed, nothing that follows is read.
    OwingEcho,
    /// Both close frames went, or the connection failed: only the TCP connection is left to close.
    Closed,
}

/// What moves a connection on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// The 101 answer was handed to the socket.
    UpgradeSent,
    /// Our close frame was handed to the socket.
    CloseSent,
    /// The client's close frame arrived.
    CloseReceived,
    /// The upgrade was refused, the socket failed or ended, or a deadline passed.
    Aborted,
}

/// A signal that cannot come in this phase: a fault of the caller, not of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{signal:?} is impossible while {from:?}")]
pub struct IllegalTransition {
    /// The phase the connection was in.
    pub from: Phase,
    /// The signal that came.
    pub signal: Signal,
}

impl Phase {
    /// All of them, in the order of life.
    pub const ALL: [Phase; 5] =
        [Self::Upgrading, Self::Open, Self::AwaitingPeer, Self::OwingEcho, Self::Closed];

    /// The phase after `signal`.
    ///
    /// # Errors
    ///
    /// [`IllegalTransition`] for a pair that the caller must never produce.
    pub fn next(self, signal: Signal) -> Result<Phase, IllegalTransition> {
        use {Phase::*, Signal::*};
        Ok(match (self, signal) {
            (Upgrading, UpgradeSent) => Open,
            (Open, CloseSent) => AwaitingPeer,
            (Open, CloseReceived) => OwingEcho,
            (AwaitingPeer, CloseReceived) | (OwingEcho, CloseSent) => Closed,
            (Upgrading | Open | AwaitingPeer | OwingEcho | Closed, Aborted) => Closed,
            (Upgrading, CloseSent | CloseReceived)
            | (Open | AwaitingPeer | OwingEcho | Closed, UpgradeSent)
            | (AwaitingPeer, CloseSent)
            | (OwingEcho, CloseReceived)
            | (Closed, CloseSent | CloseReceived) => {
                return Err(IllegalTransition { from: self, signal });
            }
        })
    }

    /// Whether messages and control frames may be sent (RFC 6455 §5.5.1: none after a close frame).
    pub fn may_send(self) -> bool {
        match self {
            Self::Open => true,
            Self::Upgrading | Self::AwaitingPeer | Self::OwingEcho | Self::Closed => false,
        }
    }

    /// Whether arriving bytes are frames to be read.
    pub fn reads_frames(self) -> bool {
        match self {
            Self::Open | Self::AwaitingPeer => true,
            Self::Upgrading | Self::OwingEcho | Self::Closed => false,
        }
    }
}

impl Signal {
    /// All of them.
    pub const ALL: [Signal; 4] =
        [Self::UpgradeSent, Self::CloseSent, Self::CloseReceived, Self::Aborted];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_and_signal_as_drawn() {
        let mut table = String::new();
        for from in Phase::ALL {
            for signal in Signal::ALL {
                let to = match from.next(signal) {
                    Ok(to) => format!("{to:?}"),
                    Err(illegal) => {
                        assert_eq!(illegal, IllegalTransition { from, signal });
                        "-".to_owned()
                    }
                };
                table.push_str(&format!("{from:?} {signal:?} {to}\n"));
            }
        }
        let snapshot = "\
Upgrading UpgradeSent Open
Upgrading CloseSent -
Upgrading CloseReceived -
Upgrading Aborted Closed
Open UpgradeSent -
Open CloseSent AwaitingPeer
Open CloseReceived OwingEcho
Open Aborted Closed
AwaitingPeer UpgradeSent -
AwaitingPeer CloseSent -
AwaitingPeer CloseReceived Closed
AwaitingPeer Aborted Closed
OwingEcho UpgradeSent -
OwingEcho CloseSent Closed
OwingEcho CloseReceived -
OwingEcho Aborted Closed
Closed UpgradeSent -
Closed CloseSent -
Closed CloseReceived -
Closed Aborted Closed
";
        assert_eq!(table, snapshot);
    }

    #[test]
    fn nothing_is_sent_outside_open_and_nothing_read_after_the_peers_close() {
        let sends: Vec<_> = Phase::ALL.into_iter().filter(|p| p.may_send()).collect();
        let reads: Vec<_> = Phase::ALL.into_iter().filter(|p| p.reads_frames()).collect();
        assert_eq!(sends, [Phase::Open]);
        assert_eq!(reads, [Phase::Open, Phase::AwaitingPeer]);
    }
}
