//! What a client sends after the upgrade: frames in, messages and control frames out.
//!
//! A frame that is whole in the input is handed on without a copy. Only what is cut (a header, a
//! control frame, a message) is kept, in one allocation that an idle connection does not have.
//!
//! ```text
//!               ┌───────────────◄─ frame ends ──────────────┐
//!  BetweenFrames ─ header cut ─► Header ─ header whole ─► Control │ Data
//! ```

use crate::domain::limits::{CLIENT_HEADER_BYTES_MAX, CONTROL_PAYLOAD_BYTES_MAX};
use crate::protocol::deflate;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ClientHeader, Context, HeaderStep};
use crate::protocol::incoming::{Call, Message, Sink};
use crate::protocol::mask;

pub use crate::protocol::incoming::{Flow, Incoming, MessageKind, ReceiveRules, Scratch};

/// The receiving half of one connection.
#[derive(Debug, Default)]
pub struct Receiver {
    partial: Option<Box<Partial>>,
    ended: bool,
}

/// What is cut: the place within a frame, and the message the frame belongs to.
#[derive(Debug)]
struct Partial {
    stage: Stage,
    message: Option<Message>,
}

#[derive(Debug)]
enum Stage {
    BetweenFrames,
    Header { bytes: [u8; CLIENT_HEADER_BYTES_MAX], len: usize },
    Control { header: ClientHeader, bytes: [u8; CONTROL_PAYLOAD_BYTES_MAX], len: usize },
    Data { header: ClientHeader, length: usize, received: usize },
}

impl Receiver {
    /// Reads the next bytes of the connection, unmasking them in place, and tells `sink` what they
    /// complete. However a stream is cut into inputs, what `sink` is told and the verdict are the
    /// same. After an error, a close frame or [`Flow::Stop`] all input is ignored.
    ///
    /// # Errors
    ///
    /// The client broke a rule: send [`ProtocolError::close`] and end (RFC 6455 §7.1.7). What came
    /// whole before the fault has been told.
    pub fn receive(
        &mut self,
        input: &mut [u8],
        rules: &ReceiveRules,
        scratch: &mut Scratch,
        sink: &mut impl FnMut(Incoming<'_>) -> Flow,
    ) -> Result<(), ProtocolError> {
        let mut call = Call { rules, scratch, sink };
        let mut input = input;
        while !self.ended && !input.is_empty() {
            let step = match self.partial.as_deref_mut().map(|partial| &mut partial.stage) {
                None | Some(Stage::BetweenFrames) => self.frame_start(input, &mut call),
                Some(Stage::Header { .. }) => self.header_piece(input, &mut call),
                Some(Stage::Control { .. }) => self.control_piece(input, &mut call),
                Some(Stage::Data { .. }) => self.data_piece(input, &mut call),
            };
            match step {
                Ok((consumed, Flow::Continue)) => input = &mut input[consumed..],
                Ok((_, Flow::Stop)) => self.end(),
                Err(error) => {
                    self.end();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Bytes held for what is cut, beyond the receiver itself: zero for an idle connection.
    pub fn held_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| {
            size_of::<Partial>() + partial.message.as_ref().map_or(0, |m| m.bytes.capacity())
        })
    }

    fn end(&mut self) {
        self.partial = None;
        self.ended = true;
    }

    fn partial(&mut self) -> &mut Partial {
        self.partial
            .get_or_insert_with(|| Box::new(Partial { stage: Stage::BetweenFrames, message: None }))
    }

    fn message(&self) -> Option<&Message> {
        self.partial.as_ref().and_then(|partial| partial.message.as_ref())
    }

    /// A frame has ended: without an open message nothing is kept.
    fn settle(&mut self) {
        match &mut self.partial {
            Some(partial) if partial.message.is_some() => partial.stage = Stage::BetweenFrames,
            _ => self.partial = None,
        }
    }

    fn context(&self, rules: &ReceiveRules) -> Context {
        Context { deflate: rules.deflate, message_open: self.message().is_some() }
    }

    /// `input` begins with a frame.
    fn frame_start<S: Sink>(&mut self, input: &mut [u8], call: &mut Call<'_, S>) -> Step {
        match ClientHeader::decode(input, self.context(call.rules))? {
            HeaderStep::NeedMore(_) => {
                let mut bytes = [0; CLIENT_HEADER_BYTES_MAX];
                bytes[..input.len()].copy_from_slice(input);
                self.partial().stage = Stage::Header { bytes, len: input.len() };
                Ok((input.len(), Flow::Continue))
            }
            HeaderStep::Whole(header, used) => {
                let (consumed, flow) = self.frame(header, &mut input[used..], call)?;
                Ok((used + consumed, flow))
            }
        }
    }

    /// `input` goes on with a header.
    fn header_piece<S: Sink>(&mut self, input: &mut [u8], call: &mut Call<'_, S>) -> Step {
        let context = self.context(call.rules);
        let Stage::Header { bytes, len } = &mut self.partial().stage else { unreachable!() };
        let before = *len;
        let taken = input.len().min(CLIENT_HEADER_BYTES_MAX - before);
        bytes[before..before + taken].copy_from_slice(&input[..taken]);
        *len = before + taken;
        match ClientHeader::decode(&bytes[..*len], context)? {
            HeaderStep::NeedMore(_) => Ok((taken, Flow::Continue)),
            HeaderStep::Whole(header, used) => {
                let used = used - before;
                let (consumed, flow) = self.frame(header, &mut input[used..], call)?;
                Ok((used + consumed, flow))
            }
        }
    }

    /// `input` begins with the payload of this frame.
    fn frame<S: Sink>(
        &mut self,
        header: ClientHeader,
        input: &mut [u8],
        call: &mut Call<'_, S>,
    ) -> Step {
        if header.opcode.is_control() {
            let length = header.length as usize; // at most 125, checked with the header
            if let Some(payload) = input.get_mut(..length) {
                mask::apply(payload, header.key);
                self.settle();
                return Ok((length, call.control(header.opcode, payload)?));
            }
            self.partial().stage =
                Stage::Control { header, bytes: [0; CONTROL_PAYLOAD_BYTES_MAX], len: 0 };
            return self.control_piece(input, call);
        }
        let length = self.admit_length(&header, call.rules)?;
        if let Some(kind) = MessageKind::begun_by(header.opcode) {
            if header.fin
                && let Some(payload) = input.get_mut(..length)
            {
                mask::apply(payload, header.key);
                self.settle();
                return Ok((length, call.message(kind, header.rsv1, payload)?));
            }
            self.partial().message = Some(Message::new(kind, header.rsv1));
        }
        self.partial().stage = Stage::Data { header, length, received: 0 };
        self.data_piece(input, call)
    }

    /// Refuses what is too long before a byte of it is kept (RFC 6455 §10.4).
    fn admit_length(
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

    /// `input` goes on with the payload of a control frame.
    fn control_piece<S: Sink>(&mut self, input: &mut [u8], call: &mut Call<'_, S>) -> Step {
        let Stage::Control { header, bytes, len } = &mut self.partial().stage else {
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
        self.settle();
        Ok((taken, call.control(opcode, &bytes[..length])?))
    }

    /// `input` goes on with the payload of a data frame.
    fn data_piece<S: Sink>(&mut self, input: &mut [u8], call: &mut Call<'_, S>) -> Step {
        let Partial { stage: Stage::Data { header, length, received }, message: Some(message) } =
            self.partial()
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
        self.settle();
        let flow = match message {
            Some(message) => call.finished(message)?,
            None => Flow::Continue,
        };
        Ok((taken, flow))
    }
}

/// Bytes consumed, and whether to go on.
type Step = Result<(usize, Flow), ProtocolError>;

const _: () = assert!(size_of::<Receiver>() <= 16);

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: ReceiveRules = ReceiveRules { message_bytes_max: 100, deflate: true };

    /// What a stream told, as lines, and the verdict.
    fn told(pieces: &mut [Vec<u8>]) -> (Vec<String>, Result<(), ProtocolError>, Receiver) {
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

    /// A client's frame with a mask of its own.
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

    /// Checks that a stream tells `lines` and ends with `verdict`, uncut, byte by byte, and cut in
    /// two at each place.
    fn check(bytes: &[u8], lines: &[&str], verdict: Result<(), ProtocolError>) {
        let cuts = (0..=bytes.len()).map(|at| vec![bytes[..at].to_vec(), bytes[at..].to_vec()]);
        let single: Vec<Vec<u8>> = bytes.iter().map(|byte| vec![*byte]).collect();
        for mut pieces in cuts.chain([single]) {
            let got = told(&mut pieces);
            assert_eq!(
                (&got.0[..], got.1),
                (&lines.iter().map(|l| l.to_string()).collect::<Vec<_>>()[..], verdict)
            );
        }
    }

    #[test]
    fn fragments_with_control_frames_between() {
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
    fn compressed_messages_whole_and_in_fragments() {
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
    fn each_fault_is_found_after_what_came_whole() {
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
    fn bad_text_is_refused_in_the_middle_of_a_frame() {
        let mut bytes = frame(0x81, b"ab\xffcd");
        bytes.truncate(6 + 3);
        check(&bytes, &[], Err(ProtocolError::TextNotUtf8));
        bytes.truncate(6 + 2);
        check(&bytes, &[], Ok(()));
    }

    #[test]
    fn too_long_is_refused_at_the_header_before_anything_is_kept() {
        let (lines, verdict, receiver) = told(&mut [b"\x82\xfe\xff\xff\x00\x00\x00\x00".to_vec()]);
        assert_eq!((lines.len(), verdict), (0, Err(ProtocolError::MessageTooBig)));
        assert_eq!(receiver.held_bytes(), 0);
    }

    #[test]
    fn memory_follows_what_arrived_and_is_gone_when_idle() {
        let bytes = frame(0x82, &[7; 100]);
        let held = |len: usize| told(&mut [bytes[..len].to_vec()]).2.held_bytes();
        assert_eq!(held(0), 0);
        assert!(held(1) > 0);
        assert!(held(10) < held(1) + 16);
        assert_eq!(held(bytes.len()), 0);
        let (_, _, receiver) = told(&mut [bytes[..50].to_vec(), bytes[50..].to_vec()]);
        assert_eq!(receiver.held_bytes(), 0);
    }

    #[test]
    fn stop_throws_the_rest_away() {
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
