//! HTTP responses that refuse an upgrade. The body is one line: what is wrong and what to do.

use std::borrow::Cow;

use http::StatusCode;

use crate::domain::command::Refusal;

/// A refused upgrade request. The server closes the connection after the response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    refusal: Refusal,
    /// The method is HEAD: the response announces the body but does not send it (RFC 9110 §9.3.2).
    head: bool,
}

impl Refused {
    /// `status` (400 to 599) with a one-line body.
    pub fn new(status: u16, body: impl Into<Cow<'static, str>>) -> Self {
        Refusal { status, body: body.into(), retry_after_s: None }.into()
    }

    /// 400.
    pub fn bad_request(body: impl Into<Cow<'static, str>>) -> Self {
        Self::new(400, body)
    }

    /// 408: the request was incomplete at its deadline.
    pub fn timeout() -> Self {
        Self::new(408, "the request took too long")
    }

    /// 429: a limit of this address or user is reached.
    pub fn too_many(body: impl Into<Cow<'static, str>>, retry_after_s: u32) -> Self {
        Refusal { status: 429, body: body.into(), retry_after_s: Some(retry_after_s) }.into()
    }

    /// 503: a limit of the node is reached, or the node is not ready.
    pub fn unavailable(body: impl Into<Cow<'static, str>>, retry_after_s: u32) -> Self {
        Refusal { status: 503, body: body.into(), retry_after_s: Some(retry_after_s) }.into()
    }

    pub(super) fn answering_head(self, head: bool) -> Self {
        Self { head, ..self }
    }

    /// HTTP status.
    pub fn status(&self) -> u16 {
        self.refusal.status
    }

    /// The body.
    pub fn body(&self) -> &str {
        &self.refusal.body
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, head: false }
    }
}

/// The complete response.
pub fn response_refused(refused: &Refused) -> Vec<u8> {
    let Refused { refusal: Refusal { status, body, retry_after_s }, head } = refused;
    let reason = StatusCode::from_u16(*status).ok().and_then(|known| known.canonical_reason());
    let reason = reason.unwrap_or_default();
    let mut answer = format!("HTTP/1.1 {status} {reason}\r\nConnection: close");
    match status {
        // RFC 9110 §15.5.22, §7.8: a 426 MUST contain `Upgrade`, listed in `Connection`. RFC 6455
        // §4.4: it also contains the version.
        426 => answer.push_str(", Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"),
        // RFC 9110 §15.5.6: a 405 MUST list the allowed methods.
        405 => answer.push_str("\r\nAllow: GET"),
        // RFC 9110 §15.5.2: a 401 MUST contain a challenge.
        401 => answer.push_str("\r\nWWW-Authenticate: Bearer"),
        _ => {}
    }
    if let Some(seconds) = retry_after_s {
        answer.push_str(&format!("\r\nRetry-After: {seconds}"));
    }
    answer.push_str(&format!(
        "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\r\n",
        body.len()
    ));
    if !head {
        answer.push_str(body);
    }
    answer.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(refused: &Refused) -> String {
        String::from_utf8(response_refused(refused)).expect("ASCII")
    }

    #[test]
    fn golden_responses() {
        assert_eq!(
            text(&Refused::bad_request("missing user_id or device_id")),
            "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\
             Content-Type: text/plain; charset=utf-8\r\nContent-Length: 28\r\n\
             Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\r\n\
             missing user_id or device_id"
        );
        let busy = Refusal { status: 503, body: "busy".into(), retry_after_s: Some(7) };
        assert!(text(&Refused::from(busy)).contains("\r\nRetry-After: 7\r\n"));
        let upgrade = text(&Refused::new(426, "x"));
        assert!(upgrade.contains(
            "\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        ));
        assert!(text(&Refused::new(405, "x")).contains("\r\nAllow: GET\r\n"));
        assert!(text(&Refused::new(401, "x")).contains("\r\nWWW-Authenticate: Bearer\r\n"));
    }

    #[test]
    fn response_to_head_has_no_body() {
        let answer = text(&Refused::new(405, "body").answering_head(true));
        assert!(answer.contains("\r\nContent-Length: 4\r\n"));
        assert!(answer.ends_with("\r\n\r\n"));
    }
}
