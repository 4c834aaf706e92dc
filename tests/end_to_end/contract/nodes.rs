//! Contract §4 with a real Redis: the registry, the hand-off between nodes, presence changes of contacts.

use std::time::Duration;

use delivery_testkit::proto::presence::v1::{PresenceStatus, PresenceUpdateEvent};
use delivery_testkit::proto::shared::v1::EventType;
use delivery_testkit::publisher::{envelope, message as new_message};
use prost::Message as _;

use crate::support::back_end::{BackEnd, event, event_type, message, receives_nothing};
use crate::support::client::{Client, Received};
use crate::support::node::{Node, NodeBuilder};
use crate::support::registry::Registry;
use crate::support::services::redis_addr;
use crate::support::wait::{SOON, until};

const A_WHILE: Duration = Duration::from_millis(500);

/// Users, instances and topics are named after the test, because all tests share one Redis.
pub(super) struct Nodes {
    pub(super) back_end: BackEnd,
    pub(super) registry: Registry,
    name: &'static str,
}

impl Nodes {
    pub(super) fn new(name: &'static str) -> Self {
        Self::with_partitions(name, 6)
    }

    pub(super) fn with_partitions(name: &'static str, partitions: i32) -> Self {
        let back_end = BackEnd::start(name, partitions);
        Self { back_end, registry: Registry::new(&redis_addr()), name }
    }

    pub(super) fn builder(&self, number: usize) -> NodeBuilder {
        self.back_end
            .node()
            .set("REDIS_ADDR", redis_addr())
            .set("PRESENCE_MODE", "redis")
            .set("HANDOFF", "redis")
            .set("INSTANCE_ID", self.instance(number))
    }

    fn start(&self, number: usize) -> Node {
        self.builder(number).start()
    }

    pub(super) fn instance(&self, number: usize) -> String {
        format!("{}-{number}", self.name)
    }

    pub(super) fn user(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    pub(super) fn registered(&mut self, user: &str, number: usize) {
        let instance = self.instance(number);
        // Other nodes find a session by both keys, and they are not written in one step.
        until(SOON, "the registry names the device and the instance", || {
            let registered = self.registry.devices_of(user).contains("phone")
                && self.registry.instance_of(user, "phone").as_ref() == Some(&instance);
            registered.then_some(())
        });
    }
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn registry_has_the_keys_of_the_contract() {
    let mut nodes = Nodes::new("keys");
    let alice = nodes.user("alice");
    let mut updates = nodes.registry.listen("presence:updates");
    let node = nodes.start(0);
    let mut session = Client::session(node.public, &alice, "phone");
    nodes.registered(&alice, 0);
    let lives_for = nodes.registry.lives_for(&alice, "phone");
    assert!((1..=60).contains(&lives_for), "{lives_for} s");
    assert_eq!(nodes.registry.devices_of(&alice), ["phone".to_owned()].into());
    let mut next_of_alice = || loop {
        let update =
            PresenceUpdateEvent::decode(&*updates.receive()).expect("a PresenceUpdateEvent");
        if update.user_id == alice {
            return update.status();
        }
    };
    assert_eq!(next_of_alice(), PresenceStatus::Online);
    session.close(1000);
    session.receive_end();
    assert_eq!(next_of_alice(), PresenceStatus::Offline);
    assert_eq!(nodes.registry.instance_of(&alice, "phone"), None);
    assert!(nodes.registry.devices_of(&alice).is_empty());
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn event_reaches_the_members_on_every_node_once_and_in_order() {
    let mut nodes = Nodes::new("both");
    let users = [nodes.user("alice"), nodes.user("bob"), nodes.user("carol")];
    let (first, second) = (nodes.start(0), nodes.start(1));
    let mut clients = [
        Client::session(first.public, &users[0], "phone"),
        Client::session(second.public, &users[1], "phone"),
        Client::session(second.public, &users[2], "phone"),
    ];
    nodes.registered(&users[0], 0);
    nodes.registered(&users[1], 1);
    nodes.registered(&users[2], 1);
    // Each of the two nodes has some of these partitions.
    for room in 0..12 {
        let room = format!("{}-room-{room}", nodes.name);
        // A node that does not know the list asks the service that announced the conversation.
        nodes.back_end.neighbours.state().create(&room, &users.each_ref().map(|user| &**user), 0);
        nodes.back_end.publisher.created(&room, &users);
        for sequence in 1..=20 {
            nodes.back_end.publisher.message(&room, sequence, &users[0], "hello");
        }
    }
    for client in &mut clients {
        let mut tally = crate::support::tally::Tally::default();
        while tally.messages < 12 * 20 {
            tally.saw(&event(client).0);
        }
        for (room, stream) in &tally.streams {
            assert_eq!((stream.last, stream.duplicates, stream.out_of_order), (20, 0, 0), "{room}");
        }
        receives_nothing(client, A_WHILE);
    }
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn record_is_handed_over_unchanged_once_per_instance() {
    let mut nodes = Nodes::new("hand-over");
    let users = [nodes.user("alice"), nodes.user("bob"), nodes.user("here")];
    // This test acts as another instance, which has two of the three members.
    let elsewhere = nodes.instance(9);
    nodes.registry.register(&users[0], "phone", &elsewhere);
    nodes.registry.register(&users[1], "phone", &elsewhere);
    let mut channel = nodes.registry.listen(&format!("delivery:{elsewhere}"));
    let node = nodes.start(0);
    let mut here = Client::session(node.public, &users[2], "phone");
    nodes.back_end.publisher.created("hand-over-room", &users);
    let first = event(&mut here).0;
    assert_eq!(channel.receive(), first);
    for sequence in 1..=5 {
        nodes.back_end.publisher.message("hand-over-room", sequence, &users[0], "hello");
        let here = event(&mut here).0;
        // If it were published once per user, the next message would be the same.
        assert_eq!(channel.receive(), here);
    }
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn record_handed_over_is_delivered_to_own_sessions_only() {
    let mut nodes = Nodes::new("taken");
    let (alice, bob) = (nodes.user("alice"), nodes.user("bob"));
    let elsewhere = nodes.instance(9);
    nodes.registry.register(&bob, "phone", &elsewhere);
    let mut channel = nodes.registry.listen(&format!("delivery:{elsewhere}"));
    nodes.back_end.neighbours.state().create("taken-room", &[&alice, &bob], 0);
    let node = nodes.start(0);
    let mut session = Client::session(node.public, &alice, "phone");
    let sent = delivery_testkit::proto::message::v1::MessageSentEvent {
        message: Some(new_message("taken-room", 1, &bob, "from elsewhere")),
    };
    let value = envelope(EventType::MessageSent, sent.encode_to_vec()).encode_to_vec();
    assert_eq!(nodes.registry.hand_over(&nodes.instance(0), &value), 1, "the node listens");
    assert_eq!(event(&mut session).0, value);
    // It was not passed on: the next message on bob's channel comes from Kafka.
    nodes.back_end.publisher.message("taken-room", 2, &alice, "from Kafka");
    let from_kafka = event(&mut session).0;
    assert_eq!(channel.receive(), from_kafka);
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn presence_change_reaches_those_who_share_a_conversation_once() {
    let mut nodes = Nodes::new("updates");
    let [alice, bob, mallory] = ["alice", "bob", "mallory"].map(|name| nodes.user(name));
    {
        let mut known = nodes.back_end.neighbours.state();
        known.create("updates-one", &[&alice, &bob], 0);
        known.create("updates-two", &[&alice, &bob], 0);
        known.create("updates-other", &[&mallory], 0);
    }
    let node = nodes.start(0);
    let mut bob_hears = Client::session(node.public, &bob, "phone");
    let mut alice_hears = Client::session(node.public, &alice, "phone");
    let mut mallory_hears = Client::session(node.public, &mallory, "phone");
    nodes.registered(&alice, 0);
    nodes.registered(&bob, 0);
    nodes.registered(&mallory, 0);
    // Connecting was a change too; this one is the opposite.
    nodes.registry.announce(&alice, PresenceStatus::Offline);
    let is_it = |envelope: &delivery_testkit::proto::shared::v1::EventEnvelope| {
        assert_eq!(envelope.event_type(), EventType::PresenceUpdated);
        assert_eq!(envelope.schema_version, 1);
        let update =
            PresenceUpdateEvent::decode(&*envelope.payload).expect("a PresenceUpdateEvent");
        update.user_id == alice && update.status() == PresenceStatus::Offline
    };
    while !is_it(&event(&mut bob_hears).1) {}
    // Once, although they share two conversations; not to alice, not to a stranger.
    for client in [&mut bob_hears, &mut alice_hears, &mut mallory_hears] {
        while let Some(heard) = client.receive_within(A_WHILE) {
            let Received::Binary(payload) = heard else { continue };
            let envelope = delivery_testkit::proto::shared::v1::EventEnvelope::decode(&*payload);
            assert!(!is_it(&envelope.expect("an EventEnvelope")), "again, or to the wrong one");
        }
    }
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn removed_member_receives_no_more_presence_changes() {
    let mut nodes = Nodes::new("gone");
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| nodes.user(name));
    nodes.back_end.neighbours.state().create("gone-room", &[&alice, &bob, &carol], 0);
    let node = nodes.start(0);
    let mut bob_hears = Client::session(node.public, &bob, "phone");
    let mut carol_hears = Client::session(node.public, &carol, "phone");
    nodes.registered(&bob, 0);
    nodes.registered(&carol, 0);
    let status_of_alice = |client: &mut Client| loop {
        let (_, envelope) = event(client);
        let update = PresenceUpdateEvent::decode(&*envelope.payload);
        if envelope.event_type() == EventType::PresenceUpdated
            && let Some(update) = update.ok().filter(|update| update.user_id == alice)
        {
            return update.status();
        }
    };
    nodes.registry.announce(&alice, PresenceStatus::Offline);
    assert_eq!(status_of_alice(&mut bob_hears), PresenceStatus::Offline);

    // The conversation service has it before it is published.
    nodes.back_end.neighbours.state().members.get_mut("gone-room").expect("made").remove(&bob);
    nodes.back_end.publisher.membership("gone-room", &bob, false);
    while event_type(&mut bob_hears) != EventType::MembershipChanged {}
    nodes.registry.announce(&alice, PresenceStatus::Online);
    while status_of_alice(&mut carol_hears) != PresenceStatus::Online {}
    receives_nothing(&mut bob_hears, A_WHILE);
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn session_replaced_across_nodes_leaves_the_successor_registered() {
    let mut nodes = Nodes::new("replaced");
    let alice = nodes.user("alice");
    let (first, second) = (nodes.start(0), nodes.start(1));
    let mut old = Client::session(first.public, &alice, "phone");
    nodes.registered(&alice, 0);
    let mut new = Client::session(second.public, &alice, "phone");
    nodes.registered(&alice, 1);
    // The newer connection wins, on either node.
    assert_eq!(old.receive_end(), Received::Closed(4000, "session_replaced".into()));
    nodes.back_end.publisher.created("replaced-room", std::slice::from_ref(&alice));
    assert_eq!(event_type(&mut new), EventType::ConversationCreated);
    assert_eq!(nodes.registry.instance_of(&alice, "phone"), Some(nodes.instance(1)));
    assert_eq!(nodes.registry.devices_of(&alice), ["phone".to_owned()].into());
}

#[test]
#[ignore = "needs Kafka and Redis: tests/run end_to_end"]
fn entries_of_a_killed_node_expire_and_its_users_are_served_by_other_nodes() {
    let mut nodes = Nodes::new("killed");
    let [alice, bob] = ["alice", "bob"].map(|name| nodes.user(name));
    nodes.back_end.neighbours.state().create("killed-room", &[&alice, &bob], 0);
    let quick = |builder: NodeBuilder| builder.set("KAFKA_PROPERTIES", "session.timeout.ms=6000");
    let mut first = quick(nodes.builder(0)).start();
    let second = quick(nodes.builder(1)).start();
    let _on_first = Client::session(first.public, &alice, "phone");
    let _also_on_first = Client::session(first.public, &bob, "phone");
    nodes.registered(&alice, 0);
    nodes.registered(&bob, 0);
    first.kill();
    // Its entries stay until they expire or the user is back, as alice is.
    assert_eq!(nodes.registry.instance_of(&alice, "phone"), Some(nodes.instance(0)));
    let mut on_second = Client::session(second.public, &alice, "phone");
    nodes.registered(&alice, 1);
    nodes.back_end.publisher.message("killed-room", 1, &bob, "hello");
    assert_eq!(message(&mut on_second), ("killed-room".into(), 1));
    let lives_for = nodes.registry.lives_for(&bob, "phone");
    assert!(lives_for <= 60, "bob's entry expires by itself: {lives_for} s");
}
