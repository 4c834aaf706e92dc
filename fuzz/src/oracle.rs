//! tungstenite, reading the same stream as a server. Where the two differ, why that is right:
//!
//! 1. A frame's faults are seen by us byte by byte, by tungstenite when the frame is whole. So where
//!    we found a fault, it is given the frame's rest as zeros.
//! 2. Of a frame with several faults each reports another one: all header faults (1002) may be
//!    reported by it as a length over the limit (1009), which it looks at first; a close frame with
//!    a bad code and a bad reason is 1002 to us and 1007 to it.
//! 3. It takes lengths that are not in their shortest form, against RFC 6455 §5.2; of a control frame
//!    any long form is a fault to us, a short length in long form is none to it.
//! 4. A length of 2⁶³ or more is 1002 to us (RFC 6455 §5.2), too long (1009) to it.
//! 5. A close frame with a code that must not be sent is a fault to us; it answers with 1002 as we
//!    do, but tells the close frame. 1014 is registered (bad gateway) and taken by us, not by it.

use std::io::{self, Read, Write};

use delivery::protocol::error::ProtocolError;
use tungstenite::protocol::{Role, WebSocketConfig, WebSocketContext};
use tungstenite::{Error, Message};

/// What a client said, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// A text message.
    Text(Vec<u8>),
    /// A binary message.
    Binary(Vec<u8>),
    /// A ping.
    Ping(Vec<u8>),
    /// A pong.
    Pong(Vec<u8>),
    /// A close frame: code and reason.
    Close(Option<(u16, String)>),
}

/// All that a stream told, how it ended, and what the receiver still holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// In order.
    pub told: Vec<Told>,
    /// The fault, if there was one.
    pub fault: Option<ProtocolError>,
}

/// How tungstenite's reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It wants more.
    Open,
    /// It would close with this code.
    Fault(u16),
}

/// Panics if tungstenite says other than `ours`, except as listed.
pub fn compare(stream: &[u8], message_bytes_max: usize, ours: &Outcome) {
    let Some(fault) = ours.fault else {
        let (told, verdict) = read(stream, message_bytes_max);
        // Difference 5: 1014.
        let told_1014 = ours.told.iter().any(|t| matches!(t, Told::Close(Some((1014, _)))));
        if told_1014 {
            assert_eq!(told[..told.len() - 1], ours.told[..ours.told.len() - 1]);
            return;
        }
        assert_eq!(told, ours.told);
        assert_eq!(verdict, Verdict::Open, "a fault that we did not see");
        return;
    };
    // Difference 1. The longest frame that is not over the limit, behind the longest header.
    let padding = vec![0; message_bytes_max.max(125) + 14];
    let (told, verdict) = read(&[stream, &padding].concat(), message_bytes_max);
    assert!(told.len() >= ours.told.len(), "{told:?}\n{ours:?}");
    assert_eq!(told[..ours.told.len()], ours.told);
    let told_more = told.len() > ours.told.len();
    match (fault, verdict) {
        // Difference 3: whatever it makes of the rest.
        (ProtocolError::LengthNotShortest | ProtocolError::ControlTooLong, _) => {}
        // Difference 5.
        (ProtocolError::CloseCodeInvalid, Verdict::Open) => {
            assert!(matches!(told.last(), Some(Told::Close(Some((1002, _))))), "{told:?}");
        }
        // Difference 4.
        (ProtocolError::LengthOverflow, Verdict::Fault(1009)) => assert!(!told_more),
        // Difference 2.
        (ProtocolError::CloseCodeInvalid, Verdict::Fault(1007)) => assert!(!told_more),
        (fault, Verdict::Fault(1009)) if fault.code().0 == 1002 => {
            let of_header =
                !matches!(fault, ProtocolError::CloseCodeCut | ProtocolError::CloseCodeInvalid);
            assert!(of_header && !told_more, "{fault:?}");
        }
        (fault, Verdict::Fault(code)) => {
            assert_eq!(fault.code().0, code, "{fault:?}");
            assert!(!told_more, "{told:?}");
        }
        (fault, Verdict::Open) => panic!("{fault:?}, which it did not see"),
    }
}

/// A stream that is all there, and a peer that takes everything.
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

fn read(stream: &[u8], message_bytes_max: usize) -> (Vec<Told>, Verdict) {
    let config = WebSocketConfig::default()
        .read_buffer_size(1024)
        .max_message_size(Some(message_bytes_max))
        // Control frames are not bounded by the message limit, and this bound is for both.
        .max_frame_size(Some(message_bytes_max.max(125)));
    let mut context = WebSocketContext::new(Role::Server, Some(config));
    let mut wire = Wire(stream);
    let mut told = Vec::new();
    loop {
        match context.read(&mut wire) {
            Ok(Message::Text(text)) => told.push(Told::Text(text.as_bytes().to_vec())),
            Ok(Message::Binary(bytes)) => told.push(Told::Binary(bytes.to_vec())),
            Ok(Message::Ping(payload)) => told.push(Told::Ping(payload.to_vec())),
            Ok(Message::Pong(payload)) => told.push(Told::Pong(payload.to_vec())),
            Ok(Message::Close(close)) => {
                let close = close.map(|c| (u16::from(c.code), c.reason.as_str().to_owned()));
                told.push(Told::Close(close));
                return (told, Verdict::Open);
            }
            Ok(Message::Frame(_)) => unreachable!("never read"),
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return (told, Verdict::Open);
            }
            Err(Error::Protocol(_)) => return (told, Verdict::Fault(1002)),
            Err(Error::Utf8(_)) => return (told, Verdict::Fault(1007)),
            Err(Error::Capacity(_)) => return (told, Verdict::Fault(1009)),
            Err(error) => panic!("{error}"),
        }
    }
}
