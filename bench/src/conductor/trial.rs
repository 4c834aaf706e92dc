//! One server, once: its sessions connected, every work done.

use std::io;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::child::{Worker, number};
use super::samples::{Metric, Samples};
use super::work::{Task, Work};
use super::{Contender, Plan};
use crate::generator;
use crate::usage;

/// Longest wait for messages that are still on their way.
const ARRIVAL_MAX: Duration = Duration::from_secs(20);
/// What preparing sent to the clients has arrived after this.
const SETTLE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(20);

pub(super) fn run(plan: &Plan, contender: &Contender, samples: &mut Samples) -> io::Result<()> {
    let mut command = contender.command.clone();
    command.extend(["--core".into(), plan.server_core.to_string()]);
    let mut server = Worker::start(&command)?;
    let address = server.expect("ready")?["ready"].as_str().unwrap_or_default().to_owned();
    let is_push = |work: &&Work| matches!(work.task, Task::Push(_));
    if plan.works.iter().any(|work| is_push(&work)) {
        let mut client = connect(plan, &address, "/ws", r#"{"last_sequences":{}}"#)?;
        settle(plan, &mut server)?;
        for work in plan.works.iter().filter(is_push) {
            let Task::Push(pushes) = work.task else { continue };
            server.ask(&format!("prepare {pushes}"), "prepared")?;
            std::thread::sleep(SETTLE);
            // Warm: caches, queues, the system's own buffers.
            let warm = generator::Plan { events: pushes.events / 10, rate: 0, ..pushes };
            push(plan, &mut server, &mut client, warm)?;
            push(plan, &mut server, &mut client, pushes)?.record(work.name, contender, samples);
        }
    }
    for work in &plan.works {
        let Task::Echo { window, bytes, ms } = work.task else { continue };
        let mut client = connect(plan, &address, "/echo", "")?;
        echo(plan, &mut server, &mut client, (window, bytes, ms / 10))?;
        echo(plan, &mut server, &mut client, (window, bytes, ms))?
            .record(work.name, contender, samples);
    }
    Ok(())
}

fn connect(plan: &Plan, address: &str, path: &str, hello: &str) -> io::Result<Worker> {
    let client = Worker::start(&[
        plan.client.display().to_string(),
        format!("--server={address}"),
        format!("--sessions={}", plan.sessions),
        format!("--core={}", plan.client_core),
        format!("--path={path}"),
        format!("--hello={hello}"),
    ])?;
    let dialed = client.expect("dialed")?;
    if number(&dialed, "failed") > 0.0 {
        return Err(io::Error::other(format!("not all sessions came up: {dialed}")));
    }
    Ok(client)
}

/// Waits until the server knows every session.
fn settle(plan: &Plan, server: &mut Worker) -> io::Result<()> {
    let from = Instant::now();
    while number(&server.ask("sessions", "sessions")?, "sessions") < plan.sessions as f64 {
        if from.elapsed() > ARRIVAL_MAX {
            return Err(io::Error::other("the server does not know all sessions"));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Processor time used up to now, ns: of the process, and of the core's deferred interrupts.
fn used(plan: &Plan, server: &Worker) -> io::Result<(u64, u64)> {
    Ok((usage::process_ns(server.id())?, usage::softirq_ns(plan.server_core)?))
}

struct Outcome {
    messages: f64,
    process_ns: f64,
    softirq_ns: f64,
    generator_ns: f64,
    elapsed_ns: f64,
    wrong: f64,
    latency: Value,
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
        add(Metric::P50Us, number(&self.latency, "p50"));
        add(Metric::P99Us, number(&self.latency, "p99"));
        add(Metric::Wrong, self.wrong);
    }
}

fn push(
    plan: &Plan,
    server: &mut Worker,
    client: &mut Worker,
    pushes: generator::Plan,
) -> io::Result<Outcome> {
    client.ask("reset", "done")?;
    let before = used(plan, server)?;
    let pushed = server.ask(&format!("push {pushes}"), "elapsed_ns")?;
    let messages = number(&pushed, "messages");
    let from = Instant::now();
    let report = loop {
        let report = client.ask("report", "messages")?;
        if number(&report, "messages") >= messages || from.elapsed() > ARRIVAL_MAX {
            break report;
        }
        std::thread::sleep(POLL);
    };
    let after = used(plan, server)?;
    let wrong = ["gaps", "duplicates", "reordered", "unstamped", "closed"]
        .iter()
        .map(|member| number(&report, member))
        .sum::<f64>()
        + (messages - number(&report, "messages")).abs();
    if wrong > 0.0 {
        eprintln!("  something is wrong: {pushed} {report}");
    }
    Ok(Outcome {
        messages,
        process_ns: (after.0 - before.0) as f64,
        softirq_ns: (after.1 - before.1) as f64,
        generator_ns: number(&pushed, "generator_ns"),
        elapsed_ns: number(&pushed, "elapsed_ns"),
        wrong,
        latency: report["latency_us"].clone(),
    })
}

fn echo(
    plan: &Plan,
    server: &mut Worker,
    client: &mut Worker,
    (window, bytes, ms): (usize, usize, u64),
) -> io::Result<Outcome> {
    // Some need a head start: to arm every socket.
    server.tell(&format!("echo {}", ms + 1000))?;
    std::thread::sleep(Duration::from_millis(200));
    let before = used(plan, server)?;
    let echoed = client.ask(&format!("echo {window} {bytes} {ms}"), "echoed")?;
    let after = used(plan, server)?;
    std::thread::sleep(Duration::from_millis(1000));
    Ok(Outcome {
        messages: number(&echoed, "echoed"),
        process_ns: (after.0 - before.0) as f64,
        softirq_ns: (after.1 - before.1) as f64,
        generator_ns: 0.0,
        elapsed_ns: number(&echoed, "elapsed_ns"),
        wrong: 0.0,
        latency: echoed["latency_us"].clone(),
    })
}
