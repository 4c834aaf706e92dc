//! Many sessions in one server: what each costs, how fast they come, whether all get what is sent.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::child::{Worker, number};
use crate::generator;
use crate::usage;

/// Sessions of one client process.
const PER_CLIENT: usize = 15_000;
/// Sessions of one shard on average: its file table, no larger than `RLIMIT_NOFILE`, has to hold
/// the unevenness with which the system spreads connections over the listeners.
const PER_SHARD: usize = 17_000;
/// Memory growth is counted from here.
const BASE: usize = 20_000;
const ARRIVAL_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// What to run.
#[derive(Clone, Debug)]
pub struct ScalePlan {
    /// Sessions in all.
    pub sessions: usize,
    /// Connections of one shard.
    pub connections_per_shard: u32,
    /// For how long events are pushed while sessions come and go, s; 0: one event to each.
    pub push_s: u64,
    /// Events per second meanwhile.
    pub rate: u64,
    /// The server's program.
    pub server: PathBuf,
    /// The client's program.
    pub client: PathBuf,
    /// Where the report goes.
    pub output: PathBuf,
}

struct Field {
    plan: ScalePlan,
    server: Worker,
    address: String,
    clients: Vec<Worker>,
    report: String,
}

/// Runs it.
///
/// # Errors
/// A program cannot be started or does not answer, or sessions did not come up.
pub fn run(plan: &ScalePlan) -> io::Result<()> {
    let shards = plan.sessions.div_ceil(PER_SHARD);
    let server = Worker::start(&[
        plan.server.display().to_string(),
        format!("--shards={shards}"),
        format!("--connections={}", plan.connections_per_shard),
    ])?;
    let address = server.expect("ready")?["ready"].as_str().unwrap_or_default().to_owned();
    let mut field = Field {
        plan: plan.clone(),
        server,
        address,
        clients: Vec::new(),
        report: format!("{} sessions in {shards} shards\n\n", plan.sessions),
    };
    field.measure()?;
    fs::create_dir_all(&plan.output)?;
    fs::write(plan.output.join(format!("scale-{}.md", plan.sessions)), &field.report)?;
    println!("{}", field.report);
    Ok(())
}

#[derive(Clone, Copy)]
struct Memory {
    resident: u64,
    slab: u64,
}

impl Field {
    fn measure(&mut self) -> io::Result<()> {
        let base = BASE.min(self.plan.sessions / 2);
        self.connect_until(base)?;
        let before = self.memory()?;
        let from = Instant::now();
        let (opened, handshakes) = self.connect_until(self.plan.sessions)?;
        let elapsed = from.elapsed().as_secs_f64();
        let after = self.memory()?;
        self.note(&format!("connected {opened} in {elapsed:.1} s: {:.0} a second; slowest handshake {handshakes:.0} ms", opened as f64 / elapsed));
        let grown = (self.plan.sessions - base) as f64;
        self.note(&format!(
            "process memory per session, growth from {base} to {}: {:.0} B",
            self.plan.sessions,
            (after.resident as f64 - before.resident as f64) / grown
        ));
        self.note(&format!(
            "kernel slab per session, both ends on this machine: {:.0} B",
            (after.slab as f64 - before.slab as f64) / grown
        ));
        self.note(&format!("process memory: {} MB", after.resident / 1_000_000));
        self.push_to_all()?;
        if self.plan.push_s > 0 {
            self.push_while_they_come_and_go()?;
        }
        self.leave(before)
    }

    fn note(&mut self, line: &str) {
        eprintln!("{line}");
        let _ = writeln!(self.report, "- {line}");
    }

    fn memory(&self) -> io::Result<Memory> {
        Ok(Memory {
            resident: usage::resident_bytes(self.server.id())?,
            slab: usage::slab_bytes()?,
        })
    }

    fn connected(&self) -> usize {
        self.clients.len() * PER_CLIENT
    }

    /// Two clients connect at a time. Returns how many came up, and the slowest handshake, ms.
    fn connect_until(&mut self, sessions: usize) -> io::Result<(usize, f64)> {
        let (mut opened, mut slowest) = (0, 0.0_f64);
        while self.connected() < sessions {
            let first = self.connected();
            for number in 0..2 {
                let first = first + number * PER_CLIENT;
                if first < self.plan.sessions {
                    let count = PER_CLIENT.min(self.plan.sessions - first);
                    self.clients.push(self.start(first, count)?);
                }
            }
            let new = self.clients.iter().skip(first / PER_CLIENT);
            for client in new {
                let dialed = client.expect("dialed")?;
                if number(&dialed, "failed") > 0.0 {
                    return Err(io::Error::other(format!("not all sessions came up: {dialed}")));
                }
                opened += number(&dialed, "opened") as usize;
                slowest = slowest.max(number(&dialed["handshake_us"], "max") / 1000.0);
            }
        }
        Ok((opened, slowest))
    }

    fn start(&self, first: usize, count: usize) -> io::Result<Worker> {
        Worker::start(&[
            self.plan.client.display().to_string(),
            format!("--server={}", self.address),
            format!("--first={first}"),
            format!("--sessions={count}"),
        ])
    }

    fn received(&mut self) -> io::Result<(f64, f64, f64)> {
        let (mut messages, mut wrong, mut p99) = (0.0, 0.0, 0.0_f64);
        for client in &mut self.clients {
            let report = client.ask("report", "messages")?;
            messages += number(&report, "messages");
            for member in ["gaps", "duplicates", "reordered", "unstamped"] {
                wrong += number(&report, member);
            }
            p99 = p99.max(number(&report["latency_us"], "p99"));
        }
        Ok((messages, wrong, p99))
    }

    fn push_to_all(&mut self) -> io::Result<()> {
        let events = self.plan.sessions as u64;
        let one_each = generator::Plan { group: 1, burst: 1, events, rate: 0, bytes: 128 };
        self.server.ask(&format!("prepare {one_each}"), "prepared")?;
        std::thread::sleep(Duration::from_secs(1));
        for client in &mut self.clients {
            client.ask("reset", "done")?;
        }
        let cpu = usage::process_ns(self.server.id())?;
        let pushed = self.server.ask(&format!("push {one_each}"), "elapsed_ns")?;
        let from = Instant::now();
        let (messages, wrong, _) = loop {
            let seen = self.received()?;
            if seen.0 >= events as f64 || from.elapsed() > ARRIVAL_MAX {
                break seen;
            }
            std::thread::sleep(POLL);
        };
        let cpu = usage::process_ns(self.server.id())? - cpu;
        self.note(&format!(
            "one event to each: {messages} of {events} received, {wrong} wrong, in {:.1} s; {:.2} µs of the process each",
            number(&pushed, "elapsed_ns") / 1e9,
            cpu as f64 / events as f64 / 1000.0
        ));
        Ok(())
    }

    /// One per cent reconnects every ten seconds.
    fn push_while_they_come_and_go(&mut self) -> io::Result<()> {
        let (rate, seconds) = (self.plan.rate, self.plan.push_s);
        let plan = generator::Plan { group: 1, burst: 1, events: rate * seconds, rate, bytes: 128 };
        for client in &mut self.clients {
            client.ask("reset", "done")?;
        }
        self.server.tell(&format!("push {plan}"))?;
        let (mut churned, mut failed) = (0.0, 0.0);
        for _ in 0..seconds / 10 {
            let from = Instant::now();
            for client in &mut self.clients {
                client.tell(&format!("churn {}", PER_CLIENT / 100))?;
            }
            for client in &self.clients {
                let dialed = client.expect("dialed")?;
                churned += number(&dialed, "opened");
                failed += number(&dialed, "failed");
            }
            std::thread::sleep(Duration::from_secs(10).saturating_sub(from.elapsed()));
        }
        self.server.expect("elapsed_ns")?;
        std::thread::sleep(Duration::from_secs(2));
        let (messages, wrong, p99) = self.received()?;
        self.note(&format!(
            "{rate} events a second for {seconds} s while 1 % reconnect every 10 s ({churned} did, {failed} failed): {messages} of {} received (what was for a session that was away is not caught up here), {wrong} wrong, p99 {p99:.0} µs",
            plan.events
        ));
        Ok(())
    }

    fn leave(&mut self, before: Memory) -> io::Result<()> {
        self.clients.clear();
        let from = Instant::now();
        while number(&self.server.ask("sessions", "sessions")?, "sessions") > 0.0 {
            if from.elapsed() > ARRIVAL_MAX {
                return Err(io::Error::other("sessions stay although their clients are gone"));
            }
            std::thread::sleep(POLL);
        }
        std::thread::sleep(Duration::from_secs(2));
        let resident = self.memory()?.resident / 1_000_000;
        self.note(&format!(
            "process memory when all have left: {resident} MB ({} MB with {BASE} sessions before)",
            before.resident / 1_000_000
        ));
        Ok(())
    }
}
