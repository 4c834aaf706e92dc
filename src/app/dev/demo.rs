//! A conversation to look at: `demo`, with alice, bob and carol, one message a second.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use crate::app::config::{SettingValue as _, Settings};
use crate::app::publish::{Publisher, create, sent};
use crate::service::events::timestamp::Timestamp;

const CONVERSATION: &str = "demo";
const MEMBERS: [&str; 3] = ["alice", "bob", "carol"];
const PACE: Duration = Duration::from_secs(1);

const LINES: [&str; 6] = [
    "Good morning!",
    "Did this arrive at once?",
    "On my phone and on my desk.",
    "What if I close the window?",
    "Open it again and it goes on.",
    "Try it as somebody else, too.",
];

/// The feeder; it ends with this value.
pub(super) struct Demo {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Demo {
    /// Creates the conversation and begins to talk.
    ///
    /// # Errors
    /// Kafka did not take the first event, or there is no thread to be had.
    pub(super) fn start(settings: &Settings) -> Result<Self, String> {
        let publisher = Publisher::new(&settings.kafka_brokers.show())?;
        // The defaults are messages first, conversations second; who renamed them kept the order.
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
                    if stopped.recv_timeout(PACE) != Err(RecvTimeoutError::Timeout) {
                        return;
                    }
                    if let Err(why) = say(&publisher, &messages, number) {
                        tracing::warn!("demo: {why}");
                    }
                }
            })
            .map_err(|error| error.to_string())?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

fn say(publisher: &Publisher, topic: &str, number: usize) -> Result<(), String> {
    let now = Timestamp::from(SystemTime::now());
    let sender = MEMBERS[number % MEMBERS.len()];
    let text = LINES[number % LINES.len()];
    // Greater than every sequence of an earlier run, which clients may still remember.
    let sequence = now.unix_ms();
    publisher.publish(&sent(topic, CONVERSATION, sender, sequence, text, now)).map(drop)
}

impl Drop for Demo {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to hand back; a panic of its own has been printed.
            let _ = thread.join();
        }
    }
}
