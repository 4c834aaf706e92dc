//! A server or client process that obeys words and answers in JSON.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

/// Limit for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// A running process. Stopped when dropped.
pub(crate) struct Worker {
    child: Child,
    words: ChildStdin,
    answers: Receiver<Value>,
    name: String,
}

impl Worker {
    pub(crate) fn start(command: &[String]) -> io::Result<Self> {
        let (program, arguments) = command.split_first().expect("a program");
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| io::Error::other(format!("{program}: {error}")))?;
        let words = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(value) => {
                        if sender.send(value).is_err() {
                            return;
                        }
                    }
                    Err(_) => eprintln!("{line}"),
                }
            }
        });
        Ok(Self { child, words, answers, name: program.clone() })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn tell(&mut self, word: &str) -> io::Result<()> {
        writeln!(self.words, "{word}")?;
        self.words.flush()
    }

    /// The next answer with a member of this name.
    pub(crate) fn expect(&self, member: &str) -> io::Result<Value> {
        self.expect_within(member, ANSWER_MAX)
    }

    /// The same with another limit.
    pub(super) fn expect_within(&self, member: &str, limit: Duration) -> io::Result<Value> {
        loop {
            let answer = self.answers.recv_timeout(limit).map_err(|_| {
                io::Error::other(format!("{} gave no answer with {member:?}", self.name))
            })?;
            if answer.get(member).is_some() {
                return Ok(answer);
            }
        }
    }

    pub(super) fn ask(&mut self, word: &str, member: &str) -> io::Result<Value> {
        self.tell(word)?;
        self.expect(member)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.tell("quit");
        for _ in 0..100 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A number in an answer; 0 if it is missing.
pub(crate) fn number(answer: &Value, member: &str) -> f64 {
    answer.get(member).and_then(Value::as_f64).unwrap_or(0.0)
}
