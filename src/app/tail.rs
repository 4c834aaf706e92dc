//! `delivery tail`: a client that prints each event as one JSON line.

use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::http::{HeaderValue, Response};
use tungstenite::{Message, WebSocket};

use super::secure_client::{ByteStream, SecureError, secure};
use super::terminal::complain;
use crate::domain::close::CloseCode;
use crate::domain::counted::Counted;
use crate::service::events::encode;
use crate::service::events::envelope::{self, EventBody};
use crate::service::runtime::backoff::Backoff;

/// The help text.
pub const ABOUT: &str = "\
Connects as a client and prints one JSON line per event.

    delivery tail --user alice --device phone
    delivery tail --user bob --device desk --url wss://chat.example.com --token \"$TOKEN\" | jq .payload

When the connection ends, it reconnects with the last cursor that the server has sent, and gets all \
events since then. If the cursor cannot be used any more, it says so, and asks for the messages after the \
last one it has of each conversation. So it misses no message. Events go to standard output, notices to \
standard error.";

/// The client pings after this time without data from the server, and reconnects after twice this time.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Maximum time to establish a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Everything except the unreserved characters is encoded (RFC 3986 §2.3).
const QUERY_VALUE: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// Delays before reconnecting.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));

/// The arguments.
#[derive(Args, Debug)]
pub struct Tail {
    /// User id to connect with
    #[arg(long)]
    user: String,
    /// Device id to connect with: a new connection of the same user and device replaces the old one
    #[arg(long)]
    device: String,
    /// Server address: host:port, or a URL with ws:// or http://, or with wss:// or https:// for TLS
    #[arg(long, default_value = "127.0.0.1:8083")]
    url: String,
    /// PEM file with the authorities to trust over TLS, instead of those that browsers trust
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Token to authenticate with (AUTH_MODE=jwt)
    #[arg(long, env = "DELIVERY_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Exit after this number of events
    #[arg(long)]
    count: Option<u64>,
}

/// Runs until `count` events are received or standard output is closed.
///
/// # Errors
/// The server refuses this client, and a retry would not help.
pub fn run(tail: &Tail) -> Result<(), String> {
    let mut received = Received::default();
    let mut retries = 0;
    loop {
        let events_before = received.events;
        match session(tail, &mut received) {
            Outcome::Done => return Ok(()),
            Outcome::GiveUp(why) => return Err(why),
            Outcome::Retry { why, wait } => {
                if received.events > events_before {
                    retries = 0;
                }
                let wait = wait.unwrap_or_else(|| {
                    retries += 1;
                    BACKOFF.random_delay(retries - 1)
                });
                complain(&format!("{why}; reconnecting in {} ms", wait.as_millis()));
                thread::sleep(wait);
            }
        }
    }
}

/// How long a missing sequence is waited for: it may be committed late, or never (`docs/websocket.md`).
const HOLE_WAIT: Duration = Duration::from_secs(60);

/// Events since the last cursor that this client remembers, to recognise those that come again. Beyond that it may
/// print some of them twice.
const REMEMBERED_MAX: usize = 65_536;

/// What this client has received.
#[derive(Debug, Default)]
struct Received {
    conversations: BTreeMap<String, ConversationProgress>,
    events: u64,
    /// The last one.
    cursor: Option<String>,
    /// Hashes of the events since the last cursor, and since the one before: a cursor may be a little older than the
    /// events in front of it.
    recent: [HashSet<u64>; 2],
    hasher: RandomState,
}

/// A text of the server (`docs/websocket.md`).
#[derive(Deserialize)]
struct ServerText {
    cursor: Option<String>,
    cursor_expired: Option<String>,
}

/// What this client has received of a conversation.
#[derive(Debug, Default)]
struct ConversationProgress {
    /// It has everything up to here, or no longer waits for what is missing.
    complete: i64,
    /// Higher sequences that it has, and since when.
    above: BTreeMap<i64, Instant>,
}

impl ConversationProgress {
    fn record(&mut self, sequence: i64, now: Instant) {
        if sequence > self.complete {
            self.above.entry(sequence).or_insert(now);
        }
        while let Some(next) = self.above.first_entry() {
            if *next.key() != self.complete + 1 && now - *next.get() < HOLE_WAIT {
                break;
            }
            self.complete = *next.key();
            next.remove();
        }
    }
}

impl Received {
    fn resume_request(&self) -> String {
        let named = self.conversations.iter().map(|(id, progress)| (id, progress.complete));
        let named = named.collect::<BTreeMap<_, _>>();
        serde_json::json!({ "cursor": self.cursor, "last_sequences": named }).to_string()
    }

    fn text(&mut self, text: &str) {
        let Ok(text) = serde_json::from_str::<ServerText>(text) else { return };
        if let Some(why) = text.cursor_expired {
            complain(&format!("cursor expired ({why}); catching up with messages by sequence"));
        }
        if text.cursor.is_some() {
            self.cursor = text.cursor;
            self.recent.swap(0, 1);
            self.recent[0].clear();
        }
    }

    /// Returns false if it has come before.
    fn record(&mut self, value: &[u8], now: Instant) -> bool {
        let hash = self.hasher.hash_one(value);
        if self.recent.iter().any(|recent| recent.contains(&hash)) {
            return false;
        }
        if self.recent[0].len() >= REMEMBERED_MAX {
            self.recent[0].clear();
        }
        self.recent[0].insert(hash);
        self.events += 1;
        if let Ok(record) = envelope::decode(value)
            && let EventBody::MessageSent { conversation, sequence } = record.body
        {
            let progress = self.conversations.entry(conversation.to_owned()).or_default();
            progress.record(sequence, now);
        }
        true
    }
}

/// How a session ended, and what the client does next.
enum Outcome {
    Done,
    /// A retry would not help.
    GiveUp(String),
    /// A retry may help. `wait` is the delay that the server requests.
    Retry {
        why: String,
        wait: Option<Duration>,
    },
}

fn retry(why: String) -> Outcome {
    Outcome::Retry { why, wait: None }
}

type Socket = WebSocket<Box<dyn ByteStream>>;

fn session(tail: &Tail, received: &mut Received) -> Outcome {
    let mut socket = match connect(tail) {
        Ok(socket) => socket,
        Err(outcome) => return outcome,
    };
    complain(&format!("connected to {} as {}/{}", tail.url, tail.user, tail.device));
    if let Err(error) = socket.send(Message::text(received.resume_request())) {
        return retry(error.to_string());
    }
    let mut silences = 0;
    loop {
        match socket.read() {
            Ok(Message::Binary(value)) => {
                silences = 0;
                if !received.record(&value, Instant::now()) {
                    continue;
                }
                // The reader of standard output may close it early, as `head` does.
                if print_line(&value).is_err()
                    || tail.count.is_some_and(|max| received.events >= max)
                {
                    // An error does not matter: the server also notices that the socket is closed.
                    let _ = socket.close(None);
                    return Outcome::Done;
                }
            }
            Ok(Message::Text(text)) => {
                silences = 0;
                received.text(&text);
            }
            Ok(Message::Close(frame)) => {
                let (code, reason) =
                    frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                return closed(CloseCode(code), &reason);
            }
            Ok(_) => silences = 0,
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                silences += 1;
                if silences == 2 {
                    return retry("no data from the server".to_owned());
                }
                if let Err(error) = socket.send(Message::Ping(Vec::new().into())) {
                    return retry(error.to_string());
                }
            }
            Err(error) => return retry(format!("connection lost: {error}")),
        }
    }
}

fn connect(tail: &Tail) -> Result<Socket, Outcome> {
    let target = target(&tail.url, &tail.user, &tail.device).map_err(Outcome::GiveUp)?;
    let authority = target.authority;
    let mut request = target
        .url
        .into_client_request()
        .map_err(|error| Outcome::GiveUp(format!("{}: {error}", tail.url)))?;
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("realchat.v1"));
    if let Some(token) = &tail.token {
        let value = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| Outcome::GiveUp("the token contains a control character".to_owned()))?;
        request.headers_mut().insert("authorization", value);
    }
    let stream = open(&authority).map_err(|error| retry(format!("{authority}: {error}")))?;
    let stream: Box<dyn ByteStream> = if target.is_secure {
        let host = authority.rsplit_once(':').map_or(&*authority, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        secure(stream, host, tail.ca.as_deref()).map_err(|error| match error {
            SecureError::Permanent(why) => Outcome::GiveUp(format!("{authority}: {why}")),
            SecureError::Io(error) => retry(format!("{authority}: {error}")),
        })?
    } else {
        Box::new(stream)
    };
    match tungstenite::client(request, stream) {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(response))) => {
            Err(refused(&response))
        }
        Err(error) => Err(retry(format!("{authority}: {error}"))),
    }
}

fn open(authority: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in std::net::ToSocketAddrs::to_socket_addrs(authority)? {
        match TcpStream::connect_timeout(&address, CONNECT_MAX) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(SILENCE_MAX))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Where to connect.
struct Target {
    /// `host:port`.
    authority: String,
    /// The URL to request.
    url: String,
    /// Over TLS.
    is_secure: bool,
}

fn target(url: &str, user: &str, device: &str) -> Result<Target, String> {
    let (is_secure, rest) = match url.split_once("://") {
        None => (false, url),
        Some(("ws" | "http", rest)) => (false, rest),
        Some(("wss" | "https", rest)) => (true, rest),
        Some((scheme, _)) => {
            return Err(format!("`{scheme}://` is not supported; example: wss://host:port/ws"));
        }
    };
    let (authority, path) = match rest.split_once('/') {
        None | Some((_, "")) => (rest.trim_end_matches('/'), "ws"),
        Some((authority, path)) => (authority, path),
    };
    if path.contains('?') {
        return Err("the URL must not have a query: use --user and --device".to_owned());
    }
    let port_missing =
        authority.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err());
    let (scheme, port) = if is_secure { ("wss", 443) } else { ("ws", 80) };
    let authority = if port_missing { format!("{authority}:{port}") } else { authority.to_owned() };
    let encoded = |text| utf8_percent_encode(text, QUERY_VALUE);
    let (user, device) = (encoded(user), encoded(device));
    let url = format!("{scheme}://{authority}/{path}?user_id={user}&device_id={device}");
    Ok(Target { authority, url, is_secure })
}

/// The handshake was answered with a status other than 101.
fn refused(response: &Response<Option<Vec<u8>>>) -> Outcome {
    let status = response.status();
    let body = response.body().as_deref().unwrap_or_default();
    let why = format!("refused with {status}: {}", String::from_utf8_lossy(body).trim());
    let wait = response
        .headers()
        .get("retry-after")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    if status.is_client_error() && !matches!(status.as_u16(), 408 | 429) {
        return Outcome::GiveUp(why);
    }
    Outcome::Retry { why, wait }
}

/// What a client does after each close code (`docs/guarantees.md`).
fn closed(code: CloseCode, reason: &str) -> Outcome {
    let why = format!("closed with {} {reason}", code.0);
    match code {
        CloseCode::SESSION_REPLACED | CloseCode::TOKEN_EXPIRED => Outcome::GiveUp(why),
        CloseCode::PROTOCOL_ERROR
        | CloseCode::UNSUPPORTED_DATA
        | CloseCode::INVALID_PAYLOAD
        | CloseCode::MESSAGE_TOO_BIG => Outcome::GiveUp(why),
        CloseCode::SERVICE_RESTART => Outcome::Retry { why, wait: wait_asked(reason) },
        _ => retry(why),
    }
}

/// The time in `draining; reconnect in N ms`.
fn wait_asked(reason: &str) -> Option<Duration> {
    let ms = reason.split_once("reconnect in ")?.1.split(' ').next()?.parse().ok()?;
    Some(Duration::from_millis(ms))
}

fn print_line(value: &[u8]) -> io::Result<()> {
    let json = envelope::decode(value).ok().map(|record| encode::json(&record).0);
    let line = json.unwrap_or_else(|| {
        format!("{{\"unreadable\":\"not an EventEnvelope: {}\"}}", Counted(value.len(), "byte"))
            .into()
    });
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.write_all(b"\n")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_forms_are_accepted() {
        let url = |text| target(text, "a b", "d&1").map(|target| target.url);
        let query = "?user_id=a%20b&device_id=d%261";
        for text in ["h:1", "ws://h:1", "ws://h:1/", "http://h:1/ws"] {
            assert_eq!(url(text).unwrap(), format!("ws://h:1/ws{query}"), "{text}");
        }
        assert_eq!(url("h").unwrap(), format!("ws://h:80/ws{query}"));
        assert_eq!(url("[::1]:8083").unwrap(), format!("ws://[::1]:8083/ws{query}"));
        assert_eq!(url("h:1/chat/ws").unwrap(), format!("ws://h:1/chat/ws{query}"));
        assert_eq!(url("wss://h:1/ws").unwrap(), format!("wss://h:1/ws{query}"));
        assert_eq!(url("https://h").unwrap(), format!("wss://h:443/ws{query}"));
        assert!(url("quic://h:1/ws").is_err());
        assert!(url("ws://h:1/ws?user_id=x").is_err());
    }

    #[test]
    fn resume_names_the_sequence_below_the_first_hole() {
        let mut received = Received::default();
        let start = Instant::now();
        let mut record = |conversation, sequence, seconds| {
            let sent_at = crate::service::events::timestamp::Timestamp::default();
            let record = crate::app::publish::sent("t", conversation, "u", sequence, "x", sent_at);
            assert!(received.record(&record.value, start + Duration::from_secs(seconds)));
            received.resume_request().replace(r#""cursor":null,"#, "")
        };
        assert_eq!(record("b", 1, 0), r#"{"last_sequences":{"b":1}}"#);
        assert_eq!(record("a", 1, 0), r#"{"last_sequences":{"a":1,"b":1}}"#);
        assert_eq!(record("a", 3, 0), r#"{"last_sequences":{"a":1,"b":1}}"#, "2 may come");
        assert_eq!(record("a", 2, 1), r#"{"last_sequences":{"a":3,"b":1}}"#);
        assert_eq!(record("a", 6, 2), r#"{"last_sequences":{"a":3,"b":1}}"#);
        assert_eq!(record("a", 7, 61), r#"{"last_sequences":{"a":3,"b":1}}"#);
        assert_eq!(record("a", 8, 62), r#"{"last_sequences":{"a":8,"b":1}}"#, "not waited for");
        assert_eq!(received.events, 7);
    }

    #[test]
    fn resume_names_the_last_cursor_and_what_comes_again_is_recognised() {
        let mut received = Received::default();
        let now = Instant::now();
        assert_eq!(received.resume_request(), r#"{"cursor":null,"last_sequences":{}}"#);
        assert!(received.record(b"one", now) && received.record(b"two", now));
        received.text(r#"{"cursor":"AQ"}"#);
        assert!(received.record(b"three", now));
        received.text(r#"{"cursor_expired":"too_old"}"#);
        received.text("something else");
        assert_eq!(received.resume_request(), r#"{"cursor":"AQ","last_sequences":{}}"#);
        assert!(!received.record(b"two", now) && !received.record(b"three", now));
        received.text(r#"{"cursor":"AR"}"#);
        assert!(received.record(b"two", now), "two cursors ago");
        assert_eq!(received.events, 4);
    }

    #[test]
    fn close_code_decides_what_follows() {
        let outcome = |code, reason| match closed(code, reason) {
            Outcome::Retry { wait, .. } => (false, wait),
            Outcome::GiveUp(_) => (true, None),
            Outcome::Done => unreachable!("a close frame was received"),
        };
        assert!(outcome(CloseCode::SESSION_REPLACED, "session_replaced").0);
        assert!(outcome(CloseCode::TOKEN_EXPIRED, "token expired").0);
        assert_eq!(outcome(CloseCode::GOING_AWAY, "server stopping"), (false, None));
        let wait = Some(Duration::from_millis(1500));
        assert_eq!(
            outcome(CloseCode::SERVICE_RESTART, "draining; reconnect in 1500 ms"),
            (false, wait)
        );
    }
}
