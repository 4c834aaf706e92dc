//! Catch-up of a session that other nodes cannot find yet. The tests decide when they can; the tests of
//! [`Visibility`] cover the timing.

use tokio::time::Instant;

use super::shelf::Shelf;
use super::*;
use crate::service::sessions::presence::VisibilityConfig;

/// Longer than any test.
const LONG: Duration = Duration::from_secs(3600);

struct Among {
    bench: Bench,
    shelf: Arc<Shelf>,
}

/// The visibility of a session that was just admitted in group mode.
fn admitted() -> Arc<Visibility> {
    let config = VisibilityConfig { lookup_lifetime: LONG, registration_wait: LONG };
    Arc::new(Visibility::new(config, Instant::now()))
}

/// The visibility of a session that every node can find.
fn reached() -> Arc<Visibility> {
    let visibility = admitted();
    now_reached(&visibility);
    visibility
}

fn now_reached(visibility: &Visibility) {
    visibility.registered(Instant::now() - LONG);
}

impl Among {
    fn new(config: CatchUpConfig) -> Self {
        let mut bench = Bench::new(config.clone());
        let shelf = Arc::new(Shelf::default());
        let access = ReadAccess::Checked { listing: shelf.clone(), source: shelf.clone() };
        let counters = Arc::clone(&bench.counters);
        bench.catch_up = CatchUpService::new(config, shelf.clone(), access, counters);
        Self { bench, shelf }
    }

    fn begin(&self, slot: u32, scope: CatchUpScope, visibility: &Arc<Visibility>) {
        let begun = self.bench.begin_among(slot, "alice", scope, Some(Arc::clone(visibility)));
        assert!(matches!(begun, CatchUpStart::Running(_)), "{begun:?}");
    }

    /// Takes the next chunk.
    async fn chunk(&mut self) -> Vec<(String, i64)> {
        let CatchUpStep::Chunk { events, sent } = self.bench.step().await.step else {
            panic!("no chunk")
        };
        sent.send(()).unwrap();
        events.iter().map(|event| place(event)).collect()
    }
}

fn all() -> CatchUpScope {
    CatchUpScope::Session(Vec::new())
}

#[tokio::test]
async fn messages_sent_before_the_session_is_visible_are_fetched_later() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    let visibility = admitted();
    among.begin(1, all(), &visibility);
    assert_eq!(among.chunk().await.len(), 3, "what there is comes at once");

    // Routed by a node that cannot find the session yet.
    among.shelf.holds("room", 5);
    among.shelf.holds("created", 1);
    now_reached(&visibility);
    let (messages, delivered) = among.bench.complete().await;
    assert_eq!(of("room", &messages), [4, 5]);
    assert_eq!(of("created", &messages), [1], "conversations are listed again too");
    assert_eq!(delivered, one_run([("room", 1, 5), ("created", 1, 1)]));
    assert_eq!(among.bench.counters.unreached.get(), 0);
}

#[tokio::test]
async fn registered_session_is_not_visible_before_the_lookup_lifetime() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    let visibility = admitted();
    among.begin(1, all(), &visibility);
    among.chunk().await;
    // Other nodes may still use a cached answer.
    visibility.registered(Instant::now());
    among.begin(2, all(), &reached());
    among.chunk().await;
    assert_eq!(among.bench.step().await.address.connection.slot, 2, "the first one still waits");
    assert_eq!(among.bench.counters.completed.get(), 1);
}

#[tokio::test]
async fn only_pages_requested_too_early_are_requested_again() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("early", 1);
    among.shelf.holds("late", 1);
    let visibility = admitted();
    let config = CatchUpConfig { steps_at_once: 1, ..CatchUpConfig::default() };
    let access = ReadAccess::Checked { listing: among.shelf.clone(), source: among.shelf.clone() };
    let counters = Arc::clone(&among.bench.counters);
    among.bench.catch_up = CatchUpService::new(config, among.shelf.clone(), access, counters);
    among.begin(1, all(), &visibility);
    // The second is requested when the first has been sent.
    let CatchUpStep::Chunk { sent, .. } = among.bench.step().await.step else { panic!("no chunk") };
    now_reached(&visibility);
    sent.send(()).unwrap();
    among.bench.complete().await;
    assert_eq!(among.shelf.asked_for("early"), [0, 1]);
    assert_eq!(among.shelf.asked_for("late"), [0]);
}

/// Promise: “Presence delays a session by at most `registration_wait`”
#[tokio::test]
async fn session_that_will_not_be_registered_in_time_goes_live_and_is_counted() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    let config = VisibilityConfig { lookup_lifetime: LONG, registration_wait: Duration::ZERO };
    among.begin(1, all(), &Arc::new(Visibility::new(config, Instant::now())));
    assert_eq!(among.bench.complete().await.0.len(), 3);
    assert_eq!(among.bench.counters.unreached.get(), 1);
    assert_eq!(among.bench.counters.completed.get(), 1);
    assert_eq!(among.shelf.asked_for("room"), [0], "asking again would be as vain");
}

#[tokio::test]
async fn waiting_for_other_nodes_does_not_hold_a_slot() {
    let config = CatchUpConfig { sessions_max: 1, ..CatchUpConfig::default() };
    let mut among = Among::new(config.clone());
    among.shelf.holds("room", 1);
    let visibility = admitted();
    among.begin(1, all(), &visibility);
    among.chunk().await;
    among.begin(2, all(), &reached());
    among.chunk().await;
    assert_eq!(among.bench.step().await.address.connection.slot, 2);
    now_reached(&visibility);
    assert_eq!(among.bench.step().await.address.connection.slot, 1);

    // Without room in the budget the catch-up keeps its slot.
    let mut among = Among::new(CatchUpConfig { requests_bytes_max: 100, ..config });
    among.shelf.holds(&"a-long-name-".repeat(10), 1);
    let visibility = admitted();
    among.begin(1, all(), &visibility);
    among.chunk().await;
    among.begin(2, all(), &reached());
    assert_eq!(among.bench.counters.running.get(), 1);
    now_reached(&visibility);
    assert_eq!(among.bench.step().await.address.connection.slot, 1);
    among.chunk().await;
    assert_eq!(among.bench.step().await.address.connection.slot, 2);
}

#[tokio::test]
async fn grpc_conversation_waits_for_other_nodes_as_well() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    let scope = CatchUpScope::Conversation { conversation: "room".into(), after: 1 };
    let visibility = admitted();
    among.begin(1, scope, &visibility);
    assert_eq!(among.chunk().await.len(), 2);
    among.shelf.holds("room", 4);
    now_reached(&visibility);
    let (messages, delivered) = among.bench.complete().await;
    assert_eq!(of("room", &messages), [4]);
    assert_eq!(delivered, one_run([("room", 2, 4)]));
    assert_eq!(among.shelf.lists(), 0);
}

#[tokio::test]
async fn single_node_does_not_wait_or_request_anything_twice() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    among.bench.begin_session(1, "alice", &[]);
    assert_eq!(among.bench.complete().await.0.len(), 3);
    assert_eq!(among.shelf.asked_for("room"), [0]);
    assert_eq!(among.shelf.lists(), 1);
}
