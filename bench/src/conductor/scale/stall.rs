//! Stalled readers: their memory in the process and in the kernel while events are pushed, compared with
//! the settings.

use std::io;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use super::memory::{Reading, watch};
use super::{SETTLE, ScalePlan, ScaleReport};
use crate::generator;

/// Events for each session in one step, and their size.
const STEP_EVENTS: u64 = 16;
const EVENT_BYTES: usize = 1024;
const STEPS_MAX: usize = 40;
/// Receive buffer of a client: small compared with what is measured, and the same in each step.
const CLIENT_BUFFER_BYTES: usize = 4096;
/// Pause until pushed events have reached the sockets.
const STEP_SETTLE: Duration = Duration::from_secs(2);

/// Runs the work.
pub(super) fn run(plan: &ScalePlan, report: &mut ScaleReport) -> io::Result<()> {
    let (mut services, node) = plan.node()?;
    let arguments =
        vec!["--hello={}".to_owned(), format!("--receive-buffer-bytes={CLIENT_BUFFER_BYTES}")];
    let mut fleet = plan.clients_of(&node, arguments);
    fleet.grow(plan.sessions)?;
    fleet.ask("stall", "done")?;
    let events = STEP_EVENTS * (plan.sessions / plan.group) as u64;
    let step = generator::PushPlan {
        group: plan.group,
        each: 1,
        burst: 1,
        events,
        rate: 0,
        at_once: 1,
        bytes: EVENT_BYTES,
    };
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
        let sessions = plan.sessions as f64;
        let each = |now: u64, before: u64| (now as f64 - before as f64) / sessions;
        let (mean, most) = send_queues(&node.address).unwrap_or((f64::NAN, f64::NAN));
        report.row(&[
            number as f64 * STEP_EVENTS as f64,
            open,
            each(now.resident, before.resident),
            node.metric("delivery_shard_event_bytes_held", "")? / sessions,
            mean,
            most,
            each(now.socket_buffers, before.socket_buffers),
            each(now.slab, before.slab),
            node.metric("delivery_shard_queue_overflows_total", "")?,
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
        "after their end: process memory {:+.1} MB, slabs {:+.1} MB, socket buffers {:+.1} MB against before",
        (after.resident as f64 - before.resident as f64) / 1e6,
        (after.slab as f64 - before.slab as f64) / 1e6,
        (after.socket_buffers as f64 - before.socket_buffers as f64) / 1e6
    ));
    Ok(())
}

/// Unsent and unacknowledged output that the kernel charges to the server's sockets, bytes: mean and
/// maximum. `None`: `ss` is not installed.
fn send_queues(server: &str) -> Option<(f64, f64)> {
    let port = server.rsplit_once(':')?.1;
    let filter = ["-tmnH", "state", "established", "sport", "=", &format!(":{port}")];
    let sockets = Command::new("ss").args(filter).output().ok()?;
    let (mut count, mut sum, mut most) = (0.0, 0.0, 0.0_f64);
    for queued in String::from_utf8_lossy(&sockets.stdout).lines().filter_map(queued) {
        count += 1.0;
        sum += queued;
        most = most.max(queued);
    }
    (count > 0.0).then(|| (sum / count, most))
}

/// `w` of `skmem:(r0,rb131072,t0,tb87040,f0,w0,o0,bl0,d0)`.
fn queued(line: &str) -> Option<f64> {
    let memory = line.split_once("skmem:(")?.1.split_once(')')?.0;
    memory.split(',').find_map(|field| field.strip_prefix('w')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queued_output_is_found() {
        let line =
            "0 0 127.0.0.1:1 127.0.0.1:2\t skmem:(r0,rb131072,t0,tb87040,f4,w1280,o0,bl0,d0)";
        assert_eq!(queued(line), Some(1280.0));
        assert_eq!(queued("nothing"), None);
    }
}
