//! Presence against a fake presence service that records its calls.

use delivery_testkit::neighbours::{Behaviour, Call, FakeNeighbours, Method};

use super::*;
use crate::service::backends::neighbours::{NeighbourConfig, NeighbourCounters};
use tonic::Code;

struct Node {
    presence: Presence,
    counters: Arc<PresenceCounters>,
}

impl Node {
    fn new(instance: &str, fake: &FakeNeighbours) -> Self {
        Self::with(PresenceConfig::new(instance.into()), fake, Duration::from_secs(20))
    }

    fn with(config: PresenceConfig, fake: &FakeNeighbours, call_timeout: Duration) -> Self {
        let neighbour = NeighbourConfig { call_timeout, ..NeighbourConfig::new(fake.url()) };
        let service = PresenceService::new(&neighbour, Arc::<NeighbourCounters>::default());
        let counters = Arc::new(PresenceCounters::default());
        let target = PresenceTarget::Service(service.unwrap());
        let presence = Presence::spawn(config, target, Arc::clone(&counters));
        Self { presence, counters }
    }

    fn shared(&self) -> &SharedQueue {
        self.presence.shared.as_ref().unwrap()
    }

    /// Waits until the queue is empty.
    async fn settled(&self) {
        while self.shared().lock().len() > 0 {
            self.shared().completed.notified().await;
        }
    }

    async fn registered(&self, ids: &SessionIds) {
        self.presence.register(ids, false);
        self.settled().await;
    }

    async fn unregistered(&self, ids: &SessionIds) {
        self.presence.unregister(ids);
        self.settled().await;
    }

    /// Refreshes with a check.
    async fn checked(&self, ids: &SessionIds) {
        assert!(self.presence.refresh(ids, 0));
        self.settled().await;
    }
}

fn phone(user: &str) -> SessionIds {
    SessionIds::new(user, "phone")
}

fn registered(fake: &FakeNeighbours, user: &str) -> Option<String> {
    fake.state().registrations.get(&(user.to_owned(), "phone".to_owned())).cloned()
}

#[tokio::test]
async fn calls_are_those_of_the_contract() {
    let fake = FakeNeighbours::start();
    let node = Node::new("node-1", &fake);
    let ids = phone("alice");
    let (user, device) = ("alice".to_owned(), "phone".to_owned());
    node.registered(&ids).await;
    let register = Call::Register {
        user: user.clone(),
        device: device.clone(),
        instance: "node-1".to_owned(),
    };
    assert_eq!(fake.state().calls, [register]);

    for nth in 0..6 {
        node.presence.refresh(&ids, nth);
        node.settled().await;
    }
    assert_eq!(fake.state().count(Method::Refresh), 6);
    assert_eq!(fake.state().count(Method::Devices), 2, "the first and every third are checked");

    node.unregistered(&ids).await;
    assert_eq!(fake.state().calls.last(), Some(&Call::Unregister { user, device }));
    let counters = &node.counters;
    assert_eq!(counters.registered.get(), 1);
    assert_eq!(counters.refreshed.get(), 6);
    assert_eq!(counters.unregistered.get(), 1);
}

#[tokio::test]
async fn late_end_on_one_node_leaves_the_session_on_the_other() {
    let fake = FakeNeighbours::start();
    let (one, two) = (Node::new("node-1", &fake), Node::new("node-2", &fake));
    let ids = phone("alice");
    one.registered(&ids).await;
    two.registered(&ids).await;
    assert_eq!(registered(&fake, "alice").as_deref(), Some("node-2"));

    one.unregistered(&ids).await;
    assert_eq!(registered(&fake, "alice").as_deref(), Some("node-2"));
    assert_eq!(fake.state().count(Method::Unregister), 0);

    two.unregistered(&ids).await;
    assert_eq!(registered(&fake, "alice"), None);
}

#[tokio::test]
async fn node_learns_that_its_session_was_replaced_on_another() {
    let fake = FakeNeighbours::start();
    let (one, two) = (Node::new("node-1", &fake), Node::new("node-2", &fake));
    let ids = phone("alice");
    one.registered(&ids).await;
    one.checked(&ids).await;
    assert_eq!(one.presence.take_replaced(), []);
    two.registered(&ids).await;
    one.checked(&ids).await;
    assert_eq!(one.presence.take_replaced(), [ids]);
    assert_eq!(registered(&fake, "alice").as_deref(), Some("node-2"));
}

#[tokio::test]
async fn missing_registration_is_made_again() {
    let fake = FakeNeighbours::start();
    let node = Node::new("node-1", &fake);
    let ids = phone("alice");
    node.registered(&ids).await;
    fake.state().registrations.clear();
    node.checked(&ids).await;
    assert_eq!(registered(&fake, "alice").as_deref(), Some("node-1"));
    assert_eq!(node.counters.vanished.get(), 1);
}

#[tokio::test]
async fn sessions_that_end_while_presence_is_unreachable_cost_at_most_one_call_each() {
    const USERS: usize = 300;
    let mut fake = FakeNeighbours::start();
    fake.stop();
    let node = Node::new("node-1", &fake);
    let users: Vec<_> = (0..USERS).map(|user| phone(&format!("user-{user}"))).collect();
    for round in 0..20 {
        for ids in &users {
            node.presence.register(ids, round > 0);
            node.presence.unregister(ids);
        }
        tokio::task::yield_now().await;
    }
    let stays = phone("stays");
    node.presence.register(&stays, false);
    while node.counters.failures.get() == 0 {
        node.shared().completed.notified().await;
    }
    fake.restart();
    node.settled().await;
    let state = fake.state();
    assert_eq!(state.count(Method::Register), 1);
    assert!(state.count(Method::Unregister) + state.count(Method::Devices) <= 2 * USERS);
    for ids in &users {
        let of_user = state.calls.iter().filter(|call| match call {
            Call::Register { user, .. } | Call::Unregister { user, .. } => *user == ids.user(),
            _ => false,
        });
        assert!(of_user.count() <= 1);
    }
    assert_eq!(state.registrations.len(), 1);
}

#[tokio::test]
async fn calls_under_way_are_bounded() {
    let fake = FakeNeighbours::start();
    fake.set(Method::Register, Behaviour::Hanging);
    let config = PresenceConfig { calls_max: 7, ..PresenceConfig::new("node-1".into()) };
    let node = Node::with(config, &fake, Duration::from_secs(20));
    for user in 0..1000 {
        node.presence.register(&phone(&format!("user-{user}")), false);
    }
    fake.until(|state| state.in_flight.get(&Method::Register) == Some(&7)).await;
    assert_eq!(fake.state().in_flight_peak[&Method::Register], 7);
    assert_eq!(node.counters.under_way.get(), 7);
}

#[tokio::test]
async fn rejected_call_is_not_retried() {
    let fake = FakeNeighbours::start();
    fake.set(Method::Register, Behaviour::Failing(Code::InvalidArgument));
    let node = Node::new("node-1", &fake);
    node.registered(&phone("alice")).await;
    assert_eq!(fake.state().count(Method::Register), 1);
    assert_eq!(node.counters.rejected.get(), 1);
}

#[tokio::test]
async fn shutdown_unregisters_all_sessions() {
    let fake = FakeNeighbours::start();
    let node = Node::new("node-1", &fake);
    let users: Vec<_> = (0..100).map(|user| phone(&format!("user-{user}"))).collect();
    assert!(users.iter().all(|ids| node.presence.register(ids, false)));
    node.settled().await;
    users.iter().for_each(|ids| node.presence.unregister(ids));
    node.presence.shut_down(Duration::from_secs(20)).await;
    assert!(fake.state().registrations.is_empty());
    assert!(!node.presence.register(&phone("late"), false));
    assert_eq!(node.counters.abandoned.get(), 0);
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let fake = FakeNeighbours::start();
    let node = Node::new("node-1", &fake);
    node.registered(&phone("alice")).await;
    fake.set(Method::Devices, Behaviour::Hanging);
    node.presence.unregister(&phone("alice"));
    node.presence.shut_down(Duration::from_millis(50)).await;
    assert_eq!(node.counters.abandoned.get(), 1);
}

#[tokio::test]
async fn presence_that_is_off_costs_nothing() {
    let presence = Presence::off();
    assert!(presence.register(&phone("alice"), false) && presence.refresh(&phone("alice"), 0));
    presence.unregister(&phone("alice"));
    assert!(presence.take_replaced().is_empty());
    presence.shut_down(Duration::ZERO).await;
}

#[tokio::test]
async fn registration_notifies_the_catch_up_that_waits_for_it() {
    let fake = FakeNeighbours::start();
    let visibility = VisibilityConfig {
        lookup_lifetime: Duration::from_secs(1),
        registration_wait: Duration::from_secs(60),
    };
    let config =
        PresenceConfig { visibility: Some(visibility), ..PresenceConfig::new("node-1".into()) };
    let node = Node::with(config, &fake, Duration::from_secs(20));
    let (accepted, visibility) = node.presence.register_admitted(&phone("alice"), false);
    assert!(accepted);
    node.settled().await;
    let until = visibility.unwrap().state(Instant::now());
    let VisibilityState::Pending(until) = until else { panic!("{until:?}") };
    let left = until.duration_since(Instant::now());
    assert!(left <= Duration::from_secs(1), "what it waits for now is the look-ups: {left:?}");

    fake.set(Method::Register, Behaviour::Failing(Code::InvalidArgument));
    let (_, visibility) = node.presence.register_admitted(&phone("bob"), false);
    visibility.unwrap().decided().await;
    let (_, visibility) = Presence::off().register_admitted(&phone("carol"), false);
    assert!(visibility.is_none(), "no other node looks it up");
}
