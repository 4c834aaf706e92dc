//! The upgrade parser on every request of the table: complete, truncated at every byte, and followed by
//! a frame.

#[path = "data/upgrade_cases.rs"]
mod upgrade_cases;

use std::collections::HashSet;

use delivery::domain::encoding::Encoding;
use delivery::protocol::upgrade::origin::Origins;
use delivery::protocol::upgrade::{
    Refused, Route, Subprotocol, Upgrade, UpgradeRequest, UpgradeRules, parse, response_101,
    response_refused,
};
use upgrade_cases::{Case, cases};

fn rules() -> UpgradeRules {
    UpgradeRules { echo: true, ..UpgradeRules::default() }
}

/// Status and text of the response, and bytes consumed; `None` if the parser needs more input.
fn respond(input: &[u8], rules: &UpgradeRules) -> Option<(u16, String, usize)> {
    let (status, bytes, consumed) = match parse(input, rules) {
        Ok(Upgrade::NeedMore) => return None,
        Ok(Upgrade::Complete(request, consumed)) => (101, response_101(&request), consumed),
        Err(refused) => (refused.status(), response_refused(&refused), 0),
    };
    let text = String::from_utf8(bytes).expect("a response is text");
    assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
    Some((status, text, consumed))
}

#[test]
fn table_is_large_and_names_are_unique() {
    let cases = cases();
    assert!(cases.len() >= 150, "{}", cases.len());
    let names: HashSet<_> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len());
}

#[test]
fn each_request_has_its_response() {
    let mut wrong = Vec::new();
    for Case { name, request, status, contains } in cases() {
        let got = respond(&request, &rules());
        if !got.as_ref().is_some_and(|(s, text, _)| *s == status && text.contains(contains)) {
            wrong.push(format!("{name}: expected {status} {contains:?}, got {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn prefix_needs_more_or_is_refused_like_the_whole() {
    for Case { name, request, status, .. } in cases() {
        let step = if request.len() > 1000 { 97 } else { 1 };
        for cut in (0..request.len()).step_by(step) {
            if let Some((early, ..)) = respond(&request[..cut], &rules()) {
                assert_eq!(early, status, "{name}, cut at {cut}");
                assert_ne!(early, 101, "{name}, cut at {cut}");
            }
        }
    }
}

#[test]
fn frames_after_the_request_are_not_consumed() {
    for Case { name, request, status, .. } in cases() {
        let behind = [&request[..], b"\x81\x80\x00\x00\x00\x00"].concat();
        let (got, _, consumed) = respond(&behind, &rules()).expect(name);
        assert_eq!(got, status, "{name}");
        if status == 101 {
            assert_eq!(consumed, request.len(), "{name}");
        }
    }
}

#[test]
fn no_response_contains_the_token() {
    for Case { name, request, .. } in cases() {
        let (_, text, _) = respond(&request, &rules()).expect(name);
        assert!(!text.contains("bearer.") && !text.contains("eyJ"), "{name}: {text}");
    }
}

fn request(path: &str, fields: &str) -> String {
    format!(
        "GET {path}?user_id=u&device_id=d HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Version: 13\r\n{fields}\r\n"
    )
}

fn accepted(fields: &str) -> UpgradeRequest {
    match parse(request("/ws", fields).as_bytes(), &rules()) {
        Ok(Upgrade::Complete(request, _)) => *request,
        other => panic!("{other:?}"),
    }
}

#[test]
fn parsed_request_contains_what_the_client_sent() {
    let plain = accepted("");
    assert_eq!((plain.user_id.as_str(), plain.device_id.as_str()), ("u", "d"));
    assert_eq!((plain.route, plain.token.clone()), (Route::Session, None));
    assert_eq!((plain.protocol, plain.protocol_offered), (Subprotocol::Binary, false));
    assert_eq!(plain.encoding(), Encoding::Binary);

    let browser = accepted(
        "Sec-WebSocket-Protocol: realchat.v1.json, bearer.a.b.c\r\n\
         Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n",
    );
    assert_eq!(browser.token.as_ref().map(|token| token.expose()), Some("a.b.c"));
    assert_eq!(browser.encoding(), Encoding::JsonDeflate);

    let small =
        accepted("Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=14\r\n");
    assert_eq!(small.deflate.map(|deflate| deflate.server_window_bits), Some(14));
    assert_eq!(small.encoding(), Encoding::Binary, "shared events need the largest window");
}

#[test]
fn rules_are_applied() {
    let strict = UpgradeRules {
        echo: false,
        deflate: false,
        origins: Origins::parse(["https://app.example.com"]).expect("a valid origin"),
        head_bytes_max: 400,
        fields_max: 7,
    };
    let status = |text: String| respond(text.as_bytes(), &strict).map(|(status, ..)| status);
    assert_eq!(
        status(request("/ws", "")),
        Some(101),
        "a request without an origin is not from a browser"
    );
    assert_eq!(status(request("/ws", "Origin: https://app.example.com\r\n")), Some(101));
    assert_eq!(status(request("/ws", "Origin: https://evil.example\r\n")), Some(403));
    assert_eq!(status(request("/ws", "Origin: null\r\n")), Some(403));
    assert_eq!(status(request("/echo", "")), Some(404));
    assert_eq!(status(request("/ws", "A: b\r\nC: d\r\n")), Some(101));
    assert_eq!(status(request("/ws", "A: b\r\nC: d\r\nE: f\r\n")), Some(431));
    assert_eq!(status(request("/ws", &format!("A: {}\r\n", "b".repeat(400)))), Some(431));
    let offer = request("/ws", "Sec-WebSocket-Extensions: permessage-deflate\r\n");
    let (_, text, _) = respond(offer.as_bytes(), &strict).expect("complete");
    assert!(!text.contains("permessage-deflate"), "{text}");
}

#[test]
fn refusal_of_the_service_becomes_a_response() {
    let refusal = delivery::domain::command::Refusal {
        status: 401,
        body: "the token has expired".into(),
        retry_after_s: None,
    };
    let text = String::from_utf8(response_refused(&Refused::from(refusal))).expect("text");
    assert!(text.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{text}");
    assert!(text.ends_with("\r\n\r\nthe token has expired"), "{text}");
}
