//! Catch-up while other nodes do not know the session yet. When they do is decided by the test: what
//! time decides is tested with [`Visibility`] itself.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::*;
use crate::service::events::proto::conversation::v1::Conversation;
use crate::service::sessions::presence::VisibilityConfig;

/// Nothing is decided by time.
const LONG: Duration = Duration::from_secs(3600);

/// The last sequence of each conversation, all of which are everybody's; and what was asked.
#[derive(Default)]
struct Shelf {
    conversations: Mutex<BTreeMap<String, i64>>,
    pages: Mutex<Vec<(String, i64)>>,
    lists: Mutex<usize>,
}

impl Shelf {
    fn holds(&self, conversation: &str, last: i64) {
        self.conversations.lock().unwrap().insert(conversation.to_owned(), last);
    }

    /// After which sequence a conversation was asked for.
    fn asked_for(&self, conversation: &str) -> Vec<i64> {
        let pages = self.pages.lock().unwrap();
        pages.iter().filter(|(of, _)| of == conversation).map(|(_, after)| *after).collect()
    }
}

impl MessageSource for Shelf {
    fn messages_after(
        &self,
        _user: Arc<str>,
        conversation: Arc<str>,
        after: i64,
        _page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        self.pages.lock().unwrap().push((conversation.to_string(), after));
        let last = self.conversations.lock().unwrap().get(&*conversation).copied().unwrap_or(0);
        let message = |sequence| super::message(&conversation, sequence);
        let page = (after + 1..=last).map(message).collect();
        Box::pin(async move { Ok(page) })
    }
}

impl ConversationListing for Shelf {
    fn conversations_of(
        &self,
        _user: Arc<str>,
    ) -> BoxFuture<Result<Vec<Conversation>, NeighbourError>> {
        *self.lists.lock().unwrap() += 1;
        let conversation =
            |id: &String| Conversation { conversation_id: id.clone(), ..Conversation::default() };
        let listed = self.conversations.lock().unwrap().keys().map(conversation).collect();
        Box::pin(async move { Ok(listed) })
    }
}

impl ConversationSource for Shelf {
    fn members(&self, _conversation: Arc<str>) -> BoxFuture<Result<Vec<Arc<str>>, NeighbourError>> {
        Box::pin(async { Ok(vec!["alice".into()]) })
    }
}

struct Among {
    bench: Bench,
    shelf: Arc<Shelf>,
}

/// A session of a node among others, just admitted.
fn admitted() -> Arc<Visibility> {
    let config = VisibilityConfig { lookup_lifetime: LONG, registration_wait: LONG };
    Arc::new(Visibility::new(config, Instant::now()))
}

/// Registered so long ago that every node knows it.
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

    /// The next chunk, taken at once.
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
async fn what_happens_until_other_nodes_know_the_session_is_asked_for_after() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    let visibility = admitted();
    among.begin(1, all(), &visibility);
    assert_eq!(among.chunk().await.len(), 3, "what there is comes at once");

    // Routed by a node that does not find the session.
    among.shelf.holds("room", 5);
    among.shelf.holds("created", 1);
    now_reached(&visibility);
    let (messages, delivered) = among.bench.complete().await;
    assert_eq!(of("room", &messages), [4, 5]);
    assert_eq!(of("created", &messages), [1], "conversations are listed again too");
    let expected = [("room", 5), ("created", 1)].map(|(of, last)| (conversation_key(of).0, last));
    assert_eq!(delivered, expected.into());
    assert_eq!(among.bench.counters.unreached.get(), 0);
}

#[tokio::test]
async fn registered_is_not_yet_known_everywhere() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    let visibility = admitted();
    among.begin(1, all(), &visibility);
    among.chunk().await;
    // For as long as another node may believe what it found before.
    visibility.registered(Instant::now());
    among.begin(2, all(), &reached());
    among.chunk().await;
    assert_eq!(among.bench.step().await.address.connection.slot, 2, "the first one still waits");
    assert_eq!(among.bench.counters.completed.get(), 1);
}

#[tokio::test]
async fn only_what_was_asked_for_too_early_is_asked_for_again() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("early", 1);
    among.shelf.holds("late", 1);
    let visibility = admitted();
    let config = CatchUpConfig { conversations_at_once: 1, ..CatchUpConfig::default() };
    let access = ReadAccess::Checked { listing: among.shelf.clone(), source: among.shelf.clone() };
    let counters = Arc::clone(&among.bench.counters);
    among.bench.catch_up = CatchUpService::new(config, among.shelf.clone(), access, counters);
    among.begin(1, all(), &visibility);
    // The second is asked for when the first has been sent.
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
async fn who_waits_for_other_nodes_keeps_nobody_from_his_turn() {
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

    // Without room for what it keeps meanwhile, its turn is what bounds it.
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
    assert_eq!(delivered, HashMap::from([(conversation_key("room").0, 4)]));
    assert_eq!(*among.shelf.lists.lock().unwrap(), 0);
}

#[tokio::test]
async fn without_other_nodes_nothing_is_waited_for_or_asked_twice() {
    let mut among = Among::new(CatchUpConfig::default());
    among.shelf.holds("room", 3);
    among.bench.begin_session(1, "alice", &[]);
    assert_eq!(among.bench.complete().await.0.len(), 3);
    assert_eq!(among.shelf.asked_for("room"), [0]);
    assert_eq!(*among.shelf.lists.lock().unwrap(), 1);
}
