//! The upgrade request of a session.

use std::net::SocketAddr;

use serde::Serialize;

use crate::generator::conversation;
use crate::names;
use crate::payload::conversation_id;

/// What the client is to be.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The server.
    pub server: SocketAddr,
    /// Number of the first session: processes side by side take different ones.
    pub first: usize,
    /// Sessions.
    pub sessions: usize,
    /// `/ws` or `/echo`.
    pub path: String,
    /// Connections per second; 0: as fast as they go.
    pub connect_rate: u64,
    /// Sent as the first message of a session; empty: none.
    pub hello: String,
    /// A session that connects again says which sequence it has of its conversation, if it has one
    /// (there is one conversation for so many sessions); 0: it says [`ClientConfig::hello`] again.
    pub resume_group: usize,
    /// `SO_RCVBUF` of each socket, bytes; 0: the system's.
    pub receive_buffer_bytes: usize,
    /// `Sec-WebSocket-Protocol`, if any.
    pub protocol: Option<String>,
    /// Offer permessage-deflate.
    pub deflate: bool,
    /// Secret of the HS256 tokens to carry.
    pub token_secret: Option<String>,
    /// `iss` and `aud` of the tokens.
    pub token_issuer: Option<String>,
    /// See [`ClientConfig::token_issuer`].
    pub token_audience: Option<String>,
    /// Look for messages again and again instead of being woken for them: on loopback it is the
    /// sender who pays for waking the receiver.
    pub never_sleep: bool,
}

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    exp: u64,
    iat: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'a str>,
}

/// The upgrade request of session `number`.
pub(super) fn upgrade_request(config: &ClientConfig, number: usize) -> Vec<u8> {
    let user = names::user(number);
    let mut request = format!(
        "GET {}?user_id={user}&device_id={} HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Version: 13\r\n",
        config.path,
        names::device(number),
        config.server,
    );
    if let Some(protocol) = &config.protocol {
        request += &format!("Sec-WebSocket-Protocol: {protocol}\r\n");
    }
    if config.deflate {
        request += "Sec-WebSocket-Extensions: permessage-deflate; \
                        server_no_context_takeover; client_no_context_takeover\r\n";
    }
    if let Some(secret) = &config.token_secret {
        request += &format!("Authorization: Bearer {}\r\n", token(config, &user, secret));
    }
    request += "\r\n";
    request.into_bytes()
}

/// The first message of session `number`, which has received up to `mark` of its conversation.
pub(super) fn hello(config: &ClientConfig, number: usize, mark: u32) -> String {
    if config.resume_group == 0 || mark == 0 {
        return config.hello.clone();
    }
    let conversation = conversation(config.resume_group, number / config.resume_group);
    format!(r#"{{"last_sequences":{{"{}":{mark}}}}}"#, conversation_id(conversation))
}

fn token(config: &ClientConfig, user: &str, secret: &str) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let claims = Claims {
        sub: user,
        iat: now,
        exp: now + 24 * 3600,
        iss: config.token_issuer.as_deref(),
        aud: config.token_audience.as_deref(),
    };
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)
        .expect("plain claims under HS256")
}
