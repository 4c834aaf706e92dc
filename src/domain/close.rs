//! Why a connection ends: close codes (RFC 6455 §7.4, contract §3, `docs/guarantees.md`).

use std::borrow::Cow;

/// The status code of a close frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CloseCode(pub u16);

impl CloseCode {
    /// The connection has served its purpose.
    pub const NORMAL: Self = Self(1000);
    /// The server is going down: reconnect to any node.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer broke RFC 6455.
    pub const PROTOCOL_ERROR: Self = Self(1002);
    /// A type of data that the server does not accept.
    pub const UNSUPPORTED_DATA: Self = Self(1003);
    /// Text that is not UTF-8.
    pub const INVALID_PAYLOAD: Self = Self(1007);
    /// A limit other than size was exceeded (rates).
    pub const POLICY_VIOLATION: Self = Self(1008);
    /// A message or frame over the limit.
    pub const MESSAGE_TOO_BIG: Self = Self(1009);
    /// Send queue overflow (contract §3), or an internal error.
    pub const INTERNAL_ERROR: Self = Self(1011);
    /// This node is being drained: reconnect after the time in the reason.
    pub const SERVICE_RESTART: Self = Self(1012);
    /// Catch-up failed or overflowed: reconnect and resume.
    pub const TRY_AGAIN_LATER: Self = Self(1013);
    /// The same user and device connected again (contract §3).
    pub const SESSION_REPLACED: Self = Self(4000);
    /// The token expired and was not renewed in time.
    pub const TOKEN_EXPIRED: Self = Self(4401);
    /// The resume request came after its grace period.
    pub const RESUME_TOO_LATE: Self = Self(4408);
    /// Events for the session were lost between nodes: reconnect and resume.
    pub const EVENTS_MISSED: Self = Self(4409);
}

/// The content of a close frame that the server sends.
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

    /// Whether a session that gets cursors gets one before this close. With the other codes its last one stays the
    /// right one, or nothing more can be sent.
    pub fn comes_with_cursor(&self) -> bool {
        let codes = [
            CloseCode::GOING_AWAY,
            CloseCode::SERVICE_RESTART,
            CloseCode::SESSION_REPLACED,
            CloseCode::TOKEN_EXPIRED,
        ];
        codes.contains(&self.code)
    }
}

/// How a connection ended. Each reason has its own metric label, so that dead peers and clean
/// closes can be told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EndReason {
    /// The client closed with a close frame.
    ClosedByPeer,
    /// The client shut down its half of the stream (FIN) without a close frame.
    PeerGone,
    /// The client's socket was reset or failed.
    PeerReset,
    /// Nothing was received for the idle time, although the client was pinged.
    PeerSilent,
    /// The client violated RFC 6455 or a limit.
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
    /// An internal error, or an error of the kernel.
    ServerFault,
}

impl EndReason {
    /// Number of reasons.
    pub const COUNT: usize = 12;

    /// All reasons, in the order of their numbers.
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
