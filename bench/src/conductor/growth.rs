//! What a message costs as the sessions of one server grow in number.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::child::{Worker, number};
use super::samples::Summary;
use crate::generator;
use crate::usage;

/// Sessions of one client process.
const PER_CLIENT: usize = 15_000;
/// Sessions of one shard on average; see `PER_SHARD` of `scale`.
const PER_SHARD: usize = 17_000;
/// Connections of one shard: what a file table of `RLIMIT_NOFILE` 20,000 holds.
const CONNECTIONS: usize = 19_700;
/// Messages of one measurement; more sessions get one each.
const MESSAGES: u64 = 256_000;
/// As the works of `bench-run`.
const RATE: u64 = 64_000;
const AT_ONCE: u64 = 512;
const ARRIVAL_MAX: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(20);

/// What to run.
#[derive(Clone, Debug)]
pub struct GrowthPlan {
    /// Numbers of sessions; ratios are to the first.
    pub sessions: Vec<usize>,
    /// How often each.
    pub rounds: usize,
    /// Shards; `None`: as many as the sessions need.
    pub shards: Option<usize>,
    /// The server's program.
    pub server: PathBuf,
    /// The client's program.
    pub client: PathBuf,
    /// Core of the server.
    pub server_core: usize,
    /// Core of the clients.
    pub client_core: usize,
    /// Where the table goes.
    pub output: PathBuf,
}

/// Runs it, the numbers in turn and then again.
///
/// # Errors
/// A program cannot be started or does not answer, sessions do not come up, messages are lost.
pub fn run(plan: &GrowthPlan) -> io::Result<()> {
    let mut costs = vec![Vec::new(); plan.sessions.len()];
    for round in 0..plan.rounds {
        let mut order: Vec<usize> = (0..plan.sessions.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let cost = measure(plan, plan.sessions[at])?;
            eprintln!("round {}: {} sessions: {cost:.2} µs", round + 1, plan.sessions[at]);
            costs[at].push(cost);
        }
    }
    let text = table(plan, &costs);
    println!("{text}");
    fs::create_dir_all(&plan.output)?;
    let shards = plan.shards.map_or_else(String::new, |shards| format!("-{shards}-shards"));
    fs::write(plan.output.join(format!("growth{shards}.md")), &text)
}

fn shards_of(plan: &GrowthPlan, sessions: usize) -> usize {
    plan.shards.unwrap_or_else(|| sessions.div_ceil(PER_SHARD))
}

fn table(plan: &GrowthPlan, costs: &[Vec<f64>]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| sessions | shards | CPU per message, ratio | µs (least to most) |\n| --- | --- | --- | --- |"
    );
    let first = Summary::of(&costs[0]).median;
    for (sessions, costs) in plan.sessions.iter().zip(costs) {
        let Summary { median, min, max } = Summary::of(costs);
        let _ = writeln!(
            text,
            "| {sessions} | {} | **{:.2}** | {median:.2} ({min:.2} to {max:.2}) |",
            shards_of(plan, *sessions),
            median / first,
        );
    }
    text
}

/// µs per message, of the process and of its core's deferred interrupts.
fn measure(plan: &GrowthPlan, sessions: usize) -> io::Result<f64> {
    let shards = shards_of(plan, sessions);
    let mut server = Worker::start(&[
        plan.server.display().to_string(),
        format!("--shards={shards}"),
        format!("--connections={CONNECTIONS}"),
        format!("--core={}", plan.server_core),
    ])?;
    let address = server.expect("ready")?["ready"].as_str().unwrap_or_default().to_owned();
    let mut clients = Vec::new();
    for first in (0..sessions).step_by(PER_CLIENT) {
        let client = Worker::start(&[
            plan.client.display().to_string(),
            format!("--server={address}"),
            format!("--first={first}"),
            format!("--sessions={}", PER_CLIENT.min(sessions - first)),
            format!("--core={}", plan.client_core),
        ])?;
        let dialed = client.expect("dialed")?;
        if number(&dialed, "failed") > 0.0 {
            return Err(io::Error::other(format!("not all sessions came up: {dialed}")));
        }
        clients.push(client);
    }
    let from = Instant::now();
    while number(&server.ask("sessions", "sessions")?, "sessions") < sessions as f64 {
        if from.elapsed() > ARRIVAL_MAX {
            return Err(io::Error::other("the server does not know all sessions"));
        }
        std::thread::sleep(POLL);
    }
    let events = MESSAGES.max(sessions as u64);
    let pushes =
        generator::Plan { group: 1, burst: 1, events, rate: RATE, at_once: AT_ONCE, bytes: 128 };
    server.ask(&format!("prepare {pushes}"), "prepared")?;
    std::thread::sleep(SETTLE);
    // Every session once: what it then costs is not its first time.
    push(&mut server, &mut clients, generator::Plan { events: sessions as u64, ..pushes })?;
    let used = |server: &Worker| {
        Ok::<_, io::Error>(usage::process_ns(server.id())? + usage::softirq_ns(plan.server_core)?)
    };
    let before = used(&server)?;
    push(&mut server, &mut clients, pushes)?;
    Ok((used(&server)? - before) as f64 / events as f64 / 1000.0)
}

/// Pushes, until all of it has arrived.
fn push(server: &mut Worker, clients: &mut [Worker], pushes: generator::Plan) -> io::Result<()> {
    for client in &mut *clients {
        client.ask("reset", "done")?;
    }
    server.ask(&format!("push {pushes}"), "elapsed_ns")?;
    let from = Instant::now();
    loop {
        let (mut messages, mut wrong) = (0.0, 0.0);
        for client in &mut *clients {
            let report = client.ask("report", "messages")?;
            messages += number(&report, "messages");
            for member in ["gaps", "duplicates", "reordered", "unstamped", "closed"] {
                wrong += number(&report, member);
            }
        }
        if wrong > 0.0 || from.elapsed() > ARRIVAL_MAX {
            let events = pushes.events;
            let why = format!("{messages} of {events} messages came, {wrong} are wrong");
            return Err(io::Error::other(why));
        }
        if messages >= pushes.events as f64 {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
}
