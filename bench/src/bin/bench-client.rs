//! Holds sessions and counts what they get; see `delivery_bench::client`.

use std::net::SocketAddr;

use clap::Parser;
use delivery_bench::client::{Client, ClientConfig};
use delivery_bench::usage;

#[derive(Parser)]
struct Arguments {
    /// The server.
    #[arg(long)]
    server: SocketAddr,
    /// Number of the first session.
    #[arg(long, default_value_t = 0)]
    first: usize,
    /// Sessions of this process.
    #[arg(long, default_value_t = 1000)]
    sessions: usize,
    /// Path of the upgrade request.
    #[arg(long, default_value = "/ws")]
    path: String,
    /// Connections per second; 0: as fast as they go.
    #[arg(long, default_value_t = 0)]
    connect_rate: u64,
    /// First message of a session; empty: none.
    #[arg(long, default_value = r#"{"last_sequences":{}}"#)]
    hello: String,
    /// A session that connects again resumes from the last sequence it has of its conversation, of
    /// which there is one for so many sessions; 0: it sends the hello again.
    #[arg(long, default_value_t = 0)]
    resume_group: usize,
    /// SO_RCVBUF of each socket, bytes; 0: the system's.
    #[arg(long, default_value_t = 0)]
    receive_buffer_bytes: usize,
    /// Subprotocol to ask for.
    #[arg(long)]
    protocol: Option<String>,
    /// Offer permessage-deflate.
    #[arg(long)]
    deflate: bool,
    /// Secret of HS256 tokens to carry.
    #[arg(long)]
    token_secret: Option<String>,
    /// Issuer of the tokens.
    #[arg(long)]
    token_issuer: Option<String>,
    /// Audience of the tokens.
    #[arg(long)]
    token_audience: Option<String>,
    /// Core to run on.
    #[arg(long)]
    core: Option<usize>,
    /// Look for messages again and again instead of being woken for them.
    #[arg(long)]
    never_sleep: bool,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    if let Some(core) = arguments.core {
        usage::pin(core)?;
    }
    Client::new(ClientConfig {
        server: arguments.server,
        first: arguments.first,
        sessions: arguments.sessions,
        path: arguments.path,
        connect_rate: arguments.connect_rate,
        hello: arguments.hello,
        resume_group: arguments.resume_group,
        receive_buffer_bytes: arguments.receive_buffer_bytes,
        protocol: arguments.protocol,
        deflate: arguments.deflate,
        token_secret: arguments.token_secret,
        token_issuer: arguments.token_issuer,
        token_audience: arguments.token_audience,
        never_sleep: arguments.never_sleep,
    })?
    .run()
}
