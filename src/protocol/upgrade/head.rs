//! Head of a request: its end, its allowed bytes and its request line.

use memchr::memmem;

use crate::protocol::upgrade::list;
use crate::protocol::upgrade::refused::Refused;

/// Longest method, bytes. No HTTP method is longer.
const METHOD_BYTES_MAX: usize = 32;

/// The request line and the header fields.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RequestHead<'a> {
    pub(super) method: &'a str,
    pub(super) target: &'a str,
    /// Minor version of HTTP/1.
    pub(super) minor_version: u8,
    /// All field lines, with the empty line at the end.
    pub(super) fields: &'a [u8],
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeadScan<'a> {
    NeedMore,
    Complete { head: RequestHead<'a>, consumed: usize },
}

/// What earlier calls have checked of a head that arrives in pieces, so that each byte is checked once, not once per
/// piece.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadProgress {
    /// Bytes that are checked, but for the last three, which need what follows.
    checked: usize,
    /// Where the request line ends. It is checked.
    line_end: Option<usize>,
}

impl HeadProgress {
    /// Where to search for something of up to four bytes.
    fn from(self) -> usize {
        self.checked.saturating_sub(3)
    }
}

/// Finds the head at the front of `input`. Checks its bytes and its request line as far as they have
/// arrived. `input` begins with what the earlier calls with this `progress` got.
pub(super) fn scan<'a>(
    input: &'a [u8],
    head_bytes_max: usize,
    progress: &mut HeadProgress,
) -> Result<HeadScan<'a>, Refused> {
    // RFC 9112 §2.2: an empty line before the request line SHOULD be ignored.
    let skipped = if input.starts_with(b"\r\n") { 2 } else { 0 };
    let input = &input[skipped..];
    let within = &input[..input.len().min(head_bytes_max)];
    let from = progress.from();
    let find = |within: &[u8], what: &[u8]| memmem::find(&within[from..], what).map(|at| from + at);
    let end = find(within, b"\r\n\r\n").map(|at| at + 4);
    let head = &within[..end.unwrap_or(within.len())];

    if progress.line_end.is_none() {
        let line_end = find(head, b"\r\n");
        check_bytes(&head[..line_end.map_or(head.len(), |at| at + 2)], from)?;
        line_end.map(|at| request_line(&head[..at])).transpose()?;
        progress.line_end = line_end;
    }
    check_bytes(head, from)?;
    // A single CR may be the first byte of the line that is skipped.
    progress.checked = if input.len() > 1 { head.len() } else { 0 };

    match (progress.line_end, end) {
        (Some(line_end), Some(end)) => {
            let (method, target, minor_version) = request_line(&head[..line_end])?;
            let fields = &head[line_end + 2..];
            let head = RequestHead { method, target, minor_version, fields };
            Ok(HeadScan::Complete { head, consumed: skipped + end })
        }
        _ if input.len() < head_bytes_max => Ok(HeadScan::NeedMore),
        (None, _) => Err(Refused::new(414, "the request target is too long")),
        _ => Err(Refused::new(431, "the request's header fields are too long")),
    }
}

/// RFC 9112 §2.2, §5, RFC 9110 §5.5: lines end with CR LF. A bare CR, a bare LF, a NUL or another
/// control character is refused, because parsers interpret it differently. So is a folded line (RFC
/// 9112 §5.2), which starts with white space.
fn check_bytes(head: &[u8], from: usize) -> Result<(), Refused> {
    for (at, &byte) in head.iter().enumerate().skip(from) {
        let valid = match byte {
            b'\r' => head.get(at + 1).is_none_or(|next| *next == b'\n'),
            b'\n' => at > 0 && head[at - 1] == b'\r',
            b'\t' => true,
            0..0x20 | 0x7f => false,
            _ => true,
        };
        if !valid {
            return Err(Refused::bad_request("not an HTTP/1.1 request: invalid control character"));
        }
        let folded = matches!(byte, b' ' | b'\t') && at > 0 && head[at - 1] == b'\n';
        if folded {
            return Err(Refused::bad_request("a header line is folded or starts with white space"));
        }
    }
    Ok(())
}

/// `method SP request-target SP HTTP-version` (RFC 9112 §3), exactly.
fn request_line(line: &[u8]) -> Result<(&str, &str, u8), Refused> {
    let malformed = || Refused::bad_request("not an HTTP/1.1 request line");
    let line =
        std::str::from_utf8(line).ok().filter(|line| line.is_ascii()).ok_or_else(malformed)?;
    let mut parts = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(malformed());
    };
    if !list::is_token(method) || method.len() > METHOD_BYTES_MAX || target.is_empty() {
        return Err(malformed());
    }
    match version.as_bytes() {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'0'..=b'9'] => {
            Ok((method, target, minor - b'0'))
        }
        [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'] => {
            Err(Refused::new(505, "HTTP/1.1 only"))
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const LIMIT: usize = 64;

    fn whole(input: &[u8]) -> Result<HeadScan<'_>, Refused> {
        scan(input, LIMIT, &mut HeadProgress::default())
    }

    proptest! {
        /// In pieces as at once.
        #[test]
        fn head_that_arrives_in_pieces_is_scanned_as_if_it_came_at_once(
            parts in prop::collection::vec(
                prop::sample::select(vec![
                    "\r\n", "\r", "\n", "\r\n\r\n", "GET ", "/x ", "HTTP/1.1", " ", "a: b", "\0", "\u{e9}", "\t", "xxxxxxxx",
                ]),
                0..14,
            ),
            valid_start in any::<bool>(),
            cuts in prop::collection::vec(1..9_usize, 0..90),
        ) {
            let start = if valid_start { "GET /x HTTP/1.1\r\n" } else { "" };
            let input = [start, &parts.concat()].concat().into_bytes();
            let mut progress = HeadProgress::default();
            let mut end = 0;
            for length in cuts.into_iter().chain([input.len()]) {
                end = input.len().min(end + length);
                let (pieces, once) = (scan(&input[..end], LIMIT, &mut progress), whole(&input[..end]));
                prop_assert_eq!(&pieces, &once, "{:?}", String::from_utf8_lossy(&input[..end]));
                if !matches!(pieces, Ok(HeadScan::NeedMore)) {
                    break;
                }
            }
        }
    }

    fn status(input: &[u8]) -> u16 {
        whole(input).map(|scan| format!("{scan:?}")).expect_err("must fail").status()
    }

    #[test]
    fn complete_head_is_found_and_the_rest_is_not_consumed() {
        let input = b"\r\nGET /x HTTP/1.1\r\nA: b\r\n\r\n\x81\x00";
        let head =
            RequestHead { method: "GET", target: "/x", minor_version: 1, fields: b"A: b\r\n\r\n" };
        assert_eq!(whole(input), Ok(HeadScan::Complete { head, consumed: input.len() - 2 }));
        for cut in 0..input.len() - 2 {
            assert_eq!(whole(&input[..cut]), Ok(HeadScan::NeedMore), "{cut}");
        }
        let bare = b"GET / HTTP/1.0\r\n\r\n";
        let head = RequestHead { method: "GET", target: "/", minor_version: 0, fields: b"\r\n" };
        assert_eq!(whole(bare), Ok(HeadScan::Complete { head, consumed: bare.len() }));
    }

    #[test]
    fn invalid_head_is_refused_before_it_is_complete() {
        for bad in [
            &b"\x16\x03\x01"[..],
            b"GET / HTTP/1.1\n",
            b"GET / HTTP/1.1\r\nA: b\rc",
            b"GET / HTTP/1.1\r\nA: \0",
            b"GET / HTTP/1.1\r\nA: b\r\n c",
            b"GET / HTTP/1.1\r\nA: \x7f",
            b"GET  / HTTP/1.1\r\n",
            b"GET / HTTP/1.1 \r\n",
            b"GET / http/1.1\r\n",
            b"G(T / HTTP/1.1\r\n",
            b"GET /\xc3\xa9 HTTP/1.1\r\n",
            b"\r\n\r\n",
        ] {
            assert_eq!(status(bad), 400, "{}", bad.escape_ascii());
        }
        assert_eq!(status(b"PRI * HTTP/2.0\r\n"), 505);
    }

    #[test]
    fn length_is_limited() {
        assert_eq!(status(&[b'a'; LIMIT]), 414);
        let line = b"GET / HTTP/1.1\r\nA: ".iter().copied();
        let long: Vec<u8> = line.chain(std::iter::repeat_n(b'b', LIMIT)).collect();
        assert_eq!(status(&long[..LIMIT]), 431);
        assert_eq!(whole(&long[..LIMIT - 1]), Ok(HeadScan::NeedMore));
    }
}
