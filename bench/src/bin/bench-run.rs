//! The conductor; `bench/run` builds everything and calls it.

use std::path::PathBuf;

use clap::Parser;
use delivery_bench::conductor::{Comparison, Contender, Role, WORKS, run};

#[derive(Parser)]
struct Arguments {
    /// Servers, in the order of the table: bare, epoll, tokio, tokio-defaults, tokio-uring, delivery,
    /// kafka, or NAME=COMMAND, a build of bench-delivery.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bare,epoll,tokio,tokio-defaults,tokio-uring,delivery,kafka"
    )]
    servers: Vec<String>,
    /// Works: push, groups, burst, flood, latency, slow, json, kib, deflate, echo.
    #[arg(long, value_delimiter = ',')]
    works: Vec<String>,
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Sessions.
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// Core of the server.
    #[arg(long, default_value_t = 0)]
    server_core: usize,
    /// Core of the client.
    #[arg(long, default_value_t = 1)]
    client_core: usize,
    /// Let the client poll for messages, so that the server does not pay for waking it. Its core must
    /// not be used for anything else.
    #[arg(long)]
    client_never_sleeps: bool,
    /// Folder for the table and the plots.
    #[arg(long, default_value = "results")]
    output: PathBuf,
    /// Record the server's core with perf during each work, into this folder; see bench-flame.
    #[arg(long)]
    profile: Option<PathBuf>,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let here = std::env::current_exe()?;
    let beside = |name: &str| here.with_file_name(name).display().to_string();
    let contender = |name: &String| {
        let (name, role, command) = match name.split_once('=') {
            Some((name, command)) => {
                (name, Role::Delivery, command.split_whitespace().map(str::to_owned).collect())
            }
            None if name == "delivery" => {
                (name.as_str(), Role::Delivery, vec![beside("bench-delivery")])
            }
            None if name == "kafka" => (name.as_str(), Role::Kafka, vec![beside("bench-kafka")]),
            None => (name.as_str(), Role::Other, vec![beside("bench-server"), name.clone()]),
        };
        Contender { name: name.to_owned(), role, command }
    };
    let works = WORKS
        .into_iter()
        .filter(|work| arguments.works.is_empty() || arguments.works.iter().any(|w| w == work.name))
        .collect();
    run(&Comparison {
        contenders: arguments.servers.iter().map(contender).collect(),
        works,
        rounds: arguments.rounds,
        sessions: arguments.sessions,
        client: beside("bench-client").into(),
        server_core: arguments.server_core,
        client_core: arguments.client_core,
        client_never_sleeps: arguments.client_never_sleeps,
        output: arguments.output,
        profile: arguments.profile,
    })
}
