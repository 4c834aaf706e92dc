//! Oracle of the receiver: tungstenite decodes the same stream as a server. Accepted differences:
//!
//! 1. Delivery finds an error at the first wrong byte, tungstenite when the frame is complete. So after
//!    an error of Delivery, tungstenite gets the rest of the frame as zeros.
//! 2. For a frame with several errors the two may report different ones. tungstenite may report any
//!    header error (1002) as a length over the limit (1009), which it checks first. A close frame with
//!    a bad code and a bad reason is 1002 for Delivery and 1007 for tungstenite.
//! 3. tungstenite accepts lengths that are not in their shortest form, against RFC 6455 §5.2. Delivery
//!    rejects any long form in a control frame; tungstenite accepts it for a short length.
//! 4. A length of 2⁶³ or more is 1002 for Delivery (RFC 6455 §5.2) and 1009 for tungstenite.
//! 5. A close frame with a code that must not be sent is an error for Delivery. tungstenite also answers
//!    with 1002, but emits the close frame. Delivery accepts 1014 (bad gateway, registered);
//!    tungstenite does not.

use std::io::{self, Read, Write};

use delivery::protocol::error::ProtocolError;
use tungstenite::protocol::{Role, WebSocketConfig, WebSocketContext};
use tungstenite::{Error, Message};

/// Everything that a receiver emitted for a stream, and its error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transcript {
    /// Messages and control frames, in order.
    pub incoming: Vec<Message>,
    /// The protocol error, if any.
    pub error: Option<ProtocolError>,
}

/// State of tungstenite after the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OracleState {
    /// Waits for more input.
    Open,
    /// Fails with this close code.
    Failed(u16),
}

/// Panics if tungstenite disagrees with `ours`, except for the accepted differences.
pub fn compare(stream: &[u8], message_bytes_max: usize, ours: &Transcript) {
    let count = ours.incoming.len();
    let Some(error) = ours.error else {
        let (theirs, state) = read(stream, message_bytes_max);
        // Difference 5: 1014.
        if close_code(ours.incoming.last()) == Some(1014) {
            assert_eq!(theirs[..theirs.len() - 1], ours.incoming[..count - 1]);
            return;
        }
        assert_eq!(theirs, ours.incoming);
        assert_eq!(state, OracleState::Open, "an error that Delivery missed");
        return;
    };
    // Difference 1. The longest frame within the limit, after the longest header.
    let padding = vec![0; message_bytes_max.max(125) + 14];
    let (theirs, state) = read(&[stream, &padding].concat(), message_bytes_max);
    assert!(theirs.len() >= count, "{theirs:?}\n{ours:?}");
    assert_eq!(theirs[..count], ours.incoming);
    let emits_more = theirs.len() > count;
    match (error, state) {
        // Difference 3: tungstenite decodes the rest of the frame.
        (ProtocolError::LengthNotShortest | ProtocolError::ControlTooLong, _) => {}
        // Difference 5.
        (ProtocolError::CloseCodeInvalid, OracleState::Open) => {
            assert_eq!(close_code(theirs.last()), Some(1002), "{theirs:?}");
        }
        // Difference 4.
        (ProtocolError::LengthOverflow, OracleState::Failed(1009)) => assert!(!emits_more),
        // Difference 2.
        (ProtocolError::CloseCodeInvalid, OracleState::Failed(1007)) => assert!(!emits_more),
        (error, OracleState::Failed(1009)) if error.code().0 == 1002 => {
            let in_header =
                !matches!(error, ProtocolError::CloseCodeCut | ProtocolError::CloseCodeInvalid);
            assert!(in_header && !emits_more, "{error:?}");
        }
        (error, OracleState::Failed(code)) => {
            assert_eq!(error.code().0, code, "{error:?}");
            assert!(!emits_more, "{theirs:?}");
        }
        (error, OracleState::Open) => panic!("{error:?}, which tungstenite missed"),
    }
}

fn close_code(message: Option<&Message>) -> Option<u16> {
    match message {
        Some(Message::Close(Some(close))) => Some(close.code.into()),
        _ => None,
    }
}

/// A complete input stream; output is discarded.
struct Wire<'a>(&'a [u8]);

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.0.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read(stream: &[u8], message_bytes_max: usize) -> (Vec<Message>, OracleState) {
    let config = WebSocketConfig::default()
        .read_buffer_size(1024)
        .max_message_size(Some(message_bytes_max))
        // The limit also applies to control frames, which the message limit does not cover.
        .max_frame_size(Some(message_bytes_max.max(125)));
    let mut context = WebSocketContext::new(Role::Server, Some(config));
    let mut wire = Wire(stream);
    let mut incoming = Vec::new();
    loop {
        match context.read(&mut wire) {
            Ok(message) => {
                let is_close = message.is_close();
                incoming.push(message);
                if is_close {
                    return (incoming, OracleState::Open);
                }
            }
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return (incoming, OracleState::Open);
            }
            Err(Error::Protocol(_)) => return (incoming, OracleState::Failed(1002)),
            Err(Error::Utf8(_)) => return (incoming, OracleState::Failed(1007)),
            Err(Error::Capacity(_)) => return (incoming, OracleState::Failed(1009)),
            Err(error) => panic!("{error}"),
        }
    }
}
