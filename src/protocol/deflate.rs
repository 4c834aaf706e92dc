//! permessage-deflate (RFC 7692 §7.2) on whole messages, without context takeover: a message is
//! compressed and inflated from an empty window, so no connection keeps one.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Smallest window that can be negotiated, as a power of two (RFC 7692 §7.1.2).
pub const WINDOW_BITS_MIN: u8 = 8;
/// Largest window, and the one that events are compressed with.
pub const WINDOW_BITS_MAX: u8 = 15;
/// Smallest window that DEFLATE libraries compress with: with 8 they emit distances that a window
/// of 8 cannot resolve, so such a client is sent everything uncompressed, which is lawful (RFC 7692
/// §6).
const WINDOW_BITS_USABLE_MIN: u8 = 9;
/// What a flush ends with and the sender leaves out (RFC 7692 §7.2.1): an empty stored block.
const FLUSH_TAIL: [u8; 4] = [0x00, 0x00, 0xff, 0xff];
/// What a received message is completed with (RFC 7692 §7.2.2), and after it an empty final block,
/// which is one only if the message was made of whole blocks.
const INFLATE_TAIL: [u8; 6] = [0x00, 0x00, 0xff, 0xff, 0x03, 0x00];
/// A message that ended with a final block goes on with the rest of an empty stored block (RFC 7692
/// §7.2.3.4).
const AFTER_FINAL_BLOCK: u8 = 0x00;
/// Bytes inflated at a step.
const INFLATE_STEP_BYTES: usize = 4096;

/// A compressor for many messages, one after the other: some 300 KiB, to be shared, not to be held
/// by a connection.
#[derive(Debug)]
pub struct Compressor {
    deflate: Compress,
    window_bits: u8,
}

impl Compressor {
    /// `level` 1 (fast) to 9 (small); `window_bits` as negotiated. `None`: nothing can be
    /// compressed for such a small window.
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

    /// The window it was made for.
    pub fn window_bits(&self) -> u8 {
        self.window_bits
    }

    /// The payload of a compressed message; `None` if that is not shorter, so that the message is
    /// better sent as it is.
    pub fn compress(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        self.deflate.reset();
        // Room for the message and the tail that is cut off: an output that fills it is no gain,
        // and only one that leaves room is known to be flushed.
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

/// Why a message did not inflate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InflateError {
    /// It is not a sequence of whole DEFLATE blocks.
    Corrupt,
    /// It would be longer than allowed.
    TooBig,
}

/// An inflater for many messages of many connections, one after the other: some 50 KiB and the
/// longest message lately.
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
    /// The message whose compressed payload this is (RFC 7692 §7.2.2), at most `bytes_max` long: no
    /// more than that and a step is ever inflated.
    ///
    /// # Errors
    ///
    /// [`InflateError`].
    pub fn inflate(&mut self, payload: &[u8], bytes_max: usize) -> Result<&[u8], InflateError> {
        self.inflate.reset(false);
        self.output.clear();
        self.output.shrink_to(OUTPUT_BYTES_KEPT);
        let rest = match self.feed(payload, bytes_max)? {
            Fed::All => match self.feed(&INFLATE_TAIL, bytes_max)? {
                Fed::Ended { rest: [] } => return Ok(&self.output),
                Fed::Ended { .. } | Fed::All => return Err(InflateError::Corrupt),
            },
            Fed::Ended { rest } => rest,
        };
        match rest {
            [] | [AFTER_FINAL_BLOCK] => Ok(&self.output),
            _ => Err(InflateError::Corrupt),
        }
    }

    fn feed<'a>(&mut self, mut input: &'a [u8], bytes_max: usize) -> Result<Fed<'a>, InflateError> {
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
                Status::StreamEnd => return Ok(Fed::Ended { rest: input }),
                Status::Ok | Status::BufError if idle && input.is_empty() => return Ok(Fed::All),
                Status::Ok | Status::BufError if idle => return Err(InflateError::Corrupt),
                Status::Ok | Status::BufError => {}
            }
        }
    }
}

/// Output buffer kept from one message to the next, bytes.
const OUTPUT_BYTES_KEPT: usize = 64 * 1024;

enum Fed<'a> {
    /// All input is taken, and the inflater waits for more.
    All,
    /// A final block ended before `rest`.
    Ended { rest: &'a [u8] },
}

/// Longest lawful compressed form of a message of `bytes` bytes: DEFLATE stores what does not shrink
/// in blocks of 65,535 bytes at most with 5 bytes each, and senders cut them shorter at will.
pub const fn compressed_bytes_max(bytes: usize) -> usize {
    bytes.saturating_add(bytes / 256).saturating_add(64)
}

/// [`Compressor::compress`] at once, for a rare message; `level` 1 to 9.
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
        // §7.2.3.2 a second message that refers to the first: never with no context takeover.
        assert_eq!(inflated(b"\xf2\x00\x11\x00\x00"), Err(InflateError::Corrupt));
    }

    #[test]
    fn what_is_not_whole_blocks_is_refused() {
        let whole = b"\xf2\x48\xcd\xc9\xc9\x07\x00";
        for cut in 1..whole.len() {
            assert_eq!(inflated(&whole[..cut]), Err(InflateError::Corrupt), "{cut}");
        }
        assert_eq!(inflated(b"\x06"), Err(InflateError::Corrupt), "reserved block type");
        let after_end = b"\xf3\x48\xcd\xc9\xc9\x07\x00\xf3\x48\xcd\xc9\xc9\x07\x00";
        assert_eq!(inflated(after_end), Err(InflateError::Corrupt), "goes on after a final block");
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let bomb = compress(&vec![0; 1 << 20], 9, 15).expect("shrinks");
        assert!(bomb.len() < 2000);
        let mut inflater = Inflater::default();
        assert_eq!(inflater.inflate(&bomb, 1000), Err(InflateError::TooBig));
        assert!(inflater.output.capacity() <= 4 * INFLATE_STEP_BYTES);
        assert_eq!(inflater.inflate(&bomb, 1 << 20).map(<[u8]>::len), Ok(1 << 20));
        assert_eq!(inflater.inflate(&bomb, (1 << 20) - 1), Err(InflateError::TooBig));
        // The next message finds nothing of the one before.
        assert_eq!(inflater.inflate(b"\x00", 1), Ok(&b""[..]));
    }

    #[test]
    fn compresses_only_what_shrinks_and_only_for_windows_that_work() {
        assert_eq!(compress(b"", 6, 15), None);
        assert_eq!(compress(b"abc", 6, 15), None);
        assert_eq!(compress(&[b'a'; 100], 6, 8), None);
        assert!(compress(&[b'a'; 100], 6, 9).is_some_and(|small| small.len() < 20));
    }

    proptest! {
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
