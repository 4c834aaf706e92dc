//! The sessions that have missed events, and the pace at which they are closed.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::TICK;
use crate::domain::ids::SessionAddress;
use crate::service::members::directory::SessionIds;

/// After a longer pause of the session manager, the closes of this time are made up for at once.
const MADE_UP_MAX: Duration = Duration::from_secs(1);

/// Sessions that have left the directory because they have missed events.
#[derive(Debug)]
pub(super) struct MissedCloses {
    per_second: u32,
    /// Those whose close frame is due, oldest first.
    waiting: VecDeque<SessionAddress>,
    /// All of them until their end is reported or another session takes their place.
    left: HashMap<SessionIds, SessionAddress>,
    /// When sessions were last closed.
    closed_at: Option<Instant>,
}

impl MissedCloses {
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_second, waiting: VecDeque::new(), left: HashMap::new(), closed_at: None }
    }

    /// A session has left the directory. `ids`: whose it is, unless another one has its place already.
    /// `waits`: its close frame is due.
    pub(super) fn add(&mut self, ids: Option<SessionIds>, address: SessionAddress, waits: bool) {
        if let Some(ids) = ids {
            self.left.insert(ids, address);
        }
        if waits {
            self.waiting.push_back(address);
        }
    }

    /// Takes the session of this user and device, if it has left the directory: another one replaces it.
    pub(super) fn left(&mut self, ids: &SessionIds) -> Option<SessionAddress> {
        self.left.remove(ids)
    }

    /// The session has ended. Returns whether it was one of these.
    pub(super) fn remove(&mut self, ids: &SessionIds, address: SessionAddress) -> bool {
        let is_known = self.left.get(ids) == Some(&address);
        if is_known {
            self.left.remove(ids);
        }
        is_known
    }

    /// Sessions that have left the directory and have not ended.
    pub(super) fn len(&self) -> usize {
        self.left.len()
    }

    /// Sessions to look at for a close. Some may have ended.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The drain closes all sessions.
    pub(super) fn wait_no_longer(&mut self) {
        self.waiting = VecDeque::new();
    }

    /// How many sessions may be closed now. To be called at each tick.
    pub(super) fn allowed(&mut self, now: Instant) -> usize {
        let before = self.closed_at.replace(now);
        let passed = before.map_or(TICK, |before| now.saturating_duration_since(before));
        (f64::from(self.per_second) * passed.min(MADE_UP_MAX).as_secs_f64()).ceil() as usize
    }

    /// The next session that may be due.
    pub(super) fn next(&mut self) -> Option<SessionAddress> {
        let next = self.waiting.pop_front();
        if self.waiting.is_empty() {
            self.waiting.shrink_to(0);
        }
        next
    }
}
