//! The upgrade request of a session.

use std::net::SocketAddr;

use delivery_testkit::token::sign_hs256;
use serde_json::json;

use crate::generator::conversation;
use crate::names;
use crate::payload::conversation_id;

const TOKEN_LIFETIME_S: u64 = 24 * 3600;

/// Configuration of a load client.
#[derive(Clone, Debug, clap::Args)]
pub struct ClientConfig {
    /// The server.
    #[arg(long)]
    pub server: SocketAddr,
    /// Number of the first session; parallel processes use different ranges.
    #[arg(long, default_value_t = 0)]
    pub first: usize,
    /// Sessions of this process.
    #[arg(long, default_value_t = 1000)]
    pub sessions: usize,
    /// Path of the upgrade request: `/ws` or `/echo`.
    #[arg(long, default_value = "/ws")]
    pub path: String,
    /// Connections per second; 0: no limit.
    #[arg(long, default_value_t = 0)]
    pub connect_rate: u64,
    /// First message of a session; empty: none.
    #[arg(long, default_value = r#"{"last_sequences":{}}"#)]
    pub hello: String,
    /// Sessions per conversation: a session that reconnects sends the last sequence that it has of its
    /// conversation. 0: it sends the hello again.
    #[arg(long, default_value_t = 0)]
    pub resume_group: usize,
    /// Conversations of each group of `resume_group` sessions. More than one: a session always names what it has
    /// of each conversation.
    #[arg(long, default_value_t = 1)]
    pub resume_each: usize,
    /// Ask for cursors, and come back with the last one (sessions with several conversations).
    #[arg(long)]
    pub cursors: bool,
    /// `SO_RCVBUF` of each socket, bytes; 0: the system's default.
    #[arg(long, default_value_t = 0)]
    pub receive_buffer_bytes: usize,
    /// `Sec-WebSocket-Protocol`, if any.
    #[arg(long)]
    pub protocol: Option<String>,
    /// Offer permessage-deflate.
    #[arg(long)]
    pub deflate: bool,
    /// Key of the HS256 tokens; without it, no tokens.
    #[arg(long)]
    pub token_secret: Option<String>,
    /// Issuer of the tokens.
    #[arg(long)]
    pub token_issuer: Option<String>,
    /// Audience of the tokens.
    #[arg(long)]
    pub token_audience: Option<String>,
    /// Speak TLS.
    #[arg(long)]
    pub tls: bool,
    /// Poll for messages instead of sleeping: on loopback the sender pays for waking the receiver.
    #[arg(long)]
    pub never_sleep: bool,
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

/// The first message of session `number`, which has received its conversation up to `mark`.
pub(super) fn hello(config: &ClientConfig, number: usize, mark: u32) -> String {
    if config.resume_group == 0 || mark == 0 {
        return config.hello.clone();
    }
    let conversation = conversation(config.resume_group, number / config.resume_group);
    format!(r#"{{"last_sequences":{{"{}":{mark}}}}}"#, conversation_id(conversation))
}

fn token(config: &ClientConfig, user: &str, secret: &str) -> String {
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let mut claims = json!({ "sub": user, "iat": now, "exp": now + TOKEN_LIFETIME_S });
    for (name, value) in [("iss", &config.token_issuer), ("aud", &config.token_audience)] {
        if let Some(value) = value {
            claims[name] = value.as_str().into();
        }
    }
    sign_hs256(&claims, secret)
}
