//! Opening handshake, server side (RFC 6455 §4.2, RFC 9112): request bytes in, parsed request or HTTP
//! response out.
//!
//! Strict where a proxy in front of this server could parse the same bytes differently; lenient where
//! browsers, libraries and proxies differ within the standards. Order of the checks: bytes, request
//! line, header fields, host and message framing (400), route (404), method (405), body, handshake.
//!
//! ## Places of a token
//!
//! - `Authorization: Bearer TOKEN`
//! - the query parameter `access_token`
//! - an entry `bearer.TOKEN` of `Sec-WebSocket-Protocol`, for browsers: they cannot set headers, and
//!   queries appear in logs. Example: `new WebSocket(url, ["realchat.v1", "bearer." + token])`. The
//!   response never contains this entry, so a browser must also offer a real subprotocol.

pub mod extension;
pub mod list;
pub mod origin;
pub mod query;
pub mod refused;

mod credentials;
mod fields;
mod head;
mod target;

use base64::Engine as _;
use sha1::{Digest as _, Sha1};

use crate::domain::command::Secret;
use crate::domain::encoding::Encoding;
use crate::protocol::upgrade::extension::DeflateParams;
use crate::protocol::upgrade::fields::HeaderFields;
use crate::protocol::upgrade::head::{HeadScan, RequestHead};
use crate::protocol::upgrade::origin::Origins;
use crate::protocol::upgrade::query::SessionQuery;
use crate::protocol::upgrade::target::RequestTarget;

pub use crate::protocol::upgrade::head::HeadProgress;
pub use crate::protocol::upgrade::refused::{Refused, response_refused};
pub use crate::protocol::upgrade::target::is_authority;

/// Settings of the handshake.
#[derive(Clone, Debug)]
pub struct UpgradeRules {
    /// `/echo` is a route. Default: no.
    pub echo: bool,
    /// permessage-deflate may be negotiated. Default: yes.
    pub deflate: bool,
    /// Allowed origins of browsers. Default: any.
    pub origins: Origins,
    /// Longest request line and header fields together, bytes. Default: 16 KiB, room for a long token
    /// and cookies.
    pub head_bytes_max: usize,
    /// Maximum number of header fields, up to [`FIELDS_MAX`]. Default: 64.
    pub fields_max: usize,
}

/// Upper limit of [`UpgradeRules::fields_max`].
pub const FIELDS_MAX: usize = 128;

impl Default for UpgradeRules {
    fn default() -> Self {
        Self {
            echo: false,
            deflate: true,
            origins: Origins::Any,
            head_bytes_max: 16 * 1024,
            fields_max: 64,
        }
    }
}

/// Result of [`parse`].
#[derive(Debug)]
pub enum Upgrade {
    /// The input is valid but incomplete. Call again with more input, from the first byte.
    NeedMore,
    /// A valid request and its length in bytes. The bytes after it are frames.
    Complete(Box<UpgradeRequest>, usize),
}

/// Service that the client requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// `/ws`: a session.
    Session,
    /// `/echo`: the server returns every message.
    Echo,
}

/// Message format of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subprotocol {
    /// `realchat.v1`: binary messages, one serialized `EventEnvelope` each.
    Binary,
    /// `realchat.v1.json`: text messages, one JSON object each.
    Json,
}

impl Subprotocol {
    /// The name in `Sec-WebSocket-Protocol`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Binary => "realchat.v1",
            Self::Json => "realchat.v1.json",
        }
    }

    /// Names are case-sensitive (RFC 6455 §1.9).
    fn by_name(name: &str) -> Option<Self> {
        [Self::Binary, Self::Json].into_iter().find(|protocol| protocol.name() == name)
    }
}

/// A valid upgrade request, which may be answered with 101.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpgradeRequest {
    /// The requested service.
    pub route: Route,
    /// Decoded; empty if the token names the user, and for [`Route::Echo`].
    pub user_id: String,
    /// Decoded; never empty for [`Route::Session`], always for [`Route::Echo`].
    pub device_id: String,
    /// The bearer token, not verified.
    pub token: Option<Secret>,
    /// `Sec-WebSocket-Accept` of the response (RFC 6455 §4.2.2).
    pub accept_key: [u8; ACCEPT_BYTES],
    /// Message format.
    pub protocol: Subprotocol,
    /// The client offered `protocol`, so the response contains it.
    pub protocol_offered: bool,
    /// Parameters of permessage-deflate, if negotiated.
    pub deflate: Option<DeflateParams>,
}

impl UpgradeRequest {
    /// Encoding of the session's events. Events are compressed once, with the largest window. A client
    /// that accepts only a smaller window gets them uncompressed, as RFC 7692 §6 allows.
    pub fn encoding(&self) -> Encoding {
        let compressed = self.deflate.is_some_and(DeflateParams::takes_any_window);
        match (self.protocol, compressed) {
            (Subprotocol::Binary, false) => Encoding::Binary,
            (Subprotocol::Binary, true) => Encoding::BinaryDeflate,
            (Subprotocol::Json, false) => Encoding::Json,
            (Subprotocol::Json, true) => Encoding::JsonDeflate,
        }
    }
}

/// Length of a SHA-1 hash in Base64.
const ACCEPT_BYTES: usize = 28;
/// Length of a key in Base64.
const KEY_CHARS: usize = 24;
/// Length of a key (RFC 6455 §4.2.1).
const KEY_BYTES: usize = 16;
/// Appended to the key before hashing (RFC 6455 §1.3).
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Parses an upgrade request from the first bytes of a connection. A prefix of a request is
/// [`Upgrade::NeedMore`] or refused with the same status as the complete request.
///
/// # Errors
///
/// [`Refused`]: the response to send before closing.
pub fn parse(input: &[u8], rules: &UpgradeRules) -> Result<Upgrade, Refused> {
    parse_on(input, rules, &mut HeadProgress::default())
}

/// [`parse`] of a request that arrives in pieces: `input` begins with that of the earlier calls with this `progress`,
/// and only what is new is checked. The outcome is that of [`parse`].
///
/// # Errors
///
/// As [`parse`].
pub fn parse_on(
    input: &[u8],
    rules: &UpgradeRules,
    progress: &mut HeadProgress,
) -> Result<Upgrade, Refused> {
    let (head, consumed) = match head::scan(input, rules.head_bytes_max, progress)? {
        HeadScan::NeedMore => return Ok(Upgrade::NeedMore),
        HeadScan::Complete { head, consumed } => (head, consumed),
    };
    let request = check_head(&head, rules)
        .map_err(|refused| refused.answering_head(head.method == "HEAD"))?;
    Ok(Upgrade::Complete(Box::new(request), consumed))
}

fn check_head(head: &RequestHead<'_>, rules: &UpgradeRules) -> Result<UpgradeRequest, Refused> {
    let mut storage = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let fields =
        HeaderFields::parse(head.fields, &mut storage[..rules.fields_max.min(FIELDS_MAX)])?;
    let target = RequestTarget::parse(head.target)?;
    check_host(&fields, head.minor_version)?;
    let has_body = fields.has_body(head.minor_version)?;
    let route = match target.path {
        "/ws" => Route::Session,
        "/echo" if rules.echo => Route::Echo,
        _ => {
            return Err(Refused::new(
                404,
                "nothing here: WebSocket clients connect to /ws?user_id=USER&device_id=DEVICE",
            ));
        }
    };
    // RFC 6455 §4.2.1: the request MUST be a GET.
    if head.method != "GET" {
        return Err(Refused::new(405, "only GET, with a WebSocket upgrade"));
    }
    if has_body {
        return Err(Refused::bad_request("an upgrade request has no body"));
    }
    // RFC 9110 §10.1.1: the response to an unsupported expectation is 417.
    if fields.all("expect").next().is_some() {
        return Err(Refused::new(417, "an upgrade request has nothing to expect"));
    }
    check_upgrade(&fields, head.minor_version)?;
    let accept_key = accept_key(&fields)?;
    check_origin(&fields, &rules.origins)?;
    complete(route, &target, &fields, accept_key, rules)
}

fn complete(
    route: Route,
    target: &RequestTarget<'_>,
    fields: &HeaderFields<'_>,
    accept_key: [u8; ACCEPT_BYTES],
    rules: &UpgradeRules,
) -> Result<UpgradeRequest, Refused> {
    let offered = credentials::subprotocols(fields)?;
    let query = match route {
        Route::Session => SessionQuery::parse(target.query)?,
        Route::Echo => SessionQuery::default(),
    };
    let token = match route {
        Route::Session => credentials::token(fields, query.access_token, offered.token)?,
        Route::Echo => None,
    };
    // Contract §3. Without a user id the token may name the user; the service checks that.
    let user_missing = query.user_id.is_empty() && token.is_none();
    if route == Route::Session && (user_missing || query.device_id.is_empty()) {
        return Err(Refused::bad_request("missing user_id or device_id"));
    }
    // RFC 6455 §9.1: a header that violates the grammar MUST fail the connection.
    let deflate = extension::negotiate(fields.texts("sec-websocket-extensions")?)
        .map_err(|_| Refused::bad_request("Sec-WebSocket-Extensions is not an extension list"))?;
    Ok(UpgradeRequest {
        route,
        user_id: query.user_id,
        device_id: query.device_id,
        token,
        accept_key,
        protocol: offered.protocol.unwrap_or(Subprotocol::Binary),
        protocol_offered: offered.protocol.is_some(),
        deflate: deflate.filter(|_| rules.deflate),
    })
}

/// RFC 9112 §3.2: a request without `Host`, with two of them or with an invalid one MUST be
/// answered with 400. `Host` is optional in HTTP/1.0.
fn check_host(fields: &HeaderFields<'_>, minor_version: u8) -> Result<(), Refused> {
    match fields.one("host")? {
        Some(host) if target::is_authority(host) => Ok(()),
        None if minor_version == 0 => Ok(()),
        _ => Err(Refused::bad_request(
            "Host must be given once, as a name or an address, with or without a port",
        )),
    }
}

/// RFC 6455 §4.2.1, items 3, 4 and 6.
fn check_upgrade(fields: &HeaderFields<'_>, minor_version: u8) -> Result<(), Refused> {
    // RFC 9110 §7.8: `Upgrade` in an HTTP/1.0 request MUST be ignored.
    if minor_version == 0 {
        return Err(Refused::new(426, "a WebSocket upgrade needs HTTP/1.1 (is a proxy between?)"));
    }
    if !fields.lists("upgrade", "websocket")? {
        return Err(Refused::new(
            426,
            "this is a WebSocket endpoint: connect with a WebSocket client",
        ));
    }
    if !fields.lists("connection", "upgrade")? {
        return Err(Refused::bad_request("Connection must list Upgrade (does a proxy drop it?)"));
    }
    // RFC 6455 §4.4: the response to another version contains the supported one.
    match fields.one("sec-websocket-version")? {
        Some("13") => Ok(()),
        _ => Err(Refused::new(426, "Sec-WebSocket-Version must be 13")),
    }
}

/// RFC 6455 §4.2.1, item 5: the key decodes to 16 bytes. §4.2.2, item 5.4: the accept key.
fn accept_key(fields: &HeaderFields<'_>) -> Result<[u8; ACCEPT_BYTES], Refused> {
    let key = fields.one("sec-websocket-key")?.unwrap_or_default();
    // Bits after the last byte are ignored: the example of the RFC (§4.1) sets some.
    let lenient = base64::engine::GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        base64::engine::GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
    );
    let mut decoded = [0; KEY_CHARS];
    if key.len() != KEY_CHARS || lenient.decode_slice(key, &mut decoded) != Ok(KEY_BYTES) {
        return Err(Refused::bad_request("Sec-WebSocket-Key must be 16 bytes in Base64, once"));
    }
    let hash = Sha1::new().chain_update(key).chain_update(KEY_SUFFIX).finalize();
    let mut accept = [0; ACCEPT_BYTES];
    let written = base64::engine::general_purpose::STANDARD.encode_slice(hash, &mut accept);
    assert_eq!(written, Ok(ACCEPT_BYTES));
    Ok(accept)
}

fn check_origin(fields: &HeaderFields<'_>, origins: &Origins) -> Result<(), Refused> {
    // RFC 6455 §10.2: a server that accepts only some origins SHOULD check them and answer 403. Only
    // browsers send an origin, and only their users need the protection.
    match fields.one("origin")? {
        Some(origin) if !origins.allow(origin) => {
            Err(Refused::new(403, "pages of this origin may not connect here (setting `origins`)"))
        }
        _ => Ok(()),
    }
}

/// The 101 response (RFC 6455 §4.2.2).
pub fn response_101(request: &UpgradeRequest) -> Vec<u8> {
    let mut answer = Vec::with_capacity(RESPONSE_BYTES_USUAL);
    answer.extend_from_slice(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Accept: ",
    );
    answer.extend_from_slice(&request.accept_key);
    if request.protocol_offered {
        answer.extend_from_slice(b"\r\nSec-WebSocket-Protocol: ");
        answer.extend_from_slice(request.protocol.name().as_bytes());
    }
    if let Some(deflate) = request.deflate {
        answer.extend_from_slice(b"\r\nSec-WebSocket-Extensions: ");
        answer.extend_from_slice(deflate.answer().as_bytes());
    }
    answer.extend_from_slice(b"\r\n\r\n");
    answer
}

/// Capacity for most responses with all their fields, bytes.
const RESPONSE_BYTES_USUAL: usize = 320;
