//! permessage-deflate: a compressed message inflates to the original at every level and window; a
//! hostile payload inflates to at most the limit and does not affect the next message.

use std::cell::RefCell;

use delivery::protocol::deflate::{Compressor, InflateError, Inflater};

use super::input::FuzzInput;

/// Compression levels; windows of 8 to 15 bits.
const LEVELS: usize = 16;
const WINDOWS: usize = 8;

/// Reused for every input, as a thread of the server does.
struct Codecs {
    inflater: Inflater,
    compressors: [Option<Compressor>; LEVELS * WINDOWS],
}

thread_local! {
    static CODECS: RefCell<Codecs> = RefCell::new(Codecs {
        inflater: Inflater::default(),
        compressors: [const { None }; LEVELS * WINDOWS],
    });
}

/// First byte: which of the two checks, with its level and window or its limit. Rest: the message or
/// the payload.
pub fn check(data: &[u8]) {
    let mut input = FuzzInput(data);
    let shape = usize::from(input.byte());
    CODECS.with_borrow_mut(|codecs| match shape & 0x80 {
        0 => round_trip(input.0, shape % LEVELS, shape / LEVELS % WINDOWS, codecs),
        _ => hostile(input.0, (shape & 0x7f) * 64, &mut codecs.inflater),
    });
}

fn round_trip(message: &[u8], level: usize, window: usize, codecs: &mut Codecs) {
    let compressor = &mut codecs.compressors[level * WINDOWS + window];
    if compressor.is_none() {
        *compressor = Compressor::new(level as u32, 8 + window as u8);
    }
    let Some(compressor) = compressor else {
        assert_eq!(window, 0, "only a window of 8 bits is unusable");
        return;
    };
    let Some(payload) = compressor.compress(message) else { return };
    assert!(payload.len() < message.len());
    assert_eq!(codecs.inflater.inflate(&payload, message.len()), Ok(message));
    assert_eq!(codecs.inflater.inflate(&payload, message.len() - 1), Err(InflateError::TooBig));
    assert_eq!(
        compressor.compress(message),
        Some(payload),
        "the result depends on an earlier message"
    );
}

fn hostile(payload: &[u8], limit: usize, inflater: &mut Inflater) {
    let first = inflater.inflate(payload, limit).map(<[u8]>::to_vec);
    // The result is the same after another message.
    assert_eq!(inflater.inflate(b"\xf2\x48\xcd\xc9\xc9\x07\x00", 5), Ok(&b"Hello"[..]));
    assert_eq!(inflater.inflate(payload, limit).map(<[u8]>::to_vec), first);
    if let Ok(message) = first {
        assert!(message.len() <= limit);
        // The exact length is enough; one byte less is not.
        assert_eq!(inflater.inflate(payload, message.len()), Ok(&message[..]));
        if let Some(less) = message.len().checked_sub(1) {
            assert_eq!(inflater.inflate(payload, less), Err(InflateError::TooBig));
        }
    }
}
