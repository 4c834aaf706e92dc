//! Generates the events: their recipients and times. Every server takes them from the same generator.

use std::ops::Range;
use std::str::FromStr;

use crate::clock::now_ns;
use crate::payload::{Stamp, Template};

/// The events of one push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushPlan {
    /// Recipients of each event. The sessions are divided into groups of this size.
    pub group: usize,
    /// Conversations of each group, all with the same members. Consecutive bursts are for different groups.
    pub each: usize,
    /// Consecutive events for one conversation.
    pub burst: usize,
    /// Number of events.
    pub events: u64,
    /// Events per second; 0: no limit.
    pub rate: u64,
    /// Events that become due together, at that rate, as when they are read from a log in batches.
    pub at_once: u64,
    /// Size of each value, bytes.
    pub bytes: usize,
}

impl PushPlan {
    /// Whether events are due one by one, for one session each. Such plans measure latency.
    pub fn is_one_by_one(&self) -> bool {
        self.rate > 0 && self.at_once == 1 && self.group == 1
    }
}

impl FromStr for PushPlan {
    type Err = String;

    /// `GROUP EACH BURST EVENTS RATE AT_ONCE BYTES`
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Result<Vec<u64>, _> = text.split_whitespace().map(str::parse).collect();
        match numbers.as_deref() {
            Ok(&[group, each, burst, events, rate, at_once, bytes])
                if group > 0 && each > 0 && burst > 0 && at_once > 0 =>
            {
                Ok(Self {
                    group: group as usize,
                    each: each as usize,
                    burst: burst as usize,
                    events,
                    rate,
                    at_once,
                    bytes: bytes as usize,
                })
            }
            _ => Err(format!("want GROUP EACH BURST EVENTS RATE AT_ONCE BYTES, got {text:?}")),
        }
    }
}

impl std::fmt::Display for PushPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { group, each, burst, events, rate, at_once, bytes } = self;
        write!(f, "{group} {each} {burst} {events} {rate} {at_once} {bytes}")
    }
}

/// Range of conversation numbers for one size.
const NUMBERS_PER_SIZE: usize = 10_000;

/// The number of the conversation with index `at` among those of its size.
pub fn conversation(group: usize, at: usize) -> usize {
    group * NUMBERS_PER_SIZE + at
}

/// A generated event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its conversation.
    pub conversation: usize,
    /// Its recipients.
    pub sessions: Range<usize>,
    /// The serialized envelope.
    pub value: Vec<u8>,
}

/// Generator of the events of a plan.
#[derive(Debug)]
pub struct Generator {
    plan: PushPlan,
    template: Template,
    sessions: usize,
    groups: u64,
    /// Events of earlier plans.
    before: u64,
    produced: u64,
    started_ns: u64,
}

impl Generator {
    /// A generator for sessions 0 to `sessions`, exclusive.
    pub fn new(plan: PushPlan, sessions: usize) -> Self {
        Self::after(0, plan, sessions)
    }

    /// A generator that continues after `before` events of earlier plans with the same group and burst,
    /// so that the sequences of each conversation have no gap.
    pub fn after(before: u64, plan: PushPlan, sessions: usize) -> Self {
        let groups = (sessions / plan.group).max(1) as u64;
        let template = Template::new(plan.bytes);
        Self { plan, template, sessions, groups, before, produced: 0, started_ns: now_ns() }
    }

    /// The plan.
    pub fn plan(&self) -> PushPlan {
        self.plan
    }

    fn conversations(&self) -> u64 {
        self.groups * self.plan.each as u64
    }

    /// The index of the conversation whose turn this is.
    fn at_turn(&self, turn: u64) -> usize {
        let (round, group) = (turn / self.groups, turn % self.groups);
        group as usize * self.plan.each + round as usize
    }

    /// The inverse of `at_turn`.
    fn turn_of(&self, at: usize) -> u64 {
        (at % self.plan.each) as u64 * self.groups + (at / self.plan.each) as u64
    }

    /// Whether all events have been taken.
    pub fn is_finished(&self) -> bool {
        self.produced == self.plan.events
    }

    /// Messages of all events so far.
    pub fn messages(&self) -> u64 {
        self.produced * self.plan.group.min(self.sessions) as u64
    }

    /// Events so far, including those of earlier plans.
    pub fn total(&self) -> u64 {
        self.before + self.produced
    }

    /// The last sequence of the conversation with index `at`; 0: none.
    pub fn last_sequence(&self, at: usize) -> u64 {
        let burst = self.plan.burst as u64;
        let (turns, rest) = (self.total() / burst, self.total() % burst);
        let (rounds, turn) = (turns / self.conversations(), turns % self.conversations());
        rounds * burst
            + match self.turn_of(at).cmp(&turn) {
                std::cmp::Ordering::Less => burst,
                std::cmp::Ordering::Equal => rest,
                std::cmp::Ordering::Greater => 0,
            }
    }

    /// Time at which the event with this sequence of conversation `at` was due, ns. `None`: it belongs
    /// to an earlier plan, or the plan has no rate.
    pub fn due_of(&self, at: usize, sequence: u64) -> Option<u64> {
        let burst = self.plan.burst as u64;
        let turn = (sequence - 1) / burst * self.conversations() + self.turn_of(at);
        let number = turn * burst + (sequence - 1) % burst;
        if self.plan.rate == 0 {
            return None;
        }
        Some(self.due_ns_of(number.checked_sub(self.before)?))
    }

    fn due_ns_of(&self, number: u64) -> u64 {
        due_ns(self.plan, self.started_ns, number)
    }

    /// Times at which batches become due, ns; empty without a rate. Independent of the generator's
    /// state.
    pub fn schedule(&self) -> impl Iterator<Item = u64> + use<> {
        let (plan, started_ns) = (self.plan, self.started_ns);
        let events = if plan.rate > 0 { plan.events } else { 0 };
        (0..events)
            .step_by(plan.at_once as usize)
            .map(move |number| due_ns(plan, started_ns, number))
    }

    /// Estimated processor time for generating all events, ns, from a sample. For servers that generate
    /// them in their own loop.
    pub fn total_cost_ns(&self) -> u64 {
        const SAMPLES: u64 = 10_000;
        let plan = PushPlan { events: SAMPLES, rate: 0, ..self.plan };
        let mut sample = Self::new(plan, self.sessions);
        let before = crate::usage::thread_ns();
        while let Some(item) = sample.next_due() {
            std::hint::black_box(item);
        }
        (crate::usage::thread_ns() - before) * self.plan.events / SAMPLES
    }

    /// Time at which the next event is due, ns; `None`: now.
    pub fn due_ns(&self) -> Option<u64> {
        (self.plan.rate > 0).then(|| self.due_ns_of(self.produced))
    }

    /// The next event, if it is due.
    pub fn next_due(&mut self) -> Option<Item> {
        if self.is_finished() {
            return None;
        }
        let now = now_ns();
        let intended_ns = match self.due_ns() {
            Some(due) if due > now => return None,
            Some(due) => due,
            None => now,
        };
        let burst = self.plan.burst as u64;
        let number = self.total();
        let turn = number / burst;
        let conversation = self.at_turn(turn % self.conversations());
        // Each conversation has had `burst` events in each completed round.
        let sequence = turn / self.conversations() * burst + number % burst + 1;
        self.produced += 1;
        let first = conversation / self.plan.each * self.plan.group;
        let stamp = Stamp { sequence, intended_ns };
        let number = self::conversation(self.plan.group, conversation);
        Some(Item {
            conversation: number,
            sessions: first..(first + self.plan.group).min(self.sessions),
            value: self.template.envelope(number, stamp),
        })
    }
}

/// Time at which event `number` of a plan with a rate is due, ns.
fn due_ns(plan: PushPlan, started_ns: u64, number: u64) -> u64 {
    let before = u128::from(number - number % plan.at_once) * 1_000_000_000;
    started_ns + (before / u128::from(plan.rate)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(plan: &str, sessions: usize) -> Vec<(Range<usize>, u64)> {
        let mut generator = Generator::new(plan.parse().unwrap(), sessions);
        std::iter::from_fn(|| generator.next_due())
            .map(|item| (item.sessions, Stamp::find(&item.value).unwrap().sequence))
            .collect()
    }

    #[test]
    fn each_session_in_turn_with_its_own_sequence() {
        assert_eq!(
            run("1 1 1 5 0 1 128", 2),
            [(0..1, 1), (1..2, 1), (0..1, 2), (1..2, 2), (0..1, 3)]
        );
    }

    #[test]
    fn bursts_stay_together() {
        assert_eq!(
            run("1 1 2 5 0 1 128", 2),
            [(0..1, 1), (0..1, 2), (1..2, 1), (1..2, 2), (0..1, 3)]
        );
    }

    #[test]
    fn conversations_of_a_group_have_its_members_and_their_own_sequences() {
        let mut generator = Generator::new("2 2 1 9 0 1 128".parse().unwrap(), 4);
        let all: Vec<_> = std::iter::from_fn(|| generator.next_due())
            .map(|item| {
                let sequence = Stamp::find(&item.value).unwrap().sequence;
                (item.conversation - conversation(2, 0), item.sessions.start, sequence)
            })
            .collect();
        let round = |n| [(0, 0, n), (2, 2, n), (1, 0, n), (3, 2, n)];
        assert_eq!(all, [&round(1)[..], &round(2)[..], &[(0, 0, 3)]].concat());
    }

    #[test]
    fn groups_cover_all_sessions() {
        assert_eq!(run("3 1 1 3 0 1 128", 6), [(0..3, 1), (3..6, 1), (0..3, 2)]);
        assert_eq!(run("100 1 1 1 0 1 128", 6), [(0..6, 1)]);
    }

    #[test]
    fn a_later_plan_continues_after_the_previous_one() {
        for plan in [
            "1 3 2 40 1000000 1 128",
            "1 1 1 7 1000000 1 128",
            "1 1 3 10 1000000 1 128",
            "2 1 2 5 1000000 1 128",
        ] {
            let plan: PushPlan = plan.parse().unwrap();
            let mut last = std::collections::HashMap::new();
            let mut before = 0;
            for _ in 0..3 {
                let mut generator = Generator::after(before, plan, 5);
                while !generator.is_finished() {
                    let due = generator.due_ns();
                    let Some(item) = generator.next_due() else { continue };
                    let at = item.conversation - conversation(plan.group, 0);
                    let stamp = Stamp::find(&item.value).unwrap();
                    assert_eq!(stamp.sequence, last.get(&at).unwrap_or(&0) + 1);
                    last.insert(at, stamp.sequence);
                    assert_eq!(generator.last_sequence(at), stamp.sequence);
                    assert_eq!(generator.due_of(at, stamp.sequence), due);
                }
                before = generator.total();
            }
        }
    }

    #[test]
    fn events_are_not_due_before_their_rate_allows() {
        let mut generator = Generator::new("1 1 1 2 1 1 128".parse().unwrap(), 1);
        assert!(generator.next_due().is_some());
        assert!(generator.next_due().is_none() && !generator.is_finished());
    }

    #[test]
    fn batch_is_due_together() {
        let mut generator = Generator::new("1 1 1 4 1 3 128".parse().unwrap(), 1);
        let batch: Vec<_> = std::iter::from_fn(|| generator.next_due()).collect();
        let due = |item: &Item| Stamp::find(&item.value).unwrap().intended_ns;
        let first = due(&batch[0]);
        assert_eq!(batch.len(), 3);
        assert!(batch.iter().all(|item| due(item) == first));
        assert_eq!(generator.due_ns(), Some(first + 3_000_000_000));
        assert_eq!(generator.schedule().collect::<Vec<_>>(), [first, first + 3_000_000_000]);
    }
}
