//! The message service commits a lower sequence after a higher one (contract §2).

use super::shelf::{Shelf, ShelfBench};
use super::*;
use crate::domain::ids::ConversationPosition;

fn bench(delay: Duration) -> ShelfBench {
    let config = CatchUpConfig { calls_max: 1, ..CatchUpConfig::default() };
    ShelfBench::new(config, Shelf { delay, ..Shelf::default() })
}

/// The sequences of each session, until all of them are complete, and what they name as delivered.
async fn all_complete(
    bench: &mut ShelfBench,
    sessions: usize,
) -> HashMap<u32, (Vec<i64>, Box<CaughtUp>)> {
    let (mut messages, mut complete) = (HashMap::<u32, Vec<i64>>::new(), HashMap::new());
    while complete.len() < sessions {
        match bench.step().await {
            (slot, CatchUpStep::Chunk { events, sent }) => {
                let places = events.iter().map(|event| place(event).1);
                messages.entry(slot).or_default().extend(places);
                sent.send(()).unwrap();
            }
            (slot, CatchUpStep::Complete { delivered }) => {
                complete.insert(slot, (messages.remove(&slot).unwrap_or_default(), delivered));
            }
            (slot, step) => panic!("{slot}: {step:?}"),
        }
    }
    complete
}

/// Issue “From the log to the members”: “Recognise duplicates by the exact set that catch-up
/// delivered.”
#[tokio::test]
async fn catch_up_names_exactly_the_messages_that_it_sent() {
    let mut bench = bench(Duration::ZERO);
    bench.shelf.commits("room", [1, 3, 4, 6]);
    bench.begin(1, &[("room", 1)]);
    let (messages, delivered) = all_complete(&mut bench, 1).await.remove(&1).unwrap();
    assert_eq!(messages, [3, 4, 6]);
    let conversation = conversation_key("room");
    let known = [1, 2, 3, 4, 5, 6, 7]
        .map(|sequence| delivered.contains(ConversationPosition { conversation, sequence }));
    assert_eq!(known, [false, false, true, true, false, true, false]);
}

/// Issue “From the log to the members”: “A sequence named above the end silences the conversation for
/// five minutes.” Nothing was delivered, so nothing is a duplicate.
#[tokio::test]
async fn sequence_above_the_end_silences_nothing() {
    for named in [6, i64::MAX] {
        let mut bench = bench(Duration::ZERO);
        bench.shelf.holds("room", 5);
        bench.begin(1, &[("room", named)]);
        let (messages, delivered) = all_complete(&mut bench, 1).await.remove(&1).unwrap();
        assert!(messages.is_empty() && delivered.is_empty());
    }
}

/// A session must not join a call that was sent before it began: what was committed in between may have
/// been routed before its 101.
#[tokio::test(start_paused = true)]
async fn session_shares_only_calls_that_were_not_sent_yet() {
    let mut bench = bench(Duration::from_secs(1));
    // Without questions about membership.
    let config = CatchUpConfig { calls_max: 1, ..CatchUpConfig::default() };
    let (shelf, counters) = (bench.shelf.clone(), Arc::clone(&bench.counters));
    bench.catch_up = CatchUpService::new(config, shelf, ReadAccess::Unchecked, counters);
    bench.shelf.commits("room", [1, 3]);
    bench.begin(1, &[("room", 0)]);
    // Until its page is in flight.
    while bench.shelf.pages() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bench.shelf.commits("room", [2, 4]);
    for slot in 2..=4 {
        bench.begin(slot, &[("room", 0)]);
    }
    let mut complete = all_complete(&mut bench, 4).await;
    assert_eq!(complete.remove(&1).unwrap().0, [1, 3]);
    for (slot, (messages, _)) in complete {
        assert_eq!(messages, [1, 2, 3, 4], "{slot}");
    }
    assert_eq!(bench.shelf.pages(), 2, "the three others share one call");
    assert_eq!(bench.counters.pages_shared.get(), 2);
}

/// With `HANDOFF=redis`, what another node routes before it can find the session comes with a second
/// round, also if its sequence is below one that the first round has sent.
#[tokio::test]
async fn second_round_fetches_what_was_committed_late() {
    use crate::service::sessions::presence::VisibilityConfig;
    let long = Duration::from_secs(3600);
    let config = VisibilityConfig { lookup_lifetime: long, registration_wait: long };
    let now = tokio::time::Instant::now();
    let visibility = Arc::new(Visibility::new(config, now));
    let shelf = Arc::new(Shelf::default());
    shelf.commits("room", [1, 2, 4, 5]);
    let mut among = Bench::new(CatchUpConfig::default());
    let access = ReadAccess::Checked { listing: shelf.clone(), source: shelf.clone() };
    let counters = Arc::clone(&among.counters);
    among.catch_up = CatchUpService::new(CatchUpConfig::default(), shelf.clone(), access, counters);
    among.begin_among(1, "alice", CatchUpScope::Session(Vec::new()), Some(visibility.clone()));
    let CatchUpStep::Chunk { events, sent } = among.step().await.step else { panic!("no chunk") };
    assert_eq!(events.iter().map(|event| place(event).1).collect::<Vec<_>>(), [1, 2, 4, 5]);
    sent.send(()).unwrap();
    shelf.commits("room", [3, 6]);
    visibility.registered(now - long);
    let (messages, delivered) = among.complete().await;
    assert_eq!(of("room", &messages), [3, 6], "nothing twice");
    assert_eq!(delivered, one_run([("room", 1, 6)]));
    assert_eq!(shelf.asked_for("room"), [0, 2], "from the hole, not from the beginning");
}

#[tokio::test]
async fn what_all_sessions_remember_is_bounded_and_counted() {
    let config = CatchUpConfig { delivered_bytes_max: 1, ..CatchUpConfig::default() };
    let mut bench = ShelfBench::new(config, Shelf::default());
    bench.shelf.commits("room", [1, 3]);
    let mut kept = Vec::new();
    for slot in 1..=2 {
        bench.begin(slot, &[]);
        let (messages, delivered) = all_complete(&mut bench, 1).await.remove(&slot).unwrap();
        assert_eq!(messages, [1, 3]);
        kept.push(delivered);
    }
    assert_eq!(kept[0].runs().len(), 2);
    assert!(kept[1].is_empty(), "its messages may be repeated live, but none is lost");
    assert_eq!(bench.counters.delivered_forgotten.get(), 2);
    kept.clear();
    bench.begin(3, &[]);
    let (_, delivered) = all_complete(&mut bench, 1).await.remove(&3).unwrap();
    assert_eq!(delivered.runs().len(), 2, "there is room again");
}
