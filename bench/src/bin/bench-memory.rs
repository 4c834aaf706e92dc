//! Memory of idle sessions of a server: the growth of its resident memory, divided by the sessions.
//!
//! The server is a program that answers as `bench-delivery` does. With `--proxy` a program in front of it takes the
//! connections, and the memory of both counts.

use std::io;
use std::time::{Duration, Instant};

use clap::Parser;
use delivery_bench::conductor::{Worker, number};
use delivery_bench::program::beside;
use delivery_bench::usage::resident_bytes;

/// Sessions of one client process: fewer than it may have descriptors.
const PER_CLIENT: usize = 16_000;
/// For the server to free what handshakes needed.
const SETTLE: Duration = Duration::from_secs(3);

#[derive(Parser)]
struct Arguments {
    /// The server's command.
    #[arg(long)]
    server: String,
    /// Sessions.
    #[arg(long, default_value_t = 16_000)]
    sessions: usize,
    /// Sessions before the first measurement: what the first ones allocate for all is not theirs.
    #[arg(long, default_value_t = 1_000)]
    before: usize,
    /// Clients speak TLS.
    #[arg(long)]
    tls: bool,
    /// Address to connect to instead of the server's: that of a proxy.
    #[arg(long)]
    address: Option<String>,
    /// Processes of the proxy, whose memory is added.
    #[arg(long, value_delimiter = ',')]
    proxy: Vec<u32>,
    /// Core of the clients.
    #[arg(long, default_value_t = 1)]
    client_core: usize,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let command: Vec<String> = arguments.server.split_whitespace().map(str::to_owned).collect();
    let server = Worker::start(&command)?;
    let ready = server.expect("ready")?;
    let server_pid = number(&ready, "pid") as u32;
    let own = ready["ready"].as_str().unwrap_or_default().to_owned();
    let address = arguments.address.clone().unwrap_or(own);
    let memory = || -> io::Result<u64> {
        arguments.proxy.iter().chain([&server_pid]).map(|pid| resident_bytes(*pid)).sum()
    };
    let connect = |first: usize, sessions: usize| -> io::Result<Worker> {
        let mut command = vec![
            beside("bench-client").display().to_string(),
            format!("--server={address}"),
            format!("--first={first}"),
            format!("--sessions={sessions}"),
            format!("--core={}", arguments.client_core),
            "--receive-buffer-bytes=4096".to_owned(),
        ];
        command.extend(arguments.tls.then(|| "--tls".to_owned()));
        let client = Worker::start(&command)?;
        let dialed = client.expect("dialed")?;
        if number(&dialed, "failed") > 0.0 {
            return Err(io::Error::other(format!("not all sessions opened: {dialed}")));
        }
        Ok(client)
    };
    let _first = connect(0, arguments.before)?;
    std::thread::sleep(SETTLE);
    let before = memory()?;
    let begun = Instant::now();
    let mut clients = Vec::new();
    let end = arguments.before + arguments.sessions;
    for first in (arguments.before..end).step_by(PER_CLIENT) {
        clients.push(connect(first, PER_CLIENT.min(end - first))?);
    }
    let connected = begun.elapsed();
    std::thread::sleep(SETTLE);
    let grown = memory()?.saturating_sub(before);
    println!(
        "{} sessions in {:.1} s: {:.0} bytes each ({} MiB in all)",
        arguments.sessions,
        connected.as_secs_f64(),
        grown as f64 / arguments.sessions as f64,
        grown >> 20,
    );
    Ok(())
}
