//! Upgrade requests, lawful, odd and hostile, each with the status it is answered with and a text
//! that the answer contains. The server has `/echo` on, takes any origin and no tokens (`delivery
//! dev`). Used on the parser alone and through a socket.

/// One request and its answer.
pub(crate) struct Case {
    /// What is odd about it; unique.
    pub(crate) name: &'static str,
    /// All its bytes.
    pub(crate) request: Vec<u8>,
    /// Status of the answer.
    pub(crate) status: u16,
    /// Somewhere in the answer.
    pub(crate) says: &'static str,
}

/// A request that is built by changing a good one.
#[derive(Clone)]
struct Request {
    line: Vec<u8>,
    fields: Vec<Vec<u8>>,
}

/// `Sec-WebSocket-Accept` for the key of [`good`] (RFC 6455 §1.3).
const ACCEPT: &str = "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
const MISSING: &str = "\r\n\r\nmissing user_id or device_id";
const VERSION: &str = "\r\nSec-WebSocket-Version: 13\r\n";
const UPGRADE: &str = "\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";
const DEFLATE: &str = "\r\nSec-WebSocket-Extensions: permessage-deflate; \
                       server_no_context_takeover; client_no_context_takeover\r\n";
const BEARER: &str = "a bearer token has";

fn good() -> Request {
    Request {
        line: b"GET /ws?user_id=alice&device_id=phone HTTP/1.1".to_vec(),
        fields: [
            "Host: localhost:8083",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        ]
        .map(|field| field.as_bytes().to_vec())
        .to_vec(),
    }
}

/// A good request with another request line.
fn line(line: impl AsRef<[u8]>) -> Request {
    Request { line: line.as_ref().to_vec(), ..good() }
}

/// A good request with another target.
fn target(target: impl AsRef<str>) -> Request {
    line(format!("GET {} HTTP/1.1", target.as_ref()))
}

/// A good request with another query.
fn query(query: impl AsRef<str>) -> Request {
    target(format!("/ws?{}", query.as_ref()))
}

/// A good request with one more field line.
fn with(field: impl AsRef<[u8]>) -> Request {
    good().and(field)
}

/// A good request with another line in place of the field of that name.
fn instead(field: impl AsRef<[u8]>) -> Request {
    good().instead(field)
}

/// A good request without the field of that name.
fn without(name: &str) -> Request {
    let mut request = good();
    request.fields.retain(|field| !field.starts_with(name.as_bytes()));
    request
}

impl Request {
    fn and(mut self, field: impl AsRef<[u8]>) -> Self {
        self.fields.push(field.as_ref().to_vec());
        self
    }

    fn instead(mut self, field: impl AsRef<[u8]>) -> Self {
        let field = field.as_ref();
        let name = field.split(|byte| *byte == b':').next().expect("a name");
        let old = self.fields.iter_mut().find(|old| old.starts_with(name)).expect("a known field");
        *old = field.to_vec();
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.line.clone();
        for field in &self.fields {
            bytes.extend_from_slice(b"\r\n");
            bytes.extend_from_slice(field);
        }
        bytes.extend_from_slice(b"\r\n\r\n");
        bytes
    }
}

#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    fn is(&mut self, status: u16, says: &'static str, name: &'static str, request: Request) {
        self.raw(status, says, name, request.bytes());
    }

    fn raw(&mut self, status: u16, says: &'static str, name: &'static str, request: Vec<u8>) {
        self.0.push(Case { name, request, status, says });
    }
}

/// All of them.
pub(crate) fn cases() -> Vec<Case> {
    let mut table = Table::default();
    request_lines(&mut table);
    targets(&mut table);
    bytes_and_lines(&mut table);
    hosts(&mut table);
    bodies(&mut table);
    handshake_fields(&mut table);
    ids(&mut table);
    tokens(&mut table);
    subprotocols(&mut table);
    extensions(&mut table);
    limits(&mut table);
    table.0
}

fn request_lines(t: &mut Table) {
    let ws = "/ws?user_id=alice&device_id=phone";
    t.is(101, ACCEPT, "good", good());
    t.is(101, ACCEPT, "HTTP/1.2 is higher than 1.1", line(format!("GET {ws} HTTP/1.2")));
    t.is(426, UPGRADE, "HTTP/1.0 cannot upgrade", line(format!("GET {ws} HTTP/1.0")));
    t.is(505, "HTTP/1.1 only", "HTTP/2.0 by name", line(format!("GET {ws} HTTP/2.0")));
    t.is(505, "HTTP/1.1 only", "HTTP/0.9 by name", line(format!("GET {ws} HTTP/0.9")));
    t.raw(505, "HTTP/1.1 only", "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec());
    t.is(400, "request line", "no version", line(format!("GET {ws}")));
    t.is(400, "request line", "lower-case version", line(format!("GET {ws} http/1.1")));
    t.is(400, "request line", "version without minor", line(format!("GET {ws} HTTP/1")));
    t.is(400, "request line", "two-digit minor version", line(format!("GET {ws} HTTP/1.10")));
    t.is(400, "request line", "another protocol's name", line(format!("GET {ws} RTSP/1.0")));
    t.is(400, "request line", "two spaces after the method", line(format!("GET  {ws} HTTP/1.1")));
    t.is(400, "request line", "two spaces before the version", line(format!("GET {ws}  HTTP/1.1")));
    t.is(400, "request line", "space after the version", line(format!("GET {ws} HTTP/1.1 ")));
    t.is(400, "request line", "space before the method", line(format!(" GET {ws} HTTP/1.1")));
    t.is(400, "request line", "tab for a space", line(format!("GET\t{ws} HTTP/1.1")));
    t.is(400, "request line", "space in the target", target("/ws?user_id=a b&device_id=d"));
    t.is(400, "request line", "method with parenthesis", line(format!("G(T {ws} HTTP/1.1")));
    t.is(400, "request line", "empty method", line(format!(" {ws} HTTP/1.1")));
    let long_method = "A".repeat(33);
    t.is(400, "request line", "method too long", line(format!("{long_method} {ws} HTTP/1.1")));
    t.is(405, "\r\nAllow: GET\r\n", "POST", line(format!("POST {ws} HTTP/1.1")));
    t.is(405, "\r\nAllow: GET\r\n", "PUT", line(format!("PUT {ws} HTTP/1.1")));
    t.is(405, "\r\nAllow: GET\r\n", "OPTIONS", line(format!("OPTIONS {ws} HTTP/1.1")));
    t.is(405, "\r\nAllow: GET\r\n", "HEAD has no body", line(format!("HEAD {ws} HTTP/1.1")));
    t.is(
        405,
        "\r\nAllow: GET\r\n",
        "lower-case get is another",
        line(format!("get {ws} HTTP/1.1")),
    );
    t.is(405, "\r\nAllow: GET\r\n", "a made-up method", line(format!("BREW {ws} HTTP/1.1")));
    t.is(404, "nothing here", "OPTIONS of the server", line("OPTIONS * HTTP/1.1"));
    t.is(404, "nothing here", "CONNECT", line("CONNECT localhost:8083 HTTP/1.1"));
    t.raw(
        400,
        "control character",
        "TLS",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
    );
    t.raw(400, "control character", "SSH", b"SSH-2.0-OpenSSH_9.6\n".to_vec());
    t.raw(400, "request line", "words", b"hello there\r\n\r\n".to_vec());
    t.raw(400, "request line", "only empty lines", b"\r\n\r\n\r\n\r\n".to_vec());
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
    t.is(101, ACCEPT, "absolute form", target(format!("http://localhost:8083/ws?{ids}")));
    t.is(101, ACCEPT, "absolute form of ws", target(format!("WS://localhost/ws?{ids}")));
    t.is(404, "nothing here", "absolute form without path", target("http://localhost"));
    t.is(404, "nothing here", "absolute form of ftp", target(format!("ftp://localhost/ws?{ids}")));
    t.is(400, "authority", "absolute form without host", target(format!("http:///ws?{ids}")));
    t.is(400, "authority", "absolute form with user", target(format!("http://a@h/ws?{ids}")));
    t.is(101, ACCEPT, "echo", target("/echo"));
    t.is(101, ACCEPT, "echo with any query", target("/echo?user_id=%zz"));
    t.is(400, "request line", "raw UTF-8 in the target", target("/ws?user_id=jürgen&device_id=d"));
    t.is(101, ACCEPT, "what browsers leave unencoded", query(format!("{ids}&x={{|}}^`\\[]'")));
}

fn bytes_and_lines(t: &mut Table) {
    let good_text = String::from_utf8(good().bytes()).expect("ASCII");
    let text = |from: &str, to: &str| good_text.replacen(from, to, 1).into_bytes();
    t.raw(101, ACCEPT, "empty line before", format!("\r\n{good_text}").into_bytes());
    t.raw(
        400,
        "request line",
        "two empty lines before",
        format!("\r\n\r\n{good_text}").into_bytes(),
    );
    t.raw(400, "control character", "bare LF before", format!("\n{good_text}").into_bytes());
    t.raw(400, "control character", "LF lines", good_text.replace("\r\n", "\n").into_bytes());
    t.raw(400, "control character", "one LF line", text("\r\nUpgrade", "\nUpgrade"));
    t.raw(400, "control character", "CR lines", good_text.replace("\r\n", "\r").into_bytes());
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
    t.is(101, ACCEPT, "empty value", with("X-A:"));
    t.is(101, ACCEPT, "value in Latin-1", with(b"X-A: caf\xe9"));
    t.is(101, ACCEPT, "tab in a value", with("X-A: b\tc"));
    t.is(101, ACCEPT, "no space after the colon", instead("Host:localhost"));
    t.is(101, ACCEPT, "spaces around values", instead("Upgrade:  \t websocket \t "));
    t.is(101, ACCEPT, "names in upper case", without("Host").and("HOST: h"));
    t.is(101, ACCEPT, "names in lower case", without("Connection").and("connection: upgrade"));
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
    t.is(101, ACCEPT, "IPv6 host", instead("Host: [::1]:8083"));
    t.is(101, ACCEPT, "host without port", instead("Host: delivery.example.com"));
    t.is(
        426,
        UPGRADE,
        "HTTP/1.0 without host",
        Request { line: b"GET /ws HTTP/1.0".to_vec(), fields: vec![b"User-Agent: old".to_vec()] },
    );
}

fn bodies(t: &mut Table) {
    let post = |field: &str| line("POST /ws HTTP/1.1").and(field);
    t.is(101, ACCEPT, "length zero", with("Content-Length: 0"));
    t.is(101, ACCEPT, "length zero in many digits", with("Content-Length: 000"));
    t.is(400, "no body", "body", with("Content-Length: 5"));
    t.is(400, "no body", "length over 64 bits", with("Content-Length: 99999999999999999999999"));
    t.is(400, "no body", "chunked body", with("Transfer-Encoding: chunked"));
    t.is(400, "no body", "transfer coding identity", with("Transfer-Encoding: identity"));
    t.is(400, "given twice", "two lengths", with("Content-Length: 0").and("Content-Length: 5"));
    t.is(
        400,
        "given twice",
        "same length twice",
        with("Content-Length: 0").and("Content-Length: 0"),
    );
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

fn handshake_fields(t: &mut Table) {
    let key = |key: &str| instead(format!("Sec-WebSocket-Key: {key}"));
    t.is(426, UPGRADE, "plain GET", without("Upgrade").instead("Connection: keep-alive"));
    t.is(426, UPGRADE, "no upgrade", without("Upgrade"));
    t.is(426, UPGRADE, "upgrade to h2c", instead("Upgrade: h2c"));
    t.is(426, UPGRADE, "upgrade to something longer", instead("Upgrade: websocket2"));
    t.is(426, UPGRADE, "upgrade with a version", instead("Upgrade: websocket/13"));
    t.is(101, ACCEPT, "upgrade in another case", instead("Upgrade: WebSocket"));
    t.is(101, ACCEPT, "list of upgrades", instead("Upgrade: h2c, websocket"));
    t.is(101, ACCEPT, "upgrades on two lines", with("Upgrade: h2c"));
    t.is(101, ACCEPT, "list with empty elements", instead("Upgrade: ,, websocket ,"));
    t.is(400, "Connection", "no connection", without("Connection"));
    t.is(400, "Connection", "connection keeps alive", instead("Connection: keep-alive"));
    t.is(400, "Connection", "connection with a longer token", instead("Connection: Upgraded"));
    t.is(101, ACCEPT, "Firefox's connection", instead("Connection: keep-alive, Upgrade"));
    t.is(101, ACCEPT, "connection in another case", instead("Connection: UPGRADE"));
    t.is(101, ACCEPT, "connection on two lines", with("Connection: keep-alive"));
    t.is(426, VERSION, "no version field", without("Sec-WebSocket-Version"));
    t.is(426, VERSION, "version 8", instead("Sec-WebSocket-Version: 8"));
    t.is(426, VERSION, "version 0", instead("Sec-WebSocket-Version: 0"));
    t.is(426, VERSION, "version 013", instead("Sec-WebSocket-Version: 013"));
    t.is(426, VERSION, "version 14", instead("Sec-WebSocket-Version: 14"));
    t.is(426, VERSION, "list of versions", instead("Sec-WebSocket-Version: 13, 8"));
    t.is(426, VERSION, "version in words", instead("Sec-WebSocket-Version: thirteen"));
    t.is(400, "given twice", "two versions", with("Sec-WebSocket-Version: 13"));
    t.is(400, "16 bytes", "no key", without("Sec-WebSocket-Key"));
    t.is(400, "16 bytes", "empty key", key(""));
    t.is(400, "given twice", "two keys", with("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="));
    t.is(400, "16 bytes", "key of 15 bytes", key("AAAAAAAAAAAAAAAAAAAA"));
    t.is(400, "16 bytes", "key of 17 bytes", key("AAAAAAAAAAAAAAAAAAAAAAA="));
    t.is(400, "16 bytes", "key of 18 bytes", key("AAAAAAAAAAAAAAAAAAAAAAAA"));
    t.is(400, "16 bytes", "key without padding", key("dGhlIHNhbXBsZSBub25jZQ"));
    t.is(400, "16 bytes", "key in URL-safe Base64", key("dGhlIHNhbXBsZSBub25j-_=="));
    t.is(400, "16 bytes", "key with a space within", key("dGhlIHNhbXBs SBub25jZQ=="));
    t.is(400, "16 bytes", "key padded in the middle", key("dGhlIHNhb=BsZSBub25jZQ=="));
    t.is(
        101,
        "OfS0wDaT5NoxF2gqm7Zj2YtetzM=",
        "the RFC's key with stray bits",
        key("AQIDBAUGBwgJCgsMDQ4PEC=="),
    );
    t.is(101, ACCEPT, "origin null", with("Origin: null"));
    t.is(101, ACCEPT, "origin of a page", with("Origin: https://app.example.com"));
    t.is(400, "given twice", "two origins", with("Origin: http://a").and("Origin: http://b"));
    t.is(101, ACCEPT, "an answer's field", with("Sec-WebSocket-Accept: x"));
    t.is(101, ACCEPT, "cookies and proxies", with("Cookie: a=b").and("X-Forwarded-For: 10.0.0.1"));
}

fn ids(t: &mut Table) {
    let d = "&device_id=d";
    let long = "x".repeat(257);
    let longest = "x".repeat(256);
    let accents = "%C3%A9".repeat(128);
    t.is(400, MISSING, "no query", target("/ws"));
    t.is(400, MISSING, "empty query", query(""));
    t.is(400, MISSING, "no user", query("device_id=phone"));
    t.is(400, MISSING, "no device", query("user_id=alice"));
    t.is(400, MISSING, "empty user", query("user_id=&device_id=phone"));
    t.is(400, MISSING, "empty device", query("user_id=alice&device_id="));
    t.is(400, MISSING, "names in another case", query("User_Id=alice&Device_Id=phone"));
    t.is(400, MISSING, "semicolon separates nothing", query("user_id=alice;device_id=phone"));
    t.is(400, "user_id is given twice", "two users", query(format!("user_id=a&user_id=b{d}")));
    t.is(
        400,
        "user_id is given twice",
        "same user twice",
        query(format!("user_id=a&user_id=a{d}")),
    );
    t.is(
        400,
        "user_id is given twice",
        "second user encoded",
        query(format!("user_id=a&user%5fid=b{d}")),
    );
    t.is(400, "device_id is given twice", "two devices", query(format!("user_id=a{d}{d}")));
    t.is(400, "user_id must be", "percent at the end", query("device_id=d&user_id=a%"));
    t.is(400, "user_id must be", "half an escape", query(format!("user_id=a%4{d}")));
    t.is(400, "user_id must be", "escape not in hexadecimal", query(format!("user_id=%GG{d}")));
    t.is(400, "user_id must be", "not UTF-8", query(format!("user_id=%FF{d}")));
    t.is(400, "user_id must be", "overlong UTF-8", query(format!("user_id=%C0%AF{d}")));
    t.is(400, "user_id must be", "surrogate", query(format!("user_id=%ED%A0%80{d}")));
    t.is(400, "user_id must be", "UTF-8 cut short", query(format!("user_id=%E2%82{d}")));
    t.is(400, "control character", "encoded NUL", query(format!("user_id=a%00{d}")));
    t.is(400, "control character", "encoded CR LF", query(format!("user_id=a%0d%0ab{d}")));
    t.is(400, "control character", "encoded tab", query(format!("user_id=%09{d}")));
    t.is(400, "control character", "encoded DEL", query(format!("user_id=%7f{d}")));
    t.is(400, "control character", "encoded C1 control", query(format!("user_id=%C2%9B{d}")));
    t.is(
        400,
        "device_id holds",
        "control character in the device",
        query("user_id=a&device_id=%1b"),
    );
    t.is(400, "at most 256 bytes", "user of 257 bytes", query(format!("user_id={long}{d}")));
    t.is(
        400,
        "at most 256 bytes",
        "device of 257 bytes",
        query(format!("user_id=a&device_id={long}")),
    );
    t.is(101, ACCEPT, "user of 256 bytes", query(format!("user_id={longest}{d}")));
    t.is(101, ACCEPT, "user of 256 bytes in escapes", query(format!("user_id={accents}{d}")));
    t.is(101, ACCEPT, "user in UTF-8", query(format!("user_id=J%C3%BCrgen%20%F0%9F%98%80{d}")));
    t.is(101, ACCEPT, "plus is a space", query(format!("user_id=a+b{d}")));
    t.is(101, ACCEPT, "encoded ampersand", query(format!("user_id=a%26b%3Dc{d}")));
    t.is(101, ACCEPT, "encoded name", query(format!("%75ser_id=a{d}")));
    t.is(
        101,
        ACCEPT,
        "unknown parameters, even malformed",
        query(format!("x=%zz&%=&&=&user_id=a{d}")),
    );
    t.is(101, ACCEPT, "a question mark in the query", query(format!("x=?&user_id=a{d}")));
}

fn tokens(t: &mut Table) {
    let ids = "user_id=alice&device_id=phone";
    let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln";
    let in_query = |token: &str| query(format!("{ids}&access_token={token}"));
    let in_header = |value: &str| with(format!("Authorization: {value}"));
    t.is(101, ACCEPT, "token in the query", in_query(jwt));
    t.is(101, ACCEPT, "token in the header", in_header(&format!("Bearer {jwt}")));
    t.is(101, ACCEPT, "scheme in lower case", in_header(&format!("bearer   {jwt}")));
    t.is(101, ACCEPT, "another scheme", in_header("Basic YTpi"));
    t.is(101, ACCEPT, "empty token in the query", in_query(""));
    t.is(400, BEARER, "empty token in the header", in_header("Bearer"));
    t.is(400, BEARER, "token with a space", in_header("Bearer a b"));
    t.is(400, BEARER, "token of padding only", in_header("Bearer =="));
    t.is(400, BEARER, "token padded within", in_header("Bearer a=b"));
    t.is(400, BEARER, "token with a quote", in_query("a%22b"));
    t.is(
        400,
        "control character",
        "token with a line end",
        in_query("a%0d%0aX: b".replace(' ', "+").as_str()),
    );
    t.is(
        400,
        BEARER,
        "token too long in the header",
        in_header(&format!("Bearer {}", "a".repeat(8193))),
    );
    t.is(400, "8192", "token too long in the query", in_query(&"a".repeat(8193)));
    t.is(101, ACCEPT, "longest token", in_header(&format!("Bearer {}", "a".repeat(8192))));
    t.is(
        400,
        "given twice",
        "two authorizations",
        in_header("Bearer a").and("Authorization: Bearer a"),
    );
    t.is(
        400,
        "access_token is given twice",
        "two tokens in the query",
        in_query("a&access_token=a"),
    );
    t.is(400, "two different", "tokens that differ", in_query("a").and("Authorization: Bearer b"));
    t.is(101, ACCEPT, "same token twice", in_query("a").and("Authorization: Bearer a"));
    let in_protocol = |list: &str| with(format!("Sec-WebSocket-Protocol: {list}"));
    let named = "\r\nSec-WebSocket-Protocol: realchat.v1\r\n";
    t.is(
        101,
        named,
        "token among subprotocols",
        in_protocol(&format!("realchat.v1, bearer.{jwt}")),
    );
    t.is(
        101,
        named,
        "token before the subprotocol",
        in_protocol(&format!("bearer.{jwt}, realchat.v1")),
    );
    t.is(400, "two different", "two tokens among subprotocols", in_protocol("bearer.a, bearer.b"));
    t.is(400, BEARER, "empty token among subprotocols", in_protocol("realchat.v1, bearer."));
    let differ = in_protocol("bearer.a").and("Authorization: Bearer b");
    t.is(400, "two different", "header and subprotocol differ", differ);
    t.is(101, ACCEPT, "token instead of a user", query(format!("device_id=d&access_token={jwt}")));
    t.is(400, MISSING, "token instead of a device", query(format!("user_id=a&access_token={jwt}")));
}

fn subprotocols(t: &mut Table) {
    let offer = |list: &str| with(format!("Sec-WebSocket-Protocol: {list}"));
    let binary = "\r\nSec-WebSocket-Protocol: realchat.v1\r\n";
    let json = "\r\nSec-WebSocket-Protocol: realchat.v1.json\r\n";
    t.is(101, binary, "binary", offer("realchat.v1"));
    t.is(101, json, "JSON", offer("realchat.v1.json"));
    t.is(101, json, "the client's first choice", offer("realchat.v1.json, realchat.v1"));
    t.is(
        101,
        binary,
        "the client's first choice, the other",
        offer("realchat.v1,realchat.v1.json"),
    );
    t.is(101, json, "unknown ones passed over", offer("mqtt, realchat.v2, realchat.v1.json"));
    t.is(101, ACCEPT, "only unknown ones", offer("mqtt, chat"));
    t.is(101, ACCEPT, "names are case-sensitive", offer("RealChat.V1"));
    t.is(101, json, "on two lines", offer("mqtt").and("Sec-WebSocket-Protocol: realchat.v1.json"));
    t.is(101, ACCEPT, "empty list", offer(""));
    t.is(400, "tokens", "not a token", offer("realchat v1"));
    t.is(400, "tokens", "quoted", offer("\"realchat.v1\""));
    t.is(400, "not ASCII", "subprotocol not in ASCII", offer("réalchat"));
}

fn extensions(t: &mut Table) {
    let offer = |list: &str| with(format!("Sec-WebSocket-Extensions: {list}"));
    let nine = "; client_no_context_takeover; server_max_window_bits=9\r\n";
    t.is(101, DEFLATE, "deflate", offer("permessage-deflate"));
    t.is(101, DEFLATE, "what Chromium offers", offer("permessage-deflate; client_max_window_bits"));
    t.is(
        101,
        nine,
        "deflate with a small window",
        offer("permessage-deflate; server_max_window_bits=9"),
    );
    t.is(101, nine, "quoted parameter", offer("permessage-deflate; server_max_window_bits=\"9\""));
    let second = "permessage-deflate; server_max_window_bits=7, permessage-deflate";
    t.is(101, DEFLATE, "second offer", offer(second));
    t.is(
        101,
        DEFLATE,
        "on two lines too",
        offer("foo").and("Sec-WebSocket-Extensions: permessage-deflate"),
    );
    t.is(101, ACCEPT, "window too small", offer("permessage-deflate; server_max_window_bits=7"));
    t.is(101, ACCEPT, "unknown parameter", offer("permessage-deflate; level=9"));
    t.is(101, ACCEPT, "unknown extension", offer("x-webkit-deflate-frame"));
    t.is(400, "not an extension list", "quote not closed", offer("permessage-deflate; a=\"b"));
    t.is(400, "not an extension list", "parameter without name", offer("permessage-deflate; =9"));
    t.is(400, "not an extension list", "too many extensions", offer(&"a, ".repeat(17)));
}

fn limits(t: &mut Table) {
    let many = |count: usize| (0..count).fold(good(), |request, _| request.and("X-A: b"));
    t.is(101, ACCEPT, "64 fields", many(59));
    t.is(431, "too many", "65 fields", many(60));
    t.is(431, "too many", "500 fields", many(500));
    t.is(101, ACCEPT, "long field", with(format!("Cookie: {}", "a".repeat(15 * 1024))));
    t.is(431, "too long", "field too long", with(format!("Cookie: {}", "a".repeat(16 * 1024))));
    t.is(414, "target is too long", "target too long", query("a".repeat(16 * 1024)));
    t.raw(414, "target is too long", "no line end", vec![b'a'; 16 * 1024]);
    let endless = [b"GET /ws HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 16 * 1024]].concat();
    t.raw(431, "too long", "field without end", endless);
}
