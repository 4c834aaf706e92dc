//! WebSocket frames, for the client and for the servers without a library.

/// A server frame at the front of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// RFC 6455 §5.2.
    pub opcode: u8,
    /// RSV1: the payload is compressed (RFC 7692).
    pub compressed: bool,
    /// The payload.
    pub payload: &'a [u8],
    /// Size of the whole frame, bytes.
    pub total: usize,
}

/// Text, RFC 6455 §5.2.
pub const TEXT: u8 = 1;
/// Binary.
pub const BINARY: u8 = 2;
/// Close.
pub const CLOSE: u8 = 8;
/// Ping.
pub const PING: u8 = 9;
/// Pong.
pub const PONG: u8 = 10;

/// Parses a complete, unmasked server frame at the front of `input`.
pub fn parse(input: &[u8]) -> Option<Frame<'_>> {
    let (header, length) = lengths(input)?;
    let payload = input.get(header..header + length)?;
    let first = input[0];
    Some(Frame {
        opcode: first & 0x0f,
        compressed: first & 0x40 != 0,
        payload,
        total: header + length,
    })
}

/// Parses a complete, masked client frame at the front of `input`, and unmasks it in place.
pub fn parse_masked(input: &mut [u8]) -> Option<Frame<'_>> {
    let (header, length) = lengths(input)?;
    let total = header + 4 + length;
    if input.len() < total {
        return None;
    }
    let first = input[0];
    let mask: [u8; 4] = input[header..header + 4].try_into().expect("four bytes");
    let payload = &mut input[header + 4..total];
    for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
    Some(Frame { opcode: first & 0x0f, compressed: first & 0x40 != 0, payload, total })
}

/// Lengths of the header without the mask, and of the payload.
fn lengths(input: &[u8]) -> Option<(usize, usize)> {
    Some(match *input.get(1)? & 0x7f {
        126 => (4, usize::from(u16::from_be_bytes(input.get(2..4)?.try_into().ok()?))),
        127 => (10, u64::from_be_bytes(input.get(2..10)?.try_into().ok()?) as usize),
        short => (2, usize::from(short)),
    })
}

/// Appends a server frame: final, not masked.
pub fn put(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    put_header(out, opcode, payload.len(), 0);
    out.extend_from_slice(payload);
}

/// Appends a client frame: final, masked with the key 0, which leaves the payload as it is.
pub fn put_masked(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    put_header(out, opcode, payload.len(), 0x80);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
}

fn put_header(out: &mut Vec<u8>, opcode: u8, length: usize, mask: u8) {
    out.push(0x80 | opcode);
    match length {
        0..126 => out.push(mask | length as u8),
        126..0x1_0000 => {
            out.push(mask | 126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(mask | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// End of the head of an HTTP message.
pub fn head_end(input: &[u8]) -> Option<usize> {
    memchr::memmem::find(input, b"\r\n\r\n").map(|at| at + 4)
}

/// The answer to an upgrade request, RFC 6455 §4.2.2.
pub fn upgrade_answer(request: &[u8]) -> Option<Vec<u8>> {
    const NAME: &[u8] = b"Sec-WebSocket-Key: ";
    let at = memchr::memmem::find(request, NAME)? + NAME.len();
    let end = at + memchr::memchr(b'\r', &request[at..])?;
    let accept = tungstenite::handshake::derive_accept_key(&request[at..end]);
    Some(
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\n\r\n"
        )
        .into_bytes(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_every_length_form_are_parsed() {
        for length in [0, 125, 126, 65_535, 65_536] {
            let payload = vec![7; length];
            let mut bytes = Vec::new();
            put(&mut bytes, BINARY, &payload);
            for short in 0..bytes.len().min(12) {
                assert_eq!(parse(&bytes[..short]), None);
            }
            let frame = parse(&bytes).unwrap();
            assert_eq!((frame.opcode, frame.payload, frame.total), (2, &payload[..], bytes.len()));
            let mut masked = Vec::new();
            put_masked(&mut masked, TEXT, &payload);
            assert_eq!(parse_masked(&mut masked).unwrap().payload, payload);
        }
    }
}
