//! Clients with many conversations.

use tokio::time::Instant;

use super::shelf::{Shelf, ShelfBench};
use super::*;
use crate::service::sessions::client_message::CONVERSATIONS_NAMED_MAX;

/// How long a call to a neighbour takes.
const CALL: Duration = Duration::from_millis(5);

fn names() -> Vec<String> {
    (0..CONVERSATIONS_NAMED_MAX).map(|number| format!("room-{number}")).collect()
}

/// Sessions that name all conversations; each is up to date in all but one of a hundred. Returns the time
/// until all are live.
async fn all_live(bench: &mut ShelfBench, sessions: u32) -> Duration {
    let names = names();
    let named: Vec<_> = names.iter().map(|name| (name.as_str(), 3)).collect();
    for (number, name) in names.iter().enumerate() {
        bench.shelf.holds(name, if number % 100 == 0 { 5 } else { 3 });
    }
    let begun = Instant::now();
    (0..sessions).for_each(|slot| bench.begin(slot, &named));
    let mut complete = 0;
    while complete < sessions {
        match bench.step().await {
            (_, CatchUpStep::Chunk { sent, .. }) => sent.send(()).unwrap(),
            (_, CatchUpStep::Complete { delivered }) => {
                assert_eq!(delivered.runs().len(), CONVERSATIONS_NAMED_MAX.div_ceil(100));
                complete += 1;
            }
            (slot, step) => panic!("{slot}: {step:?}"),
        }
    }
    begun.elapsed()
}

/// Issue “From the log to the members”: “4,096 named conversations cause 4,096 sequential calls.” They run
/// 16 at a time.
#[tokio::test(start_paused = true)]
async fn calls_for_many_conversations_run_side_by_side() {
    let sequential = CALL * CONVERSATIONS_NAMED_MAX as u32;
    let at_once = CatchUpConfig::default().steps_at_once as u32;
    for lists_nothing in [false, true] {
        let shelf = Shelf { delay: CALL, lists_nothing, ..Shelf::default() };
        let mut bench = ShelfBench::new(CatchUpConfig::default(), shelf);
        let time = all_live(&mut bench, 1).await;
        let calls = (bench.shelf.members(), bench.shelf.pages());
        println!(
            "listed: {}: {calls:?} calls in {time:?}; one by one {sequential:?}",
            !lists_nothing
        );
        let members = if lists_nothing { CONVERSATIONS_NAMED_MAX } else { 0 };
        assert_eq!(calls, (members, CONVERSATIONS_NAMED_MAX));
        let rounds = if lists_nothing { 2 } else { 1 };
        assert!(time <= rounds * sequential / at_once + 3 * CALL, "{time:?}");
    }
}

/// Issue “From the log to the members”: “Batch, parallelise, reuse.” Sessions of the same conversations that
/// return at once share the calls.
#[tokio::test(start_paused = true)]
async fn sessions_that_return_at_once_share_pages() {
    const SESSIONS: u32 = 20;
    let shelf = Shelf { delay: CALL, ..Shelf::default() };
    let mut bench = ShelfBench::new(CatchUpConfig::default(), shelf);
    let time = all_live(&mut bench, SESSIONS).await;
    let (pages, shared) = (bench.shelf.pages(), bench.counters.pages_shared.get() as usize);
    let wanted = SESSIONS as usize * CONVERSATIONS_NAMED_MAX;
    println!("{SESSIONS} sessions: {pages} calls for {wanted} pages, {time:?}");
    assert_eq!(pages + shared, wanted);
    assert!(pages <= wanted / 2, "{pages} calls");
}
