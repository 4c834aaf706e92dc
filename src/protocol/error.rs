//! Protocol errors of a client after the upgrade. Each error maps to exactly one close code.

use crate::domain::close::{Close, CloseCode};

/// A client violated RFC 6455, RFC 7692 or a limit. The server fails the connection (RFC 6455
/// §7.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{}", self.reason())]
pub enum ProtocolError {
    /// A reserved bit that no negotiated extension defines (RFC 6455 §5.2), or RSV1 on a control or
    /// continuation frame (RFC 7692 §6.1).
    ReservedBit,
    /// An opcode that RFC 6455 §5.2 reserves.
    ReservedOpcode,
    /// A client frame without a mask (RFC 6455 §5.1).
    Unmasked,
    /// A control frame without FIN (RFC 6455 §5.4, §5.5).
    ControlFragmented,
    /// A control frame with a payload over 125 bytes (RFC 6455 §5.5).
    ControlTooLong,
    /// A length that is not in its shortest form (RFC 6455 §5.2).
    LengthNotShortest,
    /// A 64-bit length with its highest bit set (RFC 6455 §5.2).
    LengthOverflow,
    /// A continuation frame while no message is open (RFC 6455 §5.4).
    NothingToContinue,
    /// A new message before the open one is complete (RFC 6455 §5.4).
    MessageNotFinished,
    /// A close frame with a payload of one byte: half a code (RFC 6455 §5.5.1).
    CloseCodeCut,
    /// A close code that must not be sent (RFC 6455 §7.4).
    CloseCodeInvalid,
    /// A close reason that is not UTF-8 (RFC 6455 §5.5.1).
    CloseReasonNotUtf8,
    /// A text message that is not UTF-8 (RFC 6455 §5.6, §8.1).
    TextNotUtf8,
    /// A compressed message that is not a sequence of complete DEFLATE blocks (RFC 7692 §7.2.2).
    NotDeflate,
    /// A message over the limit, as sent or after inflation (RFC 6455 §10.4).
    MessageTooBig,
}

impl ProtocolError {
    /// Number of variants.
    pub const COUNT: usize = Self::ALL.len();

    /// All variants, in declaration order.
    pub const ALL: [ProtocolError; 15] = [
        Self::ReservedBit,
        Self::ReservedOpcode,
        Self::Unmasked,
        Self::ControlFragmented,
        Self::ControlTooLong,
        Self::LengthNotShortest,
        Self::LengthOverflow,
        Self::NothingToContinue,
        Self::MessageNotFinished,
        Self::CloseCodeCut,
        Self::CloseCodeInvalid,
        Self::CloseReasonNotUtf8,
        Self::TextNotUtf8,
        Self::NotDeflate,
        Self::MessageTooBig,
    ];

    /// The close code of this error (RFC 6455 §7.4.1).
    pub const fn code(self) -> CloseCode {
        match self {
            Self::ReservedBit
            | Self::ReservedOpcode
            | Self::Unmasked
            | Self::ControlFragmented
            | Self::ControlTooLong
            | Self::LengthNotShortest
            | Self::LengthOverflow
            | Self::NothingToContinue
            | Self::MessageNotFinished
            | Self::CloseCodeCut
            | Self::CloseCodeInvalid => CloseCode::PROTOCOL_ERROR,
            Self::CloseReasonNotUtf8 | Self::TextNotUtf8 | Self::NotDeflate => {
                CloseCode::INVALID_PAYLOAD
            }
            Self::MessageTooBig => CloseCode::MESSAGE_TOO_BIG,
        }
    }

    /// The close to send: the code and the reason.
    pub const fn close(self) -> Close {
        Close::new(self.code(), self.reason())
    }

    /// Human-readable text: the reason of the close frame, the `Display` text and a metric label.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::ReservedBit => "reserved bit set",
            Self::ReservedOpcode => "reserved opcode",
            Self::Unmasked => "unmasked frame",
            Self::ControlFragmented => "fragmented control frame",
            Self::ControlTooLong => "control frame too long",
            Self::LengthNotShortest => "length not in its shortest form",
            Self::LengthOverflow => "length over 63 bits",
            Self::NothingToContinue => "nothing to continue",
            Self::MessageNotFinished => "message not finished",
            Self::CloseCodeCut => "half a close code",
            Self::CloseCodeInvalid => "bad close code",
            Self::CloseReasonNotUtf8 => "close reason is not UTF-8",
            Self::TextNotUtf8 => "text is not UTF-8",
            Self::NotDeflate => "message does not inflate",
            Self::MessageTooBig => "message too big",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::limits::CLOSE_REASON_BYTES_MAX;

    #[test]
    fn all_lists_each_error_in_order_and_display_is_the_reason() {
        for (index, error) in ProtocolError::ALL.into_iter().enumerate() {
            assert_eq!(error as usize, index);
            assert_eq!(error.to_string(), error.reason());
            assert!(error.reason().len() <= CLOSE_REASON_BYTES_MAX);
        }
    }
}
