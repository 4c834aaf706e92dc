//! Whole things out of frames: messages put together, inflated and judged as text, control frames
//! read; and the words in which they are told.

use crate::domain::close::CloseCode;
use crate::protocol::deflate::{InflateError, Inflater};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{self, Opcode};
use crate::protocol::utf8::{self, Utf8Checker};

/// What holds for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveRules {
    /// Longest message, bytes, as sent and once inflated.
    pub message_bytes_max: usize,
    /// permessage-deflate was negotiated.
    pub deflate: bool,
}

/// Text or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// UTF-8, checked.
    Text,
    /// Anything.
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

    /// The kind of message that a data frame begins; `None` for a continuation.
    pub(super) fn begun_by(opcode: Opcode) -> Option<Self> {
        match opcode {
            Opcode::Text => Some(Self::Text),
            Opcode::Binary => Some(Self::Binary),
            Opcode::Continuation | Opcode::Close | Opcode::Ping | Opcode::Pong => None,
        }
    }
}

/// What a client said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A whole message, however it was cut.
    Message {
        /// Text or bytes.
        kind: MessageKind,
        /// Unmasked, inflated; UTF-8 if it is text.
        payload: &'a [u8],
        /// It came compressed (RFC 7692 §6).
        compressed: bool,
    },
    /// To be answered with a pong of the same payload (RFC 6455 §5.5.2).
    Ping(&'a [u8]),
    /// An answer, or a heartbeat of the client's own (RFC 6455 §5.5.3).
    Pong(&'a [u8]),
    /// The client closes; nothing follows. To be answered with a close frame, unless that is the
    /// answer (RFC 6455 §5.5.1).
    Close(Option<(CloseCode, &'a str)>),
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flow {
    /// Read on.
    Continue,
    /// Read nothing more of this connection: what is left of the input is thrown away.
    Stop,
}

/// What all connections of a thread share for receiving.
#[derive(Debug, Default)]
pub struct Scratch {
    inflater: Option<Box<Inflater>>,
}

/// A message that is not finished.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: MessageKind,
    pub(super) compressed: bool,
    /// Unmasked, still compressed. Grows with what arrives, never with what is announced.
    pub(super) bytes: Vec<u8>,
    /// Of uncompressed text.
    text: Utf8Checker,
}

impl Message {
    /// Nothing of it has come yet.
    pub(super) fn new(kind: MessageKind, compressed: bool) -> Self {
        Self { kind, compressed, bytes: Vec::new(), text: Utf8Checker::default() }
    }

    /// Adds what came, unmasked. Text is judged at once, at the first byte that cannot be right
    /// (RFC 6455 §8.1), unless it is compressed: inflating it piece by piece would take an inflater
    /// for each half-sent message.
    pub(super) fn push(&mut self, piece: &[u8]) -> Result<(), ProtocolError> {
        if self.kind == MessageKind::Text && !self.compressed {
            self.text.push(piece).map_err(|_| ProtocolError::TextNotUtf8)?;
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }
}

/// Who is told.
pub(super) trait Sink: FnMut(Incoming<'_>) -> Flow {}
impl<S: FnMut(Incoming<'_>) -> Flow> Sink for S {}

/// What one call of [`Receiver::receive`](super::receiver::Receiver::receive) works with.
pub(super) struct Call<'a, S> {
    pub(super) rules: &'a ReceiveRules,
    pub(super) scratch: &'a mut Scratch,
    pub(super) sink: &'a mut S,
}

impl<S: Sink> Call<'_, S> {
    /// A whole control frame.
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
                // RFC 6455 §5.5.1: what follows a close frame is not processed.
                let (Flow::Continue | Flow::Stop) = (self.sink)(Incoming::Close(close));
                Flow::Stop
            }
            Opcode::Continuation | Opcode::Text | Opcode::Binary => unreachable!("a data frame"),
        })
    }

    /// A whole message that came in one piece.
    pub(super) fn message(
        &mut self,
        kind: MessageKind,
        compressed: bool,
        payload: &[u8],
    ) -> Result<Flow, ProtocolError> {
        if kind == MessageKind::Text && !compressed && utf8::as_text(payload).is_none() {
            return Err(ProtocolError::TextNotUtf8);
        }
        self.tell(kind, compressed, payload)
    }

    /// A message whose last piece has come.
    pub(super) fn finished(&mut self, message: Message) -> Result<Flow, ProtocolError> {
        message.text.finish().map_err(|_| ProtocolError::TextNotUtf8)?;
        self.tell(message.kind, message.compressed, &message.bytes)
    }

    /// Inflates a compressed message and judges its text; uncompressed text has been judged.
    fn tell(
        &mut self,
        kind: MessageKind,
        compressed: bool,
        payload: &[u8],
    ) -> Result<Flow, ProtocolError> {
        if !compressed {
            return Ok((self.sink)(Incoming::Message { kind, payload, compressed }));
        }
        let inflater = self.scratch.inflater.get_or_insert_default();
        let payload =
            inflater.inflate(payload, self.rules.message_bytes_max).map_err(
                |error| match error {
                    InflateError::Corrupt => ProtocolError::NotDeflate,
                    InflateError::TooBig => ProtocolError::MessageTooBig,
                },
            )?;
        if kind == MessageKind::Text && utf8::as_text(payload).is_none() {
            return Err(ProtocolError::TextNotUtf8);
        }
        Ok((self.sink)(Incoming::Message { kind, payload, compressed }))
    }
}
