//! Which number orders a session: never that of another one.

use redis::Value;

use super::*;
use crate::service::backends::redis::Fence;

fn fence(number: u64) -> Fence {
    let text = Value::BulkString(number.to_string().into_bytes());
    let now = Instant::now();
    Fence::drawn(Ok(Value::Array(vec![text.clone(), text])), now, now).unwrap()
}

impl Bench {
    fn standing(&self) -> FenceStanding {
        self.queue.standing(&ids(0), self.now)
    }

    /// Registers a session, which draws this number.
    fn registers(&mut self, replaced: bool, number: u64) {
        self.queue.register(&ids(0), replaced, self.now);
        assert_eq!(self.next(), Some(Register));
        self.queue.drawn(&ids(0), fence(number));
        self.complete(Register, Done);
    }
}

#[test]
fn session_keeps_its_number_until_it_ends() {
    let mut bench = Bench::new();
    bench.registers(false, 5);
    for _ in 0..3 {
        bench.queue.refresh(&ids(0), true, bench.now);
        assert_eq!(bench.standing().fence, Some(fence(5)));
        bench.does(Refresh { check: true }, Done);
    }
    // Lost by Redis, it is registered again with the same number.
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Refresh { check: true }, Vanished);
    assert_eq!(bench.standing().fence, Some(fence(5)));
    bench.does(Register, Done);
    bench.queue.unregister(&ids(0), bench.now);
    assert_eq!(bench.standing().fence, Some(fence(5)));
    bench.does(Unregister, Done);
    assert!(bench.queue.fences.is_empty());
}

#[test]
fn new_session_draws_its_own_number_and_can_remove_its_predecessors() {
    let mut bench = Bench::new();
    bench.registers(false, 5);
    bench.now += Duration::from_secs(7);
    bench.queue.register(&ids(0), true, bench.now);
    let FenceStanding { admitted, fence: own, previous } = bench.standing();
    assert_eq!((admitted, own, previous), (bench.now, None, Some(fence(5))));
    // Another one replaces it before it has drawn.
    bench.queue.register(&ids(0), true, bench.now);
    assert_eq!((bench.standing().fence, bench.standing().previous), (None, Some(fence(5))));
    bench.queue.unregister(&ids(0), bench.now);
    assert_eq!(bench.standing().previous, Some(fence(5)));
    bench.does(Unregister, Done);
    assert!(bench.queue.fences.is_empty());
}

#[test]
fn number_drawn_for_a_session_that_was_replaced_meanwhile_is_not_its_successors() {
    let mut bench = Bench::new();
    bench.queue.register(&ids(0), false, bench.now);
    assert_eq!(bench.next(), Some(Register));
    bench.queue.register(&ids(0), true, bench.now);
    bench.queue.drawn(&ids(0), fence(5));
    bench.complete(Register, Done);
    assert_eq!((bench.standing().fence, bench.standing().previous), (None, Some(fence(5))));
    assert_eq!(bench.next(), Some(Register));
    bench.queue.drawn(&ids(0), fence(6));
    bench.complete(Register, Done);
    bench.queue.refresh(&ids(0), true, bench.now);
    assert_eq!(bench.standing().fence, Some(fence(6)));
}

#[test]
fn number_survives_a_failed_call_and_a_full_queue() {
    let mut bench = Bench { queue: OperationQueue::new(limits(2)), now: Instant::now() };
    bench.queue.register(&ids(0), false, bench.now);
    assert_eq!(bench.next(), Some(Register));
    bench.queue.drawn(&ids(0), fence(5));
    bench.complete(Register, Failed);
    bench.now += RETRY_BACKOFF.max();
    assert_eq!(bench.standing().fence, Some(fence(5)));
    bench.does(Register, Done);

    (1..3).for_each(|user| assert!(bench.queue.register(&ids(user), false, bench.now)));
    assert!(!bench.queue.refresh(&ids(0), true, bench.now));
    assert!(!bench.queue.register_again(&ids(0), bench.now));
    for user in 1..3 {
        assert_eq!(bench.next(), Some(Register));
        bench.queue.complete(ids(user), Register, Done, 0.5, bench.now);
    }
    assert!(bench.queue.register_again(&ids(0), bench.now));
    assert_eq!(bench.standing().fence, Some(fence(5)));
}

#[test]
fn session_found_to_be_replaced_is_not_registered_again_before_it_is_closed() {
    let mut bench = Bench::new();
    bench.registers(false, 5);
    bench.queue.refresh(&ids(0), true, bench.now);
    bench.does(Refresh { check: true }, Elsewhere);
    assert!(bench.queue.fences.is_empty());
    assert!(bench.queue.refresh(&ids(0), true, bench.now));
    assert!(bench.queue.register_again(&ids(0), bench.now));
    assert!(bench.is_idle(), "it would draw a number and replace the newer session");
    assert_eq!(bench.queue.take_replaced(), [ids(0)]);
    // A session that is admitted now is a new one.
    bench.registers(false, 9);
    assert_eq!(bench.queue.take_replaced(), []);
}

#[test]
fn numbers_of_ended_sessions_are_not_kept() {
    let mut bench = Bench { queue: OperationQueue::new(limits(1)), now: Instant::now() };
    bench.registers(false, 5);
    // No room for its end: the registration expires.
    assert!(bench.queue.unregister(&ids(1), bench.now));
    assert!(!bench.queue.unregister(&ids(0), bench.now));
    assert!(bench.queue.fences.is_empty());
}
