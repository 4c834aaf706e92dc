//! Receiving half of a connection after the upgrade: bytes in, messages and control frames out.
//!
//! A frame that is complete in the input is emitted without a copy. Only an incomplete header,
//! control frame or message is stored, in one allocation. An idle connection has none.
//!
//! ```text
//!               ┌────────────────◄─ frame complete ─────────────────┐
//!  BetweenFrames ─ header split ─► Header ─ header complete ─► Control │ Data
//! ```

use crate::domain::limits::{CLIENT_HEADER_BYTES_MAX, CONTROL_PAYLOAD_BYTES_MAX};
use crate::protocol::deflate;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ClientHeader, HeaderContext, HeaderStep};
use crate::protocol::incoming::{Emitter, OpenMessage, Sink};
use crate::protocol::mask;

pub use crate::protocol::incoming::{Flow, Incoming, MessageKind, ReceiveRules, Scratch};

/// The receiving half of one connection.
#[derive(Debug, Default)]
pub struct Receiver {
    partial: Option<Box<Partial>>,
    stopped: bool,
}

/// Incomplete input: the position within a frame, and the message that the frame belongs to.
#[derive(Debug)]
struct Partial {
    state: ReadState,
    message: Option<OpenMessage>,
    /// When it began, as the caller says.
    since: Option<u64>,
}

#[derive(Debug)]
enum ReadState {
    BetweenFrames,
    Header { bytes: [u8; CLIENT_HEADER_BYTES_MAX], len: usize },
    Control { header: ClientHeader, bytes: [u8; CONTROL_PAYLOAD_BYTES_MAX], len: usize },
    Data { header: ClientHeader, length: usize, received: usize },
}

impl Receiver {
    /// Decodes the next bytes of the connection, unmasks them in place, and passes each complete
    /// message and control frame to `sink`. The calls of `sink` and the result do not depend on how
    /// the stream is split into inputs. After an error, a close frame or [`Flow::Stop`] all input is
    /// ignored.
    ///
    /// # Errors
    ///
    /// The client violated the protocol: send [`ProtocolError::close`] and close (RFC 6455 §7.1.7).
    /// `sink` has received everything that was complete before the error.
    pub fn receive(
        &mut self,
        input: &mut [u8],
        rules: &ReceiveRules,
        scratch: &mut Scratch,
        sink: &mut impl FnMut(Incoming<'_>) -> Flow,
    ) -> Result<(), ProtocolError> {
        let mut emitter = Emitter { rules, scratch, sink };
        let mut input = input;
        while !self.stopped && !input.is_empty() {
            let consumed = match self.partial.as_deref_mut().map(|partial| &mut partial.state) {
                None | Some(ReadState::BetweenFrames) => self.frame_start(input, &mut emitter),
                Some(ReadState::Header { .. }) => self.header_piece(input, &mut emitter),
                Some(ReadState::Control { .. }) => self.control_piece(input, &mut emitter),
                Some(ReadState::Data { .. }) => self.data_piece(input, &mut emitter),
            };
            match consumed {
                Ok((consumed, Flow::Continue)) => input = &mut input[consumed..],
                Ok((_, Flow::Stop)) => self.stop(),
                Err(error) => {
                    self.stop();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Notes the caller's time `now`, if what has been received so far ends within a frame or a message that began
    /// since the last call. Returns whether it does.
    pub fn note_begun(&mut self, now: u64) -> bool {
        let begun = self.partial.as_mut().filter(|partial| partial.since.is_none());
        begun.map(|partial| partial.since = Some(now)).is_some()
    }

    /// Since when the frame or message is incomplete within which the received bytes end, as
    /// [`Receiver::note_begun`] was told.
    pub fn incomplete_since(&self) -> Option<u64> {
        self.partial.as_ref()?.since
    }

    /// Heap memory for incomplete input, bytes: zero for an idle connection.
    pub fn held_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| {
            size_of::<Partial>() + partial.message.as_ref().map_or(0, |m| m.bytes.capacity())
        })
    }

    fn stop(&mut self) {
        self.partial = None;
        self.stopped = true;
    }

    fn partial(&mut self) -> &mut Partial {
        let between =
            || Box::new(Partial { state: ReadState::BetweenFrames, message: None, since: None });
        self.partial.get_or_insert_with(between)
    }

    fn message(&self) -> Option<&OpenMessage> {
        self.partial.as_ref().and_then(|partial| partial.message.as_ref())
    }

    /// The current frame is complete. Without an open message nothing stays allocated.
    fn frame_complete(&mut self) {
        match &mut self.partial {
            Some(partial) if partial.message.is_some() => partial.state = ReadState::BetweenFrames,
            _ => self.partial = None,
        }
    }

    fn context(&self, rules: &ReceiveRules) -> HeaderContext {
        HeaderContext { deflate: rules.deflate, message_open: self.message().is_some() }
    }

    /// `input` starts with a frame.
    fn frame_start<S: Sink>(&mut self, input: &mut [u8], emitter: &mut Emitter<'_, S>) -> Consumed {
        match ClientHeader::decode(input, self.context(emitter.rules))? {
            HeaderStep::NeedMore(_) => {
                let mut bytes = [0; CLIENT_HEADER_BYTES_MAX];
                bytes[..input.len()].copy_from_slice(input);
                self.partial().state = ReadState::Header { bytes, len: input.len() };
                Ok((input.len(), Flow::Continue))
            }
            HeaderStep::Complete(header, used) => {
                let (consumed, flow) = self.frame(header, &mut input[used..], emitter)?;
                Ok((used + consumed, flow))
            }
        }
    }

    /// `input` continues a header.
    fn header_piece<S: Sink>(
        &mut self,
        input: &mut [u8],
        emitter: &mut Emitter<'_, S>,
    ) -> Consumed {
        let context = self.context(emitter.rules);
        let ReadState::Header { bytes, len } = &mut self.partial().state else { unreachable!() };
        let before = *len;
        let taken = input.len().min(CLIENT_HEADER_BYTES_MAX - before);
        bytes[before..before + taken].copy_from_slice(&input[..taken]);
        *len = before + taken;
        match ClientHeader::decode(&bytes[..*len], context)? {
            HeaderStep::NeedMore(_) => Ok((taken, Flow::Continue)),
            HeaderStep::Complete(header, used) => {
                let used = used - before;
                let (consumed, flow) = self.frame(header, &mut input[used..], emitter)?;
                Ok((used + consumed, flow))
            }
        }
    }

    /// `input` starts with the payload of this frame.
    fn frame<S: Sink>(
        &mut self,
        header: ClientHeader,
        input: &mut [u8],
        emitter: &mut Emitter<'_, S>,
    ) -> Consumed {
        if header.opcode.is_control() {
            let length = header.length as usize; // at most 125, checked with the header
            if let Some(payload) = input.get_mut(..length) {
                mask::apply(payload, header.key);
                self.frame_complete();
                return Ok((length, emitter.control(header.opcode, payload)?));
            }
            self.partial().state =
                ReadState::Control { header, bytes: [0; CONTROL_PAYLOAD_BYTES_MAX], len: 0 };
            return self.control_piece(input, emitter);
        }
        let length = self.check_length(&header, emitter.rules)?;
        if let Some(kind) = MessageKind::started_by(header.opcode) {
            if header.fin
                && let Some(payload) = input.get_mut(..length)
            {
                mask::apply(payload, header.key);
                self.frame_complete();
                return Ok((length, emitter.whole_message(kind, header.rsv1, payload)?));
            }
            self.partial().message = Some(OpenMessage::new(kind, header.rsv1));
        }
        self.partial().state = ReadState::Data { header, length, received: 0 };
        self.data_piece(input, emitter)
    }

    /// Rejects a message that is too long before any of it is stored (RFC 6455 §10.4).
    fn check_length(
        &self,
        header: &ClientHeader,
        rules: &ReceiveRules,
    ) -> Result<usize, ProtocolError> {
        let (so_far, compressed) = match self.message() {
            Some(message) => (message.bytes.len(), message.compressed),
            None => (0, header.rsv1),
        };
        let limit = match compressed {
            false => rules.message_bytes_max,
            true => deflate::compressed_bytes_max(rules.message_bytes_max),
        };
        match usize::try_from(header.length) {
            Ok(length) if length <= limit.saturating_sub(so_far) => Ok(length),
            _ => Err(ProtocolError::MessageTooBig),
        }
    }

    /// `input` continues the payload of a control frame.
    fn control_piece<S: Sink>(
        &mut self,
        input: &mut [u8],
        emitter: &mut Emitter<'_, S>,
    ) -> Consumed {
        let ReadState::Control { header, bytes, len } = &mut self.partial().state else {
            unreachable!()
        };
        let length = header.length as usize; // at most 125, checked with the header
        let taken = input.len().min(length - *len);
        bytes[*len..*len + taken].copy_from_slice(&input[..taken]);
        *len += taken;
        if *len < length {
            return Ok((taken, Flow::Continue));
        }
        mask::apply(&mut bytes[..length], header.key);
        let (opcode, bytes) = (header.opcode, *bytes);
        self.frame_complete();
        Ok((taken, emitter.control(opcode, &bytes[..length])?))
    }

    /// `input` continues the payload of a data frame.
    fn data_piece<S: Sink>(&mut self, input: &mut [u8], emitter: &mut Emitter<'_, S>) -> Consumed {
        let Partial {
            state: ReadState::Data { header, length, received },
            message: Some(message),
            ..
        } = self.partial()
        else {
            unreachable!()
        };
        let taken = input.len().min(*length - *received);
        let piece = &mut input[..taken];
        mask::apply_from(piece, header.key, *received);
        message.push(piece)?;
        *received += taken;
        if *received < *length {
            return Ok((taken, Flow::Continue));
        }
        let message = if header.fin { self.partial().message.take() } else { None };
        self.frame_complete();
        let flow = match message {
            Some(message) => emitter.open_message(message)?,
            None => Flow::Continue,
        };
        Ok((taken, flow))
    }
}

/// Bytes consumed, and whether to continue.
type Consumed = Result<(usize, Flow), ProtocolError>;

const _: () = assert!(size_of::<Receiver>() <= 16);

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: ReceiveRules = ReceiveRules { message_bytes_max: 100, deflate: true };

    /// What the receiver emits for a stream, as lines; the result; and the receiver.
    fn receive(pieces: &mut [Vec<u8>]) -> (Vec<String>, Result<(), ProtocolError>, Receiver) {
        let mut receiver = Receiver::default();
        let mut scratch = Scratch::default();
        let mut lines = Vec::new();
        let mut sink = |incoming: Incoming<'_>| {
            lines.push(match incoming {
                Incoming::Message { kind, payload, compressed } => {
                    format!(
                        "{kind:?}{} {}",
                        if compressed { "Z" } else { "" },
                        payload.escape_ascii()
                    )
                }
                Incoming::Ping(payload) => format!("Ping {}", payload.escape_ascii()),
                Incoming::Pong(payload) => format!("Pong {}", payload.escape_ascii()),
                Incoming::Close(close) => format!("Close {close:?}"),
            });
            Flow::Continue
        };
        let verdict = pieces
            .iter_mut()
            .try_for_each(|piece| receiver.receive(piece, &RULES, &mut scratch, &mut sink));
        (lines, verdict, receiver)
    }

    /// A client's frame, masked.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let key = [0x11, first, 0x37, payload.len() as u8];
        let mut bytes = vec![first, 0x80 | payload.len() as u8];
        bytes.extend(key);
        bytes.extend_from_slice(payload);
        mask::apply(&mut bytes[6..], key);
        bytes
    }

    fn stream(frames: &[(u8, &[u8])]) -> Vec<u8> {
        frames.iter().flat_map(|(first, payload)| frame(*first, payload)).collect()
    }

    /// Checks what the receiver emits and returns for a stream: whole, byte by byte, and split in two
    /// at each position.
    fn check(bytes: &[u8], lines: &[&str], result: Result<(), ProtocolError>) {
        let cuts = (0..=bytes.len()).map(|at| vec![bytes[..at].to_vec(), bytes[at..].to_vec()]);
        let single: Vec<Vec<u8>> = bytes.iter().map(|byte| vec![*byte]).collect();
        for mut pieces in cuts.chain([single]) {
            let (emitted, got, _) = receive(&mut pieces);
            assert_eq!(emitted, lines);
            assert_eq!(got, result);
        }
    }

    #[test]
    fn control_frames_between_fragments() {
        let bytes = stream(&[
            (0x01, b"Hel"),
            (0x89, b"p"),
            (0x00, b""),
            (0x8a, b""),
            (0x80, b"lo"),
            (0x82, b"\xff"),
            (0x81, b""),
            (0x88, b"\x03\xe8bye"),
            (0x81, b"after"),
        ]);
        let lines = [
            "Ping p",
            "Pong ",
            "Text Hello",
            "Binary \\xff",
            "Text ",
            "Close Some((CloseCode(1000), \"bye\"))",
        ];
        check(&bytes, &lines, Ok(()));
    }

    #[test]
    fn compressed_messages_in_one_frame_and_in_fragments() {
        let bytes = stream(&[
            (0xc1, b"\xf2\x48\xcd\xc9\xc9\x07\x00"),
            (0x42, b"\xf2\x48"),
            (0x89, b""),
            (0x80, b"\xcd\xc9\xc9\x07\x00"),
            (0xc2, b"\x00"),
        ]);
        check(&bytes, &["TextZ Hello", "Ping ", "BinaryZ Hello", "BinaryZ "], Ok(()));
    }

    #[test]
    fn each_error_comes_after_the_complete_messages_before_it() {
        use ProtocolError::*;
        let big = [b'x'; 101];
        type Frames<'a> = &'a [(u8, &'a [u8])];
        let table: [(Frames<'_>, ProtocolError); 14] = [
            (&[(0x81, b"ok"), (0x81, b"\xff")], TextNotUtf8),
            (&[(0x81, b"ok"), (0x01, b"\xce"), (0x80, b"")], TextNotUtf8),
            (&[(0x81, b"ok"), (0x01, b"\xce"), (0x00, b"\xce")], TextNotUtf8),
            (&[(0x81, b"ok"), (0xc1, b"\x00\x01\x00\xfe\xff\xff\x00")], TextNotUtf8),
            (&[(0x81, b"ok"), (0xc1, b"\xff")], NotDeflate),
            (&[(0x81, b"ok"), (0x82, &big)], MessageTooBig),
            (&[(0x81, b"ok"), (0x01, &big[..60]), (0x80, &big[..41])], MessageTooBig),
            (&[(0x81, b"ok"), (0x88, b"x")], CloseCodeCut),
            (&[(0x81, b"ok"), (0x88, b"\x03\xee")], CloseCodeInvalid),
            (&[(0x81, b"ok"), (0x88, b"\x03\xe8\xc0\xaf")], CloseReasonNotUtf8),
            (&[(0x81, b"ok"), (0x80, b"")], NothingToContinue),
            (&[(0x81, b"ok"), (0x01, b""), (0x81, b"")], MessageNotFinished),
            (&[(0x81, b"ok"), (0x91, b"")], ReservedBit),
            (&[(0x81, b"ok"), (0x09, b"")], ControlFragmented),
        ];
        for (frames, error) in table {
            let lines: &[&str] = &["Text ok"];
            check(&stream(frames), lines, Err(error));
        }
    }

    #[test]
    fn invalid_text_fails_in_the_middle_of_a_frame() {
        let mut bytes = frame(0x81, b"ab\xffcd");
        bytes.truncate(6 + 3);
        check(&bytes, &[], Err(ProtocolError::TextNotUtf8));
        bytes.truncate(6 + 2);
        check(&bytes, &[], Ok(()));
    }

    #[test]
    fn too_long_message_fails_at_its_header() {
        let (lines, result, receiver) =
            receive(&mut [b"\x82\xfe\xff\xff\x00\x00\x00\x00".to_vec()]);
        assert_eq!((lines.len(), result), (0, Err(ProtocolError::MessageTooBig)));
        assert_eq!(receiver.held_bytes(), 0);
    }

    #[test]
    fn memory_grows_with_received_bytes_and_is_freed_when_idle() {
        let bytes = frame(0x82, &[7; 100]);
        let held = |len: usize| receive(&mut [bytes[..len].to_vec()]).2.held_bytes();
        assert_eq!(held(0), 0);
        assert!(held(1) > 0);
        assert!(held(10) < held(1) + 16);
        assert_eq!(held(bytes.len()), 0);
        let (_, _, receiver) = receive(&mut [bytes[..50].to_vec(), bytes[50..].to_vec()]);
        assert_eq!(receiver.held_bytes(), 0);
    }

    #[test]
    fn stop_discards_the_rest() {
        let mut receiver = Receiver::default();
        let mut count = 0;
        let mut input = stream(&[(0x81, b"a"), (0x81, b"b"), (0xf3, b"")]);
        for _ in 0..2 {
            let verdict =
                receiver.receive(&mut input, &RULES, &mut Scratch::default(), &mut |_| {
                    count += 1;
                    Flow::Stop
                });
            assert_eq!(verdict, Ok(()));
        }
        assert_eq!(count, 1);
    }
}
