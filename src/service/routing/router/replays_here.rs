//! Replays in `broadcast` mode: the routers of the node have the tails of all partitions.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::domain::cursor::{Cursor, CursorExpired, TopicId, Verified};
use crate::domain::ids::SessionAddress;
use crate::service::members::user_lists::UserList;
use crate::service::routing::replays::{
    CoveredLog, PendingChunk, ReplayChunks, ReplayReader, ReplayedChunk, TailReplays,
};
use crate::service::routing::router::RouterControl;
use crate::service::routing::router::replay_requests::{
    PulledRecords, ReplayChunkMax, ReplayRange,
};
use crate::service::routing::router::returning::{CheckedLanes, ReplayInput};

/// How long a replay waits for a partition of its cursor that no router has: it may be between two readers.
const ASSIGNED_WAIT: Duration = Duration::from_secs(5);
/// Time between two attempts.
const ASSIGNED_RETRY: Duration = Duration::from_millis(100);

/// The routers of this node, as the source of replays.
pub struct RouterReplays {
    routers: Vec<RouterControl>,
    /// The topics of events.
    topics: Arc<[TopicId]>,
    max: ReplayChunkMax,
}

impl RouterReplays {
    /// Replays from these routers, which have the tails of all partitions of these topics, in such chunks.
    pub fn new(routers: Vec<RouterControl>, topics: &[Arc<str>], max: ReplayChunkMax) -> Self {
        let topics = topics.iter().map(|topic| TopicId::of(topic)).collect();
        Self { routers, topics, max }
    }
}

impl TailReplays for RouterReplays {
    fn replay(
        &self,
        _session: SessionAddress,
        user: Arc<str>,
        since: Option<Cursor>,
    ) -> ReplayReader {
        let Some(since) = since else {
            // The routers know every session of this node.
            return ReplayReader::new(std::iter::empty());
        };
        ReplayReader::new(RouterReplay {
            routers: self.routers.clone(),
            topics: Arc::clone(&self.topics),
            max: self.max,
            user,
            unchecked: Some(Arc::new(since)),
            list: None,
            ranges: VecDeque::new(),
            covered: Vec::new(),
        })
    }
}

/// One replay.
struct RouterReplay {
    routers: Vec<RouterControl>,
    topics: Arc<[TopicId]>,
    max: ReplayChunkMax,
    user: Arc<str>,
    /// The cursor, until it is checked.
    unchecked: Option<Arc<Cursor>>,
    /// The conversations of the user, if a router needed them.
    list: Option<UserList>,
    /// What is left, by router.
    ranges: VecDeque<(usize, Vec<ReplayRange>)>,
    /// What the client has when nothing is left.
    covered: Vec<CoveredLog>,
}

impl ReplayChunks for RouterReplay {
    fn next(&mut self) -> PendingChunk<'_> {
        Box::pin(self.next_chunk())
    }

    fn covered(&self) -> Vec<CoveredLog> {
        self.covered.clone()
    }
}

impl RouterReplay {
    async fn next_chunk(&mut self) -> ReplayedChunk {
        if let Some(since) = self.unchecked.clone() {
            self.check(&since).await?;
            self.unchecked = None;
        }
        while let Some((router, ranges)) = self.ranges.front_mut() {
            let (answer, pulled) = oneshot::channel();
            let (user, max) = (Arc::clone(&self.user), self.max);
            let ranges = std::mem::take(ranges);
            let list = self.list.take();
            self.routers[*router].replay(ReplayInput::Pull { user, ranges, max, list, answer });
            // An error means that the router has ended.
            let pulled = pulled.await.unwrap_or(Err(CursorExpired::Overtaken))?;
            let PulledRecords { records, ranges: left, list } = pulled;
            self.list = list;
            if left.is_empty() {
                self.ranges.pop_front();
            } else if let Some((_, ranges)) = self.ranges.front_mut() {
                *ranges = left;
            }
            if !records.is_empty() {
                return Ok(Some(records));
            }
        }
        Ok(None)
    }

    /// Checks all partitions before anything is replayed.
    async fn check(&mut self, since: &Arc<Cursor>) -> Result<(), CursorExpired> {
        let deadline = Instant::now() + ASSIGNED_WAIT;
        loop {
            let mut answers = Vec::new();
            for router in &self.routers {
                let (answer, checked) = oneshot::channel();
                router.replay(ReplayInput::Check { since: Arc::clone(since), answer });
                answers.push(checked);
            }
            let mut checked = Vec::new();
            for answer in answers {
                checked.push(answer.await.unwrap_or(Err(CursorExpired::Overtaken))?);
            }
            match judge(since, &self.topics, &checked) {
                Judged::Usable => {
                    let lanes = checked.iter().flat_map(|checked| &checked.lanes);
                    self.covered = lanes.map(|lane| lane.covered.clone()).collect();
                    let ranges = checked.into_iter().map(|checked| checked.ranges).enumerate();
                    self.ranges = ranges.filter(|(_, ranges)| !ranges.is_empty()).collect();
                    return Ok(());
                }
                Judged::Unverified => return Err(CursorExpired::Unverified),
                Judged::Incomplete if Instant::now() >= deadline => {
                    return Err(CursorExpired::Unverified);
                }
                Judged::Incomplete => sleep(ASSIGNED_RETRY).await,
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Usable,
    /// A partition of the cursor is not read.
    Incomplete,
    /// The cursor may be of another log.
    Unverified,
}

/// All partitions of a topic are created together. So one position that is of this log speaks for those of the same
/// topic whose check is not known any more: there the record before the position was deleted, or is older than the
/// tail, or there was none.
fn judge(since: &Cursor, topics: &[TopicId], checked: &[CheckedLanes]) -> Judged {
    let mut read = HashMap::new();
    let mut is_verified: HashMap<TopicId, bool> = HashMap::new();
    for lane in checked.iter().flat_map(|checked| &checked.lanes) {
        read.insert((lane.topic, lane.partition), lane.verified);
        *is_verified.entry(lane.topic).or_default() |= lane.verified == Verified::Yes;
    }
    for position in since.positions().iter().filter(|it| topics.contains(&it.topic)) {
        match read.get(&(position.topic, position.partition)) {
            None => return Judged::Incomplete,
            Some(Verified::NotKnown) if !is_verified[&position.topic] => return Judged::Unverified,
            Some(_) => {}
        }
    }
    Judged::Usable
}
