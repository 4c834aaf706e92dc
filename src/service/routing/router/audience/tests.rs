//! The audience against the look-up of every member, for any interleaving of what changes who is connected, who is a
//! member, and what a lane has applied.

use std::collections::BTreeSet;

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::domain::encoding::Encoding;
use crate::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use crate::service::cluster::holder::SessionSerial;
use crate::service::cluster::nodes::{EpochEnd, NodeIndex};
use crate::service::cluster::ports::{NodeEpoch, SessionsLog as _, SessionsRecord};
use crate::service::cluster::table::{TableConfig, TableListener};
use crate::service::cluster::wire::{Lease, SessionBegun, SessionsKey};
use crate::service::members::directory::SessionIds;

const USERS: usize = 12;
const DEVICES: usize = 2;
const NODES: usize = 3;
const CONVERSATIONS: usize = 3;
const LANES: usize = 2;
const NODE_TIMEOUT_MS: i64 = 10_000;

/// One step of a history.
#[derive(Clone, Copy, Debug)]
enum AudienceStep {
    /// A session begins on this node, or takes the place of the one of the same user and device.
    BeginHere(usize, usize),
    EndHere(usize, usize),
    /// All sessions of a user leave the directory.
    MissHere(usize),
    /// A session begins on some node, as the table reads it.
    BeginThere {
        user: usize,
        device: usize,
        node: usize,
    },
    EndThere {
        user: usize,
        device: usize,
        node: usize,
    },
    /// A node stops. It has a new epoch from then on.
    Stop(usize),
    /// Only this node renews its lease while time passes, so that the others are silent.
    Outlive(usize),
    /// The table loses its position, and begins again.
    Restart,
    /// The table reads some records again.
    Read(usize),
    /// A lane applies all beginnings.
    Apply(usize),
    /// A user joins or leaves a conversation.
    Change {
        conversation: usize,
        user: usize,
        joins: bool,
    },
    /// The list of a conversation is fetched again.
    Fetch(usize),
    /// An event. `old`: for the list before so many changes.
    Event {
        conversation: usize,
        lane: usize,
        old: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<AudienceStep>> {
    use AudienceStep::*;
    let (user, device, node) = (0..USERS, 0..DEVICES, 0..NODES);
    let session = (user.clone(), device.clone());
    let there = (user.clone(), device, node.clone());
    let step = prop_oneof![
        5 => session.clone().prop_map(|(user, device)| BeginHere(user, device)),
        3 => session.prop_map(|(user, device)| EndHere(user, device)),
        1 => user.clone().prop_map(MissHere),
        5 => there.clone().prop_map(|(user, device, node)| BeginThere { user, device, node }),
        3 => there.prop_map(|(user, device, node)| EndThere { user, device, node }),
        1 => node.clone().prop_map(Stop),
        1 => node.prop_map(Outlive),
        1 => Just(Restart),
        2 => (1_usize..40).prop_map(Read),
        4 => (0..LANES).prop_map(Apply),
        3 => (0..CONVERSATIONS, user, any::<bool>())
            .prop_map(|(conversation, user, joins)| Change { conversation, user, joins }),
        1 => (0..CONVERSATIONS).prop_map(Fetch),
        12 => (0..CONVERSATIONS, 0..LANES, prop_oneof![4 => Just(0_usize), 1 => 0_usize..4])
            .prop_map(|(conversation, lane, old)| Event { conversation, lane, old }),
    ];
    prop::collection::vec(step, 0..150)
}

/// The sessions here by user and slot, and the nodes of users.
type FoundUsers = (BTreeSet<(String, u32)>, BTreeSet<(String, NodeIndex)>);

struct NobodyListens;

impl TableListener for NobodyListens {
    fn begun(&self, _: SessionSerial, _: i64) {}
    fn replaced(&self, _: &str, _: &str, _: SessionSerial) {}
    fn ended(&self, _: EpochEnd, _: Option<&Lease>) {}
}

struct World {
    directory: Directory,
    here: Vec<(SessionIds, SessionAddress)>,
    slots: u32,
    table: SessionTable,
    /// The sessions topic.
    log: Vec<(i64, SessionsKey, Option<Vec<u8>>)>,
    clock_ms: i64,
    /// Records that the table has read.
    read: usize,
    epochs: Vec<u64>,
    /// *T* of each lane.
    lanes: Vec<i64>,
    /// The lists of each conversation, the newest last.
    lists: Vec<Vec<Members>>,
    audiences: Audiences,
    counters: RouterCounters,
}

fn user(number: usize) -> String {
    format!("user-{number:02}")
}

fn ids(user: usize, device: usize) -> SessionIds {
    SessionIds::new(&self::user(user), &format!("device-{device}"))
}

impl World {
    fn new(beginnings_max: usize, bytes_max: usize) -> Self {
        let config = TableConfig {
            topics: Vec::new(),
            node_timeout_ms: NODE_TIMEOUT_MS,
            newcomers_age_ms: i64::MAX / 2,
            beginnings_max,
        };
        let table = SessionTable::new(config, Arc::new(NobodyListens), Arc::default());
        let list = |conversation| (0..USERS).step_by(conversation + 1).map(user).collect();
        let mut world = Self {
            directory: Directory::with_beginnings(Beginnings::new(beginnings_max)),
            here: Vec::new(),
            slots: 0,
            table,
            log: Vec::new(),
            clock_ms: 0,
            read: 0,
            epochs: (1..=NODES as u64).collect(),
            lanes: vec![0; LANES],
            lists: (0..CONVERSATIONS).map(|conversation| vec![list(conversation)]).collect(),
            audiences: Audiences::new(1, bytes_max),
            counters: RouterCounters::default(),
        };
        (0..NODES).for_each(|node| world.renew(node));
        world
    }

    fn append(&mut self, key: SessionsKey, value: Option<Vec<u8>>) {
        self.log.push((self.clock_ms, key, value));
        self.read_on(usize::MAX);
    }

    fn read_on(&mut self, amount: usize) {
        let to = self.log.len().min(self.read.saturating_add(amount));
        for offset in self.read..to {
            let (appended_at_ms, key, value) = self.log[offset].clone();
            let (offset, value) = (offset as i64, value.map(Into::into));
            self.table.record(SessionsRecord { offset, appended_at_ms, key: Some(key), value });
            self.table.read_to(offset + 1);
        }
        self.read = to;
    }

    fn renew(&mut self, node: usize) {
        let lease = Lease { instance: format!("node-{node}"), ..Lease::default() };
        let key = SessionsKey { epoch: self.epochs[node], ..SessionsKey::default() };
        self.append(key, Some(lease.encode_to_vec()));
    }

    fn session_key(&self, user: usize, device: usize, node: usize) -> SessionsKey {
        let device = format!("device-{device}");
        SessionsKey { epoch: self.epochs[node], user: self::user(user), device }
    }

    /// Ends the epoch of a node, if that has not happened.
    fn renew_epoch(&mut self, node: usize) {
        if self.table.has_ended(NodeEpoch(self.epochs[node])) {
            self.epochs[node] += NODES as u64;
            self.renew(node);
        }
    }

    fn end_here(&mut self, is_it: impl Fn(&SessionIds) -> bool) {
        for (ids, address) in self.here.extract_if(.., |(ids, _)| is_it(ids)) {
            assert!(self.directory.remove(&ids, address));
        }
    }

    fn step(&mut self, step: AudienceStep) -> Result<(), TestCaseError> {
        match step {
            AudienceStep::BeginHere(user, device) => {
                self.slots += 1;
                let connection = ConnectionKey { slot: self.slots, generation: 0 };
                let (shard, encoding) = (ShardId(0), Encoding::Binary);
                let (ids, address) =
                    (ids(user, device), SessionAddress { shard, encoding, connection });
                self.here.retain(|(known, _)| *known != ids);
                self.directory.insert(ids.clone(), address);
                self.here.push((ids, address));
            }
            AudienceStep::EndHere(user, device) => {
                let ended = ids(user, device);
                self.end_here(|ids| *ids == ended);
            }
            AudienceStep::MissHere(user) => {
                self.here.retain(|(ids, _)| ids.user() != self::user(user));
                self.directory.remove_user(&self::user(user), &mut Vec::new());
            }
            AudienceStep::BeginThere { user, device, node } => {
                self.renew_epoch(node);
                let begun = SessionBegun { serial: self.log.len() as u64 + 1, as_of: 0 };
                let key = self.session_key(user, device, node);
                self.append(key, Some(begun.encode_to_vec()));
            }
            AudienceStep::EndThere { user, device, node } => {
                let key = self.session_key(user, device, node);
                self.append(key, None);
            }
            AudienceStep::Stop(node) => {
                let key = SessionsKey { epoch: self.epochs[node], ..SessionsKey::default() };
                self.append(key, None);
                self.renew_epoch(node);
            }
            AudienceStep::Outlive(node) => {
                self.renew_epoch(node);
                for _ in 0..5 {
                    self.clock_ms += 3_000;
                    self.renew(node);
                }
            }
            AudienceStep::Restart => {
                self.table.restarted();
                self.read = 0;
            }
            AudienceStep::Read(amount) => self.read_on(amount),
            AudienceStep::Apply(lane) => {
                self.lanes[lane] = self.lanes[lane].max(self.table.next_offset());
            }
            AudienceStep::Change { conversation, user, joins } => {
                let list = self.lists[conversation].last().expect("one at least");
                let changed = list.changed(&self::user(user), joins);
                self.lists[conversation].push(changed);
            }
            AudienceStep::Fetch(conversation) => {
                let list = self.lists[conversation].last().expect("one at least");
                let fetched = list.iter().collect();
                self.lists[conversation].push(fetched);
            }
            AudienceStep::Event { conversation, lane, old } => {
                let lists = &self.lists[conversation];
                let members = lists[lists.len() - 1 - old.min(lists.len() - 1)].clone();
                self.check(conversation, &members, self.lanes[lane])?;
            }
        }
        Ok(())
    }

    /// The sessions here, and the nodes of users, of these users.
    fn look_up<'a>(&self, users: impl Iterator<Item = &'a str>, applied: i64) -> FoundUsers {
        let (mut here, mut there) = (BTreeSet::new(), BTreeSet::new());
        for user in users {
            let named = || user.to_owned();
            self.directory.sessions_of(user, |it| {
                here.insert((named(), it.connection.slot));
            });
            self.table.nodes_of(user, applied, |node| {
                there.insert((named(), node));
            });
        }
        (here, there)
    }

    fn check(
        &mut self,
        conversation: usize,
        members: &Members,
        applied: i64,
    ) -> Result<(), TestCaseError> {
        let name = format!("conversation-{conversation}");
        let Self { directory, table, audiences, counters, .. } = self;
        if !audiences.prepare(&name, members, directory, Some(table), counters) {
            return Ok(());
        }
        let (mut here, mut there) = (BTreeSet::new(), BTreeSet::new());
        audiences.here(&name, |user| {
            let visit = |it: SessionAddress| {
                here.insert((user.to_owned(), it.connection.slot));
            };
            directory.sessions_of(user, visit) > 0
        });
        audiences.anywhere(&name, |user| {
            table.nodes_of(user, applied, |node| {
                there.insert((user.to_owned(), node));
            }) > 0
        });
        let bytes = counters.audience_bytes.get();
        prop_assert!(bytes <= self.audiences.bytes_max as u64, "{bytes} B");
        let (wanted_here, wanted_there) = self.look_up(members.iter(), applied);
        prop_assert_eq!(here, wanted_here);
        // A table that is behind the lane is not used, see `OwnerSide::find_remote`.
        if self.table.next_offset() >= applied {
            prop_assert_eq!(there, wanted_there);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn audience_has_whom_the_look_up_of_every_member_finds(
        steps in steps(),
        beginnings_max in prop_oneof![Just(1_usize), Just(3), Just(1_000)],
        bytes_max in prop_oneof![Just(3_000_usize), Just(6_000), Just(1_000_000)],
    ) {
        let mut world = World::new(beginnings_max, bytes_max);
        for step in steps {
            world.step(step)?;
        }
    }
}

/// The cost of an event does not depend on the members who are not connected: none of them is visited.
#[test]
fn only_connected_members_are_visited() {
    let mut world = World::new(1_000, 1 << 20);
    let members: Members = (0..5_000).map(user).collect();
    world.step(AudienceStep::BeginHere(3, 0)).unwrap();
    world.step(AudienceStep::BeginThere { user: 5, device: 0, node: 1 }).unwrap();
    let visited = |world: &mut World| {
        let World { directory, table, audiences, counters, .. } = world;
        assert!(audiences.prepare("large", &members, directory, Some(table), counters));
        let (mut here, mut there) = (Vec::new(), Vec::new());
        audiences.here("large", |user| {
            here.push(user.to_owned());
            directory.sessions_of(user, |_| {}) > 0
        });
        audiences.anywhere("large", |user| {
            there.push(user.to_owned());
            table.nodes_of(user, i64::MAX, |_| {}) > 0
        });
        (here, there)
    };
    assert_eq!(visited(&mut world), (vec![user(3)], vec![user(5)]));
    for step in [
        AudienceStep::BeginHere(1, 0),
        AudienceStep::BeginThere { user: 5, device: 1, node: 2 },
        AudienceStep::BeginThere { user: 7, device: 1, node: 2 },
    ] {
        world.step(step).unwrap();
    }
    assert_eq!(visited(&mut world), (vec![user(1), user(3)], vec![user(5), user(7)]));
    world.step(AudienceStep::EndHere(3, 0)).unwrap();
    visited(&mut world);
    assert_eq!(visited(&mut world).0, [user(1)], "who has ended is visited once more");
    assert_eq!(world.counters.audience_look_ups.get(), 1, "every member was looked up once");
}
