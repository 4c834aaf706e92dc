//! Masking (RFC 6455 §5.3), one machine word at a time.

/// The four bytes that mask a client's payload.
pub type MaskKey = [u8; 4];

/// Bytes per iteration of the wide loop: four machine words, which the compiler vectorises.
const STRIDE_BYTES: usize = 32;

/// XORs `payload` with `key`, in place. Masking and unmasking are the same operation.
pub fn apply(payload: &mut [u8], key: MaskKey) {
    apply_from(payload, key, 0);
}

/// Like [`apply`], for a piece that starts at `offset` bytes of its payload.
pub fn apply_from(payload: &mut [u8], key: MaskKey, offset: usize) {
    let key: MaskKey = std::array::from_fn(|i| key[(offset + i) % 4]);
    let word = u64::from_ne_bytes([key[0], key[1], key[2], key[3], key[0], key[1], key[2], key[3]]);
    let (strides, rest) = payload.as_chunks_mut::<STRIDE_BYTES>();
    for stride in strides {
        let (words, _) = stride.as_chunks_mut::<8>();
        for bytes in words {
            *bytes = (u64::from_ne_bytes(*bytes) ^ word).to_ne_bytes();
        }
    }
    for (i, byte) in rest.iter_mut().enumerate() {
        *byte ^= key[i % 4];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn example_of_rfc_6455_5_7() {
        let mut hello = [0x7f, 0x9f, 0x4d, 0x51, 0x58];
        apply(&mut hello, [0x37, 0xfa, 0x21, 0x3d]);
        assert_eq!(&hello, b"Hello");
    }

    proptest! {
        #[test]
        fn equals_byte_by_byte_xor_at_any_offset(
            mut payload in proptest::collection::vec(any::<u8>(), 0..200),
            key in any::<[u8; 4]>(),
            offset in 0usize..9,
        ) {
            let expected: Vec<u8> =
                payload.iter().enumerate().map(|(i, b)| b ^ key[(offset + i) % 4]).collect();
            apply_from(&mut payload, key, offset);
            prop_assert_eq!(payload, expected);
        }
    }
}
