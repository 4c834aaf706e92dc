//! Incremental UTF-8 check: rejects the first byte that cannot belong to valid text, however the text
//! is split.

/// Longest incomplete character, bytes: a character has up to four (RFC 3629 §3).
const INCOMPLETE_BYTES_MAX: usize = 3;

/// The text is not UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotUtf8;

/// A complete text as a string; `None` if it is not UTF-8. Vectorised.
pub fn as_text(text: &[u8]) -> Option<&str> {
    simdutf8::basic::from_utf8(text).ok()
}

/// Checks a text piece by piece. Stores only the bytes of an incomplete character at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Utf8Checker {
    incomplete: [u8; INCOMPLETE_BYTES_MAX],
    len: u8,
}

impl Utf8Checker {
    /// Checks the next piece.
    ///
    /// # Errors
    ///
    /// [`NotUtf8`] if no continuation can make the text so far valid.
    pub fn push(&mut self, mut piece: &[u8]) -> Result<(), NotUtf8> {
        while self.len > 0 {
            let Some((&next, rest)) = piece.split_first() else { return Ok(()) };
            piece = rest;
            let have = usize::from(self.len);
            let mut character = [0; INCOMPLETE_BYTES_MAX + 1];
            character[..have].copy_from_slice(&self.incomplete[..have]);
            character[have] = next;
            match std::str::from_utf8(&character[..=have]) {
                Ok(_) => self.len = 0,
                Err(error) if error.error_len().is_some() => return Err(NotUtf8),
                Err(_) => {
                    // Still incomplete, so shorter than the longest character.
                    self.incomplete[have] = next;
                    self.len += 1;
                }
            }
        }
        match simdutf8::compat::from_utf8(piece) {
            Ok(_) => Ok(()),
            Err(error) if error.error_len().is_some() => Err(NotUtf8),
            Err(error) => {
                let start = &piece[error.valid_up_to()..];
                self.incomplete[..start.len()].copy_from_slice(start);
                self.len = start.len() as u8;
                Ok(())
            }
        }
    }

    /// Checks that the text is complete.
    ///
    /// # Errors
    ///
    /// [`NotUtf8`] if its last character is incomplete.
    pub fn finish(self) -> Result<(), NotUtf8> {
        if self.len == 0 { Ok(()) } else { Err(NotUtf8) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pushes byte by byte. Returns the index of the first rejected byte, or the length.
    fn rejected_at(text: &[u8]) -> usize {
        let mut checker = Utf8Checker::default();
        text.iter().position(|byte| checker.push(&[*byte]).is_err()).unwrap_or(text.len())
    }

    #[test]
    fn rejects_the_first_byte_that_cannot_be_valid() {
        assert_eq!(rejected_at(b"\xce\xba\xf4\x90\x80\x80"), 3, "above U+10FFFF");
        assert_eq!(rejected_at(b"\xed\xa0\x80"), 1, "surrogate");
        assert_eq!(rejected_at(b"\xc0\xaf"), 0, "overlong");
        assert_eq!(rejected_at(b"\xe0\x9f\xbf"), 1, "overlong");
        assert_eq!(rejected_at(b"\xf8"), 0);
        assert_eq!(rejected_at(b"a\x80"), 1);
        assert_eq!(rejected_at("κόσμε😀".as_bytes()), "κόσμε😀".len());
    }

    #[test]
    fn incomplete_last_character_is_rejected() {
        for cut in ["é".as_bytes(), "€".as_bytes(), "😀".as_bytes()] {
            for len in 1..cut.len() {
                let mut checker = Utf8Checker::default();
                assert_eq!(checker.push(&cut[..len]), Ok(()));
                assert_eq!(checker.finish(), Err(NotUtf8));
            }
        }
    }

    proptest! {
        #[test]
        fn same_result_as_std_for_any_split(
            text in prop_oneof![
                any::<String>().prop_map(String::into_bytes),
                proptest::collection::vec(any::<u8>(), 0..40),
                (any::<String>(), any::<u8>(), any::<prop::sample::Index>()).prop_map(|(s, b, at)| {
                    let mut bytes = s.into_bytes();
                    if !bytes.is_empty() {
                        let at = at.index(bytes.len());
                        bytes[at] = b;
                    }
                    bytes
                }),
            ],
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut checker = Utf8Checker::default();
            let pushed = cuts.windows(2).try_for_each(|w| checker.push(&text[w[0]..w[1]]));
            let expected = std::str::from_utf8(&text);
            prop_assert_eq!(pushed.and_then(|()| checker.finish()).is_ok(), expected.is_ok());
            // `push` accepts exactly the texts that more bytes can still complete.
            prop_assert_eq!(pushed.is_ok(), expected.map_or_else(|e| e.error_len().is_none(), |_| true));
            prop_assert_eq!(as_text(&text).is_some(), expected.is_ok());
        }
    }
}
