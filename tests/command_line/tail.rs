//! `delivery tail` as a child process.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;

use serde_json::Value;

use crate::support::node::{Node, binary};
use crate::support::wait::SOON;

/// A running `delivery tail`, killed when dropped.
pub(crate) struct Tail {
    child: Child,
    notices: Receiver<String>,
    events: Receiver<String>,
}

/// The lines of a pipe, read on a thread, so that a missing line fails the test instead of blocking it.
fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(pipe).lines().map_while(Result::ok);
        // Ends with the pipe or with the test.
        lines.all(|line| sender.send(line).is_ok())
    });
    lines
}

impl Tail {
    /// Starts it and waits until it is connected.
    pub(crate) fn connect(node: &Node, user: &str, more: &[&str]) -> Self {
        let mut child = Command::new(binary())
            .args(["tail", "--user", user, "--device", "desk", "--url"])
            .arg(node.public.to_string())
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let notices = lines(child.stderr.take().unwrap());
        let events = lines(child.stdout.take().unwrap());
        let tail = Self { child, notices, events };
        let notice = tail.notice();
        assert!(notice.starts_with("connected to "), "{notice}");
        tail
    }

    /// The next line on standard error.
    pub(crate) fn notice(&self) -> String {
        self.notices.recv_timeout(SOON).expect("a line on standard error")
    }

    /// The next event; `None`: the process has ended.
    pub(crate) fn event(&self) -> Option<Value> {
        match self.events.recv_timeout(SOON) {
            Ok(line) => Some(serde_json::from_str(&line).unwrap()),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no event within {SOON:?}"),
        }
    }

    /// The type of the next event, without its common prefix.
    pub(crate) fn kind(&self) -> Option<String> {
        let event = self.event()?;
        Some(event["eventType"].as_str().unwrap().trim_start_matches("EVENT_TYPE_").to_owned())
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        // An error means that it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
