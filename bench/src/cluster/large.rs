//! CPU of the router for an event of a large conversation, most of whose members are not connected.
//!
//! Between two such events the router handles small ones, which use the caches of the processor, and sessions begin and
//! end.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use delivery::domain::budget::EventBudget;
use delivery::domain::command::{ShardCommand, ShardReport};
use delivery::domain::encoding::Encoding;
use delivery::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use delivery::handoff::{Doorbell, PeerEnd, ShardEnd, connect};
use delivery::service::backends::ports::MissedEvents;
use delivery::service::cluster::missed::MissedSessions;
use delivery::service::cluster::ports::{HandOffSink, SessionsLog, SessionsRecord};
use delivery::service::cluster::table::SessionTable;
use delivery::service::cluster::tail::TailBudget;
use delivery::service::members::directory::{Directory, SessionIds};
use delivery::service::members::membership::{
    Membership, MembershipConfig, ReadBy, RecordPosition,
};
use delivery::service::routing::router::owner::ClusterParts;
use delivery::service::routing::router::{
    Assignment, CommittableOffset, CommittableTable, Ownership, RawRecord, RecordSource, Router,
    RouterConfig, RouterParts, TopicPartition,
};

use super::names::{TOPIC, begun, epoch, fill, table};
use super::routing::ImmediateSink;
use crate::names::{device, user};
use crate::payload::{Stamp, Template, conversation_id};
use crate::usage::thread_ns;

/// Slots of the ring to the shard.
const RING_SLOTS: usize = 4096;
/// Members of a small conversation.
const SMALL: usize = 10;
/// The large conversation.
const LARGE: usize = 9_999_999;

/// Routes events of a large conversation among small ones.
#[derive(clap::Args, Debug)]
pub struct LargePlan {
    /// Members of the large conversation.
    #[arg(long, default_value_t = 60_000)]
    members: usize,
    /// How many of them are connected: half of them to this node, half to another one.
    #[arg(long, default_value_t = 100)]
    connected: usize,
    /// Events of the large conversation.
    #[arg(long, default_value_t = 1_500)]
    events: usize,
    /// Small events before each of them.
    #[arg(long, default_value_t = 4)]
    small: usize,
    /// Sessions that begin, and as many that end, before each of them: half on this node.
    #[arg(long, default_value_t = 7)]
    changes: usize,
    /// Sessions of all nodes.
    #[arg(long, default_value_t = 1_000_000)]
    sessions: usize,
    /// Nodes.
    #[arg(long, default_value_t = 10)]
    nodes: usize,
}

/// Processor time of each event, ns.
#[derive(Default)]
struct Costs {
    large: Vec<u64>,
    small: Vec<u64>,
}

/// Records that measure what the router needs for each of them.
struct Records {
    large: Vec<u8>,
    small: Vec<Vec<u8>>,
    /// Small events before each large one.
    between: usize,
    next: i64,
    end: i64,
    /// Sessions begin and end.
    change: Box<dyn FnMut() + Send>,
    costs: Arc<Mutex<Costs>>,
}

impl RecordSource for Records {
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool {
        if self.next >= self.end {
            return false;
        }
        let offset = self.next;
        self.next += 1;
        let at = offset as usize;
        let is_large = at % (self.between + 1) == self.between;
        if is_large {
            (self.change)();
        }
        // Spread, so that neighbours in memory do not follow each other.
        let small = at.wrapping_mul(7_919) % self.small.len();
        let value = if is_large { &self.large } else { &self.small[small] };
        let from = thread_ns();
        take(RawRecord { offset, appended_at_ms: 1, key: None, value, traceparent: None });
        let took = thread_ns() - from;
        let mut costs = self.costs.lock().expect("no holder panics");
        let costs = if is_large { &mut costs.large } else { &mut costs.small };
        costs.push(took);
        true
    }

    fn is_at_end(&self) -> bool {
        self.next >= self.end
    }
}

fn address(number: usize) -> SessionAddress {
    let connection = ConnectionKey { slot: number as u32, generation: 0 };
    SessionAddress { shard: ShardId(0), encoding: Encoding::Binary, connection }
}

/// Takes every event, and reports it done.
fn shard(mut end: ShardEnd, bell: &Doorbell, stopped: &AtomicBool) {
    while !stopped.load(Ordering::Relaxed) {
        let mut took = false;
        while let Some(command) = end.commands.pop() {
            took = true;
            if let ShardCommand::Deliver { ticket: Some(ticket), .. } = command {
                let _ = end.reports.push(ShardReport::Done { ticket });
            }
        }
        end.reports.publish();
        if !took {
            bell.about_to_sleep();
            bell.wait(1);
            bell.awake();
        }
    }
}

impl LargePlan {
    /// The sessions of this node, the first.
    fn directory(&self) -> Arc<Directory> {
        let directory = Directory::new();
        for number in (0..self.sessions).step_by(self.nodes) {
            directory.insert(SessionIds::new(&user(number), &device(number)), address(number));
        }
        Arc::new(directory)
    }

    /// The members of the large conversation.
    fn members(&self) -> Vec<String> {
        let half = self.connected / 2;
        let here = (0..half).map(|at| at * self.nodes);
        let there = (0..self.connected - half).map(|at| at * self.nodes + 1);
        let others = (0..self.members - self.connected).map(|at| self.sessions * 10 + at);
        here.chain(there).chain(others).map(user).collect()
    }

    /// Sessions of users who are no members begin and end, on this node and on another one.
    fn change(
        &self,
        directory: Arc<Directory>,
        table: Option<Arc<SessionTable>>,
    ) -> Box<dyn FnMut() + Send> {
        let (changes, nodes, first) = (self.changes, self.nodes, self.sessions);
        let (mut number, mut offset) = (first, table.as_ref().map_or(0, |it| it.next_offset()));
        Box::new(move || {
            for _ in 0..changes {
                let here = number * nodes;
                number += 1;
                let ids = SessionIds::new(&user(here), &device(here));
                directory.insert(ids.clone(), address(here));
                directory.remove(&ids, address(here));
                let Some(table) = &table else { continue };
                for (has_value, on) in [(true, here + 1), (false, here + 1)] {
                    let (key, value) = begun(on, nodes);
                    let value = has_value.then(|| value.into());
                    let record =
                        SessionsRecord { offset, appended_at_ms: 0, key: Some(key), value };
                    table.record(record);
                    offset += 1;
                }
                table.read_to(offset);
            }
        })
    }

    fn values(&self, membership: &Membership) -> (Vec<u8>, Vec<Vec<u8>>) {
        let template = Template::new(400);
        let create = |number: usize, members: &[String]| {
            let members: Vec<&str> = members.iter().map(String::as_str).collect();
            let position = RecordPosition { topic: 1, partition: 0, offset: number as i64 };
            let by = ReadBy::Follower(position);
            membership.created(&conversation_id(number), &members, by, 1);
            template.envelope(number, Stamp { sequence: 1, intended_ns: 1 })
        };
        let small = (0..self.sessions / SMALL / 2).map(|at| {
            let members: Vec<_> = (0..SMALL).map(|member| user(at * SMALL + member)).collect();
            create(at, &members)
        });
        let small = small.collect();
        (create(LARGE, &self.members()), small)
    }

    fn route(
        &self,
        directory: &Arc<Directory>,
        table: Option<&Arc<SessionTable>>,
        runtime: &tokio::runtime::Runtime,
    ) -> io::Result<Costs> {
        let config = MembershipConfig { conversations_max: 400_000, ..MembershipConfig::default() };
        let membership = Membership::new(config, None, runtime.handle().clone(), Arc::default());
        let (large, small) = self.values(&membership);
        membership.follow();
        let (bell, shard_bell) = (Arc::new(Doorbell::new()?), Arc::new(Doorbell::new()?));
        let (link, end): (PeerEnd, ShardEnd) = connect([RING_SLOTS; 2], &shard_bell, &bell);
        let stopped = Arc::new(AtomicBool::new(false));
        let shard_thread = std::thread::spawn({
            let stopped = Arc::clone(&stopped);
            move || shard(end, &shard_bell, &stopped)
        });
        let missed = MissedSessions::new(Arc::clone(directory), None, Arc::clone(&bell));
        let missed = Arc::new(missed);
        let holder = Arc::<Mutex<delivery::service::cluster::holder::Holder>>::default();
        if table.is_some() {
            let mut holder = holder.lock().expect("no holder panics");
            for (serial, number) in (1..).zip((0..self.sessions).step_by(self.nodes)) {
                let serial = delivery::service::cluster::holder::SessionSerial(serial);
                holder.began(serial, address(number));
                holder.stored(serial, number as i64);
            }
        }
        let cluster = table.map(|table| ClusterParts {
            table: Arc::clone(table),
            holder,
            sink: Arc::<ImmediateSink>::default() as Arc<dyn HandOffSink>,
            missed: Arc::clone(&missed) as Arc<dyn MissedEvents>,
            topics: Arc::from([Arc::from(TOPIC)]),
            answers: Arc::default(),
        });
        let (router, control) = Router::new(RouterParts {
            config: RouterConfig::default(),
            counters: Arc::default(),
            bell,
            links: vec![link],
            directory: Arc::clone(directory),
            membership,
            user_lists: None,
            remote: None,
            tails: cluster.is_some().then(|| TailBudget::new(64 << 20, 300_000)),
            cluster,
            dead_letters: None,
            budget: EventBudget::new(256 << 20),
        });
        let records = self.events * (self.small + 1);
        let committable = Arc::new(CommittableOffset::new(Some(0)));
        let ownership = table.map(|table| Ownership {
            generation: 1,
            start: 0,
            table: table.next_offset(),
            barrier: 0,
            settled: Arc::new(CommittableTable::new(table.next_offset())),
            routed: Arc::default(),
            lost_from: None,
        });
        let thread = router.spawn("router".to_owned())?;
        let costs = Arc::<Mutex<Costs>>::default();
        control.assign(Assignment {
            log: TopicPartition { topic: TOPIC.into(), topic_index: 0, partition: 0 },
            source: Box::new(Records {
                large,
                small,
                between: self.small,
                next: 0,
                end: records as i64,
                change: self.change(Arc::clone(directory), table.cloned()),
                costs: Arc::clone(&costs),
            }),
            start: Some(0),
            fill: None,
            committable: Arc::clone(&committable),
            ownership,
        });
        while committable.get() != Some(records as i64) {
            sleep(Duration::from_millis(1));
        }
        control.stop();
        let ended = thread.join();
        ended.map_err(|_| io::Error::other("the router panicked"))?;
        stopped.store(true, Ordering::Relaxed);
        shard_thread.join().map_err(|_| io::Error::other("the shard panicked"))?;
        Ok(std::mem::take(&mut *costs.lock().expect("no holder panics")))
    }

    /// Prints what it found.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn run(&self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let table = table();
        fill(&table, self.sessions, self.nodes, |_, apply| apply());
        table.set_own_epoch(epoch(0));
        let directory = self.directory();
        println!(
            "{} members, {} of them connected, half of these here; {} sessions begin and end before each event",
            self.members, self.connected, self.changes
        );
        println!("mode       event   mean, µs  median, µs  p99, µs  first, µs");
        for (mode, table) in [("broadcast", None), ("owner", Some(&table))] {
            let costs = self.route(&directory, table, &runtime)?;
            for (event, mut costs) in [("large", costs.large), ("small", costs.small)] {
                let us = |ns: u64| ns as f64 / 1e3;
                let first = costs[0];
                // The first one fills caches.
                let mean = costs[1..].iter().sum::<u64>() / (costs.len() - 1).max(1) as u64;
                costs.sort_unstable();
                let (median, p99) = (costs[costs.len() / 2], costs[costs.len() * 99 / 100]);
                println!(
                    "{mode:<9}  {event}  {:>9.2}  {:>10.2}  {:>7.2}  {:>9.1}",
                    us(mean),
                    us(median),
                    us(p99),
                    us(first)
                );
            }
        }
        Ok(())
    }
}
