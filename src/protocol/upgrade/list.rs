//! Common grammar of HTTP header values: tokens, comma lists, quoted strings (RFC 9110 §5.6).

use std::borrow::Cow;

/// `tchar` of RFC 9110 §5.6.2.
pub fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A non-empty token (RFC 9110 §5.6.2).
pub fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(is_token_byte)
}

/// Removes optional white space around the text (RFC 9110 §5.6.3).
pub fn trimmed(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

/// Elements of a comma list, trimmed and without empty ones (RFC 9110 §5.6.1.2). Ignores commas in
/// quotes.
pub fn elements(value: &str) -> impl Iterator<Item = &str> {
    parts(value, b',').filter(|element| !element.is_empty())
}

/// Splits at separators outside quotes; trims the parts.
pub fn parts(value: &str, separator: u8) -> impl Iterator<Item = &str> {
    let mut rest = Some(value);
    std::iter::from_fn(move || {
        let value = rest?;
        match separator_at(value.as_bytes(), separator) {
            Some(at) => {
                rest = Some(&value[at + 1..]);
                Some(trimmed(&value[..at]))
            }
            None => {
                rest = None;
                Some(trimmed(value))
            }
        }
    })
}

fn separator_at(value: &[u8], separator: u8) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, &byte) in value.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if byte == separator && !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

/// A token unchanged, or the content of a quoted string (RFC 9110 §5.6.4); `None` for anything else.
pub fn unquoted(value: &str) -> Option<Cow<'_, str>> {
    let Some(inner) = value.strip_prefix('"') else {
        return is_token(value).then_some(Cow::Borrowed(value));
    };
    let mut text = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    loop {
        match chars.next()? {
            '"' => return chars.as_str().is_empty().then_some(Cow::Owned(text)),
            '\\' => text.push(chars.next()?),
            char => text.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_trimmed_and_never_empty() {
        let all: Vec<_> = elements(" a ,\t, b;c=\"d,e\\\",f\" ,").collect();
        assert_eq!(all, ["a", "b;c=\"d,e\\\",f\""]);
        assert_eq!(elements("").count(), 0);
    }

    #[test]
    fn quoted_strings() {
        assert_eq!(unquoted("abc").as_deref(), Some("abc"));
        assert_eq!(unquoted("\"a\\\"b\"").as_deref(), Some("a\"b"));
        for bad in ["", "\"", "\"a", "\"a\"b", "\"a\\", "a b", "a\""] {
            assert_eq!(unquoted(bad), None, "{bad}");
        }
    }

    #[test]
    fn token_bytes_match_rfc_9110() {
        let others: Vec<u8> = (0..=u8::MAX)
            .filter(|byte| is_token_byte(*byte) && !byte.is_ascii_alphanumeric())
            .collect();
        assert_eq!(others, b"!#$%&'*+-.^_`|~");
    }
}
