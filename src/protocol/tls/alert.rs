//! Alerts (RFC 8446 §6).

/// What an alert says: the `AlertDescription` of RFC 8446 §6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alert(pub u8);

impl Alert {
    /// The sender sends nothing more (§6.1).
    pub const CLOSE_NOTIFY: Self = Self(0);
    /// A message that must not come now (§6.2).
    pub const UNEXPECTED_MESSAGE: Self = Self(10);
    /// A record cannot be opened (§6.2).
    pub const BAD_RECORD_MAC: Self = Self(20);
    /// A record is too long (§6.2).
    pub const RECORD_OVERFLOW: Self = Self(22);
    /// A field has a value that it must not have (§6.2).
    pub const ILLEGAL_PARAMETER: Self = Self(47);
    /// A message has a wrong length (§6.2).
    pub const DECODE_ERROR: Self = Self(50);
    /// A reason that has nothing to do with the peer (§6.2).
    pub const INTERNAL_ERROR: Self = Self(80);
    /// The sender cancels the handshake; a close follows (§6.1).
    pub const USER_CANCELED: Self = Self(90);

    /// Type of the records of alerts (§5.1).
    pub const CONTENT_TYPE: u8 = 21;
    const WARNING: u8 = 1;
    const FATAL: u8 = 2;

    /// The content of its record: level and description. Receivers ignore the level (§6).
    pub const fn content(self) -> [u8; 2] {
        let is_warning = matches!(self, Self::CLOSE_NOTIFY | Self::USER_CANCELED);
        [if is_warning { Self::WARNING } else { Self::FATAL }, self.0]
    }

    /// The record of an alert before there are keys (§5.1).
    pub const fn plain_record(self) -> [u8; 7] {
        let [level, description] = self.content();
        [Self::CONTENT_TYPE, 3, 3, 0, 2, level, description]
    }
}

/// A client violated RFC 8446. The server sends [`TlsError::alert`] and closes (§6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum TlsError {
    /// A record that the keys do not open (§5.2).
    #[error("a record cannot be opened")]
    BadRecordMac,
    /// A record over 2^14 + 256 bytes, or with a content over 2^14 (§5.2, §5.4).
    #[error("a record is too long")]
    RecordOverflow,
    /// A type of record or message that must not come now (§5, §4.6).
    #[error("a record or message of a type that must not come now")]
    UnexpectedMessage,
    /// A message with a wrong length (§4.6.3, §6).
    #[error("a message has a wrong length")]
    DecodeError,
    /// A key update with an unknown request (§4.6.3).
    #[error("a key update asks for something unknown")]
    IllegalParameter,
}

impl TlsError {
    /// The alert to send.
    pub const fn alert(self) -> Alert {
        match self {
            Self::BadRecordMac => Alert::BAD_RECORD_MAC,
            Self::RecordOverflow => Alert::RECORD_OVERFLOW,
            Self::UnexpectedMessage => Alert::UNEXPECTED_MESSAGE,
            Self::DecodeError => Alert::DECODE_ERROR,
            Self::IllegalParameter => Alert::ILLEGAL_PARAMETER,
        }
    }
}
