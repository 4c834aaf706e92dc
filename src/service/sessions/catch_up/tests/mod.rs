//! Catch-up against fake services that record their calls. The test takes the session manager's part.

mod cursors;
mod fairness;
mod late_commits;
mod many;
mod other_nodes;
mod shelf;

use std::collections::HashMap;

use delivery_testkit::neighbours::{Behaviour, Call, FakeNeighbours, Method};
use prost::Message as _;
use tonic::Code;

use super::*;
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, ConversationKey, ShardId};
use crate::service::backends::neighbours::{
    ConversationService, MessageService, NeighbourConfig, NeighbourCounters,
};
use crate::service::backends::ports::{BoxFuture, NeighbourError};
use crate::service::events::conversation_key::conversation_key;
use crate::service::events::proto::delivery::v1::DeliveryEvent;
use crate::service::events::proto::message::v1::Message;

struct Bench {
    fake: FakeNeighbours,
    catch_up: CatchUpService,
    counters: Arc<CatchUpCounters>,
    out: mpsc::Sender<CatchUpReport>,
    steps: mpsc::Receiver<CatchUpReport>,
}

impl Bench {
    fn new(config: CatchUpConfig) -> Self {
        let fake = FakeNeighbours::start();
        let neighbour = NeighbourConfig {
            call_timeout: Duration::from_secs(20),
            ..NeighbourConfig::new(fake.url())
        };
        let counters = Arc::<NeighbourCounters>::default;
        let service = Arc::new(ConversationService::new(&neighbour, counters()).unwrap());
        let messages = Arc::new(MessageService::new(&neighbour, counters()).unwrap());
        let access = ReadAccess::Checked { listing: service.clone(), source: service };
        let counters = Arc::new(CatchUpCounters::default());
        let catch_up = CatchUpService::new(config, messages, access, Arc::clone(&counters));
        let (out, steps) = mpsc::channel(16);
        Self { fake, catch_up, counters, out, steps }
    }

    fn begin(&self, slot: u32, user: &str, scope: CatchUpScope) -> CatchUpStart {
        self.begin_among(slot, user, scope, None)
    }

    fn begin_among(
        &self,
        slot: u32,
        user: &str,
        scope: CatchUpScope,
        visibility: Option<Arc<Visibility>>,
    ) -> CatchUpStart {
        let address = SessionAddress {
            shard: ShardId(0),
            // Its frame is the message without a WebSocket header.
            encoding: Encoding::Stream,
            connection: ConnectionKey { slot, generation: 0 },
        };
        let ids = SessionIds::new(user, "phone");
        self.catch_up.begin(
            CatchUpRequest { ids, address, scope, cursor: None, visibility },
            self.out.clone(),
        )
    }

    fn begin_session(&self, slot: u32, user: &str, named: &[(&str, i64)]) {
        let begun = self.begin(slot, user, CatchUpScope::Session(positions(named)));
        assert!(matches!(begun, CatchUpStart::Running(_)), "{begun:?}");
    }

    async fn step(&mut self) -> CatchUpReport {
        self.steps.recv().await.expect("the bench holds a sender")
    }

    /// Takes every chunk at once, like a fast socket, until one session is complete. Returns the messages,
    /// and the runs of sequences that are named as delivered.
    async fn complete(&mut self) -> (Vec<(String, i64)>, DeliveredRuns) {
        let mut messages = Vec::new();
        loop {
            match self.step().await.step {
                CatchUpStep::Chunk { events, sent } => {
                    messages.extend(events.iter().map(|event| place(event)));
                    sent.send(()).unwrap();
                }
                CatchUpStep::Complete { delivered } => {
                    return (messages, runs(&delivered));
                }
                step => panic!("{step:?}"),
            }
        }
    }

    async fn failed(&mut self) -> Close {
        match self.step().await.step {
            CatchUpStep::Failed(close) => close,
            step => panic!("{step:?}"),
        }
    }
}

/// By conversation: first and last sequences.
type DeliveredRuns = HashMap<ConversationKey, Vec<(i64, i64)>>;

fn runs(delivered: &CaughtUp) -> DeliveredRuns {
    let mut all = DeliveredRuns::new();
    for run in delivered.runs() {
        all.entry(run.conversation).or_default().push((run.first, run.last));
    }
    all
}

/// One run of each of these conversations.
fn one_run<const N: usize>(of: [(&str, i64, i64); N]) -> DeliveredRuns {
    of.map(|(conversation, first, last)| (conversation_key(conversation), vec![(first, last)]))
        .into()
}

fn positions(named: &[(&str, i64)]) -> Vec<LastSequence> {
    let position = |(conversation, sequence): &(&str, i64)| LastSequence {
        conversation: (*conversation).into(),
        sequence: *sequence,
    };
    named.iter().map(position).collect()
}

fn place(event: &Event) -> (String, i64) {
    let event = DeliveryEvent::decode(event.frame(Encoding::Stream).unwrap()).unwrap();
    (event.conversation_id, event.sequence)
}

/// The message of the fake message service, in the node's own type.
pub(super) fn message(conversation: &str, sequence: i64) -> Message {
    let message = delivery_testkit::neighbours::message(conversation, sequence);
    Message::decode(&*message.encode_to_vec()).unwrap()
}

fn of(conversation: &str, messages: &[(String, i64)]) -> Vec<i64> {
    messages.iter().filter(|(of, _)| of == conversation).map(|(_, sequence)| *sequence).collect()
}

#[tokio::test]
async fn everything_missed_is_sent_page_by_page_and_in_order() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.state().create("named", &["alice"], 250);
    bench.fake.state().create("listed", &["alice", "bob"], 100);
    bench.fake.state().create("up-to-date", &["alice"], 5);
    bench.fake.state().create("not-hers", &["bob"], 7);
    bench.begin_session(1, "alice", &[("named", 20), ("up-to-date", 5)]);
    let (messages, delivered) = bench.complete().await;

    assert_eq!(of("named", &messages), (21..=250).collect::<Vec<_>>());
    assert_eq!(of("listed", &messages), (1..=100).collect::<Vec<_>>());
    assert_eq!(messages.len(), 330);
    assert_eq!(delivered, one_run([("named", 21, 250), ("listed", 1, 100)]));

    let state = bench.fake.state();
    let list = Call::List { user: "alice".into(), on_behalf_of: Some("alice".into()) };
    assert_eq!(state.calls[0], list);
    let pages = |of: &str| -> Vec<i64> {
        let after = |call: &Call| match call {
            Call::Sync { conversation, after, page_size: 100 } if conversation == of => {
                Some(*after)
            }
            _ => None,
        };
        state.calls.iter().filter_map(after).collect()
    };
    assert_eq!(pages("named"), [20, 120, 220]);
    assert_eq!(pages("listed"), [0, 100], "a full page is followed by one more");
    assert_eq!(pages("up-to-date"), [5]);
    assert_eq!(state.count(Method::Members), 0, "all named ones were listed");
    assert_eq!(bench.counters.messages.get(), 330);
}

#[tokio::test]
async fn naming_a_conversation_does_not_give_access_to_it() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.state().create("removed-from", &["bob"], 50);
    bench.begin_session(1, "alice", &[("removed-from", 3), ("unknown", 0)]);
    let (messages, delivered) = bench.complete().await;
    assert_eq!((messages.len(), delivered.len()), (0, 0));
    assert_eq!(bench.fake.state().count(Method::Sync), 0);
    assert_eq!(bench.counters.conversations_refused.get(), 2);
}

#[tokio::test]
async fn catch_up_runs_at_the_pace_of_the_socket() {
    let config = CatchUpConfig {
        chunk_messages_max: 10,
        // This test must not depend on time.
        stall_after: Duration::from_secs(30),
        ..CatchUpConfig::default()
    };
    let mut bench = Bench::new(config);
    bench.fake.state().create("a", &["alice"], 25);
    bench.fake.state().create("b", &["alice"], 25);
    bench.begin_session(1, "alice", &[]);
    let mut sizes = Vec::new();
    loop {
        match bench.step().await.step {
            CatchUpStep::Chunk { events, sent } => {
                // The next chunk waits for this one, although its page is there.
                bench.fake.until(|state| state.count(Method::Sync) == 2).await;
                assert!(bench.steps.try_recv().is_err());
                sizes.push(events.len());
                sent.send(()).unwrap();
            }
            CatchUpStep::Complete { .. } => break,
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(sizes, [10, 10, 5, 10, 10, 5]);
    assert_eq!(bench.counters.pages_bytes.get(), 0);
}

#[tokio::test]
async fn catch_up_fails_if_the_socket_takes_nothing() {
    let config = CatchUpConfig { chunk_timeout: Duration::from_millis(20), ..Default::default() };
    let mut bench = Bench::new(config);
    bench.fake.state().create("a", &["alice"], 5);
    bench.begin_session(1, "alice", &[]);
    let CatchUpStep::Chunk { sent, .. } = bench.step().await.step else { panic!("no chunk") };
    let close = bench.failed().await;
    assert_eq!(close.code, CloseCode::TRY_AGAIN_LATER);
    assert!(close.reason.contains("reads too slowly"), "{close:?}");
    assert!(sent.is_closed());
    assert_eq!(bench.counters.failed_slow.get(), 1);
    assert_eq!(bench.counters.pages_bytes.get(), 0);
}

#[tokio::test]
async fn catch_up_of_an_ended_session_stops_silently() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.state().create("a", &["alice"], 5);
    bench.begin_session(1, "alice", &[]);
    let CatchUpStep::Chunk { sent, .. } = bench.step().await.step else { panic!("no chunk") };
    drop(sent);
    bench.begin_session(2, "alice", &[]);
    assert_eq!(bench.step().await.address.connection.slot, 2, "and nothing more of the first");
}

#[tokio::test]
async fn failing_service_is_retried_and_then_the_session_is_closed() {
    for (method, text) in
        [(Method::List, "conversation service"), (Method::Sync, "message service")]
    {
        let config = CatchUpConfig { attempts_max: 2, ..CatchUpConfig::default() };
        let mut bench = Bench::new(config);
        bench.fake.state().create("a", &["alice"], 5);
        bench.fake.set(method, Behaviour::Failing(Code::Internal));
        bench.begin_session(1, "alice", &[]);
        let close = bench.failed().await;
        assert_eq!(close.code, CloseCode::TRY_AGAIN_LATER);
        assert!(close.reason.contains(text), "{close:?}");
        assert_eq!(bench.fake.state().count(method), 2);
        assert_eq!(bench.counters.failed_neighbour.get(), 1);
    }
}

/// A service that refuses is not one without conversations or messages.
#[tokio::test]
async fn refused_call_is_not_an_empty_answer() {
    for code in [Code::PermissionDenied, Code::Unauthenticated, Code::InvalidArgument] {
        for method in [Method::List, Method::Sync] {
            let config = CatchUpConfig { attempts_max: 2, ..CatchUpConfig::default() };
            let mut bench = Bench::new(config);
            bench.fake.state().create("a", &["alice"], 5);
            bench.fake.set(method, Behaviour::Failing(code));
            bench.begin_session(1, "alice", &[]);
            assert_eq!(bench.failed().await.code, CloseCode::TRY_AGAIN_LATER, "{code:?}");
            assert_eq!(bench.fake.state().count(method), 2);
        }
    }
}

/// The client named it, so a malformed id is its fault and not that of the service.
#[tokio::test]
async fn malformed_id_that_the_client_names_is_refused_and_the_rest_is_caught_up() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.state().create("a", &["alice"], 5);
    bench.fake.set(Method::Members, Behaviour::Failing(Code::InvalidArgument));
    bench.begin_session(1, "alice", &[("not-an-id", 3)]);
    let (messages, _) = bench.complete().await;
    assert_eq!(of("a", &messages), [1, 2, 3, 4, 5]);
    assert_eq!(bench.counters.conversations_refused.get(), 1);
}

#[tokio::test]
async fn what_is_not_found_is_asked_for_once_more() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.set(Method::Sync, Behaviour::Failing(Code::NotFound));
    bench.fake.state().create("a", &["alice"], 5);
    bench.begin_session(1, "alice", &[]);
    bench.fake.until(|state| state.count(Method::Sync) == 1).await;
    bench.fake.set(Method::Sync, Behaviour::Normal);
    let (messages, _) = bench.complete().await;
    assert_eq!(of("a", &messages), [1, 2, 3, 4, 5], "the replica has caught up");
}

#[tokio::test]
async fn temporary_failure_does_not_reach_the_client() {
    let mut bench = Bench::new(CatchUpConfig { attempts_max: 100, ..CatchUpConfig::default() });
    bench.fake.state().create("a", &["alice"], 5);
    bench.fake.set(Method::Sync, Behaviour::Failing(Code::Unavailable));
    bench.begin_session(1, "alice", &[]);
    bench.fake.until(|state| state.count(Method::Sync) == 1).await;
    bench.fake.set(Method::Sync, Behaviour::Normal);
    let (messages, _) = bench.complete().await;
    assert_eq!(of("a", &messages), [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn later_attempts_request_smaller_pages_and_miss_nothing() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.state().create("a", &["alice"], 130);
    bench.fake.set(Method::Sync, Behaviour::Failing(Code::Unavailable));
    bench.begin_session(1, "alice", &[]);
    bench.fake.until(|state| state.count(Method::Sync) == 2).await;
    bench.fake.set(Method::Sync, Behaviour::Normal);
    let (messages, _) = bench.complete().await;
    assert_eq!(of("a", &messages), (1..=130).collect::<Vec<_>>());
    let sizes: Vec<_> = (bench.fake.state().calls.iter())
        .filter_map(|call| match call {
            Call::Sync { after, page_size, .. } => Some((*after, *page_size)),
            _ => None,
        })
        .collect();
    assert_eq!(sizes, [(0, 100), (0, 100), (0, 25), (25, 100), (125, 100)]);
}

#[tokio::test]
async fn storm_of_sessions_is_bounded_and_all_catch_up() {
    const SESSIONS: u32 = 300;
    let config = CatchUpConfig {
        calls_max: 8,
        sessions_max: 20,
        steps_at_once: 3,
        ..CatchUpConfig::default()
    };
    let mut bench = Bench::new(config);
    for conversation in 0..10 {
        bench.fake.state().create(&format!("c-{conversation}"), &["alice"], 3);
    }
    bench.fake.set(Method::Sync, Behaviour::Delayed(Duration::from_millis(1)));
    for slot in 0..SESSIONS {
        bench.begin_session(slot, "alice", &[]);
    }
    let mut complete = 0;
    let mut messages = 0;
    while complete < SESSIONS {
        match bench.step().await.step {
            CatchUpStep::Chunk { events, sent } => {
                messages += events.len();
                sent.send(()).unwrap();
            }
            CatchUpStep::Complete { .. } => complete += 1,
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(messages, SESSIONS as usize * 30);
    let state = bench.fake.state();
    let peak = |method| state.in_flight_peak.get(&method).copied().unwrap_or(0);
    assert!(peak(Method::Sync) <= 8 && peak(Method::List) <= 8);
    assert!(peak(Method::Sync) >= 4, "they do run side by side");
    // Sessions that want the same page share the call, while it waits.
    let shared = bench.counters.pages_shared.get() as usize;
    assert_eq!(state.count(Method::Sync) + shared, SESSIONS as usize * 10);
    assert!(shared > 0);
}

#[tokio::test]
async fn requests_beyond_the_budget_are_refused() {
    let config = CatchUpConfig { requests_bytes_max: 1000, ..CatchUpConfig::default() };
    let bench = Bench::new(config);
    bench.fake.set(Method::List, Behaviour::Hanging);
    let named = [("conversation-with-a-name-of-some-length", 1); 8];
    bench.begin_session(1, "alice", &named);
    let begun = bench.begin(2, "bob", CatchUpScope::Session(positions(&named)));
    let CatchUpStart::Refused(close) = begun else { panic!("{begun:?}") };
    assert_eq!(close.code, CloseCode::TRY_AGAIN_LATER);
    assert_eq!(bench.counters.refused.get(), 1);
}

#[tokio::test]
async fn aborted_catch_up_releases_its_slot_and_budget() {
    let bench = Bench::new(CatchUpConfig { sessions_max: 1, ..CatchUpConfig::default() });
    bench.fake.state().create("a", &["alice"], 5);
    bench.fake.set(Method::Sync, Behaviour::Hanging);
    let CatchUpStart::Running(task) = bench.begin(1, "alice", CatchUpScope::Session(Vec::new()))
    else {
        panic!("not begun");
    };
    bench.fake.until(|state| state.count(Method::Sync) == 1).await;
    task.abort();
    bench.fake.until(|state| state.in_flight[&Method::Sync] == 0).await;
    bench.fake.set(Method::Sync, Behaviour::Normal);
    bench.begin_session(2, "alice", &[]);
    let mut bench = bench;
    let (messages, _) = bench.complete().await;
    assert_eq!(messages.len(), 5);
    assert_eq!(bench.counters.waiting.get(), 0);
}

#[tokio::test]
async fn grpc_session_resumes_one_conversation_and_is_answered_in_any_case() {
    let mut bench = Bench::new(CatchUpConfig::default());
    bench.fake.state().create("a", &["alice"], 5);
    bench.fake.state().create("b", &["bob"], 5);
    for (conversation, after, expected) in
        [("a", 3, vec![4, 5]), ("a", 5, vec![]), ("b", 2, vec![]), ("x", 0, vec![])]
    {
        let scope = CatchUpScope::Conversation { conversation: conversation.into(), after };
        assert!(matches!(bench.begin(1, "alice", scope), CatchUpStart::Running(_)));
        let mut sent_sequences = Vec::new();
        let delivered = loop {
            match bench.step().await.step {
                CatchUpStep::Chunk { events, sent } => {
                    sent_sequences.extend(events.iter().map(|event| place(event).1));
                    sent.send(()).unwrap();
                }
                CatchUpStep::Complete { delivered } => break delivered,
                step => panic!("{step:?}"),
            }
        };
        assert_eq!(sent_sequences, expected);
        assert_eq!(delivered.conversation, Some(conversation_key(conversation)));
        assert_eq!(delivered.is_empty(), expected.is_empty());
    }
    assert_eq!(bench.fake.state().count(Method::List), 0);
}

/// A message service that always returns the same message.
struct Stuck;

impl MessageSource for Stuck {
    fn messages_after(
        &self,
        _user: Arc<str>,
        conversation: Arc<str>,
        _after: i64,
        page_size: u16,
    ) -> BoxFuture<Result<Vec<Message>, NeighbourError>> {
        let message = message(&conversation, 1);
        Box::pin(async move { Ok(vec![message; page_size.into()]) })
    }
}

#[tokio::test]
async fn page_without_progress_is_a_failure_and_not_a_loop() {
    let mut bench = Bench::new(CatchUpConfig::default());
    let (messages, counters) = (Arc::new(Stuck), Arc::clone(&bench.counters));
    bench.catch_up =
        CatchUpService::new(CatchUpConfig::default(), messages, ReadAccess::Unchecked, counters);
    bench.begin_session(1, "alice", &[("a", 0)]);
    let CatchUpStep::Chunk { events, sent } = bench.step().await.step else { panic!("no chunk") };
    assert_eq!(events.len(), 1, "a hundred messages that all claim the same place are one");
    sent.send(()).unwrap();
    assert_eq!(bench.failed().await.code, CloseCode::TRY_AGAIN_LATER);
}

#[test]
fn reasons_fit_a_close_frame() {
    for failure in
        [CatchUpFailure::Conversations, CatchUpFailure::Messages, CatchUpFailure::TooSlow]
    {
        let close = failure.close().unwrap();
        assert!(close.reason.len() <= crate::domain::limits::CLOSE_REASON_BYTES_MAX);
    }
}
