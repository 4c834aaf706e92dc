//! The last trace events, printed when a seed fails.

use std::cell::RefCell;
use std::collections::VecDeque;

/// Number of trace events kept.
const REMEMBERED: usize = 80;

/// One action of a step.
#[derive(Clone, Copy, Debug)]
pub enum TraceEvent {
    /// A client connected.
    Connect(usize),
    /// A client sent this many bytes.
    Sends(usize, &'static str, usize),
    /// A client read up to this many bytes.
    Reads(usize, usize),
    /// A client shut down its half of the stream.
    Ends(usize),
    /// A client begins to send without pause.
    Floods(usize),
    /// A client reset the connection.
    Resets(usize),
    /// A peer pushed a command that concerns this client.
    Pushes(usize, &'static str, usize),
    /// A report about this client was taken.
    Report(usize, &'static str, usize),
    /// Time passed, ms.
    Pass(u64),
    /// The Unix clock was stepped, ms.
    Steps(i64),
    /// The shard sent something to this client.
    Wire(usize, &'static str, u64),
    /// The shard took a turn.
    Turn,
}

struct Trace {
    seed: u64,
    step: u64,
    acts: VecDeque<(u64, TraceEvent)>,
}

thread_local! {
    static TRACE: RefCell<Trace> =
        const { RefCell::new(Trace { seed: 0, step: 0, acts: VecDeque::new() }) };
}

/// Clears the trace for this seed.
pub(super) fn begin(seed: u64) {
    TRACE.with_borrow_mut(|trace| {
        trace.seed = seed;
        trace.step = 0;
        trace.acts.clear();
    });
}

pub(super) fn step(step: u64) {
    TRACE.with_borrow_mut(|trace| trace.step = step);
}

pub(super) fn note(act: TraceEvent) {
    TRACE.with_borrow_mut(|trace| {
        if trace.acts.len() == REMEMBERED {
            trace.acts.pop_front();
        }
        let step = trace.step;
        trace.acts.push_back((step, act));
    });
}

/// Makes every panic of this process print the seed, the step and the last trace events of its
/// thread.
pub fn print_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        TRACE.with_borrow(|trace| {
            eprintln!("seed {} failed at step {}; the last acts:", trace.seed, trace.step);
            for (step, act) in &trace.acts {
                eprintln!("  {step:>8} {act:?}");
            }
            eprintln!(
                "replay: cargo run --release --features simulation --bin simulate -- --seed {}",
                trace.seed
            );
        });
    }));
}
