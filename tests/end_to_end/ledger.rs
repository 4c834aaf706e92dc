//! Compares the ledger's memory per session with what the process and the kernel allocate while a
//! hundred thousand sessions connect.
//!
//! A single reading is not enough: pools, tables and threads allocate with the first sessions, and
//! tables double. So memory is read at two counts of sessions. At both, the 64 parts of the directory
//! are 90 % full and the records of a shard fill 80 % of a power of two. Between them each table
//! doubles once, so the slope is the average cost of a session. The allocator may keep the old copy of
//! a table for a while, which is as much again as the tables have grown.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::support::crowd::Crowd;
use crate::support::fleet::raise_descriptor_limit;
use crate::support::node::{Node, NodeBuilder};
use crate::support::wait::until;

/// Sessions at most: in all, and of one shard.
const SESSIONS: usize = 102_400;
const PER_SHARD: usize = 12_800;
/// Files of a shard beyond those of its sessions, including refusals and reserve.
const FILES_BESIDE: usize = 512;
/// Kernel memory for both ends of a connection, with a wide margin.
const CONNECTION_BYTES: u64 = 10_000;
const MEMORY_SHARE: u64 = 4;

/// Allowed ratio of measured to calculated memory: the minimum without the old copies of tables, the
/// maximum with them. The allocator rounds up (to 80 bytes for the ids) and does not return the memory
/// of handshakes at once, up to a page for each shard: so the median of [`RUNS`] counts. A ledger without its smallest
/// part, 32 bytes, would exceed the maximum.
const LEAST: f64 = 0.95;
const MOST: f64 = 1.18;
/// The parts of the ledger that are tables.
const TABLES: [&str; 2] = ["directory", "record"];
/// Issue “A million quiet connections, and the fastest push”: bytes per session.
const BUDGET: f64 = 400.0;
/// Allowed ratio of slab growth by cache to the ledger: structures differ between kernels.
const CACHES: RangeInclusive<f64> = 0.8..=1.2;
/// The same for all slabs of the machine, which other processes use as well.
const ALL_SLABS: RangeInclusive<f64> = 0.7..=1.4;
/// Runs, each with a node of its own.
const RUNS: usize = 3;
/// Readings of the slabs in each run. Other processes that disturb some of them hardly move the median of all.
const STEPS: usize = 12;

/// Memory has settled when it stays within this for this many readings.
const SETTLED_BYTES: f64 = 32.0 * 1024.0;
const SETTLED_LOOKS: usize = 40;
const SETTLED_WITHIN: Duration = Duration::from_secs(120);
const ADMITTED_WITHIN: Duration = Duration::from_secs(120);

/// Slab caches of a socket.
const SOCKET: [&str; 6] =
    ["TCP", "sock_inode_cache", "filp", "dentry", "lsm_inode_cache", "lsm_file_cache"];
/// Slab cache of a pending poll.
const WATCH: &str = "io_kiocb";

/// As many sessions as the machine's memory allows; the numbers keep their proportions.
struct Size {
    shards: usize,
    few: usize,
    many: usize,
}

impl Size {
    fn of_this_machine() -> Self {
        let limit = usize::try_from(raise_descriptor_limit()).unwrap_or(usize::MAX);
        // The kernel spreads connections by a hash, not evenly. Shards must not be smaller: their own
        // memory, which they touch gradually, has to be small compared with that of their sessions.
        let least = PER_SHARD + PER_SHARD / 4 + FILES_BESIDE;
        assert!(
            limit >= least,
            "needs a hard limit of {least} descriptors (RLIMIT_NOFILE, `ulimit -Hn`), has {limit}"
        );
        let available = bytes_of(&read("/proc/meminfo"), "MemAvailable:") as u64;
        let mut many = SESSIONS;
        while many as u64 * CONNECTION_BYTES > available / MEMORY_SHARE && many > PER_SHARD {
            many /= 2;
        }
        let shards = many / PER_SHARD;
        Self { shards, few: many * 77 / 160, many }
    }

    /// Room for records per session that connects after the first reading, if each table doubles once.
    fn records(&self) -> f64 {
        let room = |sessions: usize| (sessions / self.shards).next_power_of_two() * self.shards;
        (room(self.many) - room(self.few)) as f64 / (self.many - self.few) as f64
    }
}

/// Memory at one moment.
#[derive(Clone, Debug)]
struct Reading {
    sessions: f64,
    /// Anonymous memory of the process, resident or swapped; excludes its program text.
    process: f64,
    /// Allocated slots of all shards: chunks of 1,024.
    slots: f64,
    /// Room in the tables of records: each shard has one, which doubles. Shards that run more often accept more
    /// clients, so not all of them double between the readings.
    records: f64,
}

impl Reading {
    fn take(node: &Node, shards: usize, sessions: usize) -> Self {
        let look = || {
            let rollup = read(&format!("/proc/{}/smaps_rollup", node.pid().as_raw_nonzero()));
            bytes_of(&rollup, "Anonymous:") + bytes_of(&rollup, "Swap:")
        };
        let (mut process, mut looks) = (look(), 0);
        until(SETTLED_WITHIN, "memory settles", || {
            let now = look();
            looks = if (now - process).abs() > SETTLED_BYTES { 0 } else { looks + 1 };
            process = if looks == 0 { now } else { process };
            (looks == SETTLED_LOOKS).then_some(())
        });
        let metrics = node.metrics();
        let slots = metrics.sum("delivery_shard_slots_allocated", &[]);
        let of_shard = |shard| format!("shard=\"{shard}\"");
        let records = |shard| {
            let used = metrics.sum("delivery_shard_slots_used", &[&of_shard(shard)]);
            (used as usize).next_power_of_two() as f64
        };
        let records = (0..shards).map(records).sum();
        Self { sessions: sessions as f64, process, slots, records }
    }

    /// Bytes, slots and room for records per session since `before`.
    fn since(&self, before: &Self) -> (f64, f64, f64) {
        let sessions = self.sessions - before.sessions;
        let each = |after: f64, before: f64| (after - before) / sessions;
        let (process, slots) = (each(self.process, before.process), each(self.slots, before.slots));
        (process, slots, each(self.records, before.records))
    }
}

/// The kernel's slabs: of the whole machine, and by cache where that is readable.
struct Slabs {
    all: f64,
    caches: BTreeMap<String, f64>,
}

impl Slabs {
    fn read() -> Self {
        // Only root can read it.
        let caches = std::fs::read_to_string("/proc/slabinfo").unwrap_or_default();
        let all = bytes_of(&read("/proc/meminfo"), "Slab:");
        Self { all, caches: caches.lines().filter_map(cache).collect() }
    }

    /// `None`: not readable.
    fn of(&self, names: &[&str]) -> Option<f64> {
        let known = names.iter().filter_map(|name| self.caches.get(*name));
        self.caches.contains_key(names[0]).then(|| known.sum())
    }
}

/// Name and bytes in use of a line of `/proc/slabinfo`.
fn cache(line: &str) -> Option<(String, f64)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(((*fields.first()?).to_owned(), number(2)? * number(3)?))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn bytes_of(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(name));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.unwrap_or_else(|| panic!("no {name}")) * 1024.0
}

/// Connects until there are this many sessions and all are admitted.
fn grow(crowd: &mut Crowd, node: &Node, sessions: usize) {
    crowd.grow(sessions);
    let ended = || node.metrics().nonzero("delivery_shard_ended_total");
    until(ADMITTED_WITHIN, "all sessions are admitted", || {
        assert_eq!(ended(), [], "a session has ended");
        let active = node.metrics().sum("websocket_connections_active", &[]);
        (active == sessions as f64).then_some(())
    });
}

/// Growth of `what` in the kernel's slabs, bytes per session: the median over the steps of all runs.
fn slope(runs: &[Measured], what: impl Fn(&Slabs) -> Option<f64>) -> Option<f64> {
    let each = |pair: &[(usize, Slabs)]| {
        let sessions = (pair[1].0 - pair[0].0) as f64;
        Some((what(&pair[1].1)? - what(&pair[0].1)?) / sessions)
    };
    let pairs = runs.iter().flat_map(|run| run.slabs.windows(2));
    let mut each: Vec<f64> = pairs.map(each).collect::<Option<_>>()?;
    each.sort_by(f64::total_cmp);
    Some(each[each.len() / 2])
}

#[track_caller]
fn assert_within(what: &str, measured: f64, (least, most): (f64, f64)) {
    println!("{what}: {measured:.0} B a session, {least:.0} to {most:.0} B by the ledger");
    assert!(
        (least..=most).contains(&measured),
        "{what}: a session takes {measured:.0} B, and by the ledger {least:.0} to {most:.0} B"
    );
}

/// What a session takes, bytes.
struct Measured {
    process: f64,
    /// By the ledger.
    reckoned: f64,
    /// Old copies of tables, at most.
    outgrown: f64,
    /// The slabs at each number of sessions.
    slabs: Vec<(usize, Slabs)>,
    kernel: KernelParts,
}

/// What the kernel takes for a session by the ledger, bytes.
#[derive(Clone, Copy)]
struct KernelParts {
    all: f64,
    socket: f64,
    watch: f64,
}

impl Measured {
    fn ratio(&self) -> f64 {
        self.process / self.reckoned
    }

    fn run() -> Self {
        let size = Size::of_this_machine();
        let node = NodeBuilder::dev()
            .set("SHARDS", size.shards)
            // The clients answer no pings.
            .set("PING_INTERVAL", "1h")
            .set("IDLE_TIMEOUT", "2h")
            // On a busy machine they may send their first message late.
            .set("RESUME_GRACE", "5m")
            .start();
        let metrics = node.metrics();
        let part = |part: &str| {
            metrics.sum("delivery_memory_session_bytes", &[&format!("part=\"{part}\"")])
        };
        let all = metrics.sum("delivery_memory_session_bytes", &[]);

        let mut crowd = Crowd::new(node.public);
        grow(&mut crowd, &node, size.few);
        let few = Reading::take(&node, size.shards, size.few);
        let mut slabs = vec![(size.few, Slabs::read())];
        for step in 1..=STEPS {
            let sessions = size.few + (size.many - size.few) * step / STEPS;
            grow(&mut crowd, &node, sessions);
            slabs.push((sessions, Slabs::read()));
        }
        let (measured, slots, records) = Reading::take(&node, size.shards, size.many).since(&few);
        // Slots are allocated in chunks. The table of records of each shard is to double once; those that do not take
        // less.
        let reckoned =
            all + part("slot") * (slots - 1.0) + part("record") * (records / size.records() - 1.0);
        println!("a session takes {slots:.2} slots and {records:.2} records");
        let outgrown: f64 = TABLES.into_iter().map(part).sum();
        let process = measured;
        println!("process: {process:.0} B a session, {reckoned:.0} B by the ledger");

        let name = "delivery_memory_session_kernel_bytes";
        let part = |part: &str| metrics.sum(name, &[&format!("part=\"{part}\"")]);
        let kernel = KernelParts {
            all: metrics.sum(name, &[]),
            socket: part("socket"),
            watch: part("watch"),
        };
        Self { process, reckoned, outgrown, slabs, kernel }
    }
}

/// Compares the kernel's memory with the ledger.
fn check_kernel(runs: &[Measured]) {
    let KernelParts { all, socket, watch } = runs[0].kernel;
    let around = |reckoned: f64, range: &RangeInclusive<f64>| {
        (reckoned * range.start(), reckoned * range.end())
    };
    // The other end is a socket in a table, too, but without a poll.
    let both = 2.0 * all - watch;
    let measured = slope(runs, |slabs| Some(slabs.all)).expect("readable by every user");
    assert_within("slabs, both ends", measured, around(both, &ALL_SLABS));
    let sockets = slope(runs, |slabs| slabs.of(&SOCKET));
    let watches = slope(runs, |slabs| slabs.of(&[WATCH]));
    for (what, measured, reckoned) in
        [("sockets, both ends", sockets, 2.0 * socket), ("watch", watches, watch)]
    {
        match measured {
            Some(measured) => assert_within(what, measured, around(reckoned, &CACHES)),
            None => println!("{what}: only root may look at /proc/slabinfo"),
        }
    }
}

#[test]
#[ignore = "loads the machine: tests/run end_to_end"]
fn session_takes_the_memory_of_the_ledger() {
    // The node inherits this: a huge page that the kernel makes of small ones would be counted as
    // memory of sessions.
    rustix::thread::disable_transparent_huge_pages(true).expect("Linux has this");
    let mut runs: Vec<_> = (0..RUNS).map(|_| Measured::run()).collect();
    check_kernel(&runs);
    runs.sort_by(|one, other| f64::total_cmp(&one.ratio(), &other.ratio()));
    let Measured { process, reckoned, outgrown, .. } = runs[RUNS / 2];
    assert_within("process", process, (LEAST * reckoned, MOST * (reckoned + outgrown)));
    assert!(process <= BUDGET, "{process:.0} B a session");
}
