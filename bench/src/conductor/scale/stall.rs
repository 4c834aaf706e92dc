//! Readers that do not read: what they take of the process and of the kernel while events are
//! pushed to them, against what the settings say.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use super::memory::{Reading, watch};
use super::{Report, SETTLE, ScalePlan};
use crate::generator;

/// Events for each session in one step, and their size.
const STEP_EVENTS: u64 = 16;
const EVENT_BYTES: usize = 1024;
const STEPS_MAX: usize = 40;
/// What the client's end takes in is little beside what is measured, and the same for each step.
const CLIENT_BUFFER_BYTES: usize = 4096;
/// Until what was pushed has reached the sockets, as far as it does.
const STEP_SETTLE: Duration = Duration::from_secs(2);

/// Runs it.
pub(super) fn run(plan: &ScalePlan, report: &mut Report) -> io::Result<()> {
    let (mut services, node) = plan.node()?;
    let arguments =
        vec!["--hello={}".to_owned(), format!("--receive-buffer-bytes={CLIENT_BUFFER_BYTES}")];
    let mut fleet = plan.clients_of(&node, arguments);
    fleet.grow(plan.sessions)?;
    fleet.ask("stall", "done")?;
    let events = STEP_EVENTS * (plan.sessions / plan.group) as u64;
    let step = generator::Plan { group: plan.group, burst: 1, events, rate: 0, bytes: EVENT_BYTES };
    services.backend.ask(&format!("prepare {step}"), "prepared")?;
    sleep(SETTLE);
    let before = Reading::take(node.id())?;
    report.note(&format!(
        "{} sessions that do not read, events of {EVENT_BYTES} B for conversations of {}, settings {:?}",
        plan.sessions, plan.group, plan.settings
    ));
    report.table(&[
        "events each",
        "sessions",
        "process, B each",
        "socket buffers, B each",
        "slabs, B each",
        "events held",
        "waiting in Kafka",
    ]);
    for number in 1..=STEPS_MAX {
        watch()?;
        services.backend.ask(&format!("push {step}"), "elapsed_ns")?;
        sleep(STEP_SETTLE);
        let now = Reading::take(node.id())?;
        let open = node.metric("websocket_connections_active", "")?;
        let each = |now: u64, before: u64| (now as f64 - before as f64) / plan.sessions as f64;
        report.row(&[
            number as f64 * STEP_EVENTS as f64,
            open,
            each(now.resident, before.resident),
            each(now.socket_buffers, before.socket_buffers),
            each(now.slab, before.slab),
            node.metric("delivery_shard_events", "")?,
            node.metric("kafka_consumer_lag", "")?,
        ]);
        if open == 0.0 {
            break;
        }
    }
    fleet.leave()?;
    sleep(SETTLE);
    let after = Reading::take(node.id())?;
    report.note(&format!(
        "when they have left: process memory {:+.1} MB, slabs {:+.1} MB, socket buffers {:+.1} MB against before",
        (after.resident as f64 - before.resident as f64) / 1e6,
        (after.slab as f64 - before.slab as f64) / 1e6,
        (after.socket_buffers as f64 - before.socket_buffers as f64) / 1e6
    ));
    Ok(())
}
