//! One round of one server: connects the sessions and does every work.

use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::child::{Worker, number};
use super::samples::{Metric, Samples};
use super::work::{Task, Wire, Work};
use super::{Comparison, Contender, Role};
use crate::generator;
use crate::journey::{self, Arrival, Durations, Part, Passage, Quantile};
use crate::latency::Latencies;
use crate::program::beside;
use crate::usage;

/// Limit for messages in flight.
const ARRIVAL_MAX: Duration = Duration::from_secs(20);
/// Pause before a work. Earlier messages have arrived, and TCP treats the connection as idle (RTO, 200
/// ms or slightly more): see `MESSAGES` of the works.
const SETTLE: Duration = Duration::from_millis(1000);
const POLL: Duration = Duration::from_millis(20);
/// Seconds of warm-up for a broker.
const BROKER_WARM_S: u64 = 20;

/// A running `perf record`, stopped when dropped.
struct Recording(Child);

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(pid) = usage::pid_of(self.0.id()) {
            // It writes the rest and exits. It may have exited already.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.0.wait();
    }
}

struct TrialNode {
    address: String,
    /// The process whose processor time counts.
    pid: u32,
}

impl TrialNode {
    fn of(ready: &Value) -> Self {
        let address = ready["ready"].as_str().unwrap_or_default().to_owned();
        Self { address, pid: number(ready, "pid") as u32 }
    }
}

/// A running server.
struct Trial<'a> {
    plan: &'a Comparison,
    server: Worker,
    /// Its nodes: one, or two of a cluster.
    nodes: Vec<TrialNode>,
    role: Role,
    speaks_tls: bool,
}

pub(super) fn run(
    plan: &Comparison,
    contender: &Contender,
    samples: &mut Samples,
) -> io::Result<()> {
    let mut command = contender.command.clone();
    command.extend(["--core".into(), plan.server_core.to_string()]);
    if contender.role != Role::Other {
        command.extend(["--own-core".into(), plan.client_core.to_string()]);
    }
    let server = Worker::start(&command)?;
    let ready = server.expect("ready")?;
    let nodes =
        [Some(&ready), ready.get("other")].into_iter().flatten().map(TrialNode::of).collect();
    let mut trial = Trial {
        plan,
        server,
        nodes,
        role: contender.role,
        speaks_tls: contender.command.iter().any(|it| it == "--tls"),
    };
    let works: Vec<&Work> = plan.works.iter().filter(|work| work.suits(contender.role)).collect();
    for wire in Wire::ALL {
        let pushes: Vec<_> = works
            .iter()
            .filter(|work| work.wire == wire)
            .filter_map(|work| match work.task {
                Task::Push(pushes) | Task::HandOff(pushes) => Some((work.name, pushes)),
                Task::Echo { .. } => None,
            })
            .collect();
        if pushes.is_empty() {
            continue;
        }
        let mut clients = trial.connect("/ws", r#"{"last_sequences":{}}"#, wire)?;
        trial.settle(plan.sessions * clients.len())?;
        for (name, pushes) in pushes {
            trial.push(&mut clients, warm_up(pushes, contender.role))?;
            let recording = trial.recording(name, contender)?;
            let outcome = trial.push(&mut clients, pushes)?;
            drop(recording);
            outcome.record(name, contender, samples);
        }
        drop(clients);
        trial.settle(0)?;
    }
    for work in works {
        let Task::Echo { window, bytes, ms } = work.task else { continue };
        let mut clients = trial.connect("/echo", "", work.wire)?;
        let client = &mut clients[0];
        trial.echo(client, (window, bytes, ms / 10))?;
        let recording = trial.recording(work.name, contender)?;
        let outcome = trial.echo(client, (window, bytes, ms))?;
        drop(recording);
        outcome.record(work.name, contender, samples);
    }
    Ok(())
}

/// The plan pushed before a measurement, to warm up caches, queues and kernel buffers. A broker is a JVM
/// that compiles hot code, on the core that it shares with the client and the producer; meanwhile a
/// single event can wait for seconds.
fn warm_up(pushes: generator::PushPlan, role: Role) -> generator::PushPlan {
    let events = match role {
        Role::Kafka | Role::Cluster if pushes.is_one_by_one() => pushes.rate * BROKER_WARM_S,
        Role::Kafka | Role::Cluster | Role::Delivery | Role::Other => pushes.events / 10,
    };
    generator::PushPlan { events, ..pushes }
}

struct Outcome {
    messages: f64,
    process_ns: f64,
    softirq_ns: f64,
    generator_ns: f64,
    elapsed_ns: f64,
    sends: Option<f64>,
    wrong: f64,
    latency: Value,
    /// Parts of the path through Kafka, if recorded.
    parts: Vec<(Part, Durations)>,
}

impl Outcome {
    fn record(&self, work: &'static str, contender: &Contender, samples: &mut Samples) {
        let total = self.process_ns + self.softirq_ns;
        let per = |ns: f64| ns / self.messages / 1000.0;
        let mut add = |metric, value| samples.add(work, &contender.name, metric, value);
        add(Metric::CpuUs, per(total));
        add(Metric::CpuServingUs, per(total - self.generator_ns));
        add(Metric::SoftirqUs, per(self.softirq_ns));
        add(Metric::PerSecond, self.messages / self.elapsed_ns * 1e9);
        if let Some(sends) = self.sends {
            add(Metric::PerSend, self.messages / sends);
        }
        add(Metric::P50Us, number(&self.latency, "p50"));
        add(Metric::P99Us, number(&self.latency, "p99"));
        add(Metric::P999Us, number(&self.latency, "p999"));
        add(Metric::Wrong, self.wrong);
        for quantile in Quantile::ALL {
            for (part, durations) in &self.parts {
                add(Metric::PartUs(*part, quantile), durations.quantile_us(quantile));
            }
            let of = |wanted| {
                let (_, durations) = self.parts.iter().find(|(part, _)| *part == wanted)?;
                Some(durations.quantile_us(quantile))
            };
            if let (Some(arrived), Some(trip)) = (of(Part::AppendedToArrived), of(Part::RoundTrip))
            {
                add(Metric::ArrivedPlusRoundTripUs(quantile), arrived + trip);
            }
        }
    }
}

impl Trial<'_> {
    /// Connects a client to each node.
    fn connect(&self, path: &str, hello: &str, wire: Wire) -> io::Result<Vec<Worker>> {
        let clients = self.nodes.iter().enumerate();
        clients
            .map(|(at, node)| self.connect_to(node, at * self.plan.sessions, path, hello, wire))
            .collect()
    }

    fn connect_to(
        &self,
        node: &TrialNode,
        first: usize,
        path: &str,
        hello: &str,
        wire: Wire,
    ) -> io::Result<Worker> {
        let mut command = vec![
            beside("bench-client").display().to_string(),
            format!("--server={}", node.address),
            format!("--first={first}"),
            format!("--sessions={}", self.plan.sessions),
            format!("--core={}", self.plan.client_core),
            format!("--path={path}"),
            format!("--hello={hello}"),
        ];
        if self.plan.client_never_sleeps {
            command.push("--never-sleep".to_owned());
        }
        command.extend(self.speaks_tls.then(|| "--tls".to_owned()));
        command.extend(wire.arguments().iter().map(|argument| (*argument).to_owned()));
        let client = Worker::start(&command)?;
        let dialed = client.expect("dialed")?;
        if number(&dialed, "failed") > 0.0 {
            return Err(io::Error::other(format!("not all sessions opened: {dialed}")));
        }
        Ok(client)
    }

    /// Records everything on the server's core, if requested.
    fn recording(&self, work: &str, contender: &Contender) -> io::Result<Option<Recording>> {
        let Some(folder) = &self.plan.profile else { return Ok(None) };
        std::fs::create_dir_all(folder)?;
        let child = Command::new("perf")
            .args(["record", "--quiet", "--freq=1999", "--call-graph=dwarf,4096"])
            .arg(format!("--cpu={}", self.plan.server_core))
            .arg("--output")
            .arg(folder.join(format!("{}-{work}.data", contender.name)))
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(SETTLE);
        Ok(Some(Recording(child)))
    }

    /// Waits until the server has this many sessions.
    fn settle(&mut self, sessions: usize) -> io::Result<()> {
        let from = Instant::now();
        while number(&self.server.ask("sessions", "sessions")?, "sessions") != sessions as f64 {
            if from.elapsed() > ARRIVAL_MAX {
                let why = format!("the server does not reach {sessions} sessions");
                return Err(io::Error::other(why));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Processor time so far, ns: of the processes and of `ksoftirqd` of their core.
    fn used(&self) -> io::Result<(u64, u64)> {
        let of_nodes = self.nodes.iter().map(|node| usage::process_ns(node.pid));
        Ok((of_nodes.sum::<io::Result<u64>>()?, usage::softirq_ns(self.plan.server_core)?))
    }

    fn push(&mut self, clients: &mut [Worker], pushes: generator::PushPlan) -> io::Result<Outcome> {
        self.server.ask(&format!("prepare {pushes}"), "prepared")?;
        std::thread::sleep(SETTLE);
        let traced = matches!(self.role, Role::Kafka | Role::Cluster) && pushes.is_one_by_one();
        ask(clients, if traced { "trace" } else { "reset" }, "done")?;
        let before = self.used()?;
        let pushed = self.server.ask(&format!("push {pushes}"), "elapsed_ns")?;
        let passages = if traced { self.server.expect("passages")? } else { Value::Null };
        let messages = number(&pushed, "messages");
        let from = Instant::now();
        let reports = loop {
            let reports = ask(clients, "report", "messages")?;
            if sum(&reports, "messages") >= messages || from.elapsed() > ARRIVAL_MAX {
                break reports;
            }
            std::thread::sleep(POLL);
        };
        let after = self.used()?;
        let parts = if traced {
            let passages: Vec<Passage> = serde_json::from_value(passages["passages"].clone())?;
            let arrivals: Result<Vec<Vec<Arrival>>, _> = ask(clients, "arrivals", "arrivals")?
                .into_iter()
                .map(|mut answer| serde_json::from_value(answer["arrivals"].take()))
                .collect();
            journey::parts(&passages, &arrivals?)
        } else {
            Vec::new()
        };
        let wrong = ["gaps", "duplicates", "reordered", "unstamped", "closed"]
            .iter()
            .map(|member| sum(&reports, member))
            .sum::<f64>()
            + (messages - sum(&reports, "messages")).abs();
        if wrong > 0.0 {
            eprintln!("  messages lost or wrong: {pushed} {reports:?}");
        }
        Ok(Outcome {
            messages,
            process_ns: (after.0 - before.0) as f64,
            softirq_ns: (after.1 - before.1) as f64,
            generator_ns: number(&pushed, "generator_ns"),
            elapsed_ns: reports.iter().map(|report| number(report, "span_ns")).fold(0.0, f64::max),
            sends: pushed["sends"].as_f64(),
            wrong,
            latency: latency_us(clients)?,
            parts,
        })
    }

    fn echo(
        &mut self,
        client: &mut Worker,
        (window, bytes, ms): (usize, usize, u64),
    ) -> io::Result<Outcome> {
        // Some servers need time to arm every socket.
        self.server.tell(&format!("echo {}", ms + 1000))?;
        std::thread::sleep(Duration::from_millis(200));
        let before = self.used()?;
        let echoed = client.ask(&format!("echo {window} {bytes} {ms}"), "echoed")?;
        let after = self.used()?;
        std::thread::sleep(Duration::from_millis(1000));
        Ok(Outcome {
            messages: number(&echoed, "echoed"),
            process_ns: (after.0 - before.0) as f64,
            softirq_ns: (after.1 - before.1) as f64,
            generator_ns: 0.0,
            elapsed_ns: number(&echoed, "elapsed_ns"),
            sends: None,
            wrong: 0.0,
            parts: Vec::new(),
            latency: echoed["latency_us"].clone(),
        })
    }
}

/// Sends a word to all clients and waits for an answer of each with this member.
fn ask(clients: &mut [Worker], word: &str, member: &str) -> io::Result<Vec<Value>> {
    clients.iter_mut().try_for_each(|client| client.tell(word))?;
    clients.iter().map(|client| client.expect(member)).collect()
}

/// The sum of a number in all answers.
fn sum(answers: &[Value], member: &str) -> f64 {
    answers.iter().map(|answer| number(answer, member)).sum()
}

/// Percentiles of the latencies at all clients, µs.
fn latency_us(clients: &mut [Worker]) -> io::Result<Value> {
    let mut all = Latencies::default();
    for mut answer in ask(clients, "latency", "latency")? {
        all.add(&serde_json::from_value(answer["latency"].take())?);
    }
    Ok(serde_json::to_value(all.percentiles())?)
}
