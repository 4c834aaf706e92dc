//! Protocol state of a connection as one transition table: the upgrade, then the closing handshake of
//! RFC 6455 §7.
//!
//! ```text
//!   Upgrading ──UpgradeSent──► Open ──CloseSent──────► AwaitingPeer ─┐
//!       │                       │                                    │ CloseReceived
//!       │                       └──CloseReceived──► OwingEcho ───────┤
//!       │                                               CloseSent    ▼
//!       └────────────────── Aborted (from any phase) ─────────────► Closed
//! ```

/// Protocol state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The request is incomplete, or waits for the decision of the service.
    Upgrading,
    /// The 101 has been passed to the socket: both sides may send messages.
    Open,
    /// The server sent its close frame first. It may send nothing else (RFC 6455 §5.5.1) and reads
    /// only to find the client's close frame.
    AwaitingPeer,
    /// The client sent its close frame first. The server must answer it and reads nothing more.
    OwingEcho,
    /// Both close frames were sent, or the connection failed: only TCP is left to close.
    Closed,
}

/// Input of the transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// The 101 response was passed to the socket.
    UpgradeSent,
    /// The server's close frame was passed to the socket.
    CloseSent,
    /// The client's close frame arrived.
    CloseReceived,
    /// The upgrade was refused, the socket failed or closed, or a deadline passed.
    Aborted,
}

/// A signal that is impossible in this phase: a bug of the caller, not an error of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{signal:?} is impossible while {from:?}")]
pub struct IllegalTransition {
    /// Phase of the connection.
    pub from: Phase,
    /// The impossible signal.
    pub signal: Signal,
}

impl Phase {
    /// All phases, in declaration order.
    pub const ALL: [Phase; 5] =
        [Self::Upgrading, Self::Open, Self::AwaitingPeer, Self::OwingEcho, Self::Closed];

    /// The phase after `signal`.
    ///
    /// # Errors
    ///
    /// [`IllegalTransition`] for a pair that a correct caller never produces.
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

    /// Whether the server may send messages and control frames (RFC 6455 §5.5.1: none after a close
    /// frame).
    pub fn may_send(self) -> bool {
        match self {
            Self::Open => true,
            Self::Upgrading | Self::AwaitingPeer | Self::OwingEcho | Self::Closed => false,
        }
    }

    /// Whether the server decodes received bytes as frames.
    pub fn reads_frames(self) -> bool {
        match self {
            Self::Open | Self::AwaitingPeer => true,
            Self::Upgrading | Self::OwingEcho | Self::Closed => false,
        }
    }
}

impl Signal {
    /// All signals, in declaration order.
    pub const ALL: [Signal; 4] =
        [Self::UpgradeSent, Self::CloseSent, Self::CloseReceived, Self::Aborted];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_phase_and_signal_matches_the_table() {
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
    fn sends_only_while_open_and_reads_until_the_peers_close() {
        let sends: Vec<_> = Phase::ALL.into_iter().filter(|p| p.may_send()).collect();
        let reads: Vec<_> = Phase::ALL.into_iter().filter(|p| p.reads_frames()).collect();
        assert_eq!(sends, [Phase::Open]);
        assert_eq!(reads, [Phase::Open, Phase::AwaitingPeer]);
    }
}
