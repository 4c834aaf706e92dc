//! Start under limits of the system, and output that takes no more: each gets a message that names the limit and a
//! value that works.

use std::collections::BTreeMap;
use std::fs::File;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use crate::support::node::{Node, NodeBuilder, binary};
use crate::support::wait::{SOON, until};

/// Drops the capability that exempts from `RLIMIT_MEMLOCK`, if there is one.
const NO_IPC_LOCK: &str =
    "[ \"$(id -u)\" != 0 ] || set -- --bounding-set=-ipc_lock --inh-caps=-ipc_lock -- \"$0\" \"$@\"
[ \"$(id -u)\" != 0 ] || exec setpriv \"$@\"";

/// The output of a node that does not start, and its exit status.
fn refused(mut node: Node) -> String {
    let status = until(SOON, "the node exits", || node.ended());
    let log = node.log();
    assert_eq!(status.code(), Some(1), "{log}");
    log
}

/// What follows `before` in a message, up to the next character that is no digit.
fn number_after(log: &str, before: &str) -> u64 {
    let (_, rest) = log.split_once(before).unwrap_or_else(|| panic!("{before}: {log}"));
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().unwrap_or_else(|_| panic!("{before}: {log}"))
}

fn stops_with_0(mut node: Node) {
    let status = node.stop(SOON);
    assert_eq!(status.code(), Some(0), "{}", node.log());
}

#[test]
fn too_few_descriptors_are_named_with_a_number_that_works() {
    let log = refused(NodeBuilder::dev().under("ulimit -n 64").spawn());
    assert!(log.contains("RLIMIT_NOFILE") && log.contains("is 64"), "{log}");
    assert!(!log.contains("--shards"), "{log}");
    let works = number_after(&log, "but ");
    stops_with_0(NodeBuilder::dev().under(&format!("ulimit -n {works}")).start());
}

/// Before Linux 6.14 rings do not count.
#[test]
fn too_little_locked_memory_is_named_with_a_number_that_works() {
    let under = |kib: u64| {
        NodeBuilder::dev().set("SHARDS", 2).under(&format!("ulimit -l {kib}\n{NO_IPC_LOCK}"))
    };
    let mut node = under(64).spawn();
    let outcome = until(SOON, "the node starts or exits", || {
        let is_ready = node.get("/health/ready").is_some_and(|answer| answer.status == 200);
        if is_ready { Some(None) } else { node.ended().map(Some) }
    });
    if outcome.is_none() {
        return;
    }
    let log = node.log();
    assert!(log.contains("RLIMIT_MEMLOCK is 64 KiB"), "{log}");
    stops_with_0(under(number_after(&log, "ulimit -l ")).start());
}

#[test]
fn too_little_address_space_is_named_with_a_number_that_works() {
    let log = refused(NodeBuilder::dev().under("ulimit -v 400000").spawn());
    assert!(log.contains("RLIMIT_AS"), "{log}");
    let works = number_after(&log, "ulimit -v ");
    stops_with_0(NodeBuilder::dev().under(&format!("ulimit -v {works}")).start());
}

/// Becomes a user without other processes, because the limit does not hold for root.
const ANOTHER_USER: &str =
    "[ $uid != 0 ] || set -- --reuid=61017 --clear-groups --pdeathsig KILL -- \"$0\" \"$@\"
[ $uid != 0 ] || exec setpriv \"$@\"";

#[test]
fn too_few_threads_are_named_with_a_number_that_works() {
    let under = |threads: u64| {
        NodeBuilder::dev().under(&format!("uid=$(id -u)\nulimit -u {threads}\n{ANOTHER_USER}"))
    };
    // librdkafka aborts the process at some of them, and waits without end at others.
    for threads in [6, 12, 20] {
        let log = refused(under(threads).spawn());
        assert!(log.contains(&format!("(RLIMIT_NPROC) is {threads}")), "{log}");
        assert!(log.contains("TasksMax=") && log.contains("--pids-limit"), "{log}");
    }
    let log = refused(under(20).spawn());
    stops_with_0(under(number_after(&log, "ulimit -u ")).start());
}

/// The main thread waits for the output.
#[test]
fn second_signal_exits_a_node_whose_output_is_not_read() {
    let full_pipe =
        "pipe=$(mktemp -u)\nmkfifo $pipe\nexec 1<>$pipe\nrm $pipe\nhead -c 65536 /dev/zero";
    let mut node = NodeBuilder::dev().under(full_pipe).spawn();
    until(SOON, "the node is ready", || node.log().contains("INFO ready").then_some(()));
    // Two of the same could become one.
    node.signal(Signal::TERM);
    node.signal(Signal::INT);
    let status = until(SOON, "the node exits", || node.ended());
    assert!(matches!(status.code(), Some(130 | 143)), "{status}: {}", node.log());
}

/// A sandbox may allow one of the three calls and refuse another.
#[test]
fn refused_system_call_of_io_uring_is_named() {
    for (number, name) in
        [(425, "io_uring_setup"), (426, "io_uring_enter"), (427, "io_uring_register")]
    {
        // The filter holds for this thread and what it starts.
        let log = std::thread::spawn(move || {
            let rules = BTreeMap::from([(number, Vec::new())]);
            let refuse = SeccompAction::Errno(1);
            let arch = std::env::consts::ARCH.try_into().expect("a known architecture");
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
            let program: BpfProgram = filter.try_into().unwrap();
            apply_filter(&program).unwrap();
            refused(NodeBuilder::dev().spawn())
        });
        let log = log.join().unwrap();
        assert!(log.contains(&format!("{name} is not permitted")), "{log}");
        assert!(log.contains("seccomp") || log.contains("io_uring_disabled"), "{log}");
    }
}

#[test]
fn node_whose_output_takes_no_more_serves_on() {
    let node = NodeBuilder::dev().output("/dev/full").start();
    assert!(node.metrics().sum("delivery_log_write_errors_total", &[]) > 0.0);
    let mut node = node;
    node.signal(Signal::TERM);
    assert_eq!(until(SOON, "the node exits", || node.ended()).code(), Some(0));
}

#[test]
fn command_whose_output_takes_no_more_says_so() {
    let run = |arguments: &[&str]| {
        let full = File::options().write(true).open("/dev/full").unwrap();
        Command::new(binary()).env_clear().args(arguments).stdout(full).output().unwrap()
    };
    for arguments in [
        &["config", "--dev"][..],
        &["config", "--reference"],
        &["sizing"],
        &["--help"],
        &["serve", "--help"],
        &["--version"],
    ] {
        let output = run(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("cannot write to the standard output: No space left"), "{text}");
    }
    // As `delivery config --reference | head -1`, whose reader ends early.
    let mut child = Command::new(binary())
        .env_clear()
        .args(["config", "--reference"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    // Nobody is left to tell why.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let status = Command::new(binary()).env_clear().args(["serve"]).stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(2));
}
