//! The last acts of a run, printed when a seed fails.

use std::cell::RefCell;
use std::collections::VecDeque;

/// Number of acts kept.
const REMEMBERED: usize = 80;

#[derive(Default)]
struct ClusterTrace {
    seed: u64,
    /// Steps of the whole run. They decide where everything comes to rest.
    steps: u64,
    weather: String,
    step: u64,
    /// Step, what happened, and what it concerns.
    acts: VecDeque<(u64, &'static str, [i64; 4])>,
}

thread_local! {
    static TRACE: RefCell<ClusterTrace> = RefCell::default();
}

pub(super) fn begin(seed: u64, steps: u64) {
    TRACE.set(ClusterTrace { seed, steps, ..ClusterTrace::default() });
}

pub(super) fn weather(weather: String) {
    TRACE.with_borrow_mut(|trace| trace.weather = weather);
}

pub(super) fn step(step: u64) {
    TRACE.with_borrow_mut(|trace| trace.step = step);
}

pub(super) fn note(what: &'static str, about: [i64; 4]) {
    TRACE.with_borrow_mut(|trace| {
        if trace.acts.len() == REMEMBERED {
            trace.acts.pop_front();
        }
        trace.acts.push_back((trace.step, what, about));
    });
}

/// Makes every panic of this process print the seed, the step and the last acts of its thread.
pub fn print_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        TRACE.with_borrow(|trace| {
            let ClusterTrace { seed, steps, weather, step, acts } = trace;
            eprintln!("{weather}");
            eprintln!("seed {seed} failed at step {step}; the last acts:");
            for (step, what, about) in acts {
                eprintln!("  {step:>8} {what} {about:?}");
            }
            eprintln!(
                "replay: cargo run --release --features simulation --bin simulate -- --world cluster \
                 --seed {seed} --steps {steps}"
            );
        });
    }));
}
