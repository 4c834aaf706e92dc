//! The header of a record, and its limits (RFC 8446 §5).

use crate::protocol::tls::alert::{Alert, TlsError};

/// Header of a record, bytes (§5.1).
pub const HEADER_BYTES: usize = 5;
/// Tag of every AEAD of TLS 1.3, bytes.
pub const TAG_BYTES: usize = 16;
/// What sealing adds to a content: header, type and tag, bytes.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + 1 + TAG_BYTES;
/// Content of a record, bytes (§5.1).
pub const CONTENT_BYTES_MAX: usize = 1 << 14;
/// What may follow the header of a record, bytes (§5.2).
pub const SEALED_BYTES_MAX: usize = CONTENT_BYTES_MAX + 256;

/// Types of content (§5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ContentType {
    /// Closes and errors.
    Alert = Alert::CONTENT_TYPE,
    /// Key updates, after the handshake itself.
    Handshake = 22,
    /// Everything else; and the type that every sealed record shows.
    ApplicationData = 23,
}

impl ContentType {
    /// The type of an opened record.
    ///
    /// # Errors
    /// Unknown (§5: `unexpected_message`).
    pub fn decode(byte: u8) -> Result<Self, TlsError> {
        match byte {
            Alert::CONTENT_TYPE => Ok(Self::Alert),
            22 => Ok(Self::Handshake),
            23 => Ok(Self::ApplicationData),
            _ => Err(TlsError::UnexpectedMessage),
        }
    }
}

/// The header of a sealed record with so many bytes behind it.
pub fn encode_header(sealed_bytes: usize) -> [u8; HEADER_BYTES] {
    assert!(sealed_bytes <= SEALED_BYTES_MAX);
    let [high, low] = (sealed_bytes as u16).to_be_bytes();
    [ContentType::ApplicationData as u8, 3, 3, high, low]
}

/// The number of bytes behind the header of a sealed record. The version is ignored (§5.1).
///
/// # Errors
/// The record is not sealed, or too long.
pub fn decode_header(header: [u8; HEADER_BYTES]) -> Result<usize, TlsError> {
    let [content_type, _, _, high, low] = header;
    if content_type != ContentType::ApplicationData as u8 {
        return Err(TlsError::UnexpectedMessage);
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > SEALED_BYTES_MAX { Err(TlsError::RecordOverflow) } else { Ok(length) }
}

/// The length of the record that `input` begins with, header included, whether it is all there or not. `None`: not even
/// its header is. For records of the handshake, which may be of any type; those who read them check them.
pub fn whole_length(input: &[u8]) -> Option<usize> {
    let header = input.first_chunk::<HEADER_BYTES>()?;
    Some(HEADER_BYTES + usize::from(u16::from_be_bytes([header[3], header[4]])))
}
