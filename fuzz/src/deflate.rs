//! permessage-deflate: what is compressed inflates to what it was, at every level and window; what a
//! hostile client sends inflates to at most the limit, and leaves nothing for the next message.

use delivery::protocol::deflate::{Compressor, InflateError, Inflater};

use super::input::Input;

/// First byte: level and window. Second byte: the limit. The rest is a message, and a payload.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let shape = input.byte();
    let limit = usize::from(input.byte()) * 64;
    round_trip(input.0, u32::from(shape & 15), 8 + (shape >> 4) % 8);
    hostile(input.0, limit);
}

fn round_trip(message: &[u8], level: u32, window_bits: u8) {
    let Some(mut compressor) = Compressor::new(level, window_bits) else {
        assert_eq!(window_bits, 8);
        return;
    };
    let first = compressor.compress(message);
    let second = compressor.compress(message);
    assert_eq!(first, second, "something of the message before is left");
    let Some(payload) = first else { return };
    assert!(payload.len() < message.len());
    let mut inflater = Inflater::default();
    assert_eq!(inflater.inflate(&payload, message.len()), Ok(message));
    assert_eq!(inflater.inflate(&payload, message.len() - 1), Err(InflateError::TooBig));
}

fn hostile(payload: &[u8], limit: usize) {
    let mut fresh = Inflater::default();
    let first = fresh.inflate(payload, limit).map(<[u8]>::to_vec);
    if let Ok(message) = &first {
        assert!(message.len() <= limit);
        // Exactly its own length is enough, and one byte less is not.
        assert_eq!(fresh.inflate(payload, message.len()), Ok(&message[..]));
        if let Some(less) = message.len().checked_sub(1) {
            assert_eq!(fresh.inflate(payload, less), Err(InflateError::TooBig));
        }
    }
    // The inflater forgets: the same again, and the same after another message.
    assert_eq!(fresh.inflate(payload, limit).map(<[u8]>::to_vec), first);
    assert_eq!(fresh.inflate(b"\xf2\x48\xcd\xc9\xc9\x07\x00", 5), Ok(&b"Hello"[..]));
    assert_eq!(fresh.inflate(payload, limit).map(<[u8]>::to_vec), first);
}
