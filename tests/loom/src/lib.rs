//! Models of the sleep protocol of `src/handoff` under loom (see `Cargo.toml`). This file models
//! the surroundings of the flag: a ring, an eventfd, and the two ways to wait on it. loom reports a
//! sleeper that nobody wakes as a deadlock, and one that is woken spuriously without end as a
//! branch limit.

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

/// The protocol between the sleeper and the ringers.
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

/// The eventfd. `poll(2)` returns while the count is not 0, and the doorbell then reads it. An
/// edge-triggered poll (io_uring, epoll) returns for writes since its last return.
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
    /// A shard in its io_uring, or a tokio task.
    Edge,
}

struct Shared<P> {
    flag: P,
    event: EventFd,
    /// One ring per ringer: the number of pushed items. A ring publishes with Release and is read
    /// with Acquire, as in `rtrb`; that alone does not order it with the flag.
    rings: Vec<AtomicUsize>,
}

/// Each ringer pushes `pushes` items and rings after each. The sleeper takes them all.
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

/// A push that can wait is seen by a light sleeper, even if it slept soundly before.
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

/// The protocol without its fences. The model must find the sleeper that nobody wakes.
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
fn without_fences_a_sleeper_is_not_woken() {
    model(None, || run(|| WithoutFences(AtomicBool::new(false)), 1, 1, Waiting::Level));
}

/// The sleeper does not check the rings again after it has announced its sleep.
struct FlagTooLate(AtomicBool);

impl Protocol for FlagTooLate {
    fn about_to_sleep(&self) {
        // The caller checks its rings now, but the flag is set only for the next time.
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
fn flag_set_after_the_fence_leaves_a_sleeper_asleep() {
    model(None, || run(|| FlagTooLate(AtomicBool::new(false)), 1, 1, Waiting::Level));
}
