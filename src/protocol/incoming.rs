//! Complete messages and control frames: the types that the receiver emits, and the checks before it
//! emits them (inflation, UTF-8, close payload).

use crate::domain::close::CloseCode;
use crate::protocol::deflate::{InflateError, Inflater};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{self, Opcode};
use crate::protocol::utf8::{self, Utf8Checker};

/// Receive settings of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveRules {
    /// Longest message, bytes, as sent and after inflation.
    pub message_bytes_max: usize,
    /// permessage-deflate was negotiated.
    pub deflate: bool,
}

/// Type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// Checked UTF-8.
    Text,
    /// Arbitrary bytes.
    Binary,
}

impl MessageKind {
    /// The opcode of a message of this kind.
    pub fn opcode(self) -> Opcode {
        match self {
            Self::Text => Opcode::Text,
            Self::Binary => Opcode::Binary,
        }
    }

    /// The kind of message that a data frame starts; `None` for a continuation.
    pub(super) fn started_by(opcode: Opcode) -> Option<Self> {
        match opcode {
            Opcode::Text => Some(Self::Text),
            Opcode::Binary => Some(Self::Binary),
            Opcode::Continuation | Opcode::Close | Opcode::Ping | Opcode::Pong => None,
        }
    }
}

/// A message or control frame of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A complete message, reassembled from its fragments.
    Message {
        /// Text or binary.
        kind: MessageKind,
        /// Unmasked and inflated; valid UTF-8 if the message is text.
        payload: &'a [u8],
        /// The client sent it compressed (RFC 7692 §6).
        compressed: bool,
    },
    /// The server must answer with a pong of the same payload (RFC 6455 §5.5.2).
    Ping(&'a [u8]),
    /// The answer to a ping, or an unsolicited heartbeat (RFC 6455 §5.5.3).
    Pong(&'a [u8]),
    /// The client closes; nothing follows. The server must answer with a close frame, unless it has
    /// sent one (RFC 6455 §5.5.1).
    Close(Option<(CloseCode, &'a str)>),
}

/// Whether the receiver continues after it has emitted something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flow {
    /// Decode the rest of the input.
    Continue,
    /// Discard the rest of the input and everything that follows on this connection.
    Stop,
}

/// Receive state that all connections of a thread share.
#[derive(Debug, Default)]
pub struct Scratch {
    inflater: Option<Box<Inflater>>,
}

/// A message whose last fragment has not arrived.
#[derive(Debug)]
pub(super) struct OpenMessage {
    pub(super) kind: MessageKind,
    pub(super) compressed: bool,
    /// Unmasked, still compressed. Grows with the bytes received, not with the length announced.
    pub(super) bytes: Vec<u8>,
    /// Checks uncompressed text.
    text: Utf8Checker,
}

impl OpenMessage {
    pub(super) fn new(kind: MessageKind, compressed: bool) -> Self {
        Self { kind, compressed, bytes: Vec::new(), text: Utf8Checker::default() }
    }

    /// Appends unmasked bytes. Checks uncompressed text at once, so that the first invalid byte fails
    /// (RFC 6455 §8.1). Compressed text is checked when it is complete: inflating piece by piece would
    /// need one inflater per open message.
    pub(super) fn push(&mut self, piece: &[u8]) -> Result<(), ProtocolError> {
        if self.kind == MessageKind::Text && !self.compressed {
            self.text.push(piece).map_err(|_| ProtocolError::TextNotUtf8)?;
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }
}

/// Callback for the messages and control frames that the receiver emits.
pub(super) trait Sink: FnMut(Incoming<'_>) -> Flow {}
impl<S: FnMut(Incoming<'_>) -> Flow> Sink for S {}

/// Checks complete messages and control frames and passes them to the sink. Holds the arguments of
/// one [`Receiver::receive`](super::receiver::Receiver::receive) call.
pub(super) struct Emitter<'a, S> {
    pub(super) rules: &'a ReceiveRules,
    pub(super) scratch: &'a mut Scratch,
    pub(super) sink: &'a mut S,
}

impl<S: Sink> Emitter<'_, S> {
    /// Emits a complete control frame.
    pub(super) fn control(
        &mut self,
        opcode: Opcode,
        payload: &[u8],
    ) -> Result<Flow, ProtocolError> {
        Ok(match opcode {
            Opcode::Ping => (self.sink)(Incoming::Ping(payload)),
            Opcode::Pong => (self.sink)(Incoming::Pong(payload)),
            Opcode::Close => {
                let close = frame::decode_close(payload)?;
                // RFC 6455 §5.5.1: data after a close frame is not processed.
                let (Flow::Continue | Flow::Stop) = (self.sink)(Incoming::Close(close));
                Flow::Stop
            }
            Opcode::Continuation | Opcode::Text | Opcode::Binary => unreachable!("a data frame"),
        })
    }

    /// Emits a message whose single frame is complete in the input.
    pub(super) fn whole_message(
        &mut self,
        kind: MessageKind,
        compressed: bool,
        payload: &[u8],
    ) -> Result<Flow, ProtocolError> {
        if kind == MessageKind::Text && !compressed && utf8::as_text(payload).is_none() {
            return Err(ProtocolError::TextNotUtf8);
        }
        self.message(kind, compressed, payload)
    }

    /// Emits a message whose last fragment has been appended.
    pub(super) fn open_message(&mut self, message: OpenMessage) -> Result<Flow, ProtocolError> {
        message.text.finish().map_err(|_| ProtocolError::TextNotUtf8)?;
        self.message(message.kind, message.compressed, &message.bytes)
    }

    /// Inflates a compressed message and checks its text. Uncompressed text is checked already.
    fn message(
        &mut self,
        kind: MessageKind,
        compressed: bool,
        payload: &[u8],
    ) -> Result<Flow, ProtocolError> {
        if !compressed {
            return Ok((self.sink)(Incoming::Message { kind, payload, compressed }));
        }
        let inflater = self.scratch.inflater.get_or_insert_default();
        let payload = match inflater.inflate(payload, self.rules.message_bytes_max) {
            Ok(payload) => payload,
            Err(InflateError::Corrupt) => return Err(ProtocolError::NotDeflate),
            Err(InflateError::TooBig) => return Err(ProtocolError::MessageTooBig),
        };
        if kind == MessageKind::Text && utf8::as_text(payload).is_none() {
            return Err(ProtocolError::TextNotUtf8);
        }
        Ok((self.sink)(Incoming::Message { kind, payload, compressed }))
    }
}
