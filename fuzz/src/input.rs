//! Bytes of the fuzzer read as choices. Running out of them reads zeros, so every input means
//! something.

/// The rest of an input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
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

    /// The next `count` bytes, or what is left.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// One of them.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// First bytes of frames that matter: lawful ones of each kind, then one unlawful of each kind.
const FIRST_BYTES: [u8; 24] = [
    0x81, 0x82, 0x01, 0x02, 0x00, 0x80, 0x88, 0x89, 0x8a, 0xc1, 0xc2, 0x41, 0x42, // lawful
    0xc0, 0xc8, 0xa1, 0x91, 0x83, 0x8b, 0x09, 0x08, 0x07, 0x0f, 0xff,
];

/// Frames from a script: each is a first byte, how its length is written, a mask key and a payload.
/// What a fuzzer cannot guess (that a text is UTF-8 once unmasked) is then one byte to find.
pub fn frames(input: &mut Input<'_>) -> Vec<u8> {
    let mut stream = Vec::new();
    while !input.is_empty() {
        let shape = input.byte();
        let first = if shape & 1 == 0 { input.one_of(&FIRST_BYTES) } else { input.byte() };
        let length = usize::from(input.byte()) << (shape >> 1 & 3);
        let payload = input.bytes(length);
        let announced = match shape >> 3 & 7 {
            // Now and then the frame announces other than it has.
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
        let key = [shape, first, 0, 0x5a];
        if masked != 0 {
            stream.extend(key);
        }
        let mut payload = payload.to_vec();
        if masked != 0 {
            payload.iter_mut().enumerate().for_each(|(i, byte)| *byte ^= key[i % 4]);
        }
        stream.extend(payload);
    }
    stream
}
