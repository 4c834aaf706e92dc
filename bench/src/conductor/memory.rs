//! Memory of idle sessions of a server: the growth of its resident memory, divided by the sessions.
//!
//! The server is a program that answers as `bench-delivery` does. With `--proxy` a program in front of it takes the
//! connections, and the memory of both counts.

use std::io;
use std::time::{Duration, Instant};

use super::child::{Worker, number};
use crate::program::beside;
use crate::usage::resident_bytes;

/// Sessions of one client process: fewer than it may have descriptors.
const PER_CLIENT: usize = 16_000;
/// For the server to free what handshakes needed.
const SETTLE: Duration = Duration::from_secs(3);

/// What is measured.
#[derive(Clone, Debug, clap::Parser)]
pub struct MemoryPlan {
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

/// Connects, measures, and prints the result.
///
/// # Errors
/// A process cannot be started, or not all sessions open.
pub fn run(plan: &MemoryPlan) -> io::Result<()> {
    let command: Vec<String> = plan.server.split_whitespace().map(str::to_owned).collect();
    let server = Worker::start(&command)?;
    let ready = server.expect("ready")?;
    let server_pid = number(&ready, "pid") as u32;
    let own = ready["ready"].as_str().unwrap_or_default().to_owned();
    let address = plan.address.clone().unwrap_or(own);
    let memory = || -> io::Result<u64> {
        plan.proxy.iter().chain([&server_pid]).map(|pid| resident_bytes(*pid)).sum()
    };
    let connect = |first: usize, sessions: usize| -> io::Result<Worker> {
        let mut command = vec![
            beside("bench-client").display().to_string(),
            format!("--server={address}"),
            format!("--first={first}"),
            format!("--sessions={sessions}"),
            format!("--core={}", plan.client_core),
            "--receive-buffer-bytes=4096".to_owned(),
        ];
        command.extend(plan.tls.then(|| "--tls".to_owned()));
        let client = Worker::start(&command)?;
        let dialed = client.expect("dialed")?;
        if number(&dialed, "failed") > 0.0 {
            return Err(io::Error::other(format!("not all sessions opened: {dialed}")));
        }
        Ok(client)
    };
    let _first = connect(0, plan.before)?;
    std::thread::sleep(SETTLE);
    let before = memory()?;
    let begun = Instant::now();
    let mut clients = Vec::new();
    let end = plan.before + plan.sessions;
    for first in (plan.before..end).step_by(PER_CLIENT) {
        clients.push(connect(first, PER_CLIENT.min(end - first))?);
    }
    let connected = begun.elapsed();
    std::thread::sleep(SETTLE);
    let grown = memory()?.saturating_sub(before);
    println!(
        "{} sessions in {:.1} s: {:.0} bytes each ({} MiB in all)",
        plan.sessions,
        connected.as_secs_f64(),
        grown as f64 / plan.sessions as f64,
        grown >> 20,
    );
    Ok(())
}
