//! Who may use the paths below `/admin/`: reading the sessions, closing them, draining.
//!
//! | comes | may, if |
//! | --- | --- |
//! | over the Unix socket | always: the mode of its file decides who can connect |
//! | from any address | it has a token of the node |
//! | from a loopback address | the node has no token, no proxy has passed it on, and `Host` is an address or `localhost` |
//!
//! A web page never may. Browsers say that a request comes from a page (`Origin`, `Sec-Fetch-Site`), except for a page
//! whose own host name was resolved again to an address of this machine (DNS rebinding). Such a page does not know a
//! token, and its name is in `Host`.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, RwLock};

use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use ring::hmac;
use ring::rand::SystemRandom;

use crate::domain::command::Secret;

/// The other end of a connection to the admin API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdminPeer {
    /// A client of the port, with its address.
    Address(IpAddr),
    /// A client of the Unix socket, with its user id if the kernel knows it (`SO_PEERCRED`, `unix(7)`).
    Socket(Option<u32>),
}

/// Who acts, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// Whoever has the token with this number, at this address.
    Token(usize, IpAddr),
    /// A process of this machine.
    Loopback,
    /// A process of this user that may open the Unix socket.
    Socket(Option<u32>),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(number, address) => write!(f, "token {number} from {address}"),
            Self::Loopback => f.write_str("loopback"),
            Self::Socket(Some(user)) => write!(f, "socket, user {user}"),
            Self::Socket(None) => f.write_str("socket"),
        }
    }
}

/// Why a request is denied. The texts say what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    /// A browser sends it for a page.
    #[error("web pages may not use the admin API: send neither Origin nor Sec-Fetch-Site")]
    WebPage,
    /// The token is none of the node's, or no bearer token.
    #[error(
        "not a token of this node: send `Authorization: Bearer <token>` with one of ADMIN_TOKEN or ADMIN_TOKEN_FILE"
    )]
    TokenWrong,
    /// The node has a token, and the request has none.
    #[error("admin token required: send `Authorization: Bearer <token>`, or use ADMIN_SOCKET")]
    TokenMissing,
    /// The node has no token.
    #[error(
        "allowed only from this machine (127.0.0.1, ::1), because this node has no ADMIN_TOKEN or ADMIN_TOKEN_FILE"
    )]
    NotLoopback,
    /// A proxy of this machine has passed it on.
    #[error(
        "passed on by a proxy, so it may come from anywhere: set ADMIN_TOKEN, or call the node directly"
    )]
    Proxied,
    /// `Host` is a name, which a web page may have had resolved to this machine.
    #[error(
        "without a token, Host must be an IP address or `localhost`: a web page could use another name"
    )]
    HostNamed,
}

impl Denied {
    /// The HTTP status of the answer.
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::TokenWrong | Self::TokenMissing => StatusCode::UNAUTHORIZED,
            Self::WebPage | Self::NotLoopback | Self::Proxied | Self::HostNamed => {
                StatusCode::FORBIDDEN
            }
        }
    }
}

/// The tokens that may act. Keeps no token, only its authentication code under a key of this process, and compares
/// those in constant time.
#[derive(Debug)]
pub struct AdminTokens {
    key: hmac::Key,
    tags: RwLock<Arc<[hmac::Tag]>>,
}

impl AdminTokens {
    /// These tokens. None: only callers of this machine may act.
    pub fn new(tokens: &[Secret]) -> Self {
        let random = SystemRandom::new();
        let key =
            hmac::Key::generate(hmac::HMAC_SHA256, &random).expect("the kernel has randomness");
        let new = Self { key, tags: RwLock::default() };
        new.replace(tokens);
        new
    }

    /// Replaces all tokens.
    pub fn replace(&self, tokens: &[Secret]) {
        let sign = |token: &Secret| hmac::sign(&self.key, token.expose().as_bytes());
        *self.tags.write().expect("no holder panics") = tokens.iter().map(sign).collect();
    }

    fn current(&self) -> Arc<[hmac::Tag]> {
        Arc::clone(&self.tags.read().expect("no holder panics"))
    }

    /// The number of the token, from 1 on in the order in which they were given. `None`: it is none of them.
    fn number(&self, token: &[u8]) -> Option<usize> {
        let verify = |tag: &hmac::Tag| hmac::verify(&self.key, token, tag.as_ref()).is_ok();
        self.current().iter().position(verify).map(|index| index + 1)
    }
}

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// What proxies add: RFC 7239, its predecessor, RFC 9110 §7.6.3.
const PROXY_FIELDS: [HeaderName; 3] =
    [header::FORWARDED, HeaderName::from_static("x-forwarded-for"), header::VIA];

/// Decides on a request with these header fields.
///
/// # Errors
/// It is denied.
pub(super) fn judge(
    peer: AdminPeer,
    headers: &HeaderMap,
    tokens: &AdminTokens,
) -> Result<Caller, Denied> {
    // `none`: the user has typed the address, and no page can cause that (Fetch Metadata §2.3).
    let is_typed = headers.get_all(SEC_FETCH_SITE).iter().all(|site| site == "none");
    if headers.contains_key(header::ORIGIN) || !is_typed {
        return Err(Denied::WebPage);
    }
    let address = match peer {
        AdminPeer::Socket(user) => return Ok(Caller::Socket(user)),
        AdminPeer::Address(address) => address.to_canonical(),
    };
    if headers.contains_key(header::AUTHORIZATION) {
        let number = bearer(headers).and_then(|token| tokens.number(token));
        return number.map(|number| Caller::Token(number, address)).ok_or(Denied::TokenWrong);
    }
    if !tokens.current().is_empty() {
        return Err(Denied::TokenMissing);
    }
    if !address.is_loopback() {
        return Err(Denied::NotLoopback);
    }
    if PROXY_FIELDS.iter().any(|field| headers.contains_key(field)) {
        return Err(Denied::Proxied);
    }
    if headers.get(header::HOST).is_some_and(|host| !names_this_machine(host.as_bytes())) {
        return Err(Denied::HostNamed);
    }
    Ok(Caller::Loopback)
}

/// The token of the one `Authorization` field (RFC 6750 §2.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut fields = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(field), None) = (fields.next(), fields.next()) else { return None };
    let (scheme, token) = field.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// Whether a `Host` field is an address or `localhost`, with or without a port. Nobody can have another address for
/// these.
fn names_this_machine(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: AdminPeer = AdminPeer::Socket(Some(7));
    const TOKEN: &str = "0123456789abcdef0123456789abcdef";
    const SECOND: &str = "fedcba9876543210fedcba9876543210";

    fn judged(peer: AdminPeer, fields: &[(&str, &str)], tokens: &[&str]) -> Result<Caller, Denied> {
        let tokens: Vec<_> = tokens.iter().map(|it| Secret::new((*it).to_owned())).collect();
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        judge(peer, &headers, &AdminTokens::new(&tokens))
    }

    fn at(address: &str) -> AdminPeer {
        AdminPeer::Address(address.parse().unwrap())
    }

    #[test]
    fn without_a_token_only_this_machine_may_act() {
        let host = ("host", "127.0.0.1:8093");
        for (peer, expected) in [
            (at("127.0.0.1"), Ok(Caller::Loopback)),
            (at("127.0.0.6"), Ok(Caller::Loopback)),
            (at("::1"), Ok(Caller::Loopback)),
            (at("::ffff:127.0.0.1"), Ok(Caller::Loopback)),
            (at("10.0.0.1"), Err(Denied::NotLoopback)),
            (at("::ffff:10.0.0.1"), Err(Denied::NotLoopback)),
            (at("fe80::1"), Err(Denied::NotLoopback)),
            (SOCKET, Ok(Caller::Socket(Some(7)))),
        ] {
            assert_eq!(judged(peer, &[host], &[]), expected, "{peer:?}");
        }
    }

    #[test]
    fn token_is_needed_where_the_node_has_one_and_accepted_from_anywhere() {
        let (near, far) = (at("127.0.0.1"), at("10.0.0.1"));
        let with = |scheme: &str, token: &str| format!("{scheme} {token}");
        let accepted = |number, peer: AdminPeer| match peer {
            AdminPeer::Address(address) => Ok(Caller::Token(number, address)),
            AdminPeer::Socket(user) => Ok(Caller::Socket(user)),
        };
        for peer in [near, far] {
            assert_eq!(judged(peer, &[], &[TOKEN]), Err(Denied::TokenMissing));
            for (field, expected) in [
                (with("Bearer", TOKEN), accepted(1, peer)),
                (with("bearer", SECOND), accepted(2, peer)),
                (with("Bearer", " 0123456789abcdef0123456789abcdef "), accepted(1, peer)),
                (with("Basic", TOKEN), Err(Denied::TokenWrong)),
                (with("Bearer", &TOKEN[1..]), Err(Denied::TokenWrong)),
                (with("Bearer", ""), Err(Denied::TokenWrong)),
                ("Bearer".to_owned(), Err(Denied::TokenWrong)),
                (TOKEN.to_owned(), Err(Denied::TokenWrong)),
            ] {
                let fields = [("authorization", &*field), ("host", "delivery-1:8093")];
                assert_eq!(judged(peer, &fields, &[TOKEN, SECOND]), expected, "{field}");
            }
        }
        let field = ("authorization", "Bearer 0123456789abcdef0123456789abcdef");
        assert_eq!(judged(near, &[field, field], &[TOKEN]), Err(Denied::TokenWrong), "twice");
        assert_eq!(judged(near, &[field], &[]), Err(Denied::TokenWrong), "there is none");
        assert_eq!(judged(SOCKET, &[], &[TOKEN]), Ok(Caller::Socket(Some(7))));
    }

    /// Each request that a browser can be made to send by a page of another origin.
    #[test]
    fn no_web_page_may_act() {
        let token = ("authorization", "Bearer 0123456789abcdef0123456789abcdef");
        for fields in [
            // A form, a script, a sandboxed frame.
            [("origin", "https://evil.example"), ("host", "127.0.0.1:8093")],
            [("origin", "null"), ("host", "localhost:8093")],
            // A page of the node itself, such as `/try`.
            [("origin", "http://127.0.0.1:8093"), ("host", "127.0.0.1:8093")],
            // A link, an image, a frame: no Origin.
            [("sec-fetch-site", "cross-site"), ("host", "127.0.0.1:8093")],
            [("sec-fetch-site", "same-site"), ("host", "127.0.0.1:8093")],
            [("sec-fetch-site", "same-origin"), ("host", "127.0.0.1:8093")],
        ] {
            for peer in [at("127.0.0.1"), at("10.0.0.1"), SOCKET] {
                assert_eq!(judged(peer, &fields, &[]), Err(Denied::WebPage), "{fields:?}");
                let fields = [fields[0], fields[1], token];
                assert_eq!(judged(peer, &fields, &[TOKEN]), Err(Denied::WebPage), "{fields:?}");
            }
        }
        let typed = [("sec-fetch-site", "none"), ("host", "127.0.0.1:8093")];
        assert_eq!(judged(at("127.0.0.1"), &typed, &[]), Ok(Caller::Loopback));
    }

    /// A page of a name that was resolved again to 127.0.0.1 has the same origin as the node, so that browsers send no
    /// Origin with its reads.
    #[test]
    fn host_is_no_name_that_a_web_page_may_have() {
        let near = at("127.0.0.1");
        for host in [
            "127.0.0.1",
            "127.0.0.1:8093",
            "[::1]:8093",
            "[::1]",
            "localhost",
            "LocalHost:1",
            "10.0.0.1:80",
        ] {
            assert_eq!(judged(near, &[("host", host)], &[]), Ok(Caller::Loopback), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8093",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "1",
            "",
        ] {
            assert_eq!(judged(near, &[("host", host)], &[]), Err(Denied::HostNamed), "{host}");
            assert_eq!(judged(SOCKET, &[("host", host)], &[]), Ok(Caller::Socket(Some(7))));
        }
    }

    #[test]
    fn what_a_proxy_has_passed_on_does_not_come_from_this_machine() {
        for field in ["forwarded", "x-forwarded-for", "via"] {
            let fields = [(field, "for=10.0.0.1"), ("host", "127.0.0.1")];
            assert_eq!(judged(at("127.0.0.1"), &fields, &[]), Err(Denied::Proxied), "{field}");
        }
    }

    #[test]
    fn replaced_tokens_are_not_accepted_any_more() {
        let secret = |text: &str| Secret::new(text.to_owned());
        let tokens = AdminTokens::new(&[secret(TOKEN)]);
        assert!(
            tokens.number(TOKEN.as_bytes()) == Some(1)
                && tokens.number(SECOND.as_bytes()).is_none()
        );
        tokens.replace(&[secret(SECOND)]);
        assert!(
            tokens.number(TOKEN.as_bytes()).is_none()
                && tokens.number(SECOND.as_bytes()) == Some(1)
        );
        assert!(!format!("{tokens:?}").contains(SECOND));
    }
}
