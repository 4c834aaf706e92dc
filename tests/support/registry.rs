//! The Redis keys and channels of contract §4, as another service sees them.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::UNIX_EPOCH;

use delivery_testkit::proto::presence::v1::{PresenceStatus, PresenceUpdateEvent};
use prost::Message as _;
use redis::Commands as _;

use super::wait::SOON;

/// A connection to Redis. Tests use key names that no other test uses.
pub struct Registry {
    client: redis::Client,
    connection: redis::Connection,
}

impl Registry {
    /// Connects to `host:port`.
    pub fn new(address: &str) -> Self {
        let client = redis::Client::open(format!("redis://{address}")).expect("an address");
        let connection = client.get_connection().expect("Redis answers");
        Self { client, connection }
    }

    /// `session:{user}:{device}`: the instance that holds it.
    pub fn instance_of(&mut self, user: &str, device: &str) -> Option<String> {
        self.connection.get(format!("session:{user}:{device}")).expect("Redis answers")
    }

    /// Remaining lifetime of that key, seconds.
    pub fn lives_for(&mut self, user: &str, device: &str) -> i64 {
        self.connection.ttl(format!("session:{user}:{device}")).expect("Redis answers")
    }

    /// `presence:user:{user}:devices`.
    pub fn devices_of(&mut self, user: &str) -> BTreeSet<String> {
        self.connection.smembers(format!("presence:user:{user}:devices")).expect("Redis answers")
    }

    /// Writes the registration of a session as the presence service does.
    pub fn register(&mut self, user: &str, device: &str, instance: &str) {
        let key = format!("session:{user}:{device}");
        let (): () = self.connection.set_ex(key, instance, 60).expect("Redis answers");
        let key = format!("presence:user:{user}:devices");
        let (): () = self.connection.sadd(key, device).expect("Redis answers");
    }

    /// Publishes on `presence:updates`, as the presence service does.
    pub fn announce(&mut self, user: &str, status: PresenceStatus) {
        let event = PresenceUpdateEvent {
            user_id: user.into(),
            status: status.into(),
            occurred_at: UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64,
        };
        let _: u64 = self
            .connection
            .publish("presence:updates", event.encode_to_vec())
            .expect("Redis answers");
    }

    /// Hands a record's value to an instance. Returns the number of subscribers.
    pub fn hand_over(&mut self, instance: &str, value: &[u8]) -> u64 {
        self.connection.publish(format!("delivery:{instance}"), value).expect("Redis answers")
    }

    /// Subscribes to a channel.
    pub fn listen(&self, channel: &str) -> Listener {
        let mut connection = self.client.get_connection().expect("Redis answers");
        let channel = channel.to_owned();
        let (sender, messages) = mpsc::channel();
        let (ready, subscribed) = mpsc::channel();
        // Ends with the test: the subscription borrows the connection, so both live here.
        std::thread::spawn(move || {
            let mut pubsub = connection.as_pubsub();
            pubsub.subscribe(channel).expect("subscribes");
            let _ = ready.send(());
            while let Ok(message) = pubsub.get_message() {
                if sender.send(message.get_payload_bytes().to_vec()).is_err() {
                    break;
                }
            }
        });
        subscribed.recv().expect("subscribes");
        Listener(messages)
    }
}

/// A subscription; see [`Registry::listen`].
pub struct Listener(mpsc::Receiver<Vec<u8>>);

impl Listener {
    /// The next message's bytes.
    pub fn receive(&mut self) -> Vec<u8> {
        self.0.recv_timeout(SOON).expect("a message in time")
    }
}
