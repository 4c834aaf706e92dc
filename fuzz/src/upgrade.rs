//! The upgrade parser: a prefix needs more input or gets the response of the complete request; bytes
//! after the request change nothing; parsed values are within their limits; responses are valid HTTP;
//! and if tungstenite accepts the request too, it computes the same accept key.

use delivery::domain::limits::{ID_BYTES_MAX, TOKEN_BYTES_MAX};
use delivery::protocol::upgrade::origin::Origins;
use delivery::protocol::upgrade::{
    Route, Upgrade, UpgradeRequest, UpgradeRules, parse, response_101, response_refused,
};

use super::input::FuzzInput;

/// Result of the parser.
#[derive(Debug, PartialEq, Eq)]
enum ParseOutcome {
    NeedMore,
    Accepted(Box<UpgradeRequest>, usize),
    Refused(u16, Vec<u8>),
}

/// First byte: the rules. Rest: the bytes of a request, or edits of a valid one.
pub fn check(data: &[u8]) {
    let mut input = FuzzInput(data);
    let shape = input.byte();
    let rules = UpgradeRules {
        echo: shape & 1 != 0,
        deflate: shape & 2 == 0,
        origins: match shape & 4 {
            0 => Origins::Any,
            _ => Origins::parse(["https://a.example", "https://*.b.example"]).expect("origins"),
        },
        head_bytes_max: if shape & 8 == 0 { 16 * 1024 } else { 300 },
        fields_max: if shape & 16 == 0 { 64 } else { 8 },
    };
    let request = if shape & 32 == 0 { input.0.to_vec() } else { edited(&mut input) };
    check_request(&request, &rules);
}

fn check_request(request: &[u8], rules: &UpgradeRules) {
    let complete = outcome(request, rules);
    for cut in cuts(request) {
        match (outcome(&request[..cut], rules), &complete) {
            (ParseOutcome::NeedMore, _) => {}
            (ParseOutcome::Accepted(early, used), ParseOutcome::Accepted(request, all)) => {
                assert!(early == *request && used == *all && used <= cut);
            }
            (ParseOutcome::Refused(early, _), ParseOutcome::Refused(status, _)) => {
                assert_eq!(early, *status)
            }
            (early, complete) => panic!("prefix of {cut}: {early:?}, complete: {complete:?}"),
        }
    }
    match complete {
        ParseOutcome::NeedMore => {}
        ParseOutcome::Accepted(accepted, consumed) => {
            assert!(request[..consumed].ends_with(b"\r\n\r\n"));
            check_accepted(&accepted, rules);
            let followed = [request, b"\x81\x80\0\0\0\0"].concat();
            assert_eq!(
                outcome(&followed, rules),
                ParseOutcome::Accepted(accepted.clone(), consumed)
            );
            check_oracle(&request[..consumed], &accepted);
        }
        ParseOutcome::Refused(status, response) => {
            assert!((400..600).contains(&status));
            check_response(&response, status);
        }
    }
}

fn outcome(bytes: &[u8], rules: &UpgradeRules) -> ParseOutcome {
    match parse(bytes, rules) {
        Ok(Upgrade::NeedMore) => ParseOutcome::NeedMore,
        Ok(Upgrade::Complete(request, consumed)) => ParseOutcome::Accepted(request, consumed),
        Err(refused) => ParseOutcome::Refused(refused.status(), response_refused(&refused)),
    }
}

/// Lengths of a few prefixes, which depend on the request. `tests/upgrade.rs` tests every prefix of its
/// requests.
fn cuts(request: &[u8]) -> impl Iterator<Item = usize> {
    let len = request.len();
    let hash = request
        .iter()
        .fold(7usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(usize::from(*byte)));
    [hash, hash >> 7, hash >> 15, usize::MAX].into_iter().map(move |at| match at {
        usize::MAX => len.saturating_sub(1),
        at => at % (len + 1),
    })
}

fn check_accepted(request: &UpgradeRequest, rules: &UpgradeRules) {
    for id in [&request.user_id, &request.device_id] {
        assert!(id.len() <= ID_BYTES_MAX && !id.chars().any(char::is_control));
    }
    match request.route {
        Route::Session => {
            assert!(!request.device_id.is_empty());
            assert!(!request.user_id.is_empty() || request.token.is_some());
        }
        Route::Echo => assert!(rules.echo && request.token.is_none()),
    }
    if let Some(token) = &request.token {
        assert!(!token.expose().is_empty() && token.expose().len() <= TOKEN_BYTES_MAX);
        assert!(token.expose().is_ascii());
    }
    assert!(rules.deflate || request.deflate.is_none());
    let response = response_101(request);
    check_response(&response, 101);
    // Only the server's own fields: nothing in the request can add a line.
    let lines = response.windows(2).filter(|pair| pair == b"\r\n").count();
    let optional = usize::from(request.protocol_offered) + usize::from(request.deflate.is_some());
    assert_eq!(lines, 5 + optional);
}

/// Checks that an HTTP client can parse the response and that its body has the announced length.
fn check_response(response: &[u8], status: u16) {
    let mut storage = [httparse::EMPTY_HEADER; 16];
    let mut parsed = httparse::Response::new(&mut storage);
    let head = parsed.parse(response).expect("valid HTTP");
    let httparse::Status::Complete(head) = head else { panic!("an incomplete head") };
    assert_eq!(parsed.code, Some(status));
    let body = &response[head..];
    assert!(std::str::from_utf8(body).is_ok_and(|body| !body.chars().any(char::is_control)));
    let announced = parsed.headers.iter().find(|h| h.name == "Content-Length");
    match announced {
        Some(length) => {
            let length: usize = std::str::from_utf8(length.value)
                .ok()
                .and_then(|digits| digits.parse().ok())
                .expect("a number");
            assert!(body.len() == length || body.is_empty());
        }
        None => assert!(status == 101 && body.is_empty()),
    }
}

/// Compares with tungstenite's handshake, if both accept the request. tungstenite does not support
/// lists in `Upgrade` and versions above HTTP/1.1, and accepts requests that Delivery refuses.
fn check_oracle(request: &[u8], ours: &UpgradeRequest) {
    use tungstenite::handshake::machine::TryParse;
    use tungstenite::handshake::server::{Request, create_response};
    let Ok(Some((_, request))) = Request::try_parse(request) else { return };
    let Ok(response) = create_response(&request) else { return };
    let accept = response.headers().get("Sec-WebSocket-Accept").expect("an accept key");
    assert_eq!(accept.as_bytes(), ours.accept_key);
}

/// A valid request with lines removed, inserted or changed.
fn edited(input: &mut FuzzInput<'_>) -> Vec<u8> {
    const LINES: [&str; 24] = [
        "GET /ws?user_id=alice&device_id=phone HTTP/1.1",
        "Host: localhost:8083",
        "Upgrade: websocket",
        "Connection: keep-alive, Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        // The lines above are a valid request; the lines below may be inserted.
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=\"9\", permessage-deflate",
        "Sec-WebSocket-Protocol: realchat.v1.json, bearer.a.b.c",
        "Sec-WebSocket-Protocol: realchat.v1",
        "Authorization: Bearer a.b.c",
        "Origin: https://x.b.example",
        "Origin: null",
        "Content-Length: 0",
        "Content-Length: 1",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "Upgrade: h2c",
        "Connection: close",
        "Host: [::1]:80",
        "GET /echo HTTP/1.1",
        "HEAD /ws HTTP/1.1",
        "GET http://h/ws?device_id=%41&access_token=a&user_id=%C3%A9+b HTTP/1.2",
        "X-Forwarded-For: 1.2.3.4",
    ];
    let mut lines: Vec<Vec<u8>> = LINES[..6].iter().map(|line| line.as_bytes().to_vec()).collect();
    while !input.is_empty() {
        let at = usize::from(input.byte()) % (lines.len() + 1);
        let edit = input.byte();
        let text = LINES[usize::from(input.byte()) % LINES.len()].as_bytes().to_vec();
        match edit % 6 {
            0 if at < lines.len() => drop(lines.remove(at)),
            1 if at < lines.len() => lines[at] = text,
            2 if at < lines.len() => {
                let line = &mut lines[at];
                let place = usize::from(input.byte()) % (line.len() + 1);
                let length = usize::from(input.byte() & 15);
                let with = input.bytes(length).to_vec();
                let end = (place + usize::from(edit / 6)).min(line.len());
                line.splice(place..end, with);
            }
            3 if at < lines.len() => {
                let length = usize::from(input.byte());
                lines[at].extend_from_slice(input.bytes(length));
            }
            4 => {
                let length = usize::from(input.byte());
                lines.insert(at, input.bytes(length).to_vec());
            }
            _ => lines.insert(at, text),
        }
        if lines.len() > 100 {
            break;
        }
    }
    let mut request = lines.join(&b"\r\n"[..]);
    request.extend_from_slice(b"\r\n\r\n");
    request
}
