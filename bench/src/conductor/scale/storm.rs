//! A storm of connects and disconnects in addition to idle sessions: the memory that remains.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::memory::Reading;
use super::{SETTLE, ScalePlan, ScaleReport};
use crate::conductor::child::number;
use crate::usage;

/// Storming processes, and the sessions of each.
const PROCESSES: usize = 2;
const SESSIONS: usize = 500;
/// Parts of the storm. A leak would grow with each.
const PARTS: usize = 4;
const PART_MAX: Duration = Duration::from_secs(600);
const GONE_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// Runs the work.
pub(super) fn run(plan: &ScalePlan, report: &mut ScaleReport) -> io::Result<()> {
    let (services, node) = plan.node()?;
    let read = || Reading::take(node.id());
    let active = || node.metric("websocket_connections_active", "");
    let mut staying = plan.clients_of(&node, vec!["--hello={}".to_owned()]);
    staying.grow(plan.base)?;
    sleep(SETTLE);
    let before = read()?;
    report.note(&format!(
        "storm of {} connects and disconnects beside {} sessions that stay; presence: {:?}; \
         process memory before: {:.1} MB",
        plan.storm,
        plan.base,
        plan.presence,
        megabytes(before.resident)
    ));
    let mut storming = plan.clients_of(&node, vec!["--hello={}".to_owned()]);
    storming.per_process(SESSIONS, plan.base);
    storming.grow(PROCESSES * SESSIONS)?;
    for part in 1..=PARTS {
        let (cpu, from) = (usage::process_ns(node.id())?, Instant::now());
        let each = plan.storm / PARTS / PROCESSES;
        storming.tell(&format!("storm {each}"))?;
        let (mut opened, mut failed) = (0.0, 0.0);
        for dialed in storming.expect_within("dialed", PART_MAX)? {
            opened += number(&dialed, "opened");
            failed += number(&dialed, "failed");
        }
        let seconds = from.elapsed().as_secs_f64();
        let cpu = usage::process_ns(node.id())? - cpu;
        let at_its_end = read()?;
        let since = Instant::now();
        while active()? > plan.base as f64 {
            if since.elapsed() > GONE_MAX {
                return Err(io::Error::other("sessions of the storm do not end"));
            }
            sleep(POLL);
        }
        sleep(SETTLE);
        let after = read()?;
        report.note(&format!(
            "part {part}: {opened:.0} connected and left in {seconds:.0} s ({:.0} a second, {failed:.0} failed, {:.0} µs of \
             the node's processor time each); process memory {:.1} MB at its end, {:.1} MB {} s later; \
             kernel slabs {:+.1} MB since before",
            opened / seconds,
            cpu as f64 / opened / 1000.0,
            megabytes(at_its_end.resident),
            megabytes(after.resident),
            SETTLE.as_secs(),
            megabytes(after.slab) - megabytes(before.slab)
        ));
    }
    let after = read()?;
    report.note(&format!(
        "process memory after the storm: {:.1} MB, {:+.1} MB",
        megabytes(after.resident),
        megabytes(after.resident) - megabytes(before.resident)
    ));
    let seen = staying.received()?;
    report.note(&format!(
        "of the sessions that stayed {} are open, {} closed",
        seen.open, seen.closed
    ));
    drop(services);
    Ok(())
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
