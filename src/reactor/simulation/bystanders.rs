//! Progress of bystanders: sessions that do nothing wrong get each of their events in time, whatever the other clients
//! do.

use hashbrown::HashMap;

use super::Simulation;
use super::session::ModelEvent;
use crate::domain::encoding::Encoding;
use crate::domain::ids::ConnectionKey;
use crate::domain::wait_allowance::WAIT_MS_MAX;
use crate::reactor::simulation::kernel::Faults;
use crate::reactor::wheel::TICK_MS;

/// How long an event of a bystander may wait in its ring and in the shard, ms: for queues, then for room, and the
/// precision of the timers.
const LATE_MS_MAX: u64 = 2 * WAIT_MS_MAX + 4 * TICK_MS;
/// The same in turns that handle all completions, and in which the rings do not wait for clients.
const LATE_TURNS_MAX: u64 = 4;

/// When an event entered the ring.
#[derive(Clone, Copy, Debug)]
struct Since {
    ms: u64,
    turns: u64,
}

/// The events on their way to bystanders.
#[derive(Debug, Default)]
pub(super) struct Bystanders {
    /// By recipient and number.
    awaited: HashMap<(usize, u64), Since>,
    /// Time that the shard has slept by its own decision, ms.
    slept_ms: u64,
    /// Turns after which no completion was left, and the rings did not wait for clients: that wait is bounded in time.
    /// While completions are left, the sends that the rings wait for may be among them.
    turns: u64,
}

impl Simulation {
    /// Whether this client is a bystander, in a run in which the kernel takes what it can take.
    pub(super) fn is_bystander(&self, number: usize) -> bool {
        let Faults { late, short_send, zero_send, send_memory, early_return, .. } =
            self.setup.faults;
        let delays = [late, short_send, zero_send, send_memory, early_return];
        self.clients[number].stands_by && delays == [0; 5]
    }

    /// A bystander asks for what it missed, and answers pings.
    pub(super) fn stand_by(&mut self, number: usize) {
        let client = &mut self.clients[number];
        if client.may_send() && client.answered == Some(101) && client.frames == 0 {
            client.queue_text(&mut self.random);
        }
        if client.may_send() && client.session.close_seen.is_some() {
            client.answer_close(&mut self.random);
        }
        self.send_some(number);
    }

    /// An event has entered a ring. From now on it must arrive in time at each bystander that is live.
    pub(super) fn await_at_bystanders(
        &mut self,
        event: &ModelEvent,
        recipients: &[(ConnectionKey, Encoding)],
    ) {
        let Some(shard) = &self.shard else { return };
        let since = Since { ms: self.bystanders.slept_ms, turns: self.bystanders.turns };
        for (key, _) in recipients {
            let Some(&number) = self.by_key.get(key) else { continue };
            let is_sent = event.expressible && !self.clients[number].session.covers(event);
            if is_sent && shard.is_live(*key) && self.is_bystander(number) {
                self.bystanders.awaited.insert((number, event.number), since);
            }
        }
    }

    /// A bystander has received an event.
    pub(super) fn reached_bystander(&mut self, number: usize, event: u64) {
        let Bystanders { awaited, slept_ms, turns } = &mut self.bystanders;
        if let Some(since) = awaited.remove(&(number, event)) {
            let (ms, turns) = (*slept_ms - since.ms, *turns - since.turns);
            self.summary.to_bystanders += 1;
            let (latest_ms, latest_turns) = self.summary.latest;
            self.summary.latest = (latest_ms.max(ms), latest_turns.max(turns));
        }
    }

    /// Time passes. It counts as late as long as the shard sleeps by its own decision.
    pub(super) fn count_sleep(&mut self, ms: u64) {
        let Some(shard) = &self.shard else { return };
        let kernel = shard.kernel();
        if !self.service.rang && !kernel.is_awake() {
            use crate::uring::Kernel as _;
            let until_ms = kernel.sleeps_until_ms().map_or(u64::MAX, |at| at - kernel.now_ms());
            self.bystanders.slept_ms += ms.min(until_ms);
        }
    }

    /// Checks after a turn.
    pub(super) fn check_bystanders(&mut self) {
        let counts = self
            .shard
            .as_ref()
            .is_some_and(|it| !it.waits_for_clients() && !it.kernel().has_completions());
        self.bystanders.turns += u64::from(counts);
        let (now_ms, turns) = (self.bystanders.slept_ms, self.bystanders.turns);
        let clients = &self.clients;
        self.bystanders.awaited.retain(|(number, event), since| {
            let client = &clients[*number];
            let is_over = client.over
                || client.session.ended.is_some()
                || client.session.close_seen.is_some();
            let late = (now_ms - since.ms, turns - since.turns);
            assert!(
                is_over || late.0 <= LATE_MS_MAX,
                "event {event} of bystander {number} is {} ms late",
                late.0
            );
            assert!(
                is_over || late.1 <= LATE_TURNS_MAX,
                "event {event} of bystander {number} is {} turns late",
                late.1
            );
            !is_over
        });
    }
}
