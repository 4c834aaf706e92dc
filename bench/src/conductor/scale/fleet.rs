//! The client processes.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::memory;
use super::node::{TOKEN_AUDIENCE, TOKEN_ISSUER, TOKEN_SECRET};
use crate::conductor::child::{Worker, number};
use crate::latency::Latencies;

/// Sessions of one process.
pub(in crate::conductor) const PER_CLIENT: usize = 15_000;
/// Processes that connect at the same time; each has several hundred handshakes in flight.
const DIALING: usize = 2;
const ARRIVAL_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// How the clients are started.
#[derive(Clone, Debug)]
pub(in crate::conductor) struct FleetConfig {
    pub(in crate::conductor) program: PathBuf,
    pub(in crate::conductor) server: String,
    /// Whether the sessions have tokens.
    pub(in crate::conductor) tokens: bool,
    /// More arguments.
    pub(in crate::conductor) arguments: Vec<String>,
}

/// The running client processes. Stopped when dropped.
pub(in crate::conductor) struct Fleet {
    config: FleetConfig,
    clients: Vec<Worker>,
    sessions: usize,
    /// Sessions of one process, and the number of the first of all.
    per_process: usize,
    first: usize,
}

/// Result of connecting.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::conductor) struct FleetDialed {
    pub(in crate::conductor) opened: f64,
    pub(in crate::conductor) failed: f64,
    pub(in crate::conductor) seconds: f64,
    /// Maximum over the processes, ms.
    pub(in crate::conductor) p99_ms: f64,
    pub(in crate::conductor) max_ms: f64,
}

/// Counts of all clients since the last reset.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(in crate::conductor) struct Received {
    pub(in crate::conductor) open: f64,
    pub(in crate::conductor) messages: f64,
    pub(in crate::conductor) gaps: f64,
    pub(in crate::conductor) duplicates: f64,
    pub(in crate::conductor) reordered: f64,
    pub(in crate::conductor) unstamped: f64,
    /// Of sessions with several conversations: messages that continue their conversation, and those that they
    /// had already.
    pub(in crate::conductor) distinct: f64,
    pub(in crate::conductor) repeated: f64,
    pub(in crate::conductor) cursors: f64,
    pub(in crate::conductor) expired: f64,
    pub(in crate::conductor) closed: f64,
    pub(in crate::conductor) refused: f64,
    pub(in crate::conductor) pings: f64,
}

impl Received {
    /// Messages lost, duplicated, out of order or without a stamp.
    pub(in crate::conductor) fn wrong(&self) -> f64 {
        self.gaps + self.duplicates + self.reordered + self.unstamped
    }
}

impl Fleet {
    pub(in crate::conductor) fn new(config: FleetConfig) -> Self {
        Self { config, clients: Vec::new(), sessions: 0, per_process: PER_CLIENT, first: 0 }
    }

    /// Sets the sessions per process from now on, and the number of the first session.
    pub(in crate::conductor) fn per_process(&mut self, sessions: usize, first: usize) {
        (self.per_process, self.first) = (sessions, first);
    }

    pub(in crate::conductor) fn sessions(&self) -> usize {
        self.sessions
    }

    /// Connects until there are this many sessions.
    pub(in crate::conductor) fn grow(&mut self, sessions: usize) -> io::Result<FleetDialed> {
        self.grow_seen(sessions, || Ok(()))
    }

    /// The same; `seen` is called whenever a process has all its sessions.
    pub(in crate::conductor) fn grow_seen(
        &mut self,
        sessions: usize,
        mut seen: impl FnMut() -> io::Result<()>,
    ) -> io::Result<FleetDialed> {
        let from = Instant::now();
        let mut all = FleetDialed::default();
        let mut dialing = self.clients.len();
        while self.sessions < sessions || dialing < self.clients.len() {
            while self.sessions < sessions && self.clients.len() - dialing < DIALING {
                memory::watch()?;
                let count = self.per_process.min(sessions - self.sessions);
                self.clients.push(self.start(self.sessions, count)?);
                self.sessions += count;
            }
            let dialed = self.clients[dialing].expect("dialed")?;
            dialing += 1;
            all.add(&dialed);
            seen()?;
        }
        all.seconds = from.elapsed().as_secs_f64();
        if all.failed > 0.0 {
            return Err(io::Error::other(format!("{} sessions did not open", all.failed)));
        }
        Ok(all)
    }

    fn start(&self, first: usize, count: usize) -> io::Result<Worker> {
        let mut command = vec![
            self.config.program.display().to_string(),
            format!("--server={}", self.config.server),
            format!("--first={}", self.first + first),
            format!("--sessions={count}"),
        ];
        if self.config.tokens {
            command.push(format!("--token-secret={TOKEN_SECRET}"));
            command.push(format!("--token-issuer={TOKEN_ISSUER}"));
            command.push(format!("--token-audience={TOKEN_AUDIENCE}"));
        }
        command.extend(self.config.arguments.iter().cloned());
        Worker::start(&command)
    }

    /// Sends a word to all clients and waits for answers with this member.
    pub(in crate::conductor) fn ask(&mut self, word: &str, member: &str) -> io::Result<Vec<Value>> {
        self.tell(word)?;
        self.clients.iter().map(|client| client.expect(member)).collect()
    }

    pub(in crate::conductor) fn tell(&mut self, word: &str) -> io::Result<()> {
        self.clients.iter_mut().try_for_each(|client| client.tell(word))
    }

    pub(in crate::conductor) fn expect_within(
        &self,
        member: &str,
        limit: Duration,
    ) -> io::Result<Vec<Value>> {
        self.clients.iter().map(|client| client.expect_within(member, limit)).collect()
    }

    /// Reconnects one in `one_in` sessions of each process.
    pub(in crate::conductor) fn churn(&mut self, one_in: usize) -> io::Result<FleetDialed> {
        let from = Instant::now();
        let mut all = FleetDialed::default();
        for dialed in self.ask(&format!("churn {}", self.per_process / one_in), "dialed")? {
            all.add(&dialed);
        }
        all.seconds = from.elapsed().as_secs_f64();
        Ok(all)
    }

    /// Connects the sessions that are down to this server, `rate` per second in all.
    pub(in crate::conductor) fn come_back(
        &mut self,
        server: &str,
        rate: u64,
    ) -> io::Result<FleetDialed> {
        let from = Instant::now();
        let rate = rate / self.clients.len().max(1) as u64;
        let mut all = FleetDialed::default();
        for dialed in self.ask(&format!("return {server} {rate}"), "dialed")? {
            all.add(&dialed);
        }
        all.seconds = from.elapsed().as_secs_f64();
        Ok(all)
    }

    pub(in crate::conductor) fn received(&mut self) -> io::Result<Received> {
        let mut all = Received::default();
        for report in self.ask("report", "messages")? {
            all.open += number(&report, "open");
            all.messages += number(&report, "messages");
            all.gaps += number(&report, "gaps");
            all.duplicates += number(&report, "duplicates");
            all.reordered += number(&report, "reordered");
            all.unstamped += number(&report, "unstamped");
            all.distinct += number(&report, "distinct");
            all.repeated += number(&report, "repeated");
            all.cursors += number(&report, "cursors");
            all.expired += number(&report, "expired");
            all.closed += number(&report, "closed");
            all.refused += number(&report, "refused");
            all.pings += number(&report, "pings");
        }
        Ok(all)
    }

    /// Waits until the clients have this many messages, or nothing more arrives.
    pub(in crate::conductor) fn receive(&mut self, messages: f64) -> io::Result<Received> {
        self.receive_until(|seen| seen.messages >= messages)
    }

    /// The same for messages that are not repeated.
    pub(in crate::conductor) fn receive_distinct(&mut self, messages: f64) -> io::Result<Received> {
        self.receive_until(|seen| seen.distinct >= messages)
    }

    fn receive_until(&mut self, is_all: impl Fn(&Received) -> bool) -> io::Result<Received> {
        let mut last = Received::default();
        let mut since = Instant::now();
        loop {
            let seen = self.received()?;
            if is_all(&seen) || since.elapsed() > ARRIVAL_MAX {
                return Ok(seen);
            }
            if seen.messages > last.messages {
                (last, since) = (seen, Instant::now());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Latencies of all clients.
    pub(in crate::conductor) fn latency(&mut self) -> io::Result<Latencies> {
        let mut all = Latencies::default();
        for answer in self.ask("latency", "latency")? {
            let one: Latencies = serde_json::from_value(answer["latency"].clone())?;
            all.add(&one);
        }
        Ok(all)
    }

    /// Stops all clients at once.
    pub(in crate::conductor) fn leave(&mut self) -> io::Result<()> {
        self.tell("quit")?;
        self.clients.clear();
        self.sessions = 0;
        Ok(())
    }
}

impl FleetDialed {
    fn add(&mut self, answer: &Value) {
        self.opened += number(answer, "opened");
        self.failed += number(answer, "failed");
        self.p99_ms = self.p99_ms.max(number(&answer["handshake_us"], "p99") / 1000.0);
        self.max_ms = self.max_ms.max(number(&answer["handshake_us"], "max") / 1000.0);
    }
}
