//! permessage-deflate: what is compressed inflates to what it was, at every level and window; what a
//! hostile client sends inflates to at most the limit, and leaves nothing for the next message.

use std::cell::RefCell;

use delivery::protocol::deflate::{Compressor, InflateError, Inflater};

use super::input::Input;

/// Levels, and windows of 8 to 15 bits.
const LEVELS: usize = 16;
const WINDOWS: usize = 8;

/// Used for one input after the other, as a thread of the server does.
struct Tools {
    inflater: Inflater,
    compressors: [Option<Compressor>; LEVELS * WINDOWS],
}

thread_local! {
    static TOOLS: RefCell<Tools> = RefCell::new(Tools {
        inflater: Inflater::default(),
        compressors: [const { None }; LEVELS * WINDOWS],
    });
}

/// First byte: which of the two, and level and window, or the limit. The rest is a message, or a
/// payload.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let shape = usize::from(input.byte());
    TOOLS.with_borrow_mut(|tools| match shape & 0x80 {
        0 => round_trip(input.0, shape % LEVELS, shape / LEVELS % WINDOWS, tools),
        _ => hostile(input.0, (shape & 0x7f) * 64, &mut tools.inflater),
    });
}

fn round_trip(message: &[u8], level: usize, window: usize, tools: &mut Tools) {
    let compressor = &mut tools.compressors[level * WINDOWS + window];
    if compressor.is_none() {
        *compressor = Compressor::new(level as u32, 8 + window as u8);
    }
    let Some(compressor) = compressor else {
        assert_eq!(window, 0, "only a window of 8 bits is unusable");
        return;
    };
    let Some(payload) = compressor.compress(message) else { return };
    assert!(payload.len() < message.len());
    assert_eq!(tools.inflater.inflate(&payload, message.len()), Ok(message));
    assert_eq!(tools.inflater.inflate(&payload, message.len() - 1), Err(InflateError::TooBig));
    assert_eq!(compressor.compress(message), Some(payload), "something of before is left");
}

fn hostile(payload: &[u8], limit: usize, used: &mut Inflater) {
    let first = used.inflate(payload, limit).map(<[u8]>::to_vec);
    // The inflater forgets: the same after another message.
    assert_eq!(used.inflate(b"\xf2\x48\xcd\xc9\xc9\x07\x00", 5), Ok(&b"Hello"[..]));
    assert_eq!(used.inflate(payload, limit).map(<[u8]>::to_vec), first);
    if let Ok(message) = first {
        assert!(message.len() <= limit);
        // Exactly its own length is enough, and one byte less is not.
        assert_eq!(used.inflate(payload, message.len()), Ok(&message[..]));
        if let Some(less) = message.len().checked_sub(1) {
            assert_eq!(used.inflate(payload, less), Err(InflateError::TooBig));
        }
    }
}
