//! Memory of the table of sessions, and the time to fill it and to look users up.

use std::hint::black_box;
use std::io;
use std::time::Instant;

use delivery::domain::encoding::Encoding;
use delivery::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use delivery::service::members::directory::{Directory, SessionIds};
use delivery::service::routing::sizing::table_bytes;

use super::names::{fill, table};
use crate::names::{device, user};
use crate::usage::{resident_bytes, thread_ns};

/// Users looked up.
const LOOKUPS: usize = 1_000_000;

/// Fills the table.
#[derive(clap::Args, Debug)]
pub struct TablePlan {
    /// Sessions of all nodes.
    #[arg(long, default_value_t = 10_000_000)]
    sessions: usize,
    /// Nodes.
    #[arg(long, default_value_t = 50)]
    nodes: usize,
}

/// Time of `look_up` for each of `LOOKUPS` users of these, in random order, ns.
fn look_up(users: impl Fn(usize) -> usize, mut look_up: impl FnMut(&str)) -> f64 {
    let mut state = 1_u64;
    let mut total = 0;
    for _ in 0..LOOKUPS / 10_000 {
        let names: Vec<String> = (0..10_000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                user(users((state >> 33) as usize))
            })
            .collect();
        let before = thread_ns();
        names.iter().for_each(|name| look_up(name));
        total += thread_ns() - before;
    }
    total as f64 / LOOKUPS as f64
}

impl TablePlan {
    /// Prints what it found.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn run(&self) -> io::Result<()> {
        let resident = || resident_bytes(std::process::id());
        let (sessions, nodes) = (self.sessions, self.nodes);
        let table = table();
        let before = resident()?;
        let (mut records, mut ns, mut slowest) = (0, 0, f64::MAX);
        let begun = Instant::now();
        fill(&table, sessions, nodes, |count, apply| {
            let started = thread_ns();
            apply();
            let took = thread_ns() - started;
            (records, ns) = (records + count, ns + took);
            slowest = slowest.min(count as f64 / took as f64 * 1e9);
        });
        let grown = resident()? - before;
        println!(
            "{records} records applied: {:.0} a second of CPU time ({:.0} ns each; the slowest 100,000: \
             {slowest:.0} a second); {:.1} s with making them",
            records as f64 / ns as f64 * 1e9,
            ns as f64 / records as f64,
            begun.elapsed().as_secs_f64(),
        );
        println!(
            "table: {} B, {:.1} B a session (computed: {:.0} B); the process grew by {grown} B, {:.1} B a \
             session, newcomers included",
            table.bytes(),
            table.bytes() as f64 / sessions as f64,
            table_bytes(sessions as f64),
            grown as f64 / sessions as f64,
        );
        let all = table.next_offset();
        let mut found = 0_u64;
        let mut visit = |user: &str, applied| {
            table.nodes_of(user, applied, |_| found += 1);
        };
        let known = look_up(|it| it % sessions, |user| visit(user, all));
        // As a lane that has not applied the last beginning.
        let behind = look_up(|it| it % sessions, |user| visit(user, all - 1));
        let unknown = look_up(|it| sessions + it % sessions, |user| visit(user, all));
        println!(
            "nodes of a user: {known:.0} ns, {behind:.0} ns while a beginning is not applied, {unknown:.0} ns \
             for a user without a session ({found} found)"
        );
        let directory = Directory::new();
        let own = sessions / nodes;
        for number in 0..own {
            let ids = SessionIds::new(&user(number * nodes), &device(number * nodes));
            let connection = ConnectionKey { slot: number as u32, generation: 0 };
            let address =
                SessionAddress { shard: ShardId(0), encoding: Encoding::Binary, connection };
            directory.insert(ids, address);
        }
        let of = |user: &str| {
            black_box(directory.sessions_of(user, |_| {}));
        };
        let elsewhere = look_up(|it| (it % sessions) / nodes * nodes + 1, of);
        let here = look_up(|it| it % own * nodes, of);
        println!(
            "sessions of a user on this node ({own} sessions): {elsewhere:.0} ns if there is none, {here:.0} ns \
             if there is one"
        );
        Ok(())
    }
}
