//! A slow session waits only for itself.

use tokio::time::Instant;

use super::shelf::{Shelf, ShelfBench};
use super::*;

/// How long a call to a neighbour takes.
const CALL: Duration = Duration::from_millis(5);
const ROOMS: usize = 8;
/// The session that reads. Those below do not.
const READER: u32 = 1_000;

fn bench(config: CatchUpConfig) -> ShelfBench {
    let shelf = Shelf { delay: CALL, ..Shelf::default() };
    for room in 0..ROOMS {
        shelf.holds(&format!("room-{room}"), 250);
    }
    ShelfBench::new(config, shelf)
}

impl ShelfBench {
    /// Runs until the reader has caught up; the others take nothing. Returns how long it took and how
    /// many messages it got.
    async fn reader_catches_up(
        &mut self,
        kept: &mut Vec<oneshot::Sender<()>>,
    ) -> (Duration, usize) {
        let (begun, mut messages) = (Instant::now(), 0);
        self.begin(READER, &[]);
        loop {
            match self.step().await {
                (READER, CatchUpStep::Chunk { events, sent }) => {
                    messages += events.len();
                    sent.send(()).unwrap();
                }
                (READER, CatchUpStep::Complete { .. }) => return (begun.elapsed(), messages),
                (_, CatchUpStep::Chunk { sent, .. }) => kept.push(sent),
                (slot, step) => panic!("{slot}: {step:?}"),
            }
        }
    }

    /// Sessions that do not read, until all of them are stalled.
    async fn stall(&mut self, sessions: u32, kept: &mut Vec<oneshot::Sender<()>>) {
        (0..sessions).for_each(|slot| self.begin(slot, &[]));
        for _ in 0..sessions {
            let (_, CatchUpStep::Chunk { sent, .. }) = self.step().await else {
                panic!("no chunk")
            };
            kept.push(sent);
        }
        while self.counters.stalled.get() < u64::from(sessions) {
            tokio::time::sleep(CALL).await;
        }
    }
}

/// Promise: “A client that reads slowly delays no other client's catch-up.”
///
/// Issue “From the log to the members”: “250 sessions that do not read delayed another session's
/// catch-up from 0.06 s to 17 s, because the page budget is awaited while holding a call permit.”
#[tokio::test(start_paused = true)]
async fn sessions_that_do_not_read_do_not_delay_one_that_reads() {
    // A page fills the whole budget, as the pages of the 250 did.
    let config = CatchUpConfig { pages_bytes_max: 1, sessions_max: 100, ..Default::default() };
    let mut kept = Vec::new();
    let (alone, messages) = bench(config.clone()).reader_catches_up(&mut kept).await;
    assert_eq!(messages, ROOMS * 250);

    let mut bench = bench(config);
    bench.stall(250, &mut kept).await;
    let counters = Arc::clone(&bench.counters);
    assert_eq!((counters.pages_bytes.get(), counters.running.get()), (0, 0), "they keep nothing");
    let (beside, messages) = bench.reader_catches_up(&mut kept).await;
    assert_eq!(messages, ROOMS * 250);
    assert_eq!(beside, alone, "virtual time: exactly as long as without them");
    assert_eq!(counters.stalled.get(), 250);
}

/// Promise: “A client that reads slowly delays no other client's catch-up.”
///
/// A gRPC session names its conversations one by one, and each has a catch-up of its own.
#[tokio::test(start_paused = true)]
async fn streams_that_do_not_read_do_not_delay_one_that_reads() {
    let config = CatchUpConfig { pages_bytes_max: 1, sessions_max: 100, ..Default::default() };
    let mut kept = Vec::new();
    let (alone, _) = bench(config.clone()).reader_catches_up(&mut kept).await;
    let mut bench = bench(config);
    let streams = 40;
    for slot in 0..streams {
        (0..ROOMS).for_each(|room| bench.begin_conversation(slot, &format!("room-{room}")));
    }
    let all = u64::from(streams) * ROOMS as u64;
    for _ in 0..all {
        let (_, CatchUpStep::Chunk { sent, .. }) = bench.step().await else { panic!("no chunk") };
        kept.push(sent);
    }
    while bench.counters.stalled.get() < all {
        tokio::time::sleep(CALL).await;
    }
    let counters = Arc::clone(&bench.counters);
    assert_eq!((counters.pages_bytes.get(), counters.running.get()), (0, 0), "they keep nothing");
    let (beside, messages) = bench.reader_catches_up(&mut kept).await;
    assert_eq!(messages, ROOMS * 250);
    assert_eq!(beside, alone, "virtual time: exactly as long as without them");
}

#[tokio::test(start_paused = true)]
async fn slow_session_continues_where_it_was_and_misses_nothing() {
    let config = CatchUpConfig { chunk_messages_max: 30, ..CatchUpConfig::default() };
    let mut bench = bench(config.clone());
    bench.begin(1, &[("room-3", 240)]);
    let mut messages = Vec::new();
    loop {
        match bench.step().await.1 {
            CatchUpStep::Chunk { events, sent } => {
                messages.extend(events.iter().map(|event| place(event)));
                // Every third chunk is slow.
                if messages.len() % 3 == 0 {
                    tokio::time::sleep(4 * config.stall_after).await;
                }
                sent.send(()).unwrap();
            }
            CatchUpStep::Complete { delivered } => {
                let runs = runs(&delivered);
                assert_eq!(runs[&conversation_key("room-3")], [(241, 250)]);
                assert_eq!(runs[&conversation_key("room-0")], [(1, 250)]);
                break;
            }
            step => panic!("{step:?}"),
        }
    }
    for room in 0..ROOMS {
        let first = if room == 3 { 241 } else { 1 };
        assert_eq!(of(&format!("room-{room}"), &messages), (first..=250).collect::<Vec<_>>());
    }
    assert!(bench.counters.stalls.get() > 5);
    let pages = bench.shelf.pages();
    println!("{} stalls, {pages} calls; 24 without stalls", bench.counters.stalls.get());
    // A stalled session fetches little ahead that it would have to drop.
    assert!(pages <= 24 + ROOMS + 2 * bench.counters.stalls.get() as usize, "{pages} calls");
}

#[tokio::test(start_paused = true)]
async fn session_that_takes_nothing_is_closed_in_time() {
    let mut bench = bench(CatchUpConfig::default());
    let mut kept = Vec::new();
    bench.stall(1, &mut kept).await;
    let begun = Instant::now();
    let (_, CatchUpStep::Failed(close)) = bench.step().await else { panic!("not closed") };
    assert_eq!(close, CatchUpFailure::TooSlow.close().unwrap());
    assert!(begun.elapsed() <= CatchUpConfig::default().chunk_timeout);
    assert_eq!(bench.counters.stalled.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn chunks_that_slow_sockets_hold_are_bounded_and_the_next_slow_session_pays() {
    let config = CatchUpConfig { stalled_bytes_max: 20_000, ..CatchUpConfig::default() };
    let mut bench = bench(config);
    let mut kept = Vec::new();
    bench.stall(1, &mut kept).await;
    bench.stall_another(&mut kept).await;
    // The reader does not wait for them.
    assert_eq!(bench.reader_catches_up(&mut kept).await.1, ROOMS * 250);
}

impl ShelfBench {
    /// More slow sessions, until one is closed for lack of room.
    async fn stall_another(&mut self, kept: &mut Vec<oneshot::Sender<()>>) {
        for slot in 1..10 {
            self.begin(slot, &[]);
            loop {
                match self.step().await {
                    (_, CatchUpStep::Chunk { sent, .. }) => kept.push(sent),
                    (closed, CatchUpStep::Failed(close)) => {
                        assert_eq!(close, CatchUpFailure::TooSlow.close().unwrap());
                        assert_eq!(closed, slot, "not one that has room already");
                        return;
                    }
                    (slot, step) => panic!("{slot}: {step:?}"),
                }
                if self.counters.stalled.get() > u64::from(slot) {
                    break;
                }
                let stalled = self.counters.stalled.get();
                let deadline = Instant::now() + CatchUpConfig::default().stall_after + CALL;
                while self.counters.stalled.get() == stalled && Instant::now() < deadline {
                    tokio::time::sleep(CALL).await;
                }
                if self.counters.stalled.get() > stalled {
                    break;
                }
            }
        }
        panic!("no session was closed");
    }
}
