//! `tests/run` itself, copied into a folder with groups that fail or start services.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::source::root;

/// A tree that has `tests/run` and these groups.
fn tree(groups: &str) -> TempDir {
    let tree = tempfile::tempdir().expect("a temporary folder");
    let tests = tree.path().join("tests");
    fs::create_dir(&tests).expect("writable");
    fs::copy(root().join("tests/run"), tests.join("run")).expect("copied");
    fs::write(tests.join("groups.sh"), groups).expect("written");
    tree
}

fn runner(tree: &Path, groups: &[&str]) -> Command {
    // A shell cannot handle a signal that was ignored when it began, as HUP is under `nohup`.
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP", "bash"]);
    command.arg(tree.join("tests/run")).args(groups).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a service that runs for a minute. Its port is the test's own.
fn service(listener: &TcpListener) -> String {
    format!("start_service fake {} sleep 60", listener.local_addr().expect("bound").port())
}

/// Fails unless every process that the runner started is gone: they inherit its lock.
fn assert_stopped(tree: &Path) {
    let lock = tree.join(".services/lock");
    let freed = Command::new("flock").args(["-w", "30"]).arg(lock).arg("true").status();
    assert!(freed.expect("runs").success(), "the service was not stopped");
}

#[test]
fn failed_group_is_named_and_the_others_run() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let service = service(&listener);
    let tree = tree(&format!(
        "inner() {{ false; echo after the failure; }}
         group_first() {{ {service}; inner; echo after the failure; }}
         group_second() {{ echo second ran; }}
         group_third() {{ die 'gave up'; }}"
    ));
    let output = runner(tree.path(), &["first", "second", "third"]).output().expect("runs");
    assert_stopped(tree.path());
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert!(!stdout.contains("after the failure"), "{stdout}");
    assert!(stdout.contains("second ran"), "{stdout}");
    for (group, outcome) in [("first", "FAILED"), ("second", "passed"), ("third", "FAILED")] {
        assert!(stdout.contains(&format!("{group:10} {outcome} in ")), "{stdout}");
    }
    assert!(stderr.contains("first failed: false (line 1 of tests/groups.sh)"), "{stderr}");
    assert!(stderr.contains("gave up"), "{stderr}");
    assert!(stderr.ends_with("FAILED: first third\n"), "{stderr}");
}

#[test]
fn all_groups_passed_is_status_zero() {
    let tree = tree("group_only() { echo it ran; }");
    let output = runner(tree.path(), &["only"]).output().expect("runs");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("all passed in"));
}

#[test]
fn unknown_group_is_refused_before_any_runs() {
    let tree = tree("group_only() { echo it ran; }");
    let output = runner(tree.path(), &["only", "other"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no group 'other'"));
}

#[test]
fn signal_stops_services_and_starts_no_further_group() {
    for signal in [Signal::TERM, Signal::HUP, Signal::KILL] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let service = service(&listener);
        let tree = tree(&format!(
            "group_first() {{ {service}; echo started; sleep 60 >/dev/null 2>&1 9>&-; }}
             group_second() {{ echo second ran; }}"
        ));
        let mut runner = runner(tree.path(), &["first", "second"]).spawn().expect("runs");
        let mut lines = BufReader::new(runner.stdout.take().expect("piped")).lines();
        assert!(lines.any(|line| line.expect("text") == "started"));
        kill_process(Pid::from_child(&runner), signal).expect("alive");
        assert!(!runner.wait().expect("ended").success());
        assert_stopped(tree.path());
        assert!(!lines.any(|line| line.expect("text") == "second ran"));
    }
}
