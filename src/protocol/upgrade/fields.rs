//! Header fields of a request.

use crate::protocol::upgrade::list;
use crate::protocol::upgrade::refused::Refused;

/// All header fields, in order. Names are not case-sensitive (RFC 9110 §5.1).
pub(super) struct HeaderFields<'a>(&'a [httparse::Header<'a>]);

impl<'a> HeaderFields<'a> {
    /// Parses `lines`, which end with an empty line, into `storage`.
    pub(super) fn parse(
        lines: &'a [u8],
        storage: &'a mut [httparse::Header<'a>],
    ) -> Result<Self, Refused> {
        match httparse::parse_headers(lines, storage) {
            Ok(httparse::Status::Complete((_, fields))) => Ok(Self(fields)),
            Err(httparse::Error::TooManyHeaders) => {
                Err(Refused::new(431, "the request has too many header fields"))
            }
            Ok(httparse::Status::Partial) | Err(_) => {
                Err(Refused::bad_request("a header line is malformed"))
            }
        }
    }

    /// Values of all fields with this name.
    pub(super) fn all(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().filter(move |f| f.name.eq_ignore_ascii_case(name)).map(|f| f.value)
    }

    /// Like [`HeaderFields::all`], as text. Fails if a value is not ASCII.
    pub(super) fn texts(&self, name: &str) -> Result<impl Iterator<Item = &'a str>, Refused> {
        for value in self.all(name) {
            text(name, value)?;
        }
        Ok(self.all(name).filter_map(|value| std::str::from_utf8(value).ok()))
    }

    /// The value of a field that may occur once.
    pub(super) fn one(&self, name: &str) -> Result<Option<&'a str>, Refused> {
        let mut values = self.all(name);
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(value), None) => Ok(Some(list::trimmed(text(name, value)?))),
            (Some(_), Some(_)) => Err(Refused::bad_request(format!("{name} is given twice"))),
        }
    }

    /// Whether a comma-separated field contains this token in any of its lines. Ignores case.
    pub(super) fn lists(&self, name: &str, token: &str) -> Result<bool, Refused> {
        let mut found = false;
        for value in self.texts(name)? {
            found |= list::elements(value).any(|element| element.eq_ignore_ascii_case(token));
        }
        Ok(found)
    }

    /// Whether the request has a body (RFC 9112 §6.3). Fails if a proxy could delimit the body
    /// differently.
    pub(super) fn has_body(&self, minor_version: u8) -> Result<bool, Refused> {
        let transfer_encoding = self.all("transfer-encoding").next().is_some();
        let length = match self.one("content-length")? {
            None => None,
            Some(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                Some(digits)
            }
            Some(_) => return Err(Refused::bad_request("Content-Length must be one number")),
        };
        // RFC 9112 §6.1: both fields together, or a transfer coding in HTTP/1.0, allow request
        // smuggling.
        if transfer_encoding && (length.is_some() || minor_version == 0) {
            return Err(Refused::bad_request(
                "Transfer-Encoding makes the body's length ambiguous",
            ));
        }
        Ok(transfer_encoding || length.is_some_and(|digits| digits.bytes().any(|b| b != b'0')))
    }
}

fn text<'a>(name: &str, value: &'a [u8]) -> Result<&'a str, Refused> {
    std::str::from_utf8(value)
        .ok()
        .filter(|value| value.is_ascii())
        .ok_or_else(|| Refused::bad_request(format!("{name} is not ASCII")))
}
