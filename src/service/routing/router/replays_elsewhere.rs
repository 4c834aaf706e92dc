//! Replays in `group` mode with hand-off through the log: each owner has the tails of its partitions.
//!
//! ```text
//! reader of a session              owner of some partitions (this node, or another one through the hand-off topic)
//!   check: positions      ───────────►  once it knows the session and has passed V: up to where it replays
//!   pull: ranges, bounds  ───────────►  records, and what is left
//!   …
//!   fence                 ───────────►  each router of this node
//! ```
//!
//! An owner keeps nothing of a session. If it loses a partition, its successor is asked for what is left.
//!
//! **What holds when a replay is complete.** The session has every record below the end of each range: replayed. It
//! gets every record from *V* on live ([`cluster`](crate::service::cluster)), and no range ends below *V*. There is one
//! exception: if its own node was the owner, what that had routed before the session was admitted, past parked records
//! that hold back the position, and also above *V*. So no range ends below what had arrived on this node either
//! ([`Holder::live_from`](crate::service::cluster::holder::Holder::live_from)). Every owner had applied its beginning,
//! so what it passes from then on it has handed over to this session too. A later owner may know fewer sessions: what
//! it passes does not count for cursors before it knows all that may get some
//! ([`Holder::counts_for_cursors`](crate::service::cluster::holder::Holder::counts_for_cursors)).
//!
//! **The fence.** A shard may still have a higher position of a former owner, and records for this session may still be
//! in the rings, behind positions that are above them. So each router gives the shards its positions again, and then
//! waits until the shard of the session has taken them. On a node that has just started it waits also until it knows a
//! position of each partition, which their owners tell it each second: a cursor without them would be worth less than
//! the one that the client has. Only then the replay is complete.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hashbrown::HashSet;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

use crate::domain::cursor::{Cursor, CursorExpired, TopicId, UNCHECKED};
use crate::domain::ids::SessionAddress;
use crate::service::cluster::holder::SourcePartition;
use crate::service::cluster::ports::{OutgoingHandOff, Queued};
use crate::service::cluster::table::NodeAddress;
use crate::service::cluster::wire::hand_off_header::Content;
use crate::service::cluster::wire::{
    self, AnsweredRange, HandOffHeader, RangeStatus, ReplayAnswer, ReplayRequest,
};
use crate::service::routing::replays::{
    CoveredLog, PendingChunk, ReplayChunks, ReplayReader, ReplayedChunk, ReplayedRecord,
    TailReplays,
};
use crate::service::routing::router::RouterControl;
use crate::service::routing::router::owner::ClusterParts;
use crate::service::routing::router::replay_requests::{AnswerTo, ReplayChunkMax};
use crate::service::routing::router::returning::{ReplayInput, ShardFence};

/// How long an answer is waited for.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// Time between two requests for the same partitions.
const RETRY: Duration = Duration::from_millis(50);
/// How long a replay may make no progress: a partition may be without an owner for about a minute.
const PROGRESS_WAIT: Duration = Duration::from_secs(90);
/// How often the owners are told that this node uses cursors.
const USED_INTERVAL: Duration = Duration::from_secs(20);

/// The owners of all partitions, as the source of replays.
pub struct GroupReplays(Arc<GroupParts>);

struct GroupParts {
    routers: Vec<RouterControl>,
    cluster: ClusterParts,
    ids: Vec<TopicId>,
    max: ReplayChunkMax,
    is_used: AtomicBool,
}

impl GroupReplays {
    /// `routers`: those of this node.
    pub fn new(routers: Vec<RouterControl>, cluster: ClusterParts, max: ReplayChunkMax) -> Self {
        let ids = cluster.topics.iter().map(|topic| TopicId::of(topic)).collect();
        Self(Arc::new(GroupParts { routers, cluster, ids, max, is_used: AtomicBool::new(false) }))
    }

    /// Tells the owners from time to time that this node uses cursors, once it does: they tell it then what has passed.
    /// Ends never.
    pub fn keep_told(&self) -> impl Future<Output = ()> + Send + 'static {
        let parts = Arc::clone(&self.0);
        async move {
            loop {
                sleep(USED_INTERVAL).await;
                if parts.is_used.load(Ordering::Relaxed) {
                    for to in parts.cluster.table.others() {
                        parts.send(to, ReplayRequest::default());
                    }
                }
            }
        }
    }
}

impl TailReplays for GroupReplays {
    fn replay(
        &self,
        session: SessionAddress,
        user: Arc<str>,
        since: Option<Cursor>,
    ) -> ReplayReader {
        self.0.is_used.store(true, Ordering::Relaxed);
        let live_from = self.0.cluster.holder.lock().expect("no holder panics").live_from();
        ReplayReader::new(GroupReplay {
            parts: Arc::clone(&self.0),
            session,
            user,
            since,
            live_from,
            begin: None,
            ranges: BTreeMap::new(),
        })
    }
}

impl GroupParts {
    /// Asks another node. Nothing is sent if the queue is full: the caller asks again.
    fn send(&self, to: NodeAddress, request: ReplayRequest) {
        if !to.answers_replays {
            return;
        }
        let holder = self.cluster.table.own_epoch().0;
        let content = Some(Content::ReplayRequest(ReplayRequest { holder, ..request }));
        let header = HandOffHeader { content, ..HandOffHeader::default() };
        let (target, partition) = (to.epoch, to.partition);
        let hand_off =
            OutgoingHandOff { target, partition, header: &header, key: None, value: &[] };
        match self.cluster.sink.send(hand_off, Box::new(|| {})) {
            Queued::Accepted | Queued::Full => {}
            Queued::TooLarge => tracing::warn!("a replay request is too large"),
        }
    }

    fn source(&self, topic: &str, partition: i32) -> Option<SourcePartition> {
        let index = self.cluster.topics.iter().position(|known| **known == *topic)?;
        Some(SourcePartition { topic: u16::try_from(index).ok()?, partition })
    }

    fn router(&self, source: SourcePartition) -> usize {
        (usize::from(source.topic) + source.partition.unsigned_abs() as usize) % self.routers.len()
    }
}

/// The records of one partition for one replay.
#[derive(Clone, Copy, Debug)]
struct OpenRange {
    /// The first offset that is wanted; -1: none.
    next: i64,
    check: u32,
    /// `None`: not checked yet, or to be checked again.
    to: Option<i64>,
    /// `None`: never checked.
    status: Option<RangeStatus>,
    /// The position of the owner that has checked it.
    position: i64,
}

/// One replay.
struct GroupReplay {
    parts: Arc<GroupParts>,
    session: SessionAddress,
    user: Arc<str>,
    since: Option<Cursor>,
    /// No range may end below.
    live_from: HashMap<SourcePartition, i64>,
    /// `None`: nothing is checked yet.
    begin: Option<i64>,
    ranges: BTreeMap<SourcePartition, OpenRange>,
}

impl ReplayChunks for GroupReplay {
    fn next(&mut self) -> PendingChunk<'_> {
        Box::pin(self.next_chunk())
    }

    fn covered(&self) -> Vec<CoveredLog> {
        let known = self.ranges.iter().filter(|(_, range)| range.next > 0);
        let covered = known.map(|(source, range)| CoveredLog {
            topic: Arc::clone(&self.parts.cluster.topics[usize::from(source.topic)]),
            partition: source.partition,
            below: range.next,
            // No range ends above a parked record.
            except: Arc::default(),
        });
        covered.collect()
    }
}

impl GroupReplay {
    async fn next_chunk(&mut self) -> ReplayedChunk {
        let begin = match self.begin {
            Some(begin) => begin,
            None => {
                let begin = self.stored().await?;
                self.want(self.known_sources())?;
                self.check(begin).await?;
                self.begin = Some(begin);
                begin
            }
        };
        let deadline = Instant::now() + PROGRESS_WAIT;
        loop {
            let is_open = |range: &OpenRange| range.to.is_some_and(|to| range.next < to);
            let open = self.ranges.iter().filter(|(_, range)| is_open(range));
            let open: Vec<_> = open.map(|(source, _)| *source).collect();
            if open.is_empty() {
                match self.may_get_cursors(begin) {
                    Ok(()) => break,
                    // Another owner has said something since the check.
                    Err(_) if Instant::now() >= deadline => return Err(CursorExpired::Overtaken),
                    Err(unchecked) => self.want(unchecked)?,
                }
                self.check(begin).await?;
                continue;
            }
            // One owner after the other, so that a chunk is bounded.
            let owner = |source: &SourcePartition| self.parts.cluster.table.owner(*source);
            let first = owner(&open[0]);
            let of_first: Vec<_> = open.into_iter().filter(|it| owner(it) == first).collect();
            let records = self.ask(begin, &of_first, Some(self.parts.max)).await?;
            if !records.is_empty() {
                return Ok(Some(records));
            }
            if of_first.iter().all(|source| is_open(&self.ranges[source])) {
                if Instant::now() >= deadline {
                    return Err(CursorExpired::Overtaken);
                }
                sleep(RETRY).await;
            }
        }
        for (number, router) in self.parts.routers.iter().enumerate() {
            let (answer, fenced) = oneshot::channel();
            let of_router = self.ranges.keys().filter(|it| self.parts.router(**it) == number);
            let id = |it: &SourcePartition| self.parts.ids[usize::from(it.topic)];
            let partitions = of_router.map(|it| (id(it), it.partition.unsigned_abs())).collect();
            let fence = ShardFence { shard: self.session.shard, partitions, answer };
            router.replay(ReplayInput::Fence(fence));
            let fenced = timeout_at(Instant::now() + PROGRESS_WAIT, fenced).await;
            fenced.ok().and_then(Result::ok).ok_or(CursorExpired::Overtaken)?;
        }
        Ok(None)
    }

    fn may_get_cursors(&self, begin: i64) -> Result<(), Vec<SourcePartition>> {
        let mut holder = self.parts.cluster.holder.lock().expect("no holder panics");
        holder.may_get_cursors(begin, |source| self.ranges.get(&source).map(|it| it.position))
    }

    /// Waits until the beginning of the session is stored.
    async fn stored(&self) -> Result<i64, CursorExpired> {
        let deadline = Instant::now() + PROGRESS_WAIT;
        loop {
            {
                let holder = self.parts.cluster.holder.lock().expect("no holder panics");
                if let Some(begin) = holder.begin(self.session) {
                    return Ok(begin);
                }
                // It has ended.
                if holder.serial(self.session).is_none() {
                    return Err(CursorExpired::Overtaken);
                }
            }
            if Instant::now() >= deadline {
                return Err(CursorExpired::Overtaken);
            }
            sleep(RETRY / 5).await;
        }
    }

    /// The partitions of the cursor, and all others that have owners.
    fn known_sources(&self) -> Vec<SourcePartition> {
        let parts = &self.parts;
        let mut sources: HashSet<_> = parts.cluster.table.sources().into_iter().collect();
        for position in self.since.iter().flat_map(Cursor::positions) {
            let topic = parts.ids.iter().position(|id| *id == position.topic);
            let topic = topic.and_then(|topic| u16::try_from(topic).ok());
            let partition = i32::try_from(position.partition).ok();
            sources.extend(
                topic.zip(partition).map(|(topic, partition)| SourcePartition { topic, partition }),
            );
        }
        sources.into_iter().collect()
    }

    /// Wants the records of these partitions, from the cursor on.
    fn want(&mut self, sources: Vec<SourcePartition>) -> Result<(), CursorExpired> {
        for source in sources {
            if let Some(known) = self.ranges.get_mut(&source) {
                // What precedes its next record is checked.
                (known.to, known.check) = (None, UNCHECKED);
                continue;
            }
            let id = self.parts.ids[usize::from(source.topic)];
            let (next, check) = match &self.since {
                None => (-1, UNCHECKED),
                Some(since) if !since.has_topic(id) => return Err(CursorExpired::NewTopic),
                Some(since) => {
                    let known = since.get(id, source.partition.unsigned_abs());
                    known.map_or((0, UNCHECKED), |position| (position.next, position.check))
                }
            };
            let range = OpenRange { next, check, to: None, status: None, position: -1 };
            self.ranges.insert(source, range);
        }
        Ok(())
    }

    /// Checks all partitions before anything is replayed.
    async fn check(&mut self, begin: i64) -> Result<(), CursorExpired> {
        let deadline = Instant::now() + PROGRESS_WAIT;
        loop {
            let open = self.ranges.iter().filter(|(_, range)| range.to.is_none());
            let open: Vec<_> = open.map(|(source, _)| *source).collect();
            if open.is_empty() {
                break;
            }
            self.ask(begin, &open, None).await?;
            if open.iter().any(|source| self.ranges[source].to.is_none()) {
                if Instant::now() >= deadline {
                    return Err(CursorExpired::Unverified);
                }
                sleep(RETRY).await;
            }
        }
        // See `judge` of `replays_here`.
        let verified =
            self.ranges.iter().filter(|(_, it)| it.status == Some(RangeStatus::Verified));
        let verified: HashSet<_> = verified.map(|(source, _)| source.topic).collect();
        let is_known = |(source, range): (&SourcePartition, &OpenRange)| {
            range.status != Some(RangeStatus::NotKnown) || verified.contains(&source.topic)
        };
        if self.ranges.iter().all(is_known) { Ok(()) } else { Err(CursorExpired::Unverified) }
    }

    /// Asks the owners of these partitions once, for records or to check. Notes their answers.
    async fn ask(
        &mut self,
        begin: i64,
        sources: &[SourcePartition],
        max: Option<ReplayChunkMax>,
    ) -> Result<Vec<ReplayedRecord>, CursorExpired> {
        let mut open = self.parts.cluster.answers.open();
        let mut asked: HashSet<SourcePartition> = HashSet::new();
        for (to, request) in self.requests(open.id, begin, sources, max)? {
            let of_request = request.ranges.iter();
            asked.extend(of_request.filter_map(|it| self.parts.source(&it.topic, it.partition)));
            match to {
                Asked::Router(number) => {
                    let to = AnswerTo::ThisNode(Arc::clone(&self.parts.cluster.answers));
                    self.parts.routers[number].replay(ReplayInput::Request { request, to });
                }
                Asked::Node(to) => self.parts.send(to, request),
            }
        }
        let deadline = Instant::now() + ANSWER_WAIT;
        let mut records = Vec::new();
        while !asked.is_empty() {
            let Ok(Some(answer)) = timeout_at(deadline, open.answers.recv()).await else { break };
            self.note(answer, &mut asked, max.is_none(), &mut records)?;
        }
        Ok(records)
    }

    fn requests(
        &self,
        id: u64,
        begin: i64,
        sources: &[SourcePartition],
        max: Option<ReplayChunkMax>,
    ) -> Result<BTreeMap<Asked, ReplayRequest>, CursorExpired> {
        let parts = &self.parts;
        let mut requests: BTreeMap<Asked, ReplayRequest> = BTreeMap::new();
        for source in sources {
            // Without an owner it is asked later.
            let Some(owner) = parts.cluster.table.owner(*source) else { continue };
            let to = if owner.epoch == parts.cluster.table.own_epoch() {
                Asked::Router(parts.router(*source))
            } else if owner.answers_replays {
                Asked::Node(owner)
            } else {
                return Err(CursorExpired::OlderNode);
            };
            let request = requests.entry(to).or_insert_with(|| ReplayRequest {
                id,
                begin,
                user: self.user.to_string(),
                records_max: max.map_or(0, |max| u32::try_from(max.records).unwrap_or(u32::MAX)),
                bytes_max: max.map_or(0, |max| u32::try_from(max.bytes).unwrap_or(u32::MAX)),
                ..ReplayRequest::default()
            });
            let OpenRange { next, check, to, .. } = self.ranges[source];
            request.ranges.push(wire::ReplayRange {
                topic: parts.cluster.topics[usize::from(source.topic)].to_string(),
                partition: source.partition,
                next,
                to: to.unwrap_or(0),
                check,
            });
        }
        Ok(requests)
    }

    fn note(
        &mut self,
        answer: ReplayAnswer,
        asked: &mut HashSet<SourcePartition>,
        is_check: bool,
        records: &mut Vec<ReplayedRecord>,
    ) -> Result<(), CursorExpired> {
        let mut noted = HashSet::new();
        for AnsweredRange { range, status, expired, position, generation } in answer.ranges {
            let Some(range) = range else { continue };
            let source = self.parts.source(&range.topic, range.partition);
            // An answer may come twice.
            let Some(source) = source.filter(|source| asked.remove(source)) else { continue };
            noted.insert(source);
            let Some(open) = self.ranges.get_mut(&source) else { continue };
            match RangeStatus::try_from(status).unwrap_or(RangeStatus::NotYet) {
                RangeStatus::NotYet => {}
                RangeStatus::Expired => {
                    let reason = CursorExpired::ALL.get(expired as usize).copied();
                    return Err(reason.unwrap_or(CursorExpired::OlderNode));
                }
                status if is_check => {
                    let live_from = self.live_from.get(&source).copied().unwrap_or(0);
                    let holder = self.parts.cluster.holder.lock().expect("no holder panics");
                    // What a zombie has handed over is discarded.
                    let is_zombie = generation < holder.generation(source);
                    drop(holder);
                    // It is asked again until its position has reached that.
                    let is_behind = open.next >= 0 && range.to < live_from;
                    if !is_zombie && !is_behind {
                        (open.to, open.position) = (Some(range.to), position);
                        open.status = open.status.or(Some(status));
                    }
                }
                _ => open.next = range.next,
            }
        }
        for record in answer.records {
            let Some(source) = self.parts.source(&record.topic, record.partition) else { continue };
            if noted.contains(&source) {
                records.push(ReplayedRecord {
                    topic: Arc::clone(&self.parts.cluster.topics[usize::from(source.topic)]),
                    partition: record.partition,
                    offset: record.offset,
                    appended_at_ms: u64::try_from(record.appended_at_ms).unwrap_or(0),
                    key: record.key.map(Vec::into_boxed_slice),
                    value: Bytes::from(record.value),
                });
            }
        }
        Ok(())
    }
}

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    /// A router of this node.
    Router(usize),
    Node(NodeAddress),
}
