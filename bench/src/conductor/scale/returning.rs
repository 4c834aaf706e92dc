//! All sessions are dropped and come back within five seconds, while events go on.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fleet::{Fleet, FleetDialed, Received};
use super::node::Node;
use super::services::Services;
use super::{SETTLE, ScalePlan, ScaleReport};
use crate::conductor::child::number;
use crate::generator::PushPlan;
use crate::usage;

/// Sessions come back within this time of the drop.
const RETURN: Duration = Duration::from_secs(5);
/// Events before the drop: longer than `CURSOR_INTERVAL`, so that every client has a cursor from a time with events.
const BEFORE: Duration = Duration::from_secs(20);
/// Events after the return.
const AFTER: Duration = Duration::from_secs(30);
/// Limit for all sessions to be live.
const LIVE_MAX: Duration = Duration::from_secs(300);
/// Limit for the push to end.
const PUSH_MAX: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(50);

/// Calls to the neighbours, and when they were counted.
struct Counts {
    calls: Value,
    cpu_ns: u64,
}

struct Run<'a> {
    plan: &'a ScalePlan,
    report: &'a mut ScaleReport,
    services: Services,
    /// The node that sessions come back to is the last.
    nodes: Vec<Node>,
    fleet: Fleet,
}

/// Runs the work.
pub(super) fn run(plan: &ScalePlan, report: &mut ScaleReport) -> io::Result<()> {
    let (mut services, node) = plan.node_with_neighbours()?;
    let mut nodes = vec![node];
    if plan.nodes == 2 {
        nodes.push(plan.another_node(&services, 1)?);
    }
    let push = PushPlan {
        group: plan.group,
        each: plan.conversations,
        burst: 1,
        events: plan.rate * (BEFORE + RETURN + AFTER).as_secs(),
        rate: plan.rate,
        at_once: 1,
        bytes: 300,
    };
    services.backend.ask(&format!("prepare {push}"), "prepared")?;
    let mut arguments = vec![
        format!("--resume-group={}", plan.group),
        format!("--resume-each={}", plan.conversations),
    ];
    arguments.extend(plan.cursors.then(|| "--cursors".to_owned()));
    let mut fleet = plan.clients_of(&nodes[0], arguments);
    // Two client processes share the dialing.
    fleet.per_process(plan.sessions.div_ceil(2), 0);
    report.note(&format!(
        "{} sessions in groups of {} with {} conversations each, {} events of 300 B a second; cursors: {}; nodes: {}; \
         killed: {}",
        plan.sessions, plan.group, plan.conversations, plan.rate, plan.cursors, plan.nodes, plan.kill
    ));
    let mut run = Run { plan, report, services, nodes, fleet };
    run.drained()?;
    run.fleet.grow(plan.sessions)?;
    run.live()?;
    sleep(SETTLE);
    run.drop_and_return(push)
}

impl Run<'_> {
    /// Waits until the nodes have read everything in Kafka.
    fn drained(&self) -> io::Result<()> {
        let from = Instant::now();
        for node in &self.nodes {
            while node.metric("kafka_consumer_lag", "")? > 0.0 {
                if from.elapsed() > LIVE_MAX {
                    return Err(io::Error::other("a node does not reach the end of the topics"));
                }
                sleep(POLL);
            }
        }
        Ok(())
    }

    /// Waits until no session is in catch-up.
    fn live(&self) -> io::Result<()> {
        let from = Instant::now();
        for node in &self.nodes {
            while node.metric("delivery_resume_waiting", "")?
                + node.metric("delivery_resume_running", "")?
                > 0.0
            {
                if from.elapsed() > LIVE_MAX {
                    return Err(io::Error::other("sessions stay in catch-up"));
                }
                sleep(POLL);
            }
        }
        Ok(())
    }

    fn counts(&mut self) -> io::Result<Counts> {
        let calls = self.services.backend.ask("calls", "syncs")?;
        let cpu = self.nodes.iter().map(|node| usage::process_ns(node.id()));
        Ok(Counts { calls, cpu_ns: cpu.sum::<io::Result<u64>>()? })
    }

    fn drop_and_return(&mut self, push: PushPlan) -> io::Result<()> {
        self.fleet.ask("reset", "done")?;
        self.services.backend.tell(&format!("push {push}"))?;
        sleep(BEFORE);
        // A node that is started for them asks before the first of them is back.
        let calls = self.services.backend.ask("calls", "syncs")?;
        let from = Instant::now();
        self.fleet.ask("drop", "done")?;
        if self.plan.kill {
            // The first one is killed, so that its sessions have to come back to what was read before.
            self.nodes.remove(0);
            let node = self.plan.another_node(&self.services, 0)?;
            self.nodes.push(node);
            self.report.note(&format!(
                "killed; its successor was ready after {:.1} s",
                from.elapsed().as_secs_f64()
            ));
        }
        let before = Counts { calls, ..self.counts()? };
        let from = Instant::now();
        let rate = self.plan.sessions as u64 / RETURN.as_secs();
        let dialed = self.come_back(rate)?;
        self.live()?;
        let live = from.elapsed();
        let seen = self.fleet.received()?;
        let now = self.counts()?;
        self.returned(&dialed, live, &before, &now, &seen);
        self.complete(push)
    }

    /// Connects the sessions that are down until all are open.
    fn come_back(&mut self, rate: u64) -> io::Result<FleetDialed> {
        let address = self.nodes.last().expect("one").address.clone();
        let mut all = self.fleet.come_back(&address, rate)?;
        let from = Instant::now();
        loop {
            let seen = self.fleet.received()?;
            if seen.open as usize == self.plan.sessions {
                return Ok(all);
            }
            if from.elapsed() > LIVE_MAX {
                return Err(io::Error::other(format!("only {} sessions are open", seen.open)));
            }
            let more = self.fleet.come_back(&address, rate)?;
            all.opened += more.opened;
            all.failed += more.failed;
            sleep(POLL);
        }
    }

    fn returned(
        &mut self,
        dialed: &FleetDialed,
        live: Duration,
        before: &Counts,
        now: &Counts,
        seen: &Received,
    ) {
        let calls = |name| number(&now.calls, name) - number(&before.calls, name);
        let sessions = self.plan.sessions as f64;
        self.report.note(&format!(
            "dropped and back: {:.0} connects ({:.0} failed) in {:.1} s, all live after {:.1} s; {:.0} closed by the \
             node meanwhile; {:.0} µs of the nodes' processor time for each session (events included)",
            dialed.opened,
            dialed.failed,
            dialed.seconds,
            live.as_secs_f64(),
            seen.closed,
            (now.cpu_ns - before.cpu_ns) as f64 / 1000.0 / sessions,
        ));
        self.report.note(&format!(
            "    calls for each session: {:.2} SyncMessages, {:.2} ListConversations, {:.2} for members; presence: {:.2} \
             registrations, {:.2} ends",
            calls("syncs") / sessions,
            calls("lists") / sessions,
            calls("members") / sessions,
            calls("registrations") / sessions,
            calls("unregistrations") / sessions,
        ));
    }

    /// Waits for the rest of the events, and counts what is missing.
    fn complete(&mut self, push: PushPlan) -> io::Result<()> {
        let pushed = self.services.backend.expect_within("elapsed_ns", PUSH_MAX)?;
        let messages = number(&pushed, "messages");
        let seen = self.fleet.receive_distinct(messages)?;
        let latency = self.fleet.latency()?.percentiles();
        self.report.note(&format!(
            "{} of {messages} messages received ({} events): {} missed, {} gaps, {} twice; {} cursors, {} expired; {} \
             sessions closed by the node; {} open; latency of all, the missed ones included: p50 {:.1} ms, p99 {:.0} ms",
            seen.distinct,
            push.events,
            messages - seen.distinct,
            seen.gaps,
            seen.repeated,
            seen.cursors,
            seen.expired,
            seen.closed,
            seen.open,
            latency.p50 / 1000.0,
            latency.p99 / 1000.0
        ));
        for node in &self.nodes {
            for (name, unit) in [("delivery_tail_bytes", "B"), ("delivery_tail_age_ms", "ms")] {
                if let Ok(value) = node.metric(name, "") {
                    self.report.note(&format!("    {name} of a node: {value:.0} {unit}"));
                }
            }
        }
        if seen.distinct < messages {
            return Err(io::Error::other("messages were missed"));
        }
        Ok(())
    }
}
