//! The query of a `/ws` request, percent-decoded.

use crate::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};
use crate::protocol::upgrade::refused::Refused;

/// Parameters of a session request. Other parameters are ignored.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SessionQuery {
    /// `user_id`; empty if missing.
    pub user_id: String,
    /// `device_id`; empty if missing.
    pub device_id: String,
    /// `access_token` (RFC 6750 §2.3).
    pub access_token: Option<String>,
}

impl SessionQuery {
    /// Parses the part of the target after `?`.
    ///
    /// # Errors
    ///
    /// 400 for a value that does not decode to UTF-8, contains control characters or is too long, and
    /// for a parameter that is given twice: parsers could disagree which one counts.
    pub fn parse(query: &str) -> Result<Self, Refused> {
        let mut values: [Option<String>; PARAMETERS.len()] = Default::default();
        for pair in query.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            // A key that does not decode is an unknown parameter.
            let Some(key) = decode(key, KEY_BYTES_MAX) else { continue };
            let Some(index) = PARAMETERS.iter().position(|(name, _)| key == *name) else {
                continue;
            };
            if values[index].is_some() {
                return Err(Refused::bad_request(format!("{key} is given twice")));
            }
            values[index] = Some(parameter(&key, value, PARAMETERS[index].1)?);
        }
        let [user_id, device_id, access_token] = values;
        Ok(Self {
            user_id: user_id.unwrap_or_default(),
            device_id: device_id.unwrap_or_default(),
            access_token: access_token.filter(|token| !token.is_empty()),
        })
    }
}

/// Names of the parameters and their longest values, bytes after decoding.
const PARAMETERS: [(&str, usize); 3] =
    [("user_id", ID_BYTES_MAX), ("device_id", ID_BYTES_MAX), ("access_token", TOKEN_BYTES_MAX)];
/// Longest known key, bytes after decoding.
const KEY_BYTES_MAX: usize = "access_token".len();

fn parameter(name: &str, value: &str, bytes_max: usize) -> Result<String, Refused> {
    let Some(value) = decode(value, bytes_max) else {
        return Err(Refused::bad_request(format!(
            "{name} must be percent-encoded UTF-8 of at most {bytes_max} bytes"
        )));
    };
    if value.chars().any(char::is_control) {
        return Err(Refused::bad_request(format!("{name} contains a control character")));
    }
    Ok(value)
}

/// Decodes percent-encoding, and `+` as a space as HTML forms and `URLSearchParams` encode it. `None`
/// if a `%` is not followed by two hexadecimal digits, or the result is not UTF-8 or longer than
/// `bytes_max` bytes.
pub fn decode(encoded: &str, bytes_max: usize) -> Option<String> {
    let mut decoded = Vec::with_capacity(encoded.len().min(bytes_max));
    let mut bytes = encoded.bytes();
    while let Some(byte) = bytes.next() {
        if decoded.len() == bytes_max {
            return None;
        }
        decoded.push(match byte {
            b'%' => hex(bytes.next()?)? << 4 | hex(bytes.next()?)?,
            b'+' => b' ',
            _ => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> SessionQuery {
        SessionQuery::parse(query).expect(query)
    }

    fn body(query: &str) -> String {
        let refused = SessionQuery::parse(query).expect_err(query);
        assert_eq!(refused.status(), 400);
        refused.body().to_owned()
    }

    #[test]
    fn decodes_known_parameters_and_ignores_others() {
        let query = parse("user_id=J%C3%BCrgen+M&x=%zz&%=&device_id=a%2Bb&&=&access_token=a.b");
        assert_eq!((query.user_id.as_str(), query.device_id.as_str()), ("Jürgen M", "a+b"));
        assert_eq!(query.access_token.as_deref(), Some("a.b"));
        assert_eq!(parse("user%5fid=u").user_id, "u");
        assert_eq!(parse(""), SessionQuery::default());
        assert_eq!(parse("user_id&device_id="), SessionQuery::default());
        assert_eq!(parse("access_token=").access_token, None);
        assert_eq!(parse("user_id=a=b").user_id, "a=b");
    }

    #[test]
    fn refuses_ambiguous_parameters() {
        assert_eq!(body("user_id=a&user_id=b"), "user_id is given twice");
        assert_eq!(body("device_id=&device%5Fid=b"), "device_id is given twice");
        let not_utf8 = "user_id must be percent-encoded UTF-8 of at most 256 bytes";
        for bad in ["%", "%4", "%zz", "%+1", "%ff", "%C3", "%ED%A0%80", "%C0%AF"] {
            assert_eq!(body(&format!("user_id={bad}")), not_utf8, "{bad}");
        }
        for bad in ["%00", "%0a", "%0D", "a%7F", "%C2%85", "%09"] {
            assert_eq!(
                body(&format!("user_id={bad}")),
                "user_id contains a control character",
                "{bad}"
            );
        }
    }

    #[test]
    fn length_is_counted_after_decoding() {
        let longest = "%C3%A9".repeat(ID_BYTES_MAX / 2);
        assert_eq!(parse(&format!("user_id={longest}")).user_id.len(), ID_BYTES_MAX);
        assert!(SessionQuery::parse(&format!("user_id={longest}x")).is_err());
        assert!(
            SessionQuery::parse(&format!("access_token={}", "x".repeat(TOKEN_BYTES_MAX))).is_ok()
        );
        assert!(
            SessionQuery::parse(&format!("access_token={}", "x".repeat(TOKEN_BYTES_MAX + 1)))
                .is_err()
        );
    }
}
