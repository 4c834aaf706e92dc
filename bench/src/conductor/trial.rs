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
use crate::journey::{self, Arrival, Durations, Part, Passage};
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

/// A running server.
struct Trial<'a> {
    plan: &'a Comparison,
    server: Worker,
    address: String,
    /// The process whose processor time counts.
    pid: u32,
    role: Role,
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
    let address = ready["ready"].as_str().unwrap_or_default().to_owned();
    let pid = number(&ready, "pid") as u32;
    let mut trial = Trial { plan, server, address, pid, role: contender.role };
    let works: Vec<&Work> = plan.works.iter().filter(|work| work.suits(contender.role)).collect();
    for wire in Wire::ALL {
        let pushes: Vec<_> = works
            .iter()
            .filter(|work| work.wire == wire)
            .filter_map(|work| match work.task {
                Task::Push(pushes) => Some((work.name, pushes)),
                Task::Echo { .. } => None,
            })
            .collect();
        if pushes.is_empty() {
            continue;
        }
        let mut client = trial.connect("/ws", r#"{"last_sequences":{}}"#, wire)?;
        trial.settle(plan.sessions)?;
        for (name, pushes) in pushes {
            trial.push(&mut client, warm_up(pushes, contender.role))?;
            let recording = trial.recording(name, contender)?;
            let outcome = trial.push(&mut client, pushes)?;
            drop(recording);
            outcome.record(name, contender, samples);
        }
        drop(client);
        trial.settle(0)?;
    }
    for work in works {
        let Task::Echo { window, bytes, ms } = work.task else { continue };
        let mut client = trial.connect("/echo", "", work.wire)?;
        trial.echo(&mut client, (window, bytes, ms / 10))?;
        let recording = trial.recording(work.name, contender)?;
        let outcome = trial.echo(&mut client, (window, bytes, ms))?;
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
        Role::Kafka if pushes.is_one_by_one() => pushes.rate * BROKER_WARM_S,
        Role::Kafka | Role::Delivery | Role::Other => pushes.events / 10,
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
        for (part, durations) in &self.parts {
            add(Metric::PartP50Us(*part), durations.quantile_us(0.5));
            add(Metric::PartP99Us(*part), durations.quantile_us(0.99));
        }
    }
}

impl Trial<'_> {
    fn connect(&self, path: &str, hello: &str, wire: Wire) -> io::Result<Worker> {
        let mut command = vec![
            beside("bench-client").display().to_string(),
            format!("--server={}", self.address),
            format!("--sessions={}", self.plan.sessions),
            format!("--core={}", self.plan.client_core),
            format!("--path={path}"),
            format!("--hello={hello}"),
        ];
        if self.plan.client_never_sleeps {
            command.push("--never-sleep".to_owned());
        }
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

    /// Processor time so far, ns: of the process and of `ksoftirqd` of its core.
    fn used(&self) -> io::Result<(u64, u64)> {
        Ok((usage::process_ns(self.pid)?, usage::softirq_ns(self.plan.server_core)?))
    }

    fn push(&mut self, client: &mut Worker, pushes: generator::PushPlan) -> io::Result<Outcome> {
        self.server.ask(&format!("prepare {pushes}"), "prepared")?;
        std::thread::sleep(SETTLE);
        let traced = self.role == Role::Kafka && pushes.is_one_by_one();
        client.ask(if traced { "trace" } else { "reset" }, "done")?;
        let before = self.used()?;
        let pushed = self.server.ask(&format!("push {pushes}"), "elapsed_ns")?;
        let passages = if traced { self.server.expect("passages")? } else { Value::Null };
        let messages = number(&pushed, "messages");
        let from = Instant::now();
        let report = loop {
            let report = client.ask("report", "messages")?;
            if number(&report, "messages") >= messages || from.elapsed() > ARRIVAL_MAX {
                break report;
            }
            std::thread::sleep(POLL);
        };
        let after = self.used()?;
        let parts = match traced {
            true => journey::parts(
                &serde_json::from_value::<Vec<Passage>>(passages["passages"].clone())?,
                &serde_json::from_value::<Vec<Arrival>>(
                    client.ask("arrivals", "arrivals")?["arrivals"].clone(),
                )?,
            ),
            false => Vec::new(),
        };
        let wrong = ["gaps", "duplicates", "reordered", "unstamped", "closed"]
            .iter()
            .map(|member| number(&report, member))
            .sum::<f64>()
            + (messages - number(&report, "messages")).abs();
        if wrong > 0.0 {
            eprintln!("  messages lost or wrong: {pushed} {report}");
        }
        Ok(Outcome {
            messages,
            process_ns: (after.0 - before.0) as f64,
            softirq_ns: (after.1 - before.1) as f64,
            generator_ns: number(&pushed, "generator_ns"),
            elapsed_ns: number(&report, "span_ns"),
            sends: pushed["sends"].as_f64(),
            wrong,
            latency: report["latency_us"].clone(),
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
