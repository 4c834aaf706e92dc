//! CPU of the router for a record without a recipient on its node, in `broadcast` mode and as an owner.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use delivery::domain::budget::EventBudget;
use delivery::domain::encoding::Encoding;
use delivery::domain::ids::{ConnectionKey, SessionAddress, ShardId};
use delivery::handoff::Doorbell;
use delivery::service::backends::ports::MissedEvents;
use delivery::service::cluster::missed::MissedSessions;
use delivery::service::cluster::ports::{HandOffSink, HandOffStored, OutgoingHandOff, Queued};
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

use super::names::{TOPIC, epoch, fill, table};
use crate::names::{device, user};
use crate::payload::{Stamp, Template, conversation_id};
use crate::usage::process_ns;

/// Members of all conversations of one size, together: more than caches hold.
const MEMBERS: usize = 400_000;
/// Members of all records of one size, together.
const ROUTED: usize = 8_000_000;
/// Most records of one size.
const RECORDS_MAX: usize = 400_000;
const SIZES: [usize; 5] = [2, 10, 100, 1_000, 10_000];

/// Routes records.
#[derive(clap::Args, Debug)]
pub struct RoutePlan {
    /// Sessions of all nodes.
    #[arg(long, default_value_t = 10_000_000)]
    sessions: usize,
    /// Nodes.
    #[arg(long, default_value_t = 50)]
    nodes: usize,
}

struct Records {
    values: Arc<Vec<Vec<u8>>>,
    next: i64,
    end: i64,
}

impl RecordSource for Records {
    fn poll(&mut self, take: &mut dyn FnMut(RawRecord<'_>)) -> bool {
        if self.next >= self.end {
            return false;
        }
        let offset = self.next;
        self.next += 1;
        let value = &self.values[offset as usize % self.values.len()];
        take(RawRecord { offset, appended_at_ms: 1, key: None, value, traceparent: None });
        true
    }

    fn is_at_end(&self) -> bool {
        self.next >= self.end
    }
}

/// Stores at once.
#[derive(Default)]
pub(super) struct ImmediateSink(AtomicU64);

impl HandOffSink for ImmediateSink {
    fn send(&self, _: OutgoingHandOff<'_>, stored: HandOffStored) -> Queued {
        self.0.fetch_add(1, Ordering::Relaxed);
        stored();
        Queued::Accepted
    }

    fn has_room(&self) -> bool {
        true
    }
}

fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    (*state >> 33) as usize
}

impl RoutePlan {
    /// A node with the sessions of one of the nodes, the first.
    fn directory(&self) -> Arc<Directory> {
        let directory = Directory::new();
        for number in (0..self.sessions).step_by(self.nodes) {
            let connection = ConnectionKey { slot: number as u32, generation: 0 };
            let (shard, encoding) = (ShardId(0), Encoding::Binary);
            let address = SessionAddress { shard, encoding, connection };
            directory.insert(SessionIds::new(&user(number), &device(number)), address);
        }
        Arc::new(directory)
    }

    /// Conversations of `size` users of other nodes, and a record of each.
    fn conversations(&self, size: usize, membership: &Membership) -> Vec<Vec<u8>> {
        let template = Template::new(400);
        let mut state = size as u64;
        let count = (MEMBERS / size).max(1);
        let conversations = (0..count).map(|number| {
            let mut members: Vec<String> = (0..size)
                .map(|_| {
                    let drawn = random(&mut state) % self.sessions;
                    user(if drawn.is_multiple_of(self.nodes) { drawn + 1 } else { drawn })
                })
                .collect();
            members.sort_unstable();
            members.dedup();
            let members: Vec<&str> = members.iter().map(String::as_str).collect();
            let position = RecordPosition { topic: 1, partition: 0, offset: number as i64 };
            let by = ReadBy::Follower(position);
            membership.created(&conversation_id(number), &members, by, 1);
            template.envelope(number, Stamp { sequence: 1, intended_ns: 1 })
        });
        conversations.collect()
    }

    /// CPU of a record, µs, and hand-offs of a record.
    fn route(
        &self,
        size: usize,
        directory: &Arc<Directory>,
        table: Option<&Arc<SessionTable>>,
        runtime: &tokio::runtime::Runtime,
    ) -> io::Result<(f64, f64)> {
        let config = MembershipConfig { conversations_max: 400_000, ..MembershipConfig::default() };
        let membership = Membership::new(config, None, runtime.handle().clone(), Arc::default());
        let values = Arc::new(self.conversations(size, &membership));
        membership.follow();
        let bell = Arc::new(Doorbell::new()?);
        let sink = Arc::<ImmediateSink>::default();
        let missed = MissedSessions::new(Arc::clone(directory), None, Arc::clone(&bell));
        let missed = Arc::new(missed);
        let cluster = table.map(|table| ClusterParts {
            table: Arc::clone(table),
            holder: Arc::<Mutex<_>>::default(),
            sink: Arc::clone(&sink) as Arc<dyn HandOffSink>,
            missed: Arc::clone(&missed) as Arc<dyn MissedEvents>,
            topics: Arc::from([Arc::from(TOPIC)]),
            answers: Arc::default(),
        });
        let (router, control) = Router::new(RouterParts {
            config: RouterConfig::default(),
            counters: Arc::default(),
            bell,
            links: Vec::new(),
            directory: Arc::clone(directory),
            membership,
            user_lists: None,
            remote: None,
            tails: cluster.is_some().then(|| TailBudget::new(64 << 20, 300_000)),
            cluster,
            dead_letters: None,
            budget: EventBudget::new(256 << 20),
        });
        let records = (ROUTED / size).min(RECORDS_MAX);
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
        let before = process_ns(std::process::id())?;
        control.assign(Assignment {
            log: TopicPartition { topic: TOPIC.into(), topic_index: 0, partition: 0 },
            source: Box::new(Records { values, next: 0, end: records as i64 }),
            start: Some(0),
            fill: None,
            committable: Arc::clone(&committable),
            ownership,
        });
        while committable.get() != Some(records as i64) {
            sleep(Duration::from_millis(1));
        }
        let took = process_ns(std::process::id())? - before;
        control.stop();
        let ended = thread.join();
        ended.map_err(|_| io::Error::other("the router panicked"))?;
        let hand_offs = sink.0.load(Ordering::Relaxed) as f64 / records as f64;
        Ok((took as f64 / records as f64 / 1e3, hand_offs))
    }

    /// Prints what it found.
    ///
    /// # Errors
    /// `/proc` is not mounted, or a thread cannot be started.
    pub fn run(&self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let table = table();
        fill(&table, self.sessions, self.nodes, |_, apply| apply());
        table.set_own_epoch(epoch(0));
        let directory = self.directory();
        println!(
            "members  broadcast, µs  owner, µs  hand-offs  (CPU of a record without recipients here)"
        );
        for size in SIZES {
            let (broadcast, _) = self.route(size, &directory, None, &runtime)?;
            let (owner, hand_offs) = self.route(size, &directory, Some(&table), &runtime)?;
            println!("{size:>7}  {broadcast:>13.2}  {owner:>9.2}  {hand_offs:>9.2}");
        }
        Ok(())
    }
}
