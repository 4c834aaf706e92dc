//! Frames (RFC 6455 §5.2): decodes and checks the headers of client frames; encodes server frames.
//!
//! ```text
//!  byte 0            byte 1            0, 2 or 8 bytes     4 bytes, clients only
//! | FIN RSV1-3 opcode | MASK length:7 | extended length   | mask key           | payload …
//! ```

use crate::domain::close::{Close, CloseCode};
use crate::domain::limits::{
    CLIENT_HEADER_BYTES_MAX, CLOSE_REASON_BYTES_MAX, CONTROL_PAYLOAD_BYTES_MAX,
    SERVER_HEADER_BYTES_MAX,
};
use crate::protocol::error::ProtocolError;
use crate::protocol::mask::MaskKey;
use crate::protocol::utf8;

const FIN: u8 = 0x80;
const RSV1: u8 = 0x40;
const RSV2_RSV3: u8 = 0x30;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const LENGTH: u8 = 0x7f;
/// Value of the 7-bit length if a 16-bit length follows.
const LENGTH_IS_16_BITS: u8 = 126;
/// Value of the 7-bit length if a 64-bit length follows.
const LENGTH_IS_64_BITS: u8 = 127;

/// Type of a frame (RFC 6455 §5.2), without the reserved opcodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Continues the open message.
    Continuation = 0x0,
    /// Starts a text message (UTF-8).
    Text = 0x1,
    /// Starts a binary message.
    Binary = 0x2,
    /// Starts or answers the closing handshake.
    Close = 0x8,
    /// Requests a pong.
    Ping = 0x9,
    /// Answers a ping.
    Pong = 0xa,
}

impl Opcode {
    /// Decodes the lower four bits of `byte`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::ReservedOpcode`] for the opcodes that RFC 6455 §5.2 reserves.
    pub fn decode(byte: u8) -> Result<Self, ProtocolError> {
        Ok(match byte & OPCODE {
            0x0 => Self::Continuation,
            0x1 => Self::Text,
            0x2 => Self::Binary,
            0x8 => Self::Close,
            0x9 => Self::Ping,
            0xa => Self::Pong,
            _ => return Err(ProtocolError::ReservedOpcode),
        })
    }

    /// Close, ping or pong (RFC 6455 §5.5).
    pub fn is_control(self) -> bool {
        self as u8 & 0x8 != 0
    }
}

/// A valid header of a client's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientHeader {
    /// Last frame of its message.
    pub fin: bool,
    /// The message is compressed (RFC 7692 §6).
    pub rsv1: bool,
    /// Type of the frame.
    pub opcode: Opcode,
    /// Payload length, bytes; below 2⁶³.
    pub length: u64,
    /// Key that unmasks the payload.
    pub key: MaskKey,
}

/// Connection state that the checks of a header depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderContext {
    /// permessage-deflate was negotiated.
    pub deflate: bool,
    /// A fragmented message is incomplete.
    pub message_open: bool,
}

/// Result of [`ClientHeader::decode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderStep {
    /// The input is valid but incomplete. Call again with at least this many bytes.
    NeedMore(usize),
    /// The header and its length in bytes.
    Complete(ClientHeader, usize),
}

impl ClientHeader {
    /// Decodes the header at the front of `input`. Checks the bytes in order, each as soon as it
    /// arrives, so the error does not depend on how the input is split.
    ///
    /// # Errors
    ///
    /// The first [`ProtocolError`] in the order of the bytes.
    pub fn decode(input: &[u8], context: HeaderContext) -> Result<HeaderStep, ProtocolError> {
        let Some(&first) = input.first() else { return Ok(HeaderStep::NeedMore(2)) };
        let opcode = check_first(first, context)?;
        let Some(&second) = input.get(1) else { return Ok(HeaderStep::NeedMore(2)) };
        // RFC 6455 §5.1: a server MUST close the connection upon a frame that is not masked.
        if second & MASKED == 0 {
            return Err(ProtocolError::Unmasked);
        }
        let short = second & LENGTH;
        // RFC 6455 §5.5: control frames MUST have a payload of 125 bytes or less.
        if opcode.is_control() && usize::from(short) > CONTROL_PAYLOAD_BYTES_MAX {
            return Err(ProtocolError::ControlTooLong);
        }
        let extended = match short {
            LENGTH_IS_16_BITS => 2,
            LENGTH_IS_64_BITS => 8,
            _ => 0,
        };
        let Some(length_bytes) = input.get(2..2 + extended) else {
            return Ok(HeaderStep::NeedMore(2 + extended));
        };
        let length = match extended {
            0 => u64::from(short),
            _ => length_bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
        };
        check_extended(length, extended)?;
        let total = 2 + extended + size_of::<MaskKey>();
        let Some(key) = input.get(2 + extended..total) else {
            return Ok(HeaderStep::NeedMore(total));
        };
        let key = [key[0], key[1], key[2], key[3]];
        let fin = first & FIN != 0;
        let rsv1 = first & RSV1 != 0;
        Ok(HeaderStep::Complete(Self { fin, rsv1, opcode, length, key }, total))
    }
}

fn check_first(first: u8, context: HeaderContext) -> Result<Opcode, ProtocolError> {
    // RFC 6455 §5.2: reserved bits MUST be 0 unless an extension defines them, else the endpoint
    // MUST fail the connection. No extension that this server supports defines RSV2 or RSV3.
    if first & RSV2_RSV3 != 0 || (first & RSV1 != 0 && !context.deflate) {
        return Err(ProtocolError::ReservedBit);
    }
    // RFC 6455 §5.2: an unknown opcode MUST fail the connection.
    let opcode = Opcode::decode(first)?;
    if opcode.is_control() {
        // RFC 6455 §5.5: control frames MUST NOT be fragmented.
        if first & FIN == 0 {
            return Err(ProtocolError::ControlFragmented);
        }
    } else if opcode == Opcode::Continuation && !context.message_open {
        // RFC 6455 §5.4: a continuation needs an open message.
        return Err(ProtocolError::NothingToContinue);
    } else if opcode != Opcode::Continuation && context.message_open {
        // RFC 6455 §5.4: fragments of one message MUST NOT be interleaved with those of another.
        return Err(ProtocolError::MessageNotFinished);
    }
    // RFC 7692 §6.1: RSV1 is for the first frame of a message; control frames are never compressed.
    if first & RSV1 != 0 && !matches!(opcode, Opcode::Text | Opcode::Binary) {
        return Err(ProtocolError::ReservedBit);
    }
    Ok(opcode)
}

fn check_extended(length: u64, extended: usize) -> Result<(), ProtocolError> {
    // RFC 6455 §5.2: the most significant bit MUST be 0, and the minimal number of bytes MUST be
    // used to encode the length.
    if length >> 63 != 0 {
        return Err(ProtocolError::LengthOverflow);
    }
    let shortest = match extended {
        0 => true,
        2 => length >= u64::from(LENGTH_IS_16_BITS),
        _ => length > u64::from(u16::MAX),
    };
    if shortest { Ok(()) } else { Err(ProtocolError::LengthNotShortest) }
}

/// The header of an unfragmented server frame with `length` bytes of payload: an array and the number
/// of bytes used. Never masked (RFC 6455 §5.1).
pub fn header(opcode: Opcode, rsv1: bool, length: usize) -> ([u8; SERVER_HEADER_BYTES_MAX], usize) {
    let mut bytes = [0; SERVER_HEADER_BYTES_MAX];
    bytes[0] = FIN | if rsv1 { RSV1 } else { 0 } | opcode as u8;
    let used = if length < usize::from(LENGTH_IS_16_BITS) {
        bytes[1] = length as u8;
        2
    } else if let Ok(length) = u16::try_from(length) {
        bytes[1] = LENGTH_IS_16_BITS;
        bytes[2..4].copy_from_slice(&length.to_be_bytes());
        4
    } else {
        bytes[1] = LENGTH_IS_64_BITS;
        bytes[2..10].copy_from_slice(&(length as u64).to_be_bytes());
        10
    };
    (bytes, used)
}

/// A whole unfragmented server frame. `rsv1`: the payload is a compressed message (RFC 7692 §6).
pub fn encode(opcode: Opcode, rsv1: bool, payload: &[u8]) -> Box<[u8]> {
    debug_assert!(!opcode.is_control() || payload.len() <= CONTROL_PAYLOAD_BYTES_MAX);
    let (bytes, used) = header(opcode, rsv1, payload.len());
    let mut frame = Vec::with_capacity(used + payload.len());
    frame.extend_from_slice(&bytes[..used]);
    frame.extend_from_slice(payload);
    frame.into_boxed_slice()
}

/// A ping frame. Truncates `payload` to [`CONTROL_PAYLOAD_BYTES_MAX`] bytes.
pub fn encode_ping(payload: &[u8]) -> Box<[u8]> {
    encode(Opcode::Ping, false, &payload[..payload.len().min(CONTROL_PAYLOAD_BYTES_MAX)])
}

/// The pong frame for a ping with this payload, which the pong MUST repeat (RFC 6455 §5.5.3).
pub fn encode_pong(payload: &[u8]) -> Box<[u8]> {
    encode(Opcode::Pong, false, &payload[..payload.len().min(CONTROL_PAYLOAD_BYTES_MAX)])
}

/// A close frame. Truncates the reason to [`CLOSE_REASON_BYTES_MAX`] bytes at a character boundary.
pub fn encode_close(close: &Close) -> Box<[u8]> {
    let mut end = close.reason.len().min(CLOSE_REASON_BYTES_MAX);
    while !close.reason.is_char_boundary(end) {
        end -= 1;
    }
    let reason = &close.reason[..end];
    let mut payload = Vec::with_capacity(2 + reason.len());
    payload.extend_from_slice(&close.code.0.to_be_bytes());
    payload.extend_from_slice(reason.as_bytes());
    encode(Opcode::Close, false, &payload)
}

/// The close frame that answers a client's: repeats its code, if it has one (RFC 6455 §5.5.1).
pub fn encode_close_reply(received: Option<CloseCode>) -> Box<[u8]> {
    match received {
        Some(code) => encode(Opcode::Close, false, &code.0.to_be_bytes()),
        None => encode(Opcode::Close, false, &[]),
    }
}

/// Decodes the payload of a client's close frame; `None` if it is empty.
///
/// # Errors
///
/// [`ProtocolError`] for half a code, a code that must not be sent, or a reason that is not UTF-8.
pub fn decode_close(payload: &[u8]) -> Result<Option<(CloseCode, &str)>, ProtocolError> {
    let (code, reason) = match payload {
        [] => return Ok(None),
        // RFC 6455 §5.5.1: if there is a body, its first two bytes MUST be the code.
        [_] => return Err(ProtocolError::CloseCodeCut),
        [high, low, reason @ ..] => (u16::from_be_bytes([*high, *low]), reason),
    };
    if !may_be_sent(code) {
        return Err(ProtocolError::CloseCodeInvalid);
    }
    match utf8::as_text(reason) {
        Some(reason) => Ok(Some((CloseCode(code), reason))),
        None => Err(ProtocolError::CloseReasonNotUtf8),
    }
}

/// Whether a close frame may contain this code (RFC 6455 §7.4.1 and §7.4.2, and the codes registered
/// later). 1004 has no meaning; 1005, 1006 and 1015 MUST NOT be sent; 1016 to 2999 are reserved for
/// the protocol; below 1000 and above 4999 are undefined.
fn may_be_sent(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

const _: () = {
    assert!(CLIENT_HEADER_BYTES_MAX == 2 + 8 + size_of::<MaskKey>());
    assert!(SERVER_HEADER_BYTES_MAX == 2 + 8);
    assert!(CONTROL_PAYLOAD_BYTES_MAX < LENGTH_IS_16_BITS as usize);
};

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: HeaderContext = HeaderContext { deflate: false, message_open: false };

    fn refused(input: &[u8], context: HeaderContext) -> ProtocolError {
        ClientHeader::decode(input, context).expect_err("must fail")
    }

    #[test]
    fn server_frames_of_rfc_6455_5_7() {
        assert_eq!(&*encode(Opcode::Text, false, b"Hello"), b"\x81\x05Hello");
        assert_eq!(&*encode_ping(b"Hello"), b"\x89\x05Hello");
        assert_eq!(&encode(Opcode::Binary, false, &[0; 256])[..4], b"\x82\x7e\x01\x00");
        let large = encode(Opcode::Binary, false, &[0; 65536]);
        assert_eq!(&large[..10], b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00");
        assert_eq!(large.len(), 65546);
    }

    #[test]
    fn length_form_changes_at_its_limits() {
        assert_eq!(header(Opcode::Text, true, 125), ([0xc1, 125, 0, 0, 0, 0, 0, 0, 0, 0], 2));
        assert_eq!(header(Opcode::Text, false, 126), ([0x81, 126, 0, 126, 0, 0, 0, 0, 0, 0], 4));
        assert_eq!(header(Opcode::Text, false, 65535).1, 4);
        assert_eq!(header(Opcode::Text, false, 65536).1, 10);
    }

    #[test]
    fn masked_hello_of_rfc_6455_5_7() {
        let input = b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58";
        let header = ClientHeader {
            fin: true,
            rsv1: false,
            opcode: Opcode::Text,
            length: 5,
            key: [0x37, 0xfa, 0x21, 0x3d],
        };
        assert_eq!(ClientHeader::decode(input, IDLE), Ok(HeaderStep::Complete(header, 6)));
        for cut in 0..6 {
            let wanted = if cut < 2 { 2 } else { 6 };
            assert_eq!(
                ClientHeader::decode(&input[..cut], IDLE),
                Ok(HeaderStep::NeedMore(wanted)),
                "{cut}"
            );
        }
    }

    #[test]
    fn each_invalid_header_has_its_error() {
        use ProtocolError::*;
        let open = HeaderContext { message_open: true, ..IDLE };
        let deflate = HeaderContext { deflate: true, ..IDLE };
        let open_deflate = HeaderContext { deflate: true, message_open: true };
        let table: [(&[u8], HeaderContext, ProtocolError); 18] = [
            (b"\xc1", IDLE, ReservedBit),
            (b"\xa1", deflate, ReservedBit),
            (b"\x91", deflate, ReservedBit),
            (b"\xc9", deflate, ReservedBit),
            (b"\xc0", open_deflate, ReservedBit),
            (b"\x83", IDLE, ReservedOpcode),
            (b"\x8b", IDLE, ReservedOpcode),
            (b"\x09", IDLE, ControlFragmented),
            (b"\x80", IDLE, NothingToContinue),
            (b"\x81", open, MessageNotFinished),
            (b"\x82", open, MessageNotFinished),
            (b"\x81\x05", IDLE, Unmasked),
            (b"\x89\xfe", IDLE, ControlTooLong),
            (b"\x88\xff", IDLE, ControlTooLong),
            (b"\x82\xfe\x00\x7d", IDLE, LengthNotShortest),
            (b"\x82\xff\x00\x00\x00\x00\x00\x00\xff\xff", IDLE, LengthNotShortest),
            (b"\x82\xff\x80\x00\x00\x00\x00\x00\x00\x00", IDLE, LengthOverflow),
            (b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff", IDLE, LengthOverflow),
        ];
        for (input, context, error) in table {
            assert_eq!(refused(input, context), error, "{input:02x?}");
        }
    }

    #[test]
    fn every_opcode_is_defined_or_reserved() {
        for byte in 0..=u8::MAX {
            match Opcode::decode(byte) {
                Ok(opcode) => assert_eq!(opcode as u8, byte & 0x0f),
                Err(_) => assert!(matches!(byte & 0x0f, 0x3..=0x7 | 0xb..=0xf)),
            }
        }
    }

    #[test]
    fn close_codes_match_the_registry() {
        let valid: Vec<u16> = (0..=u16::MAX).filter(|code| may_be_sent(*code)).collect();
        let expected: Vec<u16> = [1000, 1001, 1002, 1003].into_iter().chain(1007..=1014).collect();
        assert_eq!(valid[..12], expected);
        assert!(valid[12..].iter().copied().eq(3000..=4999));
        assert_eq!(decode_close(b""), Ok(None));
        assert_eq!(decode_close(b"\x03"), Err(ProtocolError::CloseCodeCut));
        assert_eq!(decode_close(b"\x03\xed"), Err(ProtocolError::CloseCodeInvalid));
        assert_eq!(decode_close(b"\x03\xe8bye"), Ok(Some((CloseCode::NORMAL, "bye"))));
        assert_eq!(decode_close(b"\x03\xe8\xff"), Err(ProtocolError::CloseReasonNotUtf8));
    }

    #[test]
    fn long_reason_is_truncated_at_a_character_boundary() {
        let reason = format!("{}€", "x".repeat(CLOSE_REASON_BYTES_MAX - 1));
        let frame = encode_close(&Close { code: CloseCode::NORMAL, reason: reason.into() });
        assert_eq!(frame.len(), 2 + 2 + CLOSE_REASON_BYTES_MAX - 1);
        assert_eq!(&frame[..4], b"\x88\x7c\x03\xe8");
    }

    #[test]
    fn close_reply_repeats_the_code() {
        assert_eq!(&*encode_close_reply(None), b"\x88\x00");
        assert_eq!(&*encode_close_reply(Some(CloseCode::GOING_AWAY)), b"\x88\x02\x03\xe9");
    }

    /// The message that a client library decodes from the server's bytes.
    fn read_by_tungstenite(bytes: &[u8]) -> tungstenite::Message {
        use tungstenite::protocol::{Role, WebSocketContext};
        let mut wire = std::io::Cursor::new(bytes.to_vec());
        let message = WebSocketContext::new(Role::Client, None).read(&mut wire);
        assert_eq!(wire.position(), bytes.len() as u64);
        message.expect("a message")
    }

    proptest::proptest! {
        #[test]
        fn tungstenite_decodes_encoded_frames(
            text in ".{0,60}",
            count in proptest::prop_oneof![0usize..300, 65_500usize..65_600],
        ) {
            use tungstenite::Message;
            let read = read_by_tungstenite(&encode(Opcode::Text, false, text.as_bytes()));
            assert_eq!(read, Message::text(text.clone()));
            let bytes = vec![0xa5; count];
            let read = read_by_tungstenite(&encode(Opcode::Binary, false, &bytes));
            assert_eq!(read, Message::binary(bytes.clone()));
            let control = &bytes[..count.min(CONTROL_PAYLOAD_BYTES_MAX)];
            assert_eq!(read_by_tungstenite(&encode_ping(&bytes)), Message::Ping(control.to_vec().into()));
            assert_eq!(read_by_tungstenite(&encode_pong(&bytes)), Message::Pong(control.to_vec().into()));
            let close = Close { code: CloseCode::SESSION_REPLACED, reason: text.into() };
            match read_by_tungstenite(&encode_close(&close)) {
                Message::Close(Some(frame)) => {
                    assert_eq!(u16::from(frame.code), 4000);
                    assert!(close.reason.starts_with(frame.reason.as_str()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
