//! Reads the fuzzer's bytes as choices. An exhausted input yields zeros, so every input is valid.

/// The unread rest of an input.
pub struct FuzzInput<'a>(pub &'a [u8]);

impl<'a> FuzzInput<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    /// The next `count` bytes, or fewer at the end.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// One of the choices.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }

    /// Whether the input is exhausted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// First bytes of frames: valid ones of each kind, then one of each kind of error.
const FIRST_BYTES: [u8; 24] = [
    0x81, 0x82, 0x01, 0x02, 0x00, 0x80, 0x88, 0x89, 0x8a, 0xc1, 0xc2, 0x41, 0x42, // valid
    0xc0, 0xc8, 0xa1, 0x91, 0x83, 0x8b, 0x09, 0x08, 0x07, 0x0f, 0xff,
];

/// Builds frames from a script: first byte, length form, mask and payload. So the fuzzer finds with one
/// byte what it cannot guess, like masked text that is valid UTF-8.
pub fn frames(input: &mut FuzzInput<'_>) -> Vec<u8> {
    let mut stream = Vec::new();
    while !input.is_empty() {
        let shape = input.byte();
        let first = if shape & 1 == 0 { input.one_of(&FIRST_BYTES) } else { input.byte() };
        let length = usize::from(input.byte()) << (shape >> 1 & 3);
        let payload = input.bytes(length);
        let announced = match shape >> 3 & 7 {
            // Sometimes the announced length is wrong.
            7 => payload.len() + usize::from(input.byte()),
            _ => payload.len(),
        };
        let masked = if shape >> 6 == 3 && input.byte() == 0 { 0 } else { 0x80 };
        stream.push(first);
        match (announced, shape >> 3 & 7) {
            (0..126, 0..5) => stream.push(masked | announced as u8),
            (0..0x1_0000, 0..6) => {
                stream.push(masked | 126);
                stream.extend((announced as u16).to_be_bytes());
            }
            _ => {
                stream.push(masked | 127);
                stream.extend((announced as u64).to_be_bytes());
            }
        }
        if masked == 0 {
            stream.extend(payload);
        } else {
            let key = [shape, first, 0, 0x5a];
            stream.extend(key);
            stream.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
        }
    }
    stream
}
