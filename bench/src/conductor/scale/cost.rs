//! What a message costs among few and among many sessions: the server on core 0, the clients on
//! core 1, events injected at the router.

use std::io;
use std::thread::sleep;

use super::super::child::number;
use super::{Report, SETTLE, ScalePlan};
use crate::generator;
use crate::usage;

const SERVER_CORE: usize = 0;
/// The few.
const FEW: usize = 1_000;
/// Messages of one measurement, or one for each session if that is more.
const MESSAGES: usize = 200_000;
/// Each server is measured so often, and so many servers are started for each number of sessions.
const PUSHES: usize = 3;
const ROUNDS: usize = 2;

/// Runs it.
pub(super) fn run(plan: &ScalePlan, report: &mut Report) -> io::Result<()> {
    let many = plan.shards();
    let cases = [(FEW, 1), (FEW, many), (plan.sessions, many)];
    let mut costs = vec![Vec::new(); cases.len()];
    for round in 0..ROUNDS {
        let mut order: Vec<usize> = (0..cases.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for case in order {
            let (sessions, shards) = cases[case];
            let found = measure(plan, sessions, shards)?;
            eprintln!("{sessions} sessions, {shards} shards: {found:.2?} µs");
            costs[case].extend(found);
        }
    }
    let median = |costs: &mut Vec<f64>| {
        costs.sort_by(f64::total_cmp);
        costs[costs.len() / 2]
    };
    let medians: Vec<f64> = costs.iter_mut().map(median).collect();
    report.note(
        "processor time of the whole server and its core's ksoftirqd for each message, one recipient each, 128 B, \
         injected at the router",
    );
    for (((sessions, shards), costs), median) in cases.iter().zip(&costs).zip(&medians) {
        report.note(&format!(
            "{sessions} sessions in {shards} shards: {median:.2} µs ({:.2} to {:.2}); {:.2} × that of {FEW} in one shard",
            costs[0],
            costs[costs.len() - 1],
            median / medians[0]
        ));
    }
    Ok(())
}

fn measure(plan: &ScalePlan, sessions: usize, shards: usize) -> io::Result<Vec<f64>> {
    let (mut server, mut fleet) = plan.parts(shards, &[])?;
    fleet.grow(sessions)?;
    // Whole rounds, so that every session gets as many.
    let events = (MESSAGES.div_ceil(sessions) * sessions) as u64;
    let push = generator::Plan { group: 1, burst: 1, events, rate: 0, at_once: 1, bytes: 128 };
    server.ask(&format!("prepare {push}"), "prepared")?;
    sleep(SETTLE);
    let mut costs = Vec::new();
    for number_of_push in 0..=PUSHES {
        fleet.ask("reset", "done")?;
        let used = || {
            Ok::<_, io::Error>(usage::process_ns(server.id())? + usage::softirq_ns(SERVER_CORE)?)
        };
        let before = used()?;
        let pushed = server.ask(&format!("push {push}"), "elapsed_ns")?;
        let seen = fleet.receive(number(&pushed, "messages"))?;
        if seen.messages != events as f64 || seen.wrong() > 0.0 {
            return Err(io::Error::other(format!("not all came as they should: {seen:?}")));
        }
        let used = usage::process_ns(server.id())? + usage::softirq_ns(SERVER_CORE)? - before;
        // The first only warms up.
        if number_of_push > 0 {
            costs.push(used as f64 / events as f64 / 1000.0);
        }
    }
    Ok(costs)
}
