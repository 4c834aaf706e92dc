//! What operators do over the admin API: list sessions, close them, revoke tokens, drain. `access` has decided before who
//! may.
//!
//! Parameters are in the query, answers are JSON; `docs/operations.md` has both. An error is one line of text.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::extract::{Extension, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Admin;
use super::access::Caller;
use crate::app::config::SettingValue as _;
use crate::domain::encoding::Encoding;
use crate::domain::limits::ID_BYTES_MAX;
use crate::protocol::upgrade::query::decode;
use crate::service::events::timestamp::{Timestamp, unix_ms, unix_s_of};
use crate::service::sessions::manager::{ListPlace, RevokedTokens, SessionHandle, SessionView};

/// Sessions in one answer.
const SESSIONS_MAX: usize = 1_000;
const SESSIONS_DEFAULT: usize = 100;
/// Longest delay of a drain that can be requested.
const DRAIN_DELAY_MAX: Duration = Duration::from_secs(24 * 3600);
/// Parts per second of a paced close.
const PARTS_PER_S: usize = 10;

/// What the actions need of the node.
pub struct Operated {
    /// Name of the node.
    pub node: Arc<str>,
    /// Its sessions.
    pub sessions: SessionHandle,
    /// Whether clients have tokens (`AUTH_MODE=jwt`).
    pub has_tokens: bool,
}

/// The answer to a request that cannot be carried out: a line that says why.
type Refused = (StatusCode, String);

fn refused(status: StatusCode, why: impl std::fmt::Display) -> Refused {
    (status, format!("{why}\n"))
}

fn bad(why: impl std::fmt::Display) -> Refused {
    refused(StatusCode::BAD_REQUEST, why)
}

fn stopped() -> Refused {
    refused(StatusCode::SERVICE_UNAVAILABLE, "the node has stopped")
}

/// The parameters of a request. Unknown ones are refused, so that nobody closes more than they meant because of a typing
/// error.
struct Parameters {
    known: &'static [&'static str],
    values: Vec<Option<String>>,
}

impl Parameters {
    fn parse(query: Option<&str>, known: &'static [&'static str]) -> Result<Self, Refused> {
        let mut values = vec![None; known.len()];
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        for pair in pairs {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(index) = known.iter().position(|known| *known == name) else {
                return Err(bad(format!(
                    "`{name}` is no parameter here; known: {}",
                    known.join(", ")
                )));
            };
            let value = decode(value, ID_BYTES_MAX)
                .filter(|value| !value.is_empty() && !value.chars().any(char::is_control))
                .ok_or_else(|| {
                    bad(format!("{name} must be percent-encoded text of 1 to {ID_BYTES_MAX} bytes"))
                })?;
            if values[index].replace(value).is_some() {
                return Err(bad(format!("{name} is given twice")));
            }
        }
        Ok(Self { known, values })
    }

    fn get(&self, name: &str) -> Option<&str> {
        let index = self.known.iter().position(|known| *known == name).expect("a known name");
        self.values[index].as_deref()
    }

    /// Reads the parameter if it is given.
    fn read<T>(
        &self,
        name: &str,
        must_be: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, Refused> {
        let Some(text) = self.get(name) else { return Ok(None) };
        read(text).map(Some).ok_or_else(|| bad(format!("{name} must be {must_be}")))
    }
}

fn answer(body: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

/// RFC 3339, as other times in JSON.
fn time(unix_s: u64) -> Value {
    let time = Timestamp::from(UNIX_EPOCH + Duration::from_secs(unix_s));
    serde_json::to_value(time).unwrap_or(Value::Null)
}

fn place(text: &str) -> Option<ListPlace> {
    let (slot, shard) = text.split_once('.')?;
    Some(ListPlace { slot: slot.parse().ok()?, shard: shard.parse().ok()? })
}

fn row(node: &str, session: &SessionView) -> Value {
    let (protocol, encoding) = match session.encoding.uncompressed() {
        Encoding::Stream => ("grpc", "protobuf"),
        Encoding::Json | Encoding::JsonDeflate => ("websocket", "json"),
        Encoding::Binary | Encoding::BinaryDeflate => ("websocket", "protobuf"),
    };
    json!({
        "node": node,
        "user": session.user,
        "device": session.device,
        "address": session.client.to_string(),
        "since": time(session.since_s),
        "protocol": protocol,
        "encoding": encoding,
        "deflate": session.encoding != session.encoding.uncompressed(),
        "state": session.state,
        "cursors": session.has_cursors,
        "token_issued_at": session.token_issued_s.map(time),
        "token_expires_at": session.token_expires_s.map(time),
    })
}

/// `GET /admin/sessions`.
pub(super) async fn sessions(
    State(admin): State<Arc<Admin>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refused> {
    let parameters = Parameters::parse(query.as_deref(), &["user", "limit", "after"])?;
    let limit = parameters.read("limit", &format!("1 to {SESSIONS_MAX}"), |text| {
        text.parse().ok().filter(|limit| (1..=SESSIONS_MAX).contains(limit))
    })?;
    let after = parameters.read("after", "`next` of an earlier answer", place)?;
    let Operated { node, sessions, .. } = &admin.operated;
    let (user, limit) = (parameters.get("user"), limit.unwrap_or(SESSIONS_DEFAULT));
    let list = sessions.list(user, after.unwrap_or_default(), limit).await.ok_or_else(stopped)?;
    let rows: Vec<_> = list.sessions.iter().map(|session| row(node, session)).collect();
    let next = list.next.map(|place| format!("{}.{}", place.slot, place.shard));
    Ok(answer(&json!({ "node": &**node, "sessions": rows, "next": next })))
}

/// `POST /admin/sessions/close`.
pub(super) async fn close(
    State(admin): State<Arc<Admin>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refused> {
    let parameters = Parameters::parse(query.as_deref(), &["user", "device"])?;
    let user =
        parameters.get("user").ok_or_else(|| bad("user is missing: whose sessions to close"))?;
    let device = parameters.get("device");
    let Operated { node, sessions, .. } = &admin.operated;
    let closed = sessions.close(user, device).await.ok_or_else(stopped)?;
    tracing::info!(%caller, user, device, closed, "admin: sessions closed");
    Ok(answer(&json!({ "node": &**node, "closed": closed })))
}

/// `POST /admin/tokens/revoke`.
pub(super) async fn revoke(
    State(admin): State<Arc<Admin>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refused> {
    let parameters =
        Parameters::parse(query.as_deref(), &["user", "everybody", "before", "per_second"])?;
    let user = parameters.get("user").map(str::to_owned);
    let everybody =
        parameters.read("everybody", "`true`", |text| (text == "true").then_some(()))?;
    if user.is_some() == everybody.is_some() {
        return Err(bad("one of user=… and everybody=true must be given: whose tokens to revoke"));
    }
    let per_second = parameters.read("per_second", "10 or more, with everybody=true", |text| {
        text.parse().ok().filter(|number: &usize| *number >= PARTS_PER_S && user.is_none())
    })?;
    let must_be = "a time in seconds since 1970, or like 2026-11-30T12:00:00Z";
    let before = parameters.read("before", must_be, unix_s_of)?;
    let now_s = unix_ms() / 1000;
    let before_s = before.unwrap_or(now_s);
    let revoked = RevokedTokens::new(user.as_deref(), before_s, now_s)
        .map_err(|error| bad(format!("before {error}")))?;
    if !admin.operated.has_tokens {
        let why = "AUTH_MODE=trust: clients have no tokens; close their sessions instead";
        return Err(refused(StatusCode::CONFLICT, why));
    }
    let Operated { node, sessions, .. } = &admin.operated;
    let added = sessions.revoke(revoked).await.ok_or_else(stopped)?;
    added.map_err(|full| refused(StatusCode::INSUFFICIENT_STORAGE, full))?;
    let whose = user.clone().unwrap_or_else(|| "everybody".to_owned());
    tracing::info!(%caller, whose, before_s, "admin: tokens revoked");
    // A task, so that all sessions are closed also if the operator does not wait.
    let sessions = sessions.clone();
    let closing = tokio::spawn(async move {
        let at_a_time = per_second.map(|number| number / PARTS_PER_S);
        let closed = sessions.close_revoked(user.as_deref(), at_a_time).await;
        tracing::info!(%caller, whose, closed, "admin: sessions with a revoked token closed");
        closed
    });
    let mut body = json!({ "node": &**node, "before": time(before_s) });
    body["closed"] = match per_second {
        Some(_) => Value::Null,
        None => json!(closing.await.ok().flatten().ok_or_else(stopped)?),
    };
    Ok(answer(&body))
}

/// `POST /admin/drain`.
pub(super) async fn drain(
    State(admin): State<Arc<Admin>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<(StatusCode, Response), Refused> {
    let parameters = Parameters::parse(query.as_deref(), &["delay"])?;
    let delay = parameters.read("delay", "a time with a unit, up to 24h", |text| {
        Duration::parse(text).ok().filter(|delay| *delay <= DRAIN_DELAY_MAX)
    })?;
    let drain = if admin.drain.begin(delay) {
        tracing::info!(%caller, ?delay, "admin: drain");
        "draining; the process exits when done"
    } else {
        "already draining"
    };
    let node = &admin.operated.node;
    Ok((StatusCode::ACCEPTED, answer(&json!({ "node": &**node, "drain": drain }))))
}

/// `POST /admin/undrain`.
pub(super) async fn undrain(
    State(admin): State<Arc<Admin>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, Refused> {
    admin.drain.cancel().map_err(|why| refused(StatusCode::CONFLICT, why))?;
    tracing::info!(%caller, "admin: drain cancelled");
    let node = &admin.operated.node;
    Ok(answer(&json!({ "node": &**node, "drain": "cancelled; the node is as ready as before" })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_whole_or_refused() {
        const KNOWN: &[&str] = &["user", "device"];
        let parse = |query| Parameters::parse(Some(query), KNOWN);
        let both = parse("device=a%20b&user=%C3%A9+c").unwrap();
        assert_eq!((both.get("user"), both.get("device")), (Some("é c"), Some("a b")));
        assert!(Parameters::parse(None, KNOWN).unwrap().get("user").is_none());
        for (query, why) in [
            ("usr=alice", "`usr` is no parameter here; known: user, device"),
            ("user=alice&user=bob", "user is given twice"),
            ("user=", "user must be"),
            ("user", "user must be"),
            ("user=%0a", "user must be"),
            ("user=%f", "user must be"),
            ("user=%ff", "user must be"),
            (&*format!("user={}", "x".repeat(ID_BYTES_MAX + 1)), "user must be"),
        ] {
            let (status, text) = parse(query).err().unwrap();
            assert!(status == StatusCode::BAD_REQUEST && text.starts_with(why), "{query}: {text}");
        }
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(1_700_000_000), "2023-11-14T22:13:20Z");
    }
}
