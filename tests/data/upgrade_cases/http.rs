//! Cases of plain HTTP: request lines, targets, bytes, hosts, bodies, limits.

use super::Table;
use super::request::{ACCEPT, UPGRADE, good, instead, line, query, target, with, without};

pub(super) fn cases(t: &mut Table) {
    request_lines(t);
    targets(t);
    bytes_and_lines(t);
    hosts(t);
    bodies(t);
    limits(t);
}

fn request_lines(t: &mut Table) {
    let ws = "/ws?user_id=alice&device_id=phone";
    let method = |method: &str| line(format!("{method} {ws} HTTP/1.1"));
    let version = |version: &str| line(format!("GET {ws} {version}"));
    t.accepts("good", good());
    t.accepts("HTTP/1.2 is higher than 1.1", version("HTTP/1.2"));
    t.is(426, UPGRADE, "HTTP/1.0 cannot upgrade", version("HTTP/1.0"));
    t.is(505, "HTTP/1.1 only", "HTTP/2.0 by name", version("HTTP/2.0"));
    t.is(505, "HTTP/1.1 only", "HTTP/0.9 by name", version("HTTP/0.9"));
    t.raw(505, "HTTP/1.1 only", "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    t.is(400, "request line", "no version", line(format!("GET {ws}")));
    t.is(400, "request line", "lower-case version", version("http/1.1"));
    t.is(400, "request line", "version without minor", version("HTTP/1"));
    t.is(400, "request line", "two-digit minor version", version("HTTP/1.10"));
    t.is(400, "request line", "another protocol's name", version("RTSP/1.0"));
    t.is(400, "request line", "two spaces after the method", method("GET "));
    t.is(400, "request line", "two spaces before the version", version(" HTTP/1.1"));
    t.is(400, "request line", "space after the version", version("HTTP/1.1 "));
    t.is(400, "request line", "space before the method", method(" GET"));
    t.is(400, "request line", "tab for a space", line(format!("GET\t{ws} HTTP/1.1")));
    t.is(400, "request line", "space in the target", target("/ws?user_id=a b&device_id=d"));
    t.is(400, "request line", "method with parenthesis", method("G(T"));
    t.is(400, "request line", "empty method", method(""));
    t.is(400, "request line", "method too long", method(&"A".repeat(33)));
    t.is(405, "\r\nAllow: GET\r\n", "POST", method("POST"));
    t.is(405, "\r\nAllow: GET\r\n", "PUT", method("PUT"));
    t.is(405, "\r\nAllow: GET\r\n", "OPTIONS", method("OPTIONS"));
    t.is(405, "\r\nAllow: GET\r\n", "HEAD has no body", method("HEAD"));
    t.is(405, "\r\nAllow: GET\r\n", "lower-case get is another", method("get"));
    t.is(405, "\r\nAllow: GET\r\n", "a made-up method", method("BREW"));
    t.is(404, "nothing here", "OPTIONS of the server", line("OPTIONS * HTTP/1.1"));
    t.is(404, "nothing here", "CONNECT", line("CONNECT localhost:8083 HTTP/1.1"));
    let tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    t.raw(400, "control character", "TLS", tls);
    t.raw(400, "control character", "SSH", b"SSH-2.0-OpenSSH_9.6\n");
    t.raw(400, "request line", "words", b"hello there\r\n\r\n");
    t.raw(400, "request line", "only empty lines", b"\r\n\r\n\r\n\r\n");
}

fn targets(t: &mut Table) {
    let ids = "user_id=alice&device_id=phone";
    t.is(404, "/ws?user_id=USER&device_id=DEVICE", "root", target("/"));
    t.is(404, "nothing here", "another path", target("/socket"));
    t.is(404, "nothing here", "path in upper case", target(format!("/WS?{ids}")));
    t.is(404, "nothing here", "slash at the end", target(format!("/ws/?{ids}")));
    t.is(404, "nothing here", "two slashes", target(format!("//ws?{ids}")));
    t.is(404, "nothing here", "dot segments", target(format!("/a/../ws?{ids}")));
    t.is(404, "nothing here", "percent-encoded path", target(format!("/%77s?{ids}")));
    t.is(404, "nothing here", "path parameter", target(format!("/ws;v=1?{ids}")));
    t.is(404, "nothing here", "relative path", target(format!("ws?{ids}")));
    t.is(404, "nothing here", "the admin port's page", target("/metrics"));
    t.is(400, "fragment", "fragment", target(format!("/ws?{ids}#top")));
    t.accepts("absolute form", target(format!("http://localhost:8083/ws?{ids}")));
    t.accepts("absolute form of ws", target(format!("WS://localhost/ws?{ids}")));
    t.is(404, "nothing here", "absolute form without path", target("http://localhost"));
    t.is(404, "nothing here", "absolute form of ftp", target(format!("ftp://localhost/ws?{ids}")));
    t.is(400, "authority", "absolute form without host", target(format!("http:///ws?{ids}")));
    t.is(400, "authority", "absolute form with user", target(format!("http://a@h/ws?{ids}")));
    t.accepts("echo", target("/echo"));
    t.accepts("echo with any query", target("/echo?user_id=%zz"));
    t.is(400, "request line", "raw UTF-8 in the target", target("/ws?user_id=jürgen&device_id=d"));
    t.accepts("what browsers leave unencoded", query(format!("{ids}&x={{|}}^`\\[]'")));
}

fn bytes_and_lines(t: &mut Table) {
    let good_text = String::from_utf8(good().bytes()).expect("ASCII");
    let text = |from: &str, to: &str| good_text.replacen(from, to, 1);
    t.raw(101, ACCEPT, "empty line before", format!("\r\n{good_text}"));
    t.raw(400, "request line", "two empty lines before", format!("\r\n\r\n{good_text}"));
    t.raw(400, "control character", "bare LF before", format!("\n{good_text}"));
    t.raw(400, "control character", "LF lines", good_text.replace("\r\n", "\n"));
    t.raw(400, "control character", "one LF line", text("\r\nUpgrade", "\nUpgrade"));
    t.raw(400, "control character", "CR lines", good_text.replace("\r\n", "\r"));
    t.raw(400, "control character", "bare CR in a value", text("localhost", "local\rhost"));
    t.raw(400, "control character", "CR CR LF", text("\r\nUpgrade", "\r\r\nUpgrade"));
    t.raw(400, "control character", "NUL in a value", text("localhost", "local\0host"));
    t.raw(400, "control character", "NUL in a name", text("Host", "Ho\0st"));
    t.raw(400, "control character", "NUL in the target", text("alice", "al\0ice"));
    t.raw(400, "control character", "DEL in a value", text("localhost", "local\x7fhost"));
    t.raw(400, "control character", "escape in a value", text("localhost", "\x1b[31m"));
    t.is(400, "folded", "folded line", with("X-A: b\r\n c"));
    t.is(400, "folded", "line folded with a tab", with("X-A: b\r\n\tc"));
    t.raw(400, "folded", "first field begins with a space", text("Host", " Host"));
    t.is(400, "malformed", "no colon", with("X-A"));
    t.is(400, "malformed", "space before the colon", with("X-A : b"));
    t.is(400, "malformed", "tab before the colon", with("X-A\t: b"));
    t.is(400, "malformed", "empty name", with(": b"));
    t.is(400, "malformed", "name with a space", with("X A: b"));
    t.is(400, "malformed", "name with a slash", with("X/A: b"));
    t.is(400, "malformed", "name in UTF-8", with("Gerät: b"));
    t.accepts("empty value", with("X-A:"));
    t.accepts("value in Latin-1", with(b"X-A: caf\xe9"));
    t.accepts("tab in a value", with("X-A: b\tc"));
    t.accepts("no space after the colon", instead("Host:localhost"));
    t.accepts("spaces around values", instead("Upgrade:  \t websocket \t "));
    t.accepts("names in upper case", without("Host").and("HOST: h"));
    t.accepts("names in lower case", without("Connection").and("connection: upgrade"));
}

fn hosts(t: &mut Table) {
    t.is(400, "Host", "no host", without("Host"));
    t.is(400, "Host", "empty host", instead("Host:"));
    t.is(400, "host is given twice", "two hosts", with("Host: localhost:8083"));
    t.is(400, "Host", "host with a path", instead("Host: localhost/ws"));
    t.is(400, "Host", "host with a user", instead("Host: a@localhost"));
    t.is(400, "Host", "two hosts in one", instead("Host: a, b"));
    t.is(400, "Host", "port that is no number", instead("Host: localhost:http"));
    t.is(400, "Host", "port only", instead("Host: :8083"));
    t.is(400, "Host", "IPv6 literal cut short", instead("Host: [::1"));
    t.is(400, "host is not ASCII", "host not in ASCII", instead("Host: bücher.example"));
    t.accepts("IPv6 host", instead("Host: [::1]:8083"));
    t.accepts("host without port", instead("Host: delivery.example.com"));
    t.raw(426, UPGRADE, "HTTP/1.0 without host", "GET /ws HTTP/1.0\r\nUser-Agent: old\r\n\r\n");
}

fn bodies(t: &mut Table) {
    let post = |field: &str| line("POST /ws HTTP/1.1").and(field);
    t.accepts("length zero", with("Content-Length: 0"));
    t.accepts("length zero in many digits", with("Content-Length: 000"));
    t.is(400, "no body", "body", with("Content-Length: 5"));
    t.is(400, "no body", "length over 64 bits", with("Content-Length: 99999999999999999999999"));
    t.is(400, "no body", "chunked body", with("Transfer-Encoding: chunked"));
    t.is(400, "no body", "transfer coding identity", with("Transfer-Encoding: identity"));
    t.is(400, "given twice", "two lengths", with("Content-Length: 0").and("Content-Length: 5"));
    let twice = with("Content-Length: 0").and("Content-Length: 0");
    t.is(400, "given twice", "same length twice", twice);
    t.is(400, "one number", "list of lengths", with("Content-Length: 0, 0"));
    t.is(400, "one number", "negative length", with("Content-Length: -1"));
    t.is(400, "one number", "length with a sign", with("Content-Length: +0"));
    t.is(400, "one number", "length in hexadecimal", with("Content-Length: 0x0"));
    t.is(400, "one number", "empty length", with("Content-Length:"));
    let both = with("Content-Length: 0").and("Transfer-Encoding: chunked");
    t.is(400, "ambiguous", "length and transfer coding", both);
    let both = post("Content-Length: 5").and("Transfer-Encoding: chunked");
    t.is(400, "ambiguous", "POST with length and transfer coding", both);
    t.is(405, "Allow", "POST with a body", post("Content-Length: 5"));
    let old = line("GET /ws HTTP/1.0").and("Transfer-Encoding: chunked");
    t.is(400, "ambiguous", "transfer coding in HTTP/1.0", old);
    t.is(417, "nothing to expect", "expectation", with("Expect: 100-continue"));
}

fn limits(t: &mut Table) {
    let many = |count: usize| (0..count).fold(good(), |request, _| request.and("X-A: b"));
    t.accepts("64 fields", many(59));
    t.is(431, "too many", "65 fields", many(60));
    t.is(431, "too many", "500 fields", many(500));
    t.accepts("long field", with(format!("Cookie: {}", "a".repeat(15 * 1024))));
    t.is(431, "too long", "field too long", with(format!("Cookie: {}", "a".repeat(16 * 1024))));
    t.is(414, "target is too long", "target too long", query("a".repeat(16 * 1024)));
    t.raw(414, "target is too long", "no line end", vec![b'a'; 16 * 1024]);
    let endless = [b"GET /ws HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 16 * 1024]].concat();
    t.raw(431, "too long", "field without end", endless);
}
