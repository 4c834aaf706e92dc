//! Sessions that return with a cursor. A fake takes the tails' part.

use std::collections::VecDeque;

use bytes::Bytes;

use super::shelf::{Shelf, ShelfBench};
use super::*;
use crate::domain::cursor::{Cursor, LogPosition, TopicId, UNCHECKED};
use crate::domain::ids::ConversationPosition;
use crate::service::events::encode::encode_envelope;
use crate::service::events::proto::message::v1::{MessageDeletedEvent, MessageSentEvent};
use crate::service::events::proto::shared::v1::EventType;
use crate::service::routing::replays::{ReplayReader, ReplayedChunk, ReplayedRecord, TailReplays};

/// What each replay returns, and what was asked for.
#[derive(Default)]
struct FakeTails {
    chunks: Mutex<Vec<ReplayedChunk>>,
    asked: Mutex<Vec<Option<Cursor>>>,
    /// Chunks come only after this was notified.
    gate: Option<Arc<tokio::sync::Notify>>,
}

impl TailReplays for FakeTails {
    fn replay(&self, _: SessionAddress, user: Arc<str>, since: Option<Cursor>) -> ReplayReader {
        assert_eq!(&*user, "alice");
        self.asked.lock().unwrap().push(since.clone());
        let mut chunks: VecDeque<_> = match since {
            Some(_) => self.chunks.lock().unwrap().clone().into(),
            None => VecDeque::new(),
        };
        let next = std::iter::from_fn(move || chunks.pop_front());
        match &self.gate {
            None => ReplayReader::new(next),
            Some(gate) => ReplayReader::new(Gated(Arc::clone(gate), next)),
        }
    }
}

struct Gated<I>(Arc<tokio::sync::Notify>, I);

impl<I: Iterator<Item = ReplayedChunk> + Send> crate::service::routing::replays::ReplayChunks
    for Gated<I>
{
    fn next(&mut self) -> crate::service::routing::replays::PendingChunk<'_> {
        Box::pin(async {
            self.0.notified().await;
            self.1.next().unwrap_or(Ok(None))
        })
    }
}

fn record(event_type: EventType, payload: Vec<u8>) -> ReplayedRecord {
    let value = Bytes::from(encode_envelope(event_type, None, payload));
    let (topic, key) = (Arc::from("messaging.events.v1"), None);
    ReplayedRecord { topic, partition: 0, offset: 1, appended_at_ms: 1, key, value }
}

fn sent(conversation: &str, sequence: i64) -> ReplayedRecord {
    let message = Some(message(conversation, sequence));
    record(EventType::MessageSent, MessageSentEvent { message }.encode_to_vec())
}

fn deleted(conversation: &str, message_id: &str) -> ReplayedRecord {
    let (conversation_id, message_id) = (conversation.to_owned(), message_id.to_owned());
    let event = MessageDeletedEvent { conversation_id, message_id };
    record(EventType::MessageDeleted, event.encode_to_vec())
}

fn cursor() -> Cursor {
    let topic = TopicId::of("messaging.events.v1");
    Cursor::of_sorted(&[LogPosition { topic, partition: 0, next: 7, check: UNCHECKED }]).unwrap()
}

fn since() -> Option<CursorRequest> {
    Some(CursorRequest::Since(cursor()))
}

fn bench(config: CatchUpConfig, chunks: Vec<ReplayedChunk>) -> (ShelfBench, Arc<FakeTails>) {
    let bench = ShelfBench::new(config, Shelf::default());
    let tails = Arc::new(FakeTails { chunks: Mutex::new(chunks), ..FakeTails::default() });
    bench.catch_up.set_replays(tails.clone());
    (bench, tails)
}

/// Everything that one session is sent: `conversation:sequence`, and the other steps by name.
async fn all_steps(bench: &mut ShelfBench, until: usize) -> (Vec<String>, CaughtUp) {
    let (mut all, mut found) = (Vec::new(), CaughtUp::default());
    while all.len() < until {
        match bench.step().await.1 {
            CatchUpStep::Chunk { events, sent } => {
                for event in &events {
                    let (conversation, sequence) = place(event);
                    all.push(format!("{conversation}:{sequence}"));
                }
                sent.send(()).unwrap();
            }
            CatchUpStep::Complete { delivered } => {
                all.push("live".into());
                found = *delivered;
            }
            CatchUpStep::CursorExpired(why) => all.push(why.label().into()),
            CatchUpStep::MayHaveCursors => all.push("cursors".into()),
            CatchUpStep::Failed(close) => panic!("{close:?}"),
        }
    }
    (all, found)
}

/// Issue “From the log to the members”: “with cursors: none to the message service, at most one per session
/// to the conversation service”; “Within the tail everything missed is replayed: messages, deletions”.
#[tokio::test]
async fn everything_since_a_cursor_is_sent_without_a_call() {
    let chunks =
        vec![Ok(Some(vec![sent("a", 8), deleted("b", "m")])), Ok(Some(vec![sent("a", 10)]))];
    let (mut bench, tails) = bench(CatchUpConfig::default(), chunks);
    bench.shelf.holds("a", 20);
    bench.begin_with(1, &[("a", 3)], since());
    let (steps, delivered) = all_steps(&mut bench, 5).await;
    assert_eq!(steps, ["a:8", "b:0", "a:10", "live", "cursors"]);
    assert_eq!(*tails.asked.lock().unwrap(), [Some(cursor())]);
    let conversation = conversation_key("a");
    let known = [8, 9, 10, 11]
        .map(|sequence| delivered.contains(ConversationPosition { conversation, sequence }));
    assert_eq!(known, [true, false, true, false], "exactly what was replayed is a duplicate");
    let shelf = &bench.shelf;
    assert_eq!((shelf.pages(), shelf.lists(), shelf.members()), (0, 0, 0));
    assert_eq!((bench.counters.cursor_resumes.get(), bench.counters.replayed.get()), (1, 3));
}

/// `docs/websocket.md`: “what follows is the catch-up by `last_sequences`”.
#[tokio::test]
async fn cursor_that_cannot_be_used_is_answered_with_the_reason_and_a_catch_up() {
    for why in CursorExpired::ALL {
        let (mut bench, tails) = bench(CatchUpConfig::default(), vec![Err(why)]);
        bench.shelf.holds("a", 5);
        let is_decoded = !matches!(why, CursorExpired::Malformed | CursorExpired::OtherVersion);
        let request = if is_decoded { since() } else { Some(CursorRequest::Unusable(why)) };
        bench.begin_with(1, &[("a", 3)], request);
        let (steps, _) = all_steps(&mut bench, 5).await;
        assert_eq!(steps, [why.label(), "a:4", "a:5", "live", "cursors"]);
        assert_eq!(bench.catch_up.cursors_expired(why), 1);
        // The second question is only whether the session may have cursors.
        let asked = [Some(cursor()), None];
        assert_eq!(*tails.asked.lock().unwrap(), asked[usize::from(!is_decoded)..]);
    }
}

#[tokio::test]
async fn replay_that_is_overtaken_continues_as_catch_up() {
    let chunks = vec![Ok(Some(vec![sent("a", 4)])), Err(CursorExpired::Overtaken)];
    let (mut bench, _) = bench(CatchUpConfig::default(), chunks);
    bench.shelf.holds("a", 5);
    bench.begin_with(1, &[("a", 4)], since());
    let (steps, delivered) = all_steps(&mut bench, 5).await;
    assert_eq!(steps, ["a:4", "overtaken", "a:5", "live", "cursors"]);
    assert_eq!(delivered.runs().len(), 1, "4 and 5 were sent: {delivered:?}");
}

#[tokio::test]
async fn session_without_a_cursor_gets_cursors_when_every_node_knows_it() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let mut bench = ShelfBench::new(CatchUpConfig::default(), Shelf::default());
    bench
        .catch_up
        .set_replays(Arc::new(FakeTails { gate: Some(gate.clone()), ..FakeTails::default() }));
    bench.shelf.holds("a", 2);
    bench.begin_with(1, &[], Some(CursorRequest::First));
    assert_eq!(
        all_steps(&mut bench, 3).await.0,
        ["a:1", "a:2", "live"],
        "it does not wait for that"
    );
    gate.notify_one();
    assert_eq!(all_steps(&mut bench, 1).await.0, ["cursors"]);
}

#[tokio::test]
async fn node_without_tails_sends_no_cursors() {
    let mut bench = ShelfBench::new(CatchUpConfig::default(), Shelf::default());
    bench.shelf.holds("a", 1);
    bench.begin_with(1, &[], since());
    assert_eq!(all_steps(&mut bench, 3).await.0, ["not_supported", "a:1", "live"]);
    let counters = Arc::clone(&bench.counters);
    bench.begin_with(2, &[], Some(CursorRequest::First));
    assert_eq!(all_steps(&mut bench, 2).await.0, ["a:1", "live"]);
    assert_eq!(counters.cursor_requests.get(), 2);
}

/// A node without a message service replays all the same.
#[tokio::test]
async fn message_service_is_not_needed_for_a_cursor() {
    let (mut bench, tails) = bench(CatchUpConfig::default(), Vec::new());
    let chunks = vec![Ok(Some(vec![sent("a", 8)]))];
    bench.catch_up =
        CatchUpService::without_messages(CatchUpConfig::default(), Arc::clone(&bench.counters));
    *tails.chunks.lock().unwrap() = chunks;
    bench.catch_up.set_replays(tails);
    bench.begin_with(1, &[], since());
    assert_eq!(all_steps(&mut bench, 3).await.0, ["a:8", "live", "cursors"]);
}

/// Issue “From the log to the members”: “a slow session only waits for itself”.
#[tokio::test(start_paused = true)]
async fn session_that_does_not_read_its_replay_delays_no_other() {
    let config = CatchUpConfig { sessions_max: 1, ..CatchUpConfig::default() };
    let (mut bench, _) =
        bench(config, vec![Ok(Some(vec![sent("a", 8)])), Ok(Some(vec![sent("a", 9)]))]);
    bench.begin_with(1, &[], since());
    let (slot, CatchUpStep::Chunk { events, sent: stalled }) = bench.step().await else { panic!() };
    assert_eq!((slot, events.len()), (1, 1));
    // Its socket takes nothing. The other session gets the only slot.
    bench.begin_with(2, &[], since());
    assert_eq!(all_steps(&mut bench, 4).await.0, ["a:8", "a:9", "live", "cursors"]);
    assert_eq!(bench.counters.stalls.get(), 1);
    stalled.send(()).unwrap();
    assert_eq!(all_steps(&mut bench, 3).await.0, ["a:9", "live", "cursors"]);
}
