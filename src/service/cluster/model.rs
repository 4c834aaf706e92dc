//! A model of one source partition whose owners come and go, and one holder: every session gets every record
//! from its 101 on, once and in the order of its conversation, whatever happens in between.
//!
//! The holder and the newcomers are the real ones. Owners, logs and offsets are modelled. A step is chosen
//! by a seeded generator: records are appended, sessions begin and end, owners route, park conversations and go on with
//! them, apply beginnings, send what they have queued, commit, stall, are replaced, and wake as zombies.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use proptest::test_runner::{RngAlgorithm, TestRng};
use rand::Rng as _;

use super::holder::{Arrived, Holder, RoutedPosition, SessionSerial, SourcePartition};
use super::newcomers::{Newcomer, Newcomers, StatedPosition};
use super::nodes::NodeIndex;
use super::ports::NodeEpoch;
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};

const SOURCE: SourcePartition = SourcePartition { topic: 0, partition: 0 };
/// Conversations in it.
const CONVERSATIONS: i64 = 4;

/// A record of the sessions topic.
#[derive(Clone, Copy, Debug)]
enum LogEntry {
    Begun { serial: u64, as_of: i64 },
    Ended { serial: u64 },
    Stated { next: i64 },
}

/// A record of the hand-off topic.
#[derive(Clone, Debug)]
enum HandedOver {
    Live { at: RoutedPosition, to: Vec<u64>, parked: Vec<i64> },
    Replay { at: RoutedPosition, to: u64, parked: Vec<i64> },
    Passed { at: RoutedPosition, parked: Vec<i64> },
}

#[derive(Debug)]
struct Owner {
    generation: i64,
    /// The next offset to route.
    next: i64,
    /// Offsets before it that are not routed yet, ascending.
    parked: Vec<i64>,
    /// Beginnings below this offset are applied.
    table: i64,
    /// What it has read of the sessions topic.
    read_to: i64,
    queue: VecDeque<HandedOver>,
    /// (next, table) after each routed record or application, once the queue is that short.
    progress: VecDeque<(usize, i64, i64)>,
    sent: usize,
    queued: usize,
    /// Done: what may be committed.
    done: (i64, i64),
}

#[derive(Debug)]
struct Client {
    address: SessionAddress,
    /// The end of the source partition at its 101.
    from: i64,
    ended: bool,
    got: Vec<i64>,
}

struct Model {
    random: TestRng,
    /// Sessions that begin in 100 steps. If they are few, all are established most of the time.
    beginnings: usize,
    /// One of so many records is parked.
    parks_one_of: usize,
    /// The end of the source partition.
    end: i64,
    sessions_log: Vec<LogEntry>,
    hand_offs: Vec<HandedOver>,
    committed: (i64, i64),
    generation: i64,
    owner: Owner,
    zombies: Vec<Owner>,
    holder: Holder,
    /// What the holder has read of each log.
    holder_read: i64,
    holder_delivered: usize,
    clients: BTreeMap<u64, Client>,
}

fn address(serial: u64) -> SessionAddress {
    SessionAddress {
        shard: ShardId(0),
        encoding: Encoding::Binary,
        connection: ConnectionKey { slot: u32::try_from(serial).unwrap(), generation: 0 },
    }
}

fn concerns(offset: i64, serial: u64) -> bool {
    let mixed = (offset as u64 ^ serial << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    !(mixed >> 32).is_multiple_of(3)
}

impl Owner {
    fn new(generation: i64, (next, table): (i64, i64), read_to: i64) -> Self {
        Self {
            generation,
            next,
            parked: Vec::new(),
            table,
            read_to,
            queue: VecDeque::new(),
            progress: VecDeque::new(),
            sent: 0,
            queued: 0,
            done: (next, table),
        }
    }

    fn queue(&mut self, record: HandedOver) {
        self.queue.push_back(record);
        self.queued += 1;
    }

    fn progressed(&mut self) {
        let committable = self.parked.first().copied().unwrap_or(self.next);
        self.progress.push_back((self.queued, committable, self.table));
        self.settle();
    }

    fn settle(&mut self) {
        while self.progress.front().is_some_and(|(queued, _, _)| *queued <= self.sent) {
            let (_, next, table) = self.progress.pop_front().unwrap();
            self.done = (next, table);
        }
    }

    fn at(&self, offset: i64) -> RoutedPosition {
        let (generation, table) = (self.generation, self.table);
        RoutedPosition { source: SOURCE, offset, generation, table }
    }

    /// The sessions that it names: begun below `table`, and not ended as far as it has read.
    fn known(&self, log: &[LogEntry]) -> Vec<u64> {
        let mut known = Vec::new();
        for (offset, entry) in (0..).zip(&log[..self.read_to as usize]) {
            match entry {
                LogEntry::Begun { serial, .. } if offset < self.table => known.push(*serial),
                LogEntry::Ended { serial } => known.retain(|it| it != serial),
                LogEntry::Begun { .. } | LogEntry::Stated { .. } => {}
            }
        }
        known
    }

    fn parked_below(&self, offset: i64) -> Vec<i64> {
        self.parked.iter().copied().take_while(|parked| *parked < offset).collect()
    }

    /// Routes the next record, or parks it: if told to, or because others of its conversation are.
    fn route(&mut self, log: &[LogEntry], park: bool) {
        let offset = self.next;
        self.next += 1;
        if park || self.parked.iter().any(|parked| (offset - parked) % CONVERSATIONS == 0) {
            self.parked.push(offset);
        } else {
            self.hand_over(log, offset);
        }
        self.progressed();
    }

    fn hand_over(&mut self, log: &[LogEntry], offset: i64) {
        let to: Vec<_> =
            self.known(log).into_iter().filter(|serial| concerns(offset, *serial)).collect();
        if !to.is_empty() {
            let parked = self.parked_below(offset);
            self.queue(HandedOver::Live { at: self.at(offset), to, parked });
        }
    }

    /// Routes the first parked record of one conversation.
    fn route_parked(&mut self, log: &[LogEntry], number: usize) {
        let conversation = self.parked[number] % CONVERSATIONS;
        let first = self.parked.iter().position(|parked| parked % CONVERSATIONS == conversation);
        let offset = self.parked[first.unwrap()];
        self.hand_over(log, offset);
        self.parked.remove(first.unwrap());
        self.progressed();
    }

    fn tell_passed(&mut self) {
        let (at, parked) = (self.at(self.next), self.parked.clone());
        self.queue(HandedOver::Passed { at, parked });
    }

    fn apply(&mut self, log: &[LogEntry]) {
        // The real bookkeeping of beginnings and stated positions.
        let mut newcomers = Newcomers::new(i64::MAX / 2);
        for (offset, entry) in (0..).zip(&log[..self.read_to as usize]) {
            match entry {
                LogEntry::Begun { serial, as_of } => {
                    let newcomer = Newcomer {
                        begin: offset,
                        as_of: *as_of,
                        node: NodeIndex(0),
                        epoch: NodeEpoch(1),
                        serial: SessionSerial(*serial),
                        user: Arc::from("u"),
                    };
                    newcomers.begun(newcomer, None, 0);
                }
                LogEntry::Stated { next } => newcomers.stated(SOURCE, offset, *next),
                LogEntry::Ended { .. } => {}
            }
        }
        for newcomer in newcomers.window(self.table, self.read_to).newcomers {
            let from = match newcomers.routed(SOURCE, newcomer.as_of) {
                StatedPosition::At(next) => next,
                StatedPosition::Never | StatedPosition::Forgotten => 0,
            };
            let to = newcomer.serial.0;
            let routed = |offset: &i64| self.parked.binary_search(offset).is_err();
            let offsets = (from..self.next).filter(|offset| concerns(*offset, to)).filter(routed);
            for offset in offsets.collect::<Vec<_>>() {
                let parked = self.parked_below(offset);
                self.queue(HandedOver::Replay { at: self.at(offset), to, parked });
            }
        }
        self.table = self.read_to;
        self.progressed();
    }
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Self {
            random: TestRng::from_seed(RngAlgorithm::ChaCha, &bytes),
            beginnings: [6, 2, 1][(seed % 3) as usize],
            parks_one_of: [8, 3][(seed % 2) as usize],
            end: 0,
            sessions_log: Vec::new(),
            hand_offs: Vec::new(),
            committed: (0, 0),
            generation: 1,
            owner: Owner::new(1, (0, 0), 0),
            zombies: Vec::new(),
            holder: Holder::default(),
            holder_read: 0,
            holder_delivered: 0,
            clients: BTreeMap::new(),
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.random.next_u64() % limit as u64) as usize
    }

    fn log_end(&self) -> i64 {
        self.sessions_log.len() as i64
    }

    fn step(&mut self) {
        let end = self.log_end();
        match self.below(100) {
            0..20 => self.end += 1,
            step @ 20..26 if step < 20 + self.beginnings => {
                let serial = self.clients.len() as u64 + 1;
                let address = address(serial);
                self.holder.began(SessionSerial(serial), address);
                let client = Client { address, from: self.end, ended: false, got: Vec::new() };
                self.clients.insert(serial, client);
                self.sessions_log.push(LogEntry::Begun { serial, as_of: self.holder_read });
            }
            26..28 if !self.clients.is_empty() => {
                let serial = self.below(self.clients.len()) as u64 + 1;
                // Without sessions the node gets no records, and the first that it gets may be replays.
                let all = self.below(4) == 0;
                let serials = if all { 1..=self.clients.len() as u64 } else { serial..=serial };
                serials.for_each(|serial| self.end(serial));
            }
            28..41 if self.owner.next < self.end => {
                let park = self.below(self.parks_one_of) == 0;
                self.owner.route(&self.sessions_log, park);
            }
            41..45 if !self.owner.parked.is_empty() => {
                let number = self.below(self.owner.parked.len());
                self.owner.route_parked(&self.sessions_log, number);
            }
            45..50 => {
                let read_to = self.owner.read_to;
                self.owner.read_to = read_to + self.below((end - read_to) as usize + 1) as i64;
            }
            50..56 if self.owner.table < self.owner.read_to => self.owner.apply(&self.sessions_log),
            56..72 => {
                let count = self.below(4);
                Self::send(&mut self.owner, &mut self.hand_offs, count);
            }
            72..76 => self.committed = self.owner.done,
            76..78 => {
                self.owner.tell_passed();
                let next = self.owner.next;
                self.sessions_log.push(LogEntry::Stated { next });
            }
            78..80 => self.take_over(),
            80..84 => self.zombie_step(),
            84..88 => {
                let ahead = (end - self.holder_read) as usize;
                let to = self.holder_read + self.below(ahead + 1) as i64;
                self.read_sessions(to);
            }
            88..100 => {
                let count = self.below(5);
                self.deliver(count);
            }
            _ => {}
        }
    }

    fn end(&mut self, serial: u64) {
        let client = self.clients.get_mut(&serial).unwrap();
        if !std::mem::replace(&mut client.ended, true) {
            self.holder.ended(client.address);
            self.sessions_log.push(LogEntry::Ended { serial });
        }
    }

    fn send(owner: &mut Owner, hand_offs: &mut Vec<HandedOver>, count: usize) {
        for _ in 0..count {
            let Some(record) = owner.queue.pop_front() else { break };
            hand_offs.push(record);
            owner.sent += 1;
        }
        owner.settle();
    }

    fn take_over(&mut self) {
        self.generation += 1;
        let (_, table) = self.committed;
        // It has read at least what the commit says.
        let read_to = table + self.below((self.log_end() - table) as usize + 1) as i64;
        let successor = Owner::new(self.generation, self.committed, read_to);
        let former = std::mem::replace(&mut self.owner, successor);
        if self.below(2) == 0 {
            self.zombies.push(former);
        }
    }

    fn zombie_step(&mut self) {
        if self.zombies.is_empty() {
            return;
        }
        let index = self.below(self.zombies.len());
        let action = self.below(5);
        let (count, park) = (self.below(4), self.below(8) == 0);
        let zombie = &mut self.zombies[index];
        match action {
            0 if zombie.next < self.end => zombie.route(&self.sessions_log, park),
            3 if !zombie.parked.is_empty() => zombie.route_parked(&self.sessions_log, 0),
            1 if zombie.table < zombie.read_to => zombie.apply(&self.sessions_log),
            2 => Self::send(zombie, &mut self.hand_offs, count),
            _ => drop(self.zombies.swap_remove(index)),
        }
    }

    fn read_sessions(&mut self, to: i64) {
        for offset in self.holder_read..to {
            if let LogEntry::Begun { serial, .. } = self.sessions_log[offset as usize] {
                self.holder.stored(SessionSerial(serial), offset);
            }
        }
        self.holder_read = to;
    }

    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Some(record) = self.hand_offs.get(self.holder_delivered).cloned() else { return };
            self.holder_delivered += 1;
            let (HandedOver::Live { at, parked, .. }
            | HandedOver::Replay { at, parked, .. }
            | HandedOver::Passed { at, parked }) = record.clone();
            let arrived = self.holder.arrive(at, &parked);
            if arrived == Arrived::Zombie {
                continue;
            }
            let (to, replay) = match record {
                HandedOver::Passed { .. } => {
                    self.holder.passed_below(at);
                    continue;
                }
                HandedOver::Live { to, .. } => (to, false),
                HandedOver::Replay { to, .. } => (vec![to], true),
            };
            let addresses = to.iter().map(|serial| self.clients[serial].address);
            let needing: Vec<_> =
                addresses.filter(|address| self.holder.needs(*address, at)).collect();
            for address in &needing {
                let client = self.clients.get_mut(&u64::from(address.connection.slot)).unwrap();
                assert!(!client.ended);
                client.got.push(at.offset);
            }
            self.holder.delivered(at, &parked, needing.into_iter());
            if replay {
                self.holder.replayed(at);
            } else {
                self.holder.passed(at);
            }
        }
    }

    /// Lets everything come to rest.
    fn settle(&mut self) {
        self.zombies.clear();
        self.owner.read_to = self.log_end();
        if self.owner.table < self.owner.read_to {
            self.owner.apply(&self.sessions_log);
        }
        while self.owner.next < self.end {
            self.owner.route(&self.sessions_log, false);
        }
        while !self.owner.parked.is_empty() {
            self.owner.route_parked(&self.sessions_log, 0);
        }
        self.owner.tell_passed();
        Self::send(&mut self.owner, &mut self.hand_offs, usize::MAX);
        self.read_sessions(self.log_end());
        self.deliver(usize::MAX);
    }

    fn check(&self, seed: u64) {
        for (serial, client) in &self.clients {
            let got = &client.got;
            for conversation in 0..CONVERSATIONS {
                let in_it = got.iter().filter(|offset| **offset % CONVERSATIONS == conversation);
                assert!(
                    in_it.is_sorted_by(|a, b| a < b),
                    "seed {seed}: session {serial} got {got:?}"
                );
            }
            if client.ended {
                continue;
            }
            let missed: Vec<_> = (client.from..self.end)
                .filter(|offset| concerns(*offset, *serial) && !got.contains(offset))
                .collect();
            assert!(missed.is_empty(), "seed {seed}: session {serial} missed {missed:?}");
        }
        assert_eq!(self.holder.young(), 0, "seed {seed}: everything is established at rest");
    }
}

/// Promise: “A session gets each event once and in order while the owners of its partition change”
#[test]
fn every_session_gets_every_record_once_and_in_the_order_of_its_conversation() {
    for seed in 0..2_000 {
        let mut model = Model::new(seed);
        for _ in 0..600 {
            model.step();
        }
        model.settle();
        model.check(seed);
    }
}
