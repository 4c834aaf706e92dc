//! The client's view of a connection: decodes what the shard has sent.

use tungstenite::protocol::frame::FrameHeader;

/// Something that the shard sent.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::reactor) enum WireEvent {
    /// The head of an HTTP response; its status.
    Answer(u16),
    /// A frame: opcode and payload.
    Frame(u8, Vec<u8>),
}

/// Decodes a stream incrementally.
#[derive(Debug, Default)]
pub(in crate::reactor) struct Wire {
    buffer: Vec<u8>,
    state: State,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Head,
    Frames,
    /// The body of an HTTP error.
    Body,
    /// After a close frame.
    Closed,
}

pub(in crate::reactor) const TEXT: u8 = 1;
pub(in crate::reactor) const BINARY: u8 = 2;
pub(in crate::reactor) const CLOSE: u8 = 8;
pub(in crate::reactor) const PING: u8 = 9;
pub(in crate::reactor) const PONG: u8 = 10;

impl Wire {
    pub(in crate::reactor) fn push(&mut self, bytes: &[u8]) {
        assert!(self.state != State::Closed || bytes.is_empty(), "bytes after a close frame");
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete item.
    pub(in crate::reactor) fn next(&mut self) -> Option<WireEvent> {
        match self.state {
            State::Head => {
                let end = self.buffer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
                let status = std::str::from_utf8(&self.buffer[9..12]).expect("a status line");
                let status = status.parse().expect("a status");
                self.state = if status == 101 { State::Frames } else { State::Body };
                self.buffer.drain(..end);
                Some(WireEvent::Answer(status))
            }
            State::Frames => self.frame(),
            State::Body => None,
            State::Closed => {
                assert!(self.buffer.is_empty(), "bytes after a close frame");
                None
            }
        }
    }

    fn frame(&mut self) -> Option<WireEvent> {
        let [first, second, rest @ ..] = &self.buffer[..] else { return None };
        assert_eq!(first & 0xF0, 0x80, "a whole, uncompressed frame");
        let (header, length) = match second {
            126 => (4, u16::from_be_bytes(rest.get(..2)?.try_into().unwrap()) as usize),
            127 => (10, u64::from_be_bytes(rest.get(..8)?.try_into().unwrap()) as usize),
            length => (2, *length as usize),
        };
        assert!(*second < 128, "server frames are not masked");
        let opcode = first & 0x0F;
        let payload = self.buffer.get(header..header + length)?.to_vec();
        self.buffer.drain(..header + length);
        if opcode == CLOSE {
            self.state = State::Closed;
        }
        Some(WireEvent::Frame(opcode, payload))
    }
}

/// A masked client frame.
pub(in crate::reactor) fn client_frame(
    fin: bool,
    opcode: u8,
    payload: &[u8],
    key: [u8; 4],
) -> Vec<u8> {
    let header =
        FrameHeader { is_final: fin, opcode: opcode.into(), mask: Some(key), ..Default::default() };
    let mut frame = Vec::new();
    header.format(payload.len() as u64, &mut frame).expect("memory takes it");
    frame.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
    frame
}

/// The payload of an event: its number, then bytes derived from it, so that spliced frames are
/// detected.
pub(in crate::reactor) fn event_payload(number: u64, padding: usize) -> Vec<u8> {
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend((0..padding).map(|index| (number as u8) ^ (index as u8)));
    payload
}

/// The number of an event whose payload is complete and its own.
pub(in crate::reactor) fn event_number(payload: &[u8]) -> u64 {
    let (number, padding) = payload.split_first_chunk::<8>().expect("an event");
    let number = u64::from_be_bytes(*number);
    assert_eq!(event_payload(number, padding.len()), payload, "spliced frames");
    number
}
