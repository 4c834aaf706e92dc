//! Request target and authority (RFC 9112 §3.2, RFC 3986).

use crate::protocol::upgrade::refused::Refused;

/// Path and query of a request target, not decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RequestTarget<'a> {
    /// Compared without decoding, because some proxies treat an encoded `/ws` as another path.
    pub(super) path: &'a str,
    /// The part after `?`; empty without a query.
    pub(super) query: &'a str,
}

impl<'a> RequestTarget<'a> {
    /// Parses `/path?query`, and the absolute form, which a server MUST accept (RFC 9112 §3.2.2).
    pub(super) fn parse(target: &'a str) -> Result<Self, Refused> {
        let relative = match target.split_once("://") {
            Some((scheme, rest)) if is_scheme(scheme) => {
                let at = rest.find(['/', '?']).unwrap_or(rest.len());
                let (authority, relative) = rest.split_at(at);
                if !is_authority(authority) {
                    return Err(Refused::bad_request(
                        "the request target's authority is malformed",
                    ));
                }
                relative
            }
            // `*` and `host:port` (RFC 9112 §3.2.3, §3.2.4) name no path.
            _ if !target.starts_with('/') => "",
            _ => target,
        };
        // RFC 9110 §7.1: clients do not send fragments.
        if target.contains('#') {
            return Err(Refused::bad_request("the request target has a fragment"));
        }
        let (path, query) = relative.split_once('?').unwrap_or((relative, ""));
        Ok(Self { path, query })
    }
}

fn is_scheme(scheme: &str) -> bool {
    ["http", "https", "ws", "wss"].iter().any(|known| scheme.eq_ignore_ascii_case(known))
}

/// `host [ ":" port ]` with a non-empty host and without user information (RFC 9110 §4.2.4, §7.2).
pub fn is_authority(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else { return false };
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            (address, after)
        }
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let port_valid = match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(digits) => digits.len() <= 5 && digits.bytes().all(|b| b.is_ascii_digit()),
    };
    port_valid && !host.is_empty() && (text.starts_with('[') || host.bytes().all(is_name_byte))
}

/// `reg-name` of RFC 3986 §3.2.2.
fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_forms() {
        let parse = |target| RequestTarget::parse(target).map(|t| (t.path, t.query));
        assert_eq!(parse("/ws?a=b?c"), Ok(("/ws", "a=b?c")));
        assert_eq!(parse("/"), Ok(("/", "")));
        assert_eq!(parse("http://h:80/ws?a"), Ok(("/ws", "a")));
        assert_eq!(parse("WSS://[::1]/ws"), Ok(("/ws", "")));
        assert_eq!(parse("http://h?a"), Ok(("", "a")));
        assert_eq!(parse("*"), Ok(("", "")));
        assert_eq!(parse("h:80"), Ok(("", "")));
        assert_eq!(parse("/ws?u=http://h/"), Ok(("/ws", "u=http://h/")));
        for bad in ["/ws#a", "http:///ws", "http://u@h/ws", "http://h:x/ws"] {
            assert!(RequestTarget::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn authorities() {
        for good in ["h", "h:", "h:8083", "a.b-c_d", "127.0.0.1:1", "[::1]", "[::1]:80", "%41"] {
            assert!(is_authority(good), "{good}");
        }
        for bad in [
            "", ":80", "h:x", "h:1:2", "h:123456", "a@b", "a/b", "[::1", "[]", "[x]", "[::1]x",
            "a b",
        ] {
            assert!(!is_authority(bad), "{bad}");
        }
    }
}
