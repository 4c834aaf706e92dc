//! Latency of a steady push to many sessions, with heartbeats and without.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use super::{ScalePlan, ScaleReport};
use crate::conductor::child::number;
use crate::generator;
use crate::usage;

/// The heartbeats of the contract, and none within the run.
const CASES: [(&str, u64); 2] = [("every 54 s", 54_000), ("none", 3_600_000)];
/// From the last connect until heartbeats are spread evenly.
const HEARTBEATS_BEGIN: Duration = Duration::from_secs(60);

/// Runs both cases.
pub(super) fn run(plan: &ScalePlan, report: &mut ScaleReport) -> io::Result<()> {
    report.note(&format!(
        "{} sessions in {} shards, {} events a second for {} s, injected at the router, one recipient each",
        plan.sessions,
        plan.shards(),
        plan.rate,
        plan.push_s
    ));
    for (name, ping_after_ms) in CASES {
        let arguments = [format!("--ping-after-ms={ping_after_ms}")];
        let (mut server, mut fleet) = plan.parts(plan.shards(), &arguments)?;
        fleet.grow(plan.sessions)?;
        let events = plan.rate * plan.push_s;
        let push = generator::PushPlan {
            group: 1,
            each: 1,
            burst: 1,
            events,
            rate: plan.rate,
            at_once: 1,
            bytes: 128,
        };
        server.ask(&format!("prepare {push}"), "prepared")?;
        sleep(HEARTBEATS_BEGIN);
        fleet.ask("reset", "done")?;
        let cpu = usage::process_ns(server.id())?;
        server.tell(&format!("push {push}"))?;
        let limit = Duration::from_secs(plan.push_s + 60);
        let pushed = server.expect_within("elapsed_ns", limit)?;
        let seen = fleet.receive(number(&pushed, "messages"))?;
        let cpu = usage::process_ns(server.id())? - cpu;
        let latency = fleet.latency()?.percentiles();
        report.note(&format!(
            "heartbeats {name}: {:.0} pings a second; p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs, at most {:.1} ms; \
             {} of {events} received, {} wrong; {:.1} % of a core",
            seen.pings / plan.push_s as f64,
            latency.p50,
            latency.p99,
            latency.p999,
            latency.max / 1000.0,
            seen.messages,
            seen.wrong(),
            cpu as f64 / (plan.push_s as f64 * 1e9) * 100.0
        ));
    }
    Ok(())
}
