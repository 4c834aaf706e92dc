//! Cost of a message against the number of sessions: Delivery and the bare ring, at a steady rate and at
//! full speed.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::child::{Worker, number};
use super::plot::{Line, lines};
use super::samples::Summary;
use super::scale::fleet::{Fleet, FleetConfig, PER_CLIENT};
use crate::generator;
use crate::program::beside;
use crate::usage;

/// Sessions of one shard on average; see `PER_SHARD` of `scale`.
const PER_SHARD: usize = 17_000;
/// Connections of one shard: what a file table of `RLIMIT_NOFILE` 20,000 holds.
const CONNECTIONS: usize = 19_700;
/// Messages of one measurement; with more sessions, one each.
const MESSAGES: usize = 200_000;
/// Consecutive messages to a session. After a pause, TCP acknowledges the first 16 segments at once, on
/// the sender's core, and later ones at the client's read, on its own core. All measured messages must
/// be of the first kind, for any number of sessions.
const IN_A_ROW: usize = 15;
/// The pause: longer than the retransmission timeout, 200 ms.
const PAUSE: Duration = Duration::from_secs(1);
const ARRIVAL_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// A rate, and the events that become due together.
struct Pace {
    name: &'static str,
    title: &'static str,
    rate: u64,
    at_once: u64,
}

/// The first is that of the works of `bench-run`.
const PACES: [Pace; 2] = [
    Pace {
        name: "growth",
        title: "64,000 messages a second, in batches of 512",
        rate: 64_000,
        at_once: 512,
    },
    Pace { name: "growth-flood", title: "at full speed", rate: 0, at_once: 1 },
];

/// A server in the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrowthServer {
    /// `bare`: the bare ring with its sockets in file tables. `bare:plain`: with descriptors, whose
    /// number is limited.
    Bare {
        /// Whether the sockets are in file tables.
        park: bool,
    },
    /// `delivery`: as many shards as the sessions need. `delivery:12`: 12 shards.
    Delivery {
        /// The number of shards.
        shards: Option<usize>,
    },
}

impl FromStr for GrowthServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').unwrap_or((text, "")) {
            ("bare", "") => Ok(Self::Bare { park: true }),
            ("bare", "plain") => Ok(Self::Bare { park: false }),
            ("delivery", "") => Ok(Self::Delivery { shards: None }),
            ("delivery", shards) => match shards.parse() {
                Ok(shards @ 1..) => Ok(Self::Delivery { shards: Some(shards) }),
                _ => Err(format!("{shards:?} is not a number of shards")),
            },
            _ => Err(format!("want bare, bare:plain, delivery or delivery:SHARDS, got {text:?}")),
        }
    }
}

impl GrowthServer {
    fn name(self) -> String {
        match self {
            Self::Bare { park: true } => "bare".to_owned(),
            Self::Bare { park: false } => "bare, descriptors".to_owned(),
            Self::Delivery { shards: None } => "delivery".to_owned(),
            Self::Delivery { shards: Some(shards) } => format!("delivery, {shards} shards"),
        }
    }

    fn command(self, plan: &GrowthPlan, sessions: usize) -> Vec<String> {
        let program = |name: &str| beside(name).display().to_string();
        let mut command = match self {
            Self::Bare { park } => {
                let mut command = vec![program("bench-server"), "bare".to_owned()];
                command.push(format!("--capacity={sessions}"));
                command.extend(park.then(|| "--park".to_owned()));
                command
            }
            Self::Delivery { shards } => vec![
                program("bench-delivery"),
                format!("--shards={}", shards.unwrap_or_else(|| sessions.div_ceil(PER_SHARD))),
                format!("--connections={CONNECTIONS}"),
            ],
        };
        command.push(format!("--core={}", plan.server_core));
        command
    }
}

/// Cost of a message against the number of sessions.
#[derive(Clone, Debug, clap::Parser)]
pub struct GrowthPlan {
    /// Servers: bare, bare:plain (with descriptors instead of file tables), delivery,
    /// delivery:SHARDS. Ratios are to the first.
    #[arg(long, value_delimiter = ',', default_value = "bare,delivery")]
    pub servers: Vec<GrowthServer>,
    /// Numbers of sessions; growth is relative to the first.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,50000,200000")]
    pub sessions: Vec<usize>,
    /// Rounds.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Client processes, the same for all numbers, so that the server always has as many to wake. By
    /// default as many as the largest number of sessions needs.
    #[arg(long)]
    pub clients: Option<usize>,
    /// Core of the server.
    #[arg(long, default_value_t = 0)]
    pub server_core: usize,
    /// Core of the clients.
    #[arg(long, default_value_t = 1)]
    pub client_core: usize,
    /// Folder for the tables and the plots.
    #[arg(long, default_value = "results")]
    pub output: PathBuf,
}

/// µs per message by pace, server and number of sessions; one value per round.
type Costs = Vec<Vec<Vec<Vec<f64>>>>;

/// Runs each server at each number of sessions; every second round in reverse order.
///
/// # Errors
/// A program does not start or answer, sessions do not open, or messages are lost.
pub fn run(plan: &GrowthPlan) -> io::Result<()> {
    let empty = vec![vec![Vec::new(); plan.sessions.len()]; plan.servers.len()];
    let mut costs: Costs = vec![empty; PACES.len()];
    for round in 0..plan.rounds {
        let mut order: Vec<(usize, usize)> = (0..plan.sessions.len())
            .flat_map(|at| (0..plan.servers.len()).map(move |server| (at, server)))
            .collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for (at, server) in order {
            let (sessions, contender) = (plan.sessions[at], plan.servers[server]);
            let found = measure(plan, contender, sessions)?;
            eprintln!(
                "round {}: {}, {sessions} sessions: {found:.2?} µs",
                round + 1,
                contender.name()
            );
            for (costs, found) in costs.iter_mut().zip(found) {
                costs[server][at].push(found);
            }
        }
    }
    fs::create_dir_all(&plan.output)?;
    let mut text = String::new();
    for (pace, costs) in PACES.iter().zip(&costs) {
        let _ = writeln!(text, "### One recipient each, {}\n", pace.title);
        table(&mut text, plan, costs);
        let svg = plot(plan, pace, costs);
        fs::write(plan.output.join(format!("{}.svg", pace.name)), svg)?;
    }
    println!("{text}");
    fs::write(plan.output.join("growth.md"), &text)
}

fn table(text: &mut String, plan: &GrowthPlan, costs: &[Vec<Vec<f64>>]) {
    let _ = writeln!(
        text,
        "| server | sessions | CPU per message, µs (least to most) | to that of {} | to {} |\n\
         | --- | ---: | ---: | ---: | ---: |",
        plan.sessions[0],
        plan.servers[0].name()
    );
    for (server, own) in plan.servers.iter().zip(costs) {
        for (at, sessions) in plan.sessions.iter().enumerate() {
            let Summary { median, min, max } = Summary::of(&own[at]);
            let _ = writeln!(
                text,
                "| {} | {sessions} | {median:.2} ({min:.2} to {max:.2}) | **{:.2}** | {:.2} |",
                server.name(),
                median / Summary::of(&own[0]).median,
                median / Summary::of(&costs[0][at]).median,
            );
        }
    }
    let _ = writeln!(text);
}

fn plot(plan: &GrowthPlan, pace: &Pace, costs: &[Vec<Vec<f64>>]) -> String {
    let drawn: Vec<Line> = plan
        .servers
        .iter()
        .zip(costs)
        .map(|(server, own)| Line {
            name: server.name(),
            points: plan
                .sessions
                .iter()
                .zip(own)
                .map(|(sessions, costs)| (*sessions as f64, Summary::of(costs)))
                .collect(),
        })
        .collect();
    let subtitle =
        "CPU µs per message, process and ksoftirqd, against sessions; median, least to most";
    lines(&format!("push, one recipient each, {}", pace.title), subtitle, &drawn)
}

/// µs per message at each pace, of the process and of `ksoftirqd` of its core.
fn measure(plan: &GrowthPlan, contender: GrowthServer, sessions: usize) -> io::Result<Vec<f64>> {
    let mut server = Worker::start(&contender.command(plan, sessions))?;
    let address = server.expect("ready")?["ready"].as_str().unwrap_or_default().to_owned();
    let mut fleet = Fleet::new(FleetConfig {
        program: beside("bench-client"),
        server: address,
        tokens: false,
        arguments: vec![format!("--core={}", plan.client_core)],
    });
    let most = plan.sessions.iter().copied().max().unwrap_or(sessions);
    let clients = plan.clients.unwrap_or_else(|| most.div_ceil(PER_CLIENT));
    fleet.per_process(sessions.div_ceil(clients).min(PER_CLIENT), 0);
    fleet.grow(sessions)?;
    let from = Instant::now();
    while number(&server.ask("sessions", "sessions")?, "sessions") < sessions as f64 {
        if from.elapsed() > ARRIVAL_MAX {
            return Err(io::Error::other("the server does not have all sessions"));
        }
        std::thread::sleep(POLL);
    }
    let used = |server: &Worker| {
        Ok::<_, io::Error>(usage::process_ns(server.id())? + usage::softirq_ns(plan.server_core)?)
    };
    let in_a_row = IN_A_ROW.min(MESSAGES.div_ceil(sessions));
    let events = (in_a_row * sessions) as u64;
    let mut costs = Vec::new();
    for Pace { rate, at_once, .. } in PACES {
        let pushes =
            generator::PushPlan { group: 1, each: 1, burst: 1, events, rate, at_once, bytes: 128 };
        server.ask(&format!("prepare {pushes}"), "prepared")?;
        // Warm-up: one message to every session.
        let once = generator::PushPlan { events: sessions as u64, ..pushes };
        push(&mut server, &mut fleet, once)?;
        let (mut ns, mut messages) = (0, 0);
        while messages < MESSAGES as u64 {
            std::thread::sleep(PAUSE);
            let before = used(&server)?;
            push(&mut server, &mut fleet, pushes)?;
            ns += used(&server)? - before;
            messages += events;
        }
        costs.push(ns as f64 / messages as f64 / 1000.0);
    }
    Ok(costs)
}

/// Pushes a plan and waits until all messages have arrived.
fn push(server: &mut Worker, fleet: &mut Fleet, pushes: generator::PushPlan) -> io::Result<()> {
    fleet.ask("reset", "done")?;
    server.ask(&format!("push {pushes}"), "elapsed_ns")?;
    let seen = fleet.receive(pushes.events as f64)?;
    if seen.messages != pushes.events as f64 || seen.wrong() + seen.closed > 0.0 {
        return Err(io::Error::other(format!("messages lost or wrong: {seen:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_parsed() {
        assert_eq!("bare".parse(), Ok(GrowthServer::Bare { park: true }));
        assert_eq!("delivery:12".parse(), Ok(GrowthServer::Delivery { shards: Some(12) }));
        assert!("delivery:0".parse::<GrowthServer>().is_err());
        assert!("epoll".parse::<GrowthServer>().is_err());
    }
}
