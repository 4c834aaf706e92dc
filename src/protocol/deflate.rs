//! permessage-deflate (RFC 7692 §7.2) of whole messages without context takeover: every message starts
//! with an empty window, so no connection stores one.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Smallest window that can be negotiated, as a power of two (RFC 7692 §7.1.2).
pub const WINDOW_BITS_MIN: u8 = 8;
/// Largest window. Events are compressed with it.
pub const WINDOW_BITS_MAX: u8 = 15;
/// Smallest window to compress with. DEFLATE libraries emit distances that a window of 8 cannot
/// resolve. A client with such a window gets everything uncompressed, as RFC 7692 §6 allows.
const WINDOW_BITS_USABLE_MIN: u8 = 9;
/// End of a flushed output, which the sender removes (RFC 7692 §7.2.1): an empty stored block.
const FLUSH_TAIL: [u8; 4] = [0x00, 0x00, 0xff, 0xff];
/// Completes a received message (RFC 7692 §7.2.2), followed by an empty final block. The inflater
/// reaches the end of that block only if the message consists of complete blocks.
const INFLATE_TAIL: [u8; 6] = [0x00, 0x00, 0xff, 0xff, 0x03, 0x00];
/// Bytes inflated per step.
const INFLATE_STEP_BYTES: usize = 4096;

/// Compressor for many messages, one after the other. About 300 KiB, so connections share it.
#[derive(Debug)]
pub struct Compressor {
    deflate: Compress,
    window_bits: u8,
}

impl Compressor {
    /// `level` is 1 (fast) to 9 (small), `window_bits` as negotiated. `None` if the window is too small
    /// to compress with.
    pub fn new(level: u32, window_bits: u8) -> Option<Self> {
        if !(WINDOW_BITS_USABLE_MIN..=WINDOW_BITS_MAX).contains(&window_bits) {
            return None;
        }
        let level = Compression::new(level.clamp(1, 9));
        Some(Self {
            deflate: Compress::new_with_window_bits(level, false, window_bits),
            window_bits,
        })
    }

    /// Window of this compressor, as a power of two.
    pub fn window_bits(&self) -> u8 {
        self.window_bits
    }

    /// The payload of a compressed message; `None` if it is not shorter than the message.
    pub fn compress(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        self.deflate.reset();
        // Room for the message and the tail that is removed. An output that fills it is not shorter
        // than the message and may be incomplete.
        let mut output = Vec::with_capacity(message.len() + FLUSH_TAIL.len());
        let status = self.deflate.compress_vec(message, &mut output, FlushCompress::Sync).ok()?;
        let whole = status == Status::Ok
            && output.len() < output.capacity()
            && output.ends_with(&FLUSH_TAIL);
        let len = output.len().checked_sub(FLUSH_TAIL.len())?;
        if !whole || len >= message.len() {
            return None;
        }
        output.truncate(len);
        Some(output)
    }
}

/// Failure of [`Inflater::inflate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InflateError {
    /// The payload is not a sequence of complete DEFLATE blocks.
    Corrupt,
    /// The message is longer than allowed.
    TooBig,
}

/// Inflater for the messages of many connections, one after the other. Uses about 50 KiB, and the
/// output buffer of the last message.
#[derive(Debug)]
pub struct Inflater {
    inflate: Decompress,
    output: Vec<u8>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self { inflate: Decompress::new(false), output: Vec::new() }
    }
}

impl Inflater {
    /// Inflates the payload of a message of at most `bytes_max` bytes (RFC 7692 §7.2.2). Stops at most
    /// one step after that limit.
    ///
    /// # Errors
    ///
    /// [`InflateError`].
    pub fn inflate(&mut self, payload: &[u8], bytes_max: usize) -> Result<&[u8], InflateError> {
        self.inflate.reset(false);
        self.output.clear();
        self.output.shrink_to(OUTPUT_BYTES_KEPT);
        let mut rest = payload;
        while let FeedOutcome::Ended { rest: after } = self.feed(rest, bytes_max)? {
            // A sender that ends with a final block should add an empty one; some do not.
            if after.is_empty() {
                return Ok(&self.output);
            }
            // A final block ends a DEFLATE stream (RFC 1951 §3.2.3). The next one begins in the next byte, with
            // an empty window, because that is what a sender's library does.
            self.inflate.reset(false);
            rest = after;
        }
        match self.feed(&INFLATE_TAIL, bytes_max)? {
            FeedOutcome::Ended { rest: [] } => Ok(&self.output),
            FeedOutcome::Ended { .. } | FeedOutcome::All => Err(InflateError::Corrupt),
        }
    }

    fn feed<'a>(
        &mut self,
        mut input: &'a [u8],
        bytes_max: usize,
    ) -> Result<FeedOutcome<'a>, InflateError> {
        loop {
            let (in_before, out_before) = (self.inflate.total_in(), self.inflate.total_out());
            let room = (bytes_max + 1).saturating_sub(self.output.len()).min(INFLATE_STEP_BYTES);
            let filled = self.output.len();
            self.output.resize(filled + room, 0);
            let status = self
                .inflate
                .decompress(input, &mut self.output[filled..], FlushDecompress::None)
                .map_err(|_| InflateError::Corrupt)?;
            self.output.truncate(filled + (self.inflate.total_out() - out_before) as usize);
            if self.output.len() > bytes_max {
                return Err(InflateError::TooBig);
            }
            input = &input[(self.inflate.total_in() - in_before) as usize..];
            let idle =
                self.inflate.total_in() == in_before && self.inflate.total_out() == out_before;
            match status {
                Status::StreamEnd => return Ok(FeedOutcome::Ended { rest: input }),
                Status::Ok | Status::BufError if idle && input.is_empty() => {
                    return Ok(FeedOutcome::All);
                }
                Status::Ok | Status::BufError if idle => return Err(InflateError::Corrupt),
                Status::Ok | Status::BufError => {}
            }
        }
    }
}

/// Output buffer kept between messages, bytes.
const OUTPUT_BYTES_KEPT: usize = 64 * 1024;

enum FeedOutcome<'a> {
    /// All input is consumed and no final block has ended.
    All,
    /// A final block ended before `rest`.
    Ended { rest: &'a [u8] },
}

/// Longest accepted payload of a compressed message of `bytes` bytes. DEFLATE stores incompressible
/// data in blocks of at most 65,535 bytes with 5 bytes of overhead; senders may use shorter blocks.
pub const fn compressed_bytes_max(bytes: usize) -> usize {
    bytes.saturating_add(bytes / 256).saturating_add(64)
}

/// [`Compressor::compress`] with a compressor of its own, for rare messages. `level` is 1 to 9.
pub fn compress(message: &[u8], level: u32, window_bits: u8) -> Option<Vec<u8>> {
    Compressor::new(level, window_bits)?.compress(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inflated(payload: &[u8]) -> Result<Vec<u8>, InflateError> {
        Inflater::default().inflate(payload, 1000).map(<[u8]>::to_vec)
    }

    #[test]
    fn examples_of_rfc_7692_7_2_3() {
        let hello = Ok(b"Hello".to_vec());
        // §7.2.3.1 one block, §7.2.3.3 a stored block, §7.2.3.4 a final block, §7.2.3.5 two blocks.
        assert_eq!(inflated(b"\xf2\x48\xcd\xc9\xc9\x07\x00"), hello);
        assert_eq!(inflated(b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00"), hello);
        assert_eq!(inflated(b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00"), hello);
        assert_eq!(inflated(b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00"), hello);
        // §7.2.3.6 the empty message.
        assert_eq!(inflated(b"\x00"), Ok(vec![]));
        assert_eq!(inflated(b""), Err(InflateError::Corrupt), "not even an empty block");
        // §7.2.3.2 a second message that refers to the first: invalid without context takeover.
        assert_eq!(inflated(b"\xf2\x00\x11\x00\x00"), Err(InflateError::Corrupt));
    }

    #[test]
    fn incomplete_blocks_are_corrupt() {
        let whole = b"\xf2\x48\xcd\xc9\xc9\x07\x00";
        for cut in 1..whole.len() {
            assert_eq!(inflated(&whole[..cut]), Err(InflateError::Corrupt), "{cut}");
        }
        assert_eq!(inflated(b"\x06"), Err(InflateError::Corrupt), "reserved block type");
        let after_final = b"\xf3\x48\xcd\xc9\xc9\x07\x00\xf2\x48\xcd\xc9\xc9\x07";
        assert_eq!(inflated(after_final), Err(InflateError::Corrupt), "cut behind a final block");
    }

    #[test]
    fn blocks_behind_a_final_block_belong_to_the_message() {
        let twice = b"\xf3\x48\xcd\xc9\xc9\x07\x00\xf3\x48\xcd\xc9\xc9\x07\x00";
        assert_eq!(inflated(twice), Ok(b"HelloHello".to_vec()));
        assert_eq!(inflated(&[&twice[..], b"\x00"].concat()), Ok(b"HelloHello".to_vec()));
        let empty = [3, 0].repeat(500);
        assert_eq!(inflated(&[&empty[..], twice].concat()), Ok(b"HelloHello".to_vec()));
    }

    #[test]
    fn compression_bomb_is_stopped_at_the_limit() {
        let bomb = compress(&vec![0; 1 << 20], 9, 15).expect("shrinks");
        assert!(bomb.len() < 2000);
        let mut inflater = Inflater::default();
        assert_eq!(inflater.inflate(&bomb, 1000), Err(InflateError::TooBig));
        assert!(inflater.output.capacity() <= 4 * INFLATE_STEP_BYTES);
        assert_eq!(inflater.inflate(&bomb, 1 << 20).map(<[u8]>::len), Ok(1 << 20));
        assert_eq!(inflater.inflate(&bomb, (1 << 20) - 1), Err(InflateError::TooBig));
        // The next message does not depend on the failed one.
        assert_eq!(inflater.inflate(b"\x00", 1), Ok(&b""[..]));
    }

    #[test]
    fn compresses_only_if_the_payload_shrinks_and_the_window_is_usable() {
        assert_eq!(compress(b"", 6, 15), None);
        assert_eq!(compress(b"abc", 6, 15), None);
        assert_eq!(compress(&[b'a'; 100], 6, 8), None);
        assert!(compress(&[b'a'; 100], 6, 9).is_some_and(|small| small.len() < 20));
    }

    /// Whatever a sender's zlib makes of the parts of a message, each with any way to flush or end (zlib's manual,
    /// `deflate`), without the empty block at the end (RFC 7692 §7.2.1).
    fn deflated(parts: &[(String, u8)], level: u32) -> Vec<u8> {
        let mut deflate = Compress::new(Compression::new(level), false);
        let mut output = Vec::new();
        let mut compress = |deflate: &mut Compress, mut input: &[u8], flush| {
            loop {
                let before = (deflate.total_in(), output.len());
                output.reserve(256);
                let status = deflate.compress_vec(input, &mut output, flush).expect("valid");
                input = &input[(deflate.total_in() - before.0) as usize..];
                let is_done = input.is_empty() && output.len() < output.capacity();
                if status == Status::StreamEnd || is_done {
                    return;
                }
            }
        };
        for (text, flush) in parts {
            let flush = match flush {
                0 => FlushCompress::None,
                1 => FlushCompress::Partial,
                2 => FlushCompress::Sync,
                3 => FlushCompress::Full,
                _ => FlushCompress::Finish,
            };
            compress(&mut deflate, text.as_bytes(), flush);
            if flush == FlushCompress::Finish {
                deflate.reset();
            }
        }
        compress(&mut deflate, b"", FlushCompress::Sync);
        // After a final block a flush may write nothing.
        if output.ends_with(&FLUSH_TAIL) {
            output.truncate(output.len() - FLUSH_TAIL.len());
        }
        output
    }

    proptest! {
        #[test]
        fn all_that_zlib_writes_is_read(
            parts in proptest::collection::vec(("[a-d]{0,300}|\\PC{0,40}", 0u8..5), 1..12),
            level in 0u32..=9,
        ) {
            let message: String = parts.iter().map(|(text, _)| &text[..]).collect();
            let payload = deflated(&parts, level);
            let mut inflater = Inflater::default();
            prop_assert_eq!(inflater.inflate(&payload, message.len()), Ok(message.as_bytes()));
        }

        #[test]
        fn round_trip_at_every_window_and_level(
            words in proptest::collection::vec("[a-d]{1,6}|\\PC{0,4}", 0..400),
            level in 1u32..=9,
            bits in 9u8..=15,
        ) {
            let message = words.concat().into_bytes();
            let mut compressor = Compressor::new(level, bits).expect("usable window");
            for _ in 0..2 {
                if let Some(payload) = compressor.compress(&message) {
                    prop_assert!(payload.len() < message.len());
                    prop_assert!(payload.len() <= compressed_bytes_max(message.len()));
                    let mut inflater = Inflater::default();
                    let inflated = inflater.inflate(&payload, message.len());
                    prop_assert_eq!(inflated, Ok(&message[..]));
                }
            }
        }
    }
}
