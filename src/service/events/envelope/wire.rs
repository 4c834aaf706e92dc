//! Reads protobuf wire format without allocation. For the fields it reads, it accepts and refuses what
//! prost does; unknown fields are skipped without a check.

use crate::service::events::envelope::EnvelopeError;

/// Deepest nesting of groups, an encoding that proto3 never writes.
const GROUP_DEPTH_MAX: u32 = 32;

/// The value of one field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FieldValue<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 2.
    Bytes(&'a [u8]),
    /// Wire types 1, 3 and 5: skipped, because no field of the contract has them.
    Other,
}

impl<'a> FieldValue<'a> {
    /// `int64`; `int32` and enums when truncated.
    pub(super) fn integer(self) -> Result<u64, EnvelopeError> {
        match self {
            Self::Varint(value) => Ok(value),
            Self::Bytes(_) | Self::Other => Err(EnvelopeError::WireType),
        }
    }

    /// `bytes` and embedded messages.
    pub(super) fn bytes(self) -> Result<&'a [u8], EnvelopeError> {
        match self {
            Self::Bytes(value) => Ok(value),
            Self::Varint(_) | Self::Other => Err(EnvelopeError::WireType),
        }
    }

    /// `string`.
    pub(super) fn string(self) -> Result<&'a str, EnvelopeError> {
        simdutf8::basic::from_utf8(self.bytes()?).map_err(|_| EnvelopeError::Utf8)
    }
}

/// The fields of one message, in order.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    /// The next field, or `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<(u32, FieldValue<'a>)>, EnvelopeError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (number, wire_type) = self.key()?;
        let value = match wire_type {
            0 => FieldValue::Varint(self.varint()?),
            2 => {
                let len = self.varint()?;
                FieldValue::Bytes(
                    self.take(usize::try_from(len).map_err(|_| EnvelopeError::Truncated)?)?,
                )
            }
            _ => {
                self.skip(number, wire_type)?;
                FieldValue::Other
            }
        };
        Ok(Some((number, value)))
    }

    fn key(&mut self) -> Result<(u32, u8), EnvelopeError> {
        let key = u32::try_from(self.varint()?).map_err(|_| EnvelopeError::Key)?;
        match key >> 3 {
            0 => Err(EnvelopeError::Key),
            number => Ok((number, (key & 7) as u8)),
        }
    }

    fn varint(&mut self) -> Result<u64, EnvelopeError> {
        let mut value = 0;
        for (at, &byte) in self.rest.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte < 0x80 {
                // The tenth byte has only the 64th bit.
                if at == 9 && byte > 1 {
                    return Err(EnvelopeError::Varint);
                }
                self.rest = &self.rest[at + 1..];
                return Ok(value);
            }
        }
        Err(if self.rest.len() < 10 { EnvelopeError::Truncated } else { EnvelopeError::Varint })
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], EnvelopeError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(EnvelopeError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Skips a value of wire type 1, 3 or 5.
    fn skip(&mut self, number: u32, wire_type: u8) -> Result<(), EnvelopeError> {
        match wire_type {
            1 => self.take(8).map(drop),
            5 => self.take(4).map(drop),
            3 => self.skip_group(number),
            _ => Err(EnvelopeError::WireType),
        }
    }

    fn skip_group(&mut self, outermost: u32) -> Result<(), EnvelopeError> {
        let mut open = [0; GROUP_DEPTH_MAX as usize];
        open[0] = outermost;
        let mut depth = 1;
        while depth > 0 {
            match self.key()? {
                (_, 0) => drop(self.varint()?),
                (_, 1) => drop(self.take(8)?),
                (_, 2) => {
                    let len = self.varint()?;
                    self.take(usize::try_from(len).map_err(|_| EnvelopeError::Truncated)?)?;
                }
                (number, 3) => {
                    *open.get_mut(depth).ok_or(EnvelopeError::Group)? = number;
                    depth += 1;
                }
                (number, 4) if open[depth - 1] == number => depth -= 1,
                (_, 5) => drop(self.take(4)?),
                _ => return Err(EnvelopeError::Group),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<(u32, FieldValue<'_>)>, EnvelopeError> {
        let mut fields = Fields::new(bytes);
        let mut found = Vec::new();
        while let Some(field) = fields.next()? {
            found.push(field);
        }
        Ok(found)
    }

    #[test]
    fn every_wire_type_is_read_or_skipped() {
        let message = [
            0x08, 0x96, 0x01, // 1: varint 150
            0x12, 0x02, b'h', b'i', // 2: bytes
            0x19, 1, 2, 3, 4, 5, 6, 7, 8, // 3: fixed64
            0x23, 0x08, 0x01, 0x2b, 0x2c, 0x24, // 4: group { 1: varint, 5: group {} }
            0x35, 1, 2, 3, 4, // 6: fixed32
        ];
        assert_eq!(
            all(&message).unwrap(),
            [
                (1, FieldValue::Varint(150)),
                (2, FieldValue::Bytes(b"hi")),
                (3, FieldValue::Other),
                (4, FieldValue::Other),
                (6, FieldValue::Other),
            ]
        );
    }

    #[test]
    fn malformed_input_is_an_error() {
        assert_eq!(all(&[0x80]), Err(EnvelopeError::Truncated));
        assert_eq!(all(&[0x00, 0x00]), Err(EnvelopeError::Key));
        assert_eq!(all(&[0x12, 0x05, b'x']), Err(EnvelopeError::Truncated));
        assert_eq!(all(&[0x0c]), Err(EnvelopeError::WireType));
        assert_eq!(all(&[0x0b, 0x14]), Err(EnvelopeError::Group));
        assert_eq!(all(&[0x0b; 100]), Err(EnvelopeError::Group));
        let mut overlong = [0xff; 11];
        overlong[0] = 0x08;
        assert_eq!(all(&overlong), Err(EnvelopeError::Varint));
        overlong[10] = 0x02;
        assert_eq!(all(&overlong), Err(EnvelopeError::Varint));
    }
}
