//! Cases of the handshake fields, ids, tokens, subprotocols and extensions.

use super::Table;
use super::request::{UPGRADE, instead, query, target, with, without};

const MISSING: &str = "\r\n\r\nmissing user_id or device_id";
const VERSION: &str = "\r\nSec-WebSocket-Version: 13\r\n";
const DEFLATE: &str = "\r\nSec-WebSocket-Extensions: permessage-deflate; \
                       server_no_context_takeover; client_no_context_takeover\r\n";
const BEARER: &str = "a bearer token has";

pub(super) fn cases(t: &mut Table) {
    handshake_fields(t);
    ids(t);
    tokens(t);
    subprotocols(t);
    extensions(t);
}

fn handshake_fields(t: &mut Table) {
    let key = |key: &str| instead(format!("Sec-WebSocket-Key: {key}"));
    t.is(426, UPGRADE, "plain GET", without("Upgrade").instead("Connection: keep-alive"));
    t.is(426, UPGRADE, "no upgrade", without("Upgrade"));
    t.is(426, UPGRADE, "upgrade to h2c", instead("Upgrade: h2c"));
    t.is(426, UPGRADE, "upgrade to something longer", instead("Upgrade: websocket2"));
    t.is(426, UPGRADE, "upgrade with a version", instead("Upgrade: websocket/13"));
    t.accepts("upgrade in another case", instead("Upgrade: WebSocket"));
    t.accepts("list of upgrades", instead("Upgrade: h2c, websocket"));
    t.accepts("upgrades on two lines", with("Upgrade: h2c"));
    t.accepts("list with empty elements", instead("Upgrade: ,, websocket ,"));
    t.is(400, "Connection", "no connection", without("Connection"));
    t.is(400, "Connection", "connection keeps alive", instead("Connection: keep-alive"));
    t.is(400, "Connection", "connection with a longer token", instead("Connection: Upgraded"));
    t.accepts("Firefox's connection", instead("Connection: keep-alive, Upgrade"));
    t.accepts("connection in another case", instead("Connection: UPGRADE"));
    t.accepts("connection on two lines", with("Connection: keep-alive"));
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
    let stray_bits = key("AQIDBAUGBwgJCgsMDQ4PEC==");
    t.is(101, "OfS0wDaT5NoxF2gqm7Zj2YtetzM=", "the RFC's key with stray bits", stray_bits);
    t.accepts("origin null", with("Origin: null"));
    t.accepts("origin of a page", with("Origin: https://app.example.com"));
    t.is(400, "given twice", "two origins", with("Origin: http://a").and("Origin: http://b"));
    t.accepts("an answer's field", with("Sec-WebSocket-Accept: x"));
    t.accepts("cookies and proxies", with("Cookie: a=b").and("X-Forwarded-For: 10.0.0.1"));
}

fn ids(t: &mut Table) {
    let user = |value: &str| query(format!("user_id={value}&device_id=d"));
    let device = |value: &str| query(format!("user_id=a&device_id={value}"));
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
    t.is(400, "user_id is given twice", "two users", user("a&user_id=b"));
    t.is(400, "user_id is given twice", "same user twice", user("a&user_id=a"));
    t.is(400, "user_id is given twice", "second user encoded", user("a&user%5fid=b"));
    t.is(400, "device_id is given twice", "two devices", device("d&device_id=d"));
    t.is(400, "user_id must be", "percent at the end", query("device_id=d&user_id=a%"));
    t.is(400, "user_id must be", "half an escape", user("a%4"));
    t.is(400, "user_id must be", "escape not in hexadecimal", user("%GG"));
    t.is(400, "user_id must be", "not UTF-8", user("%FF"));
    t.is(400, "user_id must be", "overlong UTF-8", user("%C0%AF"));
    t.is(400, "user_id must be", "surrogate", user("%ED%A0%80"));
    t.is(400, "user_id must be", "UTF-8 cut short", user("%E2%82"));
    t.is(400, "control character", "encoded NUL", user("a%00"));
    t.is(400, "control character", "encoded CR LF", user("a%0d%0ab"));
    t.is(400, "control character", "encoded tab", user("%09"));
    t.is(400, "control character", "encoded DEL", user("%7f"));
    t.is(400, "control character", "encoded C1 control", user("%C2%9B"));
    t.is(400, "device_id contains", "control character in the device", device("%1b"));
    t.is(400, "at most 256 bytes", "user of 257 bytes", user(&long));
    t.is(400, "at most 256 bytes", "device of 257 bytes", device(&long));
    t.accepts("user of 256 bytes", user(&longest));
    t.accepts("user of 256 bytes in escapes", user(&accents));
    t.accepts("user in UTF-8", user("J%C3%BCrgen%20%F0%9F%98%80"));
    t.accepts("plus is a space", user("a+b"));
    t.accepts("encoded ampersand", user("a%26b%3Dc"));
    t.accepts("encoded name", query("%75ser_id=a&device_id=d"));
    t.accepts("unknown parameters, even malformed", query("x=%zz&%=&&=&user_id=a&device_id=d"));
    t.accepts("a question mark in the query", query("x=?&user_id=a&device_id=d"));
}

fn tokens(t: &mut Table) {
    let ids = "user_id=alice&device_id=phone";
    let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln";
    let too_long = "a".repeat(8193);
    let in_query = |token: &str| query(format!("{ids}&access_token={token}"));
    let in_header = |value: &str| with(format!("Authorization: {value}"));
    let bearer = |token: &str| in_header(&format!("Bearer {token}"));
    t.accepts("token in the query", in_query(jwt));
    t.accepts("token in the header", bearer(jwt));
    t.accepts("scheme in lower case", in_header(&format!("bearer   {jwt}")));
    t.accepts("another scheme", in_header("Basic YTpi"));
    t.accepts("empty token in the query", in_query(""));
    t.is(400, BEARER, "empty token in the header", in_header("Bearer"));
    t.is(400, BEARER, "token with a space", bearer("a b"));
    t.is(400, BEARER, "token of padding only", bearer("=="));
    t.is(400, BEARER, "token padded within", bearer("a=b"));
    t.is(400, BEARER, "token with a quote", in_query("a%22b"));
    t.is(400, "control character", "token with a line end", in_query("a%0d%0aX:+b"));
    t.is(400, BEARER, "token too long in the header", bearer(&too_long));
    t.is(400, "8192", "token too long in the query", in_query(&too_long));
    t.accepts("longest token", bearer(&"a".repeat(8192)));
    t.is(400, "given twice", "two authorizations", bearer("a").and("Authorization: Bearer a"));
    let twice = in_query("a&access_token=a");
    t.is(400, "access_token is given twice", "two tokens in the query", twice);
    t.is(400, "two different", "tokens that differ", in_query("a").and("Authorization: Bearer b"));
    t.accepts("same token twice", in_query("a").and("Authorization: Bearer a"));
    let in_protocol = |list: &str| with(format!("Sec-WebSocket-Protocol: {list}"));
    let named = "\r\nSec-WebSocket-Protocol: realchat.v1\r\n";
    let last = in_protocol(&format!("realchat.v1, bearer.{jwt}"));
    t.is(101, named, "token among subprotocols", last);
    let first = in_protocol(&format!("bearer.{jwt}, realchat.v1"));
    t.is(101, named, "token before the subprotocol", first);
    t.is(400, "two different", "two tokens among subprotocols", in_protocol("bearer.a, bearer.b"));
    t.is(400, BEARER, "empty token among subprotocols", in_protocol("realchat.v1, bearer."));
    let differ = in_protocol("bearer.a").and("Authorization: Bearer b");
    t.is(400, "two different", "header and subprotocol differ", differ);
    t.accepts("token instead of a user", query(format!("device_id=d&access_token={jwt}")));
    t.is(400, MISSING, "token instead of a device", query(format!("user_id=a&access_token={jwt}")));
}

fn subprotocols(t: &mut Table) {
    let offer = |list: &str| with(format!("Sec-WebSocket-Protocol: {list}"));
    let binary = "\r\nSec-WebSocket-Protocol: realchat.v1\r\n";
    let json = "\r\nSec-WebSocket-Protocol: realchat.v1.json\r\n";
    t.is(101, binary, "binary", offer("realchat.v1"));
    t.is(101, json, "JSON", offer("realchat.v1.json"));
    t.is(101, json, "the client's first choice", offer("realchat.v1.json, realchat.v1"));
    let binary_first = offer("realchat.v1,realchat.v1.json");
    t.is(101, binary, "the client's first choice, the other", binary_first);
    t.is(101, json, "unknown ones are ignored", offer("mqtt, realchat.v2, realchat.v1.json"));
    t.accepts("only unknown ones", offer("mqtt, chat"));
    t.accepts("names are case-sensitive", offer("RealChat.V1"));
    t.is(101, json, "on two lines", offer("mqtt").and("Sec-WebSocket-Protocol: realchat.v1.json"));
    t.accepts("empty list", offer(""));
    t.is(400, "tokens", "not a token", offer("realchat v1"));
    t.is(400, "tokens", "quoted", offer("\"realchat.v1\""));
    t.is(400, "not ASCII", "subprotocol not in ASCII", offer("réalchat"));
}

fn extensions(t: &mut Table) {
    let offer = |list: &str| with(format!("Sec-WebSocket-Extensions: {list}"));
    let deflate = |parameter: &str| offer(&format!("permessage-deflate; {parameter}"));
    let nine = "; client_no_context_takeover; server_max_window_bits=9\r\n";
    t.is(101, DEFLATE, "deflate", offer("permessage-deflate"));
    t.is(101, DEFLATE, "what Chromium offers", deflate("client_max_window_bits"));
    t.is(101, nine, "deflate with a small window", deflate("server_max_window_bits=9"));
    t.is(101, nine, "quoted parameter", deflate("server_max_window_bits=\"9\""));
    let second = "permessage-deflate; server_max_window_bits=7, permessage-deflate";
    t.is(101, DEFLATE, "second offer", offer(second));
    let two_lines = offer("foo").and("Sec-WebSocket-Extensions: permessage-deflate");
    t.is(101, DEFLATE, "on two lines too", two_lines);
    t.accepts("window too small", deflate("server_max_window_bits=7"));
    t.accepts("unknown parameter", deflate("level=9"));
    t.accepts("unknown extension", offer("x-webkit-deflate-frame"));
    t.is(400, "not an extension list", "quote not closed", deflate("a=\"b"));
    t.is(400, "not an extension list", "parameter without name", deflate("=9"));
    t.is(400, "not an extension list", "too many extensions", offer(&"a, ".repeat(17)));
}
