//! The demo conversation: `demo` with alice, bob and carol, a message about once a second.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use crate::app::config::{SettingValue as _, Settings};
use crate::app::publish::{Publisher, create, sent};
use crate::service::events::timestamp::Timestamp;

const CONVERSATION: &str = "demo";
const MEMBERS: [&str; 3] = ["alice", "bob", "carol"];
const INTERVAL: Duration = Duration::from_secs(1);

const LINES: [&str; 6] = [
    "Good morning!",
    "Did this arrive immediately?",
    "Yes, on my phone and on my laptop.",
    "What happens if I close the window?",
    "Open it again, and it continues.",
    "Try it as another user, too.",
];

/// Handle of the thread that sends the messages. Dropping it stops the thread.
pub(super) struct Demo {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Demo {
    /// Creates the conversation and starts sending messages.
    ///
    /// # Errors
    /// Kafka did not accept the first event, or the thread cannot be started.
    pub(super) fn start(settings: &Settings) -> Result<Self, String> {
        let publisher = Publisher::new(&settings.kafka_brokers.show())?;
        // `kafka_topics` lists the topic of messages first and that of conversations second.
        let topic = |index: usize| {
            let topics = &settings.kafka_topics;
            topics[index.min(topics.len() - 1)].as_str().to_owned()
        };
        let (messages, conversations) = (topic(0), topic(1));
        let members = MEMBERS.map(str::to_owned);
        let now = Timestamp::from(SystemTime::now());
        publisher.publish(&create(&conversations, CONVERSATION, "Demo", &members, now))?;

        let (stop, stopped) = channel();
        let thread = thread::Builder::new()
            .name("demo".into())
            .spawn(move || {
                for number in 0.. {
                    if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                        return;
                    }
                    if let Err(why) = send(&publisher, &messages, number) {
                        tracing::warn!("demo: {why}");
                    }
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

fn send(publisher: &Publisher, topic: &str, number: usize) -> Result<(), String> {
    let now = Timestamp::from(SystemTime::now());
    let sender = MEMBERS[number % MEMBERS.len()];
    let text = LINES[number % LINES.len()];
    // Higher than the sequences of earlier runs, which clients may still have.
    let sequence = now.unix_ms();
    publisher.publish(&sent(topic, CONVERSATION, sender, sequence, text, now)).map(drop)
}

impl Drop for Demo {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a panic ends the process");
        }
    }
}
