//! The keys of one direction of a session: sealing, opening, and the next keys (RFC 8446 §5.2, §5.3, §7.2, §7.3).
//!
//! An expanded AES key has half a kilobyte. It is expanded for every record, which costs less than a tenth of a
//! microsecond with the instructions of today's processors, so that an idle session does not keep it.

use std::fmt;

use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf;
use zeroize::Zeroize as _;

use crate::protocol::tls::alert::TlsError;
use crate::protocol::tls::record::{
    CONTENT_BYTES_MAX, ContentType, HEADER_BYTES, TAG_BYTES, encode_header,
};

/// Bytes of the longest secret: a SHA-384 hash.
pub const SECRET_BYTES_MAX: usize = 48;
const KEY_BYTES_MAX: usize = 32;
const IV_BYTES: usize = aead::NONCE_LEN;

/// The tag of a record.
pub type Tag = [u8; TAG_BYTES];

/// A cipher suite of TLS 1.3 (RFC 8446 §B.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// `TLS_AES_128_GCM_SHA256`
    Aes128Gcm,
    /// `TLS_AES_256_GCM_SHA384`
    Aes256Gcm,
    /// `TLS_CHACHA20_POLY1305_SHA256`
    ChaCha20Poly1305,
}

impl Suite {
    /// All suites.
    pub const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305];

    fn aead(self) -> &'static aead::Algorithm {
        match self {
            Self::Aes128Gcm => &aead::AES_128_GCM,
            Self::Aes256Gcm => &aead::AES_256_GCM,
            Self::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }

    fn hkdf(self) -> hkdf::Algorithm {
        match self {
            Self::Aes128Gcm | Self::ChaCha20Poly1305 => hkdf::HKDF_SHA256,
            Self::Aes256Gcm => hkdf::HKDF_SHA384,
        }
    }

    /// Length of its secrets, bytes.
    pub fn secret_bytes(self) -> usize {
        match self {
            Self::Aes128Gcm | Self::ChaCha20Poly1305 => 32,
            Self::Aes256Gcm => SECRET_BYTES_MAX,
        }
    }
}

/// The keys of one direction, and the number of its next record.
pub struct RecordKeys {
    /// The traffic secret, from which the next keys are derived.
    secret: [u8; SECRET_BYTES_MAX],
    key: [u8; KEY_BYTES_MAX],
    iv: [u8; IV_BYTES],
    suite: Suite,
    /// Number of the next record (§5.3).
    sequence: u64,
}

impl RecordKeys {
    /// The keys of a traffic secret. `sequence` records were sealed with them before.
    ///
    /// # Panics
    /// If the secret has not the length of the suite's hash.
    pub fn new(suite: Suite, secret: &[u8], sequence: u64) -> Self {
        assert_eq!(secret.len(), suite.secret_bytes());
        let mut own = [0; SECRET_BYTES_MAX];
        own[..secret.len()].copy_from_slice(secret);
        let mut keys =
            Self { secret: own, key: [0; KEY_BYTES_MAX], iv: [0; IV_BYTES], suite, sequence };
        keys.derive();
        keys
    }

    /// Key and IV of the secret (§7.3).
    fn derive(&mut self) {
        let key_bytes = self.suite.aead().key_len();
        let mut key = [0; KEY_BYTES_MAX];
        self.expand(b"key", &mut key[..key_bytes]);
        let mut iv = [0; IV_BYTES];
        self.expand(b"iv", &mut iv);
        (self.key, self.iv) = (key, iv);
        key.zeroize();
    }

    /// The next keys (§7.2), after a key update of this direction.
    pub fn update(&mut self) {
        let mut next = [0; SECRET_BYTES_MAX];
        self.expand(b"traffic upd", &mut next[..self.suite.secret_bytes()]);
        self.secret = next;
        next.zeroize();
        self.sequence = 0;
        self.derive();
    }

    /// `HKDF-Expand-Label(secret, label, "", length)` (§7.1).
    fn expand(&self, label: &[u8], out: &mut [u8]) {
        struct Length(usize);
        impl hkdf::KeyType for Length {
            fn len(&self) -> usize {
                self.0
            }
        }
        let secret = &self.secret[..self.suite.secret_bytes()];
        let length = (out.len() as u16).to_be_bytes();
        let label_length = [(b"tls13 ".len() + label.len()) as u8];
        let info = [&length[..], &label_length, b"tls13 ", label, &[0]];
        hkdf::Prk::new_less_safe(self.suite.hkdf(), secret)
            .expand(&info, Length(out.len()))
            .and_then(|okm| okm.fill(out))
            .expect("keys are shorter than 255 hashes");
    }

    /// Records of these keys so far.
    pub fn records(&self) -> u64 {
        self.sequence
    }

    fn expanded(&self) -> LessSafeKey {
        let aead = self.suite.aead();
        let key = UnboundKey::new(aead, &self.key[..aead.key_len()]);
        LessSafeKey::new(key.expect("the key has the length of its algorithm"))
    }

    /// IV and number of the record (§5.3).
    fn nonce(&self, sequence: u64) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[IV_BYTES - 8..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= number;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Appends the next record to `out`, with the content that `write` appends. Returns its tag.
    ///
    /// # Panics
    /// If the content is too long for a record.
    pub fn seal(
        &mut self,
        content_type: ContentType,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> Tag {
        let sequence = self.sequence;
        self.sequence += 1;
        self.seal_as(sequence, content_type, out, write)
    }

    /// A record of these keys once more, by its number. `write` must append what it appended then: two contents with the
    /// same number would give away both. Whoever calls it compares the tags before anything is sent.
    pub fn seal_again(
        &self,
        number: u64,
        content_type: ContentType,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> Tag {
        assert!(number < self.sequence, "it was sealed with these keys");
        self.seal_as(number, content_type, out, write)
    }

    fn seal_as(
        &self,
        sequence: u64,
        content_type: ContentType,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> Tag {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        write(out);
        out.push(content_type as u8);
        let inner_bytes = out.len() - start - HEADER_BYTES;
        assert!(inner_bytes <= CONTENT_BYTES_MAX + 1, "a content of {inner_bytes} bytes");
        let header = encode_header(inner_bytes + TAG_BYTES);
        out[start..start + HEADER_BYTES].copy_from_slice(&header);
        let inner = &mut out[start + HEADER_BYTES..];
        let sealed = self.expanded().seal_in_place_separate_tag(
            self.nonce(sequence),
            Aad::from(header),
            inner,
        );
        let tag = sealed.expect("a record is short enough for its algorithm");
        out.extend_from_slice(tag.as_ref());
        tag.as_ref().try_into().expect("tags have 16 bytes")
    }

    /// Opens the next record in place. Returns its content without padding, as the length from the start of `sealed`,
    /// and its type.
    ///
    /// # Errors
    /// It cannot be opened, its content is too long, or it has none.
    pub fn open(
        &mut self,
        header: [u8; HEADER_BYTES],
        sealed: &mut [u8],
    ) -> Result<(ContentType, usize), TlsError> {
        let nonce = self.nonce(self.sequence);
        let inner = self.expanded().open_in_place(nonce, Aad::from(header), sealed);
        let inner = inner.map_err(|_| TlsError::BadRecordMac)?;
        self.sequence += 1;
        if inner.len() > CONTENT_BYTES_MAX + 1 {
            return Err(TlsError::RecordOverflow);
        }
        let last = inner.iter().rposition(|byte| *byte != 0).ok_or(TlsError::UnexpectedMessage)?;
        Ok((ContentType::decode(inner[last])?, last))
    }
}

impl Drop for RecordKeys {
    fn drop(&mut self) {
        self.secret.zeroize();
        self.key.zeroize();
        self.iv.zeroize();
    }
}

impl fmt::Debug for RecordKeys {
    /// Omits the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordKeys")
            .field("suite", &self.suite)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    /// The server's application traffic of the trace in RFC 8448 §3.
    fn server_of_rfc_8448() -> RecordKeys {
        let secret = bytes(
            "a1 1a f9 f0 55 31 f8 56 ad 47 11 6b 45 a9 50 32 82 04 b4 f4 4b fb 6b 3a 4b 4f 1f 3f cb 63 16 43",
        );
        RecordKeys::new(Suite::Aes128Gcm, &secret, 0)
    }

    #[test]
    fn keys_are_those_of_rfc_8448() {
        let keys = server_of_rfc_8448();
        assert_eq!(keys.key[..16], bytes("9f 02 28 3b 6c 9c 07 ef c2 6b b9 f2 ac 92 e3 56"));
        assert_eq!(keys.iv[..], bytes("cf 78 2b 88 dd 83 54 9a ad f1 e9 84"));
    }

    #[test]
    fn record_is_that_of_rfc_8448() {
        let mut keys = server_of_rfc_8448();
        // The ticket was the first record. Then the server sends the bytes 0 to 49, and closes.
        keys.sequence = 1;
        let mut out = Vec::new();
        keys.seal(ContentType::ApplicationData, &mut out, |out| out.extend(0..50));
        let record = bytes(
            "17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b 36 e3 0e fa f9 7d
             90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32 54 0d d0 32 e1 67 c2 95 5d",
        );
        assert_eq!(out, record);
        out.clear();
        keys.seal(ContentType::Alert, &mut out, |out| out.extend([1, 0]));
        let record =
            bytes("17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9");
        assert_eq!(out, record);
    }

    #[test]
    fn what_is_sealed_again_is_the_same() {
        for suite in Suite::ALL {
            let mut keys = RecordKeys::new(suite, &vec![7; suite.secret_bytes()], 0);
            let (mut first, mut second) = (Vec::new(), Vec::new());
            let tag = keys.seal(ContentType::ApplicationData, &mut first, |out| out.extend(b"x"));
            let again = keys
                .seal_again(0, ContentType::ApplicationData, &mut second, |out| out.extend(b"x"));
            assert_eq!((first, tag, 1), (second, again, keys.records()));
        }
    }
}
