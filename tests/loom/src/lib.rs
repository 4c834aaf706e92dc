//! See `Cargo.toml`. Here is the model of what surrounds the flag: a ring, an eventfd, and the two
//! ways to wait on it. A sleeper that nobody wakes is a deadlock, and one that is woken for nothing
//! again and again exceeds the bound of branches; loom reports both.

#![cfg(test)]

#[path = "../../../src/handoff/sleep.rs"]
mod sleep;

mod atomic {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering, fence};
}

use loom::sync::atomic::AtomicUsize;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use atomic::{AtomicBool, Ordering, fence};
use sleep::SleepFlag;

/// What the sleeper and the ringers agree by.
trait Protocol: Send + Sync + 'static {
    fn about_to_sleep(&self);
    fn awake(&self);
    fn must_ring(&self) -> bool;
}

impl Protocol for SleepFlag {
    fn about_to_sleep(&self) {
        self.about_to_sleep(false);
    }
    fn awake(&self) {
        self.awake();
    }
    fn must_ring(&self) -> bool {
        self.must_ring()
    }
}

/// The eventfd: `poll(2)` returns while the count is not 0, and the doorbell reads it then; an
/// edge-triggered watch (io_uring, epoll) tells of writes since it told last.
#[derive(Default)]
struct EventFd {
    state: Mutex<State>,
    written: Condvar,
}

#[derive(Default)]
struct State {
    count: usize,
    edges: usize,
}

impl EventFd {
    fn write(&self) {
        let mut state = self.state.lock().unwrap();
        state.count += 1;
        state.edges += 1;
        self.written.notify_one();
    }

    fn wait(&self, how: Waiting) {
        let mut state = self.state.lock().unwrap();
        loop {
            match how {
                Waiting::Level if state.count > 0 => {
                    state.count = 0;
                    return;
                }
                Waiting::Edge if state.edges > 0 => {
                    state.edges = 0;
                    return;
                }
                _ => state = self.written.wait(state).unwrap(),
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Waiting {
    /// A thread in `poll(2)`.
    Level,
    /// A shard in its ring, a task of tokio.
    Edge,
}

struct Shared<P> {
    flag: P,
    event: EventFd,
    /// One ring per ringer: what was pushed. A ring publishes with Release and is read with
    /// Acquire, as `rtrb` does; that alone does not order it with the flag.
    rings: Vec<AtomicUsize>,
}

/// Each ringer pushes `pushes` items and rings after each; the sleeper takes them all.
fn run<P: Protocol>(new: fn() -> P, ringers: usize, pushes: usize, how: Waiting) {
    let shared = Arc::new(Shared {
        flag: new(),
        event: EventFd::default(),
        rings: (0..ringers).map(|_| AtomicUsize::new(0)).collect(),
    });
    let threads: Vec<_> = (0..ringers)
        .map(|ringer| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for pushed in 1..=pushes {
                    shared.rings[ringer].store(pushed, Ordering::Release);
                    if shared.flag.must_ring() {
                        shared.event.write();
                    }
                }
            })
        })
        .collect();
    let seen = || shared.rings.iter().map(|ring| ring.load(Ordering::Acquire)).sum::<usize>();
    let mut taken = 0;
    while taken < ringers * pushes {
        shared.flag.about_to_sleep();
        let before = taken;
        taken = seen();
        if taken == before {
            shared.event.wait(how);
        }
        shared.flag.awake();
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

fn model(preemptions: Option<usize>, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(body);
}

#[test]
fn thread_in_poll_is_woken_for_every_push() {
    model(None, || run(SleepFlag::new, 1, 2, Waiting::Level));
}

#[test]
fn shard_in_its_ring_is_woken_for_every_push() {
    model(None, || run(SleepFlag::new, 1, 2, Waiting::Edge));
}

#[test]
fn two_ringers_wake_one_sleeper() {
    model(Some(3), || run(SleepFlag::new, 2, 1, Waiting::Level));
    model(Some(3), || run(SleepFlag::new, 2, 1, Waiting::Edge));
}

/// A push that can wait is seen by whoever sleeps lightly, also if it slept soundly before.
#[test]
fn nudge_is_not_lost_on_a_light_sleeper() {
    model(None, || {
        let shared = Arc::new((SleepFlag::new(), EventFd::default(), AtomicUsize::new(0)));
        let ringer = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                shared.2.store(1, Ordering::Release);
                if shared.0.must_nudge() {
                    shared.1.write();
                }
            }
        });
        for soundly in [true, false] {
            shared.0.about_to_sleep(soundly);
            if shared.2.load(Ordering::Acquire) == 0 && !soundly {
                shared.1.wait(Waiting::Level);
            }
            shared.0.awake();
        }
        assert_eq!(shared.2.load(Ordering::Acquire), 1);
        ringer.join().unwrap();
    });
}

/// The protocol without its fences: the model must find the sleeper that nobody wakes.
struct WithoutFences(AtomicBool);

impl Protocol for WithoutFences {
    fn about_to_sleep(&self) {
        self.0.store(true, Ordering::Release);
    }
    fn awake(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
    fn must_ring(&self) -> bool {
        self.0.load(Ordering::Acquire) && self.0.swap(false, Ordering::AcqRel)
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_fences_a_sleeper_is_forgotten() {
    model(None, || run(|| WithoutFences(AtomicBool::new(false)), 1, 1, Waiting::Level));
}

/// The sleeper does not look again after it has announced its sleep.
struct FlagTooLate(AtomicBool);

impl Protocol for FlagTooLate {
    fn about_to_sleep(&self) {
        // The caller looks into its rings now, and the flag is raised for the next time only.
        fence(Ordering::SeqCst);
        thread::yield_now();
        self.0.store(true, Ordering::Relaxed);
    }
    fn awake(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
    fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel)
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn flag_raised_after_the_fence_forgets_a_sleeper() {
    model(None, || run(|| FlagTooLate(AtomicBool::new(false)), 1, 1, Waiting::Level));
}
