//! Why a connection ends: close codes (RFC 6455 §7.4, contract §3, `docs/guarantees.md`).

use std::borrow::Cow;

/// The status code of a close frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CloseCode(pub u16);

impl CloseCode {
    /// The purpose of the connection is fulfilled.
    pub const NORMAL: Self = Self(1000);
    /// The server is going down: reconnect to any node.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer broke RFC 6455.
    pub const PROTOCOL_ERROR: Self = Self(1002);
    /// A kind of data that is not accepted here.
    pub const UNSUPPORTED_DATA: Self = Self(1003);
    /// Text that is not UTF-8.
    pub const INVALID_PAYLOAD: Self = Self(1007);
    /// A limit that is not about size was broken (rates).
    pub const POLICY_VIOLATION: Self = Self(1008);
    /// A message or frame over the limit.
    pub const MESSAGE_TOO_BIG: Self = Self(1009);
    /// Send queue overflow (contract §3), or a fault of ours.
    pub const INTERNAL_ERROR: Self = Self(1011);
    /// This node is being drained: reconnect after the time in the reason.
    pub const SERVICE_RESTART: Self = Self(1012);
    /// Catch-up failed or overflowed: reconnect and resume.
    pub const TRY_AGAIN_LATER: Self = Self(1013);
    /// The same user and device connected again (contract §3).
    pub const SESSION_REPLACED: Self = Self(4000);
    /// The token expired and no fresh one came in time.
    pub const TOKEN_EXPIRED: Self = Self(4401);
    /// The resume request came after the grace for it had passed.
    pub const RESUME_TOO_LATE: Self = Self(4408);
}

/// What the server puts in a close frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// The status code.
    pub code: CloseCode,
    /// The reason: UTF-8, at most [`CLOSE_REASON_BYTES_MAX`](crate::domain::limits::CLOSE_REASON_BYTES_MAX).
    pub reason: Cow<'static, str>,
}

impl Close {
    /// A close with a fixed reason.
    pub const fn new(code: CloseCode, reason: &'static str) -> Self {
        Self { code, reason: Cow::Borrowed(reason) }
    }
}

/// How a connection came to its end. One metric label each, so that a dead peer is told apart from
/// a clean close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EndReason {
    /// The client closed with a close frame.
    ClosedByPeer,
    /// The client's socket ended (FIN) without a close frame.
    PeerGone,
    /// The client's socket was reset or failed.
    PeerReset,
    /// Nothing came for the idle time although it was pinged.
    PeerSilent,
    /// The client broke RFC 6455 or a limit.
    PeerAtFault,
    /// The send queue was full: a slow reader.
    QueueOverflow,
    /// A send made no progress for the write timeout.
    WriteTimeout,
    /// No complete upgrade request within its deadline.
    HandshakeTimeout,
    /// The upgrade was refused.
    Refused,
    /// The service closed it (replaced, token expired, catch-up failed).
    ClosedByService,
    /// The node is draining or stopping.
    Draining,
    /// A fault of ours or of the kernel.
    ServerFault,
}

impl EndReason {
    /// How many there are.
    pub const COUNT: usize = 12;

    /// All of them, in the order of their numbers.
    pub const ALL: [EndReason; Self::COUNT] = [
        Self::ClosedByPeer,
        Self::PeerGone,
        Self::PeerReset,
        Self::PeerSilent,
        Self::PeerAtFault,
        Self::QueueOverflow,
        Self::WriteTimeout,
        Self::HandshakeTimeout,
        Self::Refused,
        Self::ClosedByService,
        Self::Draining,
        Self::ServerFault,
    ];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::ClosedByPeer => "closed_by_peer",
            Self::PeerGone => "peer_gone",
            Self::PeerReset => "peer_reset",
            Self::PeerSilent => "peer_silent",
            Self::PeerAtFault => "peer_at_fault",
            Self::QueueOverflow => "queue_overflow",
            Self::WriteTimeout => "write_timeout",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::Refused => "refused",
            Self::ClosedByService => "closed_by_service",
            Self::Draining => "draining",
            Self::ServerFault => "server_fault",
        }
    }
}
