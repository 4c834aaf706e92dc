//! Subprotocols that the client offers, and its bearer token.

use crate::domain::command::Secret;
use crate::domain::limits::TOKEN_BYTES_MAX;
use crate::protocol::upgrade::Subprotocol;
use crate::protocol::upgrade::fields::HeaderFields;
use crate::protocol::upgrade::list;
use crate::protocol::upgrade::refused::Refused;

/// Prefix of an entry of `Sec-WebSocket-Protocol` that carries a token.
const TOKEN_PREFIX: &str = "bearer.";

/// Contents of `Sec-WebSocket-Protocol`.
pub(super) struct OfferedProtocols<'a> {
    /// The first supported subprotocol; the list is in the client's order of preference (RFC 6455
    /// §4.1). `None` if none is supported, which is not an error (RFC 6455 §4.2.2): the client gets the
    /// default then.
    pub(super) protocol: Option<Subprotocol>,
    pub(super) token: Option<&'a str>,
}

pub(super) fn subprotocols<'a>(fields: &HeaderFields<'a>) -> Result<OfferedProtocols<'a>, Refused> {
    let mut offered = OfferedProtocols { protocol: None, token: None };
    for value in fields.texts("sec-websocket-protocol")? {
        for element in list::elements(value) {
            // RFC 6455 §4.1: each element is a token.
            if !list::is_token(element) {
                return Err(Refused::bad_request("Sec-WebSocket-Protocol is not a list of tokens"));
            }
            match element.strip_prefix(TOKEN_PREFIX) {
                Some(_) if offered.token.is_some() => return Err(two_tokens()),
                Some(token) => offered.token = Some(token),
                None => offered.protocol = offered.protocol.or(Subprotocol::by_name(element)),
            }
        }
    }
    Ok(offered)
}

/// The token of the request. RFC 6750 §2 allows a single way to send it. The same token in two places
/// is tolerated, because a proxy may add the header.
pub(super) fn token(
    fields: &HeaderFields<'_>,
    query: Option<String>,
    subprotocol: Option<&str>,
) -> Result<Option<Secret>, Refused> {
    let header = match fields.one("authorization")? {
        Some(value) => bearer(value),
        None => None,
    };
    let mut token: Option<String> = None;
    for found in [header.map(str::to_owned), query, subprotocol.map(str::to_owned)] {
        let Some(found) = found else { continue };
        if !is_bearer_token(&found) || found.len() > TOKEN_BYTES_MAX {
            return Err(Refused::bad_request(format!(
                "a bearer token has at most {TOKEN_BYTES_MAX} characters, letters, digits and -._~+/="
            )));
        }
        if token.as_ref().is_some_and(|token| *token != found) {
            return Err(two_tokens());
        }
        token = Some(found);
    }
    Ok(token.map(Secret::new))
}

fn two_tokens() -> Refused {
    Refused::bad_request("two different bearer tokens")
}

/// The token of `Bearer TOKEN`; `None` for any other scheme. RFC 9110 §11.4: scheme names are not
/// case-sensitive.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
    scheme.eq_ignore_ascii_case("Bearer").then(|| token.trim_start_matches(' '))
}

/// `b64token` of RFC 6750 §2.1.
fn is_bearer_token(token: &str) -> bool {
    let body = token.trim_end_matches('=');
    !body.is_empty() && body.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~+/".contains(&b))
}
