//! What a session that reads at once waits for others that do not.

use std::collections::VecDeque;

use super::*;
use crate::domain::wait_allowance::WAIT_MS_MAX;
use crate::reactor::connection::LifecycleClass;

/// How late an event may be because of others, ms: the longest wait, and twice the precision of the test.
const LATE_MS_MAX: u64 = WAIT_MS_MAX + 2 * TICK_MS;

/// How late an event is that nothing waits for, ms.
const AT_ONCE_MS: u64 = 2 * TICK_MS;

/// A router whose events wait while its ring is full, a session that reads at once, and hostile ones.
struct Crowd {
    rig: Rig,
    bystander: Client,
    bystander_key: ConnectionKey,
    hostile: Vec<(Client, ConnectionKey)>,
    /// Time, recipient and sequence of each event.
    unrouted: VecDeque<(u64, ConnectionKey, i64)>,
    /// When the events of the bystander that have not arrived were made.
    awaited: VecDeque<u64>,
    sequence: i64,
    latest_ms: u64,
    received: usize,
    /// Those that came later than at once.
    late: usize,
}

impl Crowd {
    /// `capacity`: of the sockets of the hostile clients, bytes. An event has ten.
    fn new(config: ShardConfig, hostile: usize, capacity: usize) -> Self {
        let mut rig = Rig::new(config);
        let (bystander, bystander_key) = rig.live(1 << 30);
        let hostile = (0..hostile).map(|_| rig.live(capacity)).collect();
        Self {
            rig,
            bystander,
            bystander_key,
            hostile,
            unrouted: VecDeque::new(),
            awaited: VecDeque::new(),
            sequence: 0,
            latest_ms: 0,
            received: 0,
            late: 0,
        }
    }

    fn now_ms(&self) -> u64 {
        self.rig.shard.kernel().now_ms()
    }

    fn event_to(&mut self, to: ConnectionKey) {
        self.sequence += 1;
        self.unrouted.push_back((self.now_ms(), to, self.sequence));
        if to == self.bystander_key {
            self.awaited.push_back(self.now_ms());
        }
    }

    /// A tick: the router pushes what fits, the hostile clients read so many bytes, the bystander reads everything.
    fn tick(&mut self, mut reads: impl FnMut(usize) -> usize) {
        while self.rig.router.commands.free() > 0
            && let Some((_, to, sequence)) = self.unrouted.pop_front()
        {
            self.rig.routes(to, sequence);
        }
        for (number, (client, _)) in self.hostile.iter().enumerate() {
            self.rig.shard.kernel_mut().client_reads(client.socket, reads(number));
        }
        self.rig.pass(TICK_MS);
        while self.rig.manager.reports.pop().is_some() {}
        while self.rig.router.reports.pop().is_some() {}
        let arrived = self.rig.events(&mut self.bystander).len();
        self.received += arrived;
        for made_ms in self.awaited.drain(..arrived) {
            let took_ms = self.rig.shard.kernel().now_ms() - made_ms;
            self.latest_ms = self.latest_ms.max(took_ms);
            self.late += usize::from(took_ms > AT_ONCE_MS);
        }
    }

    fn has_ended(&self, number: usize) -> bool {
        let (_, key) = self.hostile[number];
        self.rig.shard.slab.get(key).is_none_or(|it| !it.lifecycle.is_open())
    }
}

/// Four events per tick for each, 3,750 in all, as in the issue “No client can hold up another”.
#[test]
fn reader_that_drains_slowly_is_closed_and_delays_nobody() {
    let mut crowd = Crowd::new(ShardConfig::default(), 1, 160);
    let mut tick = 0;
    while crowd.received < 3_750 {
        tick += 1;
        for _ in 0..4 {
            crowd.event_to(crowd.hostile[0].1);
            crowd.event_to(crowd.bystander_key);
        }
        // One event before the rings stop waiting for it.
        crowd.tick(|_| if tick % 6 == 0 { 10 } else { 1 });
        assert!(crowd.latest_ms <= LATE_MS_MAX, "{} ms late in tick {tick}", crowd.latest_ms);
    }
    assert!(crowd.has_ended(0));
    assert!(crowd.rig.counters.counts.intake_waits.get() > 0);
}

/// Sessions that catch up hold all that they may, while more than half of the rest is queued. Each event is another
/// one's, so that the bound of one session is not reached.
#[test]
fn sessions_that_catch_up_delay_nobody() {
    let config = ShardConfig { events_max: 200, ..ShardConfig::default() };
    let mut crowd = Crowd::new(config, 1, 160);
    for _ in 0..110 {
        crowd.event_to(crowd.hostile[0].1);
    }
    while !crowd.unrouted.is_empty() {
        crowd.tick(|_| 0);
    }
    let catching_up: Vec<_> = (0..10).map(|_| crowd.rig.session(1 << 20)).collect();
    let mut most_held = 0;
    for tick in 0..1_000 {
        // The first one gets twice as many as the others.
        let number = [0, tick % 10][usize::from(tick % 11 > 0)];
        if crowd.rig.counters.counts.closed_in_catch_up_for_room.get() == 0 {
            crowd.event_to(catching_up[number].1);
        }
        crowd.event_to(crowd.bystander_key);
        crowd.tick(|_| 0);
        most_held = most_held.max(crowd.rig.counters.counts.events_in_catch_up.get());
        assert!(crowd.latest_ms <= AT_ONCE_MS, "{} ms late in tick {tick}", crowd.latest_ms);
    }
    assert_eq!(most_held, 50, "a quarter of what the shard may have");
    assert_eq!(crowd.rig.counters.counts.intake_paused.get(), 0);
    assert_eq!(crowd.rig.counters.counts.closed_for_room.get(), 0);
    assert!(crowd.received >= 999);
    let lifecycle = |number: usize| {
        let (_, key): &(Client, ConnectionKey) = &catching_up[number];
        crowd.rig.shard.slab.get(*key).map(|it| it.lifecycle.class())
    };
    assert_ne!(lifecycle(0), Some(LifecycleClass::Session), "it held most");
    assert_eq!(lifecycle(9), Some(LifecycleClass::Session), "there is room again");
}

/// One after the other has a queue that is nearly full and a socket that takes an event per tick, for nine ticks of
/// ten. All of them together make the others wait no more than one of them may.
#[test]
fn readers_that_take_turns_make_others_wait_a_fifth_of_the_time() {
    let config = ShardConfig { queue_frames_max: 16, ..ShardConfig::default() };
    let mut crowd = Crowd::new(config, 50, 160);
    for tick in 0..500 {
        let (number, of_turn) = (tick / 10, tick % 10);
        // The first ones fill the socket and three quarters of the queue.
        for _ in 0..[1, 29][usize::from(of_turn == 0)] {
            crowd.event_to(crowd.hostile[number].1);
        }
        crowd.event_to(crowd.bystander_key);
        crowd.tick(|it| [10, 1_000][usize::from(it != number || of_turn == 9)]);
        assert!(crowd.latest_ms <= LATE_MS_MAX, "{} ms late in tick {tick}", crowd.latest_ms);
    }
    assert!(crowd.received > 490);
    let ticks_max = 500 / 5 + (WAIT_MS_MAX / TICK_MS) as usize;
    assert!((1..=ticks_max).contains(&crowd.late), "{} events late", crowd.late);
}

/// All read something in time, so that no write times out, and together they fill the shard.
#[test]
fn readers_that_fill_the_shard_are_closed_and_delay_nobody() {
    let config = ShardConfig { events_max: 200, ..ShardConfig::default() };
    let mut crowd = Crowd::new(config, 10, 160);
    for tick in 0..2_000 {
        crowd.event_to(crowd.hostile[tick % 10].1);
        crowd.event_to(crowd.bystander_key);
        crowd.tick(|_| usize::from(tick % 3 == 0));
        assert!(crowd.latest_ms <= AT_ONCE_MS, "{} ms late in tick {tick}", crowd.latest_ms);
    }
    assert!(crowd.received > 1_900);
    assert!(crowd.rig.counters.counts.closed_for_room.get() > 0);
}

/// They do so faster than the shard closes them. What it closes at a time makes room for the burst.
#[test]
fn burst_that_fills_the_shard_delays_others_for_an_eighth_of_a_second() {
    let config = ShardConfig { events_max: 200, ..ShardConfig::default() };
    let mut crowd = Crowd::new(config, 10, 160);
    for tick in 0..2_000 {
        for number in 0..[1, 50][usize::from(tick % 100 == 99)] {
            crowd.event_to(crowd.hostile[(tick + number) % 10].1);
        }
        crowd.event_to(crowd.bystander_key);
        crowd.tick(|_| 1);
        assert!(crowd.latest_ms <= LATE_MS_MAX, "{} ms late in tick {tick}", crowd.latest_ms);
    }
    assert!(crowd.received > 1_900);
    assert!(crowd.rig.counters.counts.intake_paused.get() > 0);
}
