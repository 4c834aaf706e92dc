//! Many sessions in one server: what each costs, how fast they come, whether all get what is sent,
//! what a storm and readers that do not read leave behind.

pub(super) mod fleet;
mod heartbeat;
mod hold;
mod memory;
mod node;
mod services;
mod stall;
mod storm;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
pub use services::Presence;

use self::fleet::{Fleet, FleetConfig};
use self::node::Node;
use self::services::Services;
use super::child::Worker;

/// Sessions of one shard on average: its file table, no larger than `RLIMIT_NOFILE`, has to hold
/// the unevenness with which the system spreads connections over the listeners.
const PER_SHARD: usize = 17_900;
/// The server's connection table, no larger than `RLIMIT_NOFILE` lets it be.
const CONNECTIONS_PER_SHARD: usize = 19_600;
/// Until memory that was used for a moment has gone back.
const SETTLE: Duration = Duration::from_secs(5);

/// A run of `bench-scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScaleWork {
    /// Cost, speed and completeness of many sessions, while some reconnect.
    Hold,
    /// What a storm of connects and disconnects leaves behind.
    Storm,
    /// Memory that clients which do not read take.
    Stall,
    /// Latency with heartbeats and without.
    Heartbeat,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct ScalePlan {
    /// What is to be found out.
    pub work: ScaleWork,
    /// Sessions in all.
    pub sessions: usize,
    /// Memory growth is counted from here.
    pub base: usize,
    /// Who is told of sessions.
    pub presence: Presence,
    /// Whether sessions that come again are caught up, by a message and a conversation service.
    pub catch_up: bool,
    /// Connects and disconnects of a storm.
    pub storm: usize,
    /// For how long events are pushed while sessions come and go, s; 0: one event to each only.
    pub push_s: u64,
    /// Events per second meanwhile.
    pub rate: u64,
    /// Sessions that get each event.
    pub group: usize,
    /// Kafka brokers; `None`: one of our own.
    pub brokers: Option<String>,
    /// More settings of the node, `NAME=VALUE`.
    pub settings: Vec<String>,
    /// The folder of the programs of the bench.
    pub programs: PathBuf,
    /// The node's program.
    pub node: PathBuf,
    /// Where the report and the logs go.
    pub output: PathBuf,
}

/// Runs it.
///
/// # Errors
/// A program cannot be started or does not answer, or sessions did not come up.
pub fn run(plan: &ScalePlan) -> io::Result<()> {
    fs::create_dir_all(&plan.output)?;
    let mut report = ScaleReport::default();
    let outcome = match plan.work {
        ScaleWork::Hold => hold::run(plan, &mut report),
        ScaleWork::Storm => storm::run(plan, &mut report),
        ScaleWork::Stall => stall::run(plan, &mut report),
        ScaleWork::Heartbeat => heartbeat::run(plan, &mut report),
    };
    // What was found before it failed is worth keeping.
    let name = format!("{:?}-{}.md", plan.work, plan.sessions).to_lowercase();
    fs::write(plan.output.join(name), &report.text)?;
    println!("{}", report.text);
    outcome
}

/// What was found, as it is found.
#[derive(Debug, Default)]
struct ScaleReport {
    text: String,
}

impl ScaleReport {
    fn note(&mut self, line: &str) {
        eprintln!("{line}");
        let _ = writeln!(self.text, "- {line}");
    }

    fn table(&mut self, columns: &[&str]) {
        let line = format!("\n| {} |\n|{}", columns.join(" | "), " ---: |".repeat(columns.len()));
        eprintln!("{line}");
        let _ = writeln!(self.text, "{line}");
    }

    fn row(&mut self, values: &[f64]) {
        let values: Vec<_> = values.iter().map(|value| format!("{value:.0}")).collect();
        let line = format!("| {} |", values.join(" | "));
        eprintln!("{line}");
        let _ = writeln!(self.text, "{line}");
    }
}

impl ScalePlan {
    fn shards(&self) -> usize {
        self.sessions.div_ceil(PER_SHARD)
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    fn logs(&self) -> &Path {
        &self.output
    }

    /// A real node and what stands around it.
    fn node(&self) -> io::Result<(Services, Node)> {
        let services = Services::start(
            self.logs(),
            &self.program("bench-backend"),
            self.brokers.as_deref(),
            self.presence,
            self.sessions,
        )?;
        let mut settings = vec![
            // A conversation for each session is more than is remembered by default.
            ("MEMBERSHIP_CACHE_MAX", (2 * self.sessions).max(200_000).to_string()),
        ];
        let mode = match self.presence {
            Presence::Redis => "redis",
            Presence::Service => "service",
            Presence::Off => "off",
        };
        settings.push(("PRESENCE_MODE", mode.to_owned()));
        if self.presence == Presence::Service {
            settings.push(("PRESENCE_SVC_ADDR", services.neighbours.clone()));
        }
        if self.catch_up {
            settings.push(("MSG_SVC_ADDR", services.neighbours.clone()));
            settings.push(("CONV_SVC_ADDR", services.neighbours.clone()));
        }
        let more: Vec<(String, String)> = self
            .settings
            .iter()
            .filter_map(|setting| setting.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let node =
            Node::start(self.logs(), &self.node, self.shards(), &services, &settings, &more)?;
        Ok((services, node))
    }

    /// Clients of a node, not connected yet.
    fn clients_of(&self, node: &Node, arguments: Vec<String>) -> Fleet {
        Fleet::new(FleetConfig {
            program: self.program("bench-client"),
            server: node.address.clone(),
            tokens: true,
            arguments,
        })
    }

    /// The parts of a node without Kafka, tokens and presence, for what is to be measured without
    /// them, on core 0; and its clients, on core 1.
    fn parts(&self, shards: usize, arguments: &[String]) -> io::Result<(Worker, Fleet)> {
        let mut command = vec![
            self.program("bench-delivery").display().to_string(),
            format!("--shards={shards}"),
            format!("--connections={CONNECTIONS_PER_SHARD}"),
            "--core=0".to_owned(),
        ];
        command.extend(arguments.iter().cloned());
        let server = Worker::start(&command)?;
        let address = server.expect("ready")?["ready"].as_str().unwrap_or_default().to_owned();
        let fleet = Fleet::new(FleetConfig {
            program: self.program("bench-client"),
            server: address,
            tokens: false,
            arguments: vec!["--core=1".to_owned()],
        });
        Ok((server, fleet))
    }
}
