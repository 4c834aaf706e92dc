//! A real node with many sessions: speed, memory, completeness.

use std::fs;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::fleet::Fleet;
use super::memory::{Reading, beyond_the_sockets, watch};
use super::node::Node;
use super::services::Services;
use super::{SETTLE, ScalePlan, ScaleReport};
use crate::conductor::child::number;
use crate::conductor::plot::{Line, lines};
use crate::conductor::samples::Summary;
use crate::generator;
use crate::usage;

/// Limit for presence to have all sessions, and for the node to have read everything in Kafka.
const CATCH_UP_MAX: Duration = Duration::from_secs(180);
/// Time for which the idle cost is measured.
const IDLE: Duration = Duration::from_secs(20);
/// One in this many sessions reconnects, at this interval.
const CHURN_ONE_IN: usize = 100;
const CHURN_EVERY: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);

struct Run<'a> {
    plan: &'a ScalePlan,
    report: &'a mut ScaleReport,
    services: Services,
    node: Node,
    fleet: Fleet,
}

/// Runs the work.
pub(super) fn run(plan: &ScalePlan, report: &mut ScaleReport) -> io::Result<()> {
    let (services, node) = plan.node()?;
    // A first connect has nothing to catch up with; a reconnect sends its position.
    let resume_group = if plan.catch_up { plan.group } else { 0 };
    let arguments = vec!["--hello={}".to_owned(), format!("--resume-group={resume_group}")];
    let fleet = plan.clients_of(&node, arguments);
    report.note(&format!(
        "{} sessions in {} shards, tokens, presence: {:?}, catch-up: {}",
        plan.sessions,
        plan.shards(),
        plan.presence,
        plan.catch_up
    ));
    let mut run = Run { plan, report, services, node, fleet };
    let empty = run.read()?;
    let base = run.connect(&empty)?;
    run.idle()?;
    run.one_each()?;
    if plan.push_s > 0 {
        run.push_while_sessions_reconnect()?;
    }
    run.leave(&empty, &base)
}

impl Run<'_> {
    fn read(&self) -> io::Result<Reading> {
        Reading::take(self.node.id())
    }

    /// Waits until presence has all sessions. Returns the time that took, s.
    fn presence(&mut self) -> io::Result<f64> {
        let from = Instant::now();
        let wanted = self.fleet.sessions() as u64;
        loop {
            let held = self.services.registered()?;
            if held.is_none_or(|held| held == wanted) {
                return Ok(from.elapsed().as_secs_f64());
            }
            if from.elapsed() > CATCH_UP_MAX {
                let text = format!("presence holds {held:?} of {wanted} sessions");
                return Err(io::Error::other(text));
            }
            sleep(POLL);
        }
    }

    fn connect(&mut self, empty: &Reading) -> io::Result<Reading> {
        let base = self.plan.base.min(self.plan.sessions / 2);
        self.fleet.grow(base)?;
        self.presence()?;
        sleep(SETTLE);
        let before = self.read()?;
        let cpu = usage::process_ns(self.node.id())?;
        let mut samples = Vec::new();
        let dialed = self.fleet.grow_seen(self.plan.sessions, || {
            let sessions = self.node.metric("websocket_connections_active", "")?;
            samples.push((sessions, usage::resident_bytes(self.node.id())? as f64));
            Ok(())
        })?;
        let late = self.presence()?;
        let cpu = usage::process_ns(self.node.id())? - cpu;
        self.report.note(&format!(
            "connected {} in {:.1} s: {:.0} a second; handshakes p99 {:.0} ms, at most {:.0} ms (worst process); \
             all registered {late:.1} s later; {:.0} µs of the node's processor time each",
            dialed.opened,
            dialed.seconds,
            dialed.opened / dialed.seconds,
            dialed.p99_ms,
            dialed.max_ms,
            cpu as f64 / dialed.opened / 1000.0
        ));
        sleep(SETTLE);
        let after = self.read()?;
        samples.push((self.plan.sessions as f64, after.resident as f64));
        self.memory(empty, &before, &after, (base, self.plan.sessions))?;
        self.plot((base as f64, before.resident as f64), &samples)?;
        Ok(before)
    }

    /// Plots memory per session against the number of sessions, both counted from `base`.
    fn plot(&self, base: (f64, f64), samples: &[(f64, f64)]) -> io::Result<()> {
        let ledger = self.node.metric("delivery_memory_session_bytes", "")?;
        let points: Vec<_> = samples
            .iter()
            .filter(|(sessions, _)| *sessions > base.0)
            .map(|(sessions, bytes)| {
                (*sessions, Summary::of(&[(bytes - base.1) / (sessions - base.0)]))
            })
            .collect();
        let ends = [points.first(), points.last()].into_iter().flatten();
        let expected = ends.map(|(sessions, _)| (*sessions, Summary::of(&[ledger]))).collect();
        let svg = lines(
            "memory of the process for each session",
            &format!("bytes, from {:.0} sessions on, while they connect; the last at rest", base.0),
            &[
                Line { name: "ledger".to_owned(), points: expected },
                Line { name: "delivery".to_owned(), points },
            ],
        );
        let name = format!("hold-{}-memory.svg", self.plan.sessions);
        fs::write(self.plan.output.join(name), svg)
    }

    fn memory(
        &mut self,
        empty: &Reading,
        before: &Reading,
        after: &Reading,
        (from, to): (usize, usize),
    ) -> io::Result<()> {
        let grown = (to - from) as f64;
        let resident = (after.resident as f64 - before.resident as f64) / grown;
        let ledger = self.node.metric("delivery_memory_session_bytes", "")?;
        self.report.note(&format!(
            "process memory: {} MB without sessions, {} MB with {from}, {} MB with {to}: {resident:.0} B a session \
             (the ledger says {ledger:.0} B)",
            empty.resident / 1_000_000,
            before.resident / 1_000_000,
            after.resident / 1_000_000,
        ));
        for (part, bytes) in self.node.metrics("delivery_memory_session_bytes")? {
            self.report.note(&format!("    ledger {part}: {bytes:.0} B"));
        }
        let slab = (after.slab as f64 - before.slab as f64) / grown;
        let growth = after.growth(before, grown);
        let caches: Vec<_> =
            growth.iter().map(|(name, bytes)| format!("{name} {bytes:.0}")).collect();
        self.report.note(&format!(
            "kernel slabs a session, both ends: {slab:.0} B ({}); of these neither the sockets' own \
             nor the client's: {:.0} B",
            caches.join(", "),
            beyond_the_sockets(&growth)
        ));
        self.report.note(&format!("machine: {} MiB available", usage::available_bytes()? >> 20));
        Ok(())
    }

    fn idle(&mut self) -> io::Result<()> {
        let cpu = usage::process_ns(self.node.id())?;
        let from = Instant::now();
        sleep(IDLE);
        let used = (usage::process_ns(self.node.id())? - cpu) as f64;
        let share = used / from.elapsed().as_nanos() as f64 * 100.0;
        self.report.note(&format!(
            "idle for {} s (heartbeats, presence refreshes): {share:.1} % of a core",
            IDLE.as_secs()
        ));
        Ok(())
    }

    /// Waits until the node has read everything in Kafka.
    fn drained(&self) -> io::Result<()> {
        let from = Instant::now();
        while self.node.metric("kafka_consumer_lag", "")? > 0.0 {
            if from.elapsed() > CATCH_UP_MAX {
                return Err(io::Error::other("the node does not reach the end of the topics"));
            }
            sleep(POLL);
        }
        Ok(())
    }

    fn one_each(&mut self) -> io::Result<()> {
        let group = self.plan.group;
        let events = (self.plan.sessions / group) as u64;
        let once = generator::PushPlan {
            group,
            each: 1,
            burst: 1,
            events,
            rate: 0,
            at_once: 1,
            bytes: 128,
        };
        self.services.backend.ask(&format!("prepare {once}"), "prepared")?;
        self.drained()?;
        sleep(SETTLE);
        let with_members = self.read()?.resident;
        self.fleet.ask("reset", "done")?;
        let cpu = usage::process_ns(self.node.id())?;
        let from = Instant::now();
        let pushed = self.services.backend.ask(&format!("push {once}"), "elapsed_ns")?;
        let messages = number(&pushed, "messages");
        let seen = self.fleet.receive(messages)?;
        let seconds = from.elapsed().as_secs_f64();
        let cpu = usage::process_ns(self.node.id())? - cpu;
        self.report.note(&format!(
            "one event to each through Kafka, conversations of {group}: {} of {messages} received, {} wrong, in \
             {seconds:.1} s; {:.2} µs of the node's processor time each ({} MB with the members of {events} \
             conversations cached)",
            seen.messages,
            seen.wrong(),
            cpu as f64 / messages / 1000.0,
            with_members / 1_000_000,
        ));
        Ok(())
    }

    /// One per cent reconnects every ten seconds.
    fn push_while_sessions_reconnect(&mut self) -> io::Result<()> {
        let (rate, seconds) = (self.plan.rate, self.plan.push_s);
        let group = self.plan.group;
        let plan = generator::PushPlan {
            group,
            each: 1,
            burst: 1,
            events: rate * seconds,
            rate,
            at_once: 1,
            bytes: 128,
        };
        self.fleet.ask("reset", "done")?;
        let cpu = usage::process_ns(self.node.id())?;
        self.services.backend.tell(&format!("push {plan}"))?;
        let (mut churned, mut failed, mut slowest) = (0.0, 0.0, 0.0_f64);
        for _ in 0..seconds / CHURN_EVERY.as_secs() {
            watch()?;
            let from = Instant::now();
            let dialed = self.fleet.churn(CHURN_ONE_IN)?;
            churned += dialed.opened;
            failed += dialed.failed;
            slowest = slowest.max(dialed.max_ms);
            sleep(CHURN_EVERY.saturating_sub(from.elapsed()));
        }
        let pushed = self.services.backend.expect_within("elapsed_ns", CATCH_UP_MAX)?;
        let messages = number(&pushed, "messages");
        let seen = self.fleet.receive(messages)?;
        let cpu = usage::process_ns(self.node.id())? - cpu;
        let caught_up = self.node.metric("delivery_resume_messages_total", "")?;
        let latency = self.fleet.latency()?.percentiles();
        self.report.note(&format!(
            "{rate} events a second through Kafka for {seconds} s while 1 % reconnect every 10 s ({churned:.0} did, \
             slowest handshake {slowest:.0} ms): {} of {messages} received ({caught_up:.0} of them by catch-up), {} lost, \
             {} duplicate, {} out of order; {} sessions failed to reconnect, {} were closed by the node, {} are open",
            seen.messages, seen.gaps, seen.duplicates, seen.reordered, failed + seen.refused, seen.closed, seen.open
        ));
        self.report.note(&format!(
            "    latency, append to read: p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms, at most {:.0} ms; {:.1} % of a core",
            latency.p50 / 1000.0,
            latency.p99 / 1000.0,
            latency.p999 / 1000.0,
            latency.max / 1000.0,
            cpu as f64 / (seconds as f64 * 1e9) * 100.0
        ));
        Ok(())
    }

    fn leave(&mut self, empty: &Reading, base: &Reading) -> io::Result<()> {
        let from = Instant::now();
        self.fleet.leave()?;
        while self.node.metric("websocket_connections_active", "")? > 0.0 {
            if from.elapsed() > CATCH_UP_MAX {
                return Err(io::Error::other("sessions remain after their clients have exited"));
            }
            sleep(POLL);
        }
        let ended = from.elapsed().as_secs_f64();
        while self.node.metric("delivery_presence_waiting", "")? > 0.0
            || self.node.metric("delivery_presence_under_way", "")? > 0.0
        {
            sleep(POLL);
        }
        let unregistered = from.elapsed().as_secs_f64();
        let expiring = self.node.metric("delivery_presence_overflowed_ends_total", "")?;
        sleep(SETTLE);
        let now = self.read()?.resident / 1_000_000;
        self.report.note(&format!(
            "all clients exited: all sessions ended {ended:.1} s later, all unregistered {unregistered:.1} s later ({expiring:.0} left to \
             expire); process memory {now} MB ({} MB before the first session, {} MB with {})",
            empty.resident / 1_000_000,
            base.resident / 1_000_000,
            self.plan.base
        ));
        Ok(())
    }
}
