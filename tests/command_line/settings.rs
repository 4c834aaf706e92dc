//! The configuration as the command reports it.

use std::process::{Command, Output};

use crate::support::node::binary;

fn run(arguments: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(binary())
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";

#[test]
fn valid_configuration_is_printed_with_sources_and_without_secrets() {
    let variables = [("KAFKA_BROKERS", "kafka:9092"), ("JWT_SECRET", SECRET)];
    let (code, out, _) = run(&["config", "--shards", "3"], &variables);
    assert_eq!(code, Some(0));
    let line = |start: &str| out.lines().find(|line| line.contains(start)).unwrap().to_owned();
    assert!(line("kafka_brokers").ends_with("# environment KAFKA_BROKERS"), "{out}");
    assert!(line("shards").ends_with("# command line"), "{out}");
    assert!(line("routers").ends_with("# default"), "{out}");
    assert!(!out.contains(SECRET), "{out}");
}

#[test]
fn all_errors_are_reported_together_with_status_2() {
    let variables = [("HTTP_PORT", "web"), ("PING_INTERVAL", "54"), ("JWT_SECRET", "hunter2")];
    for command in ["serve", "config"] {
        let (code, out, err) = run(&[command, "--shards", "many"], &variables);
        assert_eq!((code, out.as_str()), (Some(2), ""));
        for part in ["--shards 6", "HTTP_PORT=", "PING_INTERVAL=54s"] {
            assert!(err.contains(part), "{part}\n{err}");
        }
        assert!(!err.contains("hunter2"), "{err}");
    }
    let (code, _, err) = run(&["serve"], &[("JWT_SECRET", "hunter2")]);
    assert_eq!(code, Some(2));
    assert!(err.contains("KAFKA_BROKERS") && err.contains("shorter than 32 bytes"), "{err}");
    assert!(!err.contains("hunter2"), "{err}");
}

#[test]
fn unknown_key_in_the_file_is_refused_with_the_nearest_name() {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("unknown-key.toml");
    std::fs::write(&path, "kafka_broker = 'kafka:9092'\n").unwrap();
    let (code, _, err) = run(&["config", "--dev", "--config", path.to_str().unwrap()], &[]);
    assert_eq!(code, Some(2));
    assert!(err.contains("did you mean `kafka_brokers`?"), "{err}");
}

#[test]
fn dev_refuses_trust_on_a_public_address() {
    let (code, _, err) = run(&["dev", "--http-port", "0.0.0.0:0"], &[]);
    assert_eq!(code, Some(1));
    assert!(err.contains("example: HTTP_PORT=127.0.0.1:"), "{err}");
}
